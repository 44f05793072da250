"""What a run computes, call by call: the digest of every block's and every module's output, in order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockstream.module.binding import tensors_in
from blockstream.module.guards import Follower


class Record(NamedTuple):
    """One call: its stage, segment (None: the module itself), which of their calls it was, its digest."""

    stage: str
    segment: str | None
    call: int
    digest: bytes


#: Called with a record's index, the record, and what was returned.
Seen = Callable[[int, Record, Any], None]


class Recorder:
    """Records the outputs of modules; `seen` may raise to end the run. Compute thread only."""

    def __init__(self, seen: Seen | None = None) -> None:
        self.records: list[Record] = []
        self._seen = seen
        self._calls: Counter[tuple[str, str | None]] = Counter()
        self._followed: list[Follower] = []

    def attach(self, stage: str, module: nn.Module, segments: Mapping[str, str]) -> None:
        """Record a stage's module and its segments, module path -> name."""
        self._follow(stage, None, module)
        for path, segment in segments.items():
            self._follow(stage, segment, module.get_submodule(path))

    def detach(self) -> None:
        """Record no more. Idempotent."""
        for call in self._followed:
            call.remove()
        self._followed.clear()

    def forwards(self, stage: str) -> int:
        """Return how many times a stage's module was called."""
        return self._calls[stage, None]

    def visits(self, stage: str) -> int:
        """Return how many times a stage's segments were called."""
        return sum(n for (name, segment), n in self._calls.items() if name == stage and segment is not None)

    def _follow(self, stage: str, segment: str | None, module: nn.Module) -> None:
        def record(output: Any, failed: bool) -> None:
            if failed:
                return
            self._calls[stage, segment] += 1
            made = Record(stage, segment, self._calls[stage, segment], digest(output))
            self.records.append(made)
            if self._seen is not None:
                self._seen(len(self.records) - 1, made, output)

        call = Follower(module, segment or stage, lambda args, kwargs: None, record)
        call.attach()
        self._followed.append(call)


def digest(value: Any) -> bytes:
    """Return the SHA-256 of all tensors in a value: where they are in it, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for path, tensor in tensors_in(value):
        plain = _plain(tensor)
        found.update(f"{path} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(bits(plain.cpu()).numpy().data)
    return found.digest()


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes [nbytes], in order."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor of one shape: a nested one padded."""
    return tensor.to_padded_tensor(0.0) if tensor.is_nested else tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit."""
    a, b = _plain(a), _plain(b)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def most_apart(a: Tensor, b: Tensor) -> float | None:
    """Return the largest absolute difference; None for other shapes. NaN where one alone is not a number."""
    a, b = _plain(a), _plain(b)
    if a.shape != b.shape:
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.detach().to(wide), b.detach().to(wide)
    apart = (x - y).abs()
    # Infinities of one sign, and two numbers that are none, are no difference.
    apart = torch.where((x == y) | (x.isnan() & y.isnan()), torch.zeros_like(apart), apart)
    return float(apart.max()) if apart.numel() else 0.0
