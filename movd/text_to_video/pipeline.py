"""Text to video: text encoders, a denoiser, a decoder, stages of one schedule.

Prompts go stage by stage: all through the text encoders, each denoised, each decoded. What a stage makes is
on disk before the next begins, so a run that was stopped goes on where it was, and stages with nothing left
to do are not declared.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from blockstream.errors import ConfigError, EngineError
from blockstream.module.lora import identities, load_loras
from blockstream.plan.segments import AtMost, Exactly, Passes
from blockstream.plugins import Network, Run
from blockstream.system import regular
from blockstream.system.cache import cache_folder
from movd.text_to_video.family import Embedding, Family, TextStage
from movd.texts import TextCache, Texts
from movd.video import check_encoder, to_frames, write_image, write_video

if TYPE_CHECKING:
    from blockstream.streaming.session import Session

log = logging.getLogger(__name__)

LATENTS = "latents.safetensors"
VIDEO, IMAGE = "video.mp4", "image.png"
#: The state that holds the first frame's latents, once encoded, and the stage that encodes it.
REFERENCE, ENCODER = "reference", "vae-encoder"
DENOISER, DECODER = "dit", "vae"
#: Seconds, before a run was measured: of a sampler's step, for it and for each of its numbers, and of a
#: pixel that is written to a video.
STEP_S, STEP_S_A_NUMBER, PIXEL_S = 2e-3, 1e-8, 1.5e-7


class TextToVideo:
    """One run of a family. See `blockstream.plugins.Pipeline`."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.options = family.options
        self.indices = range(len(self.options.texts))

    # -- stages ------------------------------------------------------------------------------

    def declare(self, session: Session, run: Run) -> None:
        """Add the stages that have work to do. Checkpoints are matched to modules, headers alone are read."""
        o, files, family = self.options, run.files, self.family
        family.open(run)
        if not run.planning:
            files.identify(family.identity())
            files.identify(identities(self.options.lora_paths))
        self.legs = family.legs()
        self.results = [self._named(n, IMAGE if o.frames == 1 else VIDEO) for n in self.indices]
        self.to_decode = [n for n in self.indices if not files.is_whole(self.results[n])]
        self.to_denoise = [n for n in self.indices if not files.is_whole(self._named(n, LATENTS))]
        self.encoders = family.encoders(run)
        self.texts = [self._texts(run, i, encoder) for i, encoder in enumerate(self.encoders)]
        files.declare(
            [*self.results, *(self._named(n, LATENTS) for n in self.indices)],
            [
                *(state for n in self.to_denoise for state in self._states(n)),
                REFERENCE,
                *(name for texts in self.texts for name in texts.names),
            ],
        )
        if self.to_decode and o.frames > 1:
            # A plan holds what a run will, whatever it comes to.
            with suppress(ConfigError) if run.planning else nullcontext():
                check_encoder()
        for n in self.to_denoise:
            for remark in family.remarks(n):
                log.warning("prompt %d %s", n, remark)
        self._declare_reference(session, run)
        self._declare_text(session, run)
        self._declare_denoiser(session, run)
        if self.to_decode:
            passes = Exactly(len(self.to_decode) * family.decoder_passes())
            between_s = PIXEL_S * prod(self.family.pixels()) * o.frames / family.decoder_passes()
            inputs = family.decoder_inputs()
            self.decoder = _stage(session, DECODER, family.decoder(), passes, inputs, between_s=between_s)

    def _named(self, n: int, name: str) -> str:
        """Return the name of a prompt's file: of several prompts each has a folder, 0000, 0001, ..."""
        return f"{n:04d}/{name}" if len(self.indices) > 1 else name

    def _states(self, n: int) -> list[str]:
        """Return the names of a prompt's states: its way's, where it has several flows, and each flow's."""
        if len(self.legs) == 1:
            return [f"{n:04d}"]
        return [f"{n:04d}", *(f"{n:04d}/{leg.name}" for leg in self.legs)]

    def _leg_state(self, n: int, leg: int) -> str:
        return self._states(n)[-1 if len(self.legs) == 1 else 1 + leg]

    def _declare_reference(self, session: Session, run: Run) -> None:
        """Add what encodes the first frame, unless there is none or it has been encoded."""
        self.first: Tensor | None = None
        if not self.to_denoise or run.files.load(REFERENCE) is not None:
            return
        if (found := self.family.reference()) is not None:
            network, self.first = found
            self.encoder = _stage(session, ENCODER, network, 1, (self.first,))

    def _texts(self, run: Run, i: int, encoder: TextStage) -> Texts:
        """Return one encoder's embeddings of the texts that are to be denoised, none read yet."""
        cache = TextCache(cache_folder() / "movd" / "text", self.options.cache_nbytes)
        return Texts(self._wanted(i), encoder.about, run.files, cache)

    def _wanted(self, i: int) -> list[str]:
        """Return the texts that an encoder is asked for, each once."""
        return list(dict.fromkeys(t for n in self.to_denoise for t in self.family.texts(n)[i]))

    def _declare_text(self, session: Session, run: Run) -> None:
        """Add the text encoders, those of which every embedding is there left out."""
        self.modules: list[Any] = []
        self.to_embed: list[list[str]] = []
        for i, (encoder, texts) in enumerate(zip(self.encoders, self.texts, strict=True)):
            wanted = self._wanted(i)
            missing = texts.missing(wanted)
            self.to_embed.append(missing)
            module = None
            if missing:
                module = _stage(session, encoder.name, encoder.network(), len(missing), encoder.example)
            self.modules.append(module)

    def _declare_denoiser(self, session: Session, run: Run) -> None:
        """Add the denoiser, unless every prompt is denoised."""
        if not self.to_denoise:
            return
        family, times = self.family, self.family.guidance_passes
        network = family.denoiser(run)
        rows = family.pace(network, run)
        left, pace = 0, list[float]()
        for n in self.to_denoise:
            begun, _ = self._begun(run, n)
            for k, leg in enumerate(self.legs[begun:], begun):
                index, passes = run.sampled(self._leg_state(n, k), leg.steps, leg.shape)
                most = run.passes(leg.steps)[1]
                left += times * max(0, most - passes)
                a_step = times * max(1, most // leg.steps)
                pace += [share for share in rows[k][index:] for _ in range(a_step)] if rows else []
        passes, numel = AtMost(max(1, left)), max(prod(leg.shape) for leg in self.legs)
        between_s = STEP_S + STEP_S_A_NUMBER * numel
        self.denoiser = _stage(session, DENOISER, network, passes, family.denoiser_inputs(), pace, between_s)
        load_loras(self.denoiser, [(lora.path, lora.scale) for lora in self.options.lora])

    def _begun(self, run: Run, n: int) -> tuple[int, Mapping[str, Any] | None]:
        """Return the leg that a prompt goes on with, and the state of its way there."""
        state = run.files.load(f"{n:04d}") if len(self.legs) > 1 else None
        return (0, None) if state is None else (int(state["leg"]), state)

    # -- the run -----------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, session: Session, run: Run) -> Mapping[str, Any]:
        """Make every video; return their files, relative to `run.out`."""
        if self.first is not None:
            with run.phase("reference"):
                encoded = self.encoder(self.first)
                run.check("the encoded reference image", encoded, lambda: self.encoder(self.first))
                run.files.save(REFERENCE, {"z": encoded})
            session.end(ENCODER)
        with run.phase("text"):
            self._embed(session, run)
        with run.phase("denoise"):
            for n in self.to_denoise:
                self._denoise(session, run, n)
        if self.to_denoise:
            session.end(DENOISER)
        with run.phase("decode"):
            for n in self.to_decode:
                self._decode(run, n)
        return self._output(run)

    def _embed(self, session: Session, run: Run) -> None:
        parts = zip(self.encoders, self.texts, self.modules, self.to_embed, strict=True)
        for i, (encoder, texts, module, missing) in enumerate(parts):
            texts.collect(self._wanted(i))
            for text in missing:
                y, mask = encoder.embed(module, text)
                again = partial(encoder.embed, module, text)
                texts.put(text, run.check(f"{encoder.name}'s embedding of {text[:60]!r}", y, again), mask)
            if missing:
                session.end(encoder.name)

    def _denoise(self, session: Session, run: Run, n: int) -> None:
        family, denoiser = self.family, self.denoiser
        texts: Sequence[Sequence[Embedding]] = [
            [self.texts[i].get(text) for text in own] for i, own in enumerate(family.texts(n))
        ]
        way = family.way(denoiser, texts, self._encoded(run))
        begun, state = self._begun(run, n)
        z = None
        if state is not None:
            z = state["z"]
            way.load_state(state["way"])
        told = []
        with family.attention(denoiser, run, texts):
            for k in range(begun, len(self.legs)):
                last = n == self.to_denoise[-1] and k == len(self.legs) - 1
                flow = way.flow(k, lambda passes, last=last: self._remaining(session, last, passes))
                begins, name = way.begin(k, z), self._leg_state(n, k)
                z, said = run.sample(name, flow, begins, self.options.steps_a_save)
                way.end(k, z)
                told.append(dict(said))
                if k < len(self.legs) - 1:
                    run.files.save(f"{n:04d}", {"leg": k + 1, "z": z, "way": way.state()})
                    run.files.drop(name)
        made = run.check(f"the latents of prompt {n}", way.latents())
        about = told[0] if len(self.legs) == 1 else {"flows": told} if any(told) else {}
        metadata = {"about": json.dumps(about)}
        run.files.write(self._named(n, LATENTS), save({"z": made.contiguous()}, metadata))
        for name in self._states(n):
            run.files.drop(name)

    def _encoded(self, run: Run) -> Tensor | None:
        """Return the encoded first frame; None where the run has none."""
        if not self.family.has_reference:
            return None
        found = run.files.load(REFERENCE)
        if found is None:
            raise EngineError(f"the encoded reference image is gone from {run.out}; run the same again")
        encoded: Tensor = found["z"]
        return encoded

    def _remaining(self, session: Session, last: bool, passes: int) -> None:
        """Let the decoder's head load as soon as the last pass of the last prompt is known to be the last."""
        if passes == 0 and last:
            session.end(DENOISER)

    def _decode(self, run: Run, n: int) -> None:
        z, _ = self._latents(run, n)
        with run.files.writing(self.results[n]) as path:
            if self.options.frames == 1:
                write_image(path, next(self._frames(run, n, z))[0])
            else:
                write_video(path, self._frames(run, n, z), self.options.fps)

    def _frames(self, run: Run, n: int, z: Tensor) -> Iterator[np.ndarray]:
        begin = 0
        for clip in self.family.clips(self.decoder, z):
            end = begin + clip.shape[2]
            again = partial(deque, self.family.clips(self.decoder, z), 0)  # nothing of it is kept
            run.check(f"the VAE's frames {begin} to {end - 1} of prompt {n}", clip, again)
            begin = end
            yield to_frames(clip[0], truncate=self.family.truncates)

    def _latents(self, run: Run, n: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the latents [1, c, T, h, w] of a prompt and what the sampler said of them."""
        path = run.out / self._named(n, LATENTS)
        regular.check(path)
        with safe_open(path, framework="pt") as file:
            # Memory of its own, aligned as that of a computed tensor: kernels differ with the address.
            return file.get_tensor("z").clone(), json.loads(file.metadata()["about"])

    def _output(self, run: Run) -> dict[str, Any]:
        o = self.options
        height, width = self.family.pixels()
        said = [self._latents(run, n)[1] for n in self.indices]
        return {
            "files": self.results,
            "prompts": list(o.texts),
            "height": height,
            "width": width,
            "frames": o.frames,
            "fps": o.fps,
            **({"sampler": said} if any(said) else {}),
        }


def _stage(
    session: Session,
    name: str,
    network: Network,
    passes: int | Passes,
    example_inputs: Any,
    pace: Sequence[float] = (),
    between_s: float = 0.0,
) -> nn.Module:
    """Add a stage; return its module, ready to be called. Nobody trains it: it computes as a frozen one."""
    if isinstance(network.module, nn.Module):
        network.module.requires_grad_(False)
    return session.stage(
        name,
        network.module,
        network.checkpoint,
        passes=passes,
        dtype=network.dtype,
        example_inputs=example_inputs,
        around=network.around,
        pace=pace,
        between_s=between_s,
    )
