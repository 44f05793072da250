"""The three checkpoints of a run: their configurations read, their keys checked, their identity.

Nothing but headers is read here. Modules are built without their weights.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError, ConfigError
from blockstream.module.empty import empty
from blockstream.run.identity import identity_of
from blockstream.streaming.model_plan import imagined_model, unstored
from blockstream.system import regular
from movd.official import check_keys
from movd.options import TINY, ModelOptions, MovdOptions
from movd.released import OPENSORA_VAE, STDIT3_XL_2
from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import T5_V1_1_XXL, check_config, t5_encoder
from movd.tokenizer import Tokenizer, load_tokenizer
from movd.vae import OpenSoraVAE, OpenSoraVAEConfig
from movd.vae_halves import VAEDecoder, VAEEncoder

log = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound=nn.Module)

#: The configurations of what stands in a plan for folders that are not there.
RELEASED: dict[str, Mapping[str, Any]] = {"t5": T5_V1_1_XXL, "dit": STDIT3_XL_2, "vae": OPENSORA_VAE}
_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "t5": t5_encoder,
    "dit": lambda config: STDiT3(STDiT3Config(**config)).eval(),
    "vae": lambda config: OpenSoraVAE(OpenSoraVAEConfig(**config)).eval(),
}

#: What a full T5 holds beside its encoder; Open-Sora uses the encoder alone.
_T5_UNUSED = ("decoder.", "lm_head.")


class Weights:
    """The checkpoints that the options name, opened when they are first asked for.

    Raises ConfigError for a folder or a configuration, CheckpointError for weights that are not what the
    configuration says. For `planning` the released networks stand for folders that are not there. `open` is a
    run's way to a checkpoint.
    """

    def __init__(
        self,
        options: MovdOptions,
        planning: bool = False,
        open: Callable[[Path], Checkpoint] = Checkpoint.open,
    ) -> None:
        self.t5 = _part("t5", options.t5, planning, open, T5_V1_1_XXL)
        self.dit = _part("dit", options.dit, planning, open)
        self.vae = _part("vae", options.vae, planning, open)
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
            decoder = VAEDecoder(self.vae_config).eval()
        return self.vae.ready(decoder)

    def encoder(self) -> VAEEncoder:
        """Return the VAE's encoders without their weights."""
        self._check_vae()
        with empty():
            encoder = VAEEncoder(self.vae_config).eval()
        return self.vae.ready(encoder)

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
    dtype: str | None = None
    is_imagined: bool = False
    open: Callable[[Path], Checkpoint] = Checkpoint.open

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint: headers alone are read. Raises CheckpointError where int8 is named."""
        if self.is_imagined:
            with empty():
                module = _BUILDERS[self.name](self.config)
            return imagined_model(module, self.dtype or "fp32", self.folder)
        with self.blamed():
            opened = self.open(self.folder)
            if self.dtype == "int8" and not opened.scales:
                raise CheckpointError(
                    f"holds no weights in int8; `blockstream pack {self.folder} DST --dtype int8` writes them"
                )
            return opened

    def ready(self, module: _Module) -> _Module:
        """Return a module that is about to be a stage: of weights that are not there it keeps no buffers."""
        if self.is_imagined:
            unstored(module)
        return module

    @cached_property
    def identity(self) -> str:
        """Return what tells these weights from others, wherever they lie."""
        if self.is_imagined:
            return "imagined"
        return identity_of(self.checkpoint, json.dumps(self.config, sort_keys=True))

    def check(self, module: nn.Module, unused: tuple[str, ...] = ()) -> None:
        """Check that the checkpoint holds exactly a module's keys, besides those that begin with `unused`.

        The scales of matrices in int8 belong to them.
        """
        if self.is_imagined:
            unstored(module)
            return
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


def _part(
    name: str,
    option: ModelOptions,
    planning: bool,
    open: Callable[[Path], Checkpoint],
    fallback: Mapping[str, Any] | None = None,
) -> Part:
    path = Path(option.path)
    if planning and option.path != TINY and not path.exists():
        log.warning("%s.path %s does not exist: planned with the released network", name, path)
        return Part(name, path, dict(RELEASED[name]), option.dtype, is_imagined=True)
    folder = option.folder(name)
    return Part(name, folder, _config(name, folder, fallback), option.dtype, open=open)


def _config(part: str, folder: Path, fallback: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a checkpoint's config.json; of a folder that holds weights alone, the `fallback`."""
    path = folder / "config.json"
    if fallback is not None and not os.path.lexists(path):  # a link that leads nowhere was not left out
        return dict(fallback)
    try:
        found = regular.read_json(path)
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
