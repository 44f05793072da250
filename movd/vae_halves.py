"""The halves of the VAE: a video is decoded, an image encoded, and neither loads the other's weights."""

from __future__ import annotations

from torch import Tensor, nn

from movd.vae import OpenSoraVAE, OpenSoraVAEConfig


class VAEDecoder(OpenSoraVAE):
    """The VAE without what only encodes: making a video loads none of it."""

    def __init__(self, config: OpenSoraVAEConfig) -> None:
        super().__init__(config)
        del self.spatial_vae.module.encoder, self.spatial_vae.module.quant_conv
        del self.temporal_vae.encoder, self.temporal_vae.quant_conv


class VAEEncoder(OpenSoraVAE):
    """The VAE without what only decodes; a pass encodes one clip."""

    def __init__(self, config: OpenSoraVAEConfig) -> None:
        super().__init__(config)
        del self.spatial_vae.module.decoder, self.spatial_vae.module.post_quant_conv
        del self.temporal_vae.decoder, self.temporal_vae.post_quant_conv

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents of a clip [B, 3, T, H, W] in -1..1, both posteriors at their mean."""
        return self.encode(x, sample=False)

    def stream_order(self) -> tuple[str, ...]:
        """Return the blocks one forward on a single frame runs: the 2-D ones, then the temporal ones."""
        net, temporal = "spatial_vae.module.encoder", "temporal_vae.encoder"
        downs = [f"{net}.down_blocks.{i}" for i in range(len(self.spatial_vae.module.encoder.down_blocks))]
        encoder = self.temporal_vae.encoder
        levels = []
        for i, level in enumerate(encoder.block_res_blocks):
            levels += [f"{temporal}.block_res_blocks.{i}.{j}" for j in range(len(level))]
            if i < len(encoder.conv_blocks) and not isinstance(encoder.conv_blocks[i], nn.Identity):
                levels.append(f"{temporal}.conv_blocks.{i}")
        last = [f"{temporal}.res_blocks.{j}" for j in range(len(encoder.res_blocks))]
        return (*downs, f"{net}.mid_block", *levels, *last)
