"""Tell an observer of stages and passes, each begun and ended in turn."""

from __future__ import annotations

from collections.abc import Callable

from blockstream.plan.segments import Schedule, Stage
from blockstream.plugins.observer import Observer

from .top_tier import OnSpan


class Observing:
    """Calls an observer's hooks; with none, nothing. `schedule` says what is planned now."""

    def __init__(self, observer: Observer | None, schedule: Callable[[], Schedule]) -> None:
        self._observer = observer
        self._schedule = schedule
        self._stage: str | None = None

    @property
    def is_watched(self) -> bool:
        """Return whether there is an observer."""
        return self._observer is not None

    @property
    def on_loaded(self) -> OnSpan | None:
        """Return what is told of loads."""
        watch = self._observer
        return None if watch is None else lambda span: watch.segment_loaded(span=span)

    @property
    def on_executed(self) -> OnSpan | None:
        """Return what is told of visits."""
        watch = self._observer
        return None if watch is None else lambda span: watch.segment_executed(span=span)

    def pass_started(self, stage: str, index: int | None) -> None:
        """Tell of a pass, and of the stage when it is its first."""
        if self._observer is None:
            return
        if self._stage != stage:
            self.stage_finished()
            self._stage = stage
            self._observer.stage_started(stage=self._planned(stage))
        self._observer.pass_started(stage=self._planned(stage), pass_index=index or 0)

    def pass_finished(self, stage: str, index: int | None) -> None:
        """Tell of the end of a pass."""
        if self._observer is not None:
            self._observer.pass_finished(stage=self._planned(stage), pass_index=index or 0)

    def stage_finished(self, stage: str | None = None) -> None:
        """Tell of the end of the stage that began last, if it is the one named."""
        if self._observer is None or self._stage is None or stage not in (None, self._stage):
            return
        ended, self._stage = self._stage, None
        self._observer.stage_finished(stage=self._planned(ended))

    def _planned(self, stage: str) -> Stage:
        schedule = self._schedule()
        return schedule.stages[schedule.index(stage)]
