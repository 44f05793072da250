"""The costs of a stage: measured in earlier runs, else estimated from operations; and what a run keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import torch

from blockstream.checkpoint.read.requests import SegmentLayout
from blockstream.system import calibration

from .costs import Seen
from .known import OUTSIDE, READ_SPEED, Known
from .op_costs import Measuring, op_seconds, stretched
from .stage_facts import Facts

#: What a load reads at the least to tell a speed.
LARGE_NBYTES = 8 << 20


def known_costs(facts: Facts, variant: str, measuring: Measuring) -> Known:
    """Return what earlier runs measured of a stage, and what its operations add up to where they did not.

    `variant`: what else execution depends on, such as attention transforms. What a run measured beside more
    other work than there is now is set aside, where operations can be measured.
    """
    about = _About(facts, variant)
    load_s = calibration.read(about.loads)
    read_speed = calibration.read(about.reading).get("bytes_per_s") or READ_SPEED
    kept = None if about.shapes is None else calibration.believed(about.executes, measuring.load)
    if kept is not None and abs(kept.load - measuring.load) <= calibration.ALIKE:
        return Known(load_s, kept.numbers, None, read_speed, source="measured in earlier runs")
    known = _added_up(facts, Known(load_s, {}, None, read_speed), measuring)
    if kept is None or (known.call_s is not None and measuring.most_s):
        return known
    quiet = {name: s * (1 - kept.load) for name, s in kept.numbers.items()}
    execute_s, said = stretched(quiet, measuring.load, sum(quiet.values()) * facts.passes.expected)
    source = f"measured in earlier runs beside other work{said}"
    return replace(known, execute_s=execute_s, call_s=None, source=source)


def _added_up(facts: Facts, known: Known, measuring: Measuring) -> Known:
    """Return the same with what the operations of a forward take, where they are known."""
    if facts.rehearsal is None or not facts.rehearsal.work.ops:
        return known
    work = facts.rehearsal.work
    op_s, part = op_seconds(work, measuring)
    alone = work.seconds(op_s)
    call_s, said = stretched(alone, measuring.load, alone[""] * facts.passes.expected)
    if part >= 0.5:
        source = f"operations of each kind of block, run here on random weights ({part:.0%} of the time)"
    else:
        source = "operations and bytes, at the speed of a product of matrices and of memory"
    return replace(known, call_s=call_s, source=f"{source}{said}")


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
        first = min(files, key=lambda f: str(f.path), default=None)
        self.reading = calibration.read_speed_of("" if first is None else calibration.disk_of(first))


def main_dtype(layouts: Mapping[str, SegmentLayout]) -> str:
    """Return the dtype most bytes of a module are held in."""
    nbytes: Counter[str] = Counter()
    for layout in layouts.values():
        for placed in layout.tensors.values():
            nbytes[placed.dtype] += placed.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else "F32"


def remember(facts: Facts, variant: str, seen: Seen, load: float) -> None:
    """Keep what a run measured of a stage for the plans to come; other work took `load` of the processors.

    Segments that experts were read apart from say nothing of whole ones.
    """
    if facts.cut.experts:
        return
    about = _About(facts, variant)
    layouts = facts.cut.layouts
    sizes = {n: (layout.read_nbytes, layout.nbytes) for n, layout in layouts.items()}
    calibration.write(about.loads, seen.load_s(sizes), load=load)
    # Small loads are mostly overhead: they say nothing of the speed of large ones.
    large = {n: x for n, x in seen.loads.items() if n in layouts and layouts[n].read_nbytes >= LARGE_NBYTES}
    read = sum(layouts[n].read_nbytes * len(x) for n, x in large.items())
    spent = sum(map(sum, large.values()))
    if spent > 0:
        calibration.write(about.reading, {"bytes_per_s": read / spent}, load=load)
    if about.shapes is None:
        return
    executes = {n: fmean(x) for n, x in seen.executes.items() if x}
    calibration.write(about.executes, {**executes, OUTSIDE: seen.outside_s}, load=load)
