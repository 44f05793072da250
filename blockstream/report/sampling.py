"""Watch a sampler and attention transforms from outside: steps, leaps, straightness, merging.

Nothing they compute is changed. What is seen goes to the ledger as notes, for reports to read.
"""

from __future__ import annotations

import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from blockstream.engine.ledger import Ledger, Note
from blockstream.errors import PluginError
from blockstream.plugins.blame import blaming
from blockstream.plugins.protocols import Flow, Sampler
from blockstream.plugins.run_context import current_run
from blockstream.plugins.transforms import AttentionKernel, AttentionLayer, Merge
from blockstream.run.finite import not_finite

if TYPE_CHECKING:
    from torch import Tensor


class WatchedSampler:
    """A sampler that notes each step: from which index to which, and how straight the flow was there.

    What it raises or returns wrongly is blamed on `who`; what the model raises inside it is not. `refuse` is
    told of numbers that are not finite: it raises, or returns where they are allowed.
    """

    def __init__(
        self,
        sampler: Sampler,
        ledger: Ledger,
        who: str = "sampler",
        refuse: Callable[[str], None] = lambda said: None,
    ) -> None:
        self._sampler = sampler
        self._ledger = ledger
        self._who = who
        self._refuse = refuse
        self._runs = 0

    def __call__(self, flow: Flow, z: Tensor, i: int = 0, memory: Mapping[str, Any] | None = None) -> Tensor:
        """Return what the sampler returns.

        Raises PluginError when the sampler fails, does not return a tensor of the shape and dtype of `z`,
        never called `flow.step_done`, or made numbers that are not finite of those that are.
        """
        number, self._runs = self._runs, self._runs + 1
        watched = _WatchedFlow(flow, self._ledger, number, self._who, self._refuse)
        with blaming(self._who, unless=lambda error: error is watched.raised):
            out = self._sampler(watched, z, i, memory)
        if getattr(out, "shape", None) != z.shape:
            shown = list(out.shape) if hasattr(out, "shape") else reprlib.repr(out)
            raise PluginError(f"{self._who}: returned {shown}, expected a tensor of shape {list(z.shape)}")
        if out.dtype != z.dtype:
            raise PluginError(f"{self._who}: returned a tensor of {out.dtype}, expected {z.dtype}")
        if i < len(flow.times) and not watched.steps:
            raise PluginError(
                f"{self._who}: returned without having called flow.step_done; call it after each step, so "
                "that the run can be saved, shown and resumed"
            )
        watched.check(out, "returned a sample of which")
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


class _WatchedFlow:
    """A flow that notes the cosine of each velocity with the one before, and where each step goes.

    What the sampler hands it is checked, and so is what the model gives.
    """

    def __init__(self, flow: Flow, ledger: Ledger, run: int, who: str, refuse: Callable[[str], None]) -> None:
        self._flow = flow
        self._ledger = ledger
        self._run = run
        self._who = who
        self._refuse = refuse
        self._before: Tensor | None = None
        self._cosine: float | None = None
        #: Whether the model has given numbers that are not finite: what follows is no fault of the sampler.
        self._spoilt = False
        #: The steps that the sampler has reported.
        self.steps = 0
        #: The last thing the flow itself raised: no fault of the sampler.
        self.raised: Exception | None = None

    def velocity(self, z: Tensor, i: int) -> Tensor:
        of = len(self._flow.times)
        if not isinstance(i, int) or not 0 <= i < of:
            raise PluginError(f"{self._who}: asks for the velocity at index {i!r}; there are 0 to {of - 1}")
        self.check(z, f"came to index {i} with a sample of which")
        v: Tensor = self._watched(self._flow.velocity)(z, i)
        if (found := not_finite(v)) is not None:
            self._spoilt = True
            self._watched(self._refuse)(f"what the model gives in step {i + 1} of {of}: {found}")
        self._cosine = None if self._before is None else cosine(v, self._before)
        self._before = v.detach().clone()
        return v

    def advance(self, z: Tensor, v: Tensor, i: int, to: int) -> Tensor:
        times = self._flow.times
        if not 0 <= i < to <= len(times):
            raise PluginError(
                f"{self._who}: advances from index {i} to {to}; steps go forward, to {len(times)} at most"
            )
        step: dict[str, Any] = {
            "run": self._run,
            "i": i,
            "to": to,
            "of": len(times),
            "t": float(times[i]),
            "cosine": self._cosine,
        }
        if name := getattr(self._flow, "name", None):
            step["name"] = str(name)
        self._ledger.note("step", step)
        return cast("Tensor", self._watched(self._flow.advance)(z, v, i, to))

    def step_done(self, i: int, z: Tensor, memory: Mapping[str, Any] | None) -> None:
        from blockstream.module.states import unsaved

        self.steps += 1
        if memory is not None and (wrong := unsaved(memory, "memory")) is not None:
            raise PluginError(f"{self._who}: {wrong}")
        self.check(z, f"reports step {i + 1} with a sample of which")
        self._watched(self._flow.step_done)(i, z, memory)

    def check(self, z: Tensor, what: str) -> None:
        """Blame the sampler for numbers that are not finite, made of those that were."""
        if not self._spoilt and (found := not_finite(z)) is not None:
            self._spoilt = True
            raise PluginError(f"{self._who}: {what} {found}")

    def __getattr__(self, name: str) -> Any:
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


class WatchedMerge:
    """Notes when merging begins and ends, asked as the layers compute."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._now: bool | None = None
        #: The names of the layers that have a merge.
        self.layers: set[str] = set()

    def watch(self, layer: AttentionLayer, merge: Merge) -> Merge:
        """Return the merge of a layer, its answers noted when they change."""
        self.layers.add(layer.name)

        def active() -> bool:
            on = merge.active()
            if on != self._now:
                self._now = on
                self._ledger.note("merging", on)
            return on

        return replace(merge, active=active)


class WatchedKernels:
    """Counts the calls of plugins' kernels, and what share of the pairs they compute, step by step."""

    def __init__(self) -> None:
        #: The names of the layers that have a kernel.
        self.layers: set[str] = set()
        self._merged: set[str] = set()
        self._calls: Counter[int] = Counter()
        self._shares: defaultdict[int, float] = defaultdict(float)

    def watch(self, layer: AttentionLayer, kernel: AttentionKernel) -> AttentionKernel:
        """Return the kernel of a layer, its calls counted."""
        (self._merged if layer.merged else self.layers).add(layer.name)
        density: Callable[[], float] = getattr(kernel, "density", lambda: 1.0)

        @wraps(kernel)
        def call(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayer) -> Tensor:
            step = current_run().step
            at = -1 if step is None else step
            self._calls[at] += 1
            self._shares[at] += float(density())
            return kernel(q, k, v, layout)

        return call

    def account(self) -> dict[str, Any]:
        """Return layers and calls, and the mean density of all calls and of each step that had any."""
        calls = self._calls.total()
        return {
            "layers": len(self.layers),
            "merged_layers": len(self._merged),
            "calls": calls,
            "density": sum(self._shares.values()) / calls if calls else None,
            "by_step": {str(i): self._shares[i] / n for i, n in sorted(self._calls.items()) if i >= 0},
        }


@dataclass(frozen=True)
class Steps:
    """The steps of one sampling: the indices computed, of how many, and where it leapt."""

    indices: tuple[int, ...]
    of: int
    leaps: tuple[tuple[int, int], ...]
    times: tuple[float, ...]
    cosine: tuple[float | None, ...]
    #: What the flow calls itself, such as "unit 3, stage 1".
    name: str = ""


def samplings(notes: Sequence[Note]) -> list[Steps]:
    """Return the steps of each sampling that a ledger's notes tell of, in order."""
    runs: dict[int, list[Mapping[str, Any]]] = {}
    for note in notes:
        if note.kind == "step" and isinstance(note.value, Mapping):
            runs.setdefault(int(note.value.get("run", 0)), []).append(note.value)
    return [
        Steps(
            tuple(int(s["i"]) for s in steps),
            int(steps[-1]["of"]),
            tuple((int(s["i"]), int(s["to"])) for s in steps if s["to"] > s["i"] + 1),
            tuple(float(s["t"]) for s in steps),
            tuple(s["cosine"] for s in steps),
            str(steps[-1].get("name", "")),
        )
        for _, steps in sorted(runs.items())
    ]
