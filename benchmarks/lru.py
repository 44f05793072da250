"""An LRU cache of segments, as a rival: it lives here only, to show why retention is a plan.

A denoising loop scans its segments cyclically, so whatever is evicted last recently used is what is
needed next: with room for less than all of them the cache never hits.
"""

from __future__ import annotations

from collections import OrderedDict

from blockstream.plan.segments import Stage


def lru_ends(stage: Stage, capacity: int, passes: int) -> list[float]:
    """Return the seconds at which each pass ends with an LRU cache of `capacity` equal segments.

    The loader runs ahead as far as the cache allows: a load begins once the least recently used
    segment has been computed with for the last time.
    """
    if capacity < 2:
        raise ValueError(f"a cache of {capacity} segments cannot overlap; the least is 2")
    cached: OrderedDict[int, float] = OrderedDict()  # segment -> when it is loaded
    done: dict[int, float] = {}  # segment -> when its last visit so far has ended
    loader = compute = 0.0
    ends = []
    for _ in range(passes):
        for i in stage.order:
            if i not in cached:
                start = loader
                if len(cached) == capacity:
                    victim, _ = cached.popitem(last=False)
                    start = max(start, done[victim])
                loader = start + stage.segments[i].load_s
                cached[i] = loader
            cached.move_to_end(i)
            compute = max(compute, cached[i]) + stage.segments[i].execute_s
            done[i] = compute
        ends.append(compute)
    return ends
