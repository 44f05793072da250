"""What is known of a stage's costs before it runs: kept from earlier runs, else estimated from operations."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from blockstream.module.dtypes import to_torch
from blockstream.module.rehearsal import Rehearsal, shapes_of
from blockstream.system import calibration

from .costs import OUTSIDE, READ_SPEED, Seen

if TYPE_CHECKING:
    from blockstream.module.prepared import Prepared

#: What a load reads, and a visit computes, at the least to tell a speed.
LARGE_NBYTES = 8 << 20
LARGE_FLOPS = 1e9
#: The part of a large matrix product's speed that the rest of a network reaches.
EFFICIENCY = 0.6
#: The dtype that layers with int8 weights multiply in.
_MULTIPLIED = {"bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class Known:
    """What is known of a stage's costs before it runs; `source` says in words where from.

    `load_s`, `execute_s` in seconds by segment, what earlier runs measured. `flops` of one call by module
    path, None when they could not be counted. Speeds in bytes and operations a second.
    """

    load_s: Mapping[str, float] = field(default_factory=dict)
    execute_s: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] | None = None
    read_speed: float = READ_SPEED
    compute_speed: float = 0.0
    source: str = "guessed from sizes"

    def of_cut(self, sizes: Mapping[str, int]) -> Known:
        """Return the same of a cut whose segments have these sizes in bytes, whatever cut was measured.

        What was measured of its pieces adds up to a block, what was measured of a block is shared among its
        pieces by their bytes.
        """
        load_s, execute_s = (_recut(seconds, sizes) for seconds in (self.load_s, self.execute_s))
        return replace(self, load_s=load_s, execute_s=execute_s)


def _recut(seconds: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return seconds by segment of another cut than the one they were measured of; {} has none to tell."""
    found = {name: seconds[name] for name in sizes if name in seconds}
    shared: dict[str, list[str]] = defaultdict(list)
    for name in sizes:
        if name in found:
            continue
        if pieces := [s for other, s in seconds.items() if other.startswith(f"{name}.")]:
            found[name] = sum(pieces)
        elif (block := next((x for x in _parents(name) if x in seconds), None)) is not None:
            shared[block].append(name)
    for block, names in shared.items():
        all_of_them = sum(sizes[n] for n in sizes if n.startswith(f"{block}."))
        found |= {n: seconds[block] * sizes[n] / max(1, all_of_them) for n in names}
    return found | {OUTSIDE: seconds[OUTSIDE]} if OUTSIDE in seconds else found


def _parents(path: str) -> list[str]:
    """Return the paths of the modules that hold one, the nearest first."""
    names = path.split(".")
    return [".".join(names[:n]) for n in range(len(names) - 1, 0, -1)]


def known_costs(
    prepared: Prepared, example_inputs: Any, variant: str = "", rehearsal: Rehearsal | None = None
) -> Known:
    """Return what earlier runs measured of a module, and what its operations say where they did not.

    `variant`: what else execution depends on, such as attention transforms. `rehearsal`: of these inputs.
    """
    facts = _Facts(prepared, example_inputs, variant)
    load_s = calibration.read(facts.loads)
    execute_s = calibration.read(facts.executes) if facts.shapes is not None else {}
    read_speed = calibration.read(facts.reading).get("bytes_per_s") or READ_SPEED
    if execute_s:
        return Known(load_s, execute_s, None, read_speed, source="measured in earlier runs")
    if rehearsal is None or not rehearsal.flops:
        return Known(load_s, {}, None, read_speed)
    speed = calibration.read(facts.computing).get("flops_per_s") or 0.0
    source = "operations at the speed of earlier runs"
    if not speed:
        speed = _matmul_speed(_MULTIPLIED[prepared.int8] if facts.dtype == "I8" else facts.dtype)
        source = "operations at a share of a matrix product's speed"
    return Known(load_s, {}, rehearsal.flops, read_speed, speed, source)


class _Facts:
    """What the kept numbers of one stage depend on."""

    def __init__(self, prepared: Prepared, example_inputs: Any, variant: str) -> None:
        files = {f for layout in prepared.layouts.values() for f in layout.files}
        threads = torch.get_num_threads()
        self.dtype = main_dtype(prepared)
        shapes = shapes_of(example_inputs)
        self.shapes = None if shapes is None else f"{shapes}{variant and f'; {variant}'}"
        self.loads = calibration.load_costs_of(files, self.dtype)
        self.executes = calibration.execute_costs_of(files, self.dtype, threads, self.shapes)
        self.computing = calibration.compute_speed_of(threads, self.dtype)
        path = min((f.path for f in files), key=str, default=".")
        self.reading = calibration.read_speed_of(path)


def main_dtype(prepared: Prepared) -> str:
    """Return the dtype most bytes of a module are held in."""
    nbytes: Counter[str] = Counter()
    for layout in prepared.layouts.values():
        for placed in layout.tensors.values():
            nbytes[placed.dtype] += placed.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else "F32"


def _matmul_speed(dtype: str) -> float:
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


def remember(
    prepared: Prepared, example_inputs: Any, variant: str, seen: Seen, rehearsal: Rehearsal | None = None
) -> None:
    """Keep what a run measured of a stage for the plans to come."""
    facts = _Facts(prepared, example_inputs, variant)
    layouts = prepared.layouts
    sizes = {n: (layout.read_nbytes, layout.nbytes) for n, layout in layouts.items()}
    calibration.write(facts.loads, seen.load_s(sizes))
    # Small loads and visits are mostly overhead: they say nothing of the speed of large ones.
    large = {n: x for n, x in seen.loads.items() if n in layouts and layouts[n].read_nbytes >= LARGE_NBYTES}
    read = sum(layouts[n].read_nbytes * len(x) for n, x in large.items())
    spent = sum(map(sum, large.values()))
    if spent > 0:
        calibration.write(facts.reading, {"bytes_per_s": read / spent})
    if facts.shapes is None:
        return
    executes = {n: median(x) for n, x in seen.executes.items() if x}
    calibration.write(facts.executes, {**executes, OUTSIDE: seen.outside_s})
    flops = {} if rehearsal is None else rehearsal.flops
    entries = {p.name: p.entry for p in prepared.parts if p.entry is not None}
    counted = {n: flops.get(entry, 0.0) for n, entry in entries.items()}
    heavy = {n: x for n, x in seen.executes.items() if counted.get(n, 0.0) >= LARGE_FLOPS}
    done = sum(counted[n] * len(x) for n, x in heavy.items())
    took = sum(map(sum, heavy.values()))
    if done > 0 and took > 0:
        calibration.write(facts.computing, {"flops_per_s": done / took})
