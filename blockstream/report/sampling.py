"""Watch attention transforms from outside, and read what was seen of them and of samplers.

Nothing they compute is changed. What is seen goes to the ledger as notes, for reports to read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from blockstream.engine.ledger import Ledger, Note
from blockstream.plugins.run_context import current_run
from blockstream.plugins.transforms import AttentionKernel, AttentionLayer, Merge

if TYPE_CHECKING:
    from torch import Tensor


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
    """The steps of one sampling: the indices computed, of how many, in how many passes, where it leapt."""

    indices: tuple[int, ...]
    of: int
    leaps: tuple[tuple[int, int], ...]
    times: tuple[float, ...]
    cosine: tuple[float | None, ...]
    #: What the flow calls itself, such as "unit 3, stage 1".
    name: str = ""
    passes: int = 0


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
            sum(int(s.get("passes", 1)) for s in steps),
        )
        for _, steps in sorted(runs.items())
    ]
