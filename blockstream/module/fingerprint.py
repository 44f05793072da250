"""What a forward without data depends on, as a digest: classes and their code, attributes, shapes and dtypes.

Values of tensors do not count, as fake ones have none. What cannot be told apart soundly has no digest.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import pathlib
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .guards import Guard
from .narrow import Narrow
from .standins import Absent

#: Objects looked at, at most: what leads to more (a tokenizer, a session) has no fingerprint.
MOST_OBJECTS = 300_000
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, pathlib.PurePath)
_VALUES = (*_PLAIN, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
#: What torch keeps in a module's `__dict__`; hooks are left out of a rehearsal.
_OWN = frozenset(nn.Module().__dict__) - {"training"}
_LruCache = type(functools.lru_cache(lambda: None))
_BUILTIN = (types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType)


@dataclass(frozen=True)
class Fingerprint:
    """A digest; `lasting`: another process with the same files would give the same one."""

    digest: str
    lasting: bool


class _UnknownError(Exception):
    """Something whose content cannot be told."""


def fingerprint(
    module: nn.Module, call: Any, weight_of: Callable[[str], nn.Parameter] | None = None
) -> Fingerprint | None:
    """Return what a forward of the module with the arguments of a call depends on; None if it cannot be told.

    `weight_of` makes by path an empty parameter as it will be.
    """
    walk = _Walk()
    try:
        walk.say(torch.__version__, sys.version, *_switches())
        walk.root(module, weight_of)
        walk.feed((call.args, dict(call.kwargs)))
    except (_UnknownError, RecursionError):
        return None
    lasting = walk.lasting and all(map(walk.say_source, sorted(walk.sources | {__name__})))
    return Fingerprint(walk.digest(), lasting)


def _switches() -> tuple[object, ...]:
    """Return the switches of torch's that choose how a forward on the processor computes."""
    sdp: Any = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        (sdp.flash_sdp_enabled(), sdp.math_sdp_enabled(), sdp.mem_efficient_sdp_enabled()),
        torch.backends.mkldnn.enabled,
    )


class _Walk:
    """Feeds a hash with what objects are made of, each once."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=20)
        self._met: dict[int, int] = {}
        self._types: dict[type, int] = {}
        self._storages: dict[int, int] = {}
        self._alive: list[Any] = []
        self.lasting = True
        #: The Python modules whose code was met.
        self.sources: set[str] = set()

    def digest(self) -> str:
        return self._hash.hexdigest()

    def say(self, *words: object) -> None:
        for word in words:
            self._hash.update(str(word).encode("utf-8", "surrogatepass"))
            self._hash.update(b"\0")

    def root(self, module: nn.Module, weight_of: Callable[[str], nn.Parameter] | None) -> None:
        """Feed a module, its parameters as they will be."""
        for path, param in module.named_parameters(remove_duplicate=False):
            made = param if weight_of is None else weight_of(path)
            self.say(path, made.dtype, tuple(made.shape), made.requires_grad)
            if isinstance(made, Narrow):
                self.feed(made.spec)
        self.feed(module)

    def say_source(self, name: str) -> bool:
        """Say the version of the file that a Python module comes from; False if there is none."""
        found = _source(_package(name), name)
        self.say(name, found)
        return found is not None

    def feed(self, x: Any) -> None:
        """Feed one object and what it leads to."""
        if isinstance(x, enum.Enum):
            self._type(type(x))
            self.say(x.name)
        elif isinstance(x, _VALUES):
            self.say(type(x).__name__, repr(x))
        elif (met := self._met.get(id(x))) is not None:
            self.say("again", met)
        else:
            self._met[id(x)] = len(self._met)
            self._alive.append(x)
            if len(self._met) > MOST_OBJECTS:
                raise _UnknownError
            self._new(x)

    def _new(self, x: Any) -> None:
        if isinstance(x, Tensor):
            self._tensor(x)
        elif isinstance(x, type):
            self._type(x)
        elif isinstance(x, nn.Module):
            self._module(x)
        elif isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, types.MethodType):
            self._all("method", x.__self__, x.__func__)
        elif isinstance(x, functools.partial):
            self._all("partial", x.func, x.args, x.keywords)
        elif isinstance(x, _LruCache | staticmethod | classmethod):
            self._all("wrapped", x.__wrapped__)
        elif isinstance(x, property):
            self._all("property", x.fget)
        elif isinstance(x, _BUILTIN):
            self.say(x.__qualname__)
        elif isinstance(x, types.ModuleType):
            self.say("module", x.__name__)
        elif isinstance(x, weakref.ref):
            self._all("weak", x())
        else:
            self._object(x)

    def _all(self, kind: str, *parts: Any) -> None:
        self.say(kind, len(parts))
        for part in parts:
            self.feed(part)

    def _tensor(self, x: Tensor) -> None:
        self.say("tensor", x.dtype, tuple(x.shape), x.device.type)
        if isinstance(x, Absent):
            return
        if type(x) not in (Tensor, nn.Parameter):
            self._type(type(x))
        elif x.layout == torch.strided:
            key = x.untyped_storage()._cdata
            self.say(x.stride(), self._storages.setdefault(key, len(self._storages)))

    def _module(self, x: nn.Module) -> None:
        own = {k: v for k, v in x.__dict__.items() if k not in _OWN and not isinstance(v, Guard)}
        self._type(type(x))
        self._all("module", own, x._parameters, x._buffers, x._modules)

    def _object(self, x: Any) -> None:
        if isinstance(x, Mapping):
            self.say("mapping", len(x))
            for key, value in x.items():
                self.feed(key)
                self.feed(value)
        elif isinstance(x, list | tuple):
            self._all("sequence", *x)
        elif isinstance(x, set | frozenset):
            self._all("set", *sorted(x, key=repr))
        kind = type(x)
        if kind.__module__ == "builtins":
            if not isinstance(x, dict | list | tuple | set | frozenset):
                raise _UnknownError
            return
        self._type(kind)
        slots = [s for c in kind.__mro__ for s in _slots(c)]
        if not hasattr(x, "__dict__") and not slots and not isinstance(x, Mapping | tuple | list):
            raise _UnknownError
        self.feed(dict(getattr(x, "__dict__", {})))
        for name in slots:
            self.feed(getattr(x, name, None))

    def _type(self, kind: type) -> None:
        """Feed a class: its bases, code and plain attributes; torch's and Python's are known by name."""
        if (met := self._types.get(kind)) is not None:
            self.say("type", met)
            return
        self._types[kind] = len(self._types)
        for c in kind.__mro__:
            self.say(c.__module__, c.__qualname__)
            if _package(c.__module__) in ("torch", "builtins", "typing", "abc", "collections"):
                continue
            if c is not kind and c in self._types:
                continue
            self._types.setdefault(c, len(self._types))
            self._of_source(c.__module__, c.__qualname__)
            for name, value in vars(c).items():
                if isinstance(value, _PLAIN) and not name.startswith("__"):
                    self.say(name, repr(value))
                elif isinstance(value, types.FunctionType):
                    self.say(name, _code(value.__code__))
            if isinstance(forward := vars(c).get("forward"), types.FunctionType):
                self.feed(forward)

    def _function(self, x: types.FunctionType) -> None:
        self._of_source(x.__module__, x.__qualname__)
        self.say("function", _code(x.__code__))
        self._all("defaults", x.__defaults__, x.__kwdefaults__)
        for cell in x.__closure__ or ():
            try:
                self.feed(cell.cell_contents)
            except ValueError:  # not filled yet
                self.say("empty")
        for name in x.__code__.co_names:
            value = x.__globals__.get(name)
            if isinstance(value, _PLAIN):
                self.say(name, repr(value))
            elif isinstance(value, types.FunctionType):
                if _package(value.__module__) == _package(x.__module__):
                    self.feed(value)
                else:
                    self.say(name, _code(value.__code__))

    def _of_source(self, module: str | None, qualname: str) -> None:
        if not module or module == "__main__" or "<locals>" in qualname:
            self.lasting = False
        else:
            self.sources.add(module)


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _slots(c: type) -> tuple[str, ...]:
    slots = c.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__"))


@lru_cache(maxsize=4096)
def _code(code: types.CodeType) -> str:
    """Return a digest of what code does, the same in every process: the order of a set's items is not."""
    consts = [_code(c) if isinstance(c, types.CodeType) else _const(c) for c in code.co_consts]
    parts = (code.co_code, consts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _const(value: Any) -> Any:
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


@lru_cache(maxsize=1024)
def _source(package: str, name: str) -> str | None:
    """Return what changes when code of a Python module does; None if it lies in no file.

    A package in a folder of one's own is taken whole: a function that its classes call may lie anywhere.
    """
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return None
    root = getattr(sys.modules.get(package), "__file__", None)
    if root is None or "site-packages" in root or os.path.basename(root) != "__init__.py":
        return _stamp(file)
    return _folder(os.path.dirname(root))


@lru_cache(maxsize=64)
def _folder(folder: str) -> str:
    files = sorted(pathlib.Path(folder).rglob("*.py"))
    return hashlib.blake2b(" ".join(map(_stamp, files)).encode(), digest_size=16).hexdigest()


def _stamp(file: str | pathlib.Path) -> str:
    try:
        found = os.stat(file)
    except OSError:
        return f"{file} is gone"
    return f"{found.st_mtime_ns} {found.st_size}"
