"""The shelves of a session: memory beside the plan's, for the experts of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockstream.checkpoint.file_store import FileStore
from blockstream.checkpoint.read.reader import Reader
from blockstream.engine.arena import Arena
from blockstream.module.experts import Experts, find_experts
from blockstream.module.heads import Head
from blockstream.module.prepared import Prepared
from blockstream.module.shelf import Places, Shelf
from blockstream.plan.segments import Extent
from blockstream.system.limits import SystemMemory

from .declared import Declared
from .stage_facts import Facts


def address_space(stages: Sequence[Declared]) -> tuple[int, int]:
    """Return the bytes of the most, and of the least, that shelves of these stages may take."""
    places = [Places(s.prepared.experts) for s in stages]
    return sum(_most(p) * p.nbytes for p in places), sum(p.least_nbytes for p in places)


def _most(places: Places) -> int:
    """Return how many places a machine could ever give."""
    return min(places.most, SystemMemory.now(swap=False).total // max(places.nbytes, 1))


def experts_account(
    prepared: Mapping[str, Prepared], facts: Mapping[str, Facts]
) -> dict[str, Mapping[str, Any]]:
    """Return, by stage, what `plan` says of experts, in bytes; nothing of those that all fit in memory.

    `a_token_nbytes` is what one token routes to, where the config says how many that are; `whole` are the
    modules whose experts are read with their block, and why.
    """
    said = {name: _account(prepared[name], known) for name, known in facts.items()}
    return {name: account for name, account in said.items() if account is not None}


def _account(prepared: Prepared, facts: Facts) -> dict[str, Any] | None:
    found, whole = find_experts(prepared.module, facts.cut.named.weights)
    apart = [x for x in facts.cut.experts if not isinstance(x, Head)]
    if not apart and (found or not whole):
        return None
    chosen = getattr(getattr(prepared.module, "config", None), "get_text_config", lambda: None)()
    each = getattr(chosen, "num_experts_per_tok", None)
    return {
        "count": sum(x.count for x in apart),
        "nbytes": sum(x.nbytes for x in apart),
        "least_nbytes": facts.shelf_nbytes,
        "a_token_nbytes": sum(each * x.item_nbytes for x in apart) if isinstance(each, int) else None,
        "whole": whole,
    }


class Shelves:
    """A shelf for each stage whose experts are read one by one, in an arena from `offset` on."""

    def __init__(self, stages: Sequence[Declared], arena: Arena, offset: int) -> None:
        self._shelves: dict[str, Shelf] = {}
        space = address_space(stages)
        roomy = offset + space[0] <= arena.nbytes
        for stage in stages:
            if experts := stage.prepared.experts:
                shelf = _shelf(experts, arena, offset, roomy)
                offset += shelf.most_nbytes
                for number, each in enumerate(experts):
                    shelf.serve(stage.prepared.module.get_submodule(each.path), number)
                self._shelves[stage.name] = stage.prepared.shelf = shelf

    @property
    def nbytes(self) -> int:
        """Return the bytes that shelves may take now."""
        return sum(s.nbytes for s in self._shelves.values())

    @property
    def least_nbytes(self) -> int:
        """Return the bytes that shelves take at the least."""
        return sum(s.each.least_nbytes for s in self._shelves.values())

    @property
    def extents(self) -> list[Extent]:
        """Return where they may take them."""
        return [s.extent for s in self._shelves.values()]

    def resize(self, stage: str, nbytes: int) -> None:
        """Take so many bytes in all, or the least: what there is beyond that goes to the stage that runs."""
        spare = nbytes - self.least_nbytes
        for name, shelf in sorted(self._shelves.items(), key=lambda item: item[0] == stage):
            shelf.resize(shelf.each.least_nbytes + (max(0, spare) if name == stage else 0))

    def forget(self) -> None:
        """Serve nobody any more. Idempotent."""
        for shelf in self._shelves.values():
            shelf.forget()

    def close(self) -> None:
        """Stop reading. Idempotent."""
        for shelf in self._shelves.values():
            shelf.close()


def _shelf(experts: Sequence[Experts], arena: Arena, offset: int, roomy: bool) -> Shelf:
    store = FileStore(arena, {}, reader=Reader())
    places = Places(experts)
    return Shelf(store, experts, offset, _most(places) if roomy else places.least_nbytes // places.nbytes)
