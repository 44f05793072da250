"""T5, STDiT3 and the VAE's decoders made of packages, for the pipeline to call in place of movd's modules.

Each takes and gives what the module it stands for does. What is not in packages is little: rows of the token
table, the learned null caption, the order of chunks and calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import ModelError
from movd.stdit3 import STDiT3Config
from movd_coreml.manifest import Export, Preset, Variant
from movd_coreml.networks import gather_frames
from movd_coreml.packaged import PackagedStage, Predict, checkpoint_of
from movd_coreml.segments_vae import SPATIAL, TEMPORAL


class PackagedT5(PackagedStage):
    """movd's T5 encoder, as far as `movd.t5.embed` uses it."""

    def __init__(self, export: Export, preset: Preset, predict: Predict) -> None:
        super().__init__(export, export.stages["t5"], preset, predict)
        self.table = export.table("t5.embedding")
        tokens, width = self.table.shape
        self.embedding = nn.Embedding(tokens, width, device="meta")

    def stream_order(self) -> tuple[str, ...]:
        """Return the segments in the order of one pass."""
        return self.paths

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Return `last_hidden_state` [1, L, d_model] of one text's tokens [1, L] and their mask."""
        values = {"x": self.embedding(input_ids), "mask": attention_mask}
        return SimpleNamespace(last_hidden_state=self.run_pass(values))

    def checkpoint(self, export: Export) -> Checkpoint:
        """Return where the weights lie."""
        table = (export.folder / self.table.path, self.table.shape)
        return checkpoint_of(export.folder, self, {"embedding.weight": table})


class PackagedDiT(PackagedStage):
    """STDiT3, as far as `movd.rflow.OpenSoraFlow` uses it.

    `merging` is asked in each pass whether tokens are merged in it.
    """

    def __init__(
        self, export: Export, preset: Preset, predict: Predict, config: STDiT3Config, merges: bool
    ) -> None:
        variants: tuple[Variant, ...] = ("plain", "merged") if merges else ("plain",)
        super().__init__(export, export.stages["dit"], preset, predict, variants)
        self.preset = preset
        self._frames = -(-preset.latent[0] // config.patch_size[0])
        self.merging: Callable[[], bool] = lambda: False
        self._tables = {"null_caption": export.table("dit.null_caption")}
        for name in ("pos", "cos", "sin"):
            if name in self.stage.inputs:
                self._tables[name] = export.table(f"dit.{name}.{preset.name}")
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", torch.empty(self._tables["null_caption"].shape))
        for name in self._tables.keys() - {"null_caption"}:
            self.register_buffer(name, torch.empty(self._tables[name].shape))

    def stream_order(self) -> tuple[str, ...]:
        """Return the segments in the order of one pass."""
        return self.paths

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
    ) -> Tensor:
        """Return [2, out_channels, T, H, W]; arguments as those of `STDiT3`. The size is the preset's."""
        size = self.preset.latent
        if tuple(x.shape[2:]) != size or len(x) != 2:
            raise ModelError(
                f"latents {list(x.shape)} are not those of preset {self.preset.name}, [2, channels, "
                f"{', '.join(map(str, size))}]"
            )
        if fps is None:
            raise ModelError("STDiT3 needs fps [1]")
        values = {
            "z": x,
            "t": timestep,
            "y": y.squeeze(1),
            "mask": torch.ones(1, y.shape[2]) if mask is None else mask,
            "x_mask": torch.ones(2, self._frames) if x_mask is None else x_mask,
            "fps": fps,
        }
        for name in self._tables.keys() - {"null_caption"}:
            values[name] = getattr(self, name)
        variant: Variant = "merged" if self.merging() else "plain"
        return self.run_pass(values, variant)

    def checkpoint(self, export: Export) -> Checkpoint:
        """Return where the weights lie."""
        paths = {"null_caption": "y_embedder.y_embedding"}
        tables = {
            paths.get(name, name): (export.folder / table.path, table.shape)
            for name, table in self._tables.items()
        }
        return checkpoint_of(export.folder, self, tables)


class PackagedVAE(nn.Module):
    """The VAE's decoders, as `OpenSoraVAE.decode_chunks` runs them: a pass decodes one chunk."""

    def __init__(self, export: Export, preset: Preset, predict: Predict) -> None:
        super().__init__()
        self.preset = preset
        variants: tuple[Variant, ...] = ("plain", "rest") if len(set(preset.chunks)) > 1 else ("plain",)
        self.temporal = PackagedStage(export, export.stages[TEMPORAL], preset, predict, variants)
        self.spatial = PackagedStage(export, export.stages[SPATIAL], preset, predict)

    def stream_order(self) -> tuple[str, ...]:
        """Return the segments that the first chunk visits, in order."""
        calls = -(-self.preset.chunks[0][0] // self.preset.frames_a_call)
        temporal = tuple(f"temporal.{path}" for path in self.temporal.paths)
        return temporal + tuple(f"spatial.{path}" for path in self.spatial.paths) * calls

    def decode_chunks(self, z: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Yield the clip [1, 3, frames, H, W] of latents [1, 4, T, h, w], chunk by chunk."""
        if num_frames != self.preset.frames or tuple(z.shape[2:]) != self.preset.latent:
            raise ModelError(
                f"{num_frames} frames of latents {list(z.shape)} are not those of preset {self.preset.name}"
            )
        parts = torch.split(z, [latent for _, latent in self.preset.chunks], dim=2)
        for part, (frames, _) in zip(parts, self.preset.chunks, strict=True):
            yield self(part, frames)

    def forward(self, z: Tensor, num_frames: int) -> Tensor:
        """Return one chunk's frames [1, 3, num_frames, H, W]."""
        first = (num_frames, z.shape[2]) == self.preset.chunks[0]
        x = self.temporal.run_pass({"z": z}, "plain" if first else "rest")
        rows = x[0].transpose(0, 1)
        calls = gather_frames(rows, self.preset.frames_a_call)
        made = torch.cat([self.spatial.run_pass({"x": frames}) for frames in calls])
        return made[:num_frames].transpose(0, 1)[None]

    def checkpoint(self, export: Export) -> Checkpoint:
        """Return where the weights lie."""
        return checkpoint_of(export.folder, self, {})


def holds_merged(export: Export, preset: Preset) -> bool:
    """Return whether an export has a merged variant for a preset."""
    programs = (p for segment in export.manifest.segments for p in segment.programs)
    return any(p.serves(preset.name, "merged") for p in programs)
