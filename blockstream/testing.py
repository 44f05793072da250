"""A pytest fixture that times a model of yours while it streams. Needs pytest-benchmark.

    def test_encoder_in_two_gigabytes(stream_benchmark):
        run = stream_benchmark(build, "weights/", lambda module: module(ids), budget="2GiB", passes=4)
        assert run.held

pytest finds it by itself where blockstream is installed; nothing of the engine is imported before a test
asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from blockstream.streaming.session import Session

__all__ = ["StreamBenchmark", "StreamedRuns", "drop_page_cache", "stream_benchmark"]


def drop_page_cache(path: str | os.PathLike[str]) -> bool:
    """Drop a file, or all files below a folder, from the page cache; return whether that can be done here.

    What was written is put on the disk first: pages not written back cannot be dropped.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    root = Path(path)
    for file in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


@dataclass
class StreamedRuns:
    """What the rounds of one benchmark came to; lists have one entry a round.

    `figures` are those of the ledger (seconds, bytes), as `extra_info` has them; `reports` the sessions'.
    """

    figures: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Return whether every round kept its budget."""
        return all(f["held"] for f in self.figures)

    def median(self, name: str) -> float:
        """Return the median of one figure over the rounds."""
        return float(median(f[name] for f in self.figures))


class StreamBenchmark:
    """Times forwards of a streamed module, each round from a new session and with a cold page cache."""

    def __init__(self, benchmark: Any) -> None:
        self._benchmark = benchmark

    def __call__(
        self,
        model: Any,
        checkpoint: str | os.PathLike[str],
        forward: Callable[[Any], object],
        *,
        passes: int = 1,
        rounds: int = 5,
        cold: bool = True,
        budget: int | str | None = None,
        arena: int | str | None = None,
        policy: Any = "auto",
        **stage: Any,
    ) -> StreamedRuns:
        """Time `passes` calls of `forward(module)` in each round; return what the ledgers say.

        `model`, `checkpoint`, `budget`, `arena`, `policy` as for `blockstream.stream`; `stage` are the rest
        of `Session.stage`: `dtype`, `example_inputs`. Opening, planning and dropping the weights from the
        page cache (`cold`) are not timed. `extra_info` gets the medians of the figures, and every round's.
        """
        from blockstream.streaming.session import Session

        runs = StreamedRuns()
        opened: list[tuple[Session, float]] = []
        is_cold = False

        def close() -> None:
            while opened:
                session, predicted_s = opened.pop()
                session.close()
                if session.ledger.spans:
                    _account(runs, session, predicted_s)

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            nonlocal is_cold
            close()
            is_cold = cold and drop_page_cache(checkpoint)
            session = Session(budget, arena, policy)
            opened.append((session, 0.0))
            module = session.stage("model", model, checkpoint, passes, **stage)
            opened[:] = [(session, session.draft().predicted.wall_s)]
            session.start()
            return (module,), {}

        def run(module: Any) -> None:
            for _ in range(passes):
                forward(module)

        try:
            self._benchmark.pedantic(run, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0)
        finally:
            close()
        if runs.figures:
            self._benchmark.extra_info.update(_summary(runs), passes=passes, cold=is_cold)
        return runs


@pytest.fixture
def stream_benchmark(request: pytest.FixtureRequest) -> StreamBenchmark:
    """Time a model while it streams: `stream_benchmark(model, checkpoint, forward, budget=...)`."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.fail("stream_benchmark needs pytest-benchmark: pip install pytest-benchmark", pytrace=False)
    return StreamBenchmark(request.getfixturevalue("benchmark"))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have pytest-benchmark see what uses `stream_benchmark` as a benchmark: --benchmark-only runs it."""
    names = getattr(item, "fixturenames", [])
    has_it = item.config.pluginmanager.hasplugin("benchmark")
    if has_it and "stream_benchmark" in names and "benchmark" not in names:
        names.append("benchmark")


def _account(runs: StreamedRuns, session: Session, predicted_s: float) -> None:
    """Add what a closed session says of its run."""
    report = session.report()
    stage, budget = report["stages"][0], report["budget"]
    runs.reports.append(report)
    runs.figures.append(
        {
            **{k: stage[k] for k in ("wall_s", "stall_s", "load_s", "execute_s", "overlap", "read_nbytes")},
            "read_bytes_per_s": stage["read_nbytes"] / stage["load_s"] if stage["load_s"] else 0.0,
            "predicted_s": predicted_s,
            "policy": stage["policy"],
            "retained": stage["d"],
            "slots": stage["slots"],
            "peak_nbytes": budget["peak_nbytes"],
            "budget_nbytes": budget["nbytes"],
            "held": budget["held"],
            "read": report["read"],
        }
    )


def _summary(runs: StreamedRuns) -> dict[str, Any]:
    """Return the median of each number over the rounds, what else is the same in all, and every round."""
    summary: dict[str, Any] = {}
    for name, value in runs.figures[0].items():
        values = [f[name] for f in runs.figures]
        if isinstance(value, bool):
            summary[name] = all(values)
        elif isinstance(value, int | float):
            summary[name] = median(values)
        else:
            summary[name] = " ".join(dict.fromkeys(values))
    return {**summary, "rounds": runs.figures}
