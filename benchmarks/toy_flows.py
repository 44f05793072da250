"""Flows whose exact velocity and answer are known: mixtures of Gaussians, guided as text-to-video models are.

Data are one of `components` Gaussians of deviation `spread` around means that lie in a few directions of the
latent space. The rectified flow's velocity E[data - noise | z] of a mixture is a formula: it decides between
the components at the beginning, runs straight in the middle and settles into the spread at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """A guided mixture; `shift` is the r of Open-Sora's times r u / (1 + (r - 1) u)."""

    name: str
    spread: float = 0.15
    guidance: float = 3.0
    shift: float = 2.42
    size: int = 256
    components: int = 24
    named: int = 4
    directions: int = 8
    seed: int = 0

    @cached_property
    def means(self) -> Tensor:
        gen = torch.Generator().manual_seed(self.seed)
        shape = (self.components, self.directions)
        weights = torch.randn(shape, generator=gen, dtype=torch.float64) / self.directions**0.5
        return weights @ torch.randn(self.directions, self.size, generator=gen, dtype=torch.float64)

    def noise(self, count: int) -> Tensor:
        gen = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(count, self.size, generator=gen, dtype=torch.float64)

    def prompts(self, count: int) -> Tensor:
        """Return the components [count, named] that each sample's condition names."""
        gen = torch.Generator().manual_seed(self.seed + 2)
        draw = torch.rand(count, self.components, generator=gen)
        return draw.argsort(1)[:, : self.named]

    def velocity(self, z: Tensor, t: float, prompt: Tensor) -> Tensor:
        """Return the guided velocity [B, size] at time t."""
        null = self._towards(z, t, self.means.expand(len(z), -1, -1))
        cond = self._towards(z, t, self.means[prompt])
        return null + self.guidance * (cond - null)

    def _towards(self, z: Tensor, t: float, means: Tensor) -> Tensor:
        """Return E[data - noise | z] for an even mixture of means [B, M, size]."""
        variance = (1 - t) ** 2 * self.spread**2 + t**2
        away = z[:, None] - (1 - t) * means
        share = (-away.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        data = means + (1 - t) * self.spread**2 / variance * away
        return (share * (data - t / variance * away)).sum(1)


class MixtureFlow:
    """The `Flow` of some samples of a mixture, in so many steps."""

    straight = True

    def __init__(self, mixture: Mixture, prompt: Tensor, steps: int) -> None:
        self.mixture, self.prompt = mixture, prompt
        r = mixture.shift
        u = [1 - i / steps for i in range(steps)]
        self.times = [r * x / (1 + (r - 1) * x) for x in u]
        self.passes = 0
        self.memory: object = None

    def velocity(self, z: Tensor, i: int) -> Tensor:
        self.passes += 1
        return self.mixture.velocity(z, self.times[i], self.prompt)

    def advance(self, z: Tensor, v: Tensor, i: int, to: int) -> Tensor:
        ahead = self.times[to] if to < len(self.times) else 0.0
        return z + v * (self.times[i] - ahead)

    def remaining(self, n: int) -> None: ...

    def step_done(self, i: int, z: Tensor, memory: object) -> None:
        self.memory = memory

    def state(self) -> dict[str, object]:
        return {}


MIXTURES = (
    Mixture("small video"),
    Mixture("strong guidance", guidance=7.0),
    Mixture("no guidance", guidance=1.0),
    Mixture("wide components", spread=0.4),
    Mixture("more dimensions", size=1024),
    Mixture("times towards data", shift=0.48),
    Mixture("times towards noise", shift=6.0),
)
