"""What a run's bits follow from beside its config: the weights, and the versions of what computes."""

from __future__ import annotations

import hashlib

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.sourced import contents
from blockstream.plugins import entrypoints
from blockstream.system.machine import versions

from .config import RunConfig

#: The packages whose version may change a bit.
PACKAGES = ("torch", "transformers", "diffusers", "blockstream-engine")
#: Checkpoints up to this size are told apart by all their bytes, larger ones by headers, sizes and times.
HASHED_NBYTES = 64 << 20


def identity_of(checkpoint: Checkpoint, beside: str = "") -> str:
    """Return what tells a checkpoint's weights from others, wherever they lie; `beside` goes into it.

    Small files are hashed whole. Of large ones the header, the size and the time of the last change are, so
    that they need not be read.
    """
    digest = hashlib.sha256(beside.encode())
    files = checkpoint.files
    small = sum(file.nbytes for file in files) <= HASHED_NBYTES
    for file in files:
        digest.update(f"{file.path.name} {file.nbytes} {file.header_hash}".encode())
        if not small:
            digest.update(str(file.mtime_ns).encode())
            continue
        for piece in contents(file):
            digest.update(piece)
    return digest.hexdigest()[:16]


def versions_of(config: RunConfig) -> dict[str, str | None]:
    """Return the versions of the packages that compute a run: the libraries', and those of its plugins."""
    installed = versions()
    named = {chosen.plugin for chosen in config.chosen() if chosen.key not in ("policy", "observers")}
    plugins = {p.distribution: p.version for p in entrypoints.plugins() if p.name in named}
    return {**{k: v for k, v in plugins.items() if v}, **{name: installed[name] for name in PACKAGES}}
