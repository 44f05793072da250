"""Pyramidal Flow as a family of `text_to_video`: T5, CLIP, miniFLUX, causal VAE; many flows a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import ConfigError
from blockstream.module.empty import empty
from blockstream.plugins import Network, Run
from movd.clip import CLIPTokenizer, clip_entries, clip_text_model, pooled
from movd.pyramid.causal_vae import (
    CausalVAEConfig,
    CausalVideoVAE,
    PyramidDecoder,
    PyramidEncoder,
    chunk_bounds,
)
from movd.pyramid.legs import (
    Guidance,
    Journey,
    PyramidWay,
    Words,
    journey_legs,
    jump_noise,
    normalised,
    unnormalised,
)
from movd.pyramid.legs import Leg as Place
from movd.pyramid.miniflux import MiniFlux, MiniFluxConfig, operations
from movd.pyramid.pyramid_options import PyramidOptions
from movd.pyramid.pyramid_released import CAUSAL_VAE, MINIFLUX
from movd.pyramid.stages import history, make_stages
from movd.reference import digest, read_reference
from movd.released import CLIP_L, T5_V1_1_XXL
from movd.renamed import renamed
from movd.t5 import check_config, embed, t5_encoder
from movd.text_to_video.family import Embedding, Leg, TextStage, Way
from movd.text_to_video.part import NetworkPart, about_text, as_it_is, beside, open_part
from movd.tiled import Along, Tiling, count_tiles
from movd.tokenizer import Tokenizer, load_tokenizer

#: Tokens of a prompt that T5 reads.
T5_TOKENS = 128
STAGES = 3
#: What a full T5 holds beside its encoder.
_T5_UNUSED = ("decoder.", "lm_head.")


class PyramidFlow:
    """The family of one run. Implements `movd.text_to_video.family.Family`."""

    truncates = True
    guidance_passes = 1

    def __init__(self, options: PyramidOptions) -> None:
        o = self.options = options
        self.has_reference = o.reference is not None
        self.guidance = Guidance(o.guidance, o.video_guidance, o.linear_guidance)
        self.stages = make_stages(STAGES)

    def open(self, run: Run) -> None:
        """Open the four checkpoints."""
        if run.config.attention:
            raise ConfigError(
                "pyramid-flow takes no attention transforms: a pass denoises one latent frame, beside others "
                "of other sizes: no two frames can be merged, no grid be tiled; leave attention out"
            )
        folders = {
            "t5": "text_encoder_2",
            "clip": "text_encoder",
            "dit": f"diffusion_transformer_{self.options.denoiser}",
            "vae": "causal_video_vae",
        }
        self.t5, self.clip, self.dit, self.vae = (
            self._part(name, folder, run) for name, folder in folders.items()
        )
        if not self.clip.is_imagined:
            self.clip.entries = self._clip_entries
        with self.t5.blamed():
            check_config(self.t5.config)
        with self.dit.blamed():
            self.dit_config = MiniFluxConfig(**self.dit.config)
        with self.vae.blamed():
            self.vae_config = CausalVAEConfig(**self.vae.config)
        clip = self.clip.config.get("text_config") or self.clip.config
        self._check_widths(clip)
        self.clip_tokens = clip["max_position_embeddings"]
        factor = self.vae_config.space_factor
        frames = (self.options.frames - 1) // self.vae_config.time_factor + 1
        o = self.options
        self.latent = (self.dit_config.latent_channels, frames, o.height // factor, o.width // factor)
        self._tokenizers: dict[str, Any] = {}

    def _part(self, name: str, folder: str, run: Run) -> NetworkPart:
        o = self.options
        own = None if o.model is None else Path(o.model) / folder
        entries = _encoder_alone if name == "t5" else as_it_is
        return open_part(name, getattr(o, name), own, _BUILD[name], entries, released=RELEASED[name], run=run)

    def _clip_entries(self, checkpoint: Checkpoint) -> Checkpoint:
        with self.clip.blamed(), empty():
            model = clip_text_model(self.clip.config)
        return clip_entries(checkpoint, model)

    def _check_widths(self, clip: Mapping[str, Any]) -> None:
        pairs = (
            ("t5", self.t5.config["d_model"], self.dit_config.joint_attention_dim, "joint_attention_dim"),
            ("clip", clip["hidden_size"], self.dit_config.pooled_projection_dim, "pooled_projection_dim"),
            ("vae", self.vae_config.decoder_in_channels, self.dit_config.latent_channels, "in_channels / 4"),
        )
        for name, width, wanted, key in pairs:
            if width != wanted:
                raise ConfigError(
                    f"{name} ({getattr(self, name).path}) has {width} channels, dit ({self.dit.path}) takes "
                    f"{wanted} ({key}): these checkpoints do not belong together"
                )

    def identity(self) -> Mapping[str, str | None]:
        """Return what tells checkpoints, tokenizers and the first frame from others."""
        inputs: dict[str, str | None] = {
            part.name: part.identity for part in (self.t5, self.clip, self.dit, self.vae)
        }
        inputs["t5's tokenizer"], inputs["clip's tokenizer"] = self._pieces().identity, self._words().identity
        if self.options.reference is not None:
            inputs["reference"] = digest(Path(self.options.reference))
        return inputs

    def pixels(self) -> tuple[int, int]:
        """Return height and width of the video."""
        return self.options.height, self.options.width

    # -- text --------------------------------------------------------------------------------

    def texts(self, n: int) -> Sequence[Sequence[str]]:
        """Return the prompt, and the negative one where guidance is on, for both encoders."""
        own = [self.options.texts[n] + self.options.suffix]
        if self.guidance.is_on:
            own.append(self.options.negative)
        return [own, own]

    def encoders(self, run: Run) -> Sequence[TextStage]:
        """Return T5 and CLIP."""
        tokens = torch.ones(1, T5_TOKENS, dtype=torch.long)
        words = torch.ones(1, self.clip_tokens, dtype=torch.long)
        return [
            TextStage(
                "t5",
                self.t5.network,
                {"input_ids": tokens, "attention_mask": tokens},
                lambda module, text: embed(module, self._pieces(), [text]),
                about_text(run, self.t5, lambda: self._pieces().identity, T5_TOKENS),
            ),
            TextStage(
                "clip",
                self.clip.network,
                {"input_ids": words},
                self._embed_words,
                about_text(run, self.clip, lambda: self._words().identity, self.clip_tokens),
            ),
        ]

    def _pieces(self) -> Tokenizer:
        if "t5" not in self._tokenizers:
            self._tokenizers["t5"] = load_tokenizer(beside(self.t5.path, "tokenizer_2"), T5_TOKENS)
        found: Tokenizer = self._tokenizers["t5"]
        return found

    def _words(self) -> CLIPTokenizer:
        if "clip" not in self._tokenizers:
            self._tokenizers["clip"] = CLIPTokenizer(beside(self.clip.path, "tokenizer"), self.clip_tokens)
        found: CLIPTokenizer = self._tokenizers["clip"]
        return found

    def _embed_words(self, module: Any, text: str) -> Embedding:
        vector = pooled(module, self._words().encode([text]))
        return vector[:, None, None], torch.ones(1, 1, dtype=torch.long)

    def remarks(self, n: int) -> Sequence[str]:
        """Return what of a prompt is cut."""
        if self.t5.is_imagined or self.clip.is_imagined:
            return []
        text = self.texts(n)[0][0]
        _, mask = self._pieces().encode([text])
        full = [("t5", T5_TOKENS)] if int(mask.sum()) >= T5_TOKENS else []
        full += [("clip", self.clip_tokens)] if self._words().is_full(text) else []
        return [
            f"fills all {n} tokens that {who} reads; what follows is cut: {text[:60]!r}" for who, n in full
        ]

    # -- the first frame ---------------------------------------------------------------------

    def reference(self) -> tuple[Network, Tensor] | None:
        """Return the VAE's encoder and the image that is the first frame."""
        if self.options.reference is None:
            return None
        frame = read_reference(Path(self.options.reference), *self.pixels())
        return self.vae.network(lambda: FirstFrame(self.vae_config)), frame

    # -- denoising ---------------------------------------------------------------------------

    def denoiser(self, run: Run) -> Network:
        """Return miniFLUX."""
        return self.dit.network()

    def denoiser_inputs(self) -> dict[str, Any]:
        """Return inputs of the largest pass: the last frame's last stage, with texts of full length."""
        c, rows = self.dit_config, 2 if self.guidance.is_on else 1
        return {
            "clips": [torch.empty(rows, *shape) for shape in self._clips(self._places()[-1])],
            "timestep": torch.empty(rows),
            "text": torch.empty(rows, T5_TOKENS, c.joint_attention_dim),
            "mask": torch.ones(rows, T5_TOKENS),
            "pooled": torch.empty(rows, c.pooled_projection_dim),
        }

    def _places(self) -> list[Place]:
        return journey_legs(self.latent[1], STAGES, int(self.has_reference))

    def _shape(self, stage: int) -> tuple[int, int, int, int]:
        c, _, h, w = self.latent
        by = 2 ** (STAGES - 1 - stage)
        return c, 1, h // by, w // by

    def _clips(self, place: Place) -> list[tuple[int, ...]]:
        """Return the shapes of the clips of a pass, batch left out: history, then the frame itself."""
        c, _, h, w = self.latent
        done = torch.empty(1, c, place.unit, h, w, device="meta")
        return [*(clip.shape[1:] for clip in history(done, place.stage, STAGES)), self._shape(place.stage)]

    def legs(self) -> Sequence[Leg]:
        """Return a flow for every latent frame and stage."""
        o = self.options
        return [
            Leg(
                f"u{p.unit}.s{p.stage}",
                (o.steps if p.unit == 0 else o.video_steps)[p.stage],
                (1, *self._shape(p.stage)),
            )
            for p in self._places()
        ]

    def pace(self, network: Network, run: Run) -> Sequence[Sequence[float]]:
        """Return how long each pass takes beside the last frame's last: by the tokens it has."""
        counted = [self._operations(place) for place in self._places()]
        return [[n / counted[-1]] * leg.steps for n, leg in zip(counted, self.legs(), strict=True)]

    def _operations(self, place: Place) -> float:
        tokens = sum(t * h * w // 4 for _, t, h, w in self._clips(place))
        return operations(self.dit_config, tokens, T5_TOKENS)

    def way(self, denoiser: nn.Module, texts: Sequence[Sequence[Embedding]], first: Tensor | None) -> Way:
        """Return the way of a prompt, and its noise: the same for every prompt."""
        rows = [
            Words(y[:, 0], mask, v[:, 0, 0]) for (y, mask), (v, _) in zip(texts[0], texts[1], strict=True)
        ]
        words = rows[1].joined(rows[0]) if len(rows) > 1 else rows[0]
        o = self.options
        journey = Journey(
            torch.randn((1, *self.latent), generator=torch.Generator().manual_seed(o.seed)),
            self.stages,
            steps_first=tuple(o.steps),
            steps_others=tuple(o.video_steps),
            image=None if first is None else normalised(first),
            fresh=jump_noise(o.seed, STAGES),
        )
        return PyramidWay(journey, denoiser, words, self.guidance)

    def attention(
        self, denoiser: nn.Module, run: Run, texts: Sequence[Sequence[Embedding]]
    ) -> AbstractContextManager[object]:
        """Return nothing to do: a run with transforms was refused."""
        return nullcontext()

    # -- decoding ----------------------------------------------------------------------------

    def decoder(self) -> Network:
        """Return the half of the VAE that decodes."""
        return self.vae.network(lambda: PyramidDecoder(self.vae_config))

    def _tiling(self) -> Tiling:
        """Return the tiles of a frame, in latents."""
        if self.options.tiles is None:
            return Tiling()
        size = self.options.tiles // self.vae_config.space_factor
        along = Along(size, size * 3 // 4, 0, 0)
        return Tiling(None, along, along)

    def decoder_inputs(self) -> Any:
        """Return the latents of the largest chunk."""
        c, frames, h, w = self.latent
        side = self._tiling().height
        h, w = (h, w) if side is None else (min(h, side.size), min(w, side.size))
        return (torch.empty(1, c, min(frames, self.options.window + 1), h, w),)

    def decoder_passes(self) -> int:
        """Return the chunks of all tiles."""
        _, frames, h, w = self.latent
        return len(chunk_bounds(frames, self.options.window)) * count_tiles(1, h, w, self._tiling())

    def clips(self, decoder: Any, z: Tensor) -> Iterator[Tensor]:
        """Yield the clip chunk by chunk; in tiles, at once: each tile is decoded to its end."""
        o, factor = self.options, self.vae_config.space_factor
        z = unnormalised(z)
        if o.tiles is None or max(z.shape[3:]) <= o.tiles // factor:
            yield from decoder.decode_chunks(z, o.window)
        else:
            yield decoder.decode_tiles(z, o.window, o.tiles)


class FirstFrame(PyramidEncoder):
    """The VAE's encoder, whose forward returns the mean of one image's latents."""

    def forward(self, x: Tensor) -> Tensor:
        """Return latents [1, c, 1, h, w] of an image [1, 3, 1, H, W] in -1..1."""
        mean, _ = super().forward(x).chunk(2, dim=1)
        return mean


def _encoder_alone(checkpoint: Checkpoint) -> Checkpoint:
    """Return a T5's tensors without its decoder's."""
    return renamed(checkpoint, lambda name: None if name.startswith(_T5_UNUSED) else name)


def _miniflux(config: Mapping[str, Any]) -> nn.Module:
    return MiniFlux(MiniFluxConfig(**config)).eval()


def _causal_vae(config: Mapping[str, Any]) -> nn.Module:
    return CausalVideoVAE(CausalVAEConfig(**config)).eval()


_BUILD: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "t5": t5_encoder,
    "clip": clip_text_model,
    "dit": _miniflux,
    "vae": _causal_vae,
}
#: The configurations of what stands in a plan for folders that are not there.
RELEASED: dict[str, Mapping[str, Any]] = {
    "t5": T5_V1_1_XXL,
    "clip": CLIP_L,
    "dit": MINIFLUX,
    "vae": CAUSAL_VAE,
}
