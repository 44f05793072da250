"""Open-Sora v1.2 as a family of `text_to_video`: T5, STDiT3, the VAE of two halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.module.attention import attention_hooks
from blockstream.plugins import Flow, Network, Run
from blockstream.streaming.pace import pace
from blockstream.system.machine import versions
from movd.attention import attention_layers
from movd.captions import lost, official_prompt
from movd.options import MovdOptions
from movd.reference import digest, read_reference
from movd.rflow import OpenSoraFlow
from movd.stdit3 import STDiT3
from movd.t5 import embed
from movd.text_to_video.family import Embedding, Leg, OneFlow, TextStage, Way
from movd.text_to_video.part import computed_on
from movd.tokenizer import UNKNOWN
from movd.weights import Weights


class OpenSora:
    """The family of one run. Implements `movd.text_to_video.family.Family`."""

    guidance_passes = 1
    truncates = False

    def __init__(self, options: MovdOptions) -> None:
        self.options = options
        self.height, self.width = options.size
        self.captions = [official_prompt(text, options.aesthetic) for text in options.texts]
        self.has_reference = options.reference is not None

    def open(self, run: Run) -> None:
        """Open the three checkpoints."""
        o = self.options
        self.weights = Weights(o, planning=run.planning, open=run.checkpoint)
        self.latent = self.weights.latent(o)
        self.length = self.weights.dit_config.model_max_length

    def identity(self) -> Mapping[str, str | None]:
        """Return what tells checkpoints, tokenizer and the first frame from others."""
        inputs: dict[str, str | None] = dict(self.weights.identity())
        if self.options.reference is not None:
            inputs["reference"] = digest(Path(self.options.reference))
        return inputs

    def pixels(self) -> tuple[int, int]:
        """Return height and width of the video: whole latents."""
        return self.weights.pixels(self.options)

    # -- text --------------------------------------------------------------------------------

    def texts(self, n: int) -> Sequence[Sequence[str]]:
        """Return the one caption that T5 reads: the unconditional one is the denoiser's own."""
        return [[self.captions[n]]]

    def encoders(self, run: Run) -> Sequence[TextStage]:
        """Return T5."""
        weights = self.weights
        tokens = torch.ones(1, self.length, dtype=torch.long)

        def embed_one(module: Any, text: str) -> Embedding:
            return embed(module, self.weights.tokenizer, [text])

        return [
            TextStage(
                "t5",
                lambda: Network(weights.text_encoder(), weights.t5.checkpoint, self.options.t5.converted),
                {"input_ids": tokens, "attention_mask": tokens},
                embed_one,
                self._text_numerics(run),
            )
        ]

    def _text_numerics(self, run: Run) -> dict[str, Any]:
        """Return what an embedding's bits follow from beside the caption."""
        installed = versions()
        return {
            "weights": self.weights.t5.identity,
            "tokenizer": None if self.weights.t5.is_imagined else self.weights.tokenizer.identity,
            "length": self.length,
            "dtype": self.options.t5.dtype,
            "threads": run.config.threads,
            **computed_on(run),
            "versions": [installed["torch"], installed["transformers"]],
            **({"int8": run.config.int8} if self.weights.t5.checkpoint.scales else {}),
            **({} if run.backend_identity is None else {"backend": run.backend_identity}),
        }

    def remarks(self, n: int) -> Sequence[str]:
        """Return what cleaning leaves out of a prompt, what the tokenizer does not know, and what is cut."""
        text, caption = self.options.texts[n], self.captions[n]
        said = []
        words = lost(text, caption)
        if text.strip() and not official_prompt(text, None):
            said.append(f"is left empty, the model reads none of it: {text[:60]!r}")
        elif words:
            more = f" and {len(words) - 5} more" if len(words) > 5 else ""
            shown = ", ".join(repr(word[:40]) for word in words[:5])
            said.append(f"is read without {shown}{more}: {text[:60]!r}")
        if self.weights.t5.is_imagined:
            return said
        own = official_prompt(text, None)
        ids, mask = self.weights.tokenizer.encode([own])
        if unknown := int((ids[mask.bool()] == UNKNOWN).sum()):
            of = int(mask.sum())
            said.append(
                f"has {unknown} of {of} tokens that the model's tokenizer does not know: {own[:60]!r}"
            )
        _, mask = self.weights.tokenizer.encode([caption])
        if int(mask.sum()) >= self.length:
            said.append(
                f"fills all {self.length} tokens the model reads; what follows is cut: {caption[:60]!r}"
            )
        return said

    # -- the first frame ---------------------------------------------------------------------

    def reference(self) -> tuple[Network, Tensor] | None:
        """Return the VAE's encoders and the image that is the first frame."""
        if self.options.reference is None:
            return None
        frame = read_reference(Path(self.options.reference), *self.pixels())
        weights = self.weights
        return Network(weights.encoder(), weights.vae.checkpoint, self.options.vae.converted), frame

    # -- denoising ---------------------------------------------------------------------------

    def denoiser(self, run: Run) -> Network:
        """Return STDiT3."""
        return Network(self.weights.denoiser(), self.weights.dit.checkpoint, self.options.dit.converted)

    def denoiser_inputs(self) -> dict[str, Any]:
        """Return inputs of the shapes a step has, with guidance, for a text of full length."""
        return {
            "x": torch.empty(2, *self.latent),
            "timestep": torch.empty(2),
            "y": torch.empty(2, 1, self.length, self.weights.dit_config.caption_channels),
            "fps": torch.tensor([float(self.options.fps)]),
            "height": [float(self.height)],
            "width": [float(self.width)],
        }

    def legs(self) -> Sequence[Leg]:
        """Return the one flow."""
        return [Leg("", self.options.steps, (1, *self.latent))]

    def pace(self, network: Network, run: Run) -> Sequence[Sequence[float]]:
        """Return how long each pass takes beside one without merging."""
        if not run.config.attention or not isinstance(network.module, STDiT3):
            return ()
        grid = network.module.grid(*self.latent[1:])

        def layers(dit: STDiT3) -> list[Any]:
            return attention_layers(dit, grid, self.length)

        found = pace(network.module, self.denoiser_inputs(), run, self.options.steps, layers)
        return [found] if found else ()

    def way(self, denoiser: nn.Module, texts: Sequence[Sequence[Embedding]], first: Tensor | None) -> Way:
        """Return the flow of a caption, and its noise: the same for every prompt."""
        o = self.options
        y, mask = texts[0][0]
        generator = torch.Generator().manual_seed(o.seed)
        z = torch.randn((1, *self.latent), generator=generator)
        x_mask = None
        if first is not None:
            x_mask = torch.ones(1, self.latent[1])
            x_mask[:, 0] = 0
            z[:, :, :1] = first

        def flow(on_remaining: Callable[[int], None]) -> Flow:
            return OpenSoraFlow(
                denoiser,
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
                on_remaining=on_remaining,
            )

        return OneFlow(z, flow)

    def attention(
        self, denoiser: nn.Module, run: Run, texts: Sequence[Sequence[Embedding]]
    ) -> AbstractContextManager[object]:
        """Apply the run's attention transforms for a text of so many tokens, unless a backend does."""
        if not isinstance(denoiser, STDiT3):
            return nullcontext()
        _, mask = texts[0][0]
        return attention_hooks(
            attention_layers(denoiser, denoiser.grid(*self.latent[1:]), int(mask.sum(1).max())),
            token_merge=run.token_merge,
            attention_kernel=run.attention_kernel,
        )

    # -- decoding ----------------------------------------------------------------------------

    def decoder(self) -> Network:
        """Return the VAE's decoders, planned for the chunks of this run."""
        vae = self.weights.decoder()
        vae.plan_decode(self._chunks()[0], *self.pixels())
        return Network(vae, self.weights.vae.checkpoint, self.options.vae.converted)

    def decoder_inputs(self) -> Any:
        """Return the latents of one chunk, and its frames."""
        frames = self._chunks()[0]
        channels, _, h, w = self.latent
        return torch.empty(1, channels, self.weights.vae_config.latent_frames(frames), h, w), frames

    def decoder_passes(self) -> int:
        """Return the chunks of a clip."""
        return len(self._chunks())

    def _chunks(self) -> list[int]:
        return self.weights.vae_config.chunks(self.options.frames)

    def clips(self, decoder: Any, z: Tensor) -> Iterator[Tensor]:
        """Yield the clip 17 frames at a time."""
        yield from decoder.decode_chunks(z, self.options.frames)
