"""Make what a stage was told ready: its module built, its checkpoint opened, its dtype known."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.engine.store import StoreAround
from blockstream.errors import ConfigError
from blockstream.module.dtypes import parse_dtype
from blockstream.module.empty import build
from blockstream.module.pretrained import from_folder
from blockstream.plugins.network import Network


class Made(NamedTuple):
    """A stage's module without weights, their checkpoint and dtype, and what makes the stage's store."""

    module: nn.Module
    checkpoint: Checkpoint
    dtype: str | None
    around: StoreAround | None


def made_of(name: str, network: Network, supply: Callable[[str, Network], Network] | None) -> Made:
    """Return what a stage is made of, or what `supply` has in its place.

    A path in the place of a module stands for the model that its config.json names, in the dtype that the
    model's library would load it in. Raises ConfigError where neither names any weights.
    """
    if network.checkpoint is None:
        if not isinstance(network.module, str | os.PathLike):
            raise ConfigError(
                f"stage {name!r} names no checkpoint; name the file or folder of its weights, or a model's "
                "folder in the place of the module"
            )
        network = network._replace(checkpoint=network.module)
    if supply is not None:
        network = supply(name, network)
    module, where, dtype, around = network
    assert where is not None
    checkpoint = where if isinstance(where, Checkpoint) else Checkpoint.open(where)
    asked = parse_dtype(dtype)
    if isinstance(module, str | os.PathLike):
        module = from_folder(module, asked, checkpoint)
        asked = module.dtype
    return Made(build(module), checkpoint, asked, around)
