"""Text to video: T5 -> STDiT3 -> VAE, stages of one schedule.

Prompts go stage by stage: all through T5, each denoised, each decoded. What a stage makes is on disk
before the next begins, so a run that was stopped goes on where it was, and stages with nothing left to do
are not declared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from blockstream.errors import ConfigError, EngineError
from blockstream.plan.segments import AtMost, Exactly, Passes
from blockstream.plugins import Run
from blockstream.streaming.pace import pace
from blockstream.system.cache import cache_folder
from blockstream.system.machine import versions
from movd.attention import attention_layers
from movd.captions import lost, official_prompt
from movd.networks import Network, Networks, OwnNetworks
from movd.options import MovdOptions
from movd.reference import digest, read_reference
from movd.rflow import OpenSoraFlow
from movd.stdit3 import STDiT3
from movd.t5 import embed
from movd.texts import TextCache, Texts
from movd.tokenizer import UNKNOWN
from movd.video import check_encoder, to_frames, write_image, write_video
from movd.weights import Weights

if TYPE_CHECKING:
    from blockstream.streaming.session import Session

log = logging.getLogger(__name__)

LATENTS = "latents.safetensors"
VIDEO, IMAGE = "video.mp4", "image.png"
#: The state that holds the first frame's latents, once encoded.
REFERENCE = "reference"


class MovdPipeline:
    """One run of Open-Sora v1.2. See `blockstream.plugins.Pipeline`."""

    def __init__(self, options: MovdOptions) -> None:
        self.options = options
        self.height, self.width = options.size
        self.captions = [official_prompt(text, options.aesthetic) for text in options.texts]
        self.indices = range(len(self.captions))

    # -- stages ------------------------------------------------------------------------------

    def declare(self, session: Session, run: Run) -> None:
        """Add the stages that have work to do. Checkpoints are matched to modules, headers alone are read."""
        o, files = self.options, run.files
        weights = self.weights = Weights(o, planning=run.planning)
        self.networks = self._networks(run)
        self._identify(run)
        self.results = [self._named(n, IMAGE if o.frames == 1 else VIDEO) for n in self.indices]
        self.to_decode = [n for n in self.indices if not files.is_whole(self.results[n])]
        self.to_denoise = [n for n in self.indices if not files.is_whole(self._named(n, LATENTS))]
        self.latent, self.pixels = weights.latent(o), weights.pixels(o)
        self.first = self._reference(run)
        self.texts = self._texts(run)
        files.declare(
            [*self.results, *(self._named(n, LATENTS) for n in self.indices)],
            [*(_state(n) for n in self.to_denoise), REFERENCE, *self.texts.names],
        )
        if self.to_decode and o.frames > 1 and not run.planning:
            check_encoder()
        self._warn_of_lost_words()
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
        self._declare_text(session)
        self._declare_denoiser(session, run)
        if self.to_decode:
            chunks = weights.vae_config.chunks(o.frames)
            passes = Exactly(len(self.to_decode) * len(chunks))
            example = (torch.empty(1, *self._latent_of(chunks[0])), chunks[0])
            self.vae = self._stage(session, "vae", self.networks.decoder(), passes, example)

    def _named(self, n: int, name: str) -> str:
        """Return the name of a prompt's file: of several prompts each has a folder, 0000, 0001, ..."""
        return f"{n:04d}/{name}" if len(self.captions) > 1 else name

    def _networks(self, run: Run) -> Networks:
        """Return what makes the networks: the config's backend, which has to have segments for them."""
        chosen, backend = run.config.backend, run.backend
        if chosen is None:
            return OwnNetworks(self.options, self.weights)
        if not hasattr(backend, "networks"):
            raise ConfigError(
                f"backend {chosen.ref!r} has no segments for pipeline movd; "
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

    def _texts(self, run: Run) -> Texts:
        """Return the embeddings of the captions that are to be denoised, none read yet."""
        captions = [self.captions[n] for n in self.to_denoise]
        cache = TextCache(cache_folder() / "movd" / "text", self.options.cache_nbytes)
        return Texts(captions, self._text_numerics(run), run.files, cache)

    def _declare_text(self, session: Session) -> None:
        """Add T5, unless every caption's embedding is there."""
        weights = self.weights
        self.to_embed = self.texts.missing([self.captions[n] for n in self.to_denoise])
        if self.to_embed:
            tokens = torch.ones(1, weights.dit_config.model_max_length, dtype=torch.long)
            example = {"input_ids": tokens, "attention_mask": tokens}
            encoder = self.networks.text_encoder()
            self.t5 = self._stage(session, "t5", encoder, len(self.to_embed), example)

    def _declare_denoiser(self, session: Session, run: Run) -> None:
        """Add STDiT3, unless every prompt is denoised."""
        if not self.to_denoise:
            return
        steps, shape = self.options.steps, (1, *self.latent)
        most = run.passes(steps)[1]
        saved = [run.sampled(_state(n), steps, shape) for n in self.to_denoise]
        left = sum(max(0, most - passes) for _, passes in saved)
        example = self._denoiser_inputs()
        network = self.networks.denoiser(run)
        pace = self._pace(network, run, example, [index for index, _ in saved])
        self.dit = self._stage(session, "dit", network, AtMost(max(1, left)), example, pace)

    def _pace(
        self, network: Network, run: Run, example: Mapping[str, Any], begins: Sequence[int]
    ) -> tuple[float, ...]:
        """Return how long each pass takes beside one without merging, all prompts one after another."""
        if not run.config.attention or not isinstance(network.module, STDiT3):
            return ()
        grid = network.module.grid(*self.latent[1:])
        tokens = self.weights.dit_config.model_max_length

        def layers(dit: STDiT3) -> list[Any]:
            return attention_layers(dit, grid, tokens)

        steps = pace(network.module, example, run, self.options.steps, layers)
        return tuple(p for begin in begins for p in steps[begin:])

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

    def _reference(self, run: Run) -> Tensor | None:
        """Return the frame to encode, None where there is none or it has been encoded."""
        path = self.options.reference
        if path is None or not self.to_denoise or run.files.load(REFERENCE) is not None:
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

    def _warn_of_lost_words(self) -> None:
        for n in self.to_denoise:
            text = self.options.texts[n]
            words = lost(text, self.captions[n])
            if text.strip() and not official_prompt(text, None):
                log.warning("prompt %d is left empty, the model reads none of it: %r", n, text[:60])
            elif words:
                more = f" and {len(words) - 5} more" if len(words) > 5 else ""
                shown = ", ".join(repr(word[:40]) for word in words[:5])
                log.warning("prompt %d is read without %s%s: %r", n, shown, more, text[:60])

    def _warn_of_cut_captions(self) -> None:
        if self.weights.t5.is_imagined:
            return
        length = self.weights.dit_config.model_max_length
        for n in self.to_denoise:
            ids, mask = self.weights.tokenizer.encode([self.captions[n]])
            unknown = int((ids[mask.bool()] == UNKNOWN).sum())
            if unknown:
                log.warning(
                    "prompt %d has %d of %d tokens that the model's tokenizer does not know: %r",
                    *(n, unknown, int(mask.sum()), self.captions[n][:60]),
                )
            if int(mask.sum()) >= length:
                log.warning(
                    "prompt %d fills all %d tokens the model reads; what follows is cut: %r",
                    *(n, length, self.captions[n][:60]),
                )

    # -- the run -----------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, session: Session, run: Run) -> Mapping[str, Any]:
        """Make every video; return their files, relative to `run.out`."""
        self._make(session, run)
        return self._output(run)

    def _make(self, session: Session, run: Run) -> None:
        if self.first is not None:
            with run.phase("reference"):
                encoded = run.check("the encoded reference image", self.encoder(self.first))
                run.files.save(REFERENCE, {"z": encoded})
            session.end("vae-encoder")
        with run.phase("text"):
            self._embed(session, run)
        with run.phase("denoise"):
            for n in self.to_denoise:
                self._denoise(session, run, n)
        if self.to_denoise:
            session.end("dit")
        with run.phase("decode"):
            for n in self.to_decode:
                self._decode(run, n)

    def _identify(self, run: Run) -> None:
        """Name what the run's bits follow from beside its config."""
        if run.planning:
            return
        inputs: dict[str, str | None] = dict(self.weights.identity())
        if self.networks.identity is not None:
            inputs["packages"] = self.networks.identity
        if self.options.reference is not None:
            inputs[REFERENCE] = digest(Path(self.options.reference))
        run.files.identify(inputs)

    def _embed(self, session: Session, run: Run) -> None:
        self.texts.collect([self.captions[n] for n in self.to_denoise])
        for caption in self.to_embed:
            y, mask = embed(self.t5, self.weights.tokenizer, [caption])
            self.texts.put(caption, run.check(f"T5's embedding of {caption[:60]!r}", y), mask)
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
            encoded = run.files.load(REFERENCE)
            if encoded is None:
                raise EngineError(f"the encoded reference image is gone from {run.out}; run the same again")
            z[:, :, :1] = encoded["z"]
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
        with self.networks.attention(self.dit, run, int(mask.sum(1).max())):
            z, said = run.sample(_state(n), flow, z, o.save_every)
        run.check(f"the latents of prompt {n}", z)
        metadata = {"about": json.dumps(dict(said))}
        run.files.write(self._named(n, LATENTS), save({"z": z.contiguous()}, metadata))
        run.files.drop(_state(n))

    def _remaining(self, session: Session, n: int, passes: int) -> None:
        """Let the VAE's head load as soon as the last pass of the last prompt is known to be the last."""
        if passes == 0 and n == self.to_denoise[-1]:
            session.end("dit")

    def _decode(self, run: Run, n: int) -> None:
        z, _ = self._latents(run, n)
        with run.files.writing(self.results[n]) as path:
            if self.options.frames == 1:
                write_image(path, next(self._frames(run, n, z))[0])
            else:
                write_video(path, self._frames(run, n, z), self.options.fps)

    def _frames(self, run: Run, n: int, z: Tensor) -> Iterator[np.ndarray]:
        begin = 0
        for clip in self.vae.decode_chunks(z, self.options.frames):
            end = begin + clip.shape[2]
            run.check(f"the VAE's frames {begin} to {end - 1} of prompt {n}", clip)
            begin = end
            yield to_frames(clip[0])

    def _latents(self, run: Run, n: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the latents [1, 4, T', h, w] of a prompt and what the sampler said of them."""
        with safe_open(run.out / self._named(n, LATENTS), framework="pt") as file:
            # Memory of its own, aligned as that of a computed tensor: kernels differ with the address.
            return file.get_tensor("z").clone(), json.loads(file.metadata()["about"])

    def _output(self, run: Run) -> dict[str, Any]:
        o = self.options
        said = [self._latents(run, n)[1] for n in self.indices]
        return {
            "files": self.results,
            "prompts": list(o.texts),
            "height": self.pixels[0],
            "width": self.pixels[1],
            "frames": o.frames,
            "fps": o.fps,
            **({"sampler": said} if any(said) else {}),
        }


def _state(n: int) -> str:
    """Return the name of the state of a prompt's sampling."""
    return f"{n:04d}"
