"""Measure the device's tiers on one GPU, all in at most eight minutes: `python -m benchmarks.device [parts]`.

Each part runs in a process of its own with a time limit; one that fails is named and stops no other. The
results are DATE-device.json and .md under benchmarks/results, or --out; the last lines say which goals were
reached. `--fake` runs everything at toy sizes on a machine without a device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks._results import FOLDER, provenance
from benchmarks.device.goals import page, verdicts

#: The parts in the order they run, each with its limit in seconds.
PARTS = {
    "make": 60,
    "link": 30,
    "resident": 50,
    "pinned": 60,
    "half": 60,
    "settled": 50,
    "bits": 100,
    "disk": 75,
    "budget": 50,
    "offload": 60,
    "groups": 50,
    "attention": 30,
    "tiles": 45,
    "setup": 30,
    "load": 30,
    "soak": 45,
    "t5": 60,
    "stdit": 30,
    "vae": 25,
    "opensora": 90,
    "llama": 100,
}
#: Parts of other files than `parts`, by file.
FAMILIES = ("t5", "stdit", "vae", "llama", "opensora", "soak", "load")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for and write what they found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("parts", nargs="*", help="all of them, if none is named")
    parser.add_argument("--fake", action="store_true", help="toy sizes on a fake device")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results go")
    parser.add_argument("--seconds", type=float, default=470, help="for all of it")
    parser.add_argument("--folder", type=Path, help="where weights are written; a temporary one if none")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.one:
        return _one(options)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="blockstream-device-") as folder:
        found: dict[str, Any] = {}
        names = options.parts or list(PARTS)
        if "make" not in names:
            names = ["make", *names]
        options.out.mkdir(parents=True, exist_ok=True)
        for name in (n for n in PARTS if n in names):
            left = options.seconds - (time.perf_counter() - begin)
            found[name] = _part(name, Path(folder), options.fake, min(PARTS[name], left))
            _write(options, found)  # after each: a run that is cut off leaves what it had
    lines = verdicts(found)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    print("\n".join(lines))
    return 0


def _part(name: str, folder: Path, fake: bool, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; return what it found, or how it failed."""
    if seconds < 5:
        return {"failed": "no time was left"}
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.device", "--one", name, "--folder", str(folder)]
    command += ["--seconds", str(seconds - 3), *(["--fake"] if fake else [])]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=_environment(folder)
        )
        said = done.stderr[-1500:]
        failed = None if done.returncode == 0 else f"exit code {done.returncode}: {said}"
    except subprocess.TimeoutExpired as error:
        said = error.stderr[-1500:].decode(errors="replace") if isinstance(error.stderr, bytes) else ""
        failed = f"over {seconds:.0f} s: {said}"
    found = json.loads(out.read_text()) if out.exists() else {}
    if failed is not None:
        found["failed"] = failed
    found["took_s"] = time.perf_counter() - begin
    print(
        f"{name}: {found['took_s']:.1f} s{'' if failed is None else ', FAILED ' + failed[-300:]}", flush=True
    )
    return found


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "BLOCKSTREAM_CACHE": str(folder / "cache"), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def _one(options: argparse.Namespace) -> int:
    """Run one part here and write what it found."""
    from benchmarks.device import bits, families, parts, tiles

    at = parts.Context(options.folder, options.fake, options.seconds)
    others = {"bits": bits.bits, "tiles": tiles.tiles}
    others |= {name: getattr(families, name) for name in FAMILIES}
    act = others[options.one] if options.one in others else getattr(parts, options.one)
    try:
        found = act(at)
    except BaseException:
        traceback.print_exc()
        return 1
    (options.folder / f"{options.one}.json").write_text(json.dumps(found, default=str))
    return 0


def _write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    command = "python -m benchmarks.device" + "".join(f" {p}" for p in options.parts)
    made = provenance(command + (" --fake" if options.fake else ""))
    made["device"] = device_name()
    stem = options.out / f"{made['date']}-device{'-fake' if options.fake else ''}"
    stem.with_suffix(".json").write_text(json.dumps({**made, "parts": found}, indent=1, default=str) + "\n")
    stem.with_suffix(".md").write_text(page(made, found))


def device_name() -> str | None:
    """Return the name of the GPU and its driver, as its tool tells; None where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
