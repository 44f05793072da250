"""The sessions `verify` runs a pipeline in: one that streams and checks, one that holds whole stages.

Both record the output of every call. A stage whose weights fit in memory is compared with a second run in
which they are resident; of another, each visit is compared as it is made, in the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from blockstream.budget.amounts import format_nbytes
from blockstream.engine.store import StoreAround
from blockstream.errors import BudgetError, ModelError
from blockstream.module.binding import tensors_in
from blockstream.module.guards import Follower
from blockstream.module.partition import Place
from blockstream.module.prepared import CPU, Prepared
from blockstream.plan.planner import least_arena
from blockstream.plan.segments import Schedule
from blockstream.plugins.network import Network
from blockstream.streaming import open_sessions
from blockstream.streaming.session import Session
from blockstream.streaming.stage import sent_to
from blockstream.system.limits import headroom

from .recorder import Recorder, Seen
from .reference import Reference, bound, nbytes_of
from .segment_check import SegmentCheck

#: What is left free beside resident weights: this part of the headroom, and at least so much.
BESIDE_PART = 0.15
BESIDE_NBYTES = 64 << 20


class CheckedSession(Session):
    """A session that streams, records, and checks visit by visit what cannot be compared whole.

    `by_segment`: the names of stages to check so; None: those that do not fit in memory, True: all.
    """

    def __init__(
        self,
        *args: Any,
        by_segment: frozenset[str] | bool | None = None,
        seen: Seen | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.recorder = Recorder(seen)
        self.checks: dict[str, SegmentCheck] = {}
        #: By stage: what its weights take, and module path -> name of its segments.
        self.nbytes: dict[str, int] = {}
        self.segments: dict[str, dict[str, str]] = {}
        #: The stages whose weights are synthetic.
        self.synthetic: set[str] = set()
        #: What was free before anything was read, and the least arena of the stages checked by segment.
        self.free_nbytes = free_nbytes(self.where)
        self.arena_nbytes = 0
        self._by_segment = by_segment
        self._begun = False

    def start(self) -> None:
        """Plan and begin to read; decide how each stage is compared."""
        super().start()
        if self._begun:
            return
        self._begun = True
        chosen = self._chosen()
        for name, prepared in self.prepared.items():
            entries = {p.entry: p.name for p in prepared.parts if p.entry is not None}
            self.segments[name] = entries
            self.recorder.attach(name, prepared.module, entries)
            if prepared.synthetic is not None:
                self.synthetic.add(name)
            if name in chosen:
                self.checks[name] = SegmentCheck(prepared, self.where)
        if chosen and self.where.type == "cuda":
            # What the check holds beside a block is none of the run's: the budget is not meant for it.
            torch.cuda.set_per_process_memory_fraction(1.0, self.where)

    def close(self) -> None:
        """Undo what was changed to look on, then close. Idempotent."""
        self.recorder.detach()
        for check in self.checks.values():
            check.close()
        super().close()

    def _chosen(self) -> set[str]:
        """Return the stages to check by segment: as asked, else those that do not fit beside the others."""
        self.nbytes = {name: nbytes_of(prepared) for name, prepared in self.prepared.items()}
        if self._by_segment is not None:
            asked = self._by_segment
            chosen = set(self.nbytes) if asked is True else set(asked or ())
            self._least(chosen)
            return chosen
        chosen = set()
        for _ in self.nbytes:  # each that does not fit needs slots, which may push another out
            chosen = {n for n, nbytes in self.nbytes.items() if not self._fits(nbytes)}
            self._least(chosen)
        if chosen and self.where != CPU:  # a stage that streams would fill what a whole one needs there
            chosen = set(self.nbytes)
            self._least(chosen)
        return chosen

    def _fits(self, nbytes: int) -> bool:
        return nbytes + self.arena_nbytes + beside(self.free_nbytes) <= self.free_nbytes

    def _least(self, chosen: set[str]) -> None:
        stages = [s for s in self.plan.schedule.stages if s.name in chosen]
        self.arena_nbytes = least_arena(Schedule.of(stages)) if stages else 0


class ResidentSession(Session):
    """A session whose stages have all their weights in memory, from a stage's first call to its end.

    `segments`: stage -> module path -> name, as the streamed run had them. Stages in `streamed` do not
    fit and are streamed again, unchecked.
    """

    def __init__(
        self,
        *args: Any,
        segments: dict[str, dict[str, str]],
        streamed: frozenset[str] = frozenset(),
        seen: Seen | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.recorder = Recorder(seen)
        self._segments = segments
        self._streamed = streamed
        self._residents: dict[str, Resident] = {}
        self._modules: dict[str, nn.Module] = {}

    def stage(self, name: str, model: Any, checkpoint: Any = None, *args: Any, **options: Any) -> nn.Module:
        """Add a stage as `Session.stage` does and return its module; nothing is read yet."""
        if name in self._streamed:
            module = super().stage(name, model, checkpoint, *args, **options)
        else:
            module = self._resident(name, model, checkpoint, *args, **options)
        self._modules[name] = module
        return module

    def start(self) -> None:
        """Begin to record; streamed stages begin to read."""
        if self.names:
            super().start()
        if self._modules:
            for name, module in self._modules.items():
                self.recorder.attach(name, module, self._segments[name])
            self._modules.clear()

    def end(self, name: str) -> None:
        """End a stage: its weights go."""
        if name in self._residents:
            self._residents[name].free()
        else:
            super().end(name)

    def close(self) -> None:
        """Give every module back as it was. Idempotent."""
        self.recorder.detach()
        for resident in self._residents.values():
            resident.close()
            open_sessions.release(resident.prepared.module)
        super().close()

    def _resident(
        self,
        name: str,
        model: Any,
        checkpoint: Any = None,
        passes: Any = None,
        dtype: Any = None,
        example_inputs: Any = None,
        around: StoreAround | None = None,
        pace: Sequence[float] = (),
        between_s: float = 0.0,
    ) -> nn.Module:
        prepared, _, around = self.prepare(name, Network(model, checkpoint, dtype, around))
        if around is not None:
            raise ModelError(f"stage {name!r} has a store of its own: its weights cannot be held resident")
        self._residents[name] = Resident(prepared, self._make_room, self.where)
        open_sessions.claim(prepared.module, self)
        return prepared.outer

    def _make_room(self, wanted: Resident) -> None:
        """Free the stages before one that is about to be read: one at a time is in memory."""
        for resident in self._residents.values():
            if resident is not wanted:
                resident.free()
        free, nbytes = free_nbytes(self.where), nbytes_of(wanted.prepared)
        if nbytes > free:
            raise BudgetError(
                f"the {format_nbytes(nbytes)} of stage {wanted.prepared.name!r} no longer fit in the "
                f"{format_nbytes(free)} that are free; verify with --segments"
            )


class Resident:
    """One module without streaming: stand-ins until its first call, then all weights, read another way.

    Compute is `where`: inputs are moved, and outputs sent back, as those of a streamed module are.
    """

    def __init__(self, prepared: Prepared, make_room: Any, where: torch.device = CPU) -> None:
        self.prepared, self._where = prepared, where
        self._make_room = make_room
        self._depth, self._is_away = 0, False
        self._reference = Reference(prepared, where)
        self._loaded = ExitStack()
        self._is_loaded = False
        prepared.install(where)
        self._reference.fill_buffers()
        # No hooks: a module that looks for some before it chooses how to compute must find none.
        self._followed = [
            Follower(module, prepared.name, self._before, self._after, self._sent)
            for module in prepared.module.modules()
        ]
        for call in self._followed:
            call.attach()

    def free(self) -> None:
        """Drop the weights; a later call reads them again."""
        self._loaded.close()
        self._is_loaded = False

    def close(self) -> None:
        """Give the module back as it was. Idempotent."""
        self.free()
        for call in self._followed:
            call.remove()
        self._followed.clear()
        self.prepared.restore()
        self._reference.close()

    def _before(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._depth += 1
        if not self._is_loaded:
            self._make_room(self)
            weights = self.prepared.weights  # by the paths that they have now: adapters wrap some
            places = [at for at in _places(self.prepared.module) if at[0].path in weights]
            params = {at: self._reference.parameter(at[0].path) for at in places}
            self._loaded.enter_context(bound(self.prepared.module, params))
            self._is_loaded = True
        if self._depth > 1 or self._where == CPU:
            return None
        self._is_away = {t.device for _, t in tensors_in((args, kwargs))} == {CPU}
        moved: tuple[Any, Any] = sent_to(self._where, (args, kwargs))
        return moved

    def _after(self, output: Any, failed: bool) -> None:
        self._depth -= 1

    def _sent(self, output: Any) -> Any:
        return sent_to(CPU, output) if self._is_away and not self._depth else output


@contextmanager
def seeded() -> Iterator[None]:
    """Have torch's own generator begin at one place, for a pipeline that draws from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def free_nbytes(where: torch.device) -> int:
    """Return the bytes that are free for weights where compute is."""
    if where.type != "cuda":
        return headroom().nbytes
    return int(torch.cuda.mem_get_info(where)[0])


def beside(free_nbytes: int) -> int:
    """Return the bytes left free beside resident weights, for activations."""
    return max(BESIDE_NBYTES, int(BESIDE_PART * free_nbytes))


def _places(module: nn.Module) -> list[tuple[Place, ...]]:
    """Return the places of each parameter, those of a tied one together."""
    places: dict[int, list[Place]] = {}
    for path, owner in module.named_modules():
        for name, param in owner._parameters.items():
            if param is not None:
                places.setdefault(id(param), []).append(Place(path, name))
    return [tuple(at) for at in places.values()]
