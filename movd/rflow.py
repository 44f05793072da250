"""Open-Sora's rectified flow: its times, its guidance, its frame mask. The loop is the sampler's.

Times run from 1 (noise) to 0 (data); the model is given them times 1000. The velocity is data - noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.errors import ConfigError
from movd.sizes import check_frames
from movd.text_to_video.flows import FlowBase

NUM_TIMESTEPS = 1000
BASE_PIXELS = 512 * 512
#: Frames a second that the original tells the model for a still image, whatever was asked.
IMAGE_FPS = 120.0


def transform_times(
    t: Tensor, height: int, width: int, frames: int, size_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return t [N] in 0..1000 moved towards noise, the more the larger the clip: r u / (1 + (r - 1) u).

    r = sqrt(height * width / 512^2) * sqrt(latent frames), computed in `size_dtype`. The original's script
    holds sizes in bfloat16, which rounds r; its training and tests use float32.
    """
    check_frames(frames)
    h, w, n = (torch.tensor([float(size)], dtype=size_dtype) for size in (height, width, frames))
    latent = torch.ones_like(n) if frames == 1 else n // 17 * 5
    r = (h * w / BASE_PIXELS).sqrt() * latent.sqrt()
    u = t / NUM_TIMESTEPS
    return r * u / (1 + (r - 1) * u) * NUM_TIMESTEPS


def timesteps(
    steps: int,
    height: int,
    width: int,
    frames: int,
    *,
    discrete: bool = False,
    transform: bool = True,
    size_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the `steps` times of a run, float32 in 0..1000, decreasing from 1000."""
    if steps < 1:
        raise ConfigError(f"steps = {steps}: at least 1 is needed")
    times = [(1.0 - i / steps) * NUM_TIMESTEPS for i in range(steps)]
    if discrete:
        times = [float(round(t)) for t in times]
    t = torch.tensor(times, dtype=torch.float32)
    return transform_times(t, height, width, frames, size_dtype) if transform else t


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return (1 - u) x0 + u noise, u = t / 1000, t [B]."""
    u = (t.float() / NUM_TIMESTEPS).view(-1, *[1] * (x0.dim() - 1)).to(x0.device)
    return (1 - u) * x0 + u * noise


class OpenSoraFlow(FlowBase):
    """The `Flow` of one run: a model, its text, its times, guidance and the frames that are known.

    `y` [B, 1, L, caption] and `mask` [n, L] are the text; its unconditional half is the model's learned
    caption under the prompt's own mask. `frames`, `height`, `width` are in pixels, `fps` a second.
    `x_mask` [B, T] gives each latent frame's share of generation: 1 generate, 0 keep as it is in z,
    between: keep until t <= x_mask, then noise it to t and generate. That noise follows from a seed drawn
    once from `generator` and from the index, so that any sampler and any resumed run gets the same.
    """

    straight = True

    def __init__(
        self,
        model: nn.Module,
        y: Tensor,
        mask: Tensor | None,
        steps: int,
        guidance: float,
        height: int,
        width: int,
        frames: int,
        fps: float,
        x_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        y_null: Tensor | None = None,
        discrete: bool = False,
        transform: bool = True,
        size_dtype: torch.dtype = torch.float32,
        **reports: Any,
    ) -> None:
        super().__init__(**reports)
        self.timesteps = timesteps(
            steps, height, width, frames, discrete=discrete, transform=transform, size_dtype=size_dtype
        )
        self.times = (self.timesteps / NUM_TIMESTEPS).tolist()
        self.model = model
        self.guidance = guidance
        if y_null is None:
            y_null = model.y_embedder.y_embedding[None, None].expand(len(y), -1, -1, -1)
        if y_null.shape != y.shape:
            raise ValueError(
                f"text {tuple(y.shape)} and its null caption {tuple(y_null.shape)} differ in shape"
            )
        self.y = torch.cat((y, y_null.to(y)))
        self.mask = mask
        self.size = {
            "fps": torch.tensor([IMAGE_FPS if frames == 1 else fps], dtype=size_dtype),
            "height": torch.tensor([float(height)], dtype=size_dtype),
            "width": torch.tensor([float(width)], dtype=size_dtype),
        }
        self.x_mask = None if x_mask is None else x_mask.float().expand(len(y), -1)
        self.noise_seed = 0 if x_mask is None else int(torch.randint(2**62, (), generator=generator))

    def velocity_of(self, z: Tensor, t: float, i: int) -> Tensor:
        """Return v(z, t) [B, c, T, H, W], guided: v_null + guidance (v_cond - v_null).

        One pass of the model, on the conditional and the unconditional half as one batch. Frames that are
        kept as they are have no velocity: a sampler that judges the flow by it judges what moves.
        """
        at = self.timesteps[i] if t == self.times[i] else torch.tensor(t * NUM_TIMESTEPS)
        on = None if self.x_mask is None else self._on_at(at)
        x_mask = None if on is None else on.to(z.device).repeat(2, 1)
        size = {name: value.to(z.device) for name, value in self.size.items()}
        times = at.to(z.device).expand(2 * len(z))
        out = self.model(torch.cat((z, z)), times, self.y, mask=self.mask, x_mask=x_mask, **size)
        cond, null = out[:, : z.shape[1]].chunk(2)
        v = null + self.guidance * (cond - null)
        return v if on is None else torch.where(self._frames(on, v), v, 0)

    def advance(self, z: Tensor, v: Tensor, i: int, to: int) -> Tensor:
        """Return z moved along v from times[i] to times[to], known frames as they were.

        Known frames that are to be generated from times[to] on get their noise here.
        """
        end = to == len(self.times)
        t, t_to = self.timesteps[i], torch.zeros(()) if end else self.timesteps[to]
        moved = z + v * float((t - t_to) / NUM_TIMESTEPS)
        if self.x_mask is None:
            return moved
        z = torch.where(self._frames(self.is_on(i), z), moved, z)
        if end:
            return z
        fresh = self.is_on(to) & ~self.is_on(i)
        if fresh.any():
            noised = add_noise(z, self.noise_like(z, to), t_to.expand(len(z)))
            z = torch.where(self._frames(fresh, z), noised, z)
        return z

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside z: the seed of the noise of known frames."""
        return {"noise_seed": self.noise_seed}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an interrupted run."""
        self.noise_seed = int(state["noise_seed"])

    def noise_like(self, z: Tensor, i: int) -> Tensor:
        """Draw the noise that frames switched on at index `i` start from, on the CPU whatever the device."""
        generator = torch.Generator().manual_seed(self.noise_seed + i)
        return torch.randn(z.shape, generator=generator).to(z)

    def is_on(self, i: int) -> Tensor:
        """Return which frames [B, T] are generated at index `i`."""
        return self._on_at(self.timesteps[i])

    def _on_at(self, t: Tensor) -> Tensor:
        """Return which frames are generated at a time in 0..1000: those of x_mask 0 never.

        Those of x_mask 1 are from the start, though rounding may put the first time just above 1000.
        """
        assert self.x_mask is not None
        on: Tensor = (self.x_mask * NUM_TIMESTEPS >= t) & (self.x_mask > 0) | (self.x_mask >= 1)
        return on

    @staticmethod
    def _frames(chosen: Tensor, z: Tensor) -> Tensor:
        return chosen.to(z.device)[:, None, :, None, None]
