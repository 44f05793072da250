"""HunyuanVideo's denoiser: diffusers' HunyuanVideoTransformer3DModel, and the seam in its attentions.

Every attention is full: all video tokens, frame by frame, then the text. Without a transform the model is
diffusers' own, untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blockstream.errors import ConfigError, ModelError
from blockstream.module.attention import UNCHANGED, Kernel, numbered
from blockstream.plugins import AttentionLayer
from movd.attention import rotate
from movd.hunyuan.tencent import ShiftFirst
from movd.official import BOOKKEEPING

if TYPE_CHECKING:
    from diffusers import HunyuanVideoTransformer3DModel


def hunyuan_denoiser(config: Mapping[str, Any], *, tencents: bool = False) -> HunyuanVideoTransformer3DModel:
    """Build the denoiser of a config.json, in eval mode; `tencents` for weights in Tencent's layout.

    Raises ConfigError for another model, and for one that needs an image.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    kind = config.get("_class_name", "HunyuanVideoTransformer3DModel")
    if kind != "HunyuanVideoTransformer3DModel":
        raise ConfigError(f"_class_name {kind!r} is not 'HunyuanVideoTransformer3DModel'")
    if config.get("image_condition_type"):
        raise ConfigError(
            f"image_condition_type = {config['image_condition_type']!r}: this is HunyuanVideo's "
            "image-to-video model; the text-to-video one is taken"
        )
    own = {name: value for name, value in config.items() if name not in BOOKKEEPING}
    known = inspect.signature(HunyuanVideoTransformer3DModel.__init__).parameters
    foreign = sorted(own.keys() - known.keys())
    if foreign:
        raise ConfigError(f"HunyuanVideoTransformer3DModel has no {foreign}")
    model = HunyuanVideoTransformer3DModel(**own)
    if not model.config.guidance_embeds:
        raise ConfigError(
            "guidance_embeds = False: the released HunyuanVideo is distilled and embeds guidance"
        )
    if tencents:
        model.norm_out = ShiftFirst(model.config.num_attention_heads * model.config.attention_head_dim)
    for name, layer in full_attentions(model):
        layer.set_processor(Joint(name))
    return model.eval()


def full_attentions(model: nn.Module) -> list[tuple[str, Any]]:
    """Return name and module of the attention of every block, in the order one pass runs them."""
    return [
        (f"{group}.{i}.attn", block.attn)
        for group in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(model, group))
    ]


def grid(model: HunyuanVideoTransformer3DModel, T: int, H: int, W: int) -> tuple[int, int, int]:
    """Return the tokens along time, height and width of latents [T, H, W]."""
    p, t = model.config.patch_size, model.config.patch_size_t
    return T // t, H // p, W // p


def joint_layers(
    model: HunyuanVideoTransformer3DModel, latent: tuple[int, int, int], text_tokens: int
) -> list[tuple[Joint, AttentionLayer]]:
    """Return each attention's seam with what a transform is told of it, for `latent` frames, rows, columns.

    `text_tokens` is how many tokens of text the model is given, padding among them.
    """
    c = model.config
    found = full_attentions(model)
    layers = [
        AttentionLayer(
            name=name,
            kind="full",
            grid=grid(model, *latent),
            width=c.num_attention_heads * c.attention_head_dim,
            heads=c.num_attention_heads,
            trailing=text_tokens,
        )
        for name, _ in found
    ]
    return [(attn.processor, layer) for (_, attn), layer in zip(found, numbered(layers), strict=True)]


class Joint:
    """An attention over video and text: diffusers' processor, and `seam` where a transform was resolved.

    Merging follows the norm and the modulation, unmerging the output projection: before the gate of a block
    of two streams, before the joint projection of one stream. Text is never merged. Merged tokens are
    turned by the angles of their own place in the frame and of the time their merge names.
    """

    def __init__(self, name: str) -> None:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        self.name = name
        self.seam = UNCHANGED
        self._plain = HunyuanVideoAttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return results for video [B, N, C] and text [B, L, C]; the mask [B, 1, 1, N + L] hides keys."""
        layer, rope = self.seam.layer, image_rotary_emb
        if layer is None or rope is None:
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        texts = []

        def attend(x: Tensor, kernel: Kernel | None) -> Tensor:
            merge, mask, video = self.seam.merging(), attention_mask, x.flatten(1, 2)
            angles = rope if merge is None else angles_at(rope, layer, merge.positions)
            if mask is not None:
                mask = mask[..., hidden_states.shape[1] - video.shape[1] :]
            if kernel is None:
                video, text = self._plain(attn, video, encoder_hidden_states, mask, angles)
            else:
                video, text = _by_kernel(attn, video, encoder_hidden_states, mask, angles, kernel)
            texts.append(text)
            return video.unflatten(1, (-1, layer.S))

        frames = hidden_states.unflatten(1, (-1, layer.S)) if hidden_states.shape[1] % layer.S == 0 else None
        if frames is None:
            raise ModelError(
                f"{layer.name} was resolved for frames of {layer.S} tokens, not {hidden_states.shape[1]} "
                "tokens; resolve the hooks for this shape"
            )
        video = self.seam.around(frames, attend)
        return video.flatten(1, 2), texts[0]


def angles_at(rope: tuple[Tensor, Tensor], layer: AttentionLayer, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T' * S, D] of tokens at fractional times: an angle grows evenly along time.

    The angles of a token are those of its time, its row and its column side by side; the latter two are the
    same in every frame.
    """
    if layer.T == 1:
        return rope
    cos, sin = (x.unflatten(0, (layer.T, layer.S))[:2].double() for x in rope)
    # Below pi, as the fastest angle turns 1 rad a frame; 0 where it is of row or column.
    step = torch.atan2(sin[1] * cos[0] - cos[1] * sin[0], cos[1] * cos[0] + sin[1] * sin[0])
    first = torch.atan2(sin[0], cos[0])
    angle = first + positions.to(step.device, torch.float64)[:, None, None] * step
    kind = rope[0].dtype
    return angle.cos().flatten(0, 1).to(kind), angle.sin().flatten(0, 1).to(kind)


def _by_kernel(
    attn: Any,
    video: Tensor,
    text: Tensor,
    mask: Tensor | None,
    rope: tuple[Tensor, Tensor],
    kernel: Kernel,
) -> tuple[Tensor, Tensor]:
    """Return the attention of video and text by a plugin's kernel."""
    n = video.shape[1]
    single = attn.add_q_proj is None
    joined = torch.cat((video, text), 1) if single else video

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    q, k, v = (heads(f(joined)) for f in (attn.to_q, attn.to_k, attn.to_v))
    q, k = attn.norm_q(q), attn.norm_k(k)
    cos, sin = (x[:, 0::2] for x in rope)  # diffusers gives each angle twice, for both of a pair
    q = torch.cat((rotate(q[:, :, :n], (cos, sin)), q[:, :, n:]), 2)
    k = torch.cat((rotate(k[:, :, :n], (cos, sin)), k[:, :, n:]), 2)
    if not single:
        tq, tk, tv = (heads(f(text)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
        q, k, v = torch.cat((q, tq), 2), torch.cat((k, tk), 2), torch.cat((v, tv), 2)
    valid = None if mask is None else [int(row.sum()) - n for row in mask]
    y = kernel(q, k, v, valid).transpose(1, 2).flatten(2)
    video, text = y[:, :n], y[:, n:]
    if getattr(attn, "to_out", None) is not None:
        video = attn.to_out[1](attn.to_out[0](video))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text
