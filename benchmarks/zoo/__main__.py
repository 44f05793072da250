"""Stream every model of the zoo and write one page: python -m benchmarks.zoo [NAME ...] [--out FOLDER].

What was compared before is in FOLDER/zoo.json and not compared again; name it to have it done anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks._results import commit

from .compare import compare
from .every import every, why_not
from .models import DIFFUSERS, TRANSFORMERS
from .pipelines import PIPELINES

ANIMALS = {**TRANSFORMERS, **DIFFUSERS}
#: How each is stored and asked for.
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp32 as bf16": (torch.float32, torch.bfloat16),
    "fp32 as fp16": (torch.float32, torch.float16),
}


def main() -> None:
    """Compare what is asked for, or what is left, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--out", type=Path, default=Path("out/zoo"))
    parser.add_argument(
        "--every", action="store_true", help="every text architecture of transformers as well"
    )
    parser.add_argument("--minutes", type=float, help="begin no comparison after so long")
    options = parser.parse_args()
    animals = {**ANIMALS, **(every() if options.every else {}), **PIPELINES}
    if unknown := sorted(set(options.names) - animals.keys()):
        parser.error(f"{unknown[0]!r} is none of {', '.join(animals)}")
    begun = time.monotonic()
    logging.disable(logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "zoo.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for name in options.names or animals:
        if name in done and name not in options.names:
            continue
        if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
            break
        done[name] = _row(name, animals[name])
        record.write_text(json.dumps(done, indent=1))
        print(name, done[name], flush=True)
    page = _page(done, sorted(animals.keys() - done.keys()))
    (options.out / "zoo.md").write_text(page)
    print(page.splitlines()[2])


def _row(name: str, animal: Any) -> dict[str, str]:
    """Return what comes of one architecture or pipeline, by how it is stored and asked for."""
    if name in PIPELINES:
        return {"fp32": _caught(animal)}
    if name in ANIMALS:
        return {how: _one(animal, *dtypes) for how, dtypes in DTYPES.items()}
    if (why := why_not(animal)) is not None:
        return {"fp32": why}
    return {how: _one(animal, *DTYPES[how]) for how in ("fp32", "fp32 as bf16")}


def _one(animal: Any, stored: torch.dtype, asked: torch.dtype | None) -> str:
    return _caught(lambda folder: compare(animal, folder, stored, asked, "64MiB"))


def _caught(compared: Callable[[Path], str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return compared(Path(folder))
        except Exception as error:  # what nobody foresaw is what the page is for
            return f"crashed: {type(error).__name__}: {str(error)[:200]}"


def _page(done: dict[str, dict[str, str]], left: list[str]) -> str:
    """Return the page: counts, what was not run, and a row of everything that is compared."""
    compared = {n: row for n, row in done.items() if not row["fp32"].startswith("not compared")}
    counts = Counter(result.partition(":")[0] for row in compared.values() for result in row.values())
    head = ", ".join(f"{n} {what}" for what, n in counts.most_common())
    rows = [
        f"| {name} | {' | '.join(row.get(how, '-') for how in DTYPES)} |"
        for name, row in sorted(compared.items())
    ]
    columns = f"| architecture | {' | '.join(DTYPES)} |\n|{'---|' * (len(DTYPES) + 1)}"
    apart = [f"* {name}: {row['fp32'][14:]}" for name, row in sorted(done.items()) if name not in compared]
    missing = ["", "## Not run", "", ", ".join(left), ""] if left else []
    skipped = ["", "## Not compared: no small config of generic sizes fits", "", *apart] if apart else []
    libraries = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "diffusers"))
    return "\n".join(
        [
            f"# Zoo, {datetime.date.today().isoformat()}",
            "",
            "    python -m benchmarks.zoo --every",
            "",
            f"{len(compared)} architectures and pipelines: {head}. Commit {commit()}, {libraries}.",
            "",
            "Each is loaded by its own library and streamed, and results are compared bit for bit; "
            "weights lie at multiples of 64.",
            "",
            columns,
            *rows,
            *skipped,
            *missing,
            "",
        ]
    )


if __name__ == "__main__":
    main()
