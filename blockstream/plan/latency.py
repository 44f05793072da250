"""The paper's latency model: what concurrent inference and dynamic loading save, and their bounds.

Symbols as in the paper: `b` blocks a pass, `d` of them retained, `l` seconds to load one, `e` seconds
to execute one, `alpha` the overhead, `r` the seconds saved a pass against running loads and compute
one after another, b (l + e). Pure functions of numbers.
"""

from __future__ import annotations

from collections.abc import Collection

from .segments import Stage


def sequential_s(b: int, l: float, e: float) -> float:
    """Return the seconds of a pass without any overlap, b (l + e)."""
    return b * (l + e)


def concurrent_saving_s(b: int, l: float, e: float, alpha: float = 0.0) -> float:
    """Return r of Eq. 8, r = b min(l, e) - alpha: block i+1 loads while block i executes."""
    return b * min(l, e) - alpha


def dynamic_saving_s(b: int, d: int, l: float, e: float, alpha: float = 0.0) -> float:
    """Return r of Eq. 9, r = b min(l, e) + d max(0, l - e) - alpha (1 - d / b).

    The first d blocks stay in memory from the first pass on.
    """
    if not 0 <= d <= b:
        raise ValueError(f"d = {d} blocks cannot be retained of b = {b}")
    return b * min(l, e) + d * max(0.0, l - e) - alpha * (1 - d / b)


def concurrent_s(b: int, l: float, e: float, alpha: float = 0.0) -> float:
    """Return the seconds of a pass under Eq. 8: b (l + e) - r."""
    return sequential_s(b, l, e) - concurrent_saving_s(b, l, e, alpha)


def dynamic_s(b: int, d: int, l: float, e: float, alpha: float = 0.0) -> float:
    """Return the seconds of a pass under Eq. 9: b (l + e) - r."""
    return sequential_s(b, l, e) - dynamic_saving_s(b, d, l, e, alpha)


def spread_bound_s(b: int, d: int, l: float, e: float) -> float:
    """Return what a pass cannot beat with d blocks retained, max(b e, (b - d) l).

    Retained blocks evenly spaced in time approach it, because the loader never waits long for a slot.
    """
    return max(b * e, (b - d) * l)


def alpha_s(b: int, d: int, l: float, e: float, wall_s: float) -> float:
    """Return the overhead that makes Eq. 9 meet a measured pass of `wall_s` seconds.

    Undefined when everything is retained (the term vanishes): 0 is returned.
    """
    if d >= b:
        return 0.0
    return (wall_s - dynamic_s(b, d, l, e)) / (1 - d / b)


def one_ahead_s(stage: Stage, retained: Collection[int] = ()) -> float:
    """Return the seconds of a steady pass with one visit of lookahead, for unequal segments.

    The load of each visit begins with the compute of the one before, across the pass boundary:
    sum over visits of max(e_i, l_(i+1)), with l = 0 for what is retained. For equal segments this
    is Eq. 8 (d = 0) and Eq. 9 (a prefix of d) with alpha = 0.
    """
    total = 0.0
    for k, i in enumerate(stage.order):
        following = stage.order[(k + 1) % len(stage.order)]
        load_s = 0.0 if following in retained else stage.segments[following].load_s
        total += max(stage.segments[i].execute_s, load_s)
    return total


def bound_s(stage: Stage, retained: Collection[int] = (), passes: int | None = None) -> float:
    """Return what a stage cannot beat: the larger of all its compute and all its reads.

    Reads are one load of each retained segment and one a visit of the others.
    """
    n = stage.passes.expected if passes is None else passes
    kept = sum(stage.segments[i].load_s for i in stage.visited if i in retained)
    read, computed = kept if n else 0.0, 0.0
    for index in range(n):
        visited = [stage.order[k] for k in stage.positions(index)]
        read += sum(stage.segments[i].load_s for i in visited if i not in retained)
        computed += stage.pace_of(index) * sum(stage.segments[i].execute_s for i in visited)
    return max(computed, read)


def tiers_dynamic_s(b: int, d: int, h: int, l: float, c: float, e: float) -> float:
    """Return the seconds of a pass of Eq. 9 on two tiers: d e + h max(c, e) + (b - d - h) max(l, c, e).

    Of b blocks d stay on the device and h in host memory; c is the seconds of a copy over the link. A block
    from disk is copied while the next one is read. d = h = 0 is Eq. 8.
    """
    if d < 0 or h < 0 or d + h > b:
        raise ValueError(f"d = {d} blocks on the device and h = {h} in host memory cannot be of b = {b}")
    return d * e + h * max(c, e) + (b - d - h) * max(l, c, e)


def tiers_bound_s(b: int, d: int, h: int, l: float, c: float, e: float) -> float:
    """Return what a pass on two tiers cannot beat: all compute, all copies, all reads."""
    return max(b * e, (b - d) * c, (b - d - h) * l)


def overlap(load_s: float, stall_s: float) -> float:
    """Return the share of load time that compute hid: load time less stalls, over load time, 0..1."""
    return max(0.0, 1.0 - stall_s / load_s) if load_s else 0.0
