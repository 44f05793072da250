"""STDiT3's blocks written for tracing: all tokens at once, nothing in place, rank 5 at most.

They hold the weights and the seams of movd's own blocks, which compute some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from movd.attention import Attention, CrossAttention, SelfAttention, rotate
from movd.layers import Mlp, modulate
from movd.stdit3 import STDiT3Block


class Block(nn.Module):
    """Self-attention, cross-attention to the text with an additive bias, MLP."""

    def __init__(self, block: STDiT3Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        x: Tensor,
        m: Tensor,
        text: Tensor,
        bias: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        """Return x [B, T, S, C] after the block.

        m [B, T, 6C] modulates, text [B, L, C] is attended to, bias [1, L] added to its scores; cos, sin
        [T, D/2] turn a temporal block's queries and keys.
        """
        block = self.block
        table = block.scale_shift_table
        m = table + m.unflatten(-1, table.shape)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = m[:, :, :, None].unbind(2)
        h = modulate(x, shift_a, scale_a)
        x = x + gate_a * _merged(block.attn, h, lambda part: own(block.attn, part, cos, sin))
        x = x + _merged(block.cross_attn, x, lambda part: across(block.cross_attn, part, text, bias))
        return x + gate_m * mlp(block.mlp, modulate(x, shift_m, scale_m))


def own(layer: SelfAttention, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Return the self-attention of x [B, T, S, C] over places, or over frames where the layer is temporal."""
    temporal = layer.kind == "temporal"
    rows = x.transpose(1, 2) if temporal else x
    q, k, v = layer.qkv(rows.flatten(0, 1)).chunk(3, dim=-1)
    q, k = layer.q_norm(layer.heads_first(q)), layer.k_norm(layer.heads_first(k))
    if cos is not None and sin is not None:
        q, k = rotate(q, (cos, sin)), rotate(k, (cos, sin))
    y = nn.functional.scaled_dot_product_attention(q, k, layer.heads_first(v))
    y = layer.proj(y.transpose(1, 2).flatten(2)).view(rows.shape)
    return y.transpose(1, 2) if temporal else y


def across(layer: CrossAttention, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    """Return the attention of x [B, T, S, C] to text [B, L, C], bias [1, L] added to all scores."""
    q = layer.heads_first(layer.q_linear(x.flatten(1, 2)))
    k, v = (layer.heads_first(part) for part in layer.kv_linear(text).chunk(2, dim=-1))
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None])
    return layer.proj(y.transpose(1, 2).flatten(2)).view(x.shape)


def mlp(layer: Mlp, x: Tensor) -> Tensor:
    """Return fc2(gelu(fc1(x))), GELU in its tanh form."""
    return layer.fc2(nn.functional.gelu(layer.fc1(x), approximate="tanh"))


def _merged(layer: Attention, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a layer gives, computed on merged tokens where its seam holds an active merge."""
    merge = layer.seam.merging()
    return attend(x) if merge is None else merge.unmerge(attend(merge.merge(x)))
