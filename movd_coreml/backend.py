"""What a run computes with where its config names packages: their folder, their networks, who computes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from blockstream.engine.store import StoreAround
from blockstream.errors import ConfigError
from blockstream.plugins import Merge, Run
from movd.attention import attention_layers
from movd.networks import Network
from movd.options import MovdOptions
from movd.weights import Weights
from movd_coreml.manifest import Export, open_export
from movd_coreml.packaged import Predict, interpreted
from movd_coreml.packaged_networks import PackagedDiT, PackagedT5, PackagedVAE, holds_merged


class PackagesBackend:
    """An export whose segments `predict` computes: the backend `coreml-interpreter` as it is.

    Raises ConfigError or CheckpointError for a folder that holds no whole export.
    """

    def __init__(self, folder: Path) -> None:
        self.export: Export = open_export(folder)

    @property
    def predict(self) -> Predict:
        """Return what computes a segment."""
        return interpreted

    def around(self, network: nn.Module) -> StoreAround | None:
        """Return what loads a network's segments, None where that is reading their weights."""
        return None

    def networks(self, options: MovdOptions, weights: Weights) -> PackagedNetworks:
        """Return the networks of a run.

        Raises ConfigError for a size it was not exported for, and for an export of other weights.
        """
        return PackagedNetworks(self, options, weights)


class PackagedNetworks:
    """The networks of an export for one run. Implements `movd.networks.Networks`."""

    def __init__(self, backend: PackagesBackend, options: MovdOptions, weights: Weights) -> None:
        self.export, self._backend, self._weights = backend.export, backend, weights
        self._preset = self.export.preset_for(options.frames, *options.size)
        named = [part for part in ("t5", "dit", "vae") if getattr(options, part).dtype is not None]
        if named:
            raise ConfigError(
                f"{named[0]}.dtype: packages hold their weights as they were exported; leave it out, or "
                "export with --precision or --int8"
            )
        self.export.require_model(
            {part.name: part.identity for part in (weights.t5, weights.dit, weights.vae)}
        )
        manifest = self.export.manifest
        held = [(p.path, p.sha256) for p in manifest.packages] + [(t.path, t.sha256) for t in manifest.tables]
        self.identity: str | None = hashlib.sha256(repr(held).encode()).hexdigest()[:16]

    def text_encoder(self) -> Network:
        """Return T5's encoder."""
        t5 = PackagedT5(self.export, self._preset, self._backend.predict)
        return Network(t5, t5.checkpoint(self.export), around=self._backend.around(t5))

    def denoiser(self, run: Run) -> Network:
        """Return STDiT3.

        Raises ConfigError where the run's attention transforms are not those it was exported with.
        """
        merges, config = bool(self._merges(run)), self._weights.dit_config
        dit = PackagedDiT(self.export, self._preset, self._backend.predict, config, merges)
        return Network(dit, dit.checkpoint(self.export), around=self._backend.around(dit))

    def decoder(self) -> Network:
        """Return the VAE's decoders."""
        vae = PackagedVAE(self.export, self._preset, self._backend.predict)
        return Network(vae, vae.checkpoint(self.export), around=self._backend.around(vae))

    @contextmanager
    def attention(self, denoiser: nn.Module, run: Run, text_tokens: int) -> Iterator[None]:
        """Let the denoiser run its merged variant at the steps at which the run's transforms merge."""
        assert isinstance(denoiser, PackagedDiT)
        merges = self._merges(run)
        denoiser.merging = lambda: _merging(merges)
        try:
            yield
        finally:
            denoiser.merging = lambda: False

    def _merges(self, run: Run) -> list[Merge]:
        """Return the merges of a run, which the packages must have been exported with."""
        if not run.config.attention:
            return []
        model, manifest = self._weights.denoiser(), self.export.manifest
        grid = model.grid(*self._preset.latent)
        layers = [layer for _, layer in attention_layers(model, grid, manifest.text_tokens)]
        for layer in layers:
            if run.attention_kernel(layer) is not None:
                raise ConfigError(
                    f"{layer.name} is computed by a kernel of an attention transform, and packages compute "
                    "it themselves; run without the transform or without the backend"
                )
        merges = [merge for layer in layers if (merge := run.token_merge(layer)) is not None]
        chosen, exported = [c.written() for c in run.config.attention], list(manifest.attention)
        if merges and (chosen != exported or not holds_merged(self.export, self._preset)):
            raise ConfigError(
                f"{self.export.folder}: was exported with attention {exported}, and the config has {chosen}; "
                "export again with it, or run without"
            )
        return merges


def _merging(merges: list[Merge]) -> bool:
    """Return whether tokens are merged at this step: a package does so in all layers or in none."""
    active = {merge.active() for merge in merges}
    if len(active) > 1:
        raise ConfigError("the attention transforms merge in some layers only at this step; packages cannot")
    return True in active
