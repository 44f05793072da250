"""Run one contestant with one network in this process, and print what it took as a line of JSON.

    python -m benchmarks.peers.contestant WAY MODEL FOLDER SCRATCH --passes 3 [--budget NBYTES] [--empty]

Started by `python -m benchmarks.peers` with the interpreter of the contestant's own environment, in a
control group. Set-up is timed apart; between it and the first pass the page cache forgets both the
checkpoint and what set-up wrote. Bytes read are the kernel's count of what this process had from the disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestant import digest
from benchmarks.peers.models import MODELS, config_of, result
from benchmarks.peers.ways import WAYS, Job
from benchmarks.streaming import drop_cached
from blockstream.system.limits import cpu_count, page_cache_nbytes
from blockstream.system.memory import MemoryWatch

PACKAGES = (
    "torch",
    "safetensors",
    "transformers",
    "accelerate",
    "diffusers",
    "airllm",
    "aircanvas",
    "blockstream-engine",
)


def read_nbytes() -> int:
    """Return the bytes that this process has caused to be read from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def folders(top: Path) -> list[Path]:
    return [top, *(p for p in top.rglob("*") if p.is_dir())]


def disk_nbytes(top: Path) -> int:
    return sum(p.stat().st_size for p in top.rglob("*") if p.is_file() and not p.is_symlink())


def run(way: str, job: Job) -> dict[str, Any]:
    """Return the facts of one run."""
    facts: dict[str, Any] = {"way": way, "versions": versions()}
    inputs = job.model.inputs(config_of(job.folder))
    watch = MemoryWatch()
    begin = time.perf_counter()
    with torch.inference_mode(), watch, WAYS[way].run(job, facts) as forward:
        facts["setup_s"] = time.perf_counter() - begin
        gc.collect()
        for folder in (job.folder, *folders(job.scratch)):
            drop_cached(folder)
        passes_s, read, digests = [], [], []
        for _ in range(job.passes):
            before, start = read_nbytes(), time.perf_counter()
            output = result(forward(**inputs))
            passes_s.append(time.perf_counter() - start)
            read.append(read_nbytes() - before)
            digests.append(digest(output))
            del output
        facts |= {
            "passes_s": passes_s,
            "read_nbytes": read,
            "digest": digests[-1],
            "steady": len(set(digests)) == 1,
            "peak_nbytes": watch.peak_nbytes,
            "page_cache_nbytes": page_cache_nbytes(),
            "disk_nbytes": disk_nbytes(job.scratch),
        }
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--empty", action="store_true", help="fill no memory with weights")
    options = parser.parse_args()
    torch.set_num_threads(cpu_count().threads)
    job = Job(
        MODELS[options.model],
        options.model,
        options.folder,
        options.scratch,
        options.passes,
        options.budget,
        not options.empty,
    )
    print(json.dumps(run(options.way, job)))


if __name__ == "__main__":
    main()
