"""Three hooks in one plugin: samplers, a retention policy, an observer."""

from __future__ import annotations

from collections import defaultdict

from pydantic import BaseModel, Field

from blockstream.plugins import Choice, RetentionPolicy, hookimpl


class Every(BaseModel):
    """The options of the policy: what a config may set, checked before anything runs."""

    nth: int = Field(2, ge=1, description="keep one segment of so many")

    def retain(self, stage, room):
        """Return the indices of the segments that stay in `room` bytes. A pure function."""
        chosen = []
        for i in stage.visited[:: self.nth]:
            segment = stage.segments[i]
            if segment.resident:
                continue
            if segment.nbytes > room:
                break
            chosen.append(i)
            room -= segment.nbytes
        return chosen


def _ab2(options):
    from .ab2 import sample  # what is heavy is imported when it is chosen

    return sample


def _heun(options):
    from .heun import Heun

    return Heun()


@hookimpl
def samplers():
    """List the samplers."""
    return [
        Choice("ab2", _ab2, summary="Adams-Bashforth of second order, one pass a step"),
        Choice("heun", _heun, summary="Heun's method of second order, two passes a step"),
    ]


@hookimpl
def retention_policies():
    """List the policy; of several that `build` returned, the plan of least predicted time would win."""
    build = lambda options: [RetentionPolicy(f"every-{options.nth}", options.retain)]  # noqa: E731
    return [Choice("every", build, Every, "keep one segment of so many")]


# The observer. A config turns it on by naming the plugin; what it notes begins anew with each run.

_reads = defaultdict(list)


@hookimpl
def run_started(run):
    """Forget the last run."""
    _reads.clear()


@hookimpl
def segment_loaded(span):
    """Note a read. This is the loader thread: return at once."""
    _reads[span.label].append((span.nbytes, span.seconds))


@hookimpl
def run_finished(run, report):
    """Write the table into the run's folder."""
    lines = ["segment,reads,bytes,seconds"]
    for label, reads in _reads.items():
        nbytes, seconds = (sum(column) for column in zip(*reads, strict=True))
        lines.append(f"{label},{len(reads)},{nbytes},{seconds:.6f}")
    run.files.declare(["reads.csv"])
    run.files.write("reads.csv", ("\n".join(lines) + "\n").encode())
