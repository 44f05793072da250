"""Costs that no measurement moves, so that a plan depends on sizes alone."""

from __future__ import annotations

from dataclasses import replace

from blockstream.streaming import first, replanner


def fix_costs(monkeypatch, load_s: float = 2, execute_s: float = 1) -> None:
    """Have the planner count on these seconds a segment, whatever this machine does."""

    def fixed(real):
        def costs(*args):
            stage = real(*args)
            segments = (replace(s, load_s=load_s, execute_s=execute_s) for s in stage.segments)
            return replace(stage, segments=tuple(segments))

        return costs

    monkeypatch.setattr(first, "default_costs", fixed(first.default_costs))
    monkeypatch.setattr(replanner, "measured_costs", fixed(replanner.measured_costs))
