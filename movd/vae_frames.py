"""The VAE of single frames: modules, names and bits of diffusers' AutoencoderKL, for images.

It is written out here because importing diffusers takes several seconds of processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from blockstream.errors import ConfigError

EPS = 1e-6
#: Keys of an AutoencoderKL's config.json that change nothing here, and those of which one value is known.
IGNORED = frozenset(
    {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
)
FIXED: Mapping[str, Any] = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


@dataclass(frozen=True)
class FrameVAEConfig:
    """The keys of an AutoencoderKL's config.json that its modules follow from; the library's defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Sequence[str] = ("DownEncoderBlock2D",)
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",)
    block_out_channels: Sequence[int] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FrameVAEConfig:
        """Return the configuration of a config.json. Raises ConfigError for unknown keys and values."""
        known = {f.name for f in fields(cls)}
        if foreign := sorted(config.keys() - known - IGNORED - FIXED.keys()):
            raise ConfigError(f"AutoencoderKL has no {foreign}")
        made = cls(**{key: value for key, value in config.items() if key in known})
        wanted = {
            **{key: (config.get(key, value), value) for key, value in FIXED.items()},
            "down_block_types": ({*made.down_block_types}, {"DownEncoderBlock2D"}),
            "up_block_types": ({*made.up_block_types}, {"UpDecoderBlock2D"}),
        }
        for key, (value, only) in wanted.items():
            if value != only:
                raise ConfigError(f"AutoencoderKL: {key} {value!r} is not supported, {only!r} is")
        return made


class Resnet(nn.Module):
    """Two convolutions, each after a norm and SiLU, and what came in, brought to as many channels."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, c_out, H, W] of x [N, c_in, H, W]."""
        y = self.conv1(self.nonlinearity(self.norm1(x)))
        y = self.conv2(self.nonlinearity(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class Attention(nn.Module):
    """Attention with one head over all places of a frame, after a norm, and what came in."""

    heads = 1

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList((nn.Linear(channels, channels),))

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, H, W] of x [N, C, H, W]."""
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (part(tokens)[:, None] for part in (self.to_q, self.to_k, self.to_v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        out: Tensor = self.to_out[0](y)
        return out.transpose(-1, -2).reshape(x.shape) + x


class Mid(nn.Module):
    """A resnet, attention, a resnet."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList((Attention(channels, groups),))
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, H, W] of x [N, C, H, W]."""
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


class Down(nn.Module):
    """A convolution that halves both sides; what it lacks on the right and below is zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, H/2, W/2] of x [N, C, H, W]."""
        out: Tensor = self.conv(nn.functional.pad(x, (0, 1, 0, 1)))
        return out


class Up(nn.Module):
    """Every place four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, 2 H, 2 W] of x [N, C, H, W]."""
        out: Tensor = self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The resnets of one size, and the change to the next."""

    def __init__(
        self, c_in: int, c_out: int, layers: int, groups: int, change: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        self._change = "" if change is None else change[0]
        if change is not None:
            self.add_module(change[0], nn.ModuleList((change[1],)))

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, c_out, H', W'] of x [N, c_in, H, W]."""
        for resnet in self.resnets:
            x = resnet(x)
        return self.get_submodule(self._change)[0](x) if self._change else x  # type: ignore[operator, index]


class Encoder(nn.Module):
    """Frames [N, 3, H, W] to mean and log-variance before the last convolution [N, 8, H/8, W/8]."""

    def __init__(self, config: FrameVAEConfig) -> None:
        super().__init__()
        widths, groups = list(config.block_out_channels), config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(c_in, c, config.layers_per_block, groups, None if last else ("downsamplers", Down(c)))
            for c_in, c, last in _levels(widths)
        )
        self.mid_block = Mid(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, 8, H/8, W/8] of frames [N, 3, H, W]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        out: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    """Latents [N, 4, H/8, W/8] to frames [N, 3, H, W]."""

    def __init__(self, config: FrameVAEConfig) -> None:
        super().__init__()
        widths, groups = list(reversed(config.block_out_channels)), config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            Level(c_in, c, config.layers_per_block + 1, groups, None if last else ("upsamplers", Up(c)))
            for c_in, c, last in _levels(widths)
        )
        self.mid_block = Mid(widths[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Return frames [N, 3, H, W] of z [N, 4, H/8, W/8]."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return out


def _levels(widths: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Return the channels that come in and go out of each size, and whether it is the last."""
    return [(widths[max(i - 1, 0)], c, i == len(widths) - 1) for i, c in enumerate(widths)]


class FrameVAE(nn.Module):
    """Both halves, and the products between them and the latents."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        made = FrameVAEConfig.of(config)
        self.encoder, self.decoder = Encoder(made), Decoder(made)
        self.quant_conv = nn.Conv2d(2 * made.latent_channels, 2 * made.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(made.latent_channels, made.latent_channels, 1)
