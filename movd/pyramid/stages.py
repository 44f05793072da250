"""The stages of Pyramidal Flow: their times, the jump between two, the history beside a frame.

A latent frame is denoised at a quarter, a half and all of its size; within a stage local times run from 1
to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from blockstream.errors import ConfigError

NUM_TIMESTEPS = 1000
#: Part of the noise that a jump adds is taken from each 2 x 2 block: 1/3, so that its covariance fits.
GAMMA = 1 / 3


@dataclass(frozen=True)
class Stage:
    """One stage: where it begins and ends on the whole way from 1 to 0, and the times the model is told.

    `first` and `last` are the timesteps of its two ends; `keep` and `noise` are what the jump into it
    keeps of the sample and takes of fresh noise (1 and 0 for the first).
    """

    start: float
    end: float
    first: float
    last: float
    keep: float = 1.0
    noise: float = 0.0

    def timesteps(self, steps: int) -> np.ndarray:
        """Return the `steps` times the model is told, float64."""
        return np.linspace(self.first, self.last, steps)

    def timestep_at(self, t: float) -> float:
        """Return the time the model is told at a local time from 1 to 0; `last` is that of 1 / 1000."""
        end = 1 / NUM_TIMESTEPS
        return self.last + (t - end) / (1 - end) * (self.first - self.last)


def make_stages(
    count: int = 3, ranges: Sequence[float] | None = None, shift: float = 1.0, gamma: float = GAMMA
) -> tuple[Stage, ...]:
    """Return the stages, coarsest first. `ranges` are where each begins on 0..1, and 1 behind them."""
    ranges = tuple(ranges or (i / count for i in range(count + 1)))
    if len(ranges) != count + 1:
        raise ConfigError(f"{len(ranges)} ends of stages are given, {count} stages have {count + 1}")
    times = np.linspace(1, NUM_TIMESTEPS, NUM_TIMESTEPS, dtype=np.float32)[::-1]
    sigmas = times / NUM_TIMESTEPS
    sigmas = torch.from_numpy((shift * sigmas / (1 + (shift - 1) * sigmas)).copy())
    clock = (sigmas * NUM_TIMESTEPS).double()
    edges = [int(share * NUM_TIMESTEPS) for share in ranges]
    ends = []
    for i in range(count):
        begins = float(sigmas[edges[i]])
        stops = float(sigmas[edges[i + 1]]) if edges[i + 1] < NUM_TIMESTEPS else 0.0
        keep, noise = 1.0, 0.0
        if i > 0:
            # Nearest upsampling correlates the noise of a block; fresh noise of the opposite correlation,
            # and a start that is a little noisier, make it white again (Pyramidal Flow Matching, section
            # 3.2).
            data = 1 - begins
            keep = 1 / (math.sqrt(1 + 1 / gamma) * (1 - data) + data)
            noise = keep * (1 - data) / math.sqrt(gamma)
            begins = 1 - keep * data
        ends.append((begins, stops, keep, noise))
    lengths = [begins - stops for begins, stops, _, _ in ends]
    whole, done, stages = sum(lengths), 0.0, []
    for i, (begins, stops, keep, noise) in enumerate(ends):
        high = 0.0 if i == 0 else done / whole
        done += lengths[i]
        low = 1.0 if i == count - 1 else done / whole
        top = float(clock[int(high * NUM_TIMESTEPS)])
        bottom = float(clock[min(int(low * NUM_TIMESTEPS), NUM_TIMESTEPS - 1)])
        last = float(np.linspace(top, bottom, NUM_TIMESTEPS + 1)[-2])
        stages.append(Stage(begins, stops, top, last, keep, noise))
    return tuple(stages)


def local_times(steps: int) -> np.ndarray:
    """Return the local times of a stage [steps + 1], float64: evenly from 1 to 0.001, then 0."""
    if steps < 1:
        raise ConfigError(f"{steps} steps in a stage: at least 1 is needed")
    return np.append(np.linspace(1, 1 / NUM_TIMESTEPS, steps), 0.0)


def halved(x: Tensor) -> Tensor:
    """Return latents [B, c, T, h, w] at half their height and width, bilinear."""
    b, _, t, h, w = x.shape
    frames = x.transpose(1, 2).flatten(0, 1)
    small = interpolate(frames, size=(h // 2, w // 2), mode="bilinear")
    return small.unflatten(0, (b, t)).transpose(1, 2)


def doubled(x: Tensor) -> Tensor:
    """Return latents [B, c, T, h, w] at twice their height and width, each repeated."""
    b, _, t, h, w = x.shape
    frames = interpolate(x.transpose(1, 2).flatten(0, 1), size=(2 * h, 2 * w), mode="nearest")
    return frames.unflatten(0, (b, t)).transpose(1, 2)


def first_noise(noise: Tensor, stages: int) -> Tensor:
    """Return what the first stage begins with: noise [B, c, T, h, w] halved, times 2, stage by stage."""
    for _ in range(stages - 1):
        noise = halved(noise) * 2
    return noise


def block_noise(noise: Tensor) -> Tensor:
    """Return noise of unit variance whose 2 x 2 blocks add up to 0, of white noise [B, c, T, h, w].

    It is what a jump needs; the original draws it from a singular normal distribution, which torch refuses.
    """
    b, _, t, _, _ = noise.shape
    frames = noise.transpose(1, 2).flatten(0, 1)
    mean = torch.nn.functional.avg_pool2d(frames, 2)
    blocks = interpolate(mean, scale_factor=2, mode="nearest").unflatten(0, (b, t)).transpose(1, 2)
    return math.sqrt(4 / 3) * (noise - blocks)


def jump(z: Tensor, stage: Stage, noise: Tensor) -> Tensor:
    """Return what a stage begins with: the stage before's result, doubled, with `block_noise` added."""
    return stage.keep * doubled(z) + stage.noise * noise


def history(done: Tensor, stage: int, stages: int) -> list[Tensor]:
    """Return the clips a frame is denoised beside at a stage, oldest first; none for the first frame.

    `done` [B, c, u, h, w] are the frames before it, clean. The last one comes at the stage's own size,
    those before it at one size less each, down to the smallest, at which all the others come.
    """
    u = done.shape[2]
    if u == 0:
        return []
    sizes = [done]
    for _ in range(stages - 1):
        sizes.insert(0, halved(sizes[0]))
    found, k, at = [sizes[stage][:, :, -1:]], 1, stage
    while k < u:
        at = max(at - 1, 0)
        if at == 0:
            break
        k += 1
        found.append(sizes[at][:, :, -k : 1 - k])
    if at == 0 and k < u:
        found.append(sizes[0][:, :, :-k])
    return found[::-1]
