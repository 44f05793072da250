"""The operations of ML programs, computed with torch as the Core ML specification words them."""

from . import elementwise, images, matrices, reductions, shapes, weights
from .table import OPERATORS, Operator

__all__ = ["OPERATORS", "Operator", "elementwise", "images", "matrices", "reductions", "shapes", "weights"]
