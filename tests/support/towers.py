"""Two engines, one over the other, on a fake device: real threads and files, compute that reads the bytes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.file_store import FileStore
from blockstream.checkpoint.read.placement import lay_out
from blockstream.checkpoint.read.reader import Reader
from blockstream.checkpoint.read.requests import Request
from blockstream.device.fake import FakeDevice
from blockstream.device.rooms import DeviceArena, DeviceLayout, PinnedArena
from blockstream.device.upload import UploadStore
from blockstream.engine.arena import Arena
from blockstream.engine.engine import Engine
from blockstream.engine.loader import Lanes
from blockstream.plan.segments import Extent, Schedule, Segment, Stage
from tests.support.checkpoint_files import write


class Weights:
    """Stages of segments with random tensors in one file: what each must hold, and where it lies."""

    def __init__(self, folder: Path, shapes: dict[str, list[int]], seed: int = 0) -> None:
        """`shapes` has the 16 bit words of each segment, by stage: a weight of so many, and a bias of 7."""
        random = np.random.default_rng(seed)
        self.tensors = {
            f"{stage}.{i}.{what}": random.integers(0, 1 << 15, n, dtype=np.int64).astype(np.float32)
            for stage, sizes in shapes.items()
            for i, words in enumerate(sizes)
            for what, n in (("weight", words), ("bias", 7))
        }
        checkpoint = Checkpoint.open(write(folder / "w.safetensors", self.tensors, 8))
        self.host = {
            stage: {
                f"{i}": lay_out(
                    f"{i}",
                    [Request(w, (checkpoint[f"{stage}.{i}.{w}"],)) for w in ("weight", "bias")],
                )
                for i in range(len(sizes))
            }
            for stage, sizes in shapes.items()
        }
        self.device = {
            (stage, name): DeviceLayout.of(layout)
            for stage, layouts in self.host.items()
            for name, layout in layouts.items()
        }

    def segments(self, stage: str, load_s: float = 1.0, copy_s: float = 1.0) -> tuple[Segment, ...]:
        """Return the segments of a stage as a schedule has them."""
        return tuple(
            Segment(
                name,
                layout.nbytes,
                load_s,
                1.0,
                layout.read_nbytes,
                copied_nbytes=self.device[stage, name].nbytes,
                copy_s=copy_s,
            )
            for name, layout in self.host[stage].items()
        )

    def schedule(self, *stages: Stage) -> Schedule:
        return Schedule(stages)

    def expected(self, stage: str, name: str) -> bytes:
        """Return the bytes of a segment's tensors."""
        return b"".join(self.tensors[f"{stage}.{name}.{w}"].tobytes() for w in ("weight", "bias"))


class Tower:
    """An engine of a device over one of the host; `visit` queues compute that takes what it reads away."""

    def __init__(self, weights: Weights, tiers, device: FakeDevice, **reader: object) -> None:
        self.weights, self.device = weights, device
        arena = Arena(tiers.host.arena_nbytes)
        self.pinned = PinnedArena(arena, device)
        self.pinned.register(tiers.host.arena_nbytes)
        files = FileStore(arena, weights.host, reader=Reader(**reader))  # type: ignore[arg-type]
        self.host = Engine(tiers.host, files, lanes=Lanes(compute=""))
        self.arena = DeviceArena(device, tiers.device.arena_nbytes)
        self.store = UploadStore(self.host, self.pinned, device, self.arena, weights.device)
        self.engine = Engine(tiers.device, self.store, lanes=Lanes(loader="link", load="copy"))
        self.files = files
        #: (stage, segment, bytes that compute read), in the order compute was queued.
        self.read: list[list[object]] = []

    def visit(self, stage: str, name: str) -> None:
        at, handle = self.engine.acquire(stage, name)
        handle.read()
        load = self.engine._scheduler._in_use[at]
        layout = self.weights.device[stage, name]
        row: list[object] = [stage, name, None]
        self.read.append(row)

        def act() -> None:
            room = bytes(self.arena.view(Extent(load.extent.offset, layout.nbytes)).numpy())
            row[2] = b"".join(room[p.offset : p.offset + p.nbytes] for p in layout.tensors.values())

        self.device.compute(act)
        self.engine.release(at)

    def right(self) -> bool:
        """Return whether every visit read its segment's bytes, once all is done."""
        self.device.synchronise()
        return all(bytes_ == self.weights.expected(stage, name) for stage, name, bytes_ in self.read)


@contextmanager
def tower(weights: Weights, tiers, device: FakeDevice, **reader: object):
    """Yield a started tower; afterwards nothing is left of it."""
    made = Tower(weights, tiers, device, **reader)
    try:
        made.host.start()
        made.engine.start()
        yield made
    finally:
        made.engine.close()
        made.store.close()
        made.files.close()
        assert not device.registered
