"""The three checkpoints of a run: their configurations read, their keys checked, their identity.

Nothing but headers is read here. Modules are built without their weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError, ConfigError
from blockstream.nn.empty import empty
from movd.official import check_keys
from movd.options import MovdOptions
from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import T5_V1_1_XXL, check_config, t5_encoder
from movd.tokenizer import Tokenizer, load_tokenizer
from movd.vae import OpenSoraVAE, OpenSoraVAEConfig
from movd.vae_halves import VAEDecoder, VAEEncoder

#: Checkpoints up to this size are told apart by all their bytes, larger ones by headers, sizes and times.
HASHED_NBYTES = 64 << 20

#: What a full T5 holds beside its encoder; Open-Sora uses the encoder alone.
_T5_UNUSED = ("decoder.", "lm_head.")


class Weights:
    """The checkpoints that the options name, opened when they are first asked for.

    Raises ConfigError for a folder or a configuration, CheckpointError for weights that are not what the
    configuration says.
    """

    def __init__(self, options: MovdOptions) -> None:
        folders = {part: getattr(options, part).folder(part) for part in ("t5", "dit", "vae")}
        self.t5 = Part("t5", folders["t5"], _config("t5", folders["t5"], T5_V1_1_XXL))
        self.dit = Part("dit", folders["dit"], _config("dit", folders["dit"]))
        self.vae = Part("vae", folders["vae"], _config("vae", folders["vae"]))
        with self.dit.blamed():
            self.dit_config = STDiT3Config(**self.dit.config)
        with self.vae.blamed():
            self.vae_config = OpenSoraVAEConfig(**self.vae.config)
        with self.t5.blamed():
            check_config(self.t5.config)
        width, wanted = self.t5.config["d_model"], self.dit_config.caption_channels
        if width != wanted:
            raise ConfigError(
                f"t5 ({self.t5.folder}) gives {width} channels a token and dit ({self.dit.folder}) takes "
                f"{wanted}: these checkpoints do not belong together"
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return T5's tokenizer."""
        with self.t5.blamed():
            return load_tokenizer(self.t5.folder, self.dit_config.model_max_length)

    def text_encoder(self) -> nn.Module:
        """Return T5's encoder without its weights."""
        with self.t5.blamed(), empty():
            encoder = t5_encoder(self.t5.config)
        self.t5.check(encoder, unused=_T5_UNUSED)
        return encoder

    def denoiser(self) -> STDiT3:
        """Return STDiT3 without its weights."""
        with empty():
            dit = STDiT3(self.dit_config).eval()
        self.dit.check(dit)
        return dit

    def decoder(self) -> VAEDecoder:
        """Return the VAE's decoders without their weights."""
        self._check_vae()
        with empty():
            return VAEDecoder(self.vae_config).eval()

    def encoder(self) -> VAEEncoder:
        """Return the VAE's encoders without their weights."""
        self._check_vae()
        with empty():
            return VAEEncoder(self.vae_config).eval()

    def latent(self, options: MovdOptions) -> tuple[int, int, int, int]:
        """Return the shape of a run's latents: channels, frames, height, width."""
        height, width = options.size
        factor = self.vae_config.space_factor
        frames = self.vae_config.latent_frames(options.frames)
        return self.dit_config.in_channels, frames, height // factor, width // factor

    def pixels(self, options: MovdOptions) -> tuple[int, int]:
        """Return height and width of what is decoded: whole latents."""
        _, _, height, width = self.latent(options)
        return height * self.vae_config.space_factor, width * self.vae_config.space_factor

    def identity(self) -> dict[str, str]:
        """Return what tells these weights and this tokenizer from others."""
        parts = {part.name: part.identity for part in (self.t5, self.dit, self.vae)}
        return {**parts, "tokenizer": self.tokenizer.identity}

    def _check_vae(self) -> None:
        with empty():
            whole = OpenSoraVAE(self.vae_config)
        self.vae.check(whole)


@dataclass
class Part:
    """One network's folder and configuration; its checkpoint is opened once, on first use."""

    name: str
    folder: Path
    config: dict[str, Any]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint: headers alone are read."""
        with self.blamed():
            return Checkpoint.open(self.folder)

    @cached_property
    def identity(self) -> str:
        """Return what tells these weights from others, wherever they lie.

        Small files are hashed whole. Of large ones the header, the size and the time of the last change
        are, so that they need not be read.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        files = self.checkpoint.files
        small = sum(file.nbytes for file in files) <= HASHED_NBYTES
        for file in files:
            digest.update(f"{file.path.name} {file.nbytes} {file.header_hash}".encode())
            digest.update(file.path.read_bytes() if small else str(file.mtime_ns).encode())
        return digest.hexdigest()[:16]

    def check(self, module: nn.Module, unused: tuple[str, ...] = ()) -> None:
        """Check that the checkpoint holds exactly a module's keys, besides those that begin with `unused`.

        The scales of matrices in int8 belong to them.
        """
        scales = self.checkpoint.scales
        shapes = {
            name: entry.shape
            for name, entry in self.checkpoint.entries.items()
            if not name.startswith(unused or ("\0",)) and name not in scales
        }
        check_keys(module, shapes, what=f"{self.name}.path {self.folder}")

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Tell errors in the block with the option's name and the folder."""
        try:
            yield
        except (ConfigError, CheckpointError) as error:
            said = str(error).removeprefix(str(self.folder)).lstrip(": ")
            raise type(error)(f"{self.name}.path {self.folder}: {said}") from error


def _config(part: str, folder: Path, fallback: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a checkpoint's config.json; of a folder that holds weights alone, the `fallback`."""
    path = folder / "config.json"
    if not path.is_file() and fallback is not None:
        return dict(fallback)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise ConfigError(
            f"{part}.path {folder}: has no config.json but {there}; name the folder of the checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: does not hold a configuration but {type(found).__name__}")
    return found
