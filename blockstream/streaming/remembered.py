"""The costs of a stage: measured in earlier runs, else estimated from operations; and what a run keeps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from statistics import median

import torch

from blockstream.checkpoint.read.requests import SegmentLayout
from blockstream.module.dtypes import to_torch
from blockstream.system import calibration

from .costs import Seen
from .known import OUTSIDE, READ_SPEED, Known
from .stage_facts import Facts

#: What a load reads, and a visit computes, at the least to tell a speed.
LARGE_NBYTES = 8 << 20
LARGE_FLOPS = 1e9
#: The part of a large matrix product's speed that the rest of a network reaches.
EFFICIENCY = 0.6
#: The dtype that layers with int8 weights multiply in.
_MULTIPLIED = {"bf16": "BF16", "fp32": "F32"}


def known_costs(facts: Facts, variant: str, int8: str) -> Known:
    """Return what earlier runs measured of a stage, and what its operations say where they did not.

    `variant`: what else execution depends on, such as attention transforms; `int8`: how such
    layers multiply.
    """
    about = _About(facts, variant)
    load_s = calibration.read(about.loads)
    execute_s = calibration.read(about.executes) if about.shapes is not None else {}
    read_speed = calibration.read(about.reading).get("bytes_per_s") or READ_SPEED
    if execute_s:
        return Known(load_s, execute_s, None, read_speed, source="measured in earlier runs")
    if facts.rehearsal is None or not facts.rehearsal.flops:
        return Known(load_s, {}, None, read_speed)
    speed = calibration.read(about.computing).get("flops_per_s") or 0.0
    source = "operations at the speed of earlier runs"
    if not speed:
        speed = matmul_speed(_MULTIPLIED[int8] if about.dtype == "I8" else about.dtype)
        source = "operations at a share of a matrix product's speed"
    return Known(load_s, {}, facts.rehearsal.flops, read_speed, speed, source)


class _About:
    """What the kept numbers of one stage depend on."""

    def __init__(self, facts: Facts, variant: str) -> None:
        files = {f for layout in facts.cut.layouts.values() for f in layout.files}
        threads = torch.get_num_threads()
        self.dtype = main_dtype(facts.cut.layouts)
        shapes = facts.shapes
        self.shapes = None if shapes is None else f"{shapes}{variant and f'; {variant}'}"
        self.loads = calibration.load_costs_of(files, self.dtype)
        self.executes = calibration.execute_costs_of(files, self.dtype, threads, self.shapes)
        self.computing = calibration.compute_speed_of(threads, self.dtype)
        first = min(files, key=lambda f: str(f.path), default=None)
        self.reading = calibration.read_speed_of("" if first is None else calibration.disk_of(first))


def main_dtype(layouts: Mapping[str, SegmentLayout]) -> str:
    """Return the dtype most bytes of a module are held in."""
    nbytes: Counter[str] = Counter()
    for layout in layouts.values():
        for placed in layout.tensors.values():
            nbytes[placed.dtype] += placed.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else "F32"


@lru_cache
def matmul_speed(dtype: str) -> float:
    """Return the operations a second a network is expected to reach, from a product of two matrices."""
    kind = to_torch(dtype)
    n = 1024 if kind is torch.float32 else 512
    a = torch.ones(n, n, dtype=kind if kind.is_floating_point else torch.float32)
    spent = []
    for _ in range(4):  # the first sets the library up, and whatever else runs may delay another
        begin = time.perf_counter()
        a @ a
        spent.append(time.perf_counter() - begin)
    return EFFICIENCY * 2 * n**3 / max(min(spent), 1e-6)


def remember(facts: Facts, variant: str, seen: Seen) -> None:
    """Keep what a run measured of a stage for the plans to come."""
    about = _About(facts, variant)
    layouts = facts.cut.layouts
    sizes = {n: (layout.read_nbytes, layout.nbytes) for n, layout in layouts.items()}
    calibration.write(about.loads, seen.load_s(sizes))
    # Small loads and visits are mostly overhead: they say nothing of the speed of large ones.
    large = {n: x for n, x in seen.loads.items() if n in layouts and layouts[n].read_nbytes >= LARGE_NBYTES}
    read = sum(layouts[n].read_nbytes * len(x) for n, x in large.items())
    spent = sum(map(sum, large.values()))
    if spent > 0:
        calibration.write(about.reading, {"bytes_per_s": read / spent})
    if about.shapes is None:
        return
    executes = {n: median(x) for n, x in seen.executes.items() if x}
    calibration.write(about.executes, {**executes, OUTSIDE: seen.outside_s})
    flops = {} if facts.rehearsal is None else facts.rehearsal.flops
    entries = {p.name: p.entry for p in facts.cut.parts if p.entry is not None}
    counted = {n: flops.get(entry, 0.0) for n, entry in entries.items()}
    heavy = {n: x for n, x in seen.executes.items() if counted.get(n, 0.0) >= LARGE_FLOPS}
    done = sum(counted[n] * len(x) for n, x in heavy.items())
    took = sum(map(sum, heavy.values()))
    if done > 0 and took > 0:
        calibration.write(about.computing, {"flops_per_s": done / took})
