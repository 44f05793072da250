"""Fewer bars and points where there are more than a picture can show: merged, never dropped."""

from __future__ import annotations

from collections.abc import Sequence

from .bars import Bar, Merger, Sample


def thin_bars(bars: Sequence[Bar], most: int) -> list[Bar]:
    """Return at most about `most` bars: neighbours of one thread, stage and kind become one.

    A merged bar spans what it stands for and says of how many; short gaps between them are closed.
    """
    if len(bars) <= most:
        return list(bars)
    begin, end = min(b.start_s for b in bars), max(b.end_s for b in bars)
    merger = Merger((end - begin) / most)
    for bar in sorted(bars, key=lambda b: b.start_s):
        merger.add(bar)
    return merger.bars()


def thin_samples(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return at most `most` samples, each the largest of its stretch of time."""
    if len(samples) <= most:
        return list(samples)
    begin, end = samples[0].at_s, samples[-1].at_s
    width = (end - begin) / most or 1.0
    largest: dict[int, Sample] = {}
    for sample in samples:
        k = min(most - 1, int((sample.at_s - begin) / width))
        if k not in largest or sample.nbytes > largest[k].nbytes:
            largest[k] = sample
    return [largest[k] for k in sorted(largest)]
