"""Stages of one schedule under one budget: `blockstream.open()`.

Nothing is planned or read until the first forward of any stage, when all stages are known; from then
on the head of the first is read before it is asked for, and each stage's tail hides the next one's head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from blockstream.budget.amounts import parse_nbytes
from blockstream.budget.governor import Governor, margin_nbytes
from blockstream.checkpoint import Checkpoint
from blockstream.device.budget import budget_on
from blockstream.device.choose import choose_device
from blockstream.device.protocol import Device
from blockstream.engine.ledger import Ledger
from blockstream.engine.store import StoreAround
from blockstream.errors import BudgetError, ConfigError, EngineError
from blockstream.module.adapters import base_of
from blockstream.module.faking import Call
from blockstream.module.layers.int8 import resolve
from blockstream.module.prepared import CPU, Prepared
from blockstream.plan.planner import Plan
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Passes, Schedule
from blockstream.plugins.network import Network
from blockstream.plugins.observer import Observer
from blockstream.system.memory import Held, MemoryWatch

from . import open_sessions
from .accounts import SCHEMA, session_report
from .asked import Asked
from .costs import Seen, load_of
from .declared import Declared
from .driver import Driver
from .first import First
from .least import finest_arena_nbytes
from .made import made_of
from .observing import Observing
from .op_costs import Measuring
from .options import parse_passes, parse_policies
from .origin import first_not_finite
from .plans import Plans
from .remembered import remember
from .stage import StreamedStage
from .stage_facts import Facts
from .starting import Starter
from .top_tier import TopTier


def session(module: nn.Module) -> Session:
    """Return the session that streams a module; ModelError if none does."""
    return open_sessions.find(module)  # type: ignore[no-any-return]


class Session:
    """Stages that share a schedule, a budget and a ledger. Used by one thread at a time.

    `budget` bounds what the process holds, `arena` the weights; with neither, the weights get what
    80% of the headroom leaves. `policy` is "auto", a policy's name or `RetentionPolicy` values.
    `slots` fixes their number (1: nothing overlaps), `lookahead` how many visits ahead is loaded (1: Eq. 8),
    `int8` how layers with int8 weights multiply (auto, bf16, fp32), which is numerics. On a `device`
    ("cuda", "cuda:1"; "auto" where torch has one) weights go on from host memory into `device_budget`, of
    which they take `device_arena` at most. `supply(stage, network)` returns what a stage is made of: a
    run's backend has another network for it. `measuring`: the operations that may be run before the first
    plan, to predict by; nothing is measured otherwise.
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
        int8: str = "auto",
        ledger: Ledger | None = None,
        observer: Observer | None = None,
        supply: Callable[[str, Network], Network] | None = None,
        device: str | Device | None = None,
        device_budget: int | str | None = None,
        device_arena: int | str | None = None,
        measuring: Measuring | None = None,
    ) -> None:
        self._on = budget_on(choose_device(device), device_budget, device_arena)
        self.budget = budget
        limits = [None if x is None else parse_nbytes(x) for x in (arena, device_arena)]
        policies, measuring = parse_policies(policy), measuring or Measuring()
        self._asked = Asked(policies, limits[0], slots, lookahead, limits[1], measuring)
        #: What execution times depend on besides models and inputs: attention transforms, a backend.
        self.variant = variant
        self.int8 = resolve(int8, on_device=self._on is not None)
        self.ledger = ledger if ledger is not None else Ledger()
        self._declared: list[Declared] = []
        self._first: First | None = None
        self._called: tuple[str, Call] | None = None
        self._plans: Plans | None = None
        self._closed = False
        self._supply = supply
        self._observing = Observing(observer, self._schedule)
        self._driver = Driver(self._begin, self.ledger, self._observing)
        self._stages = self._driver.stages
        self._governor = Governor(
            budget,
            touched_nbytes=self.touched_nbytes,
            mapped_nbytes=lambda: 0 if self._tier is None else self._tier.arena.nbytes,
            others_nbytes=lambda: open_sessions.others_nbytes(self),
        )
        self._starter = Starter(self._governor, self._on, self._asked, variant, self.ledger, self._observing)
        open_sessions.opened(self, has_arena=arena is not None)

    # -- stages ------------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        model: Any,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
        passes: int | Passes | None = None,
        dtype: Any = None,
        example_inputs: Any = None,
        around: StoreAround | None = None,
        pace: Sequence[float] = (),
        between_s: float = 0.0,
    ) -> nn.Module:
        """Add a stage and return its module, ready to be called.

        `model`: a module built under `empty()`, a factory, (class, config), or the folder of a model, whose
        config.json names its class; without a `checkpoint` the weights are the folder's. `passes`: how many
        forwards, an int, `AtMost(n)`, or None when unknown. `example_inputs` let the first pass's order be
        known before it runs. `around(files)` makes the stage's own store. `pace`: how long each pass takes
        beside an ordinary one, where that is known. Raises EngineError once a stage has begun.
        """
        if self._closed or self._tier is not None:
            when = "is closed" if self._closed else "has begun"
            raise EngineError(f"stage {name!r} is added after the session {when}; declare every stage first")
        if name in self._stages:
            raise ConfigError(f"there is a stage {name!r} already; give each its own name")
        prepared, opened, around = self.prepare(name, Network(model, checkpoint, dtype, around))
        inputs = None if example_inputs is None else Call.of(example_inputs)
        stage = Declared(prepared, opened, parse_passes(passes), inputs, around, tuple(pace), between_s)
        self._stages[name] = StreamedStage(self._driver, prepared, self.where)
        self._declared.append(stage)
        self._first = None
        open_sessions.claim(prepared.module, self)
        return prepared.outer

    def prepare(self, name: str, network: Network) -> tuple[Prepared, Checkpoint, StoreAround | None]:
        """Return a stage's module made ready, its checkpoint and what makes its store; nothing is added."""
        module, opened, dtype, around = made_of(name, network, self._supply)
        open_sessions.refuse_claimed(base_of(module))
        return Prepared(name, module, opened, dtype, int8=self.int8), opened, around

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the stages, in the order they run."""
        return tuple(s.name for s in self._declared)

    @property
    def prepared(self) -> dict[str, Prepared]:
        """Return the modules of the stages, as they are cut, by name."""
        return {s.name: s.prepared for s in self._declared}

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Return where the weights of each stage lie, by its name."""
        return {s.name: s.checkpoint for s in self._declared}

    # -- the run -----------------------------------------------------------------------------

    def draft(self) -> Plan:
        """Return the plan as it would be made now; nothing is allocated, changed or read but headers."""
        return self._engine_plan() or self._draft().plan

    def start(self) -> None:
        """Plan and begin to read. The first forward of a stage does it otherwise."""
        if self._closed:
            raise EngineError("the session is closed; open another")
        if self._tier is not None:
            return
        if self._called is not None and self._stage(self._called[0]).inputs is None:
            self._first = None  # a draft before knew less
        self.watch.sample()
        first = self._draft()
        for facts in first.facts:
            if facts.finer is not None or facts.cut.experts:
                self._stages[facts.name].recut(facts.cut)
        self._plans = self._starter.open(first, self._declared)
        self._plans.start(self._declared[0].name)

    def end(self, name: str) -> None:
        """End a stage now: its weights go, the next one's head is read."""
        stage = self._stages[self._stage(name).name]
        if self._tier is None:
            raise EngineError(f"stage {name!r} is ended before any has begun")
        stage.unsettle()
        stage.end_pass()
        self._tier.engine.end_stage(name)
        self._observing.stage_finished(name)

    def set_budget(self, budget: int | str | None) -> None:
        """Go on under another budget: less is retained before the next visit, more from the next pass on.

        An amount that cannot hold the least is refused, and nothing changes.
        """
        before = self._governor.budget
        if self._plans is not None:
            for stage in self._stages.values():
                stage.unsettle()
            self._governor.relieve()
        self._governor.set(budget)
        try:
            if self._plans is not None:
                self._plans.resize(self._driver.idle)
        except BudgetError:
            self._governor.set(before)
            raise
        self.budget = budget
        self._first = None

    def close(self) -> None:
        """Stop reading, give every module back as it was. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._driver.end()
        open_sessions.closed(self)
        if self._driver.forked:
            self._restore()  # the threads, and whatever they held, are the parent's
            return
        if self._tier is not None:
            self._observing.stage_finished()
        try:
            if self._tier is not None:
                self._tier.engine.close()
        finally:
            self._governor.close()
            if self._tier is not None:
                self._tier.close()
            self._restore()

    def _restore(self) -> None:
        self._driver.restore()
        for stage in self._declared:
            open_sessions.release(stage.prepared.module)
        if self._tier is not None:
            self._tier.forget()

    def fork(self) -> None:
        """Take note, in a forked child, that what was loaded is the parent's, as are its threads."""
        if self._tier is not None:
            self._driver.forked = True
            self._tier.unbind()
            for stage in self._stages.values():
                stage.unsettle()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- what it says ------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Return the plan in force; made on first use."""
        self.start()
        assert self._tier is not None
        return self._tier.engine.plan

    @property
    def watch(self) -> MemoryWatch:
        """Return the watch on what the process holds; it ends with the session."""
        if self._governor.watch is None:
            self._governor.begin(record=self._note_memory, on_sample=self._look_after)
        assert self._governor.watch is not None
        return self._governor.watch

    @property
    def facts(self) -> dict[str, Facts]:
        """Return what is known of each stage, by name; the first plan is made for it if there is none."""
        return {f.name: f for f in self._draft().facts} if self._plans is None else dict(self._plans.facts)

    @property
    def costs_from(self) -> dict[str, str]:
        """Return, by stage, in words where the costs it was first planned with come from."""
        return {name: facts.known.source for name, facts in self.facts.items()}

    @property
    def finest_arena_nbytes(self) -> int:
        """Return the least arena that the stages stream in, however finely they are cut."""
        return finest_arena_nbytes(self._declared, self._asked.slots, apart=self._on is None)

    def activations_beside(self, arena_nbytes: int) -> int:
        """Return the bytes kept free of weights beside an arena."""
        first = self._draft()
        beside = first.runtime_nbytes + first.activations_nbytes
        return first.activations_nbytes + margin_nbytes(beside + arena_nbytes)

    def device_forecast(self) -> dict[str, Any] | None:
        """Return what is planned to be held on a device, and what its link is taken for; None without one."""
        return self._starter.forecast(self._draft())

    def budget_report(self) -> dict[str, Any]:
        """Return whether the budget is held, and the peak by cause."""
        return self._governor.report()

    @property
    def activations_nbytes(self) -> int:
        """Return the most that a pass was seen to hold besides weights and what was held before it."""
        return self._governor.activations_nbytes

    @property
    def where(self) -> torch.device:
        """Return the device that modules compute on."""
        return CPU if self._on is None else self._on.device.where

    def touched_nbytes(self) -> int:
        """Return the bytes of the arena that hold weights now."""
        return 0 if self._tier is None else self._tier.arena.touched_nbytes

    @property
    def untouched_nbytes(self) -> int:
        """Return the bytes of the arena that are planned and not touched yet."""
        plan = self._engine_plan()
        return 0 if plan is None else max(0, plan.arena_nbytes - self.touched_nbytes())

    @property
    def unplanned(self) -> int:
        """Return how many visits were in no plan, and loaded on demand."""
        return 0 if self._tier is None else self._tier.engine.unplanned

    def first_not_finite(self, again: Callable[[], object]) -> str | None:
        """Return which module of which stage first returns NaN or infinity when a call is made again."""
        return first_not_finite(self.prepared, again)

    def remember(self) -> None:
        """Keep what was measured, on this machine, for the plans of later runs."""
        if self._plans is not None:
            seen = [Seen.of(self.ledger.spans, i, s.pace) for i, s in enumerate(self._declared)]
            for stage, one in zip(self._declared, seen, strict=True):
                remember(self._plans.facts[stage.name], self.variant, one, load_of(seen))

    def report(self) -> dict[str, Any]:
        """Return what the ledger and the stores say so far, as report.json has its stages."""
        budget = self.budget_report()
        if self._tier is None or self._plans is None:
            return {"schema": SCHEMA, "budget": budget, "stages": []}
        return session_report(self._tier, self._declared, self._plans.facts, self.ledger, budget)

    # -- inside ------------------------------------------------------------------------------

    def _begin(self, stage: str, call: Call, path: str) -> Plans:
        """Start, where nothing has: the call that is about to begin says what its stage needs."""
        if self._tier is None:
            self._called = (stage, call) if path == "" else None
            try:
                self.start()
            finally:
                self._called = None
        assert self._plans is not None
        return self._plans

    def _draft(self) -> First:
        """Return the first plan, made once for one start."""
        if self._first is None:
            self._first = self._starter.first(self._declared, self._called)
        return self._first

    @property
    def _tier(self) -> TopTier | None:
        return None if self._plans is None else self._plans.tier

    def _schedule(self) -> Schedule:
        assert self._tier is not None
        return self._tier.engine.plan.schedule

    def _engine_plan(self) -> Plan | None:
        return None if self._tier is None else self._tier.engine.plan

    def _stage(self, name: str) -> Declared:
        for stage in self._declared:
            if stage.name == name:
                return stage
        raise ConfigError(f"there is no stage {name!r}; there are {list(self.names)}")

    def _look_after(self, now: Held) -> None:
        self._driver.look_after()

    def _note_memory(self, held: Held, arena_nbytes: int) -> None:
        self.ledger.note("memory", [held.nbytes, arena_nbytes])
