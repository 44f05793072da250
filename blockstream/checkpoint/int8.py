"""Round matrices to int8, symmetric, one scale a row: w[i] ~ scale[i] * q[i], scale[i] = max|w[i]| / 127.

A matrix NAME of such a checkpoint is I8 [rows, columns]; NAME_scale, F32 [rows], lies beside it.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import numpy.typing as npt

from blockstream.errors import CheckpointError

from .convert import convert
from .entries import tensor_nbytes
from .manifest import Rounded

#: What the name of a matrix's scales ends with.
SCALE = "_scale"
#: The dtypes that are rounded.
FLOATS = frozenset({"F32", "F16", "BF16"})
MOST = 127.0


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
        rounded: npt.NDArray[np.float32] = np.divide(wide, divisor, dtype=np.float32)
        # A subnormal scale has few bits: a quotient may come out beyond the range.
        np.rint(rounded, out=rounded).clip(-MOST, MOST, out=rounded)
        values = rounded.astype(np.int8)
        self._note(wide, rounded, scales)
        return values.data.cast("B")

    @property
    def error(self) -> Rounded:
        """Return what rounding lost of the rows so far."""
        rms = sqrt(self._error_squares / self._squares) if self._squares else 0.0
        return Rounded(name=self.name, worst=self._worst / (self._largest or 1.0), rms=rms)

    def _note(
        self,
        wide: npt.NDArray[np.float32],
        rounded: npt.NDArray[np.float32],
        scales: npt.NDArray[np.float32],
    ) -> None:
        rounded *= scales[:, None]
        rounded -= wide
        flat, error = wide.reshape(-1), rounded.reshape(-1)
        self._largest = max(self._largest, float(scales.max(initial=0)) * MOST)
        self._worst = max(self._worst, float(error.max(initial=0)), float(-error.min(initial=0)))
        self._squares += float(np.dot(flat, flat))
        self._error_squares += float(np.dot(error, error))
