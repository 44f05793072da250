"""Count the floating-point operations of one forward, on fake tensors: nothing is read or computed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .order import faked

log = logging.getLogger(__name__)


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


#: What torch's own table lacks: attention as it runs on processors.
_ALSO = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def count_flops(
    module: nn.Module,
    example_inputs: Any,
    dtype_of: Callable[[str], torch.dtype] | None = None,
) -> Mapping[str, float] | None:
    """Return the operations of one call of each module by path, "" for all of a forward.

    A module that is called several times gets the mean. None if the forward cannot run without data.
    """
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    try:
        with faked(module, example_inputs, dtype_of) as (fake, args, kwargs):
            counter = FlopCounterMode(display=False, custom_mapping=_ALSO)
            for path, part in fake.named_modules():
                _count(part, path, counter.get_total_flops, total, calls)
            with counter:
                fake(*args, **kwargs)
    except Exception as error:
        log.info("the cost of %s is guessed from sizes (%s)", type(module).__name__, error)
        return None
    return {path: total[path] / calls[path] for path in calls}


def _count(
    part: nn.Module, path: str, flops: Callable[[], int], total: Counter[str], calls: Counter[str]
) -> None:
    began: list[int] = []

    def before(_: nn.Module, args: Any) -> None:
        began.append(flops())

    def after(_: nn.Module, args: Any, output: Any) -> None:
        total[path] += flops() - began.pop()
        calls[path] += 1

    part.register_forward_pre_hook(before)
    part.register_forward_hook(after)


def shapes_of(example_inputs: Any) -> str | None:
    """Return what the inputs look like in words that two runs agree on: "x [2, 4, 20, 32, 32]"."""
    if example_inputs is None:
        return None
    if isinstance(example_inputs, torch.Tensor):
        return f"{str(example_inputs.dtype).removeprefix('torch.')}{list(example_inputs.shape)}"
    if isinstance(example_inputs, Mapping):
        return ", ".join(f"{key} {shapes_of(value)}" for key, value in sorted(example_inputs.items()))
    if isinstance(example_inputs, tuple | list):
        return f"({', '.join(str(shapes_of(value)) for value in example_inputs)})"
    return str(example_inputs)
