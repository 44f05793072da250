"""What a forward does, operation by operation, and what that takes by the seconds of each operation.

Pure: an operation is text that says how to run it again, its kind, its arithmetic and the bytes it moves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: The kinds of operation, by what bounds them: arithmetic of three sorts, else memory.
KINDS = ("product", "attention", "convolution", "memory")
#: Seconds that a call of an operation takes beside it, and a call of a module: Python's part of a forward.
CALL_S, MODULE_S = 1.5e-6, 4e-6


class Op(NamedTuple):
    """One operation on operands of some shapes and dtypes; equal ones are one.

    `spec` is JSON that `module.recorded` runs again, "" for what cannot be; `flops` and `nbytes` are of one
    call, with what it reads and writes; `dtype` is that of its largest operand.
    """

    spec: str
    kind: str
    flops: float
    nbytes: float
    dtype: str


@dataclass(frozen=True)
class Work:
    """The operations of one forward by module path: `own[path]` counts those of all its calls, by index.

    What a module's children do is theirs. `times`: how often each module is called.
    """

    ops: Sequence[Op] = ()
    own: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    times: Mapping[str, int] = field(default_factory=dict)

    def counts(self) -> list[float]:
        """Return how often each operation runs in the forward."""
        total = [0.0] * len(self.ops)
        for counts in self.own.values():
            for i, n in counts.items():
                total[i] += n
        return total

    def seconds(self, op_s: Sequence[float]) -> dict[str, float]:
        """Return what one call of each module takes, its children's calls included; "" is the forward."""
        whole: defaultdict[str, float] = defaultdict(float)
        for path in {*self.own, *self.times}:
            own = sum(n * (op_s[i] + CALL_S) for i, n in self.own.get(path, {}).items())
            own += MODULE_S * self.times.get(path, 0)
            for above in _and_above(path):
                whole[above] += own
        return {path: s / max(1, self.times.get(path, 1)) for path, s in whole.items()}


def filled(ops: Sequence[Op], measured: Mapping[int, float], guessed: Sequence[float]) -> list[float]:
    """Return the seconds of each operation: as measured, else as guessed, brought to what its like took.

    Its like are the measured ones of its kind and dtype, else of its kind.
    """
    ratios: dict[tuple[str, str], float] = {}
    for of in {*((op.kind, op.dtype) for op in ops), *((op.kind, "") for op in ops)}:
        alike = [i for i in measured if ops[i].kind == of[0] and of[1] in ("", ops[i].dtype)]
        if expected := sum(guessed[i] for i in alike):
            ratios[of] = sum(measured[i] for i in alike) / expected
    return [
        measured[i]
        if i in measured
        else guessed[i] * ratios.get((op.kind, op.dtype), ratios.get((op.kind, ""), 1.0))
        for i, op in enumerate(ops)
    ]


def _and_above(path: str) -> list[str]:
    """Return a path and the paths of the modules that hold it."""
    if not path:
        return [""]
    names = path.split(".")
    return [".".join(names[:n]) for n in range(len(names), -1, -1)]
