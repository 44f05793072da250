"""Pack a checkpoint: one aligned safetensors file a segment, in the dtype that will compute.

Every file is written under a temporary name and renamed when it is on the disk; a journal beside
them lists the finished ones. A pack that was interrupted, even killed, goes on where it stopped when
the same request is made again; the manifest, written last, makes it a pack.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from blockstream.checkpoint.read.catalog import SYNTHETIC_NAME, Checkpoint
from blockstream.checkpoint.read.convert import can_convert, convert
from blockstream.checkpoint.read.entries import TensorEntry, tensor_nbytes
from blockstream.checkpoint.read.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    Manifest,
    PackedSegment,
    Request,
    SourceFile,
    open_pack,
    read_manifest,
)
from blockstream.checkpoint.read.reader import BLOCK, Batch, Reader, ReadFile, Wanted, aligned_buffer
from blockstream.checkpoint.read.safetensors_header import MOST_HEADER_NBYTES, read_header
from blockstream.errors import CheckpointError
from blockstream.system import regular

from .rounding import FLOATS, SCALE, Rounder
from .safetensors_writer import TensorSpec, aligned_order, header_bytes, write_safetensors
from .writer import UNFINISHED, FileWriter, Pwrite, locked, write_json, write_small

#: dtypes a pack can be asked for, by the names users give them; int8 is for the matrices that are named.
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int8": None}
STEP_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that no file holds: `make` returns its bytes, computed from the tensors named `inputs`."""

    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    make: Callable[[], memoryview]


def pack(
    src: str | os.PathLike[str] | Checkpoint,
    dst: str | os.PathLike[str],
    segments: Mapping[str, Sequence[str]],
    dtype: str | None = None,
    *,
    float32: Collection[str] = (),
    int8: Collection[str] = (),
    made: Mapping[str, Made] = MappingProxyType({}),
    beside: Mapping[str, bytes] = MappingProxyType({}),
    on_segment: Callable[[str, int, int], None] | None = None,
    pwrite: Pwrite = os.pwrite,
) -> Manifest:
    """Write a checkpoint's tensors to `dst`, one file a segment; return the manifest.

    `segments` maps a segment to the names of its tensors; what no segment names goes to a last one
    called `rest`. `dtype` (bf16, fp16, fp32) converts floating-point tensors of 32 and 16 bits, to
    float32 those that `float32` names. The matrices that `int8` names are rounded, one scale a row, which is
    written beside each (`int8`). Names in `made` are tensors computed for the pack; what they are made
    of is left out, unless a segment names it. `beside` are small files by their names, such as config.json.
    `on_segment(name, done, of)` hears of each file. Asked again after an interruption it goes on; a
    finished pack of the same request is returned as it is, given the files beside it that are not so.
    Raises CheckpointError for a folder that holds anything else, a full disk (finished files stay), or a
    source that changed meanwhile.
    """
    source = src if isinstance(src, Checkpoint) else Checkpoint.open(src)
    folder = Path(dst)
    request = _request(source, segments, dtype, float32, int8, made)
    with locked(folder):
        manifest = _resume(folder, request)
        if not (folder / MANIFEST_NAME).exists():
            manifest = _write_segments(folder, manifest, _Copier(source, request, made), on_segment, pwrite)
            write_small(folder, beside)
            for file in source.files:
                file.check()
            write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
        else:
            write_small(folder, {n: data for n, data in beside.items() if not _holds(folder / n, data)})
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
        return manifest


def _holds(path: Path, data: bytes) -> bool:
    try:
        return regular.read_bytes(path) == data
    except OSError:
        return False


def verify_pack(folder: str | os.PathLike[str]) -> int:
    """Read every file of a pack and compare its hash; return the bytes read.

    Raises CheckpointError naming the first file that differs.
    """
    opened = open_pack(Path(folder))
    opened.entries()
    total = 0
    for segment in opened.manifest.segments:
        path = opened.folder / segment.file
        digest = hashlib.sha256()
        with Reader() as reader:
            for piece in _pieces(reader, reader.open(path), 0, segment.nbytes, 1):
                digest.update(piece)
        if digest.hexdigest() != segment.sha256:
            raise CheckpointError(
                f"{path}: its contents have changed since it was packed (SHA-256 "
                f"{digest.hexdigest()[:12]}, packed was {segment.sha256[:12]}); pack again"
            )
        total += segment.nbytes
    return total


def _request(
    source: Checkpoint,
    segments: Mapping[str, Sequence[str]],
    dtype: str | None,
    float32: Collection[str],
    int8: Collection[str],
    made: Mapping[str, Made],
) -> Request:
    """Return what is to be packed, every tensor once; raises for names that are not there."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"no dtype {dtype!r} to pack to; there are {', '.join(DTYPES)}")
    first: dict[tuple[object, ...], str] = {}
    aliases: list[tuple[str, str]] = []
    taken: set[str] = set()
    filled: list[tuple[str, tuple[str, ...]]] = []
    named = [n for names in segments.values() for n in names]
    known = set(named)
    twice = {n for n in named if named.count(n) > 1} if len(known) < len(named) else set()
    if twice:
        raise CheckpointError(f"tensor {min(twice)!r} is in two segments; name it once")
    known.update(n for one in made.values() for n in one.inputs)
    rest = [n for n in source.names if n not in known]
    for segment, names in (*segments.items(), *([("rest", rest)] if rest else ())):
        kept = []
        for name in names:
            if name in made:
                kept.append(name)
                continue
            e = source[name]
            place = (e.file, e.offset, e.nbytes, e.dtype, e.shape)
            if e.nbytes and place in first:  # tied: one set of bytes, two names
                aliases.append((name, first[place]))
            else:
                first[place] = name
                kept.append(name)
        if segment in taken:
            raise CheckpointError(f"segment {segment!r} is named twice; rename one")
        taken.add(segment)
        filled.append((segment, tuple(kept)))
    return Request(
        source=tuple(SourceFile.of(f) for f in source.files),
        dtype=DTYPES[dtype] if dtype else None,
        segments=tuple(filled),
        aliases=tuple(aliases),
        float32=tuple(sorted(float32)),
        int8=_matrices(source, int8),
    )


def _matrices(source: Checkpoint, names: Collection[str]) -> tuple[str, ...]:
    """Return the names of what is to be rounded, sorted; raises for what is no matrix of floats."""
    for name in names:
        e = source[name]
        if len(e.shape) != 2 or e.dtype not in FLOATS or not e.nbytes:
            raise CheckpointError(
                f"{source.root}: {name!r} is {e.dtype} {list(e.shape)}; only matrices of "
                f"{', '.join(sorted(FLOATS))} are rounded to int8"
            )
        if name + SCALE in source:
            raise CheckpointError(f"{source.root}: holds {name + SCALE!r} already; pack it in another dtype")
    return tuple(sorted(names))


def _resume(folder: Path, request: Request) -> Manifest:
    """Return what of the request the folder already holds; refuses a folder of anything else."""
    if (folder / MANIFEST_NAME).exists():
        manifest = open_pack(folder).manifest
        if manifest.request != request:
            raise CheckpointError(
                f"{folder}: holds a finished pack of something else (dtype "
                f"{manifest.request.dtype}, {len(manifest.segments)} segments); "
                "choose another folder or remove it"
            )
        return manifest
    if (folder / JOURNAL_NAME).exists():
        manifest = read_manifest(folder, JOURNAL_NAME)
        if manifest.request != request:
            raise CheckpointError(
                f"{folder}: holds an unfinished pack of another source, dtype or partition; "
                "choose another folder or remove it"
            )
        whole = []
        for segment in manifest.segments:
            try:
                stamp = read_header(folder / segment.file).file
            except CheckpointError:
                break
            if (stamp.nbytes, stamp.header_hash) != (segment.nbytes, segment.header_hash):
                break
            whole.append(segment)
        return manifest.model_copy(update={"segments": tuple(whole)})
    others = [p.name for p in folder.iterdir() if not p.name.endswith(UNFINISHED)]
    if others:
        raise CheckpointError(
            f"{folder}: is not empty ({', '.join(sorted(others)[:3])}); choose another folder"
        )
    manifest = Manifest(request=request)
    write_json(folder / JOURNAL_NAME, manifest.model_dump(mode="json"))
    return manifest


def _write_segments(
    folder: Path,
    manifest: Manifest,
    copier: _Copier,
    on_segment: Callable[[str, int, int], None] | None,
    pwrite: Pwrite,
) -> Manifest:
    """Write the segments that a manifest lacks, noting each in the journal; return it with all of them."""
    request, source = manifest.request, copier.source
    _check_space(folder, copier, request, manifest)
    if source.synthetic is not None:
        write_json(folder / SYNTHETIC_NAME, dict(source.synthetic))
    with Reader() as reader:
        copier.open(reader)
        for i, (name, names) in enumerate(request.segments):
            if i < len(manifest.segments):
                continue
            done = _write_segment(folder, i, name, copier, names, pwrite)
            manifest = manifest.model_copy(update={"segments": (*manifest.segments, done)})
            write_json(folder / JOURNAL_NAME, manifest.model_dump(mode="json"))
            if on_segment is not None:
                on_segment(name, i + 1, len(request.segments))
    return manifest


def _check_space(folder: Path, copier: _Copier, request: Request, done: Manifest) -> None:
    """Refuse before writing what cannot fit."""
    left = request.segments[len(done.segments) :]
    need = sum(spec.nbytes for _, names in left for n in names for spec in copier.specs(n))
    free = shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"{folder}: {need} bytes are to be written and {free} are free; "
            "free some space and run the same command again"
        )


def _write_segment(
    folder: Path, i: int, name: str, copier: _Copier, names: Sequence[str], pwrite: Pwrite
) -> PackedSegment:
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "segment"
    path = folder / f"{i:04}.{slug}.safetensors"
    specs = aligned_order(spec for n in names for spec in copier.specs(n))
    metadata = {"format": "pt", "segment": name}
    header = header_bytes(specs, metadata, BLOCK)
    if len(header) > MOST_HEADER_NBYTES:
        raise CheckpointError(f"{path}: {len(specs)} tensors need a header over 100 MB")
    with FileWriter(path, hashed=True, pwrite=pwrite) as writer:
        write_safetensors(writer, specs, copier.data, metadata, BLOCK)
    return PackedSegment(
        name=name,
        file=path.name,
        nbytes=writer.tell(),
        header_hash=hashlib.sha256(header).hexdigest(),
        sha256=writer.sha256,
        int8=tuple(copier.rounders.pop(n).error for n in names if n in copier.rounders),
    )


class _Copier:
    """Supplies the bytes of a pack's tensors, converted, in bounded memory."""

    def __init__(self, source: Checkpoint, request: Request, made: Mapping[str, Made]) -> None:
        self.source, self._request, self._made = source, request, made
        self._int8 = frozenset(request.int8)
        #: The matrices rounded so far, until their segment is written.
        self.rounders: dict[str, Rounder] = {}

    def open(self, reader: Reader) -> None:
        """Open the files of the source."""
        self._reader = reader
        self._files = {stamp: reader.open(stamp.path) for stamp in self.source.files}
        self._converted = memoryview(bytearray(2 * STEP_NBYTES))

    def specs(self, name: str) -> tuple[TensorSpec, ...]:
        """Return a tensor as it will be written, under the name it was asked for, and its scales."""
        if name in self._int8:
            shape = self.source[name].shape
            return TensorSpec(name, "I8", shape), TensorSpec(name + SCALE, "F32", shape[:1])
        tensor, dtype = self._tensor(name), self._request.dtype_of(name)
        keep = dtype is None or not can_convert(tensor.dtype, dtype)
        return (TensorSpec(name, tensor.dtype if dtype is None or keep else dtype, tensor.shape),)

    def data(self, tensor: TensorSpec) -> Iterator[memoryview]:
        """Yield a tensor's bytes in the dtype of its spec."""
        if tensor.name in self._int8:
            yield from self._rounded(tensor.name)
            return
        if (of := tensor.name.removesuffix(SCALE)) in self._int8:
            if of not in self.rounders:  # its matrix comes after it
                for _ in self._rounded(of):
                    pass
            yield self.rounders[of].scales.data.cast("B")
            return
        own = self._tensor(tensor.name).dtype
        item, out = (tensor_nbytes(d, (1,)) for d in (own, tensor.dtype))
        for piece in self._own_bytes(tensor.name, item):
            if own == tensor.dtype:
                yield piece
            else:
                room = self._converted[: len(piece) // item * out]
                convert(piece, own, room, tensor.dtype)
                yield room

    def _rounded(self, name: str) -> Iterator[memoryview]:
        """Yield a matrix as int8, in pieces of whole rows."""
        entry = self.source[name]
        rounder = self.rounders[name] = Rounder(name, entry.dtype, entry.shape)
        for piece in self._own_bytes(name, tensor_nbytes(entry.dtype, entry.shape[1:])):
            yield rounder.round(piece)

    def _tensor(self, name: str) -> Made | TensorEntry:
        return self._made[name] if name in self._made else self.source[name]

    def _own_bytes(self, name: str, item: int) -> Iterator[memoryview]:
        """Yield a tensor's bytes as they are before conversion, in steps of whole items."""
        if name in self._made:
            data, step = self._made[name].make(), STEP_NBYTES // item * item
            yield from (data[at : at + step] for at in range(0, len(data), step))
        else:
            entry = self.source[name]
            yield from _pieces(self._reader, self._files[entry.file], entry.offset, entry.nbytes, item)


def _pieces(reader: Reader, file: ReadFile, offset: int, nbytes: int, item: int) -> Iterator[memoryview]:
    """Yield an extent of a file in steps of whole items, reading one ahead.

    Each piece is valid until the next is asked for.
    """
    step = max(STEP_NBYTES // item, 1) * item
    buffers = [aligned_buffer(min(nbytes, step) + 2 * BLOCK) for _ in range(2)]
    pending: list[tuple[Batch, memoryview]] = []
    try:
        for i, at in enumerate(range(offset, offset + nbytes, step)):
            start, end = at // BLOCK * BLOCK, min(at + step, offset + nbytes)
            room = buffers[i % 2]
            whole = room[: -(-(end - start) // BLOCK) * BLOCK]
            batch = reader.submit([Wanted(file, start, end - start, whole)])
            pending.append((batch, room[at - start : end - start]))
            if i:
                yield _take(pending)
        while pending:
            yield _take(pending)
    finally:
        for batch, _ in pending:
            batch.wait()


def _take(pending: list[tuple[Batch, memoryview]]) -> memoryview:
    batch, piece = pending.pop(0)
    batch.wait()
    return piece
