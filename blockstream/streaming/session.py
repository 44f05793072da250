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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blockstream.budget.amounts import parse_nbytes
from blockstream.budget.governor import Governor
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.file_store import FileStore
from blockstream.checkpoint.read.reader import Reader
from blockstream.device.budget import DeviceBudget
from blockstream.device.choose import choose_device
from blockstream.device.protocol import Device
from blockstream.device.rooms import DeviceArena
from blockstream.device.tier import DeviceTier
from blockstream.engine.arena import Arena
from blockstream.engine.engine import Engine
from blockstream.engine.ledger import Ledger
from blockstream.engine.loader import Lanes
from blockstream.engine.store import StagesStore, StoreAround
from blockstream.errors import BudgetError, ConfigError, EngineError, ModelError
from blockstream.module.binding import Binding, BindingStore, HostRooms
from blockstream.module.dtypes import parse_dtype
from blockstream.module.empty import build
from blockstream.module.layers.int8 import resolve
from blockstream.module.prepared import CPU, Prepared
from blockstream.plan.layout import align_up
from blockstream.plan.plain import plan_record
from blockstream.plan.planner import Plan
from blockstream.plan.retention import RetentionPolicy
from blockstream.plan.segments import Passes
from blockstream.system.disks import requests
from blockstream.system.memory import Held, MemoryWatch

from .device_planning import DevicePlanning
from .options import parse_passes, parse_policies
from .replanner import Planning
from .stage import StreamedStage

if TYPE_CHECKING:
    from blockstream.plugins.observer import Observer

log = logging.getLogger(__name__)

_of_module: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
_running: weakref.WeakSet[Session] = weakref.WeakSet()


def _fork_all() -> None:
    for each in list(_running):
        each._fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork_all)


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
    `slots` fixes their number (1: nothing overlaps), `lookahead` how many visits ahead is loaded (1: Eq. 8),
    `int8` how layers with int8 weights multiply (auto, bf16, fp32), which is numerics. On a `device`
    ("cuda", "cuda:1"; "auto" where torch has one) weights go on from host memory into `device_budget`, of
    which they take `device_arena` at most.
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
        device: str | Device | None = None,
        device_budget: int | str | None = None,
        device_arena: int | str | None = None,
    ) -> None:
        self._device = choose_device(device)
        for key, value in (("device_budget", device_budget), ("device_arena", device_arena)):
            if self._device is None and value is not None:
                raise ConfigError(f"{key} {value!r} without a device; name one, such as cuda")
        self._observer = observer
        self._observed: StreamedStage | None = None
        self._budget = budget
        self._arena_limit = None if arena is None else parse_nbytes(arena)
        #: What execution times depend on besides models and inputs: attention transforms, a backend.
        self.variant = variant
        self.int8 = resolve(int8)
        self.ledger = ledger if ledger is not None else Ledger()
        self._stages: list[StreamedStage] = []
        self._checkpoints: dict[str, Checkpoint] = {}
        self._engine: Engine | None = None
        self._arena: Arena | None = None
        #: The memory that modules compute from.
        self._memory: Arena | DeviceArena | None = None
        self._store: BindingStore | None = None
        self._bindings: dict[tuple[str, str], Binding] = {}
        self._active: StreamedStage | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._closed = False
        self._forked = False
        _refuse_second(self)
        self._governor = Governor(
            budget,
            touched_nbytes=self.touched_nbytes,
            mapped_nbytes=lambda: 0 if self._arena is None else self._arena.nbytes,
            others_nbytes=lambda: sum(s._untouched_nbytes() for s in _running if s is not self),
        )
        options = (self.ledger, parse_policies(policy), self._arena_limit, slots, lookahead)
        self._planning: Planning | DevicePlanning
        self._tier: DeviceTier | None = None
        if self._device is None:
            self._device_budget = None
            self._planning = Planning(self._governor, *options)
        else:
            self._device_budget = DeviceBudget(self._device, device_budget)
            most = None if device_arena is None else parse_nbytes(device_arena)
            self._planning = DevicePlanning(self._governor, self._device_budget, *options, most)
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
        around: StoreAround | None = None,
        pace: Sequence[float] = (),
    ) -> nn.Module:
        """Add a stage and return its module, ready to be called.

        `model`: a module built under `empty()`, a factory, or (class, config). `passes`: how many forwards,
        an int, `AtMost(n)`, or None when unknown. `example_inputs` let the first pass's order be known before
        it runs. `around(files)` makes the stage's own store. `pace`: how long each pass takes beside an
        ordinary one, where that is known. Raises EngineError once a stage has begun.
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
        prepared = Prepared(name, module, opened, parse_dtype(dtype), int8=self.int8)
        self._stages.append(
            StreamedStage(self, prepared, parse_passes(passes), example_inputs, around, tuple(pace))
        )
        self._checkpoints[name] = opened
        _of_module[module] = weakref.ref(self)
        return module

    def start(self) -> None:
        """Plan and begin to read. The first forward of a stage does it otherwise."""
        if self._closed:
            raise EngineError("the session is closed; open another")
        if self._engine is not None:
            return
        self._require_stages()
        self.watch.sample()
        plan = self._planning.first(self._stages)
        if isinstance(self._planning, DevicePlanning):
            self._start_on_device(plan, self._planning)
            return
        most = max(sum(align_up(s.nbytes) for s in x.segments) for x in plan.schedule.stages)
        self._arena = Arena.reserve(most, plan.arena_nbytes)  # address space for all a stage could retain
        self._memory = self._arena
        rooms = HostRooms(self._arena)
        for s in self._stages:
            self._bindings.update(s.prepared.bindings(rooms))
        self._store = BindingStore(StagesStore(self._open_files(self._arena), self._stages), self._bindings)
        watch = self._observer
        self.ledger.note("plan", plan_record(plan))
        self._engine = Engine(
            plan,
            self._store,
            self.ledger,
            on_loaded=None if watch is None else lambda span: watch.segment_loaded(span=span),
            on_executed=None if watch is None else lambda span: watch.segment_executed(span=span),
        )
        self._planning.hold_back(self._stages[0], self._engine)
        self._planning.commit(self._stages[0], self._engine, self._arena, self._engine.most_nbytes)
        self._engine.start()

    def _start_on_device(self, plan: Plan, planning: DevicePlanning) -> None:
        """Begin to read into host memory, and from there into the device's."""
        assert self._device is not None and self._device_budget is not None and planning.tiers is not None
        self._arena = Arena(planning.tiers.host.arena_nbytes)
        files = self._open_files(self._arena)
        watch = self._observer
        self._tier = DeviceTier(
            self._device,
            self._device_budget,
            planning.tiers,
            self._arena,
            files,
            self.ledger,
            None if watch is None else lambda span: watch.segment_loaded(span=span),
        )
        planning.store = self._tier.store
        self._memory = self._tier.arena
        for s in self._stages:
            layouts = self._tier.layouts(s.name)
            self._bindings.update(s.prepared.bindings(self._tier.arena, layouts))
        self._store = BindingStore(self._tier.store, self._bindings)
        self.ledger.note("plan", plan_record(plan))
        self._engine = Engine(
            plan,
            self._store,
            self.ledger,
            on_executed=None if watch is None else lambda span: watch.segment_executed(span=span),
            lanes=Lanes(loader="link", load="copy"),
        )
        self._tier.start()
        self._engine.start()

    def _open_files(self, arena: Arena) -> FileStore:
        layouts = {s.name: s.prepared.layouts for s in self._stages}
        threads, request_nbytes = requests(
            f.path for x in layouts.values() for y in x.values() for f in y.files
        )
        reader = Reader(threads=threads, request_nbytes=request_nbytes)
        self._files = FileStore(arena, layouts, reader=reader)
        return self._files

    def draft(self) -> Plan:
        """Return the plan as it would be made now; nothing is allocated, no weight is read."""
        if self._engine is not None:
            return self._engine.plan
        self._require_stages()
        return self._planning.first(self._stages)

    def _require_stages(self) -> None:
        if not self._stages:
            raise EngineError("the session has no stages; add one with stage()")

    def activations_beside(self, arena_nbytes: int) -> int:
        """Return the bytes kept free of weights beside an arena."""
        return self._planning.activations_beside(self._stages, arena_nbytes)

    @property
    def watch(self) -> MemoryWatch:
        """Return the watch on what the process holds; it ends with the session."""
        if self._governor.watch is None:
            self._governor.begin(record=self._note_memory, on_sample=self._look_after)
        assert self._governor.watch is not None
        return self._governor.watch

    def budget_report(self) -> dict[str, Any]:
        """Return whether the budget is held, and the peak by cause."""
        return self._governor.report()

    @property
    def activations_nbytes(self) -> int:
        """Return the most that a pass was seen to hold besides weights and what was held before it."""
        return self._governor.activations_nbytes

    @property
    def memory(self) -> Arena | DeviceArena | None:
        """Return the memory that modules compute from; None before the session has begun."""
        return self._memory

    @property
    def where(self) -> torch.device:
        """Return the device that modules compute on."""
        return CPU if self._device is None else self._device.where

    def device_report(self) -> dict[str, Any] | None:
        """Return what report.json says of the device: its name, its budget and what was copied there."""
        return None if self._tier is None else self._tier.report()

    def touched_nbytes(self) -> int:
        """Return the bytes of the arena that hold weights now."""
        return 0 if self._arena is None else self._arena.touched_nbytes

    def end(self, name: str) -> None:
        """End a stage now: its weights go, the next one's head is read."""
        stage = self._named(name)
        if self._engine is None:
            raise EngineError(f"stage {name!r} is ended before any has begun")
        stage.unsettle()
        stage.close_pass()
        self._engine.end_stage(name)
        self._observe_finished(stage)

    def close(self) -> None:
        """Stop reading, give every module back as it was. Idempotent."""
        if self._closed:
            return
        self._closed = True
        _running.discard(self)
        if self._forked:
            self._restore()  # the threads, and whatever they held, are the parent's
            return
        if self._observed is not None:
            self._observe_finished(self._observed)
        try:
            if self._engine is not None:
                self._engine.close()
        finally:
            self._governor.close()
            if self._store is not None:
                self._store.close()
            if self._tier is not None:
                self._tier.close()
            self._restore()

    def _restore(self) -> None:
        for s in self._stages:
            s.restore()
            _of_module.pop(s.prepared.module, None)
        for binding in self._bindings.values():
            binding.forget()

    def _fork(self) -> None:
        """In a forked child: what was loaded is the parent's alone, and so are the threads that load."""
        if self._engine is None:
            return
        self._forked = True
        for binding in self._bindings.values():
            binding.unbind(binding.bound_by)
        for s in self._stages:
            s.unsettle()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the stages, in the order they run."""
        return tuple(s.name for s in self._stages)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Return where the weights of each stage lie, by its name."""
        return dict(self._checkpoints)

    @property
    def plan(self) -> Plan:
        """Return the plan in force; made on first use."""
        self.start()
        assert self._engine is not None
        return self._engine.plan

    def set_budget(self, budget: int | str | None) -> None:
        """Go on under another budget: less is retained before the next visit, more from the next pass on.

        An amount that cannot hold the least is refused, and nothing changes.
        """
        if self._engine is None or self._arena is None:
            self._governor.set(budget)
        else:
            idle = self._active if self._owner is None else None
            for s in self._stages:
                s.unsettle()
            self._planning.resize(budget, idle, self._engine, self._arena)
        self._budget = budget

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
        from .accounts import session_report

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

    def _untouched_nbytes(self) -> int:
        """Return the bytes of the arena that are planned and not touched yet."""
        if self._engine is None:
            return 0
        return max(0, self._engine.plan.arena_nbytes - self.touched_nbytes())

    def _begin_pass(self, stage: StreamedStage, first: bool, inputs_nbytes: int) -> None:
        if self._engine is not None and self._arena is not None:
            self._planning.before_pass(stage, self._engine, self._arena, first, inputs_nbytes)

    def _end_visit(self, stage: StreamedStage) -> None:
        if self._engine is not None and self._arena is not None and not self._closed:
            self._planning.after_visit(stage, self._engine, self._arena)

    def _replan(self, stage: StreamedStage, reordered: bool) -> None:
        """Plan anew at a pass boundary."""
        if self._engine is not None and self._arena is not None:
            self._planning.after_pass(stage, self._engine, self._arena, reordered)
        # With an observer, or stages to prefetch for, every pass is followed.
        if len(self._stages) == 1 and self._observer is None and stage.settle():
            self.ledger.note("settled", stage.name)

    def _look_after(self, now: Held) -> None:
        """Have a stage that runs without hooks give memory back when it is short. The watch's thread."""
        if not self._stages:  # a resumed run may have nothing left to compute
            return
        stage, engine = self._stages[0], self._engine
        if not stage.settled or engine is None or not self._governor.is_due(settled=True):
            return
        if engine.plan.arena_nbytes > self._governor.weights_nbytes(slack=True):
            stage.wake()

    def _note_memory(self, held: Held, arena_nbytes: int) -> None:
        self.ledger.note("memory", [held.nbytes, arena_nbytes])

    def _named(self, name: str) -> StreamedStage:
        for s in self._stages:
            if s.name == name:
                return s
        raise ConfigError(f"there is no stage {name!r}; there are {[s.name for s in self._stages]}")

    # -- calls -------------------------------------------------------------------------------

    def _enter(self, stage: StreamedStage) -> None:
        """Make the calling thread and a stage the ones that compute."""
        if self._forked:
            raise ModelError(
                f"{stage.model_name} is called in a forked process, and its weights are loaded by threads of "
                "the parent; stream it in the child, fork before its first forward, or start processes by "
                'spawn (multiprocessing.set_start_method("spawn"))'
            )
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
