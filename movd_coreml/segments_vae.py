"""The VAE's decoders in segments: runs of layers, none above a given size unless one layer is.

`vae-temporal` turns a chunk of latent frames into latents of frames, `vae-spatial` those into pixels.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from movd.vae import LATENT_SCALE, OpenSoraVAE
from movd.vae_temporal import channels_to_time
from movd_coreml.manifest import Variant
from movd_coreml.segments import Function, Recipe, Sizes, StageRecipe, ranged, tensor

TEMPORAL, SPATIAL = "vae-temporal", "vae-spatial"


@dataclass(frozen=True)
class Unit:
    """A step of the decoder and the paths of its weights."""

    modules: tuple[str, ...]
    step: nn.Module


def temporal_stage(vae: OpenSoraVAE, sizes: Sizes, most_nbytes: int) -> StageRecipe:
    """Return the stage that decodes one chunk of a clip, its last one by the variant `rest`.

    Input: z [1, 4, t, h, w], latents as the flow leaves them. Output: x [1, 4, frames, h, w].
    """
    parts = parts_within(vae, temporal_units(vae), most_nbytes)
    keys: dict[tuple[int, int, int, int], dict[Variant, list[str]]] = defaultdict(lambda: defaultdict(list))
    for preset in sizes.presets:
        _, h, w = sizes.presets[0].latent if sizes.flexible else preset.latent
        for n, chunk in enumerate(dict.fromkeys(preset.chunks)):
            variant: Variant = "rest" if n else "plain"
            keys[(*chunk, h, w)][variant].append(preset.name)
    shapes = {key: _shapes(parts, torch.zeros(1, 4, *key[1:], device="meta")) for key in keys}

    def functions(at: int, units: Sequence[Unit]) -> Iterable[Function]:
        for (frames, latent, h, w), served in keys.items():
            steps = [unit.step for unit in units]
            if at == len(parts) - 1:
                steps.append(Front(vae.temporal_vae.front(frames)))
            entering = shapes[frames, latent, h, w][at]
            spans = _ranges(sizes, entering, h, w)
            yield Function(
                f"f{frames}" if sizes.flexible else f"f{frames}x{h}x{w}",
                (tensor("x" if at else "z", entering, spans),),
                ("x",),
                partial(Chain, steps),
                tuple((variant, tuple(names)) for variant, names in served.items()),
            )

    return _stage(TEMPORAL, "vae.temporal", parts, functions, "z")


def spatial_stage(vae: OpenSoraVAE, sizes: Sizes, most_nbytes: int) -> StageRecipe:
    """Return the stage that decodes `frames_a_call` frames: x [F, 4, h, w] to x [F, 3, 8h, 8w]."""
    parts = parts_within(vae, spatial_units(vae), most_nbytes)
    keys: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for preset in sizes.presets:
        _, h, w = sizes.presets[0].latent if sizes.flexible else preset.latent
        keys[sizes.presets[0].frames_a_call if sizes.flexible else preset.frames_a_call, h, w].append(
            preset.name
        )
    shapes = {key: _shapes(parts, torch.zeros(key[0], 4, *key[1:], device="meta")) for key in keys}

    def functions(at: int, units: Sequence[Unit]) -> Iterable[Function]:
        for (frames, h, w), names in keys.items():
            entering = shapes[frames, h, w][at]
            yield Function(
                "any" if sizes.flexible else f"f{frames}x{h}x{w}",
                (tensor("x", entering, _ranges(sizes, entering, h, w)),),
                ("x",),
                partial(Chain, [unit.step for unit in units]),
                (("plain", tuple(names)),),
            )

    return _stage(SPATIAL, "vae.spatial", parts, functions, "x")


def temporal_units(vae: OpenSoraVAE) -> list[Unit]:
    """Return the steps of the temporal decoder."""
    decoder, at = vae.temporal_vae.decoder, "temporal_vae.decoder"
    units = [Unit(("temporal_vae.post_quant_conv", f"{at}.conv1"), TemporalHead(vae))]
    for name in decoder.block_order():
        module = decoder.get_submodule(name)
        units.append(Unit((f"{at}.{name}",), Doubled(module) if name.startswith("conv") else module))
    tail = Tail(decoder.norm1, decoder.conv_out)
    return [*units, Unit((f"{at}.norm1", f"{at}.conv_out"), tail)]


def spatial_units(vae: OpenSoraVAE) -> list[Unit]:
    """Return the steps of the 2-D decoder."""
    net, at = vae.spatial_vae.module, "spatial_vae.module"
    decoder: Any = net.decoder
    return [
        Unit((f"{at}.post_quant_conv", f"{at}.decoder.conv_in"), SpatialHead(net)),
        Unit((f"{at}.decoder.mid_block",), decoder.mid_block),
        *(Unit((f"{at}.decoder.up_blocks.{i}",), block) for i, block in enumerate(decoder.up_blocks)),
        Unit(
            (f"{at}.decoder.conv_norm_out", f"{at}.decoder.conv_out"),
            Tail(decoder.conv_norm_out, decoder.conv_out),
        ),
    ]


class TemporalHead(nn.Module):
    """Latents as the flow leaves them -> the decoder's first convolution."""

    def __init__(self, vae: OpenSoraVAE) -> None:
        super().__init__()
        self.register_buffer("scale", vae.scale)
        self.register_buffer("shift", vae.shift)
        self.post_quant_conv, self.conv1 = vae.temporal_vae.post_quant_conv, vae.temporal_vae.decoder.conv1

    def forward(self, z: Tensor) -> Tensor:
        """Return [1, C, t, h, w] of z [1, 4, t, h, w]."""
        return self.conv1(self.post_quant_conv(z * self.scale + self.shift))


class SpatialHead(nn.Module):
    """Latents of frames -> the decoder's first convolution."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.conv_in = net.post_quant_conv, net.decoder.conv_in

    def forward(self, x: Tensor) -> Tensor:
        """Return [F, C, h, w] of x [F, 4, h, w]."""
        return self.conv_in(self.post_quant_conv(x / LATENT_SCALE))


class Doubled(nn.Module):
    """A convolution whose channels become twice the frames."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, 2T, H, W] of x [B, C, T, H, W]."""
        return channels_to_time(self.conv(x))


class Tail(nn.Module):
    """Norm, SiLU, the last convolution."""

    def __init__(self, norm: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.norm, self.conv = norm, conv

    def forward(self, x: Tensor) -> Tensor:
        """Return the decoder's output."""
        return self.conv(nn.functional.silu(self.norm(x)))


class Front(nn.Module):
    """Drops the frames that encoding put in front of a chunk."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C, T, H, W] without its first frames."""
        return x[:, :, self.frames :]


class Chain(nn.Module):
    """Steps one after another."""

    def __init__(self, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        """Return x after all steps."""
        for step in self.steps:
            x = step(x)
        return x


def parts_within(vae: OpenSoraVAE, units: Sequence[Unit], most_nbytes: int) -> list[list[Unit]]:
    """Return the units in runs of at most `most_nbytes` of float32 weights."""
    parts: list[list[Unit]] = []
    room = 0
    for unit in units:
        nbytes = sum(4 * p.numel() for path in unit.modules for p in vae.get_submodule(path).parameters())
        if not parts or nbytes > room:
            parts.append([])
            room = most_nbytes
        parts[-1].append(unit)
        room -= nbytes
    return parts


def _shapes(parts: Sequence[Sequence[Unit]], x: Tensor) -> list[tuple[int, ...]]:
    """Return the shape that enters each part."""
    shapes = []
    for units in parts:
        shapes.append(tuple(x.shape))
        for unit in units:
            with torch.no_grad():
                x = copy.deepcopy(unit.step).to("meta")(x)
    return shapes


def _ranges(sizes: Sizes, entering: Sequence[int], h: int, w: int) -> tuple[tuple[int, int, int], ...]:
    """Return the ranges of a part's last two axes: those of the latents, times how far it is enlarged."""
    if not sizes.flexible:
        return ()
    _, rows, columns = sizes.spans()
    by = entering[-1] // w
    axis = len(entering) - 2
    return ranged((axis, (rows[0] * by, rows[1] * by)), (axis + 1, (columns[0] * by, columns[1] * by)))


def _stage(
    stage: str,
    prefix: str,
    parts: Sequence[Sequence[Unit]],
    functions: Callable[[int, Sequence[Unit]], Iterable[Function]],
    entering: str,
) -> StageRecipe:
    segments = [
        Recipe(
            f"{prefix}.{at:02}",
            stage,
            "vae",
            tuple(path for unit in units for path in unit.modules),
            tuple(functions(at, units)),
        )
        for at, units in enumerate(parts)
    ]
    return StageRecipe(stage, tuple(segments), (entering,), "x")
