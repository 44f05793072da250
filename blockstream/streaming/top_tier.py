"""The tier that modules compute from: what a session has to build to run on some memory.

The processor's is `HostTier`: an engine over files, and an arena. A device's is `TowerTier`: an engine over
an `UploadStore`, which is the engine of host memory's tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from blockstream.checkpoint.file_store import FileStore
from blockstream.checkpoint.read.reader import Reader
from blockstream.engine.arena import Arena
from blockstream.engine.engine import Engine
from blockstream.engine.spans import Span
from blockstream.module.binding import Binding
from blockstream.system.disks import requests

from .declared import Declared
from .shelves import Shelves

#: Told of the spans of loads or of visits.
OnSpan = Callable[[Span], None]


class TopTier(Protocol):
    """An engine, what it fills, and what modules bind from it. Compute thread only.

    `arena` is the memory of the host in which weights lie, `files` reads and counts, `where` compute is.
    """

    engine: Engine
    arena: Arena
    files: FileStore
    where: torch.device

    @property
    def shelves(self) -> Shelves:
        """Return the memory for experts that are read one by one."""

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's memory is that of weights."""

    def unbind(self) -> None:
        """Put stand-ins back for whatever is bound, in a forked child: what was loaded is its parent's."""

    def forget(self) -> None:
        """Drop the views of the memory, so that it can go: after the modules have been given back."""

    def close(self) -> None:
        """Stop reading, release every segment, close the files. Idempotent."""

    def device_report(self) -> Mapping[str, Any] | None:
        """Return what report.json says of a device; None for the processor."""


def open_files(arena: Arena, stages: Iterable[Declared]) -> FileStore:
    """Return the store that reads the stages' segments into an arena, the way this disk is fastest."""
    layouts = {s.name: s.prepared.layouts for s in stages}
    threads, request_nbytes = requests(
        f.path for x in layouts.values() for y in x.values() for f in y.files if f.source is None
    )
    return FileStore(arena, layouts, reader=Reader(threads=threads, request_nbytes=request_nbytes))


def unbind_all(bindings: Mapping[tuple[str, str], Binding]) -> None:
    """Put stand-ins back for whatever is bound."""
    for binding in bindings.values():
        binding.unbind(binding.bound_by)


def forget_all(bindings: Mapping[tuple[str, str], Binding]) -> None:
    """Drop all views."""
    for binding in bindings.values():
        binding.forget()
