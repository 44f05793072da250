"""STDiT3 in segments: what comes before the blocks, a spatial and a temporal block at a time, the last layer.

One signature serves text to video and known frames: modulation is per frame. Positions are tables, and a bias
hides padding, where movd's own modules compute angles and gather the text that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from blockstream.errors import ConfigError
from blockstream.module.attention import attention_hooks
from blockstream.plugins import AttentionLayer, Merge
from movd.attention import attention_layers
from movd.stdit3 import STDiT3, STDiT3Block
from movd_coreml.blocks import Block, mlp
from movd_coreml.manifest import Preset, Variant
from movd_coreml.manifest import Tensor as Described
from movd_coreml.segments import HIDDEN, Function, Recipe, Sizes, StageRecipe, ranged, tensor

STAGE = "dit"
BATCH = 2
"""Conditional and unconditional halves."""
FIRST = ("x_embedder", "t_embedder", "fps_embedder", "t_block", "y_embedder")

TokenMerge = Callable[[AttentionLayer], Merge | None]


def dit_stage(dit: STDiT3, sizes: Sizes, tokens: int, token_merge: TokenMerge | None = None) -> StageRecipe:
    """Return the stage of STDiT3 for texts of `tokens` tokens.

    Inputs: z [2, c, T, H, W]; t [2] in 0..1000; y [2, tokens, caption] and mask [1, tokens], 1 for real
    tokens; x_mask [2, T], 1 where a frame is denoised, 0 where it is known; fps [1]. With flexible sizes
    also pos [S, C], cos and sin [T, D/2]: `tables` returns them. Output: v [2, out_channels, T, H, W].
    `token_merge` gives the merged variant, where it merges anything.
    """
    depth = dit.config.depth
    builds: list[tuple[str, tuple[str, ...]]] = [("first", FIRST)]
    builds += [(f"pair.{i:02}", (f"spatial_blocks.{i}", f"temporal_blocks.{i}")) for i in range(depth)]
    builds.append(("last", ("final_layer",)))
    shown = sizes.presets[:1] if sizes.flexible else sizes.presets
    merging = [preset for preset in shown if token_merge and merges(dit, preset, tokens, token_merge)]
    if merging and sizes.flexible and sizes.spans()[0][0] != sizes.spans()[0][1]:
        raise ConfigError(
            "merging follows from the number of frames: flexible sizes with attention transforms take "
            "presets of equally many frames"
        )
    segments = []
    for name, modules in builds:
        functions = [_function(dit, name, preset, sizes, tokens) for preset in shown]
        if name.startswith("pair"):
            for preset in merging:
                functions.append(_function(dit, name, preset, sizes, tokens, token_merge))
        segments.append(Recipe(f"dit.{name}", STAGE, "dit", modules, tuple(functions)))
    inputs = ("z", "t", "y", "mask", "x_mask", "fps", *(("pos", "cos", "sin") if sizes.flexible else ()))
    return StageRecipe(STAGE, tuple(segments), inputs, "v")


def merges(dit: STDiT3, preset: Preset, tokens: int, token_merge: TokenMerge) -> bool:
    """Return whether any layer of a preset merges."""
    layers = attention_layers(dit, dit.grid(*preset.latent), tokens)
    return any(token_merge(layer) for _, layer in layers)


def tables(dit: STDiT3, preset: Preset) -> dict[str, Tensor]:
    """Return what depends on the size alone: pos [S, C], cos and sin [T, D/2]."""
    grid = dit.grid(*preset.latent)
    cos, sin = dit.rope(torch.arange(grid[0]))
    return {"pos": dit.position_table(grid, preset.height, preset.width), "cos": cos, "sin": sin}


def _function(
    dit: STDiT3,
    name: str,
    preset: Preset,
    sizes: Sizes,
    tokens: int,
    token_merge: TokenMerge | None = None,
) -> Function:
    known = _values(dit, preset, sizes, tokens)
    outputs: tuple[str, ...] = ("x",)
    if name == "first":
        takes = ["z", "t", "y", "mask", "x_mask", "fps", *(["pos"] if sizes.flexible else [])]
        outputs = ("x", "m", "t_emb", "t0_emb", "text", "bias")
        build: Callable[[], nn.Module] = partial(First, dit, None if sizes.flexible else preset)
    elif name == "last":
        takes = ["x", "t_emb", "t0_emb", "x_mask", *(["z"] if sizes.flexible else [])]
        outputs = ("v",)
        build = partial(Last, dit, None if sizes.flexible else preset)
    else:
        takes = ["x", "m", "text", "bias", *(["cos", "sin"] if sizes.flexible and not token_merge else [])]
        build = partial(
            Pair, dit, int(name.removeprefix("pair.")), preset, sizes.flexible and not token_merge
        )
    variant: Variant = "merged" if token_merge else "plain"
    label = "any" if sizes.flexible else f"f{preset.name}"
    presets = tuple(p.name for p in sizes.presets) if sizes.flexible else (preset.name,)
    return Function(
        f"{label}_merged" if token_merge else label,
        tuple(known[value] for value in takes),
        outputs,
        build,
        ((variant, presets),),
        partial(_merging, dit, sizes, tokens, token_merge) if token_merge else nullcontext,
    )


def _values(dit: STDiT3, preset: Preset, sizes: Sizes, tokens: int) -> dict[str, Described]:
    """Return all values of the stage as inputs."""
    config = dit.config
    C, D = config.hidden_size, config.hidden_size // config.num_heads
    latent, grid = preset.latent, dit.grid(*preset.latent)
    T, S = grid[0], grid[1] * grid[2]
    spans = sizes.spans() if sizes.flexible else tuple((n, n) for n in latent)
    times, rows, columns = (
        (-(-low // p), -(-high // p)) for (low, high), p in zip(spans, config.patch_size, strict=True)
    )
    places = (rows[0] * columns[0], rows[1] * columns[1])
    made = [
        tensor(
            "z", (BATCH, config.in_channels, *latent), ranged((2, spans[0]), (3, spans[1]), (4, spans[2]))
        ),
        tensor("t", (BATCH,)),
        tensor("y", (BATCH, tokens, config.caption_channels)),
        tensor("mask", (1, tokens)),
        tensor("x_mask", (BATCH, T), ranged((1, times))),
        tensor("fps", (1,)),
        tensor("pos", (S, C), ranged((0, places))),
        tensor("cos", (T, D // 2), ranged((0, times))),
        tensor("sin", (T, D // 2), ranged((0, times))),
        tensor("x", (BATCH, T, S, C), ranged((1, times), (2, places))),
        tensor("m", (BATCH, T, 6 * C), ranged((1, times))),
        tensor("t_emb", (BATCH, C)),
        tensor("t0_emb", (BATCH, C)),
        tensor("text", (BATCH, tokens, C)),
        tensor("bias", (1, tokens)),
    ]
    return {value.value: value for value in made}


def _merging(
    dit: STDiT3, sizes: Sizes, tokens: int, token_merge: TokenMerge, preset: str
) -> AbstractContextManager[list[AttentionLayer]]:
    """Resolve the merges of a preset for the length of a block, active whatever the step."""

    def always(layer: AttentionLayer) -> Merge | None:
        merge = token_merge(layer)
        return None if merge is None else replace(merge, active=lambda: True)

    (latent,) = (p.latent for p in sizes.presets if p.name == preset)
    return attention_hooks(attention_layers(dit, dit.grid(*latent), tokens), token_merge=always)


class First(nn.Module):
    """Patches, times, frames a second and text, embedded."""

    def __init__(self, dit: STDiT3, preset: Preset | None) -> None:
        super().__init__()
        for name in FIRST:
            setattr(self, name, getattr(dit, name))
        # Flexible sizes are whole patches: nothing is padded, since no package pads by what its inputs are.
        self.patches = self._whole if preset is None else self.x_embedder
        self.register_buffer("pos", None if preset is None else tables(dit, preset)["pos"])

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        y: Tensor,
        mask: Tensor,
        x_mask: Tensor,
        fps: Tensor,
        pos: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return x [B, T, S, C], m [B, T, 6C], t and t0 [B, C], text [B, L, C], bias [1, L]."""
        pos = self.pos if pos is None else pos
        assert pos is not None
        speed = self.fps_embedder(fps)
        t_emb, t0_emb = self.t_embedder(t) + speed, self.t_embedder(t * 0) + speed
        on = x_mask[:, :, None]
        m = on * self.t_block(t_emb)[:, None] + (1 - on) * self.t_block(t0_emb)[:, None]
        return (
            self.patches(z) + pos,
            m,
            t_emb,
            t0_emb,
            mlp(self.y_embedder.y_proj, y),
            (1 - mask) * HIDDEN,
        )

    def _whole(self, z: Tensor) -> Tensor:
        return self.x_embedder.proj(z).flatten(3).permute(0, 2, 3, 1)


class Pair(nn.Module):
    """A spatial block and the temporal one after it."""

    def __init__(self, dit: STDiT3, index: int, preset: Preset, flexible: bool) -> None:
        super().__init__()
        spatial, temporal = dit.spatial_blocks[index], dit.temporal_blocks[index]
        assert isinstance(spatial, STDiT3Block) and isinstance(temporal, STDiT3Block)
        self.spatial, self.temporal = Block(spatial), Block(temporal)
        merge = temporal.attn.seam.merging()
        at = torch.arange(dit.grid(*preset.latent)[0]) if merge is None else merge.positions
        for name, table in zip(("cos", "sin"), dit.rope(at), strict=True):
            self.register_buffer(name, None if flexible else table)

    def forward(
        self,
        x: Tensor,
        m: Tensor,
        text: Tensor,
        bias: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        """Return x [B, T, S, C] after both; m [B, T, 6C], text [B, L, C], bias [1, L] added to scores."""
        x = self.spatial(x, m, text, bias)
        return self.temporal(
            x, m, text, bias, self.cos if cos is None else cos, self.sin if sin is None else sin
        )


class Last(nn.Module):
    """The last modulation, the projection to patches, and patches put together."""

    def __init__(self, dit: STDiT3, preset: Preset | None) -> None:
        super().__init__()
        self.layer = dit.final_layer
        self.unpatchify = dit.unpatchify
        self.size = None if preset is None else torch.Size(preset.latent)

    def forward(
        self, x: Tensor, t_emb: Tensor, t0_emb: Tensor, x_mask: Tensor, z: Tensor | None = None
    ) -> Tensor:
        """Return [B, out_channels, T, H, W] of x [B, T, S, C]; known frames are modulated twice."""
        modulated = self.layer.modulated
        u = modulated(x, t_emb)
        on = x_mask[:, :, None, None]
        u = self.layer.linear(on * u + (1 - on) * modulated(u, t0_emb))
        # Tensors, not numbers: a package cuts them out of the shape in one operation.
        size = self.size if z is None else torch._shape_as_tensor(z)[2:].unbind()
        assert size is not None
        return self.unpatchify(u, size)
