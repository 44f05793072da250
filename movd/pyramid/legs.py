"""One prompt's way through Pyramidal Flow: unit by unit, stage by stage; each of these is a flow of its own.

The velocity is noise - data. A flow ends where its stage does: nothing leaps beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockstream.errors import ConfigError
from movd.pyramid import stages as pyramid
from movd.pyramid.stages import Stage, local_times
from movd.text_to_video.flows import FlowBase


class Words(NamedTuple):
    """What the model is told: T5's states [B, L, J] with mask [B, L], CLIP's vector [B, P]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor

    def joined(self, after: Words) -> Words:
        """Return these rows, then those of others."""
        return Words(*(torch.cat(pair) for pair in zip(self, after, strict=True)))


@dataclass(frozen=True)
class Guidance:
    """The scales of classifier-free guidance: of the first frame's, of the others'.

    `linear` instead lets it fall by half with every frame, to 2. A scale of 0 for the first turns guidance
    off altogether, whatever the other is.
    """

    first: float = 7.0
    others: float = 5.0
    linear: bool = False

    @property
    def is_on(self) -> bool:
        """Return whether the unconditional half is computed at all."""
        return self.first > 0

    def scale(self, unit: int) -> float:
        """Return the scale of one unit."""
        if self.linear:
            return max(self.first - 0.5 * unit, 2.0)
        return self.first if unit == 0 else self.others


class StageFlow(FlowBase):
    """The `Flow` of one unit at one stage. `words` holds the negative rows first where guidance is on."""

    straight = True
    #: Which unit and stage it is, for figures.
    name = ""

    def __init__(
        self,
        model: nn.Module,
        words: Words,
        past: list[Tensor],
        stage: Stage,
        steps: int,
        guidance: float | None,
        **reports: Any,
    ) -> None:
        super().__init__(**reports)
        self.model, self.words, self.past = model, words, past
        self.stage = stage
        self.timesteps = stage.timesteps(steps).astype("float32")
        self.sigmas = local_times(steps)
        self.times = self.sigmas[:-1].tolist()
        self.guidance = guidance

    def velocity_of(self, z: Tensor, t: float, i: int) -> Tensor:
        """Return v(z, t) [B, c, 1, h, w], guided: negative + scale (positive - negative)."""
        at = float(self.timesteps[i]) if t == self.times[i] else self.stage.timestep_at(t)
        copies = len(self.words.mask) // len(z)
        clips = [clip.repeat(copies, 1, 1, 1, 1) for clip in (*self.past, z)]
        v: Tensor = self.model(clips, torch.full((copies * len(z),), at), *self.words)
        if self.guidance is None:
            return v
        negative, positive = v.chunk(2)
        return negative + self.guidance * (positive - negative)

    def advance(self, z: Tensor, v: Tensor, i: int, to: int) -> Tensor:
        """Return z moved along v from times[i] to times[to]; the last is the stage's end."""
        return z + float(self.sigmas[to] - self.sigmas[i]) * v.float()

    def state(self) -> Mapping[str, Any]:
        """Return nothing: all that a resumed run needs is z."""
        return {}


class Leg(NamedTuple):
    """Which unit and stage a flow is of."""

    unit: int
    stage: int


class Journey:
    """All flows of one prompt, and the latents they have made so far.

    `noise` [B, c, T, h, w] is that of every frame at full size; `image` [B, c, 1, h, w], normalised, is a
    first frame that is known: then the others begin with the noise of the frame before theirs, as the
    original does. `fresh(unit, stage, shape)` draws the white noise of a jump.
    """

    def __init__(
        self,
        noise: Tensor,
        stages: tuple[Stage, ...],
        *,
        steps_first: tuple[int, ...],
        steps_others: tuple[int, ...],
        image: Tensor | None = None,
        fresh: Callable[[int, int, tuple[int, ...]], Tensor],
    ) -> None:
        for name, steps in (("first", steps_first), ("other", steps_others)):
            if len(steps) != len(stages):
                raise ConfigError(
                    f"{len(steps)} numbers of steps for the {name} frames, there are {len(stages)} stages"
                )
        self.noise, self.stages, self.fresh = noise, stages, fresh
        self.steps_first, self.steps_others = steps_first, steps_others
        self.known = 0 if image is None else 1
        self.done = noise[:, :, :0] if image is None else image
        self.legs = journey_legs(noise.shape[2], len(stages), self.known)

    def steps(self, leg: Leg) -> int:
        """Return the steps of a flow."""
        return (self.steps_first if leg.unit == 0 else self.steps_others)[leg.stage]

    def begin(self, leg: Leg, before: Tensor | None) -> Tensor:
        """Return where a flow begins: noise, or what the stage before it, `before`, jumps to."""
        if leg.stage == 0:
            frame = leg.unit - self.known
            return pyramid.first_noise(self.noise[:, :, frame : frame + 1], len(self.stages))
        assert before is not None
        b, c, t, h, w = before.shape
        white = self.fresh(leg.unit, leg.stage, (b, c, t, 2 * h, 2 * w))
        return pyramid.jump(before, self.stages[leg.stage], pyramid.block_noise(white))

    def past(self, leg: Leg) -> list[Tensor]:
        """Return the clips a flow's frame is denoised beside."""
        return pyramid.history(self.done, leg.stage, len(self.stages))

    def end(self, leg: Leg, z: Tensor) -> None:
        """Take in what a flow has reached: a frame is made at the end of the last stage."""
        if leg.stage == len(self.stages) - 1:
            self.done = torch.cat((self.done, z), 2)


def journey_legs(frames: int, stages: int, known: int = 0) -> list[Leg]:
    """Return unit and stage of every flow, in order."""
    return [Leg(unit, stage) for unit in range(known, frames) for stage in range(stages)]


def jump_noise(seed: int, stages: int) -> Callable[[int, int, tuple[int, ...]], Tensor]:
    """Return what draws the white noise of a jump.

    It follows from the seed, the unit and the stage: a run that goes on draws the same.
    """

    def draw(unit: int, stage: int, shape: tuple[int, ...]) -> Tensor:
        own = (seed + 1_000_003 * (1 + unit * stages + stage)) % (1 << 63)
        return torch.randn(shape, generator=torch.Generator().manual_seed(own))

    return draw


class PyramidWay:
    """One prompt's flows, unit by unit, stage by stage. Implements `movd.text_to_video.family.Way`."""

    def __init__(self, journey: Journey, denoiser: nn.Module, words: Words, guidance: Guidance) -> None:
        self._journey, self._denoiser, self._words, self._guidance = journey, denoiser, words, guidance

    def begin(self, leg: int, before: Tensor | None) -> Tensor:
        """Return where a flow begins."""
        return self._journey.begin(self._journey.legs[leg], before)

    def flow(self, leg: int, on_remaining: Callable[[int], None]) -> StageFlow:
        """Return the flow of a leg."""
        journey, place = self._journey, self._journey.legs[leg]
        flow = StageFlow(
            self._denoiser,
            self._words,
            journey.past(place),
            journey.stages[place.stage],
            journey.steps(place),
            self._guidance.scale(place.unit) if self._guidance.is_on else None,
            on_remaining=on_remaining,
        )
        flow.name = f"unit {place.unit + 1}, stage {place.stage + 1}"
        return flow

    def end(self, leg: int, z: Tensor) -> None:
        """Take in what a flow has reached."""
        self._journey.end(self._journey.legs[leg], z)

    def latents(self) -> Tensor:
        """Return the latents, as the model has them."""
        return self._journey.done

    def state(self) -> Mapping[str, Any]:
        """Return the frames that are made."""
        return {"done": self._journey.done}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from frames that were made."""
        self._journey.done = state["done"]


#: What separates latents from what the model takes: (shift, scale) of the first frame, of the others.
FIRST, OTHERS = (-0.04, 1 / 1.8726), (-0.2343, 1 / 3.0986)


def normalised(z: Tensor) -> Tensor:
    """Return a first frame's latents as the model takes them."""
    return (z - FIRST[0]) * FIRST[1]


def unnormalised(z: Tensor) -> Tensor:
    """Return latents [B, c, T, h, w] as the VAE takes them: the first frame has its own shift and scale."""
    first, others = z[:, :, :1], z[:, :, 1:]
    return torch.cat((first / FIRST[1] + FIRST[0], others / OTHERS[1] + OTHERS[0]), 2)
