"""Compare a streamed stage with its reference visit by visit, while it runs.

After a block's forward, what is bound is compared with the segment's weights read another way; then the
forward is run again on those, with copies of its inputs, and the results are compared. So one segment
of the reference is in memory at a time. What is resident in the stage is compared once a pass, rows of
tables as they are gathered.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from blockstream.module.binding import tensors_in
from blockstream.module.experts import Experts, ExpertTable
from blockstream.module.heads import HeadTable
from blockstream.module.partition import Part, Place
from blockstream.module.prepared import CPU, Prepared
from blockstream.module.standins import RowTable
from blockstream.verify.difference import Difference, DifferenceError

from .recorder import most_apart, same
from .reference import Reference, bound

log = logging.getLogger(__name__)

#: The states of the processor's generator and of a device's.
Drawn = tuple[Tensor, Tensor | None]


class SegmentCheck:
    """The comparison of one stage: DifferenceError at the first difference. Close it to undo its changes."""

    def __init__(self, prepared: Prepared, where: torch.device = CPU) -> None:
        """Compute is `where`."""
        #: Visits compared, by segment.
        self.visits: Counter[str] = Counter()
        #: Segments whose inputs cannot be copied: their weights alone are compared.
        self.weights_alone: set[str] = set()
        self._stage = prepared.name
        self._module = prepared.module
        self._reference, self._where = Reference(prepared, where), where
        self._resident = [part for part in prepared.parts if part.resident]
        paths = {id(module): path for path, module in prepared.module.named_modules()}
        #: Where places are in the module as it is now: adapters wrap some.
        self._now = {
            place: Place(paths[id(prepared.owner(place))], place.name)
            for part in prepared.parts
            for places in part.params
            for place in places
        }
        self._first: str | None = None
        self._undo = ExitStack()
        self._undo.callback(self._reference.close)
        for part in prepared.parts:
            if part.entry is not None:
                self._wrap(part, self._module.get_submodule(part.entry))
        for path in prepared.tables:
            self._wrap_table(path)
        for each in prepared.experts:
            for place in each.places:
                self._wrap_parts(each, place)

    def close(self) -> None:
        """Give the modules their own forwards back, close the files. Idempotent."""
        self._undo.close()

    # -- blocks ------------------------------------------------------------------------------

    def _wrap(self, part: Part, block: nn.Module) -> None:
        forward = block.forward
        own = block.__dict__.get("forward")

        def checked(*args: Any, **kwargs: Any) -> Any:
            inputs = self._copied(part, (args, kwargs))
            random = _drawn(self._where)
            output = forward(*args, **kwargs)
            self._check(part, forward, (output, args, kwargs), inputs, random)
            return output

        block.forward = checked
        if own is None:
            self._undo.callback(delattr, block, "forward")
        else:
            self._undo.callback(setattr, block, "forward", own)

    def _check(
        self, part: Part, forward: Callable[..., Any], got: Any, inputs: Any | None, random: Drawn
    ) -> None:
        """Compare one visit: weights first, which names the parameter, then what they give."""
        self.visits[part.name] += 1
        self._check_resident(part)
        params = self._compare_weights(part)
        if inputs is None:
            return
        after = _drawn(self._where)
        _draw_on(random, self._where)
        with bound(self._module, params):
            args, kwargs = inputs
            want = (forward(*args, **kwargs), args, kwargs)
        _draw_on(after, self._where)
        ours, theirs = list(tensors_in(got)), list(tensors_in(want))
        if len(ours) != len(theirs):
            note = f"{len(ours)} tensors, and {len(theirs)} on weights read another way"
            self._differs(part, "output", None, note)
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            if not same(a, b):
                self._differs(part, "output", most_apart(a, b))

    def _copied(self, part: Part, inputs: Any) -> Any | None:
        """Return a copy of a block's inputs, caches included; None, and a note, for what has none."""
        kept = {id(m): m for m in self._module.modules()}
        try:
            return copy.deepcopy(inputs, kept)
        except Exception as error:
            if part.name not in self.weights_alone:
                log.warning("inputs of segment %r: its weights alone are compared (%s)", part.name, error)
            self.weights_alone.add(part.name)
            return None

    # -- weights -----------------------------------------------------------------------------

    def _compare_weights(self, part: Part) -> dict[Any, nn.Parameter]:
        """Compare what is bound of a part with the reference; return the reference."""
        params = {}
        for places in part.params:
            now = tuple(self._now[place] for place in places)
            want = params[now] = self._reference.parameter(now[0].path)
            for place in now:
                got = self._module.get_submodule(place.module)._parameters[place.name]
                assert got is not None
                if not same(got, want):
                    self._differs(part, f"parameter {place.path!r}", most_apart(got, want))
        return params

    def _check_resident(self, visited: Part) -> None:
        """Compare what stays for the whole stage, each time the first segment comes round."""
        self._first = self._first or visited.name
        if self._first == visited.name:
            for part in self._resident:
                self._compare_weights(part)

    def _wrap_table(self, path: str) -> None:
        module, _, name = path.rpartition(".")
        table = self._module.get_submodule(module)._parameters[name]
        assert isinstance(table, RowTable)
        rows = table.rows

        def checked(ids: Tensor) -> Tensor:
            got, want = rows(ids), self._reference.rows(path, ids)
            if not same(got, want):
                self._differs(None, f"rows of {path!r}", most_apart(got, want))
            return got

        table.rows = checked
        self._undo.callback(setattr, table, "rows", rows)

    def _wrap_parts(self, experts: Experts, place: Place) -> None:
        """Compare parts as they are asked for: a forward of the reference asks for the same ones."""
        table = self._module.get_submodule(place.module)._parameters[place.name]
        assert isinstance(table, ExpertTable | HeadTable)
        expert = table.expert

        def checked(i: int) -> Tensor:
            got, want = expert(i), self._reference.item(experts.item(place.name, i))
            if not same(got, want):
                self._differs(None, f"expert {i} of {place.path!r}", most_apart(got, want))
            return got

        table.expert = checked
        self._undo.callback(setattr, table, "expert", expert)

    def _differs(self, part: Part | None, what: str, apart: float | None, note: str = "") -> None:
        name = part.name if part is not None else None
        call = max(1, self.visits[name or ""])
        raise DifferenceError(Difference(self._stage, name, call, what, apart, note))


def _drawn(where: torch.device) -> Drawn:
    """Return where the generators are: the processor's, and that of the device which computes."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(where) if where.type == "cuda" else None


def _draw_on(state: Drawn, where: torch.device) -> None:
    """Put the generators back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], where)
