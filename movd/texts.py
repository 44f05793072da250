"""The embeddings of a run's captions on disk: those of the run in its folder, those of all runs in a cache.

Only the tokens that are attended to are kept; the others come back as zeros, which nothing reads. No more
than one caption's embedding is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockstream.errors import CheckpointError, EngineError
from blockstream.module.states import packed, unpacked
from blockstream.run.files import Files
from blockstream.system.atomic import replaced

log = logging.getLogger(__name__)

#: Changes when what an entry holds does.
FORM = 2
#: The names of the cache's own files, and of what a kill left of one: nothing else is removed.
_OWN = re.compile(r"[0-9a-f]{32}\.safetensors|\.[0-9a-f]{32}\.safetensors\.\d+")


class TextCache:
    """The embeddings of all runs in a folder: those used longest ago go when they exceed `most` bytes.

    A folder that cannot be written is done without, and so is an entry that is damaged.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder = folder
        self._most = most

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the entry of a key, None if there is no sound one, and note that it was used."""
        path = self.path(key)
        if not self._most or not path.is_file():
            return None
        try:
            found = unpacked(path, key)
        except CheckpointError as error:
            log.warning("%s; it is made again", error)
            return None
        try:
            path.touch()
        except OSError:
            log.info("%s cannot be marked as used", path)
        return found

    def put(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keep an embedding for later runs."""
        if not self._most:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced(self.path(key), unique=True) as temporary:
                packed(entry, key, temporary)
            self._shrink()
        except OSError as error:
            log.info("the cache of prompts cannot be written: %s", error)

    def _shrink(self) -> None:
        entries = [(p.lstat(), p) for p in self.folder.iterdir() if _OWN.fullmatch(p.name)]
        entries = [(stats, p) for stats, p in entries if stat.S_ISREG(stats.st_mode)]
        nbytes = sum(stats.st_size for stats, _ in entries)
        for stats, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if nbytes <= self._most:
                return
            path.unlink(missing_ok=True)
            nbytes -= stats.st_size


class Texts:
    """The embeddings one run needs, saved as states of the run; `names` are theirs.

    `about` is everything besides the caption that an embedding follows from. `missing` looks, `collect`
    makes the run independent of the cache.
    """

    def __init__(
        self, captions: Sequence[str], about: Mapping[str, Any], own: Files, cache: TextCache
    ) -> None:
        self._keys = {caption: _key(caption, about) for caption in captions}
        self._own, self._cache = own, cache
        self.names = [_name(key) for key in self._keys.values()]

    def missing(self, captions: Sequence[str]) -> list[str]:
        """Return the captions, each once, that no embedding is found of."""
        keys = self._keys
        return [
            caption
            for caption in dict.fromkeys(captions)
            if self._own.load(_name(keys[caption])) is None and self._cache.get(keys[caption]) is None
        ]

    def collect(self, captions: Sequence[str]) -> None:
        """Copy what the cache has of the captions into the run's folder."""
        for caption in dict.fromkeys(captions):
            key = self._keys[caption]
            if self._own.load(_name(key)) is None and (found := self._cache.get(key)) is not None:
                self._own.save(_name(key), found)

    def put(self, caption: str, y: Tensor, mask: Tensor) -> None:
        """Keep the embedding y [1, 1, L, C] of a caption, whose first tokens mask [1, L] keeps."""
        key = self._keys[caption]
        entry = {"y": y[0, 0, : int(mask.sum())].contiguous(), "length": y.shape[2]}
        self._own.save(_name(key), entry)
        self._cache.put(key, entry)

    def get(self, caption: str) -> tuple[Tensor, Tensor]:
        """Return y [1, 1, L, C] and mask [1, L] of a caption."""
        found = self._own.load(_name(self._keys[caption]))
        if found is None:
            raise EngineError(
                f"the embedding of {caption[:60]!r} is gone from the run's folder, or damaged; --resume "
                "makes it again"
            )
        y, length = found["y"], int(found["length"])
        mask = (torch.arange(length) < len(y)).long()[None]
        whole = y.new_zeros(1, 1, length, y.shape[-1])
        whole[0, 0, : len(y)] = y
        return whole, mask


def _name(key: str) -> str:
    return f"text/{key}"


def _key(caption: str, about: Mapping[str, Any]) -> str:
    text = json.dumps({"form": FORM, "caption": caption, **about}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
