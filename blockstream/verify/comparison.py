"""Compare a streamed run with one whose weights are in memory, bit for bit, on a user's own config.

The pipeline runs in a scratch folder with a cache of its own, so nothing of earlier runs is taken over.
First streamed; then, where a stage's weights fit in memory, with that stage resident, its weights read
another way, every output compared with what the first run recorded. A stage that does not fit is compared
visit by visit in the first run. What differs is looked for a second time, to be named and measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockstream.engine.ledger import Ledger
from blockstream.errors import EngineError
from blockstream.plugins.protocols import Pipeline
from blockstream.plugins.run_context import new_run
from blockstream.run.activation import activate
from blockstream.run.config import RunConfig
from blockstream.run.in_progress import RunInProgress
from blockstream.run.numerics import pinned
from blockstream.run.runner import open_session

from .difference import Difference, DifferenceError

if TYPE_CHECKING:
    from blockstream.streaming.session import Session

    from .recorder import Record
    from .sessions import CheckedSession

SCHEMA = 1


def verify(
    config: RunConfig,
    *,
    by_segment: bool = False,
    observers: Sequence[object] = (),
    notice: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run a config streamed and resident; return what `verify --json` prints.

    `by_segment` compares visit by visit even what fits in memory. `notice` hears what is being done.
    Errors of the run itself are raised as from `runner.run`.
    """
    return _Verification(pinned(config), by_segment, observers, notice).run()


class _Verification:
    """The runs of one `verify`."""

    def __init__(
        self,
        config: RunConfig,
        by_segment: bool,
        observers: Sequence[object],
        notice: Callable[[str], None],
    ) -> None:
        self._config = config
        self._by_segment = by_segment
        self._observers = observers
        self._notice = notice
        self._wanted: list[Record] = []
        #: Operations of which the device promises no equal bits, once the streamed run has met them.
        self._unpromised: set[str] = set()

    def run(self) -> dict[str, Any]:
        """Return the report."""
        self._notice("streamed")
        streamed, error = self._streamed(by_segment=True if self._by_segment else None)
        self._wanted = streamed.recorder.records
        if error is None and not self._wanted:
            raise EngineError("the pipeline called none of its stages: there is nothing to compare")
        if error is None and len(streamed.checks) < len(streamed.nbytes):
            self._notice("resident")
            error = self._resident(streamed)
            if error is not None:
                self._notice(f"{error.difference}; once more, to measure it")
                error = self._measured(error)
        return {
            "schema": SCHEMA,
            "equal": error is None,
            "free_nbytes": streamed.free_nbytes,
            "stages": [_stage(streamed, name) for name in streamed.nbytes],
            "difference": None if error is None else asdict(error.difference),
            "device": self._config.device,
            "unpromised": sorted(self._unpromised),
        }

    def _streamed(self, **options: Any) -> tuple[CheckedSession, DifferenceError | None]:
        from .sessions import CheckedSession

        session: CheckedSession
        session, error = self._once(CheckedSession, observed=True, **options)
        return session, error

    def _resident(self, streamed: CheckedSession) -> DifferenceError | None:
        """Run with whole stages in memory; return the first output that is not as recorded."""
        from .sessions import ResidentSession

        session, error = self._once(
            ResidentSession,
            segments=streamed.segments,
            streamed=frozenset(streamed.checks),
            seen=self._compare,
            arena=streamed.arena_nbytes or None,
        )
        done = len(session.recorder.records)
        if error is None and done < len(self._wanted):
            error = _other_order(self._wanted[done], "the resident run ends before", done)
        return error

    def _compare(self, index: int, record: Record, output: Any) -> None:
        if index >= len(self._wanted):
            raise _other_order(record, "the streamed run ended before", index)
        wanted = self._wanted[index]
        if wanted[:3] != record[:3]:
            raise _other_order(wanted, f"the resident run is at {_place(record)} instead of", index)
        if wanted.digest != record.digest:
            raise DifferenceError(Difference(*record[:3], "output", None), index, output)

    def _measured(self, found: DifferenceError) -> DifferenceError:
        """Stream once more up to a difference; return it with its size, or the weight that it comes from."""
        from blockstream.module.binding import tensors_in

        from .recorder import digest, most_apart

        if found.index < 0 or found.output is None:
            return found
        difference = found.difference

        def reach(index: int, record: Record, output: Any) -> None:
            if index < found.index:
                return
            if digest(output) == digest(found.output):
                note = "a second streamed run gave what the resident one did: it comes and goes"
                raise DifferenceError(replace(difference, note=note))
            pairs = zip(tensors_in(output), tensors_in(found.output), strict=False)
            apart = [x for (_, a), (_, b) in pairs if (x := most_apart(a, b)) is not None]
            raise DifferenceError(replace(difference, max_abs=max(apart, default=None)))

        _, again = self._streamed(by_segment=frozenset({difference.stage}), seen=reach)
        return again or found

    def _once(
        self, kind: type[Any], observed: bool = False, arena: Any = None, **options: Any
    ) -> tuple[Any, DifferenceError | None]:
        """Run the pipeline once in a session of some kind; return it, closed, and the difference it met."""
        from .sessions import seeded

        config = self._config if arena is None else self._config.model_copy(update={"arena": arena})
        with (
            tempfile.TemporaryDirectory(prefix="blockstream-verify-") as scratch,
            _own_cache(Path(scratch) / "cache"),
        ):
            plugins = activate(config)
            for n, observer in enumerate(self._observers if observed else ()):
                plugins.register(observer, f"observer#{n}")
            out = Path(scratch) / "out"
            out.mkdir()
            this = RunInProgress(config, out, Ledger(), plugins)
            this.files.begin(config.resolved(), {})
            plugins.hook.run_started(run=this)
            session = open_session(this, kind, observer=plugins.hook if observed else None, **options)
            error = None
            try:
                with closing(this), new_run(), seeded(), session, self._watching():
                    _run(config, session, this)
            except DifferenceError as found:
                error = found.with_traceback(None)  # its frames hold tensors
        return session, error

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Take note, on a device, of operations of which it promises no equal bits."""
        if self._config.device == "cpu":
            yield
            return
        from .promises import Unpromised

        with Unpromised() as met:
            yield
        self._unpromised |= met.names


def _run(config: RunConfig, session: Session, this: RunInProgress) -> None:
    pipeline: Pipeline = config.pipeline.build()
    pipeline.declare(session, this)
    session.start()
    pipeline.run(session, this)


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Keep what is cached in a folder for the length of the block: results of other runs prove nothing."""
    before = os.environ.get("BLOCKSTREAM_CACHE")
    os.environ["BLOCKSTREAM_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["BLOCKSTREAM_CACHE"]
        else:
            os.environ["BLOCKSTREAM_CACHE"] = before


def _stage(streamed: CheckedSession, name: str) -> dict[str, Any]:
    """Return what the report says of a stage."""
    check = streamed.checks.get(name)
    return {
        "name": name,
        "nbytes": streamed.nbytes[name],
        "synthetic": name in streamed.synthetic,
        "how": "whole" if check is None else "segments",
        "forwards": streamed.recorder.forwards(name),
        "visits": streamed.recorder.visits(name) if check is None else check.visits.total(),
        "weights_alone": [] if check is None else sorted(check.weights_alone),
    }


def _other_order(record: Record, how: str, index: int) -> DifferenceError:
    return DifferenceError(
        Difference(*record[:3], "the order of calls", None, f"{how} {_place(record)}"), index
    )


def _place(record: Record) -> str:
    return f"{record.segment or 'the output'} of stage {record.stage!r}, call {record.call}"
