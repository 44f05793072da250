"""FileStore: segments from checkpoint files into the arena. The engine's `Store` for weights on disk.

One load: all reads of the segment's layout in flight together, what landed misaligned moved while
the rest is read; then the staged chunks, each converted while the next is read. When its last reads
are on their way the next load may begin: the disk never waits for what the end of a load takes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

from blockstream.checkpoint.read.convert import convert
from blockstream.checkpoint.read.entries import FileStamp
from blockstream.checkpoint.read.reader import Batch, Reader, ReadFile, Wanted
from blockstream.checkpoint.read.requests import Chunk, Move, Read, SegmentLayout
from blockstream.checkpoint.read.sourced import SourceFile
from blockstream.engine.arena import Arena
from blockstream.errors import BlockstreamError, EngineError, SegmentLoadError
from blockstream.plan.loads import Load
from blockstream.plan.segments import Extent


@dataclass(slots=True)
class LoadCounts:
    """What loads did, in bytes and seconds: one load's, or the sum of a store's."""

    loads: int = 0
    read_nbytes: int = 0
    bound_nbytes: int = 0
    moved_nbytes: int = 0
    converted_nbytes: int = 0
    read_s: float = 0.0
    move_s: float = 0.0
    convert_s: float = 0.0

    def add(self, other: LoadCounts) -> None:
        """Add another's counts to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(frozen=True, slots=True)
class FileHandle:
    """A loaded segment: its room of the arena and where its parameters lie in it. A `Handle`."""

    room: Extent
    layout: SegmentLayout
    counts: LoadCounts

    def read(self) -> None:
        """Do nothing: the bytes are there."""

    def release(self) -> None:
        """Give the room back to the engine; its pages stay committed."""


class FileLoading:
    """A load whose reads are in flight. A `blockstream.engine.store.Loading`. Made by `FileStore.begin`."""

    def __init__(self, store: FileStore, stage: str, layout: SegmentLayout, room: Extent) -> None:
        self._store, self._stage, self._layout, self._room = store, stage, layout, room
        self._view = store.arena.view(room)
        with store.explaining(stage, layout):
            self._batch = store.reader.submit([self._wanted(r) for r in layout.reads])

    def finish(self, nearly: Callable[[], None] = lambda: None) -> FileHandle:
        """Return the segment once all of it is read, aligned and converted.

        Raises SegmentLoadError naming segment, file and cause; nothing writes into the room after that.
        """
        store, layout = self._store, self._layout
        with store.explaining(self._stage, layout):
            counts = self._bring_in(nearly)
        store.totals.add(counts)
        return FileHandle(self._room, layout, counts)

    def abandon(self) -> None:
        """Give the load up; nothing writes into its room afterwards."""
        self._batch.cancel()

    def _bring_in(self, nearly: Callable[[], None]) -> LoadCounts:
        layout = self._layout
        begin = time.perf_counter()
        move_s = self._align(nearly)
        convert_s = self._convert(nearly)
        total_s = time.perf_counter() - begin
        return LoadCounts(
            loads=1,
            read_nbytes=layout.read_nbytes,
            bound_nbytes=layout.bound_nbytes,
            moved_nbytes=layout.moved_nbytes,
            converted_nbytes=layout.converted_nbytes,
            read_s=total_s - move_s - convert_s,
            move_s=move_s,
            convert_s=convert_s,
        )

    def _align(self, nearly: Callable[[], None]) -> float:
        """Move what has arrived while the rest is on its way; return the seconds of moves."""
        spent = 0.0
        reads, base = self._layout.reads, self._store.arena.address + self._room.offset
        todo = [list(reversed(r.moves)) for r in reads]
        few = 0 if self._layout.chunks else self._store.reader.threads + 1
        left = len(self._batch)
        try:
            if left <= few:
                nearly()
            for i, arrived in self._batch.arrivals():
                left -= 1
                if left <= few:
                    nearly()
                moves, end = todo[i], reads[i].room_offset + arrived
                begin = time.perf_counter()
                while moves and moves[-1].src < end:
                    src, dst, nbytes = moves.pop()
                    n = min(nbytes, end - src)
                    ctypes.memmove(base + dst, base + src, n)  # leaves other threads running
                    if n < nbytes:
                        moves.append(Move(src + n, dst + n, nbytes - n))
                spent += time.perf_counter() - begin
        finally:
            self._batch.cancel()
        return spent

    def _convert(self, nearly: Callable[[], None]) -> float:
        """Read and convert staged chunks, one ahead; return the seconds spent converting."""
        spent = 0.0
        chunks, view = self._layout.chunks, self._view
        batches = [self._submit(c) for c in chunks[:1]]
        try:
            for i, chunk in enumerate(chunks):
                batches.pop(0).wait()
                if i + 1 < len(chunks):
                    batches.append(self._submit(chunks[i + 1]))
                if i + 2 >= len(chunks):
                    nearly()
                begin = time.perf_counter()
                for p in chunk.parts:
                    src = view[p.src : p.src + p.src_nbytes]
                    dst = view[p.dst : p.dst + p.dst_nbytes]
                    convert(src, p.src_dtype, dst, p.dst_dtype)
                spent += time.perf_counter() - begin
        except BaseException:
            for batch in batches:  # nothing may write into the room after this load is over
                batch.cancel()
            raise
        return spent

    def _submit(self, chunk: Chunk) -> Batch:
        return self._store.reader.submit([self._wanted(chunk.read)])

    def _wanted(self, read: Read) -> Wanted:
        into = self._view[read.room_offset : read.room_offset + read.nbytes]
        return Wanted(self._store.file(read.file), read.offset, read.need, into)


class FileStore:
    """Loads segments of checkpoint files into an arena. A `blockstream.engine.store.Store`.

    `stages` maps stage -> segment -> layout. Files are opened once, here or by `open`, and must still be
    those whose headers were read; each load looks again. Loads belong to one thread at a time, `close` to
    any. The reader is the store's from here on, and closed with it.
    """

    def __init__(
        self,
        arena: Arena,
        stages: Mapping[str, Mapping[str, SegmentLayout]],
        *,
        reader: Reader | None = None,
    ) -> None:
        self.arena = arena
        self.stages = {stage: dict(layouts) for stage, layouts in stages.items()}
        self.reader = reader or Reader()
        #: Sums over all loads.
        self.totals = LoadCounts()
        self._files: dict[FileStamp, ReadFile | SourceFile] = {}
        try:
            for layouts in self.stages.values():
                for layout in layouts.values():
                    self.open(layout)
        except BaseException:
            self.reader.close()
            raise

    def open(self, layout: SegmentLayout) -> None:
        """Open the files of a layout that are not open; those whose headers were read, or CheckpointError."""
        for stamp in layout.files:
            if stamp not in self._files:
                stamp.check()
                self._files[stamp] = self.reader.open_stamped(stamp)

    def begin(self, load: Load) -> FileLoading:
        """Begin to read a segment into its extent of the arena, after all that was begun before."""
        try:
            layout = self.stages[load.stage][load.segment.name]
        except KeyError:
            raise SegmentLoadError(
                f"{load.stage}: there is no segment {load.segment.name!r} to load"
            ) from None
        self._check_room(load.stage, layout, load.extent)
        return FileLoading(self, load.stage, layout, load.extent)

    def file(self, stamp: FileStamp) -> ReadFile | SourceFile:
        """Return the open file of a stamp."""
        return self._files[stamp]

    @contextmanager
    def explaining(self, stage: str, layout: SegmentLayout) -> Iterator[None]:
        """Raise what goes wrong within as SegmentLoadError, and also if the files changed meanwhile."""
        segment = layout.name
        try:
            yield
        except EngineError as error:
            raise SegmentLoadError(f"{stage}: segment {segment!r}: {error}") from error
        except (OSError, BlockstreamError) as error:
            changed = self._changed(layout)
            cause = changed or str(error)
            if isinstance(error, OSError) and not changed:
                cause = f"{error.filename}: {error.strerror}; check the disk, then start again"
            raise SegmentLoadError(f"{stage}: segment {segment!r}: {cause}") from error
        changed = self._changed(layout)
        if changed:
            raise SegmentLoadError(f"{stage}: segment {segment!r}: {changed}")

    def close(self) -> None:
        """Join the reader's threads and close the files. Idempotent; a load under way fails."""
        self.reader.close()

    def _check_room(self, stage: str, layout: SegmentLayout, room: Extent) -> None:
        if room.nbytes < layout.nbytes or room.offset % layout.align:
            raise SegmentLoadError(
                f"{stage}: segment {layout.name!r} needs a room of {layout.nbytes} bytes at a "
                f"multiple of {layout.align}, it was given {room}; plan with the layout's nbytes"
            )

    def _changed(self, layout: SegmentLayout) -> str:
        """Return in words what happened to the segment's files since they were opened."""
        for stamp in layout.files:
            try:
                found = self._files[stamp].changes(stamp)
            except OSError as error:
                found = [f"it cannot be looked at ({error.strerror})"]
            if found:
                return f"{stamp.path} changed while it was in use: {', '.join(found)}; start again"
        return ""
