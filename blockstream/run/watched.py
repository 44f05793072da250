"""A sampler watched from outside: what it does is noted, what it does wrongly is named when it happens.

Nothing it computes is changed. Its steps go to the ledger as notes, for reports to read.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from blockstream.engine.ledger import Ledger
from blockstream.errors import PluginError
from blockstream.plugins.blame import blamed, blaming
from blockstream.plugins.protocols import Flow, Sampler

from .finite import not_finite

if TYPE_CHECKING:
    from torch import Tensor

#: From so many indices a sampler may go on before it has reported a step: one ahead, to look.
UNREPORTED = 2


#: Told in words of numbers that are not finite, and with what to make them again.
Refuse = Callable[[str, Callable[[], object]], None]


class WatchedSampler:
    """A sampler, with `passes` and `report` whether it has them or not, that notes each of its steps.

    What it raises or returns wrongly is blamed on `who`; what the model raises inside it is not. `refuse` is
    told of numbers that are not finite, and how to make them again: it raises, or returns where they are
    allowed.
    """

    def __init__(
        self,
        sampler: Sampler,
        ledger: Ledger,
        who: str = "sampler",
        refuse: Refuse = lambda said, again: None,
    ) -> None:
        self._sampler = sampler
        self._ledger = ledger
        self._who = who
        self._refuse = refuse
        self._runs = 0

    def __call__(self, flow: Flow, z: Tensor, i: int = 0, memory: Mapping[str, Any] | None = None) -> Tensor:
        """Return what the sampler returns.

        Raises PluginError when the sampler fails, does not return a tensor of the shape and dtype of `z`,
        stops short of the end, made numbers that are not finite of those that are, or breaks the rules of
        `Flow`: a step that is not reported, more passes than declared, times that are none.
        """
        number, self._runs = self._runs, self._runs + 1
        most = self.passes(len(flow.times))[1]
        watched = _WatchedFlow(flow, z, i, most, self._ledger, number, self._who, self._refuse)
        with blaming(self._who, unless=lambda error: error is watched.raised):
            out = self._sampler(watched, z, i, memory)
        if hasattr(out, "close"):
            out.close()  # what a generator or a coroutine holds
        watched.check(out, "returned")
        watched.check_ended()
        watched.check_finite(out, "returned a sample of which")
        return out

    def passes(self, steps: int) -> tuple[int, int]:
        """Return the least and the most passes of so many steps: one each where the sampler says nothing."""
        declared = getattr(self._sampler, "passes", None)
        if declared is None:
            return steps, steps
        found = blamed(f"{self._who}: passes()", declared)(steps)
        if (
            not isinstance(found, tuple | list)
            or len(found) != 2
            or not all(type(n) is int for n in found)
            or not 0 <= found[0] <= found[1]
        ):
            raise PluginError(
                f"{self._who}: passes({steps}) returned {reprlib.repr(found)}; expected (least, most), two "
                "whole numbers"
            )
        return found[0], found[1]

    def report(self, memory: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """Return what the sampler has to say of a sampling: {} where it says nothing."""
        tell = getattr(self._sampler, "report", None)
        if tell is None:
            return {}
        said = blamed(f"{self._who}: report()", tell)(memory, steps)
        try:
            json.dumps(said)
        except (TypeError, ValueError) as error:
            raise PluginError(f"{self._who}: report() returned what JSON cannot hold: {error}") from error
        if not isinstance(said, Mapping):
            raise PluginError(f"{self._who}: report() returned {reprlib.repr(said)}, expected a mapping")
        return dict(said)


class _WatchedFlow:
    """A flow that notes each step of a sampler, and checks what the sampler hands it and the model gives."""

    def __init__(
        self,
        flow: Flow,
        z: Tensor,
        begins: int,
        most: int,
        ledger: Ledger,
        run: int,
        who: str,
        refuse: Refuse,
    ) -> None:
        self._flow, self._ledger, self._run, self._who, self._refuse = flow, ledger, run, who, refuse
        self._shape, self._dtype = z.shape, z.dtype
        made = 0 if begins == 0 else getattr(flow, "passes_made", None)
        #: The passes that may still be made: by what the sampler declares, by what it has said last.
        self._declared = None if made is None else most - made
        self._most, self._left = most, cast("int | None", None)
        #: The first velocity of the step before, and its cosine with that of this one.
        self._before: Tensor | None = None
        self._cosine: float | None = None
        #: Of the step that is being taken: its passes, the indices it went on from, where it got to.
        self._passes = 0
        self._from: list[int] = []
        self._to: int | None = None
        #: Whether the model has given numbers that are not finite: what follows is no fault of the sampler.
        self._spoilt = False
        #: The next index: all before it have been reported.
        self._next = begins
        #: The last thing the flow itself raised: no fault of the sampler.
        self.raised: Exception | None = None

    def velocity(self, z: Tensor, i: int) -> Tensor:
        of = len(self._flow.times)
        if type(i) is not int or not 0 <= i < of:
            raise self._wrong(f"asks for the velocity at index {i!r}; there are 0 to {of - 1}")
        return self._pass(self._flow.velocity, z, i, f"index {i}", f"step {i + 1} of {of}")

    def _velocity_at(self, z: Tensor, t: float) -> Tensor:
        """Return what the flow's `velocity_at` does; see `__getattr__`."""
        first = float(self._flow.times[0])
        if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= first:
            raise self._wrong(f"asks for the velocity at time {t!r}; times go from {first:g} to 0")
        velocity_at = self._flow.velocity_at
        return self._pass(velocity_at, z, t, f"time {t:g}", f"the velocity at time {t:g}")

    def _pass(self, model: Callable[..., Tensor], z: Tensor, at: float, where: str, what: str) -> Tensor:
        self.check(z, f"comes to {where} with")
        self.check_finite(z, f"came to {where} with a sample of which")
        self._count()
        v: Tensor = self._watched(model)(z, at)
        if (found := not_finite(v)) is not None:
            self._spoilt = True
            self._watched(self._refuse)(f"what the model gives in {what}: {found}", lambda: model(z, at))
        if self._passes == 1:
            self._cosine = None if self._before is None else cosine(v, self._before)
            self._before = v.detach().clone()
        return v

    def _count(self) -> None:
        """Count a pass. Raises PluginError for one that the sampler has said there would not be."""
        self._passes += 1
        if self._left == 0:
            raise self._wrong(
                "asks for a velocity after flow.remaining(0): the number is of those that follow from then on"
            )
        if self._declared == 0:
            raise self._wrong(
                f"asks for more than {self._most} velocities, which is what it declares for "
                f"{len(self._flow.times)} steps; a sampler of several a step declares them by passes(steps)"
            )
        self._left = None if self._left is None else self._left - 1
        self._declared = None if self._declared is None else self._declared - 1

    def advance(self, z: Tensor, v: Tensor, i: int, to: int) -> Tensor:
        of = len(self._flow.times)
        if type(i) is not int or type(to) is not int or not 0 <= i < to <= of:
            raise self._wrong(
                f"advances from index {i!r} to {to!r}; steps go forward, by whole numbers, to {of} at most"
            )
        self.check(z, "advances")
        self.check(v, "advances along", same_dtype=False)
        if i not in self._from:
            self._from.append(i)
        if len(self._from) > UNREPORTED:
            raise self._wrong(
                f"went on from index {i} without having called flow.step_done since index {self._from[0]}; "
                "call it after each step, so that the run can be saved, shown and resumed"
            )
        self._to = to
        return cast("Tensor", self._watched(self._flow.advance)(z, v, i, to))

    def remaining(self, n: int) -> None:
        if type(n) is not int or n < 0:
            raise self._wrong(
                f"says that {n!r} more velocities follow; flow.remaining takes a whole number from 0 on"
            )
        self._left = n
        self._watched(self._flow.remaining)(n)

    def step_done(self, i: int, z: Tensor, memory: Mapping[str, Any] | None) -> None:
        from blockstream.module.states import unsaved

        self._check_index(i)
        if memory is not None and not isinstance(memory, Mapping):
            raise self._wrong(
                f"reports step {i + 1} with memory {type(memory).__name__}; expected a mapping or None"
            )
        if memory is not None and (wrong := unsaved(memory, "memory")) is not None:
            raise self._wrong(wrong)
        self.check(z, f"reports step {i + 1} with")
        self.check_finite(z, f"reports step {i + 1} with a sample of which")
        self._note(i)
        self._watched(self._flow.step_done)(i, z, memory)

    def _check_index(self, i: int) -> None:
        of = len(self._flow.times)
        if type(i) is not int or not self._next <= i < of:
            raise self._wrong(f"reports step_done({i!r}); the indices left are {self._next} to {of - 1}")
        if self._to is not None and self._to != i + 1:
            raise self._wrong(
                f"reports step_done({i}) after an advance to index {self._to}; name the last index that was "
                f"taken, {self._to - 1}: a resumed run goes on from the next"
            )

    def _note(self, i: int) -> None:
        """Note the step that has just been taken, up to index i; the next begins."""
        times, begin = self._flow.times, self._from[0] if self._from else self._next
        step: dict[str, Any] = {
            "run": self._run,
            "i": begin,
            "to": i + 1,
            "of": len(times),
            "t": float(times[begin]),
            "cosine": self._cosine,
            "passes": self._passes,
        }
        if name := getattr(self._flow, "name", None):
            step["name"] = str(name)
        self._ledger.note("step", step)
        self._next, self._passes, self._from, self._to = i + 1, 0, [], None

    def check(self, z: Any, what: str, same_dtype: bool = True) -> None:
        """Blame the sampler for what is no tensor of the sample's shape and dtype."""
        if getattr(z, "shape", None) != self._shape:
            shown = list(z.shape) if hasattr(z, "shape") else reprlib.repr(z)
            raise self._wrong(f"{what} {shown}, expected a tensor of shape {list(self._shape)}")
        if same_dtype and z.dtype != self._dtype:
            raise self._wrong(f"{what} a tensor of {z.dtype}, expected {self._dtype}")

    def check_finite(self, z: Tensor, what: str) -> None:
        """Blame the sampler for numbers that are not finite, made of those that were."""
        if not self._spoilt and (found := not_finite(z)) is not None:
            self._spoilt = True
            raise self._wrong(f"{what} {found}")

    def check_ended(self) -> None:
        """Blame a sampler that has returned before the end, or never said where it is."""
        of = len(self._flow.times)
        if self._next == of:
            return
        raise self._wrong(
            f"returned without having called flow.step_done for the steps from index {self._next} to "
            f"{of - 1}; go to the end and call it after each, so that a run can be saved, shown and resumed"
        )

    def _wrong(self, said: str) -> PluginError:
        return PluginError(f"{self._who}: {said}")

    def __getattr__(self, name: str) -> Any:
        if name == "velocity_at":
            if hasattr(self._flow, name):
                return self._velocity_at
            raise AttributeError(
                "the flow has no velocity_at: this pipeline gives velocities at its own times alone; choose "
                "a sampler that needs no others"
            )
        value = getattr(self._flow, name)
        return self._watched(value) if callable(value) else value

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.raised = error
                raise

        return call


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Return the cosine between two tensors taken whole, None where one is zero or not finite."""
    a, b = a.detach().flatten().float(), b.flatten().float()
    value = float((a @ b) / (a.norm() * b.norm()))
    return value if -2 < value < 2 else None
