"""A DDUF file: a pipeline's folder as one zip archive, nothing compressed, so that weights are read in place.

Layout (the DDUF specification): `model_index.json` and, a folder deep, what a folder of diffusers holds:
settings, tokenizers and safetensors, stored. No torch.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from blockstream.errors import CheckpointError
from blockstream.system import regular

from .catalog import Checkpoint
from .entries import TensorEntry, unreadable
from .foreign import DDUF
from .index import parsed, safe_name, weight_map
from .safetensors_header import read_header

#: What is no weight is small: settings, tokenizers.
MOST_SMALL_NBYTES = 64 << 20
#: A member's own header, before its name and what else stands before its bytes.
_LOCAL = 30


@dataclass(frozen=True)
class Archive:
    """A DDUF file: where each member's bytes lie, by its name, as (offset, bytes)."""

    path: Path
    members: Mapping[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path) -> Archive:
        """Return the archive; raises CheckpointError for one that is none, or compressed."""
        try:
            with regular.opened(path) as stream, zipfile.ZipFile(stream) as archive:
                members = {}
                for one in archive.infolist():
                    if one.is_dir():
                        continue
                    name = safe_name(one.filename, path)
                    if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1:
                        raise CheckpointError(
                            f"{path}: {name} is compressed or encrypted, which is no DDUF; fetch it again"
                        )
                    stream.seek(one.header_offset)
                    local = stream.read(_LOCAL)
                    beside = [int.from_bytes(local[n : n + 2], "little") for n in (26, 28)]  # name, extra
                    members[name] = (one.header_offset + _LOCAL + sum(beside), one.file_size)
        except OSError as error:
            raise unreadable(path, error) from error
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{path}: is no archive ({error}); fetch it again") from error
        if "model_index.json" not in members:
            raise CheckpointError(
                f"{path}: has no model_index.json, which every DDUF file has; fetch it again"
            )
        return cls(path, members)

    def read(self, name: str) -> bytes:
        """Return the bytes of a small member."""
        begin, nbytes = self.members[name]
        if nbytes > MOST_SMALL_NBYTES:
            raise CheckpointError(f"{self.path}: {name} has {nbytes} bytes and is no weight; fetch it again")
        with regular.opened(self.path) as stream:
            stream.seek(begin)
            data: bytes = stream.read(nbytes)
        return data

    @property
    def small(self) -> tuple[str, ...]:
        """Return the names of all that are no weights."""
        return tuple(name for name in sorted(self.members) if not name.endswith((".safetensors", ".gguf")))

    def extract(self, folder: Path) -> None:
        """Write all that are no weights under a folder."""
        for name in self.small:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))

    def checkpoint(self, folder: str, variant: str | None = None) -> Checkpoint:
        """Return the checkpoint in one of its folders, read in place; raises CheckpointError for none."""
        within = [n for n in self.members if PurePosixPath(n).parent == PurePosixPath(folder)]
        found = [n for n in within if n.endswith(".safetensors")]
        indexes = [n for n in within if ".safetensors.index" in n]
        if variant is not None:
            found, indexes = ([n for n in some if f".{variant}" in n] for some in (found, indexes))
        if len(found) > 1:
            if len(indexes) != 1:
                raise CheckpointError(
                    f"{self.path}: {folder}/ holds {len(found)} safetensors files and {len(indexes)} indexes "
                    "of them; name a variant"
                )
            shards = {str(PurePosixPath(folder) / file) for file in self._index(indexes[0]).values()}
            if missing := shards - self.members.keys():
                raise CheckpointError(f"{self.path}: has no {min(missing)}, which {indexes[0]} names")
            found = sorted(shards)
        if not found:
            what = f"of variant {variant!r}" if variant else "in safetensors"
            raise CheckpointError(
                f"{self.path}: {folder}/ holds no weights {what}, but {', '.join(within[:6])}"
            )
        entries: dict[str, TensorEntry] = {}
        for name in found:
            begin, nbytes = self.members[name]
            entries |= read_header(self.path, begin, nbytes).entries
        return Checkpoint(self.path, "raw", entries)

    def _index(self, name: str) -> dict[str, str]:
        """Return tensor name -> shard of an index inside."""
        return weight_map(parsed(self.read(name).decode(), self.path / name), self.path / name)


def is_dduf(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is that of a DDUF file, by its name."""
    return Path(path).suffix.lower() == DDUF
