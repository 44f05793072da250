"""A saved .mlpackage: its manifest, its model file, its weight file. Nothing of the weights is read here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from blockstream.checkpoint.read.entries import unreadable
from blockstream.checkpoint.read.index import read_json, safe_name
from blockstream.errors import CheckpointError
from blockstream.system import regular

from .program import Function, read_function
from .proto import messages
from .weights import BlobReader, MappedWeights

MANIFEST = "Manifest.json"
#: What a program calls the folder its model file lies in.
MODEL_PATH = "@model_path/"
#: A model file describes operations and small constants; one above this is damage (protobuf's own limit).
MOST_MODEL_NBYTES = 2**31 - 1
_HASH_CHUNK = 8 << 20


@dataclass(frozen=True)
class Package:
    """One .mlpackage: `root` its folder, `model_path` the protobuf that its manifest names."""

    root: Path
    model_path: Path

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Package:
        """Return the package of a folder; CheckpointError says what of it is missing."""
        root = Path(root)
        if not root.is_dir():
            raise CheckpointError(f"{root}: is no folder; name a .mlpackage")
        manifest = root / MANIFEST
        if not manifest.is_file():
            there = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
            raise CheckpointError(f"{root}: holds no {MANIFEST} but {there}; name a .mlpackage")
        table = read_json(manifest)
        items = table.get("itemInfoEntries") if isinstance(table, dict) else None
        key = table.get("rootModelIdentifier") if isinstance(table, dict) else None
        entry = items.get(key) if isinstance(items, dict) and isinstance(key, str) else None
        if not isinstance(entry, dict) or "path" not in entry:
            raise CheckpointError(
                f"{manifest}: does not say which of its items is the model (rootModelIdentifier {key!r}); "
                "export the package again"
            )
        path = root / "Data" / safe_name(entry["path"], manifest)
        if not path.is_file():
            raise CheckpointError(
                f"{manifest}: names the model {path.name}, which is not there; copy it whole"
            )
        return cls(root, path)

    def __deepcopy__(self, memo: object) -> Package:
        """Stay the same, as nothing of it changes."""
        return self

    @property
    def name(self) -> str:
        """Return the package's name without its suffix."""
        return self.root.stem

    @cached_property
    def spec(self) -> Any:
        """Return the model file's protobuf, an ML program; CheckpointError for any other kind."""
        model, _ = messages()
        try:
            spec = model.Model.FromString(regular.read_bytes(self.model_path, MOST_MODEL_NBYTES))
        except OSError as error:
            raise unreadable(self.model_path, error) from error
        except CheckpointError:
            raise
        except Exception as error:  # protobuf's DecodeError, by any of its names
            raise CheckpointError(
                f"{self.model_path}: is not a Core ML model ({error}); copy or export the package again"
            ) from error
        kind = spec.WhichOneof("Type")
        if kind != "mlProgram":
            raise CheckpointError(
                f"{self.model_path}: is a model of type {kind or 'none'}, and only ML programs are "
                'evaluated; convert it with convert_to="mlprogram"'
            )
        return spec

    @property
    def functions(self) -> tuple[str, ...]:
        """Return the names of the package's functions, sorted."""
        return tuple(sorted(self.spec.mlProgram.functions))

    @property
    def default_function(self) -> str:
        """Return the name of the function that runs when none is named."""
        named = self.spec.description.defaultFunctionName
        return named or ("main" if "main" in self.functions else self.functions[0])

    def function(self, name: str | None = None) -> Function:
        """Return a function, checked from end to end; CheckpointError names the ones there are."""
        name = self.default_function if name is None else name
        if name not in self.functions:
            raise CheckpointError(
                f"{self.root}: has no function {name!r}; there are {', '.join(map(repr, self.functions))}"
            )
        return read_function(self.spec.mlProgram.functions[name], name, f"{self.root.name} ({name})")

    def file(self, name: str) -> Path:
        """Return the weight file a program names, as it must lie inside the package."""
        if not name.startswith(MODEL_PATH):
            raise CheckpointError(
                f"{self.model_path}: names the weight file {name!r}, expected one under {MODEL_PATH}; "
                "export the package again"
            )
        path = self.model_path.parent / safe_name(name.removeprefix(MODEL_PATH), self.model_path)
        if not path.is_file():
            raise CheckpointError(f"{self.root}: lacks the weight file {path.name}; copy the package whole")
        return path

    @contextmanager
    def weights(self, function: Function) -> Iterator[BlobReader]:
        """Map a function's weights for the length of the block."""
        if function.weight_file is None:
            yield _no_weights
            return
        with MappedWeights(self.file(function.weight_file), function.blobs) as mapped:
            yield mapped

    @cached_property
    def identity(self) -> str:
        """Return the SHA-256, in hexadecimal, of the package: every file's name, size and bytes.

        The manifest's random identifiers are left out, so that a copy or a second export is the same.
        """
        digest = hashlib.sha256()
        data = self.root / "Data"
        for path in sorted(p for p in data.rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(data).as_posix()} {path.stat().st_size}\n".encode())
            with regular.opened(path) as stream:
                while chunk := stream.read(_HASH_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()


def _no_weights(offset: int, nbytes: int) -> Tensor:
    raise CheckpointError(f"a function without weights asks for {nbytes} bytes at {offset}")
