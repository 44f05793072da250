"""Gather rows of an embedding's table from its file, past the page cache."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from blockstream.checkpoint import TensorEntry
from blockstream.checkpoint.read.reader import BLOCK, ReadFile, pread
from blockstream.errors import CheckpointError

from .dtypes import to_torch
from .narrow import Spec, Stored

#: Rows lie anywhere: each waits for the disk, behind the loader's large reads, so many wait at once.
THREADS = 64
#: Rows used last are kept, up to so many bytes a table: passes ask for the same ones again.
KEEP_NBYTES = 4 << 20


class TableReader:
    """The rows of one table on disk. Used by the compute thread; the first open the file, `close` closes it.

    The rows come out as `F.embedding` would give them, bit for bit, in `dtype`.
    """

    def __init__(self, entry: TensorEntry, dtype: str, spec: Spec | None = None) -> None:
        """`spec` is that of a coded table: its rows are read as bytes and widened."""
        self.entry = entry
        self._dtype = to_torch(dtype)
        self._spec = spec
        self._rows, self._width = entry.shape
        self._row_nbytes = entry.nbytes // max(self._rows, 1)
        self._file_dtype = to_torch(entry.dtype) if spec is None else torch.uint8
        self._columns = self._width if spec is None else self._row_nbytes
        self._file: ReadFile | None = None
        self._closed = False
        self._span = -(-self._row_nbytes // BLOCK) * BLOCK + BLOCK
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._scratch = mmap.mmap(-1, self._span * THREADS, flags=flags)
        #: Rows by number, those used last at the end.
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        #: Bytes that arrived from the file so far.
        self.read_nbytes = 0

    def gather(self, ids: Tensor) -> Tensor:
        """Return [*ids.shape, width] where `ids` are: one row an id, gathered by the host.

        Raises IndexError as torch does.
        """
        where, ids = ids.device, ids.cpu()
        wanted, inverse = torch.unique(ids, return_inverse=True)
        if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < self._rows:
            raise IndexError(
                f"index out of range: ids {int(wanted[0])} to {int(wanted[-1])}, table of {self._rows} rows"
            )
        rows = torch.empty(len(wanted), self._columns, dtype=self._file_dtype)
        new = {}
        for i, row in enumerate(wanted.tolist()):
            if row in self._kept:
                rows[i] = self._kept[row]
                self._kept.move_to_end(row)
            else:
                new[row] = i
        if new:
            self._read_new(new, rows)
        found = self._wide(rows).index_select(0, inverse.reshape(-1)).view(*ids.shape, self._width)
        return found.to(where)

    def _wide(self, rows: Tensor) -> Tensor:
        """Return rows as numbers."""
        if self._spec is None:
            return rows.to(self._dtype)
        shape = (len(rows), self._width)
        return self._spec.wide(Stored(rows.reshape(-1), {}, shape, self._dtype, self._spec.about))

    def _read_new(self, new: Mapping[int, int], rows: Tensor) -> None:
        """Read rows of the file, each to its place in `rows`, and keep them."""
        self._open()
        raw = rows.reshape(-1).view(torch.uint8).numpy().data
        todo = [(row, raw[i * self._row_nbytes : (i + 1) * self._row_nbytes]) for row, i in new.items()]
        threads = min(THREADS, len(todo))
        if threads < 2:
            self.read_nbytes += self._read_all(0, todo)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="blockstream-gather") as pool:
                done = [pool.submit(self._read_all, k, todo[k::threads]) for k in range(threads)]
            self.read_nbytes += sum(d.result() for d in done)
        most = KEEP_NBYTES // max(self._row_nbytes, 1)
        for row, i in list(new.items())[:most]:
            self._kept[row] = rows[i].clone()
        while len(self._kept) > most:
            self._kept.popitem(last=False)

    def close(self) -> None:
        """Close the file and forget the rows. Idempotent."""
        self._closed = True
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        """Open the file, which must still be the one whose header was read."""
        assert not self._closed, "the table is closed"
        if self.entry.file.source is not None:
            self.entry.file.check()
        elif self._file is None:
            self.entry.file.check()
            self._file = ReadFile(self.entry.file.path, direct=True)

    def _read_all(self, thread: int, todo: Sequence[tuple[int, memoryview]]) -> int:
        """Read rows, by way of a thread's own part of the scratch pages; return the bytes that arrived."""
        scratch = memoryview(self._scratch)[thread * self._span : (thread + 1) * self._span]
        return sum(self._read(row, into, scratch) for row, into in todo)

    def _read(self, row: int, into: memoryview, view: memoryview) -> int:
        """Read one row: the blocks around it to the scratch pages, then the row."""
        start, source = self.entry.offset + row * self._row_nbytes, self.entry.file.source
        if source is not None:
            source.read(self.entry.file, start, into)
            return len(into)
        assert self._file is not None
        first = start // BLOCK * BLOCK
        need = start + self._row_nbytes - first
        done = arrived = 0
        while done < need:
            direct = self._file.mode == "direct"
            end = -(-need // BLOCK) * BLOCK if direct else need
            try:
                n = pread(self._file.descriptor, view[done:end], first + done)
            except OSError as error:
                if direct:
                    self._file.fall_back()
                    continue
                path = self.entry.file.path
                raise CheckpointError(
                    f"{path}: reading table {self.entry.name!r}: {error.strerror}"
                ) from error
            if n == 0:
                raise CheckpointError(
                    f"{self.entry.file.path}: ends at byte {first + done}, inside table {self.entry.name!r}; "
                    "the file was cut short: fetch it again"
                )
            done += n
            arrived += n
            if done < need and done % BLOCK and direct:
                self._file.fall_back()
        if self._file.mode == "buffered":
            self._file.drop_cached(first, need)
        into[:] = view[start - first : need]
        return arrived
