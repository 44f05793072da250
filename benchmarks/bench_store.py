"""Measure what one load of a segment costs in each form of a checkpoint, beside the raw device.

    python -m benchmarks.bench_store DIR [--segments 4] [--mib 192] [--rounds 5] [--dtype bf16]

DIR (new, on the disk in question, about four times the bytes) gets the same random blocks as
safetensors, as a torch zip file and packed in both the original and another dtype. Each round loads
every segment of each form in turn, after a raw direct read of as many bytes. Writes a dated result.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from benchmarks._results import summary, table, write
from benchmarks.bench_reader import raw_s, shown
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.file_store import FileStore
from blockstream.checkpoint.read.placement import lay_out
from blockstream.checkpoint.read.reader import REQUEST_NBYTES, THREADS, probe_memory_align
from blockstream.checkpoint.read.requests import Request
from blockstream.checkpoint.write.packer import DTYPES, pack
from blockstream.checkpoint.write.synthesis import synthesise
from blockstream.engine.arena import Arena
from blockstream.plan.loads import Load
from blockstream.plan.segments import Extent, Segment, Visit


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
                    visit, room_of = Visit(0, 0, 0), Extent(0, layout.nbytes)
                    sized = Segment(segment, layout.nbytes)
                    files.begin(Load("m", visit, (0, 0), sized, room_of, retained=False)).finish()
                seconds = time.perf_counter() - begin
                speeds[name].append((files.totals.read_nbytes - before) / seconds / 1e9)
        rows = [("raw device", shown(raw), *("",) * 4)]
        for name, files in forms.items():
            t = files.totals
            rows.append(
                (
                    name,
                    shown(speeds[name]),
                    f"{t.read_nbytes / t.loads / 1e6:.1f}",
                    f"{t.bound_nbytes / t.loads / 1e6:.1f}",
                    f"{t.moved_nbytes / t.loads / 1e6:.1f} in {t.move_s / t.loads * 1e3:.1f} ms",
                    f"{t.converted_nbytes / t.loads / 1e6:.1f} in {t.convert_s / t.loads * 1e3:.1f} ms",
                )
            )
        mode = files.reader.mode
        for files in forms.values():
            files.close()
    finally:
        shutil.rmtree(folder)
    head = ("form", "GB/s read", "MB read a load", "bound", "moved", "converted")
    page = (
        f"{options.segments} segments of {options.mib} MiB, {options.rounds} rounds, reads {mode}; "
        f"median and range.\n\n{table(head, rows)}"
    )
    data = {"gb_per_s": {"raw device": summary(raw), **{n: summary(x) for n, x in speeds.items()}}}
    command = f"python -m benchmarks.bench_store DIR --segments {options.segments} --mib {options.mib}"
    write("store", command, "One load of a segment, by form of checkpoint", page, data)


if __name__ == "__main__":
    main()
