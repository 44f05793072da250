"""One pass of a stage: what is bound when, and what is checked before it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from blockstream.errors import AliasError, ModelError
from blockstream.module.binding import BoundHandle, tensors_in
from blockstream.module.prepared import Prepared
from blockstream.plan.segments import Visit

from .top_tier import TopTier


class Pass:
    """A pass that has begun. `index` is None past the last that was planned; `ran` are the parts so far.

    `visited(part)` is called after each visit, `ended(pass, complete)` once. Compute thread only.
    """

    def __init__(
        self,
        tier: TopTier,
        prepared: Prepared,
        visited: Callable[[int], None],
        ended: Callable[[Pass, bool], None],
    ) -> None:
        self.prepared = prepared
        self.ran: list[int] = []
        self._tier, self._engine = tier, tier.engine
        self._visited, self._ended = visited, ended
        self._in_use: tuple[int, Visit, BoundHandle] | None = None
        self._kept: list[tuple[Visit, BoundHandle]] = []
        self._open = True
        self.index = self._engine.begin_pass(prepared.name)

    def bind_resident(self) -> None:
        """Bind what stays through the pass."""
        for part in self.prepared.parts:
            if part.resident:
                visit, handle = self._acquire(part.name)
                self._kept.append((visit, handle))
                handle.bind()

    @property
    def is_computing(self) -> bool:
        """Return whether a visit has begun and not ended."""
        return self._in_use is not None

    def begin_visit(self, part: int) -> None:
        """Bind a part, waiting for its load."""
        name = self.prepared.parts[part].name
        if self._in_use is not None:
            holder = self.prepared.parts[self._in_use[0]].name
            raise ModelError(
                f"module {name!r} is called while {holder!r} computes, and one of the two may have to go "
                "for the other; let the model name a module that holds both in a method stream_order()"
            )
        visit, handle = self._acquire(name)
        self._in_use = (part, visit, handle)
        handle.bind()
        self.ran.append(part)

    def end_visit(self, part: int, output: Any, failed: bool) -> None:
        """Release a part once nothing else holds its weights; `failed` where its forward raised."""
        if self._in_use is None or self._in_use[0] != part:
            return
        _, visit, handle = self._in_use
        try:
            if not failed:
                handle.binding.check(output, self.prepared.parts[part].entry or self.prepared.name)
        finally:
            self._in_use = None
            handle.binding.unbind(handle)  # what is retained too: nobody outside may take its parameters
            del handle
            self._engine.release(visit)
            self._visited(part)

    def end(self, complete: bool = True) -> None:
        """End the pass: what was resident in it may go if it was the last. Idempotent.

        Nothing is learnt from the order of one that is not `complete`.
        """
        if not self._open:
            return
        self._open = False
        try:
            for _, handle in self._kept if complete else ():
                handle.binding.check(None, type(self.prepared.module).__name__)
        finally:
            self._release(complete)

    def check_result(self, output: Any) -> None:
        """Refuse a result that shares memory with the arena, or has none."""
        for path, tensor in tensors_in(output):
            self._check(path, tensor)

    def _check(self, path: str, tensor: Tensor) -> None:
        model = type(self.prepared.module).__name__
        if tensor.is_meta:
            raise ModelError(
                f"output{path} of {model} is on meta: it was computed from a weight or buffer that is not "
                "loaded; report the module that made it"
            )
        if self._tier.holds(tensor):
            raise AliasError(
                f"output{path} of {model} shares memory with its weights, which may be replaced; return a "
                "copy (.clone())"
            )

    def _acquire(self, segment: str) -> tuple[Visit, BoundHandle]:
        visit, handle = self._engine.acquire(self.prepared.name, segment)
        assert isinstance(handle, BoundHandle)
        return visit, handle

    def _release(self, complete: bool) -> None:
        if self._in_use is not None:  # an interrupted forward
            self._engine.release(self._in_use[1])
            self._in_use = None
        for visit, handle in self._kept:
            handle.binding.unbind(handle)
            self._engine.release(visit)
        self._kept.clear()
        self._engine.end_pass(self.prepared.name, self.index)
        self._ended(self, complete)
