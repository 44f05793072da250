"""Stream a module beside its resident twin."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import blockstream
import blockstream.nn.session as session_module
from blockstream.checkpoint.store import FileStore
from blockstream.plan import least_arena

from .models import aligned, save


@pytest.fixture
def twins(tmp_path):
    """Return make(factory) -> (resident module, checkpoint of its weights)."""

    def make(factory: Callable[[], nn.Module]):
        torch.manual_seed(0)
        module = factory().eval()
        folder = save(copy.deepcopy(module), tmp_path / f"w{len(list(tmp_path.iterdir()))}")
        return aligned(module), folder

    return make


def least_of(factory, folder) -> int:
    """Return the least arena a module streams in."""
    with blockstream.Session(arena="1GiB") as s:
        s.stage("m", factory, folder)
        return least_arena(s._schedule())


@contextmanager
def streamed(factory, folder, arena=None, **options):
    """Yield the streamed module, in the least arena unless one is given."""
    arena = arena if arena is not None else least_of(factory, folder)
    with torch.no_grad(), blockstream.stream(factory, folder, arena=arena, **options) as m:
        yield m


class GatedStore(FileStore):
    """A file store whose loads wait for the test: `gates[segment]`, and tell when they begin."""

    gates: dict[str, threading.Event]
    begun: dict[str, threading.Event]
    loads: list[tuple[str, str]]

    def load(self, stage, segment, room):
        type(self).loads.append((stage, segment))
        begun = type(self).begun.setdefault(segment, threading.Event())
        gate = type(self).gates.get(segment)
        begun.set()
        if gate is not None:
            assert gate.wait(timeout=10), f"{segment} is never let through"
        return super().load(stage, segment, room)


@pytest.fixture
def gated(monkeypatch):
    """Return the class of store sessions use for the test; set its `gates` before they start."""
    store = type("Gated", (GatedStore,), {"gates": {}, "begun": {}, "loads": []})
    monkeypatch.setattr(session_module, "FileStore", store)
    return store
