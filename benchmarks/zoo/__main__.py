"""Stream every model of the zoo and write one page: python -m benchmarks.zoo [NAME ...] [--out FOLDER].

What was compared before is in FOLDER/zoo.json and not compared again; name it to have it done anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections import Counter
from pathlib import Path

import torch

from .compare import compare
from .models import DIFFUSERS, TRANSFORMERS

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
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - ANIMALS.keys()):
        parser.error(f"{unknown[0]!r} is none of {', '.join(ANIMALS)}")
    logging.disable(logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "zoo.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for name in options.names or ANIMALS:
        if name in done and name not in options.names:
            continue
        done[name] = {how: _one(name, *dtypes) for how, dtypes in DTYPES.items()}
        record.write_text(json.dumps(done, indent=1))
        print(name, done[name], flush=True)
    page = _page(done)
    (options.out / "zoo.md").write_text(page)
    print(page.splitlines()[2])


def _one(name: str, stored: torch.dtype, asked: torch.dtype | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return compare(ANIMALS[name], Path(folder), stored, asked, "64MiB")
        except Exception as error:  # what nobody foresaw is what the page is for
            return f"crashed: {type(error).__name__}: {str(error)[:200]}"


def _page(done: dict[str, dict[str, str]]) -> str:
    counts = Counter(result.partition(":")[0] for row in done.values() for result in row.values())
    head = ", ".join(f"{n} {what}" for what, n in counts.most_common())
    rows = [f"| {name} | {' | '.join(row.values())} |" for name, row in sorted(done.items())]
    columns = f"| architecture | {' | '.join(DTYPES)} |\n|{'---|' * (len(DTYPES) + 1)}"
    return "\n".join(["# Zoo", "", f"{len(done)} architectures: {head}.", "", columns, *rows, ""])


if __name__ == "__main__":
    main()
