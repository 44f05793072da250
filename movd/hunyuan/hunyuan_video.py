"""HunyuanVideo as a family of `text_to_video`: LLaMA, CLIP, the DiT, the VAE; either layout of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import ConfigError
from blockstream.module.attention import attention_hooks
from blockstream.module.empty import empty
from blockstream.plugins import AttentionLayer, Flow, Network, Run
from blockstream.plugins.straight import straight
from blockstream.streaming.pace import pace
from blockstream.system import regular
from movd.clip import CLIPTokenizer, clip_entries, clip_text_model, pooled
from movd.hunyuan.autoencoder import HunyuanDecoder, hunyuan_vae, tiling, vae_config, vae_entries
from movd.hunyuan.denoiser import Joint, hunyuan_denoiser, joint_layers
from movd.hunyuan.guided import HunyuanFlow, Prompt
from movd.hunyuan.hunyuan_options import HunyuanOptions
from movd.hunyuan.hunyuan_released import HUNYUAN_VAE, HUNYUAN_VIDEO, LLAVA_LLAMA_3_8B
from movd.hunyuan.llama import (
    CROP,
    PROMPT_TOKENS,
    PromptTokenizer,
    embed_prompt,
    llama_config,
    llama_encoder,
    llama_entries,
)
from movd.hunyuan.tencent import diffusers_entries, is_tencents
from movd.released import CLIP_L
from movd.text_to_video.family import Embedding, Leg, OneFlow, TextStage, Way
from movd.text_to_video.part import NetworkPart, about_text, beside, open_part
from movd.tiled import Tiling, count_tiles

#: Where the networks lie in a folder of diffusers'.
FOLDERS = {"llama": "text_encoder", "clip": "text_encoder_2", "dit": "transformer", "vae": "vae"}
#: What the released model's scheduler leans by.
SHIFT = 7.0
#: A scheduler's keys that change its times, with the value that these flows have.
_PLAIN = {
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "shift_terminal": None,
}


class HunyuanVideo:
    """The family of one run. Implements `movd.text_to_video.family.Family`."""

    truncates = False
    has_reference = False

    def __init__(self, options: HunyuanOptions) -> None:
        self.options = options
        self.guidance_passes = 2 if options.negative is not None else 1

    def open(self, run: Run) -> None:
        """Open the four checkpoints, and the scheduler's file where there is one."""
        llama, clip, dit, vae = (self._part(name, run) for name in FOLDERS)
        self.llama, self.clip, self.dit, self.vae = llama, clip, dit, vae
        tencents = not dit.is_imagined and is_tencents(dit.raw)
        if tencents:
            dit.entries, dit.build = diffusers_entries, _tencents_denoiser
        if not llama.is_imagined:
            llama.entries = self._llama_entries
        if not clip.is_imagined:
            clip.entries = self._clip_entries
        vae.config = vae_config(vae.config)
        vae.entries = vae_entries
        with llama.blamed():
            self.llama_config = llama_config(llama.config)
        own = clip.config.get("text_config") or clip.config
        self.shift = self.options.shift or self._schedulers_shift()
        self._check_widths(own)
        self.clip_tokens = own["max_position_embeddings"]
        c, factor = self.vae.config, self.vae.config["spatial_compression_ratio"]
        frames = (self.options.frames - 1) // c["temporal_compression_ratio"] + 1
        self.latent = (
            self.dit.config["in_channels"],
            frames,
            self.options.height // factor,
            self.options.width // factor,
        )
        self.tiles: Tiling = tiling(
            self.options.time_tiles, self.options.space_tiles, c["temporal_compression_ratio"], factor
        )
        self._tokenizers: dict[str, Any] = {}

    def _part(self, name: str, run: Run) -> NetworkPart:
        o, build = self.options, _BUILD[name]
        own = None if o.model is None else Path(o.model) / FOLDERS[name]
        return open_part(name, getattr(o, name), own, build, released=RELEASED[name], run=run)

    def _llama_entries(self, checkpoint: Checkpoint) -> Checkpoint:
        return llama_entries(checkpoint, self.llama.config)

    def _clip_entries(self, checkpoint: Checkpoint) -> Checkpoint:
        with self.clip.blamed(), empty():
            model = clip_text_model(self.clip.config)
        return clip_entries(checkpoint, model)

    def _check_widths(self, clip: Mapping[str, Any]) -> None:
        c = {**HUNYUAN_VIDEO, **self.dit.config}
        self.dit.config.update({k: v for k, v in c.items() if k not in self.dit.config})
        pairs = (
            ("llama", self.llama_config["hidden_size"], "text_embed_dim"),
            ("clip", clip["hidden_size"], "pooled_projection_dim"),
            ("vae", self.vae.config["latent_channels"], "in_channels"),
        )
        for name, width, key in pairs:
            if width != c[key]:
                raise ConfigError(
                    f"{name} ({getattr(self, name).path}) has {width} channels, dit ({self.dit.path}) takes "
                    f"{c[key]} ({key}): these checkpoints do not belong together"
                )

    def _schedulers_shift(self) -> float:
        """Return the shift that the model's scheduler names; refuse a scheduler of another kind."""
        if self.options.model is None:
            return SHIFT
        path = Path(self.options.model) / "scheduler" / "scheduler_config.json"
        if not path.exists():
            return SHIFT
        try:
            config = regular.read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        verdict = straight(config)
        if not verdict.straight:
            raise ConfigError(f"{path}: {verdict.why}; HunyuanVideo is a rectified flow")
        if (kind := config["_class_name"]) != "FlowMatchEulerDiscreteScheduler":
            raise ConfigError(
                f"{path}: {kind} is not the scheduler of HunyuanVideo, FlowMatchEulerDiscreteScheduler; "
                "steps are the sampler's here"
            )
        other = [f"{k} = {config[k]!r}" for k, v in _PLAIN.items() if config.get(k, v) != v]
        if other:
            raise ConfigError(f"{path}: {', '.join(other)}: HunyuanVideo's times are shifted, no more")
        return float(config.get("shift", SHIFT))

    def identity(self) -> Mapping[str, str | None]:
        """Return what tells checkpoints and tokenizers from others."""
        parts = {part.name: part.identity for part in (self.llama, self.clip, self.dit, self.vae)}
        tokenizers = {
            "llama's tokenizer": self._prompts().identity,
            "clip's tokenizer": self._words().identity,
        }
        return {**parts, **tokenizers}

    def pixels(self) -> tuple[int, int]:
        """Return height and width of the video."""
        return self.options.height, self.options.width

    # -- text --------------------------------------------------------------------------------

    def texts(self, n: int) -> Sequence[Sequence[str]]:
        """Return the prompt, and the negative one, for both encoders."""
        own = [self.options.texts[n]]
        if self.options.negative is not None:
            own.append(self.options.negative)
        return [own, own]

    def encoders(self, run: Run) -> Sequence[TextStage]:
        """Return LLaMA and CLIP."""
        length = self._length()
        tokens = torch.ones(1, length, dtype=torch.long)
        words = torch.ones(1, self.clip_tokens, dtype=torch.long)
        return [
            TextStage(
                "llama",
                self.llama.network,
                {"input_ids": tokens, "attention_mask": tokens},
                self._embed_prompt,
                about_text(run, self.llama, lambda: self._prompts().identity, length),
            ),
            TextStage(
                "clip",
                self.clip.network,
                {"input_ids": words},
                self._embed_words,
                about_text(run, self.clip, lambda: self._words().identity, self.clip_tokens),
            ),
        ]

    def _prompts(self) -> PromptTokenizer:
        if "llama" not in self._tokenizers:
            folder = beside(self.llama.path, "tokenizer")
            self._tokenizers["llama"] = PromptTokenizer(folder, self.llama_config["vocab_size"])
        found: PromptTokenizer = self._tokenizers["llama"]
        return found

    def _words(self) -> CLIPTokenizer:
        if "clip" not in self._tokenizers:
            folder = beside(self.clip.path, "tokenizer_2", "tokenizer")
            self._tokenizers["clip"] = CLIPTokenizer(folder, self.clip_tokens)
        found: CLIPTokenizer = self._tokenizers["clip"]
        return found

    def _length(self) -> int:
        """Return the tokens LLaMA reads: the template's head, the prompt."""
        if self.llama.is_imagined:
            return CROP + PROMPT_TOKENS
        tokenizer = self._prompts()
        return tokenizer.crop + tokenizer.prompt_tokens

    def _embed_prompt(self, module: Any, text: str) -> Embedding:
        tokenizer = self._prompts()
        states, mask = embed_prompt(module, *tokenizer.encode([text]), tokenizer.crop)
        return states[:, None], mask

    def _embed_words(self, module: Any, text: str) -> Embedding:
        vector = pooled(module, self._words().encode([text]))
        return vector[:, None, None], torch.ones(1, 1, dtype=torch.long)

    def remarks(self, n: int) -> Sequence[str]:
        """Return what of a prompt is cut."""
        if self.llama.is_imagined or self.clip.is_imagined:
            return []
        text, prompts, words = self.options.texts[n], self._prompts(), self._words()
        full = [("llama", prompts.prompt_tokens)] if prompts.is_full(text) else []
        full += [("clip", self.clip_tokens)] if words.is_full(text) else []
        return [
            f"fills all {n} tokens that {who} reads; what follows is cut: {text[:60]!r}" for who, n in full
        ]

    def reference(self) -> tuple[Network, Tensor] | None:
        """Return None: this is the text-to-video model."""
        return None

    # -- denoising ---------------------------------------------------------------------------

    def denoiser(self, run: Run) -> Network:
        """Return the DiT."""
        return self.dit.network()

    def denoiser_inputs(self) -> dict[str, Any]:
        """Return inputs of a pass, for a prompt of full length."""
        c, tokens = self.dit.config, self._prompt_tokens()
        kind = self.dit.dtype_of("x_embedder.proj.weight")
        return {
            "hidden_states": torch.empty(1, *self.latent, dtype=kind),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, tokens, c["text_embed_dim"], dtype=kind),
            "encoder_attention_mask": torch.ones(1, tokens, dtype=kind),
            "pooled_projections": torch.empty(1, c["pooled_projection_dim"], dtype=kind),
            "guidance": torch.empty(1, dtype=kind),
        }

    def _prompt_tokens(self) -> int:
        return PROMPT_TOKENS if self.llama.is_imagined else self._prompts().prompt_tokens

    def legs(self) -> Sequence[Leg]:
        """Return the one flow."""
        return [Leg("", self.options.steps, (1, *self.latent))]

    def _layers(self, denoiser: nn.Module) -> list[tuple[Joint, AttentionLayer]]:
        return joint_layers(denoiser, self.latent[1:], self._prompt_tokens())  # type: ignore[arg-type]

    def pace(self, network: Network, run: Run) -> Sequence[Sequence[float]]:
        """Return how long each pass takes beside one without transforms."""
        if not run.config.attention:
            return ()
        found = pace(network.module, self.denoiser_inputs(), run, self.options.steps, self._layers)
        return [found] if found else ()

    def way(self, denoiser: nn.Module, texts: Sequence[Sequence[Embedding]], first: Tensor | None) -> Way:
        """Return the flow of a prompt, and its noise: the same for every prompt."""
        o = self.options
        states, vectors = texts
        prompts = [
            Prompt(y[:, 0], mask, v[:, 0, 0]) for (y, mask), (v, _) in zip(states, vectors, strict=True)
        ]
        z = torch.randn((1, *self.latent), generator=torch.Generator().manual_seed(o.seed))

        def flow(on_remaining: Callable[[int], None]) -> Flow:
            return HunyuanFlow(
                denoiser,
                prompts[0],
                o.steps,
                shift=self.shift,
                guidance=o.guidance,
                negative=prompts[1] if len(prompts) > 1 else None,
                true_guidance=o.true_guidance,
                rounded=o.latents == "model",
                on_remaining=on_remaining,
            )

        return OneFlow(z, flow)

    def attention(
        self, denoiser: nn.Module, run: Run, texts: Sequence[Sequence[Embedding]]
    ) -> AbstractContextManager[object]:
        """Apply the run's attention transforms to the denoiser's layers."""
        return attention_hooks(
            self._layers(denoiser), token_merge=run.token_merge, attention_kernel=run.attention_kernel
        )

    # -- decoding ----------------------------------------------------------------------------

    def decoder(self) -> Network:
        """Return the half of the VAE that decodes."""
        return self.vae.network(lambda: HunyuanDecoder(self.vae.config))

    def decoder_inputs(self) -> Any:
        """Return the latents of the largest tile."""
        sizes = []
        for size, along in zip(
            self.latent[1:], (self.tiles.time, self.tiles.height, self.tiles.width), strict=True
        ):
            sizes.append(size if along is None else min(size, along.size))
        time = self.tiles.time
        if time is not None and self.latent[1] > time.size:
            sizes[0] += 1
        return (torch.empty(1, self.latent[0], *sizes),)

    def decoder_passes(self) -> int:
        """Return the tiles of a clip."""
        return count_tiles(*self.latent[1:], self.tiles)

    def clips(self, decoder: Any, z: Tensor) -> Iterator[Tensor]:
        """Yield the clip a tile in time after another."""
        yield from decoder.decode_clips(z, self.tiles)


def _tencents_denoiser(config: Mapping[str, Any]) -> nn.Module:
    return hunyuan_denoiser(config, tencents=True)


_BUILD: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "llama": llama_encoder,
    "clip": clip_text_model,
    "dit": hunyuan_denoiser,
    "vae": hunyuan_vae,
}
#: The configurations of what stands in a plan for folders that are not there.
RELEASED: dict[str, Mapping[str, Any]] = {
    "llama": LLAVA_LLAMA_3_8B,
    "clip": CLIP_L,
    "dit": HUNYUAN_VIDEO,
    "vae": HUNYUAN_VAE,
}
