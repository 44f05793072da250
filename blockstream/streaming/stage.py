"""One streamed module: its calls, and the passes they begin and end.

A pass is one forward of the module. What is called outside it (an encoder by itself, a decode
method) belongs to the pass that follows, or begins another when its first segment comes round again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from copy import copy
from dataclasses import fields, is_dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from blockstream.engine.store import Handle
from blockstream.errors import ModelError
from blockstream.module.binding import BoundHandle, tensors_in, trained_beside
from blockstream.module.experts import Experts
from blockstream.module.faking import Call
from blockstream.module.guards import Follower, Link, Untraced, Wake
from blockstream.module.prepared import CPU, Cut, Prepared

from .needs import LARGER
from .runtime import Runtime
from .visits import Pass


class StreamedStage:
    """The compute side of one stage: calls of its modules, followed, lead to a runtime."""

    def __init__(self, runtime: Runtime, prepared: Prepared, where: torch.device = CPU) -> None:
        """Compute will be `where`."""
        self._runtime, self._where = runtime, where
        self.prepared = prepared
        #: Whether the inputs of the call came from the processor, and whether any call's had to be moved.
        self._is_away = self.moves_inputs = False
        #: Whether everything is in memory and bound to stay, so that no call need be followed.
        self.settled = False
        self._settled: list[BoundHandle] = []
        self._part_at: dict[str, int] = {}
        self._paths: set[str] = set()
        self._followed: list[Link] = []
        self._waker: Wake | None = None
        self._growth: list[Wake] = []
        self._largest_nbytes = 0
        self._calls: list[str] = []
        self._outermost: FrameType | None = None
        self._pass: Pass | None = None
        self._unfused = False
        #: Whether the forward that runs was called where graphs are kept.
        self.without_grad = False
        #: Whether any weight requires grad, as those of a module do that nobody has frozen.
        self._is_trained = any(p.requires_grad for p in prepared.module.parameters())
        self._install()

    @property
    def name(self) -> str:
        """Return the stage's name."""
        return self.prepared.name

    @property
    def model_name(self) -> str:
        """Return the name of the module's class."""
        return type(self.prepared.module).__name__

    @property
    def is_between_passes(self) -> bool:
        """Return whether no pass has begun and not ended."""
        return self._pass is None

    # -- its calls -------------------------------------------------------------------------------

    def recut(self, cut: Cut) -> None:
        """Cut the module anew, before anything of it has been loaded."""
        self.restore()
        self.prepared.use(cut)
        self._install()

    def _install(self) -> None:
        """Put stand-ins in place and follow calls."""
        parts = self.prepared.parts
        self._part_at = {p.entry: i for i, p in enumerate(parts) if p.entry is not None}
        self._paths = {"", *self._part_at, *_callable_parents(self._part_at), *self.prepared.outside}
        self.prepared.install(self._where)
        self._attach()

    def settle(self, handles: Iterable[Handle], watched: bool = False) -> None:
        """Bind everything, which is in memory to stay, and follow no calls.

        With `watched` a call of larger inputs than any before is followed again; so is one where graphs are
        kept.
        """
        for handle in handles:
            assert isinstance(handle, BoundHandle)
            handle.bind()
            self._settled.append(handle)
        self._detach()
        self.settled = True
        for path in ("", *_callable_parents(self._part_at)):
            module = self.prepared.module.get_submodule(path)
            due = partial(self._is_due, watched)
            self._growth.append(Wake(module, self.model_name, self.unsettle, due))
            self._growth[-1].attach()

    def _is_due(self, watched: bool, args: Any, kwargs: Any) -> bool:
        """Return whether a call of a settled module is to be followed; ModelError for one that is traced."""
        self._refuse_tracing()
        if self._is_trained and torch.is_grad_enabled():
            return True
        return watched and _nbytes((args, kwargs)) > LARGER * self._largest_nbytes

    def wake(self) -> None:
        """Have the next forward be followed again. Any thread."""
        if self.settled and self._waker is None:
            self._waker = Wake(self.prepared.module, self.model_name, self.unsettle)
            self._waker.attach()

    def unsettle(self) -> None:
        """Follow calls again. Compute thread, between forwards.

        Raises ModelError, once, if weights were changed since: the next load brings those of the checkpoint.
        """
        self._sleep()
        if self.settled:
            self.settled = False
            lost = [what for handle in self._settled if (what := handle.binding.give_up(handle))]
            self._settled = []
            self._attach()
            if lost:
                raise ModelError(
                    f"{self.model_name}: {lost[0]} while all its weights were in memory, and is lost once "
                    "they are read from its checkpoint again; write what you changed to one and stream that"
                )

    def _sleep(self) -> None:
        while self._growth:
            self._growth.pop().remove()
        if self._waker is not None:
            self._waker.remove()
            self._waker = None

    def restore(self) -> None:
        """Follow no more calls and give the module back as it was. Idempotent."""
        self._detach()
        self._sleep()
        self.prepared.restore()

    def _attach(self) -> None:
        """Follow the calls of the module, its blocks, what holds them, and what may be called by itself."""
        modules = dict(self.prepared.module.named_modules())
        for path in self._paths & modules.keys():
            self._follow(modules[path], path)
        for path in self.prepared.tables:
            self._keep_untraced(modules[path.rpartition(".")[0]])
        for number, each in enumerate(self.prepared.experts):
            self._keep_untraced(modules[each.path])
            self._follow_experts(modules[each.path], number, each)

    def _detach(self) -> None:
        for call in self._followed:
            call.remove()
        self._followed.clear()

    def _follow(self, module: nn.Module, path: str) -> None:
        what = f"{self.model_name}.{path}" if path else self.model_name
        call = Follower(module, what, partial(self._enter, path), partial(self._leave, path), self._sent)
        call.attach()
        self._followed.append(call)

    def _keep_untraced(self, module: nn.Module) -> None:
        self._followed.append(Untraced(module, self.model_name))
        self._followed[-1].attach()

    def _follow_experts(self, module: nn.Module, number: int, experts: Experts) -> None:
        """Have the experts that a router chose be read as its module is called."""

        def enter(args: Any, kwargs: Any) -> None:
            if (shelf := self.prepared.shelf) is not None:
                shelf.expect(number, experts.chosen((args, kwargs)))

        def leave(output: Any, failed: bool) -> None:
            if (shelf := self.prepared.shelf) is not None:
                shelf.give_up()

        call = Follower(module, f"{self.model_name}.{experts.path}", enter, leave)
        call.attach()
        self._followed.append(call)

    # -- calls -------------------------------------------------------------------------------

    def _enter(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Begin a call of the module itself (path ""), a block, or something that stays resident.

        Returns the inputs where compute is, if they had to be moved there.
        """
        is_block = self._pass is not None and self._pass.is_computing
        if self._calls and (path == "" or is_block) and not self._is_running():
            self._abandon()
        outermost = not self._calls or not self._runtime.is_inside()
        if outermost:
            self._refuse_tracing()
            self._runtime.enter(self.name, Call(args, kwargs), path)
            if path not in self._paths:  # the session began, and cut this module finer
                self._runtime.leave()
                return None
        self._calls.append(path)
        if outermost:
            self._outermost = sys._getframe(1)  # the call that is followed
            self._refuse_gradients(args, kwargs)
            self._choose_as_resident()
        part = self._part_at.get(path)
        comes_round = self._pass is not None and self._pass.ran[:1] == [part]
        if comes_round and "" not in self._calls:
            self.end_pass()
        if self._pass is None:
            self._largest_nbytes = max(self._largest_nbytes, _nbytes((args, kwargs)))
            self._pass = self._runtime.begin_pass(self.name, Call(args, kwargs), path)
        if part is not None:
            self._pass.begin_visit(part)
        return self._moved(args, kwargs) if outermost else None

    def _leave(self, path: str, output: Any, failed: bool) -> None:
        """End a call, also one that raised; nothing to do for one that was refused on entering."""
        if not self._calls or not self._runtime.is_inside():
            return
        self._calls.pop()
        try:
            part = self._part_at.get(path)
            if part is not None and self._pass is not None:
                self._pass.end_visit(part, output, failed)
            if path == "" and "" not in self._calls:
                self._end_forward(output, failed)
        finally:
            if not self._calls:
                self._outermost = None
                self._let_grad()
                self._runtime.leave()

    def _choose_as_resident(self) -> None:
        """Keep no graph of weights that require grad, and compute what is computed where one is kept.

        torch's attention does not compute fused there.
        """
        if self._is_trained and torch.is_grad_enabled():
            torch.set_grad_enabled(False)
            self.without_grad = True
            if self.prepared.looks_at_grad:
                self._unfused = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)

    def _let_grad(self) -> None:
        """Undo it."""
        if self._unfused:
            torch.backends.mha.set_fastpath_enabled(True)
        if self.without_grad:
            torch.set_grad_enabled(True)
        self._unfused = self.without_grad = False

    def end_pass(self, complete: bool = True) -> None:
        """End the pass that has begun, if one has."""
        ending, self._pass = self._pass, None
        if ending is not None:
            ending.end(complete)

    def _end_forward(self, output: Any, failed: bool) -> None:
        complete = False
        try:
            if not failed and self._pass is not None:
                self._pass.check_result(output)
                complete = True
        finally:
            self.end_pass(complete)

    def _moved(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return inputs where compute is; None where they are there.

        What comes from the processor alone gets its outputs back there.
        """
        found = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self._is_away = found == {CPU} and self._where != CPU
        if found <= {self._where}:
            return None
        self.moves_inputs = True
        moved: tuple[Any, Any] = sent_to(self._where, (args, kwargs))
        return moved

    def _sent(self, output: Any) -> Any:
        """Return the output of a call, on the processor if that is where its inputs were."""
        if not self._is_away or self._calls:
            return output
        self._is_away = False
        return sent_to(CPU, output)

    def _is_running(self) -> bool:
        """Return whether the outermost call is still on the stack; an interrupt may end it unseen."""
        frame = sys._getframe() if self._runtime.is_inside() else self._outermost
        while frame is not None and frame is not self._outermost:
            frame = frame.f_back
        return frame is not None

    def _abandon(self) -> None:
        """Take back what an interrupted call left."""
        self._calls.clear()
        self._outermost = None
        self.without_grad = False  # whether graphs are kept is for who calls now to say
        self._let_grad()
        self.end_pass(complete=False)
        self._runtime.leave()

    def _refuse_tracing(self) -> None:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise ModelError(
                f"{self.model_name} is streamed: a trace of it would keep memory that holds its weights only "
                "while it streams; trace the module with its weights in memory, before it is streamed"
            )

    def _refuse_gradients(self, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for path, tensor in tensors_in((args, kwargs)):
            if tensor.requires_grad:
                raise ModelError(
                    f"an input of {self.model_name} ({path}) requires grad: the graph would keep weights "
                    "that are about to be replaced; call it under torch.no_grad() or detach the input"
                )
        if (beside := trained_beside(self.prepared.outer, self.prepared.matched.computed)) is not None:
            raise ModelError(
                f"parameter {beside!r} of {self.model_name} requires grad: the graph would keep weights that "
                "are about to be replaced; call it under torch.no_grad(), or freeze it"
            )


def sent_to(where: torch.device, value: Any) -> Any:
    """Return a value with its tensors on a device.

    A container that has none elsewhere stays the same object: a cache that a forward fills is the caller's.
    """
    if isinstance(value, torch.Tensor):
        return value.to(where)
    if type(value) in (list, tuple):
        made = [sent_to(where, x) for x in value]
        return value if all(a is b for a, b in zip(made, value, strict=True)) else type(value)(made)
    if type(value) is dict:
        found = {key: sent_to(where, x) for key, x in value.items()}
        return value if all(found[key] is x for key, x in value.items()) else found
    leaves = tree_leaves(value)
    if is_dataclass(value) and not isinstance(value, type) and len(leaves) == 1 and leaves[0] is value:
        held = {f.name: getattr(value, f.name) for f in fields(value)}
        if (sent := sent_to(where, held)) is held:
            return value
        made_anew: Any = copy(value)
        for name, x in sent.items():
            object.__setattr__(made_anew, name, x)
        return made_anew
    if all(t.device == where for t in leaves if isinstance(t, torch.Tensor)):
        return value
    return tree_map_only(torch.Tensor, lambda t: t.to(where), value)


def _nbytes(inputs: Any) -> int:
    return sum(tensor.nbytes for _, tensor in tensors_in(inputs))


def _callable_parents(entries: Iterable[str]) -> set[str]:
    """Return the paths of the modules that hold lists of blocks: one of them may be called by itself."""
    names = (path.split(".") for path in entries)
    return {
        ".".join(parts[:n]) for parts in names for n in range(1, len(parts)) if not parts[n - 1].isdigit()
    }
