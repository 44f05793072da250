"""Operations on single numbers: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from blockstream.errors import ModelError

from .table import Int, Number, Text, enter, operator

for _name, _compute in {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "identity": torch.clone,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": functional.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": functional.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": functional.softplus,
    "softsign": functional.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}.items():
    enter(_name, _compute, "x")

for _name, _compute in {
    "add": torch.add,
    "equal": torch.eq,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}.items():
    enter(_name, _compute, "x y")


@operator("floor_div")
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    """Return the quotient rounded down."""
    return torch.div(x, y, rounding_mode="floor")


@operator("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Return the quotient; of whole numbers, rounded to zero."""
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


@operator("rsqrt")
def rsqrt(x: Tensor, epsilon: Number = 1e-12) -> Tensor:
    """Return 1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + epsilon)


@operator("inverse")
def inverse(x: Tensor, epsilon: Number = 1e-4) -> Tensor:
    """Return 1 / (x + epsilon)."""
    return torch.reciprocal(x + epsilon)


@operator("log")
def log(x: Tensor, epsilon: Number = 1e-45) -> Tensor:
    """Return the logarithm of x + epsilon."""
    return torch.log(x + epsilon)


@operator("clip")
def clip(x: Tensor, alpha: Number = float("-inf"), beta: Number = float("inf")) -> Tensor:
    """Return x kept between alpha and beta."""
    return x.clamp(alpha, beta)


@operator("threshold")
def threshold(x: Tensor, alpha: Number = float("-inf")) -> Tensor:
    """Return max(x, alpha)."""
    return x.clamp_min(alpha)


@operator("leaky_relu")
def leaky_relu(x: Tensor, alpha: Number = 0.01) -> Tensor:
    """Return x where positive, else alpha x."""
    return functional.leaky_relu(x, alpha)


@operator("elu")
def elu(x: Tensor, alpha: Number = 1.0) -> Tensor:
    """Return x where positive, else alpha (exp(x) - 1)."""
    return functional.elu(x, alpha)


@operator("gelu")
def gelu(x: Tensor, mode: Text = "EXACT") -> Tensor:
    """Return GELU in one of its three forms."""
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    forms = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    if mode not in forms:
        raise ModelError(f"gelu has no mode {mode!r}; it has {[*forms, 'SIGMOID_APPROXIMATION']}")
    return functional.gelu(x, approximate=forms[mode])


@operator("softmax")
def softmax(x: Tensor, axis: Int = -1) -> Tensor:
    """Return the softmax along an axis."""
    return x.softmax(axis)


@operator("select", moves=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a where cond, else b."""
    return torch.where(cond, a, b)


_CASTS = {
    "bool": torch.bool,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
}


@operator("cast", moves=True)
def cast(x: Tensor, dtype: Text) -> Tensor:
    """Return x in another dtype."""
    if dtype not in _CASTS:
        raise ModelError(f"cast to {dtype!r} is not evaluated; it can be one of {sorted(_CASTS)}")
    return x.to(_CASTS[dtype])
