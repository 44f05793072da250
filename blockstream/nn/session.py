"""Stages of one schedule under one budget: `blockstream.open()`.

Nothing is planned or read until the first forward of any stage, when all stages are known; from then
on the head of the first is read before it is asked for, and each stage's tail hides the next one's head.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from blockstream.arena import Arena
from blockstream.budget import format_nbytes, held, parse_nbytes, resolve_budget
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.store import FileStore
from blockstream.engine import Engine
from blockstream.errors import BudgetError, ConfigError, EngineError, ModelError
from blockstream.layout import align_up
from blockstream.ledger import Ledger
from blockstream.plan import Plan, least_arena, make_plan
from blockstream.report.plans import plan_record
from blockstream.retention import POLICIES, RetentionPolicy
from blockstream.segments import Exactly, Extent, Passes, Schedule, Unknown

from .binding import Binding, BindingStore
from .costs import default_costs, measured_costs
from .dtypes import parse_dtype
from .empty import build
from .prepared import Prepared
from .stage import StreamedStage

if TYPE_CHECKING:
    from blockstream.pipeline import Observer

log = logging.getLogger(__name__)

#: What is kept free of weights for activations: this part of the budget left, and at least so much.
ACTIVATIONS_PART = 0.15
ACTIVATIONS_NBYTES = 32 << 20
#: A new plan replaces one that is running if it is predicted to take this much less time.
GAIN = 0.03
#: Passes expected of a stage that does not say: enough for what is kept to pay.
EXPECTED_PASSES = 8

_of_module: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
_running: weakref.WeakSet[Session] = weakref.WeakSet()


def session(module: nn.Module) -> Session:
    """Return the session that streams a module; ModelError if none does."""
    found = _of_module.get(module)
    alive = found() if found is not None else None
    if alive is None:
        raise ModelError(f"{type(module).__name__} is not being streamed; open it with blockstream.stream()")
    return alive


class Session:
    """Stages that share a schedule, a budget and a ledger. Used by one thread at a time.

    `budget` bounds what the process holds, `arena` the weights; with neither, the weights get what
    80% of the headroom leaves. `policy` is "auto", a policy's name or `RetentionPolicy` values.
    `slots` fixes their number (1: nothing overlaps), `lookahead` how many visits ahead is loaded (1: Eq. 8).
    """

    def __init__(
        self,
        budget: int | str | None = None,
        arena: int | str | None = None,
        policy: str | RetentionPolicy | Sequence[RetentionPolicy] = "auto",
        *,
        slots: int | None = None,
        lookahead: int | None = None,
        variant: str = "",
        ledger: Ledger | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer
        self._observed: StreamedStage | None = None
        self._budget = budget
        self._arena_limit = None if arena is None else parse_nbytes(arena)
        self._policies = _policies(policy)
        self._slots = slots
        self._lookahead = lookahead
        #: What execution times depend on besides models and inputs: attention transforms, a backend.
        self.variant = variant
        self.ledger = ledger if ledger is not None else Ledger()
        self._stages: list[StreamedStage] = []
        self._engine: Engine | None = None
        self._arena: Arena | None = None
        self._store: BindingStore | None = None
        self._bindings: dict[tuple[str, str], Binding] = {}
        self._limit = 0
        self._resized = False
        self._active: StreamedStage | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._closed = False
        _refuse_second(self)
        _running.add(self)

    # -- what users call ---------------------------------------------------------------------

    def stage(
        self,
        name: str,
        model: Any,
        checkpoint: Checkpoint | str | os.PathLike[str],
        passes: int | Passes | None = 1,
        dtype: Any = None,
        example_inputs: Any = None,
    ) -> nn.Module:
        """Add a stage and return its module, ready to be called.

        `model`: a module built under `empty()`, a factory, or (class, config). `passes`: how many
        forwards, an int, `AtMost(n)`, or None when unknown. `example_inputs` let the order of the
        first pass be known before it runs. Raises EngineError once the first stage has begun.
        """
        if self._closed or self._engine is not None:
            when = "is closed" if self._closed else "has begun"
            raise EngineError(f"stage {name!r} is added after the session {when}; declare every stage first")
        if any(s.name == name for s in self._stages):
            raise ConfigError(f"there is a stage {name!r} already; give each its own name")
        module = build(model)
        if module in _of_module:
            raise ModelError(f"{type(module).__name__} is already being streamed; a module is one stage")
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
        prepared = Prepared(name, module, opened, parse_dtype(dtype))
        self._stages.append(StreamedStage(self, prepared, _passes(passes), example_inputs))
        _of_module[module] = weakref.ref(self)
        return module

    def start(self) -> None:
        """Plan and begin to read. The first forward of a stage does it otherwise."""
        if self._closed:
            raise EngineError("the session is closed; open another")
        if self._engine is not None:
            return
        plan = self.draft()
        needed = max(sum(align_up(s.nbytes) for s in x.segments) for x in plan.schedule.stages)
        self._arena = Arena(max(plan.arena_nbytes, min(self._limit, 2 * needed)))
        for s in self._stages:
            self._bindings.update(s.prepared.bindings(self._arena))
        files = FileStore(self._arena, {s.name: s.prepared.layouts for s in self._stages})
        self._store = BindingStore(files, self._bindings)
        self._files = files
        watch = self._observer
        self.ledger.note("plan", plan_record(plan))
        self._engine = Engine(
            plan,
            self._store,
            self.ledger,
            on_loaded=None if watch is None else lambda span: watch.segment_loaded(span=span),
            on_executed=None if watch is None else lambda span: watch.segment_executed(span=span),
        ).start()

    def draft(self) -> Plan:
        """Return the plan as it would be made now; nothing is allocated, no weight is read."""
        if self._engine is not None:
            return self._engine.plan
        if not self._stages:
            raise EngineError("the session has no stages; add one with stage()")
        self._limit = self._weights_nbytes()
        return self._first_plan()

    def activations_beside(self, arena_nbytes: int) -> int:
        """Return the bytes kept free of weights beside an arena."""
        return max(ACTIVATIONS_NBYTES, int(ACTIVATIONS_PART / (1 - ACTIVATIONS_PART) * arena_nbytes))

    def touched_nbytes(self) -> int:
        """Return the bytes of the arena that hold weights now."""
        return 0 if self._arena is None else self._arena.touched_nbytes

    def end(self, name: str) -> None:
        """End a stage now: its weights go, the next one's head is read."""
        stage = self._named(name)
        if self._engine is None:
            raise EngineError(f"stage {name!r} is ended before any has begun")
        stage.close_pass()
        self._engine.end_stage(name)
        self._observe_finished(stage)

    def close(self) -> None:
        """Stop reading, give every module back as it was. Idempotent."""
        if self._closed:
            return
        self._closed = True
        _running.discard(self)
        if self._observed is not None:
            self._observe_finished(self._observed)
        try:
            if self._engine is not None:
                self._engine.close()
        finally:
            if self._store is not None:
                self._store.close()
            for s in self._stages:
                s.restore()
                _of_module.pop(s.prepared.module, None)
            for binding in self._bindings.values():
                binding.forget()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the stages, in the order they run."""
        return tuple(s.name for s in self._stages)

    @property
    def plan(self) -> Plan:
        """Return the plan in force; made on first use."""
        self.start()
        assert self._engine is not None
        return self._engine.plan

    def set_budget(self, budget: int | str | None) -> None:
        """Go on under another budget from the next pass on; never above what the arena was made for."""
        self._budget = budget
        self._arena_limit = None
        if self._arena is not None:
            self._limit = min(self._arena.nbytes, self._weights_nbytes())
            self._resized = True

    @property
    def costs_from(self) -> dict[str, str]:
        """Return, by stage, in words where the costs it was first planned with come from."""
        return {s.name: s.known.source for s in self._stages}

    def remember(self) -> None:
        """Keep what was measured, on this machine, for the plans of later runs."""
        for index, stage in enumerate(self._stages):
            stage.remember(index)

    def report(self) -> dict[str, Any]:
        """Return what the ledger and the stores say so far, as report.json has its stages."""
        from .report import session_report

        return session_report(self)

    # -- observers ---------------------------------------------------------------------------

    def _observe_pass(self, stage: StreamedStage, pass_index: int | None, started: bool) -> None:
        """Tell the observer of a pass, and of the stage when it is its first."""
        if self._observer is None or self._engine is None:
            return
        planned = self._engine.plan.schedule
        now = planned.stages[planned.index(stage.name)]
        if not started:
            self._observer.pass_finished(stage=now, pass_index=pass_index or 0)
            return
        if self._observed is not stage:
            if self._observed is not None:
                self._observe_finished(self._observed)
            self._observed = stage
            self._observer.stage_started(stage=now)
        self._observer.pass_started(stage=now, pass_index=pass_index or 0)

    def _observe_finished(self, stage: StreamedStage) -> None:
        if self._observed is not stage or self._observer is None or self._engine is None:
            return
        self._observed = None
        planned = self._engine.plan.schedule
        self._observer.stage_finished(stage=planned.stages[planned.index(stage.name)])

    # -- planning ----------------------------------------------------------------------------

    def _weights_nbytes(self) -> int:
        """Return the bytes weights may take."""
        if self._arena_limit is not None:
            return self._arena_limit
        budget = resolve_budget(self._budget)
        if budget.warning:
            log.warning("%s", budget.warning)
        others = sum(
            s._arena.nbytes - s._arena.touched_nbytes
            for s in _running
            if s is not self and s._arena is not None
        )
        mine = self._arena.touched_nbytes if self._arena is not None else 0
        left = min(budget.nbytes - held().nbytes, budget.headroom.nbytes) + mine - others
        weights = left - max(ACTIVATIONS_NBYTES, int(ACTIVATIONS_PART * left))
        if weights <= 0:
            raise BudgetError(
                f"budget {format_nbytes(budget.nbytes)} leaves nothing for weights beside "
                f"{format_nbytes(held().nbytes)} held now and activations; the least is "
                f"{format_nbytes(held().nbytes + others + ACTIVATIONS_NBYTES + self._least(), up=True)}"
            )
        return weights

    def _least(self) -> int:
        return least_arena(self._schedule(), self._slots)

    def _schedule(self) -> Schedule:
        return Schedule.of([default_costs(s) for s in self._stages])

    def _first_plan(self) -> Plan:
        """Return the first plan; stages whose segments are too large for the arena are cut finer."""
        for s in self._stages:
            for halves in (2, 4):
                whole = Schedule.of([default_costs(s)])
                if least_arena(whole, self._slots) <= self._limit:
                    break
                resident = sum(x.nbytes for x in whole.stages[0].segments if x.resident)
                s.install(finer=max((self._limit - resident) // halves, 1))
        return self._make_plan(self._schedule())

    def _make_plan(self, schedule: Schedule) -> Plan:
        return make_plan(schedule, self._limit, self._policies, slots=self._slots, lookahead=self._lookahead)

    def _replan(self, stage: StreamedStage, reordered: bool) -> None:
        """Plan anew at a pass boundary: from the order that ran, from costs measured in the first pass."""
        engine = self._engine
        assert engine is not None
        first, stage.measured = not stage.measured, True
        if not (reordered or first or self._resized):
            return
        index = engine.plan.schedule.index(stage.name)
        changed = measured_costs(engine.plan.schedule.stages[index], index, self.ledger)
        if reordered:
            changed = replace(changed, order=stage.full_order)
        stages = list(engine.plan.schedule.stages)
        stages[index] = changed
        schedule = Schedule.of(stages)
        try:
            plan = self._make_plan(schedule)
        except BudgetError as error:
            log.warning("stage %r keeps its plan: %s", stage.name, error)
            return
        if not (reordered or self._resized):
            running = replace(engine.plan, schedule=schedule)
            if plan.predicted.wall_s > (1 - GAIN) * running.predicted.wall_s:
                return
        engine.adopt(plan)
        self.ledger.note("plan", plan_record(plan))
        if self._resized:
            self._resized = False
            assert self._arena is not None
            self._arena.discard(Extent(plan.arena_nbytes, self._arena.nbytes - plan.arena_nbytes))

    def _named(self, name: str) -> StreamedStage:
        for s in self._stages:
            if s.name == name:
                return s
        raise ConfigError(f"there is no stage {name!r}; there are {[s.name for s in self._stages]}")

    # -- calls -------------------------------------------------------------------------------

    def _enter(self, stage: StreamedStage) -> None:
        """Make the calling thread and a stage the ones that compute."""
        me = threading.get_ident()
        with self._lock:
            if self._owner is not None and self._owner != me:
                raise ModelError(
                    f"stage {stage.name!r} is called while another thread computes in the same session; one "
                    "streamed module runs at a time: take turns, or open a session each"
                )
            if self._owner == me:
                raise ModelError(
                    f"stage {stage.name!r} is called inside the forward of another stage; make one module "
                    "of the two, or call them one after the other"
                )
            self._owner = me
        try:
            self.start()
            if self._active is not stage:
                if self._active is not None:
                    self._active.close_pass()
                self._active = stage
        except BaseException:
            self._owner = None
            raise

    def _leave(self) -> None:
        self._owner = None

    def _is_inside(self) -> bool:
        return self._owner == threading.get_ident()


def _refuse_second(session: Session) -> None:
    """Refuse a session that names another budget than one that runs: a process has one."""
    if session._budget is None or session._arena_limit is not None:
        return
    for other in _running:
        if other._budget is not None and other._budget != session._budget:
            raise BudgetError(
                f"a session with budget {other._budget!r} is open in this process and another names "
                f"{session._budget!r}; name none to join it, or give this one an arena"
            )


def _passes(passes: int | Passes | None) -> Passes:
    if passes is None:
        return Unknown(EXPECTED_PASSES)
    return Exactly(passes) if isinstance(passes, int) else passes


def _policies(policy: str | RetentionPolicy | Sequence[RetentionPolicy]) -> Sequence[RetentionPolicy]:
    if isinstance(policy, RetentionPolicy):
        return (policy,)
    if not isinstance(policy, str):
        return tuple(policy)
    if policy == "auto":
        return POLICIES
    found = [p for p in POLICIES if p.name == policy]
    if not found:
        raise ConfigError(f"policy {policy!r}: write auto, {', '.join(p.name for p in POLICIES)}")
    return tuple(found)
