"""What a stage is made of: what a pipeline declares, and a backend may have another for."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from blockstream.checkpoint import Checkpoint
    from blockstream.engine.store import StoreAround


class Network(NamedTuple):
    """What a stage is made of, as `Session.stage` takes it.

    `module`: a module without weights, a factory, (class, config), or the path of a folder whose config.json
    names one. `checkpoint`: where its weights lie, a path or opened; None in such a folder. `dtype`: what
    they are brought to, None for the files' own. `around(files)` makes the store that loads its segments,
    None for that of files.
    """

    module: Any
    checkpoint: Checkpoint | str | PathLike[str] | None
    dtype: Any = None
    around: StoreAround | None = None
