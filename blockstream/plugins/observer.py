"""Who is told what a session does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from blockstream.engine.spans import Span
    from blockstream.plan.segments import Stage


class Observer(Protocol):
    """The hooks of the run's plugins, called by keyword."""

    def stage_started(self, *, stage: Stage) -> Any:
        """Take note that a stage begins."""

    def stage_finished(self, *, stage: Stage) -> Any:
        """Take note that a stage has ended."""

    def pass_started(self, *, stage: Stage, pass_index: int) -> Any:
        """Take note that a pass begins."""

    def pass_finished(self, *, stage: Stage, pass_index: int) -> Any:
        """Take note that a pass has ended."""

    def segment_loaded(self, *, span: Span) -> Any:
        """Take note of a load, on the loader thread."""

    def segment_executed(self, *, span: Span) -> Any:
        """Take note of a visit."""
