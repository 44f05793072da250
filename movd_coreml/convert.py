"""One module -> one Core ML package: traced, converted, quantised if asked, functions joined.

Memory holds one module's weights a few times over: torch's, the converter's, the file's while it is written.
"""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from blockstream.errors import ModelError
from movd_coreml.int8 import LEAST_ELEMENTS
from movd_coreml.manifest import Tensor
from movd_coreml.segments import TORCH_DTYPES
from movd_coreml.tools import coremltools, quiet

#: What is computed in half precision when that is asked: products. Norms, sums and what feeds them stay in
#: float32, because squares of activations and the stream between blocks leave the range of half precision.
HALF_OPS = frozenset({"linear", "matmul", "conv", "scaled_dot_product_attention"})

TARGETS = ("iOS18", "macOS15", "iOS17", "macOS14")
#: Where a package may hold several functions over one copy of the weights.
MULTIFUNCTION = frozenset({"iOS18", "macOS15"})

Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Form:
    """How a segment is written."""

    target: str = "iOS18"
    precision: Precision = "fp32"
    int8: bool = False


def convert(
    name: str,
    module: nn.Module,
    inputs: Sequence[Tensor],
    outputs: Sequence[str],
    form: Form,
    path: Path,
) -> list[tuple[int, ...]]:
    """Trace a module on inputs of the shapes given, convert it and write its package to `path`.

    Returns the shapes of its outputs.
    Raises ModelError naming the operation that has no counterpart and the module it is in.
    """
    module.eval()
    shapes: list[tuple[int, ...]] = []
    with quiet() as errors, torch.no_grad():
        try:
            _convert(module, inputs, outputs, form, path, shapes)
            failure = None
        except Exception as error:
            failure = f"{name}: {_blame(errors, module)}{type(error).__name__}: {error}"
        # What the converter leaves for the collector warns when it goes; the cause would keep it.
        gc.collect()
    if failure is not None:
        shutil.rmtree(path, ignore_errors=True)
        raise ModelError(failure)
    return shapes


def _convert(
    module: nn.Module,
    inputs: Sequence[Tensor],
    outputs: Sequence[str],
    form: Form,
    path: Path,
    shapes: list[tuple[int, ...]],
) -> None:
    ct = coremltools()
    examples = tuple(example(tensor, seed) for seed, tensor in enumerate(inputs))
    with _seeing(module, shapes):
        traced = torch.jit.trace(module, examples, check_trace=False)
    model = ct.convert(
        traced,
        source="pytorch",
        convert_to="mlprogram",
        inputs=[_declared(ct, tensor) for tensor in inputs],
        outputs=[ct.TensorType(name=output, dtype=np.float32) for output in outputs],
        compute_precision=_compute_precision(ct, form.precision),
        pass_pipeline=_passes(ct),
        minimum_deployment_target=getattr(ct.target, form.target),
        compute_units=ct.ComputeUnit.CPU_ONLY,
        skip_model_load=True,
    )
    made = [model]
    try:
        if form.int8:
            made.append(_quantised(ct, model))
        made[-1].save(str(path))
    finally:
        for one in made:  # the converter would keep its folders until the process ends
            shutil.rmtree(one.package_path, ignore_errors=True)


def join(packages: Mapping[str, Path], path: Path) -> None:
    """Write one package whose functions are those of several, over one copy of what they share."""
    ct = coremltools()
    with quiet():
        joined = ct.utils.MultiFunctionDescriptor()
        for function, package in packages.items():
            joined.add_function(str(package), src_function_name="main", target_function_name=function)
        joined.default_function_name = next(iter(packages))
        ct.utils.save_multifunction(joined, str(path))
    gc.collect()


def example(tensor: Tensor, seed: int = 0) -> torch.Tensor:
    """Return an input of the declared shape: numbers in -1..1, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(tensor.shape, generator=generator) * 2 - 1).to(TORCH_DTYPES[tensor.dtype])


@contextmanager
def _seeing(module: nn.Module, shapes: list[tuple[int, ...]]) -> Iterator[None]:
    """Note the shapes of what a module returns in the block."""

    def see(_: nn.Module, __: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        shapes.extend(tuple(int(n) for n in value.shape) for value in outputs)

    hook = module.register_forward_hook(see)
    try:
        yield
    finally:
        hook.remove()


def _declared(ct: Any, tensor: Tensor) -> Any:
    shape: list[Any] = list(tensor.shape)
    for axis, least, most in tensor.ranges:
        shape[axis] = ct.RangeDim(lower_bound=least, upper_bound=most, default=shape[axis])
    dtype = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32}[tensor.dtype]
    return ct.TensorType(name=tensor.name, shape=tuple(shape), dtype=dtype)


def _compute_precision(ct: Any, precision: Precision) -> Any:
    if precision == "fp32":
        return ct.precision.FLOAT32
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type in HALF_OPS)


def _passes(ct: Any) -> Any:
    """Return the passes of a conversion: shapes stay 32-bit whole numbers whatever the precision."""
    passes = ct.PassPipeline()
    passes.remove_passes({"common::add_int16_cast"})
    return passes


def _quantised(ct: Any, model: Any) -> Any:
    """Return the model with the weights of its products in int8, as `movd_coreml.int8` rounds them."""
    quantise = ct.optimize.coreml
    config = quantise.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype="int8",
        granularity="per_channel",
        weight_threshold=LEAST_ELEMENTS,
    )
    return quantise.linear_quantize_weights(
        model, quantise.OptimizationConfig(op_type_configs={"linear": config})
    )


def _blame(errors: Sequence[str], module: nn.Module) -> str:
    """Return what the converter logged of the operation it failed on: its kind and its module."""
    found = re.search(r"converting '(\S+)' op \(located at: '([^']*)'\)", "\n".join(errors))
    if found is None:
        return ""
    where = found[2].replace("/", ".") or type(module).__name__
    return f"operation {found[1]!r} in {where} cannot be expressed in Core ML: "
