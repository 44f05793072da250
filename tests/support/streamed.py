"""Stream a module beside its resident twin; stores that tests watch, hold and break."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

import blockstream
import blockstream.streaming.top_tier as tier_module
from blockstream.checkpoint.file_store import FileStore
from blockstream.engine.store import Whole
from blockstream.errors import SegmentLoadError
from blockstream.plan.planner import least_arena
from tests.support.costs import fix_costs
from tests.support.models import aligned, save


@pytest.fixture
def twins(tmp_path):
    """Return make(factory) -> (resident module, checkpoint of its weights)."""

    def make(factory: Callable[[], nn.Module]):
        torch.manual_seed(len(list(tmp_path.iterdir())))
        module = factory().eval()
        folder = save(copy.deepcopy(module), tmp_path / f"w{len(list(tmp_path.iterdir()))}")
        return aligned(module), folder

    return make


def least_of(factory, folder) -> int:
    """Return the least arena a module streams in."""
    with blockstream.Session(arena="1GiB") as s:
        s.stage("m", factory, folder)
        return least_arena(s.draft().schedule)


@contextmanager
def streamed(factory, folder, arena=None, **options):
    """Yield the streamed module, in the least arena unless one is given."""
    arena = arena if arena is not None else least_of(factory, folder)
    with torch.no_grad(), blockstream.stream(factory, folder, arena=arena, **options) as m:
        yield m


class WatchedStore(FileStore):
    """A file store that tells when loads begin and end, and that a test can hold or break."""

    condition: threading.Condition
    loads: list[tuple[str, str]]
    done: list[tuple[str, str]]
    gates: dict[tuple[str, str], threading.Event]
    broken: set[tuple[str, str]]

    def begin(self, load):
        return Whole(partial(self._bring, load))  # one begins when the one before it is done

    def _bring(self, load):
        stage, segment = key = (load.stage, load.segment.name)
        self._tell(self.loads, key)
        gate = self.gates.get(key)
        if gate is not None:
            assert gate.wait(timeout=10), f"{segment} is never let through"
        if key in self.broken:
            raise SegmentLoadError(f"{stage}: segment {segment!r}: no such luck")
        handle = super().begin(load).finish()
        self._tell(self.done, key)
        return handle

    @classmethod
    def _tell(cls, events, key):
        with cls.condition:
            events.append(key)
            cls.condition.notify_all()

    @classmethod
    def wait_for(cls, stage: str, segment: str, times: int) -> bool:
        """Return whether a load has begun so many times, waiting for it."""
        with cls.condition:
            return cls.condition.wait_for(lambda: cls.loads.count((stage, segment)) >= times, timeout=10)

    @classmethod
    def expect(cls, stage: str, segment: str, times: int) -> None:
        """Assert `wait_for`."""
        assert cls.wait_for(stage, segment, times), f"{segment} of {stage} is not loaded ahead"

    @classmethod
    def finished(cls, stage: str, segment: str) -> None:
        """Wait until a segment has been loaded."""
        with cls.condition:
            assert cls.condition.wait_for(lambda: (stage, segment) in cls.done, timeout=10)

    @classmethod
    def hold(cls, stage: str, segment: str) -> threading.Event:
        """Hold a segment's loads until the event is set."""
        return cls.gates.setdefault((stage, segment), threading.Event())

    @classmethod
    def fail(cls, stage: str, segment: str) -> None:
        """Fail a segment's loads."""
        cls.broken.add((stage, segment))


@pytest.fixture
def watched(monkeypatch):
    """Return the class of store that sessions use for the length of the test.

    Where slots lie, and so what a load waits for, follows from costs: they are fixed.
    """
    fix_costs(monkeypatch)
    fresh = {"condition": threading.Condition(), "loads": [], "done": [], "gates": {}, "broken": set()}
    store = type("Store", (WatchedStore,), fresh)
    monkeypatch.setattr(tier_module, "FileStore", store)
    return store
