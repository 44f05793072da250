"""Open a checkpoint of any supported form and list its tensors: where each one's bytes lie.

Nothing but headers is read and nothing stays open. Sharded and single safetensors, torch zip files
(`.bin`, `.pt`, `.pth`; their table of tensors comes from torch, in `blockstream.module.torch_pickle`), GGUF
files and packed folders all become the same `Checkpoint`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from blockstream.errors import CheckpointError
from blockstream.system import regular

from .entries import FileStamp, TensorEntry, unreadable
from .foreign import name_foreign, name_in_folder
from .gguf_header import MAGIC, read_gguf
from .index import read_index, read_json
from .locate import located
from .manifest import JOURNAL_NAME, MANIFEST_NAME, open_pack
from .quantised import quantisation, refuse_quantised
from .safetensors_header import read_header

#: "raw": files of no such form, whose entries were given and not found by `open`.
Form = Literal["safetensors", "torch", "packed", "raw", "gguf"]

#: A file of this name marks a folder whose weights were synthesised, and says from what.
SYNTHETIC_NAME = "synthetic.json"
#: What stands in its place while its files are written.
SYNTHESIS_NAME = "synthetic.unfinished.json"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: One of several shards, which alone are no checkpoint.
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")
#: An index: of one variant ("fp16") as transformers and diffusers name it, or of none.
_INDEX = re.compile(r"(?P<stem>.+)\.(safetensors|bin)\.index(\.(?P<variant>[\w-]+))?\.json")
#: What a folder is looked through for, in this order; the first that is there wins.
_STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin",
          "diffusion_pytorch_model.bin")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, and the files they lie in.

    `root` is the path that was opened. `synthetic` is what the marker of a synthesised folder says,
    None for real weights. Two names may share bytes in a torch file (tied weights), never in a
    safetensors file.
    """

    root: Path
    form: Form
    entries: Mapping[str, TensorEntry]
    synthetic: Mapping[str, Any] | None = None
    #: Tensors that an index names and the file it names does not hold (tied ones, mostly): name -> file.
    absent: Mapping[str, str] = field(default_factory=dict)
    #: Whose names a GGUF file's tensors have: "llama", "flux"; empty in other files.
    architecture: str = ""

    @classmethod
    def open(cls, path: str | os.PathLike[str], variant: str | None = None) -> Checkpoint:
        """Return the checkpoint at a file, an index, a folder, or of a hub's id in the local cache.

        `variant` ("fp16") names one of several that a folder holds. Raises CheckpointError naming what is
        there when no supported form is, or the first thing wrong with a header.
        """
        try:
            return cls._open(located(path), variant)
        except OSError as error:
            named = error.filename  # the file in the folder that refused
            raise unreadable(Path(named if isinstance(named, str) else path), error) from error

    @classmethod
    def _open(cls, path: Path, variant: str | None) -> Checkpoint:
        if not path.is_dir():
            regular.check(path)
        folder = path if path.is_dir() else path.parent
        marker = folder / SYNTHETIC_NAME
        synthetic = dict(read_json(marker)) if marker.exists() else None
        if (folder / MANIFEST_NAME).exists() and path in (folder, folder / MANIFEST_NAME):
            return cls(path, "packed", open_pack(folder).entries(), synthetic)
        file = _find(path, variant) if path.is_dir() else path
        if _is_gguf(file):
            header = read_gguf(file)
            return cls(path, "gguf", header.entries, synthetic, {}, header.architecture)
        try:
            form, entries, absent = _open_plain(file)
        except CheckpointError as error:
            if file.suffix in _TORCH_SUFFIXES and (settings := quantisation(file)) is not None:
                raise refuse_quantised(path, settings) from error  # its objects are no tensors
            raise
        return cls(path, form, entries, synthetic, absent)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the tensors' names in the order their bytes lie, file by file."""
        by_place = sorted(self.entries.items(), key=lambda item: (str(item[1].file.path), item[1].offset))
        return tuple(name for name, _ in by_place)

    @property
    def files(self) -> tuple[FileStamp, ...]:
        """Return the files that hold tensors, each once, in the order of their names."""
        return tuple(sorted({e.file for e in self.entries.values()}, key=lambda f: str(f.path)))

    @property
    def scales(self) -> frozenset[str]:
        """Return the names of the scales of int8 matrices (`checkpoint.int8`)."""
        named = (f"{name}_scale" for name, e in self.entries.items() if e.dtype == "I8")
        return frozenset(name for name in named if name in self.entries)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors, shared ones counted once."""
        return sum({(e.file, e.offset): e.nbytes for e in self.entries.values()}.values())

    def __getitem__(self, name: str) -> TensorEntry:
        """Return a tensor's entry; CheckpointError names the nearest names there are."""
        try:
            return self.entries[name]
        except KeyError:
            if name in self.absent:
                raise CheckpointError(
                    f"{self.root}: its index places {name!r} in {self.absent[name]}, which does not hold it; "
                    "fetch index and files again"
                ) from None
            near = get_close_matches(name, self.entries, 3, 0.5)
            hint = f"the nearest are {', '.join(near)}" if near else "none is like it"
            raise CheckpointError(
                f"{self.root}: has no tensor {name!r} among its {len(self.entries)}; {hint}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __len__(self) -> int:
        return len(self.entries)


def _find(folder: Path, variant: str | None) -> Path:
    """Return the file of a folder that stands for its checkpoint."""
    if (folder / JOURNAL_NAME).exists():
        raise CheckpointError(
            f"{folder}: is a pack that was not finished; run the same pack again to finish it"
        )
    if (folder / SYNTHESIS_NAME).exists():
        raise CheckpointError(
            f"{folder}: holds random weights that were not all written; run the same synth again to finish it"
        )
    names = sorted(p.name for p in folder.iterdir())
    for name in _wanted_names(names, variant):
        if (folder / name).exists():
            return folder / name
    name_in_folder(folder, names)
    if variant is not None:
        raise CheckpointError(f"{folder}: holds nothing of variant {variant!r}, but {', '.join(names[:8])}")
    for pattern in (_INDEX.pattern, r".+\.safetensors", r".+\.bin", r".+\.gguf"):
        found = [n for n in names if re.fullmatch(pattern, n) and not (folder / n).is_dir()]
        if len(found) == 1 and not _SHARD.search(found[0]):
            return folder / found[0]
        if len(found) == 1:
            raise CheckpointError(f"{folder}: holds the one shard {found[0]} and no index; fetch the rest")
        if found:
            raise CheckpointError(
                f"{folder}: holds {len(found)} files like {found[0]} and {found[1]}, and no index that says "
                "which to take; name the one to open, or a variant"
            )
    there = ", ".join(names[:8]) or "nothing"
    raise CheckpointError(
        f"{folder}: holds no safetensors file, no .bin file and no pack, but {there}; "
        "name the folder or file of the weights"
    )


def _wanted_names(names: Sequence[str], variant: str | None) -> list[str]:
    """Return what stands for a folder's checkpoint, the best first: an index, then one file."""
    if variant is None:
        return [f"{stem}.index.json" for stem in _STEMS] + list(_STEMS)
    indexes = [
        n for n in names if (m := _INDEX.fullmatch(n)) and variant in (m["variant"], m["stem"].split(".")[-1])
    ]
    stems = (stem.rsplit(".", 1) for stem in _STEMS)
    return indexes + [f"{stem}.{variant}.{suffix}" for stem, suffix in stems]


def _is_gguf(path: Path) -> bool:
    """Return whether a file is GGUF by its name or first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    with regular.opened(path) as stream:
        return stream.read(len(MAGIC)) == MAGIC


def _open_plain(path: Path) -> tuple[Form, dict[str, TensorEntry], dict[str, str]]:
    """Return form and entries of one file or of the shards an index names, and what the shards lack."""
    if not _INDEX.fullmatch(path.name):
        return *_read_file(path), {}
    index = read_index(path)
    shards = sorted(set(index.values()))
    for shard in shards:
        if shard.is_symlink() and not shard.exists():
            located(shard)
    missing = [s.name for s in shards if not s.exists()]
    if missing:
        raise CheckpointError(
            f"{path}: names {len(missing)} of {len(shards)} files that are not there "
            f"({', '.join(missing[:3])}); fetch them"
        )
    form: Form = "torch" if shards[0].suffix in _TORCH_SUFFIXES else "safetensors"
    by_shard = {shard: _read_file(shard)[1] for shard in shards}
    absent = {name: shard.name for name, shard in index.items() if name not in by_shard[shard]}
    return form, _of_index(path, index, by_shard, absent), absent


def _read_file(path: Path) -> tuple[Form, dict[str, TensorEntry]]:
    """Return form and entries of one file, its form told by its name, else by its first bytes."""
    if path.suffix != ".safetensors":
        with regular.opened(path) as stream:
            magic = stream.read(64)
        name_foreign(path, magic)
        if path.suffix in _TORCH_SUFFIXES or magic[:4] == b"PK\x03\x04":
            return "torch", _torch_entries(path)
    return "safetensors", read_header(path).entries


def _torch_entries(path: Path) -> dict[str, TensorEntry]:
    # By name, so that this module needs torch only for torch's own format.
    reader = importlib.import_module("blockstream.module.torch_pickle")
    entries: dict[str, TensorEntry] = reader.read_entries(path)
    return entries


def _of_index(
    path: Path,
    index: Mapping[str, Path],
    by_shard: Mapping[Path, Mapping[str, TensorEntry]],
    absent: Mapping[str, str],
) -> dict[str, TensorEntry]:
    """Return the shards' entries, where the index says; raises for a shard that holds nothing it should."""
    held = {shard for name, shard in index.items() if name not in absent}
    for name, shard in index.items():
        if shard not in held:
            raise CheckpointError(
                f"{path}: places {name!r} in {shard.name}, which holds nothing of what the index says; "
                "fetch index and files again"
            )
    found = {name: by_shard[shard][name] for name, shard in index.items() if name not in absent}
    for entries in by_shard.values():  # what the index forgot is there all the same
        for name, entry in entries.items():
            found.setdefault(name, entry)
    return found
