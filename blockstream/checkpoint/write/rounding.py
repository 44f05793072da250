"""Round matrices to int8, symmetric, one scale a row: w[i] ~ scale[i] * q[i], scale[i] = max|w[i]| / 127.

A matrix NAME of such a checkpoint is I8 [rows, columns]; NAME_scale, F32 [rows], lies beside it.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import numpy.typing as npt

from blockstream.checkpoint.read.convert import convert
from blockstream.checkpoint.read.entries import tensor_nbytes
from blockstream.checkpoint.read.manifest import Rounded
from blockstream.errors import CheckpointError

#: What the name of a matrix's scales ends with.
SCALE = "_scale"
#: The dtypes that are rounded.
FLOATS = frozenset({"F32", "F16", "BF16"})
MOST = 127.0

_Floats = npt.NDArray[np.float32]


class Rounder:
    """Rounds one matrix [rows, columns], given in pieces of whole rows; keeps scales and error."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.name = name
        self._dtype = dtype
        self._rows, self._columns = shape
        self._row_nbytes = tensor_nbytes(dtype, (self._columns,))
        self._done = 0
        #: One scale a row, complete when all rows were given.
        self.scales = np.zeros(self._rows, np.float32)
        self._largest = self._worst = 0.0
        self._squares = self._error_squares = 0.0

    def round(self, piece: memoryview) -> memoryview:
        """Return the next rows as int8. Raises CheckpointError for a value that is not finite."""
        rows = len(piece) // self._row_nbytes
        wide = np.empty((rows, self._columns), np.float32)
        convert(piece, self._dtype, wide.data.cast("B"), "F32")
        largest = np.maximum(wide.max(1), -wide.min(1))
        if not np.isfinite(largest).all():
            row = self._done + int(np.argmin(np.isfinite(largest)))
            raise CheckpointError(
                f"{self.name!r}: row {row} holds a value that is not finite and has no scale; "
                "is the checkpoint damaged? pack it in another dtype"
            )
        scales = largest / np.float32(MOST)
        self.scales[self._done : self._done + rows] = scales
        self._done += rows
        divisor = np.where(scales > 0, scales, np.float32(1))[:, None]
        quotients = np.divide(wide, divisor, dtype=np.float32)
        # A subnormal scale has few bits: a quotient may come out beyond the range.
        rounded = np.rint(quotients).clip(-MOST, MOST)
        self._note(quotients, rounded, scales)
        return rounded.astype(np.int8).data.cast("B")

    @property
    def error(self) -> Rounded:
        """Return what rounding lost of the rows so far."""
        rms = sqrt(self._error_squares / self._squares) if self._squares else 0.0
        return Rounded(name=self.name, worst=self._worst / (self._largest or 1.0), rms=rms)

    def _note(self, quotients: _Floats, rounded: _Floats, scales: _Floats) -> None:
        """Add the errors of some rows, which are measured in steps: squares of weights may overflow."""
        errors = quotients - rounded
        steps = scales.astype(np.float64)
        self._largest = max(self._largest, float(steps.max(initial=0)) * MOST)
        off = np.maximum(errors.max(1), -errors.min(1))
        self._worst = max(self._worst, float((off * steps).max(initial=0)))
        self._squares += float(np.dot(np.einsum("ij,ij->i", quotients, quotients), steps**2))
        self._error_squares += float(np.dot(np.einsum("ij,ij->i", errors, errors), steps**2))
