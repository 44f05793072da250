"""One streamed module: its calls, its passes, the order it runs in.

A pass is one forward of the module. What is called outside it (an encoder by itself, a decode
method) belongs to the pass that follows, or begins another when its first segment comes round again.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from blockstream.errors import AliasError, ModelError
from blockstream.module.binding import BoundHandle, address_of, tensors_in
from blockstream.module.guards import Follower, Wake
from blockstream.module.order import order_of_parts
from blockstream.module.prepared import CPU, Prepared
from blockstream.module.rehearsal import Rehearsal, rehearse
from blockstream.plan.segments import Passes, Visit

from .costs import Seen
from .known import Known, known_costs, remember

if TYPE_CHECKING:
    from blockstream.engine.engine import Engine
    from blockstream.engine.store import StoreAround

    from .session import Session

log = logging.getLogger(__name__)


class StreamedStage:
    """The compute side of one stage. Calls of its modules drive the session's engine."""

    def __init__(
        self,
        session: Session,
        prepared: Prepared,
        passes: Passes,
        example_inputs: Any,
        around: StoreAround | None = None,
        pace: tuple[float, ...] = (),
    ) -> None:
        self.session = session
        self.prepared = prepared
        self.name = prepared.name
        self.passes = passes
        #: How long each pass takes beside an ordinary one.
        self.pace = pace
        #: What makes its own store of that of the files; None: the files alone.
        self.around = around
        #: The order passes are planned in (indices of parts), and whether it is a guess until one ran.
        self.order: tuple[int, ...] = ()
        self.guessed = True
        #: The most bytes of a segment that the cut keeps to where it can; None: blocks are whole.
        self.finer: int | None = None
        #: What its loads and visits cost as far as is known beforehand.
        self.known = Known()
        self.rehearsal: Rehearsal | None = None
        #: Why the plan of the first pass is a guess though there are example inputs; "" where it is not.
        self.guessed_for = ""
        #: Whether the costs of the segments have been measured, and the memory beside them.
        self.measured = self.completed = False
        #: What a forward holds besides weights, where example inputs told; the largest inputs so far.
        self.activations_nbytes: int | None = None
        self.inputs_nbytes = 0
        #: The kind of every part, and those of which one has run: what compute needs is known by kind.
        self._kinds: list[tuple[type, int]] = []
        self._seen: set[tuple[type, int]] = set()
        self.resident: list[int] = []
        self.streamed: list[int] = []
        self._part_at: dict[str, int] = {}
        self._hooked: set[str] = set()
        self._calls: list[str] = []
        self._outermost: FrameType | None = None
        self._in_use: tuple[int, Visit, BoundHandle] | None = None
        self._kept: list[tuple[Visit, BoundHandle]] = []
        self._pass: int | None = None
        self._open = False
        self._ran: list[int] = []
        self._ran_before: tuple[int, ...] = ()
        self._strayed = 0
        self._unfused = False
        self._followed: list[Follower] = []
        #: Whether everything is in memory and bound to stay, so that no call need be followed.
        self.settled = False
        self._settled: list[BoundHandle] = []
        self._waker: Wake | None = None
        self.example_inputs = example_inputs
        self.install()

    @property
    def model_name(self) -> str:
        """Return the name of the module's class."""
        return type(self.prepared.module).__name__

    @property
    def full_order(self) -> tuple[int, ...]:
        """Return the order of one pass. What is resident is visited first and last: it is used throughout."""
        return (*self.resident, *self.order, *self.resident)

    @property
    def unvisited_nbytes(self) -> int:
        """Return the bytes of the segments that the order of a pass leaves out."""
        left = set(self.streamed) - set(self.order)
        return sum(self.prepared.layouts[self.prepared.parts[i].name].nbytes for i in left)

    # -- its calls ---------------------------------------------------------------------------

    def install(self, finer: int | None = None) -> None:
        """Find the module's order, put stand-ins in place and follow calls.

        With `finer`, undo that first and cut anew: no segment above so many bytes, where it can be helped.
        """
        self.finer = finer
        if finer is not None:
            self.restore()
            self.prepared.cut(finer)
        else:
            if self.example_inputs is not None:
                module, dtype_of = self.prepared.module, self.prepared.dtype_of
                self.rehearsal = rehearse(module, self.example_inputs, dtype_of, failed=self._unrehearsed)
            self.known = known_costs(self.prepared, self.example_inputs, self.session.variant, self.rehearsal)
            if self.guessed_for:
                self.known = replace(self.known, source=f"{self.known.source}; {self.guessed_for}")
        calls = None if self.rehearsal is None else self.rehearsal.calls
        self._index_parts(
            order_of_parts(self.prepared.module, self.prepared.parts, self.prepared.declared, calls)
        )
        self.prepared.install(self.session.where)
        self._attach()

    def _unrehearsed(self, error: Exception) -> None:
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.guessed_for = f"its example inputs do not run ({cause})"
        log.warning(
            "stage %r is planned by a guess until its first pass: %s; pass inputs of the shapes and dtypes "
            "of a call, or none",
            *(self.name, self.guessed_for),
        )

    def settle(self) -> bool:
        """Bind everything and follow no calls if all is in memory to stay; return whether it was."""
        handles = self._engine.everything()
        if handles is None or self.guessed or self._open or self.prepared.looks_at_grad:
            return False
        for handle in handles:
            assert isinstance(handle, BoundHandle)
            handle.bind()
            self._settled.append(handle)
        self._detach()
        self.settled = True
        return True

    def wake(self) -> None:
        """Have the next forward be followed again. Any thread."""
        if self.settled and self._waker is None:
            self._waker = Wake(self.prepared.module, self.model_name, self.unsettle)
            self._waker.attach()

    def unsettle(self) -> None:
        """Follow calls again. Compute thread, between forwards."""
        self._sleep()
        if self.settled:
            self.settled = False
            for handle in self._settled:
                handle.binding.give_up(handle)
            self._settled = []
            self._attach()

    def _sleep(self) -> None:
        if self._waker is not None:
            self._waker.remove()
            self._waker = None

    def _detach(self) -> None:
        for call in self._followed:
            call.remove()
        self._followed.clear()

    def remember(self, index: int) -> None:
        """Keep what was measured of stage number `index` for the plans of later runs."""
        seen = Seen.of(self.session.ledger.spans, index, self.pace)
        remember(self.prepared, self.example_inputs, self.session.variant, seen, self.rehearsal)

    def is_known(self) -> bool:
        """Return whether a block of each kind has run, and nothing but in the order that is planned."""
        astray = self.guessed and tuple(self._ran) != self.order[: len(self._ran)]
        return not astray and all(self._kinds[i] in self._seen for i in self.order)

    def restore(self) -> None:
        """Follow no more calls and give the module back as it was."""
        self._detach()
        self._sleep()
        self.prepared.restore()

    def _attach(self) -> None:
        """Follow the calls of the module, its blocks and what may be called by itself."""
        modules = dict(self.prepared.module.named_modules())
        entries = [self.prepared.parts[i].entry for i in self.streamed]
        self._hooked = {"", *(e for e in entries if e is not None), *self.prepared.outside}
        for path in self._hooked:
            self._follow(modules[path], path)

    def _index_parts(self, order: list[int] | None) -> None:
        parts = self.prepared.parts
        modules = dict(self.prepared.module.named_modules(remove_duplicate=False))
        layouts = self.prepared.layouts
        self._kinds = [(type(modules.get(p.entry or "")), layouts[p.name].bound_nbytes) for p in parts]
        self._part_at = {p.entry: i for i, p in enumerate(parts) if p.entry is not None}
        self.resident = [i for i, p in enumerate(parts) if p.resident]
        self.streamed = [i for i, p in enumerate(parts) if not p.resident]
        self.order = tuple(self.streamed if order is None else order)
        self.guessed = order is None

    def _follow(self, module: nn.Module, path: str) -> None:
        what = f"{self.model_name}.{path}" if path else self.model_name
        call = Follower(module, what, partial(self._enter, path), partial(self._leave, path))
        call.attach()
        self._followed.append(call)

    # -- calls -------------------------------------------------------------------------------

    def _enter(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Begin a call of the module itself (path ""), a block, or something that stays resident.

        Returns the inputs where compute is, if they had to be moved there.
        """
        if self._calls and (path == "" or self._in_use is not None) and not self._is_running():
            self._abandon()
        outermost = not self._calls or not self.session._is_inside()
        if outermost:
            self.session._enter(self)
            if path not in self._hooked:  # the session began, and cut this module finer
                self.session._leave()
                return None
        self._calls.append(path)
        if outermost:
            self._outermost = sys._getframe(1)  # the call that is followed
            self._refuse_gradients(args, kwargs)
            self._choose_as_resident()
        part = self._part_at.get(path)
        if part is not None and "" not in self._calls and self._ran[:1] == [part]:
            self.close_pass()
        if not self._open:
            self._open_pass(sum(t.nbytes for _, t in tensors_in((args, kwargs))))
        if part is not None:
            self._begin_visit(part)
        return self._moved(args, kwargs) if outermost else None

    def _leave(self, path: str, output: Any, failed: bool) -> None:
        """End a call, also one that raised; nothing to do for one that was refused on entering."""
        if not self._calls or not self.session._is_inside():
            return
        self._calls.pop()
        try:
            part = self._part_at.get(path)
            if part is not None:
                self._end_visit(part, output, failed)
            if path == "" and "" not in self._calls:
                self._end_forward(output, failed)
        finally:
            if not self._calls:
                self._outermost = None
                if self._unfused:
                    self._unfused = False
                    torch.backends.mha.set_fastpath_enabled(True)
                self.session._leave()

    def _choose_as_resident(self) -> None:
        """Have torch's attention not compute fused where its resident parameters would require grad."""
        if self.prepared.looks_at_grad and torch.is_grad_enabled():
            self._unfused = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)

    def _moved(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return inputs where compute is; None where that is the processor."""
        where = self.session.where
        if where == CPU:
            return None
        moved: tuple[Any, Any] = tree_map_only(torch.Tensor, lambda t: t.to(where), (args, kwargs))
        return moved

    def _is_running(self) -> bool:
        """Return whether the outermost call is still on the stack; an interrupt may end it unseen."""
        frame = sys._getframe() if self.session._is_inside() else self._outermost
        while frame is not None and frame is not self._outermost:
            frame = frame.f_back
        return frame is not None

    def _abandon(self) -> None:
        """Take back what an interrupted call left."""
        self._calls.clear()
        self._outermost = None
        self.close_pass(complete=False)
        self.session._leave()

    def _end_forward(self, output: Any, failed: bool) -> None:
        complete = False
        try:
            if not failed:
                self._check_result(output)
                complete = True
        finally:
            self.close_pass(complete)

    def _refuse_gradients(self, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for path, tensor in tensors_in((args, kwargs)):
            if tensor.requires_grad:
                raise ModelError(
                    f"an input of {self.model_name} ({path}) requires grad: the graph would keep weights "
                    "that are about to be replaced; call it under torch.no_grad() or detach the input"
                )

    # -- visits ------------------------------------------------------------------------------

    def _begin_visit(self, part: int) -> None:
        name = self.prepared.parts[part].name
        if self._in_use is not None:
            holder = self.prepared.parts[self._in_use[0]].name
            raise ModelError(
                f"module {name!r} is called while {holder!r} computes, and one of the two may have to go "
                "for the other; let the model name a module that holds both in a method stream_order()"
            )
        visit, handle = self._engine.acquire(self.name, name)
        assert isinstance(handle, BoundHandle)
        self._in_use = (part, visit, handle)
        handle.bind()
        self._ran.append(part)

    def _end_visit(self, part: int, output: Any, failed: bool) -> None:
        if self._in_use is None or self._in_use[0] != part:
            return
        _, visit, handle = self._in_use
        try:
            if not failed:
                handle.binding.check(output, self.prepared.parts[part].entry or self.name)
        finally:
            self._in_use = None
            handle.binding.unbind(handle)  # what is retained too: nobody outside may take its parameters
            del handle
            self._engine.release(visit)
            self._seen.add(self._kinds[part])
            self.session._end_visit(self)

    # -- passes ------------------------------------------------------------------------------

    @property
    def _engine(self) -> Engine:
        engine = self.session._engine
        assert engine is not None
        return engine

    def _open_pass(self, inputs_nbytes: int) -> None:
        self._pass = self._engine.begin_pass(self.name)
        self.session._begin_pass(self, self._pass == 0, inputs_nbytes)
        self._open = True
        self._ran.clear()
        self.session._observe_pass(self, self._pass, started=True)
        for i in self.resident:
            visit, handle = self._engine.acquire(self.name, self.prepared.parts[i].name)
            assert isinstance(handle, BoundHandle)
            self._kept.append((visit, handle))
            handle.bind()

    def close_pass(self, complete: bool = True) -> None:
        """End the pass that is open: what was resident in it may go if it was the last.

        Nothing is learnt from the order of one that is not `complete`.
        """
        if not self._open:
            return
        self._open = False
        try:
            for _, handle in self._kept if complete else ():
                handle.binding.check(None, self.model_name)
        finally:
            self._release_pass(complete)

    def _release_pass(self, complete: bool) -> None:
        if self._in_use is not None:  # an interrupted forward
            self._engine.release(self._in_use[1])
            self._in_use = None
        for visit, handle in self._kept:
            handle.binding.unbind(handle)
            self._engine.release(visit)
        self._kept.clear()
        self._engine.end_pass(self.name, self._pass)
        self.session._observe_pass(self, self._pass, started=False)
        if complete and self._ran and self._pass is not None:
            self._learn()

    def _learn(self) -> None:
        """Compare the order that ran with the planned one; have the session plan anew."""
        ran = tuple(self._ran)
        astray = ran != self.order
        settled = self.guessed or ran == self._ran_before
        if astray and settled:
            self.order = ran
        self.session._replan(self, reordered=astray and settled)
        self._strayed = self._strayed + 1 if astray and not settled else 0
        if self._strayed == 2:
            log.warning(
                "stage %r runs its segments in another order in every pass (pass %s ran %d, the plan has "
                "%d); what is not next is loaded on demand, which is correct but not overlapped",
                self.name,
                self._pass,
                len(ran),
                len(self.order),
            )
        self.guessed = False
        self._ran_before = ran

    def _check_result(self, output: Any) -> None:
        """Refuse a result that shares memory with the arena, or has none."""
        arena = self.session.memory
        assert arena is not None
        for path, tensor in tensors_in(output):
            if tensor.is_meta:
                raise ModelError(
                    f"output{path} of {self.model_name} is on meta: it was computed from a "
                    "weight or buffer that is not loaded; report the module that made it"
                )
            address = address_of(tensor)
            if address is not None and arena.address <= address < arena.address + arena.nbytes:
                raise AliasError(
                    f"output{path} of {self.model_name} shares memory with its weights, which "
                    "may be replaced; return a copy (.clone())"
                )
