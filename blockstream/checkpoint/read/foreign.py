"""What files are that hold no tensors this package reads: named for what they are. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from blockstream.errors import CheckpointError

#: First bytes, what such a file is, and the way out.
_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (b"<!DOCTYPE", "a web page, most often a failed download", "fetch the file again"),
    (b"<html", "a web page, most often a failed download", "fetch the file again"),
    (b"\x89HDF", "an HDF5 file, as Keras and TensorFlow write", "fetch the safetensors of the same model"),
)
#: The same by name, for formats without a mark of their own.
DDUF = ".dduf"
_SUFFIXES = {
    ".msgpack": "a flax checkpoint",
    ".h5": "a TensorFlow checkpoint",
    ".onnx": "an ONNX graph",
    ".distcp": "a shard of torch's distributed checkpoints",
    ".nemo": "a NeMo archive",
}
#: Ways out of their own.
_WAYS = {
    ".distcp": "write it as one file with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
    "FOLDER FILE.pt`",
    ".msgpack": "fetch the safetensors of the same model, or write them with the library that reads it",
}


def name_foreign(path: Path, head: bytes) -> None:
    """Raise CheckpointError if the first bytes of a file, or its name, are those of another format."""
    for magic, what, way in _MAGIC:
        if head[: len(magic)].lower() == magic.lower():
            _refuse(path, what, way)
    if path.suffix.lower() == DDUF:
        _refuse(
            path,
            "a DDUF file, a whole pipeline in one archive",
            "stream it with blockstream.pipeline(), or `pipeline: diffusers` in a config",
        )
    if what := _SUFFIXES.get(path.suffix.lower(), ""):
        _refuse(path, what, _WAYS.get(path.suffix.lower(), "fetch or write the model as safetensors"))


def name_in_folder(folder: Path, names: list[str]) -> None:
    """Raise CheckpointError for a folder whose files are all of another format, or links that dangle."""
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.exists() and re.search(r"\.(safetensors|bin|pt|json)$", name):
            raise CheckpointError(
                f"{path}: is a link to {path.readlink()}, which is not there; fetch the files again"
            )
    if "model_index.json" in names:
        _refuse(
            folder,
            "the folder of a pipeline, whose networks lie in folders inside it",
            "name one of those, or stream them all with blockstream.pipeline()",
        )
    if "zero_to_fp32.py" in names:
        _refuse(
            folder,
            "a checkpoint of DeepSpeed, its weights cut up among processes",
            "write them whole with `python zero_to_fp32.py . OUT`, the file that lies in it",
        )
    for name in names:
        if (folder / name).suffix.lower() in (*_SUFFIXES, DDUF):
            name_foreign(folder / name, b"")


def _refuse(path: Path, what: str, way: str) -> NoReturn:
    raise CheckpointError(f"{path}: is {what}; {way}")
