"""Linear layers whose weights stay int8: y = (x q^T) * scale, q [out, in] int8, scale [out] float32.

Which product computes it is numerics: PRODUCTS names one for the processor's instructions, the resolved
config pins it, and rows and dtype of x decide the rest. Nothing is timed where it runs. All three ways are
compared in benchmarks/int8_paths.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from blockstream.checkpoint.write.rounding import SCALE
from blockstream.errors import CheckpointError, ConfigError, ModelError
from blockstream.module.chunks import chunks
from blockstream.module.conversions import Source

#: bf16: x is rounded to bfloat16, in which int8 is exact, and sums are rounded to it. fp32: nothing is.
Product = Literal["bf16", "fp32"]
#: How one layer computes: int8 read by the kernel, or brought to a dtype, some rows of q at a time.
Way = Literal["packed", "bf16", "fp32"]

#: The product that is fastest with a processor's instructions.
PRODUCTS: Mapping[str, Product] = {
    "amx": "bf16",
    "avx512-bf16": "fp32",
    "avx512": "fp32",
    "avx2": "fp32",
    "other": "fp32",
}
#: The product that is fastest on devices.
ON_DEVICE: Product = "bf16"
#: Up to so many rows of x the kernel that reads int8 is the fastest in bfloat16. It reads past rows of other
#: lengths than multiples of this.
FEW_ROWS = 16
PACKED_COLUMNS = 64
#: What is brought to another dtype at a time: of q, in bytes of that dtype, and of x, in rows.
CHUNK_NBYTES = 8 << 20
BLOCK_ROWS = 2048


def instructions() -> str:
    """Return the name of the processor's instructions, as `PRODUCTS` has them."""
    level = torch.backends.cpu.get_cpu_capability()
    if level.startswith("AVX512"):
        if torch.cpu._is_amx_tile_supported():
            return "amx"
        return "avx512-bf16" if torch.cpu._is_avx512_bf16_supported() else "avx512"
    return "avx2" if level == "AVX2" else "other"


def resolve(product: str, on_device: bool = False) -> Product:
    """Return the product that "auto" means on this processor, or on a device, or the one that is named."""
    if product == "auto":
        return ON_DEVICE if on_device else PRODUCTS[instructions()]
    if product not in PRODUCTS.values():
        raise ConfigError(f"int8 {product!r}: write auto, bf16 or fp32")
    return cast(Product, product)


def way_of(product: Product, dtype: torch.dtype, rows: int, columns: int, kind: str = "cpu") -> Way:
    """Return how a layer computes for x [rows, columns] on a `kind` of device.

    bfloat16 would round float16; the kernel that reads int8 is the processor's.
    """
    if product == "fp32" or dtype == torch.float16:
        return "fp32"
    if kind != "cpu":
        return "bf16"
    return "packed" if rows <= FEW_ROWS and columns % PACKED_COLUMNS == 0 else "bf16"


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, product: Product = "fp32"
) -> Tensor:
    """Return [..., out] of x [..., in] in the dtype of x; weight int8 [out, in], scale float32 [out]."""
    rows = x.reshape(-1, x.shape[-1])
    way = way_of(product, x.dtype, len(rows), rows.shape[1], x.device.type)
    if way == "packed":
        few = rows.to(torch.bfloat16).contiguous()
        y = torch._weight_int8pack_mm(few, weight, scale.to(torch.bfloat16)).to(x.dtype)
    else:
        y = torch.empty(len(rows), len(weight), dtype=x.dtype, device=x.device)
        for some in chunks(len(rows), BLOCK_ROWS):
            fill(y[some], rows[some], weight, scale, way)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))


def fill(y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, way: Way) -> None:
    """Write x weight^T * scale to y, some rows of the weight at a time: the shape fixes how many."""
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    x = x.to(dtype)
    out, columns = weight.shape
    step = chunk_rows(columns, dtype)
    room = torch.empty(min(step, out), columns, dtype=dtype, device=x.device)
    for some in chunks(out, step):
        chunk = room[: some.stop - some.start].copy_(weight[some])
        torch.mul(torch.mm(x, chunk.t()), scale[some], out=y[:, some])


def chunk_rows(columns: int, dtype: torch.dtype) -> int:
    """Return how many rows of a weight are brought to a dtype at a time: a multiple of 64."""
    return max(CHUNK_NBYTES // (columns * dtype.itemsize) // 64, 1) * 64


class Int8Linear(nn.Linear):
    """A linear layer whose weight is int8 with one scale a row."""

    weight_scale: nn.Parameter
    product: Product

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output in the dtype of its input."""
        if not input.is_floating_point():
            raise ModelError(
                f"a linear layer with int8 weights got {input.dtype}: the model casts to its weights' dtype, "
                "so it cannot run in int8; pack it in bf16"
            )
        return int8_linear(input, self.weight, self.weight_scale, self.bias, self.product)


class Int8Layers:
    """The linear layers of a module that its checkpoint holds in int8.

    Raises ModelError for int8 where no linear layer is, CheckpointError for scales that are missing or wrong.
    """

    def __init__(
        self, module: nn.Module, sources: Mapping[str, Source], root: Path, product: Product
    ) -> None:
        self._product = product
        self._applied = False
        #: Every path of a scale, and the layers, by the weight they may share.
        self.scales: set[str] = set()
        self._layers: list[tuple[nn.Linear, nn.Parameter]] = []
        by_weight: dict[int, nn.Parameter] = {}
        for prefix, owner in module.named_modules(remove_duplicate=False):
            for name, param in owner._parameters.items():
                path = f"{prefix}.{name}" if prefix else name
                if param is None or not param.is_floating_point() or path not in sources:
                    continue
                if sources[path].dtype != "I8":
                    continue
                if type(owner) is not nn.Linear or name != "weight":
                    raise ModelError(
                        f"{root}: {path!r} is int8 and belongs to {type(owner).__name__}; only linear layers "
                        "compute in int8: pack this model's checkpoint again"
                    )
                _check_scale(root, path, sources, owner.out_features)
                self.scales.add(path + SCALE)
                if id(param) not in by_weight:
                    empty = torch.empty(owner.out_features, dtype=torch.float32, device="meta")
                    by_weight[id(param)] = nn.Parameter(empty, requires_grad=False)
                self._layers.append((owner, by_weight[id(param)]))

    def apply(self) -> None:
        """Make them compute in int8. Idempotent."""
        if self._applied:
            return
        self._applied = True
        for layer, scale in self._layers:
            layer.__class__ = Int8Linear
            layer.register_parameter("weight_scale", scale)
            cast(Int8Linear, layer).product = self._product

    def undo(self) -> None:
        """Make them the layers they were. Idempotent."""
        if not self._applied:
            return
        self._applied = False
        for layer, _ in self._layers:
            if isinstance(layer, Int8Linear):
                del layer._parameters["weight_scale"], layer.product
                layer.__class__ = nn.Linear  # type: ignore[assignment]


def _check_scale(root: Path, path: str, sources: Mapping[str, Source], rows: int) -> None:
    source = sources.get(path + SCALE)
    if source is None:
        name = sources[path].tensors[0].name
        raise CheckpointError(
            f"{root}: {name!r} is int8 and has no {name + SCALE!r} beside it; blockstream reads what "
            "`blockstream pack --dtype int8` writes: pack the original checkpoint"
        )
    (entry,) = source.tensors
    if entry.dtype != "F32" or entry.shape != (rows,):
        raise CheckpointError(
            f"{root}: {entry.name!r} is {entry.dtype} {list(entry.shape)} and {rows} in F32 are needed, one "
            "a row; pack the original checkpoint with `blockstream pack --dtype int8`"
        )


def roundable(module: nn.Module, blocks: set[str]) -> set[str]:
    """Return the parameters that may be packed as int8, of those in `blocks`, all by path.

    The weights of linear layers, used by nothing else. Layers that something computes past (a fused
    attention that takes the weights of its projections) are of classes of their own.
    """
    users: dict[int, list[tuple[str, bool]]] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        fused = isinstance(owner, nn.TransformerEncoderLayer)
        for name, param in owner.named_parameters(recurse=fused):
            path = f"{prefix}.{name}" if prefix else name
            fits = type(owner) is nn.Linear and name == "weight"
            users.setdefault(id(param), []).append((path, fits))
    return {path for uses in users.values() if all(fits for _, fits in uses) for path, _ in uses} & blocks
