"""How far a package is from the torch module it was made from: evaluated, measured, judged."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from torch import Tensor

from movd_coreml.interpreter import FiniteWatch, MappedWeights, Package, evaluate
from movd_coreml.manifest import Program
from movd_coreml.segments import HIDDEN

#: The largest difference, in units of the largest change a segment makes.
TOLERANCES = {"fp32": 1e-4, "fp16": 3e-3}
#: What a change is taken to be at the least, in units of the largest value.
LEAST_CHANGE = 0.01

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Compared:
    """One function: its difference, the most that is allowed, operations that gave what is no number.

    `predict_error` is what Core ML itself gave, None off macOS.
    """

    segment: str
    package: str
    function: str
    preset: str
    variant: str
    error: float
    tolerance: float
    nonfinite: tuple[str, ...] = ()
    predict_error: float | None = None

    @property
    def equal(self) -> bool:
        """Return whether the function is what was exported."""
        within = self.error <= self.tolerance and (
            self.predict_error is None or self.predict_error <= self.tolerance
        )
        return within and not self.nonfinite


@dataclass(frozen=True)
class Chained:
    """One stage run on packages alone, from the first stage on; the error is the root of the mean square."""

    stage: str
    preset: str
    variant: str
    error: float
    tolerance: float

    @property
    def equal(self) -> bool:
        """Return whether the stage's result is what torch computes."""
        return self.error <= self.tolerance


class Opened:
    """One function of a package, its weights mapped."""

    def __init__(self, path: Path, program: Program) -> None:
        package = Package.open(path)
        self._program = program
        self._function = package.function(program.function)
        self._stack = ExitStack()
        files = {blob.file for blob in self._function.blobs}
        self._weights = {
            file: self._stack.enter_context(MappedWeights(package.file(file), self._function.blobs))
            for file in files
        }

    def __call__(self, values: Mapping[str, Tensor], watch: FiniteWatch | None = None) -> Values:
        """Return the function's outputs by value."""
        given = {t.name: values[t.value] for t in self._program.inputs}
        out = evaluate(self._function, given, self._blob, watch)
        return {t.value: out[t.name] for t in self._program.outputs}

    def _blob(self, offset: int, nbytes: int) -> Tensor:
        (weights,) = self._weights.values()
        return weights(offset, nbytes)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def difference(got: Tensor, want: Tensor, before: Tensor | None) -> float:
    """Return the largest difference, in units of the largest change from `before`, or of the largest value.

    A block adds little to what goes through it: compared with the whole, nothing of what it does would show.
    Infinite for other shapes, and where anything is no number.
    """
    if got.shape != want.shape:
        return float("inf")
    hidden = want <= HIDDEN / 2
    if bool(hidden.any()):  # beside scores of hidden tokens nothing else would show
        if bool((got[hidden] > HIDDEN / 2).any()):
            return float("inf")
        got, want, before = got[~hidden], want[~hidden], None
    largest = float(want.abs().max())
    unit = largest
    if before is not None and before.shape == want.shape:
        unit = max(float((want - before).abs().max()), LEAST_CHANGE * largest)
    apart = float((got - want).abs().max())
    if not isfinite(apart):
        return float("inf")
    return apart / unit if unit else apart


def mean_difference(got: Tensor, want: Tensor) -> float:
    """Return the root of the mean square of a difference, in units of that of what is wanted."""
    if got.shape != want.shape:
        return float("inf")
    apart, unit = (float(x.double().square().mean().sqrt()) for x in (got - want, want))
    if not isfinite(apart):
        return float("inf")
    return apart / unit if unit else apart
