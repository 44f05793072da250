"""A sampling that is saved step by step, so that a run that was stopped goes on to the same bits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockstream.plugins.protocols import Flow, FullSampler

from .files import Files

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

#: No more than these seconds of steps are lost, and one step: then they are saved.
MOST_LOST_S = 10.0


@dataclass(frozen=True)
class Step:
    """Where a sampling was left: the index to go on from, the passes made, what sampler and flow remember."""

    index: int
    passes: int
    z: Tensor
    memory: Mapping[str, Any] | None
    flow: Mapping[str, Any]


def saved_step(files: Files, name: str, steps: int, shape: tuple[int, ...]) -> Step | None:
    """Return where a sampling of so many steps was left; None where it begins anew."""
    tree = files.load(name)
    if tree is None:
        return None
    try:
        step = Step(**tree)
        fits = 0 <= step.index <= steps and step.passes >= 0 and tuple(step.z.shape) == shape
    except (TypeError, AttributeError):
        fits = False
    if not fits:
        log.warning("the state %r is that of another sampling; it is begun again", name)
        return None
    return step


def sample(
    sampler: FullSampler,
    files: Files,
    name: str,
    flow: Flow,
    z: Tensor,
    save_every: int | None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the sample reached from z, or from where it was left, and what the sampler has to say of it.

    Each `save_every`-th step is saved, and those that took long; None: those alone. A save waits for the
    disk, which takes as long as some short steps.
    """
    steps, step = len(flow.times), saved_step(files, name, len(flow.times), tuple(z.shape))
    index, memory, passes = 0, None, 0
    if step is not None:
        index, z, memory, passes = step.index, step.z, step.memory, step.passes
        if step.flow:
            flow.load_state(step.flow)
    saving = _SavingFlow(flow, files, name, save_every, clock, memory, passes)
    z = sampler(saving, z, index, memory)
    return z, dict({} if saving.memory is None else sampler.report(saving.memory, steps))


class _SavingFlow:
    """A flow whose steps are saved: each `every`-th, and those that took long."""

    def __init__(
        self,
        flow: Flow,
        files: Files,
        name: str,
        every: int | None,
        clock: Callable[[], float],
        memory: Mapping[str, Any] | None,
        passes: int,
    ) -> None:
        self._flow, self._files, self._name, self._every, self._clock = flow, files, name, every, clock
        #: What the sampler remembers, and the velocities made, those before it was resumed included.
        self.memory, self.passes_made = memory, passes
        self._steps, self._saved_s = 0, clock()

    def velocity(self, z: Tensor, i: int) -> Tensor:
        self.passes_made += 1
        return self._flow.velocity(z, i)

    def _velocity_at(self, z: Tensor, t: float) -> Tensor:
        self.passes_made += 1
        return self._flow.velocity_at(z, t)

    def step_done(self, i: int, z: Tensor, memory: Mapping[str, Any] | None) -> None:
        self._flow.step_done(i, z, memory)
        self._steps += 1
        self.memory = memory
        due = self._every is not None and self._steps % self._every == 0
        if not due and self._clock() - self._saved_s < MOST_LOST_S:
            return
        step = Step(i + 1, self.passes_made, z, memory, self._flow.state())
        self._files.save(self._name, vars(step))
        self._saved_s = self._clock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._flow, name)
        return self._velocity_at if name == "velocity_at" else found
