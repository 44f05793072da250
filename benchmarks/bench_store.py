"""Measure what one load of a segment costs in each form of a checkpoint, beside the raw device.

    python benchmarks/bench_store.py DIR [--segments 4] [--mib 192] [--rounds 5] [--dtype bf16]

DIR (new, on the disk in question, about four times the bytes) gets the same random blocks as
safetensors, as a torch zip file and packed in both the original and another dtype. Each round loads
every segment of each form in turn, after a raw direct read of as many bytes; every trial is shown.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

from bench_reader import raw_s

from blockstream.arena import Arena
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.layout import Request
from blockstream.checkpoint.pack import DTYPES, pack
from blockstream.checkpoint.placement import lay_out
from blockstream.checkpoint.reader import REQUEST_NBYTES, THREADS, probe_memory_align
from blockstream.checkpoint.store import FileStore
from blockstream.checkpoint.synth import synthesise
from blockstream.segments import Extent


def spec(segments: int, mib: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return blocks of two matrices and a norm each, `mib` MiB a block."""
    rows = (mib << 20) // 4 // 2 // 4096
    return {
        f"block.{i}.{name}": ("F32", shape)
        for i in range(segments)
        for name, shape in (("wi", (rows, 4096)), ("wo", (4096, rows)), ("norm.weight", (4096,)))
    }


def store(checkpoint: Checkpoint, dtype: str | None) -> FileStore:
    """Return a store of the checkpoint's blocks, with an arena of one room."""
    align = probe_memory_align(checkpoint.files[0].path)
    blocks: dict[str, list[Request]] = {}
    for name in checkpoint.names:
        block = name.rsplit(".", 2)[0] if "norm" in name else name.rsplit(".", 1)[0]
        blocks.setdefault(block, []).append(Request(name, (checkpoint[name],), dtype))
    layouts = {n: lay_out(n, r, memory_align=max(align, 4)) for n, r in blocks.items()}
    arena = Arena(max(x.nbytes for x in layouts.values()))
    arena.populate(Extent(0, arena.nbytes))
    return FileStore(arena, {"m": layouts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--mib", type=int, default=192, help="MiB a segment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    folder: Path = options.dir
    folder.mkdir(parents=True)
    try:
        blocks = spec(options.segments, options.mib)
        plain = synthesise(blocks, folder / "safetensors")
        torch_zip = synthesise(blocks, folder / "bin", "bin")
        names = {
            f"block.{i}": [n for n in blocks if n.startswith(f"block.{i}.")] for i in range(options.segments)
        }
        pack(plain, folder / "packed", names)
        pack(plain, folder / "small", names, options.dtype)
        forms = {
            "safetensors in place": store(plain, None),
            "torch zip in place": store(torch_zip, None),
            "packed": store(Checkpoint.open(folder / "packed"), None),
            f"packed {options.dtype}": store(Checkpoint.open(folder / "small"), None),
            f"safetensors to {options.dtype}": store(plain, DTYPES[options.dtype]),
        }
        print(f"{' '.join(sys.argv)}\n{platform.platform()}, Python {platform.python_version()}")
        print(f"{options.segments} segments of {options.mib} MiB, {options.rounds} rounds")
        raw: list[float] = []
        speeds: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(options.rounds):
            for name, files in forms.items():
                room = files.arena.view(Extent(0, files.arena.nbytes))
                seconds = raw_s(plain.files[0].path, room, REQUEST_NBYTES, THREADS)
                raw.append(len(room) / seconds / 1e9)
                before = files.totals.read_nbytes
                begin = time.perf_counter()
                for segment, layout in files.stages["m"].items():
                    files.load("m", segment, Extent(0, layout.nbytes)).release()
                seconds = time.perf_counter() - begin
                speeds[name].append((files.totals.read_nbytes - before) / seconds / 1e9)
        print(_line("raw direct", raw))
        for name, files in forms.items():
            t = files.totals
            print(
                f"{_line(name, speeds[name])}\n    {files.reader.mode}; a load reads "
                f"{t.read_nbytes / t.loads / 1e6:.1f} MB, binds {t.bound_nbytes / t.loads / 1e6:.1f}, "
                f"moves {t.moved_nbytes / t.loads / 1e6:.1f} in {t.move_s / t.loads * 1e3:.1f} ms, "
                f"converts {t.converted_nbytes / t.loads / 1e6:.1f} in {t.convert_s / t.loads * 1e3:.1f} ms"
            )
            files.close()
    finally:
        shutil.rmtree(folder)


def _line(name: str, trials: list[float]) -> str:
    shown = " ".join(f"{t:.2f}" for t in trials)
    low, high = min(trials), max(trials)
    return f"{name:24} median {statistics.median(trials):.2f} GB/s ({low:.2f} to {high:.2f}) | {shown}"


if __name__ == "__main__":
    main()
