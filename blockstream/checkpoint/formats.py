"""The formats that weights have on disk beside plain numbers: one table, one row a format.

A row says how many elements a block has and in how many bytes, which tensors lie beside a weight, how such
weights are found among a checkpoint's tensors, and which layer computes from them. Bytes and companions stay
as they are in memory; the layer widens them as it computes. A plugin adds rows by the hook `weight_formats`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import companions
from .read.entries import TensorEntry, Tensors

#: What `find` of a row returns: its weights, as `coded` entries.
Finder = Callable[[Tensors], Iterable[TensorEntry]]


@dataclass(frozen=True)
class Format:
    """One row: a format of weights.

    `block` elements are `block_nbytes` bytes, the companions' apart (0: what `find` says). `companions` are
    what the names of tensors beside a weight end with. `layer` computes from what is stored: a function
    `widen(stored) -> Tensor` of `blockstream.module.narrow.Stored`, or "module:function", imported when it is
    first needed. `by_row`: each item along the first dimension has bytes, and companions, of its own, so that
    one expert, or one row of a table, is widened alone. `find(tensors)` yields the weights of this format;
    None where entries come coded from the file's own header. `methods` are the values of
    `quantization_config.quant_method` whose checkpoints it reads.
    """

    name: str
    block: int
    block_nbytes: int
    layer: str | Callable[[Any], Any]
    companions: tuple[str, ...] = ()
    find: Finder | None = None
    methods: tuple[str, ...] = ()
    by_row: bool = False
    summary: str = ""

    def widen(self) -> Callable[[Any], Any]:
        """Return the layer's function, imported if it is named."""
        if not isinstance(self.layer, str):
            return self.layer
        module, _, name = self.layer.partition(":")
        found: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
        return found


_GGUF = "blockstream.module.layers.gguf_blocks"
_SCALED = "blockstream.module.layers.scaled"
_FOUR = "blockstream.module.layers.four_bits"


def _gguf(name: str, block: int, block_nbytes: int) -> Format:
    layer = f"{_GGUF}:{name.lower()}"
    return Format(name, block, block_nbytes, layer, by_row=True, summary="GGUF, as llama.cpp quantises")


#: The rows there are.
TABLE: tuple[Format, ...] = (
    _gguf("Q4_0", 32, 18),
    _gguf("Q4_1", 32, 20),
    _gguf("Q5_0", 32, 22),
    _gguf("Q5_1", 32, 24),
    _gguf("Q8_0", 32, 34),
    _gguf("Q4_K", 256, 144),
    _gguf("Q5_K", 256, 176),
    _gguf("Q6_K", 256, 210),
    *(
        Format(
            f"GGUF-{dtype}", 1, nbytes, f"{_GGUF}:{dtype.lower()}", summary="numbers a library computes on"
        )
        for dtype, nbytes in (("F32", 4), ("F16", 2), ("BF16", 2))
    ),
    Format(
        "fp8",
        1,
        1,
        f"{_SCALED}:scaled",
        ("_scale",),
        companions.fp8_scaled,
        ("compressed-tensors",),
        summary="compressed-tensors",
    ),
    Format(
        "int8-scaled",
        1,
        1,
        f"{_SCALED}:scaled",
        ("_scale",),
        companions.int8_scaled,
        ("compressed-tensors",),
        summary="compressed-tensors",
    ),
    Format(
        "fp8-blocks",
        1,
        1,
        f"{_SCALED}:scaled",
        ("_scale_inv",),
        companions.fp8_blocks,
        ("fp8",),
        summary="DeepSeek and others, by transformers",
    ),
    Format(
        "fp8-comfy", 1, 1, f"{_SCALED}:scaled", ("scale_weight",), companions.comfy_fp8, summary="ComfyUI"
    ),
    Format(
        "bitsandbytes-int8",
        1,
        1,
        f"{_SCALED}:scaled",
        ("SCB",),
        companions.bitsandbytes_int8,
        ("bitsandbytes",),
        summary="bitsandbytes",
    ),
    Format(
        "bitsandbytes-4bit",
        2,
        1,
        f"{_FOUR}:bitsandbytes_4bit",
        (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"),
        companions.bitsandbytes_4bit,
        ("bitsandbytes",),
        summary="bitsandbytes, nf4 and fp4",
    ),
    Format(
        "mxfp4",
        32,
        16,
        f"{_FOUR}:mxfp4",
        ("_scales",),
        companions.mxfp4,
        ("mxfp4",),
        by_row=True,
        summary="gpt-oss",
    ),
)


def by_name(formats: Iterable[Format]) -> dict[str, Format]:
    """Return rows by name."""
    return {f.name: f for f in formats}
