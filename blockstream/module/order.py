"""The order a pass runs its blocks in: declared by the module, else told from the calls of one forward."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from .kept_rehearsals import Calls
from .partition import Part

log = logging.getLogger(__name__)


def order_of_parts(
    module: nn.Module, parts: Sequence[Part], declared: Sequence[str], calls: Calls | None
) -> list[int] | None:
    """Return the order of one pass as indices of parts: declared, else from a forward's calls, else None."""
    index = {part.entry: i for i, part in enumerate(parts) if part.entry is not None}
    if declared:
        return [index[path] for path in declared if path in index] or None
    if calls is None:
        return None
    ran = order_of_calls(calls, module, list(index))
    return [list(index.values())[k] for k in ran] if ran else None


def order_of_calls(calls: Calls, module: nn.Module, entries: Sequence[str]) -> list[int] | None:
    """Return the indices of `entries` (module paths) in the order they are called.

    None if nothing is called, or one inside another.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    first = {id(m): path for path, m in module.named_modules()}
    index = {first[id(modules[path])]: i for i, path in enumerate(entries)}
    ran: list[int] = []
    computing: str | None = None
    for path, begins in calls:
        if path not in index:
            continue
        if begins and computing is not None:
            log.info("%s is called while %s computes: the order is learnt in the first pass", path, computing)
            return None
        computing = path if begins else None
        if begins:
            ran.append(index[path])
    return ran if calls else None
