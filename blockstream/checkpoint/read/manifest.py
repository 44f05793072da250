"""The manifest of a packed checkpoint: which files it has and what they were made from.

A pack is a folder of standard safetensors files, one a segment, the data of each beginning at a
multiple of 4096, and `blockstream.json`, written last: a folder without it is no pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from blockstream.errors import BlockstreamError, CheckpointError
from blockstream.system import regular

from .entries import FileStamp, TensorEntry
from .index import read_json, safe_name
from .safetensors_header import read_header

#: The manifest of a packed checkpoint.
MANIFEST_NAME = "blockstream.json"
#: What stands beside the files of a pack while it is unfinished.
JOURNAL_NAME = "blockstream.unfinished.json"
VERSION = 1

M = TypeVar("M", bound=BaseModel)


class Value(BaseModel):
    """What a manifest is made of: values of these names and types, and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SourceFile(Value):
    """A file the pack was made from, as it was then."""

    path: str
    nbytes: int
    mtime_ns: int
    header_offset: int
    header_nbytes: int
    header_hash: str

    @classmethod
    def of(cls, stamp: FileStamp) -> SourceFile:
        """Return the record of a file whose header was read."""
        return cls(
            path=str(stamp.path.absolute()),
            nbytes=stamp.nbytes,
            mtime_ns=stamp.mtime_ns,
            header_offset=stamp.header_offset,
            header_nbytes=stamp.header_nbytes,
            header_hash=stamp.header_hash,
        )

    def stamp(self) -> FileStamp:
        """Return the file's stamp."""
        return FileStamp(
            Path(self.path),
            self.nbytes,
            self.mtime_ns,
            self.header_offset,
            self.header_nbytes,
            self.header_hash,
        )


class Rounded(Value):
    """What rounding a matrix to int8 lost.

    `worst`: the largest error in parts of the largest weight; `rms`: the root mean square error in parts
    of the weights' own.
    """

    name: str
    worst: float
    rms: float


class PackedSegment(Value):
    """One segment's file, and the errors of the matrices in it that are int8."""

    name: str
    file: str
    nbytes: int
    header_hash: str
    sha256: str
    int8: tuple[Rounded, ...] = ()


class Request(Value):
    """What a pack holds, decided before it is written: equal requests give equal packs."""

    source: tuple[SourceFile, ...]
    dtype: str | None
    segments: tuple[tuple[str, tuple[str, ...]], ...]
    aliases: tuple[tuple[str, str], ...] = ()
    float32: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()

    def dtype_of(self, name: str) -> str | None:
        """Return the dtype asked for a tensor, None for that of the source."""
        return "F32" if name in self.float32 else self.dtype


class Manifest(Value):
    """A manifest as it stands in the file; `segments` of an unfinished pack are those done."""

    format: Literal["blockstream-pack"] = "blockstream-pack"
    version: int = VERSION
    request: Request
    segments: tuple[PackedSegment, ...] = ()


class Pack:
    """An opened pack: its folder and its manifest, both checked."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    def entries(self) -> dict[str, TensorEntry]:
        """Return the tensors of all files by name, tied names included.

        Raises CheckpointError for a file that is missing, cut, or another than the manifest's.
        """
        found: dict[str, TensorEntry] = {}
        for segment in self.manifest.segments:
            path = self.folder / safe_name(segment.file, self.folder / MANIFEST_NAME)
            header = read_header(path)
            self._compare(segment, header.file)
            found.update(header.entries)
        for alias, name in self.manifest.request.aliases:
            found[alias] = found[name]
        return found

    def check_source(self) -> None:
        """Refuse a pack whose source has changed since; a source that is gone is no change.

        Raises CheckpointError saying what changed.
        """
        for source in self.manifest.request.source:
            if Path(source.path).exists():
                try:
                    source.stamp().check()
                except CheckpointError as error:
                    raise CheckpointError(
                        f"{self.folder}: is stale: {error}; pack the source again to a new folder"
                    ) from error

    def _compare(self, segment: PackedSegment, stamp: FileStamp) -> None:
        if (stamp.nbytes, stamp.header_hash) != (segment.nbytes, segment.header_hash):
            raise CheckpointError(
                f"{stamp.path}: is not the file the manifest describes ({stamp.nbytes} bytes, "
                f"header {stamp.header_hash[:12]}; written were {segment.nbytes}, "
                f"{segment.header_hash[:12]}); pack the source again"
            )


def read_versioned(path: Path, kind: type[M], foreign: BlockstreamError, again: str) -> M:
    """Return the manifest in a file, checked against its model.

    `foreign` is raised for a file that is none of the kind, an error of its type for another version, a
    CheckpointError for a damaged one; `again` says how it is made anew.
    """
    value, fields = read_json(path), kind.model_fields
    if not isinstance(value, Mapping) or value.get("format") != fields["format"].default:
        raise foreign
    if value.get("version") != fields["version"].default:
        mine, its = fields["version"].default, value.get("version")
        raise type(foreign)(f"{path}: has version {its!r}, this program reads {mine}; {again}")
    try:
        return kind.model_validate_json(regular.read_bytes(path))
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where}: {first['msg']}; the manifest is damaged: {again}") from error


def read_manifest(folder: Path, name: str = MANIFEST_NAME) -> Manifest:
    """Return a folder's manifest; CheckpointError if it is damaged, foreign or of another version."""
    path = folder / name
    foreign = CheckpointError(f"{path}: is no manifest of a pack; name the checkpoint's own folder")
    manifest = read_versioned(path, Manifest, foreign, "pack the source again")
    for segment in manifest.segments:
        safe_name(segment.file, path)
    return manifest


def open_pack(folder: Path) -> Pack:
    """Return the finished pack of a folder, its source unchanged as far as it is still there."""
    pack = Pack(folder, read_manifest(folder))
    done = [s.name for s in pack.manifest.segments]
    if done != [name for name, _ in pack.manifest.request.segments]:
        raise CheckpointError(f"{folder}: lacks segments its manifest requests; pack it again")
    pack.check_source()
    return pack
