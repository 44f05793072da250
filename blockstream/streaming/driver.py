"""Where the calls of a session's stages lead: turns are taken, passes begun and ended, plans follow."""

from __future__ import annotations

from collections.abc import Callable

from blockstream.engine.ledger import Ledger
from blockstream.errors import ModelError
from blockstream.module.faking import Call

from .observing import Observing
from .plans import Plans
from .stage import StreamedStage
from .turns import Turns
from .visits import Pass


class Driver:
    """Runs the stages of a session. A `Runtime`.

    `begin(stage, call, path)` is called before the first pass of all, and gives it its plans.
    """

    def __init__(
        self, begin: Callable[[str, Call, str], Plans], ledger: Ledger, observing: Observing
    ) -> None:
        self._begin, self._ledger, self._observing = begin, ledger, observing
        self._turns = Turns()
        self._active: StreamedStage | None = None
        self._plans: Plans | None = None
        self._is_over = False
        #: The stages by name, in the order they run.
        self.stages: dict[str, StreamedStage] = {}
        #: Whether this is a forked child.
        self.forked = False

    @property
    def idle(self) -> str | None:
        """Return the stage that ran last if nothing computes."""
        return self._active.name if self._active is not None and self._turns.is_free else None

    def enter(self, stage: str, call: Call, path: str) -> None:
        """Make the calling thread and a stage the ones that compute; begin if nothing has begun."""
        active = self.stages[stage]
        if self.forked:
            raise ModelError(
                f"{active.model_name} is called in a forked process, and its weights are loaded by threads "
                "of the parent; stream it in the child, fork before its first forward, or start processes by "
                'spawn (multiprocessing.set_start_method("spawn"))'
            )
        self._turns.take(stage)
        try:
            self._plans = self._begin(stage, call, path)
            if self._active is not active:
                if self._active is not None:
                    self._active.end_pass()
                self._active = active
        except BaseException:
            self._turns.give()
            raise

    def leave(self) -> None:
        """Let others compute."""
        self._turns.give()

    def is_inside(self) -> bool:
        """Return whether the calling thread computes."""
        return self._turns.is_mine()

    def begin_pass(self, stage: str, call: Call, path: str) -> Pass:
        """Begin a pass with memory for what the call needs."""
        assert self._plans is not None
        prepared = self.stages[stage].prepared
        begun = Pass(self._plans.tier, prepared, lambda part: self._visited(stage, part), self._ended)
        try:
            self._plans.before_pass(stage, call, path, begun.index == 0)
            self._observing.pass_started(stage, begun.index)
            begun.bind_resident()
        except BaseException:
            begun.end(complete=False)
            raise
        return begun

    def look_after(self) -> None:
        """Have a stage whose calls are not followed give memory back when it is short. Any thread."""
        for stage in list(self.stages.values())[:1]:
            if stage.settled and self._plans is not None and self._plans.needs_more():
                stage.wake()

    def end(self) -> None:
        """Plan no more: the session closes."""
        self._is_over = True

    def restore(self) -> None:
        """Give every module back as it was."""
        for stage in self.stages.values():
            stage.restore()

    def _visited(self, stage: str, part: int) -> None:
        if self._plans is not None and not self._is_over:
            self._plans.after_visit(stage, part)

    def _ended(self, ended: Pass, complete: bool) -> None:
        """Plan anew at a pass boundary."""
        assert self._plans is not None
        stage = self.stages[ended.prepared.name]
        self._observing.pass_finished(stage.name, ended.index)
        if not complete or not ended.ran or ended.index is None:
            return
        self._plans.after_pass(stage.name, ended.ran, ended.index)
        # With an observer, stages to prefetch for, or inputs to move, every pass is followed.
        if len(self.stages) > 1 or self._observing.is_watched or stage.moves_inputs:
            return
        if stage.without_grad or stage.prepared.experts:
            return
        if (handles := self._plans.tier.engine.everything()) is not None:
            stage.settle(handles, self._plans.foresees)
            self._ledger.note("settled", stage.name)
