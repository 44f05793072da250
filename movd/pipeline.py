"""Text to video: T5 -> STDiT3 -> VAE, stages of one schedule.

Prompts go stage by stage: all through T5, each denoised, each decoded. What a stage makes is on disk
before the next begins, so a run that was stopped goes on where it was, and stages with nothing left to do
are not declared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from blockstream.errors import ConfigError
from blockstream.plan.segments import AtMost, Exactly, Passes
from blockstream.plugins.protocols import Run
from blockstream.run.runner import NOWHERE
from blockstream.streaming.pace import pace
from blockstream.system.floor import cache_folder
from blockstream.system.machine import versions
from movd.attention import attention_layers
from movd.captions import official_prompt
from movd.networks import Network, Networks, OwnNetworks
from movd.options import MovdOptions
from movd.reference import digest, read_reference
from movd.rflow import OpenSoraFlow
from movd.state import IMAGE, VIDEO, Progress, Step
from movd.stdit3 import STDiT3
from movd.t5 import embed
from movd.texts import TextCache, TextFolder, Texts
from movd.video import to_frames, write_image, write_video
from movd.weights import Weights

if TYPE_CHECKING:
    from blockstream.streaming.session import Session

log = logging.getLogger(__name__)

#: A step that took longer than this is saved at once, in seconds.
SLOW_STEP_S = 10.0
#: The packages whose version may change a bit.
PACKAGES = ("torch", "transformers", "diffusers", "blockstream-engine")
REFERENCE = "reference"


class MovdPipeline:
    """One run of Open-Sora v1.2. See `blockstream.plugins.protocols.Pipeline`."""

    def __init__(self, options: MovdOptions) -> None:
        self.options = options
        self.height, self.width = options.size
        self.captions = [official_prompt(text, options.aesthetic) for text in options.texts]
        self.indices = range(len(self.captions))

    # -- stages ------------------------------------------------------------------------------

    def declare(self, session: Session, run: Run) -> None:
        """Add the stages that have work to do. Checkpoints are matched to modules, headers alone are read."""
        o = self.options
        weights = self.weights = Weights(o, planning=run.out == NOWHERE)
        self.progress = Progress(run.out, len(self.captions), run.resumed)
        self.to_decode = [n for n in self.indices if self.progress.result(n) is None]
        self.to_denoise = [n for n in self.to_decode if not self.progress.has_latents(n)]
        self.networks = self._networks(run)
        self.latent, self.pixels = weights.latent(o), weights.pixels(o)
        self.first = self._reference()
        if not self.to_decode:
            return
        self._warn_of_cut_captions()
        if self.first is not None:
            self.encoder = session.stage(
                "vae-encoder",
                weights.encoder(),
                weights.vae.checkpoint,
                passes=1,
                dtype=o.vae.converted,
                example_inputs=(self.first,),
            )
        self._declare_text(session, run)
        self._declare_denoiser(session, run)
        chunks = weights.vae_config.chunks(o.frames)
        passes = Exactly(len(self.to_decode) * len(chunks))
        example = (torch.empty(1, *self._latent_of(chunks[0])), chunks[0])
        self.vae = self._stage(session, "vae", self.networks.decoder(), passes, example)

    def _networks(self, run: Run) -> Networks:
        """Return what makes the networks: the config's backend, which has to have segments for them."""
        if run.config.backend is None:
            return OwnNetworks(self.options, self.weights)
        backend = run.config.backend.build()
        if not hasattr(backend, "networks"):
            raise ConfigError(
                f"backend {run.config.backend.ref!r} has no segments for pipeline movd; "
                "coreml-interpreter and coreml have"
            )
        networks: Networks = backend.networks(self.options, self.weights)
        return networks

    def _stage(
        self,
        session: Session,
        name: str,
        network: Network,
        passes: int | Passes,
        example_inputs: Any,
        pace: Sequence[float] = (),
    ) -> Any:
        """Add a stage; return its module, ready to be called."""
        return session.stage(
            name,
            network.module,
            network.checkpoint,
            passes=passes,
            dtype=network.dtype,
            example_inputs=example_inputs,
            around=network.around,
            pace=pace,
        )

    def _declare_text(self, session: Session, run: Run) -> None:
        """Add T5, unless every caption's embedding is there."""
        o, weights = self.options, self.weights
        captions = [self.captions[n] for n in self.to_denoise]
        cache = TextCache(cache_folder() / "movd" / "text", o.cache_nbytes)
        own = TextFolder(self.progress.state / "text")
        self.texts = Texts(captions, self._text_numerics(run), own, cache)
        self.to_embed = self.texts.missing(captions)
        if self.to_embed:
            tokens = torch.ones(1, weights.dit_config.model_max_length, dtype=torch.long)
            example = {"input_ids": tokens, "attention_mask": tokens}
            encoder = self.networks.text_encoder()
            self.t5 = self._stage(session, "t5", encoder, len(self.to_embed), example)

    def _declare_denoiser(self, session: Session, run: Run) -> None:
        """Add STDiT3, unless every prompt is denoised."""
        if not self.to_denoise:
            return
        o = self.options
        most = getattr(run.sampler, "passes", lambda steps: (steps, steps))(o.steps)[1]
        saved = [self.progress.step(n) for n in self.to_denoise]
        left = [most if step is None else max(0, most - step.index) for step in saved]
        passes = AtMost(max(1, sum(left)))
        example = self._denoiser_inputs()
        network = self.networks.denoiser(run)
        self.dit = self._stage(
            session, "dit", network, passes, example, self._pace(network, run, example, saved)
        )

    def _pace(
        self, network: Network, run: Run, example: Mapping[str, Any], saved: Sequence[Step | None]
    ) -> tuple[float, ...]:
        """Return how long each pass takes beside one without merging, all prompts one after another."""
        if not run.config.attention or not isinstance(network.module, STDiT3):
            return ()
        grid = network.module.grid(*self.latent[1:])
        tokens = self.weights.dit_config.model_max_length

        def layers(dit: STDiT3) -> list[Any]:
            return attention_layers(dit, grid, tokens)

        steps = pace(network.module, example, run, self.options.steps, layers)
        return tuple(p for step in saved for p in steps[0 if step is None else step.index :])

    def _denoiser_inputs(self) -> dict[str, Any]:
        """Return inputs of the shapes a step has, with guidance, for a text of full length."""
        config = self.weights.dit_config
        return {
            "x": torch.empty(2, *self.latent),
            "timestep": torch.empty(2),
            "y": torch.empty(2, 1, config.model_max_length, config.caption_channels),
            "fps": torch.tensor([float(self.options.fps)]),
            "height": [float(self.height)],
            "width": [float(self.width)],
        }

    def _latent_of(self, frames: int) -> tuple[int, int, int, int]:
        """Return the shape of the latents of some frames."""
        channels, _, h, w = self.latent
        return channels, self.weights.vae_config.latent_frames(frames), h, w

    def _reference(self) -> Tensor | None:
        """Return the frame to encode, None where there is none or it has been encoded."""
        path = self.options.reference
        if path is None or not self.to_denoise:
            return None
        if self.progress.resumed and self.progress.tensor(REFERENCE) is not None:
            return None
        return read_reference(Path(path), *self.pixels)

    def _text_numerics(self, run: Run) -> dict[str, Any]:
        """Return what an embedding's bits follow from beside the caption."""
        installed = versions()
        return {
            "weights": self.weights.t5.identity,
            "tokenizer": None if self.weights.t5.is_imagined else self.weights.tokenizer.identity,
            "length": self.weights.dit_config.model_max_length,
            "dtype": self.options.t5.dtype,
            "threads": run.config.threads,
            "device": run.config.device,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "versions": [installed["torch"], installed["transformers"]],
            **({"int8": run.config.int8} if self.weights.t5.checkpoint.scales else {}),
            **({"packages": self.networks.identity} if self.networks.identity is not None else {}),
        }

    def _warn_of_cut_captions(self) -> None:
        if self.weights.t5.is_imagined:
            return
        length = self.weights.dit_config.model_max_length
        for n in self.to_denoise:
            _, mask = self.weights.tokenizer.encode([self.captions[n]])
            if int(mask.sum()) >= length:
                log.warning(
                    "prompt %d fills all %d tokens the model reads; what follows is cut: %r",
                    *(n, length, self.captions[n][:60]),
                )

    # -- the run -----------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, session: Session, run: Run) -> Mapping[str, Any]:
        """Make every video; return their files, relative to `run.out`."""
        if self.to_decode:
            self._make(session, run)
        output = self._output(run.out)
        self.progress.finish()
        return output

    def _make(self, session: Session, run: Run) -> None:
        self.progress.begin(self._about())
        if self.first is not None:
            with run.phase("reference"):
                self.progress.save_tensor(REFERENCE, self.encoder(self.first))
            session.end("vae-encoder")
        with run.phase("text"):
            self._embed(session)
        with run.phase("denoise"):
            for n in self.to_denoise:
                self._denoise(session, run, n)
        if self.to_denoise:
            session.end("dit")
        with run.phase("decode"):
            for n in self.to_decode:
                self._decode(n)

    def _about(self) -> dict[str, dict[str, str | None]]:
        """Return what a run's bits follow from beside its config."""
        installed = versions()
        inputs: dict[str, str | None] = dict(self.weights.identity())
        if self.networks.identity is not None:
            inputs["packages"] = self.networks.identity
        if self.options.reference is not None:
            inputs[REFERENCE] = digest(Path(self.options.reference))
        return {"inputs": inputs, "versions": {name: installed[name] for name in PACKAGES}}

    def _embed(self, session: Session) -> None:
        self.texts.collect([self.captions[n] for n in self.to_denoise])
        for caption in self.to_embed:
            self.texts.put(caption, *embed(self.t5, self.weights.tokenizer, [caption]))
        if self.to_embed:
            session.end("t5")

    def _denoise(self, session: Session, run: Run, n: int) -> None:
        o = self.options
        y, mask = self.texts.get(self.captions[n])
        generator = torch.Generator().manual_seed(o.seed)
        z = torch.randn((1, *self.latent), generator=generator)
        x_mask = None
        if o.reference is not None:
            x_mask = torch.ones(1, self.latent[1])
            x_mask[:, 0] = 0
            z[:, :, :1] = self.progress.tensor(REFERENCE)
        flow = OpenSoraFlow(
            self.dit,
            y,
            mask,
            o.steps,
            o.guidance,
            self.height,
            self.width,
            o.frames,
            o.fps,
            x_mask,
            generator,
            on_remaining=lambda passes: self._remaining(session, n, passes),
        )
        i, memory = 0, None
        if (saved := self.progress.step(n)) is not None:
            i, z, memory = saved.index, saved.z, saved.memory
            flow.load_state(saved.flow)
        saver = _Saver(self.progress, n, o.save_every, flow, memory)
        flow.on_step = saver
        with self.networks.attention(self.dit, run, int(mask.sum(1).max())):
            z = run.sampler(flow, z, i, memory)
        self.progress.save_latents(n, z, self._said_by(run.sampler, saver.memory))

    def _said_by(self, sampler: Any, memory: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what a sampler has to say of the prompt it has just done."""
        report: Callable[..., dict[str, Any]] | None = getattr(sampler, "report", None)
        return report(memory, self.options.steps) if report is not None and memory is not None else {}

    def _remaining(self, session: Session, n: int, passes: int) -> None:
        """Let the VAE's head load as soon as the last pass of the last prompt is known to be the last."""
        if passes == 0 and n == self.to_denoise[-1]:
            session.end("dit")

    def _decode(self, n: int) -> None:
        z, _ = self.progress.latents(n)
        if self.options.frames == 1:
            write_image(self.progress.target(n, IMAGE), next(self._frames(z))[0])
        else:
            write_video(self.progress.target(n, VIDEO), self._frames(z), self.options.fps)

    def _frames(self, z: Tensor) -> Iterator[np.ndarray]:
        for clip in self.vae.decode_chunks(z, self.options.frames):
            yield to_frames(clip[0])

    def _output(self, out: Path) -> dict[str, Any]:
        o = self.options
        name = IMAGE if o.frames == 1 else VIDEO
        said = [self.progress.latents(n)[1] for n in self.indices]
        return {
            "files": [str((self.progress.folder(n) / name).relative_to(out)) for n in self.indices],
            "prompts": list(o.texts),
            "height": self.pixels[0],
            "width": self.pixels[1],
            "frames": o.frames,
            "fps": o.fps,
            **({"sampler": said} if any(said) else {}),
        }


class _Saver:
    """Saves one prompt's state after a step: each `every`-th, and those that took long."""

    def __init__(
        self, progress: Progress, n: int, every: int, flow: OpenSoraFlow, memory: Mapping[str, Any] | None
    ) -> None:
        self._progress, self._n, self._every, self._flow = progress, n, every, flow
        self.memory = memory
        self._steps = 0
        self._saved_s = time.monotonic()

    def __call__(self, i: int, z: Tensor, memory: Mapping[str, Any] | None) -> None:
        self._steps += 1
        self.memory = memory
        if self._steps % self._every and time.monotonic() - self._saved_s < SLOW_STEP_S:
            return
        self._progress.save_step(self._n, Step(i + 1, z, memory, self._flow.state()))
        self._saved_s = time.monotonic()
