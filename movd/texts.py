"""The embeddings of a run's captions on disk: those of the run in its folder, those of all runs in a cache.

Only the tokens that are attended to are kept; the others come back as zeros, which nothing reads. No more
than one caption's embedding is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blockstream.errors import EngineError
from blockstream.run.outputs import write_atomic
from blockstream.system import regular

log = logging.getLogger(__name__)

#: Changes when what an entry holds does.
FORM = 1


class TextFolder:
    """A folder of embeddings, one file a key. Anything wrong with a file makes it as if it were not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> tuple[Tensor, Tensor] | None:
        """Return y [1, 1, L, C] and mask [1, L] of a key, None if there is no sound entry."""
        path = self.path(key)
        try:
            regular.check(path)
            with safe_open(path, framework="pt") as file:
                about, y = file.metadata() or {}, file.get_tensor("y")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged and is made again: %s", path, error)
            return None
        length = about.get("length", "")
        if about.get("sha256") != _digest(key, length, y):
            log.warning("%s is damaged and is made again", path)
            return None
        mask = (torch.arange(int(length)) < len(y)).long()[None]
        whole = y.new_zeros(1, 1, int(length), y.shape[-1])
        whole[0, 0, : len(y)] = y
        return whole, mask

    def put(self, key: str, y: Tensor, mask: Tensor) -> None:
        """Write the embedding y [1, 1, L, C] of a caption, whose first tokens mask [1, L] keeps."""
        kept, length = y[0, 0, : int(mask.sum())].contiguous(), str(y.shape[2])
        about = {"length": length, "sha256": _digest(key, length, kept)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path(key), save({"y": kept}, about))


class TextCache(TextFolder):
    """The embeddings of all runs, of which those used longest ago go when they exceed `most` bytes.

    A folder that cannot be written is done without.
    """

    def __init__(self, folder: Path, most: int) -> None:
        super().__init__(folder)
        self._most = most

    def get(self, key: str) -> tuple[Tensor, Tensor] | None:
        """Return the entry of a key and note that it was used."""
        found = super().get(key) if self._most else None
        if found is not None:
            try:
                self.path(key).touch()
            except OSError:
                log.info("%s cannot be marked as used", self.path(key))
        return found

    def put(self, key: str, y: Tensor, mask: Tensor) -> None:
        """Keep an embedding for later runs."""
        if not self._most:
            return
        try:
            super().put(key, y, mask)
            self._shrink()
        except OSError as error:
            log.info("the cache of prompts cannot be written: %s", error)

    def _shrink(self) -> None:
        entries = [(p.stat(), p) for p in self.folder.iterdir()]  # also what a kill left half written
        nbytes = sum(stat.st_size for stat, _ in entries)
        for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if nbytes <= self._most:
                return
            path.unlink(missing_ok=True)
            nbytes -= stat.st_size


class Texts:
    """The embeddings one run needs.

    `about` is everything besides the caption that an embedding follows from. `missing` looks, `collect`
    makes the run independent of the cache.
    """

    def __init__(
        self, captions: Sequence[str], about: Mapping[str, Any], own: TextFolder, cache: TextCache
    ) -> None:
        self._keys = {caption: _key(caption, about) for caption in captions}
        self._own, self._cache = own, cache

    def missing(self, captions: Sequence[str]) -> list[str]:
        """Return the captions, each once, that no embedding is found of."""
        keys = self._keys
        return [
            caption
            for caption in dict.fromkeys(captions)
            if self._own.get(keys[caption]) is None and self._cache.get(keys[caption]) is None
        ]

    def collect(self, captions: Sequence[str]) -> None:
        """Copy what the cache has of the captions into the run's folder."""
        for caption in dict.fromkeys(captions):
            key = self._keys[caption]
            if self._own.get(key) is None and (found := self._cache.get(key)) is not None:
                self._own.put(key, *found)

    def put(self, caption: str, y: Tensor, mask: Tensor) -> None:
        """Keep the embedding of one caption, for this run and for later ones."""
        self._own.put(self._keys[caption], y, mask)
        self._cache.put(self._keys[caption], y, mask)

    def get(self, caption: str) -> tuple[Tensor, Tensor]:
        """Return y [1, 1, L, C] and mask [1, L] of a caption."""
        found = self._own.get(self._keys[caption])
        if found is None:
            path = self._own.path(self._keys[caption])
            raise EngineError(f"{path}, the embedding of {caption!r}, is gone or damaged; run the same again")
        return found


def _key(caption: str, about: Mapping[str, Any]) -> str:
    text = json.dumps({"form": FORM, "caption": caption, **about}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(key: str, length: str, y: Tensor) -> str:
    digest = hashlib.sha256(f"{key} {length} {tuple(y.shape)} {y.dtype}".encode())
    digest.update(y.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
