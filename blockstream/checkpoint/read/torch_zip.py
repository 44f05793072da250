"""Find the records of a torch zip file (`.bin`, `.pt`): where each storage's bytes lie. No torch.

`torch.save` writes a zip archive whose members are stored, not compressed: `NAME/data.pkl` describes
the tensors, `NAME/data/0`, `NAME/data/1`, ... are their storages. The pickle is torch's to read
(`blockstream.module.torch_pickle`, weights only); here are just names and extents.
"""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from blockstream.errors import CheckpointError
from blockstream.system import regular

from .entries import FileStamp, check_extents, unreadable

#: A directory longer than this describes no checkpoint.
MOST_DIRECTORY_NBYTES = 100_000_000
_RESAVE = "load it where you trust it and save it with torch.save, or as safetensors"
#: What zipfile raises for a damaged directory.
_DAMAGE = (
    zipfile.BadZipFile,
    NotImplementedError,
    ValueError,  # of names that are no text, and of negative seeks
    OverflowError,
    struct.error,
    EOFError,
)


class Record(NamedTuple):
    """One stored member of the archive: its name without the archive's, and its bytes."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TorchZip:
    """The records of one torch zip file."""

    file: FileStamp
    records: dict[str, Record]

    @property
    def storages(self) -> dict[int, int]:
        """Return offset -> bytes of the records that are tensors' storages."""
        return {r.offset: r.nbytes for r in self.records.values() if r.name.startswith("data/")}


def read_records(path: str | os.PathLike[str]) -> TorchZip:
    """Return the records of a torch zip file, reading its directory only.

    Raises CheckpointError for other formats (the tar and plain pickle files of old torch among
    them), compressed or encrypted members, members that overlap or leave the file.
    """
    path = Path(path)
    try:
        with regular.opened(path) as stream:
            if hasattr(os, "posix_fadvise"):  # a look at each record must not read ahead into it
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            nbytes = os.fstat(stream.fileno()).st_size
            records, directory = scan(stream, nbytes, path)
            return TorchZip(FileStamp.take(stream, path, directory, nbytes - directory), records)
    except OSError as error:
        raise unreadable(path, error) from error


def scan(stream: BinaryIO, nbytes: int, path: Path) -> tuple[dict[str, Record], int]:
    """Return the records of a stream of `nbytes`, and where its directory begins.

    `path` is for the messages. Raises CheckpointError as `read_records` does.
    """
    _check_magic(path, stream)
    try:
        with zipfile.ZipFile(stream) as archive:
            members, directory = archive.infolist(), archive.start_dir
        if nbytes - directory > MOST_DIRECTORY_NBYTES:
            raise CheckpointError(
                f"{path}: its zip directory has {nbytes - directory} bytes, at most "
                f"{MOST_DIRECTORY_NBYTES} are read; {_RESAVE}"
            )
        records = _records(path, stream, members, directory)
        _check_byte_order(path, stream, records.get("byteorder"))
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path}: its zip directory cannot be read ({error}); the file is truncated or "
            "damaged: fetch it again"
        ) from error
    return records, directory


def _check_magic(path: Path, stream: BinaryIO) -> None:
    """Refuse what is no zip file, saying what it looks like."""
    head = stream.read(512)
    if head[:4] == b"PK\x03\x04":
        return
    if head[257:262] == b"ustar":
        what = "a tar file as torch wrote before 0.1.10"
    elif head[:1] == b"\x80":
        what = "a plain pickle as torch wrote before 1.6; its tensors cannot be read in place"
    else:
        what = f"no torch zip file (it begins with {head[:8]!r})"
    raise CheckpointError(f"{path}: is {what}; {_RESAVE}")


def _records(
    path: Path, stream: BinaryIO, members: list[zipfile.ZipInfo], directory: int
) -> dict[str, Record]:
    """Return the members by name without the archive's, each looked up and checked."""
    roots = {m.filename.partition("/")[0] for m in members}
    if len(roots) != 1 or not any(m.filename.endswith("/data.pkl") for m in members):
        raise CheckpointError(
            f"{path}: is a zip file without one folder that holds data.pkl; "
            "torch did not write it: name the checkpoint's own file"
        )
    records: dict[str, Record] = {}
    spans = []
    for m in members:
        name = m.filename.partition("/")[2]
        record = Record(name, _data_offset(path, stream, m), m.file_size)
        if name in records:
            raise CheckpointError(f"{path}: holds {m.filename!r} twice; {_RESAVE}")
        records[name] = record
        spans.append((m.filename, m.header_offset, record.offset + record.nbytes))
    check_extents(path, spans, 0, directory)
    return records


def _data_offset(path: Path, stream: BinaryIO, m: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: after its local header, which repeats its name."""
    if m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size or m.flag_bits & 1:
        how = "encrypted" if m.flag_bits & 1 else "compressed"
        raise CheckpointError(f"{path}: {m.filename!r} is {how}, not stored; {_RESAVE}")
    stream.seek(m.header_offset)
    header = stream.read(30)
    if len(header) == 30 and header[:4] == b"PK\x03\x04":
        name_nbytes = int.from_bytes(header[26:28], "little")
        extra_nbytes = int.from_bytes(header[28:30], "little")
        encoding = "utf-8" if m.flag_bits & 0x800 else "cp437"
        if stream.read(name_nbytes) == m.orig_filename.encode(encoding):
            return m.header_offset + 30 + name_nbytes + extra_nbytes
    raise CheckpointError(
        f"{path}: {m.filename!r} is not at byte {m.header_offset}, where the directory places it; "
        "the file is truncated or damaged: fetch it again"
    )


def _check_byte_order(path: Path, stream: BinaryIO, record: Record | None) -> None:
    if record is not None:
        stream.seek(record.offset)
        order = stream.read(min(record.nbytes, 16))
        if order != b"little":
            raise CheckpointError(f"{path}: its numbers are {order!r}-endian; {_RESAVE}")
