"""Evaluate saved Core ML packages with torch: the proof on Linux, and a backend.

package = Package.open("t5.block.00.mlpackage")
function = package.function("main")
with package.weights(function) as weights:
    outputs = evaluate(function, inputs, weights, watch=FiniteWatch())

`Package.open` reads a .mlpackage, `Package.function` checks one of its functions, `evaluate` runs it
operation by operation. Half precision is computed in single and rounded after each operation; real devices
accumulate otherwise.
"""

from .package import Package
from .program import Blob, Function
from .run import FiniteWatch, NonFinite, evaluate
from .weights import MappedWeights, read_records

__all__ = [
    "Blob",
    "FiniteWatch",
    "Function",
    "MappedWeights",
    "NonFinite",
    "Package",
    "evaluate",
    "read_records",
]
