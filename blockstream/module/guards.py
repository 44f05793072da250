"""What stands among a module's own attributes while it streams.

Calls are followed by way of `_call_impl`, which `nn.Module.__call__` looks up on the module itself: a
module that looks at its hooks before it chooses how to compute (torch's encoder layers do) finds none of
ours, and an exception or interrupt leaves a call as surely as its end. A module that was compiled is called
by another way, `_compiled_call_impl`, and followed there: torch.compile traces what is followed, never who
follows. What would change or copy the weights is refused whole, before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.errors import ModelError

from .adapters import asks_names, writes_adapters_alone

#: The attribute by which calls are followed, and the one of a compiled module.
CALL = "_call_impl"
COMPILED = "_compiled_call_impl"
_frames = torch._C._dynamo.eval_frame


def _untraced(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have torch.compile pass over a method; what it calls is traced."""
    if hasattr(_frames, "skip_code"):  # as older versions of torch have it
        _frames.skip_code(method.__code__)
    elif hasattr(_frames, "set_code_exec_strategy"):
        strategy = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)
        _frames.set_code_exec_strategy(method.__code__, strategy)
    why = "blocks are on disk, and each is a graph of its own: leave fullgraph out, or compile blocks"
    method._torchdynamo_disable, method._torchdynamo_disable_msg = True, why  # type: ignore[attr-defined]
    return method


class Guard:
    """Something of ours in a module's `__dict__`. It goes into no copy and no pickle."""

    def __init__(self, module: nn.Module, what: str) -> None:
        self.module = module
        #: The module's name in errors.
        self.what = what

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            f"{self.what} is streamed: parameter by parameter its weights are on disk, and it is neither "
            "copied nor pickled; copy its checkpoint's files, or the module before it is streamed"
        )


class Link(Guard):
    """One of those that follow a module's calls, each around those attached before it."""

    def attach(self) -> None:
        """Follow calls from now on."""
        way = _way(self.module)
        inner = self.module.__dict__.get(way)
        self.run: Callable[..., Any] = inner or type(self.module)._call_impl.__get__(self.module)
        self.module.__dict__[way] = self

    def remove(self) -> None:
        """Follow no more, whoever was attached since. Idempotent."""
        inner: Any = self
        way = _way(self.module)
        link: Any = self.module.__dict__.get(way)
        if link is self:
            if isinstance(self.run, Guard) or way == COMPILED:
                self.module.__dict__[way] = self.run
            else:
                del self.module.__dict__[way]
        while isinstance(link, Link):
            if link.run is inner:
                link.run = self.run
            link = link.run


class Follower(Link):
    """Follows a module's calls: `enter(args, kwargs)` before, `leave(output, failed)` after each.

    What `enter` returns, if anything, are the arguments the call goes on with; `sent` makes the result of its
    output.
    Hooks of the user's run within. `leave` is called however the call ends, one that `enter` refused too.
    """

    def __init__(
        self,
        module: nn.Module,
        what: str,
        enter: Callable[[Any, Any], tuple[Any, Any] | None],
        leave: Callable[[Any, bool], None],
        sent: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        super().__init__(module, what)
        self._enter, self._leave, self._sent = enter, leave, sent

    @_untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        output, failed = None, True
        tracer = _frames.set_eval_frame(None)
        try:
            args, kwargs = self._enter(args, kwargs) or (args, kwargs)
            _frames.set_eval_frame(tracer)
            output = self.run(*args, **kwargs)
            failed = False
        finally:
            _frames.set_eval_frame(None)
            try:
                self._leave(output, failed)
                output = output if failed else self._sent(output)
            finally:
                _frames.set_eval_frame(tracer)
        return output


class Untraced(Link):
    """Keeps torch.compile out of a module's calls: what reads from files as it computes is in no graph."""

    @_untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        tracer = _frames.set_eval_frame(None)
        try:
            return self.run(*args, **kwargs)
        finally:
            _frames.set_eval_frame(tracer)


class Wake(Link):
    """Calls `wake` before the module's next call that is `due`, which then goes the way that `wake` left."""

    def __init__(
        self,
        module: nn.Module,
        what: str,
        wake: Callable[[], None],
        due: Callable[[Any, Any], bool] = lambda args, kwargs: True,
    ) -> None:
        super().__init__(module, what)
        self._wake, self._due = wake, due

    @_untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Wake, then call the module."""
        tracer = _frames.set_eval_frame(None)
        try:
            if is_due := self._due(args, kwargs):
                self.remove()
                self._wake()
        finally:
            _frames.set_eval_frame(tracer)
        return (self.module if is_due else self.run)(*args, **kwargs)


class _CompiledInside(Guard):
    """In the place of `compile`: the module is compiled, and those who follow its calls stay outside."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        module, way = self.module, _way(self.module)
        inside = (m for m in module.modules() if m is not module)
        if is_item(self.what) and any(isinstance(m.__dict__.get(_way(m)), Link) for m in inside):
            raise ModelError(
                f"{self.what} is streamed in pieces, and compiled as one it would round as they do not; "
                "compile it before the first call, which keeps it whole, or compile its pieces"
            )
        compiled = torch.compile(type(module)._call_impl.__get__(module), *args, **kwargs)
        link: Any = module.__dict__.pop(way, None)
        module.__dict__[COMPILED] = link if isinstance(link, Link) else compiled
        while isinstance(link, Link):
            if not isinstance(link.run, Link):
                link.run = compiled
            link = link.run


class _Unmoved(Guard):
    """In the place of `_apply`, by which `.to`, `.half`, `.cuda` and `share_memory` change tensors."""

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = [*self.module.parameters(recurse), *self.module.buffers(recurse)]
        for dtype, dim, device in dict.fromkeys(
            (t.dtype, t.dim(), "cpu" if t.is_meta else t.device) for t in tensors
        ):
            probe = torch.empty((2,) * dim, dtype=dtype, device=device)
            if fn(probe) is not probe or probe.is_shared():  # type: ignore[no-untyped-call]
                raise ModelError(
                    f"{self.what} is streamed: its weights come from its checkpoint's files at every load, "
                    "and its dtype, device and memory format stay; nothing was changed. Name the dtype where "
                    'it is opened (dtype="bf16"), and bring the inputs to that of the model'
                )
        return self.module


class _Frozen(Guard):
    """In the place of `requires_grad_`: weights that are read from files are not trained."""

    def __call__(self, requires_grad: bool = True) -> nn.Module:
        if requires_grad:
            raise ModelError(
                f"{self.what} is streamed: its weights are read-only and cannot be trained; nothing was "
                "changed"
            )
        for param in self.module.parameters():
            param.requires_grad = False
        return self.module


class _Unloaded(Guard):
    """In the place of `load_state_dict`."""

    def __call__(self, state_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
        if writes_adapters_alone(self.module, state_dict):
            return type(self.module).load_state_dict(self.module, state_dict, *args, **kwargs)
        raise ModelError(
            f"{self.what} is streamed: the next load would lose what is written to its weights; nothing was "
            "changed. Save the state dict to a file and stream the module from that"
        )


class _Unsaved(Guard):
    """In the place of `state_dict`: only names and shapes can be given (`keep_vars=True`)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("keep_vars") and asks_names():
            kwargs["keep_vars"], args = True, args[:2]
        if kwargs.get("keep_vars") or (len(args) > 2 and args[2]):
            return type(self.module).state_dict(self.module, *args, **kwargs)
        raise ModelError(
            f"{self.what} is streamed: its state dict would hold all its weights in memory; copy its "
            "checkpoint's files, or name keep_vars=True for names and shapes alone"
        )


class Closed:
    """Refuses calls of a module whose session is over, as long as its own parameters are on meta."""

    def __init__(self, module: nn.Module, what: str) -> None:
        self.module, self.what = module, what
        self._way = _way(module)
        #: What it stands before: the call of a compiled module.
        self._inner = module.__dict__.get(self._way)
        module.__dict__[self._way] = self

    @_untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ModelError, or call the module if it has been given weights since."""
        if not any(p.is_meta for p in self.module.parameters()):
            self.remove()
            return self.module(*args, **kwargs)
        raise ModelError(
            f"{self.what} was streamed and that has ended: its weights are not in memory; call it inside the "
            "with block, or stream it again"
        )

    def remove(self) -> None:
        """Refuse no more."""
        if self.module.__dict__.get(self._way) is self:
            del self.module.__dict__[self._way]
            if self._inner is not None:
                self.module.__dict__[self._way] = self._inner


_GUARDS: dict[str, type[Guard]] = {
    "compile": _CompiledInside,
    "_apply": _Unmoved,
    "requires_grad_": _Frozen,
    "load_state_dict": _Unloaded,
    "state_dict": _Unsaved,
}


def guard(root: nn.Module) -> None:
    """Guard a module that is about to stream, and all in it that has parameters."""
    for path, module in _with_parameters(root):
        for name, kind in _GUARDS.items():
            module.__dict__[name] = kind(module, _name(root, path))


def unguard(root: nn.Module) -> None:
    """Take all guards away. Idempotent."""
    for module in root.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Guard):
                del module.__dict__[name]


def shut(root: nn.Module) -> None:
    """Have a module whose parameters are on meta again refuse to be called, by name."""
    for path, module in _with_parameters(root):
        closed = isinstance(module.__dict__.get(_way(module)), Closed) or CALL in module.__dict__
        if not closed and any(p.is_meta for p in module.parameters()):
            Closed(module, _name(root, path))


def reopen(root: nn.Module) -> None:
    """Undo `shut`. Idempotent."""
    for module in root.modules():
        for way in (CALL, COMPILED):
            closed = module.__dict__.get(way)
            if isinstance(closed, Closed):
                closed.remove()


def left_out(root: nn.Module) -> dict[int, None]:
    """Return what a deep copy of a module leaves out, as its memo: `strip` the copy of what stands there."""
    return {id(v): None for m in root.modules() for v in m.__dict__.values() if isinstance(v, Guard)}


def strip(copy: nn.Module) -> None:
    """Remove from a deep copy the attributes that `left_out` left empty."""
    for module in copy.modules():
        for name in (CALL, COMPILED, *_GUARDS):
            if name in module.__dict__ and module.__dict__[name] is None:
                del module.__dict__[name]


def _with_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in root.named_modules():
        if not path or next(module.parameters(), None) is not None:
            yield path, module


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled as one: what is inside it is not called by itself."""
    return module.__dict__.get(COMPILED) is not None or type(module).__name__ == "OptimizedModule"


def is_item(path: str) -> bool:
    """Return whether a path leads to an item of a list, or into one."""
    return any(name.isdigit() for name in path.split("."))


def _way(module: nn.Module) -> str:
    """Return the attribute by which a module is called."""
    return COMPILED if module.__dict__.get(COMPILED) is not None else CALL


def _name(root: nn.Module, path: str) -> str:
    return f"{type(root).__name__}.{path}" if path else type(root).__name__
