"""What a run computes with where its config names packages: their folder, their networks, who computes.

Stages that no package was made for, the encoder of a first frame, stay torch's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from blockstream.engine.store import StoreAround
from blockstream.errors import ConfigError
from blockstream.plugins import Merge, Network, Run, current_run
from movd.attention import attention_layers
from movd.options import MovdOptions
from movd.stdit3 import STDiT3
from movd.weights import Weights
from movd_coreml.manifest import Export, Preset, open_export
from movd_coreml.packaged import Predict, interpreted
from movd_coreml.packaged_networks import PackagedDiT, PackagedT5, PackagedVAE, holds_merged

#: The stages of movd that are exported.
PARTS = ("t5", "dit", "vae")


class PackagesBackend:
    """An export whose segments `predict` computes: the backend `coreml-interpreter` as it is.

    Raises ConfigError or CheckpointError for a folder that holds no whole export.
    """

    def __init__(self, folder: Path) -> None:
        self.export: Export = open_export(folder)
        self._held_to: MovdOptions | None = None

    @property
    def predict(self) -> Predict:
        """Return what computes a segment."""
        return interpreted

    def around(self, network: nn.Module) -> StoreAround | None:
        """Return what loads a network's segments, None where that is reading their weights."""
        return None

    def network(self, stage: str, network: Network, run: Run) -> Network | None:
        """Return a stage of movd made of packages; see `blockstream.plugins.Backend`.

        Raises ConfigError for a size it was not exported for, and for an export of other weights.
        """
        options = run.config.pipeline.options
        if not isinstance(options, MovdOptions):
            return None
        if stage not in PARTS:
            return network
        preset = self.export.preset_for(options.frames, *options.size)
        self._require(options, run)
        made: PackagedT5 | PackagedDiT | PackagedVAE
        if stage == "t5":
            made = PackagedT5(self.export, preset, self.predict)
        elif stage == "vae":
            made = PackagedVAE(self.export, preset, self.predict)
        else:
            assert isinstance(network.module, STDiT3)
            merges, config = self._merges(network.module, preset, run), network.module.config
            made = PackagedDiT(self.export, preset, self.predict, config, bool(merges))
            made.merging = lambda: _merging(merges)
        return Network(made, made.checkpoint(self.export), around=self.around(made))

    def identity(self) -> str:
        """Return what tells these packages from others."""
        manifest = self.export.manifest
        held = [(p.path, p.sha256) for p in manifest.packages] + [(t.path, t.sha256) for t in manifest.tables]
        return hashlib.sha256(repr(held).encode()).hexdigest()[:16]

    def _require(self, options: MovdOptions, run: Run) -> None:
        """Refuse dtypes that packages do not have, and weights they were not exported from; once a run."""
        if self._held_to is options:
            return
        named = [part for part in PARTS if getattr(options, part).dtype is not None]
        if named:
            raise ConfigError(
                f"{named[0]}.dtype: packages hold their weights as they were exported; leave it out, or "
                "export with --precision or --int8"
            )
        weights = Weights(options, planning=run.planning)
        self.export.require_model(
            {part.name: part.identity for part in (weights.t5, weights.dit, weights.vae)}
        )
        self._held_to = options

    def _merges(self, model: STDiT3, preset: Preset, run: Run) -> list[Merge]:
        """Return the merges of a run, which the packages must have been exported with."""
        if not run.config.attention:
            return []
        manifest, grid = self.export.manifest, model.grid(*preset.latent)
        layers = [layer for _, layer in attention_layers(model, grid, manifest.text_tokens)]
        for layer in layers:
            if run.attention_kernel(layer) is not None:
                raise ConfigError(
                    f"{layer.name} is computed by a kernel of an attention transform, and packages compute "
                    "it themselves; run without the transform or without the backend"
                )
        merges = [merge for layer in layers if (merge := run.token_merge(layer)) is not None]
        chosen, exported = [c.written() for c in run.config.attention], list(manifest.attention)
        if merges and (chosen != exported or not holds_merged(self.export, preset)):
            raise ConfigError(
                f"{self.export.folder}: was exported with attention {exported}, and the config has {chosen}; "
                "export again with it, or run without"
            )
        return merges


def _merging(merges: Sequence[Merge]) -> bool:
    """Return whether tokens are merged at this step: a package does so in all layers or in none."""
    if current_run().step is None:  # nothing is sampled yet: operations are counted
        return False
    active = {merge.active() for merge in merges}
    if len(active) > 1:
        raise ConfigError("the attention transforms merge in some layers only at this step; packages cannot")
    return True in active
