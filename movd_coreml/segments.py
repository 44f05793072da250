"""What is exported: recipes of segments, each some functions to trace over weights of one network.

A recipe is made from networks without weights and says all there is to know of a segment but its numbers.
`Function.build` makes the module to trace; call it where the weights of `Recipe.modules` are bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from movd_coreml.manifest import Preset, Tensor, Variant

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int32": torch.int32}

#: What an attention score of a token that is padding is lowered by: its share becomes exactly 0.
HIDDEN = -1e4


@dataclass(frozen=True)
class Function:
    """One function of a segment: `outputs` are the values it gives.

    `during(preset)` is entered to build and run it for a preset, `example` is the one it is traced for.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    build: Callable[[], nn.Module]
    #: Variants it serves, each with its presets; no presets: all.
    serves: tuple[tuple[Variant, tuple[str, ...]], ...] = (("plain", ()),)
    during: Callable[[str], AbstractContextManager[object]] = nullcontext

    @property
    def example(self) -> str:
        """Return the name of a preset it serves, nothing where it serves all."""
        return next((preset for _, presets in self.serves for preset in presets), "")

    def output_names(self) -> tuple[str, ...]:
        """Return the outputs' names in the package: an input and an output cannot share one."""
        taken = {tensor.name for tensor in self.inputs}
        return tuple(f"{value}_out" if value in taken else value for value in self.outputs)


@dataclass(frozen=True)
class Recipe:
    """One segment: weights under `modules` of `network` (t5, dit or vae), and its functions."""

    name: str
    stage: str
    network: str
    modules: tuple[str, ...]
    functions: tuple[Function, ...]

    def function(self, preset: str, variant: Variant) -> Function:
        """Return the function for a preset; where none has the variant, the plain one."""
        for wanted in (variant, "plain"):
            for function in self.functions:
                for served, presets in function.serves:
                    if served == wanted and (not presets or preset in presets):
                        return function
        raise ValueError(f"{self.name} has no function for {preset}")


@dataclass(frozen=True)
class StageRecipe:
    """The segments of a stage in the order of a pass, and the names of its values."""

    name: str
    segments: tuple[Recipe, ...]
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Sizes:
    """The sizes to export: one function for each preset, or one whose shapes range over all of them."""

    presets: tuple[Preset, ...]
    flexible: bool = False

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Return (least, most) of latent frames, height and width."""
        return tuple((min(axis), max(axis)) for axis in zip(*(p.latent for p in self.presets), strict=True))


def ranged(*axes: tuple[int, tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Return the ranges of a tensor, of the axes that do vary."""
    return tuple((axis, low, high) for axis, (low, high) in axes if low != high)


def tensor(
    value: str, shape: Iterable[int], ranges: tuple[tuple[int, int, int], ...] = (), name: str = ""
) -> Tensor:
    """Return a float input named as the value it takes."""
    return Tensor(name=name or value, value=value, shape=tuple(shape), ranges=ranges)
