"""What a run remembers: the last two velocities, how straight each step was, the numbers of its rule.

It travels as `memory`, a flat mapping of tensors and numbers, so that a run resumes after any step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Past:
    """The passes taken so far.

    `velocities` are (index, velocity) of the last two, the latest last. `steps` are the indices of all;
    `cosine` [B] a step compares each with the one before, `error` [B] a step is what a rule measured (NaN:
    nothing). `numbers` are the rule's own.
    """

    velocities: list[tuple[int, Tensor]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    cosine: list[Tensor] = field(default_factory=list)
    error: list[Tensor] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, memory: Mapping[str, Any] | None) -> Past:
        """Return what a memory holds; nothing, where it is None or another sampler's."""
        past = cls()
        if not memory or "lpl.steps" not in memory:
            return past
        past.velocities = [
            (int(memory[f"lpl.index.{k}"]), memory[f"lpl.velocity.{k}"])
            for k in (2, 1)
            if f"lpl.velocity.{k}" in memory
        ]
        past.steps = [int(i) for i in memory["lpl.steps"]]
        past.cosine = list(memory["lpl.cosine"])
        past.error = list(memory["lpl.error"])
        past.numbers = {
            key.removeprefix("lpl.rule."): float(value)
            for key, value in memory.items()
            if key.startswith("lpl.rule.")
        }
        return past

    def memory(self) -> dict[str, Any]:
        """Return it as tensors and numbers; what was returned before stays as it was."""
        import torch

        memory: dict[str, Any] = {f"lpl.rule.{key}": value for key, value in self.numbers.items()}
        for k, (index, velocity) in enumerate(reversed(self.velocities), 1):
            memory[f"lpl.index.{k}"], memory[f"lpl.velocity.{k}"] = index, velocity
        memory["lpl.steps"] = torch.tensor(self.steps)
        memory["lpl.cosine"] = torch.stack(self.cosine)
        memory["lpl.error"] = torch.stack(self.error)
        return memory

    def add(self, i: int, v: Tensor, error: Tensor | None) -> None:
        """Take in the velocity of index `i` and the error measured there, [B]."""
        before = self.velocities[-1][1] if self.velocities else None
        nothing = v.new_full((len(v),), float("nan"), dtype=_wide(v)).cpu()
        self.steps.append(i)
        self.cosine.append(nothing if before is None else cosine(v, before).cpu())
        self.error.append(nothing if error is None else error.cpu())
        self.velocities = [*self.velocities[-1:], (i, v)]

    def forget(self) -> None:
        """Drop the velocities: what comes next does not continue them."""
        self.velocities = []


def cosine(v: Tensor, before: Tensor) -> Tensor:
    """Return the cosine [B] between two velocities [B, ...], each sample taken whole."""
    dot: Tensor = (v.flatten(1).to(_wide(v)) * before.flatten(1)).sum(1)
    return dot / (size(v) * size(before)).clamp_min(1e-20)


def size(v: Tensor) -> Tensor:
    """Return the norm [B] of each sample of v [B, ...]."""
    norm: Tensor = v.flatten(1).to(_wide(v)).norm(dim=1)
    return norm


def _wide(v: Tensor) -> Any:
    import torch

    return torch.promote_types(v.dtype, torch.float32)
