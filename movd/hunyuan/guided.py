"""HunyuanVideo's flow: shifted times, guidance that is embedded, or a true one of two passes.

Times run from 1 (noise) to 0 (data); the model is given them times 1000. The velocity is noise - data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from blockstream.errors import ConfigError
from movd.text_to_video.flows import FlowBase

NUM_TIMESTEPS = 1000


class Prompt(NamedTuple):
    """What the model is told: states [B, L, C] and mask [B, L] of LLaMA, pooled [B, P] of CLIP."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


def shifted_times(steps: int, shift: float) -> Tensor:
    """Return the times [steps + 1], float32, from 1 to 0: shift u / (1 + (shift - 1) u), u evenly spaced."""
    if steps < 1:
        raise ConfigError(f"steps = {steps}: at least 1 is needed")
    u = np.linspace(1.0, 0.0, steps + 1)[:-1].astype(np.float32)
    s = (shift * u / (1 + (shift - 1) * u)).astype(np.float32)
    return torch.cat((torch.from_numpy(s), torch.zeros(1)))


class HunyuanFlow(FlowBase):
    """The `Flow` of one prompt.

    `guidance` is embedded, one pass a step. With a `negative` prompt and `true_guidance` above 1 a second
    pass follows, and the velocity is negative + true_guidance (positive - negative). `rounded`: latents
    are held in the model's dtype after each step, as diffusers does, instead of float32, as Tencent's code
    does.
    """

    straight = True

    def __init__(
        self,
        model: nn.Module,
        prompt: Prompt,
        steps: int,
        *,
        shift: float = 7.0,
        guidance: float = 6.0,
        negative: Prompt | None = None,
        true_guidance: float = 1.0,
        rounded: bool = False,
        **reports: Any,
    ) -> None:
        super().__init__(**reports)
        self.model = model
        self.dtype = model.x_embedder.proj.weight.dtype
        self.sigmas = shifted_times(steps, shift)
        self.timesteps = self.sigmas[:-1] * NUM_TIMESTEPS
        self.times = self.sigmas[:-1].tolist()
        self.prompts = [prompt] if negative is None or true_guidance <= 1 else [prompt, negative]
        self.guidance = torch.full((len(prompt.states),), guidance, dtype=self.dtype) * 1000.0
        self.true_guidance = true_guidance
        self.rounded = rounded

    @property
    def passes_a_step(self) -> int:
        """Return how many passes of the model one velocity takes."""
        return len(self.prompts)

    def velocity_of(self, z: Tensor, t: float, i: int) -> Tensor:
        """Return v(z, t) [B, c, T, H, W] in the model's dtype."""
        at = self.timesteps[i] if t == self.times[i] else torch.tensor(t * NUM_TIMESTEPS)
        at = at.expand(len(z))
        if self.rounded and t != self.times[0]:
            at = at.to(self.dtype)  # diffusers gives the time the latents' dtype, which is float32 at first
        found = [self._pass(z.to(self.dtype), at, prompt) for prompt in self.prompts]
        if len(found) == 1:
            return found[0]
        positive, negative = found
        return negative + self.true_guidance * (positive - negative)

    def _pass(self, z: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        velocity: Tensor = self.model(
            hidden_states=z,
            timestep=t,
            encoder_hidden_states=prompt.states.to(self.dtype),
            encoder_attention_mask=prompt.mask.to(self.dtype),
            pooled_projections=prompt.pooled.to(self.dtype),
            guidance=self.guidance,
            return_dict=False,
        )[0]
        return velocity

    def advance(self, z: Tensor, v: Tensor, i: int, to: int) -> Tensor:
        """Return z moved along v from times[i] to times[to]."""
        dt = self.sigmas[to] - self.sigmas[i]
        if self.rounded:
            return (z + dt * v).to(v.dtype).float()
        return z + dt * v.float()

    def state(self) -> Mapping[str, Any]:
        """Return nothing: all that a resumed run needs is z."""
        return {}
