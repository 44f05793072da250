"""The networks of a run: movd's own modules on their checkpoints. A backend may supply others for them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from blockstream.module.attention import attention_hooks
from blockstream.plugins import Run
from movd.attention import attention_layers
from movd.options import MovdOptions
from movd.stdit3 import STDiT3
from movd.text_to_video.family import Network
from movd.weights import Weights


class Networks(Protocol):
    """What makes a run's networks; `identity` tells them from those of other backends, None for movd's."""

    identity: str | None

    def text_encoder(self) -> Network:
        """Return the text encoder, called as `movd.t5.embed` does."""

    def denoiser(self, run: Run) -> Network:
        """Return the denoiser, called as `OpenSoraFlow` does."""

    def decoder(self) -> Network:
        """Return the decoder, whose `decode_chunks` is called."""

    def attention(self, denoiser: nn.Module, run: Run, text_tokens: int) -> AbstractContextManager[object]:
        """Apply the run's attention transforms to the denoiser for the length of the block."""


class OwnNetworks:
    """movd's modules, computed by torch. Implements `Networks`."""

    identity = None

    def __init__(self, options: MovdOptions, weights: Weights) -> None:
        self._options, self._weights = options, weights

    def text_encoder(self) -> Network:
        """Return transformers' T5 encoder."""
        weights = self._weights
        return Network(weights.text_encoder(), weights.t5.checkpoint, self._options.t5.converted)

    def denoiser(self, run: Run) -> Network:
        """Return STDiT3."""
        weights = self._weights
        return Network(weights.denoiser(), weights.dit.checkpoint, self._options.dit.converted)

    def decoder(self) -> Network:
        """Return the VAE's decoders, planned for the chunks of this run."""
        config, weights = self._weights.vae_config, self._weights
        vae = weights.decoder()
        vae.plan_decode(config.chunks(self._options.frames)[0], *weights.pixels(self._options))
        return Network(vae, weights.vae.checkpoint, self._options.vae.converted)

    def attention(self, denoiser: nn.Module, run: Run, text_tokens: int) -> AbstractContextManager[object]:
        """Resolve the transforms on the denoiser's layers."""
        assert isinstance(denoiser, STDiT3)
        grid = denoiser.grid(*self._weights.latent(self._options)[1:])
        return attention_hooks(
            attention_layers(denoiser, grid, text_tokens),
            token_merge=run.token_merge,
            attention_kernel=run.attention_kernel,
        )
