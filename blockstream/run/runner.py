"""Run or plan a config: the folder, the plugins, the session and the report around a pipeline."""

from __future__ import annotations

import copy
import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockstream.budget.amounts import parse_nbytes
from blockstream.engine.ledger import Ledger
from blockstream.plugins.blame import blaming
from blockstream.plugins.manager import Plugins
from blockstream.plugins.protocols import Pipeline
from blockstream.plugins.run_context import new_run
from blockstream.report.forecast import plan_account
from blockstream.report.larger import larger_for_run
from blockstream.report.outcome import (
    attention_account,
    budget_account,
    disk_account,
    sampler_account,
    stage_accounts,
)
from blockstream.run.activation import activate
from blockstream.system.energy import EnergyMeter
from blockstream.system.machine import versions
from blockstream.system.memory import held

from .config import RunConfig
from .drawing import draw
from .files import LEDGER, results_of
from .folder import RunFolder, run_folder, write_report
from .identity import identity_of, versions_of
from .in_progress import NOWHERE, RunInProgress
from .numerics import pinned

if TYPE_CHECKING:
    from blockstream.streaming.session import Session

log = logging.getLogger(__name__)

SCHEMA = 1


def run(
    config: RunConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observers: Sequence[object] = (),
) -> dict[str, Any]:
    """Run a config, write its folder and return what report.json holds.

    `out` None: the config's `output`, else the next free folder out/NAME. `observers` have hookimpls.
    With `resume` the run in the folder goes on; if nothing is left to do, its report is returned. With
    `overwrite` the files of the run in the folder go, once this one is accepted.
    Raises ConfigError for a folder that is in use or not empty, and for a config that is not the one a
    resumed run was begun with. A run that fails before it computes leaves nothing in its folder.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(out or _folder(config), resume, overwrite))
        found = versions_of(config)
        if resume:
            config = folder.resumed(config, found)
            if (done := folder.finished()) is not None:
                folder.tidy(pinned(config))
                return done
        stack.enter_context(_telling_how_to_go_on(folder))
        config = pinned(config)
        ledger = stack.enter_context(Ledger())
        stack.enter_context(ledger.phase("setup"))
        begin = partial(_begin, folder, config, found, ledger)
        if folder.is_new:  # from here on a kill leaves what `--resume` can go on with
            begin()
        plugins = activate(config)
        for n, observer in enumerate(observers):
            plugins.register(observer, f"observer#{n}")
        this = RunInProgress(config, folder.path, ledger, plugins, folder.files)
        stack.callback(this.close)
        ledger.note("budget", this.budget_nbytes)
        stack.push(partial(_tell_failed, plugins, this))
        stack.enter_context(new_run())
        if (energy := EnergyMeter()).measures:
            plugins.register(energy, "energy")
        report = _run_pipeline(this, plugins, folder, begin, energy)
        ledger.compute.phase = "report"
        plugins.hook.run_finished(run=this, report=copy.deepcopy(report))
        ledger.flush(sync=True)
        write_report(folder, report)
        draw(folder, report)
    return report


def _tell_failed(
    plugins: Plugins,
    this: RunInProgress,
    kind: type[BaseException] | None,
    error: BaseException | None,
    _: Any,
) -> None:
    """Tell the observers of a run that has failed; what they raise must not take its error's place."""
    if error is None or not this.begun:
        return
    try:
        plugins.hook.run_failed(run=this, error=error)
    except Exception as theirs:
        log.warning("%s", theirs)


def _begin(folder: RunFolder, config: RunConfig, found: Mapping[str, str | None], ledger: Ledger) -> None:
    """Begin to write to the folder; nothing happens the second time."""
    if ledger.path is None:
        folder.begin(config, found)
        ledger.write_to(folder.path / LEDGER)


def plan(config: RunConfig, measure: bool = True) -> dict[str, Any]:
    """Return what `plan --json` prints; nothing is read but headers.

    With `measure`, operations that will run are run on random operands, once a machine, to predict by.
    """
    from blockstream.streaming.shelves import experts_account

    ledger, config = Ledger(), pinned(config, planning=True)
    plugins = activate(config)
    this = RunInProgress(config, NOWHERE, ledger, plugins)
    with closing(this), open_session(this, measure="plan" if measure else "") as session:
        pipeline: Pipeline = config.pipeline.build()
        with _blaming(config.pipeline.who):
            pipeline.declare(session, this)
        return plan_account(
            made := session.draft(),
            this.items(made),
            config.policy.build(),
            session.costs_from,
            runtime_nbytes=held().nbytes,
            activations_beside=session.activations_beside,
            budget_nbytes=this.budget_nbytes,
            arena_nbytes=None if config.arena == "auto" else parse_nbytes(config.arena),
            finest_arena_nbytes=session.finest_arena_nbytes,
            device=session.device_forecast(),
            experts=experts_account(session.prepared, session.facts),
        )


def _run_pipeline(
    this: RunInProgress,
    plugins: Plugins,
    folder: RunFolder,
    begin: Callable[[], None],
    energy: EnergyMeter,
) -> dict[str, Any]:
    pipeline: Pipeline = this.config.pipeline.build()
    runtime, first = held().nbytes, None
    with open_session(this, measure="run", observer=plugins.hook) as session:
        this.finite.trace = session.first_not_finite
        who = this.config.pipeline.who
        with _blaming(who):
            pipeline.declare(session, this)
        if this.backend_identity is not None:
            this.files.identify({"backend": this.backend_identity})
        this.files.identify(_weights_of(session, this.files.identified))
        began_s, watch = this.ledger.now(), session.watch
        if session.names:  # a resumed run may have nothing left to compute
            first = session.draft()
            if (on := session.device_forecast()) is not None:
                this.device_budget_nbytes = on["budget"]["nbytes"]
        items = this.items(first)
        begin()
        this.begun = True
        plugins.hook.run_started(run=this)
        if session.names:
            session.start()
        folder.begun = True
        with this.phase("run"), _blaming(who):
            output = pipeline.run(session, this)
            for name in results_of(output):
                if not (this.out / name).is_file():
                    raise ValueError(f"run() returned the file {name!r}, which is not there")
                this.files.adopt(name)
        this.files.drop_states()
        this.ledger.compute.phase = "report"
        watch.sample()
        summary = session.report()
        session.remember()
        stages = stage_accounts(summary["stages"], first)
        policies = this.config.policy.build()
        larger = larger_for_run(first, stages, policies, summary, session.activations_beside)
    this.ledger.compute.mark("outside", "close")
    wall_s = this.ledger.compute.at
    items = this.measured(items, stages, wall_s)
    return {
        "schema": SCHEMA,
        "budget": {
            **summary["budget"],
            **budget_account(watch, began_s, this.ledger.all_spans(), runtime, session.activations_nbytes),
        },
        "stages": stages,
        "items": items,
        "sampler": sampler_account(this.config.sampler.written(), this.ledger.all_notes()),
        "attention": attention_account(
            [a.written() for a in this.config.attention],
            len(this.merges.layers),
            this.ledger,
            this.kernels.account(),
            plugins.said(),
        ),
        "disk": disk_account(summary["stages"], wall_s),
        "energy": energy.account(),
        "larger": larger,
        "output": dict(output),
        "wall_s": wall_s,
        "unaccounted": this.ledger.unaccounted(wall_s),
        **{k: v for k, v in summary.items() if k not in ("budget", "stages", "schema")},
        "versions": {"python": platform.python_version(), **versions()},
    }


def open_session(
    this: RunInProgress, kind: type[Session] | None = None, measure: str = "", **options: Any
) -> Session:
    """Return the session of a run, of another `kind` if named; `measure` as a "plan" or a "run" may."""
    from blockstream.device.choose import choose_device
    from blockstream.module.threads import use_threads
    from blockstream.streaming.op_costs import MAY, Measuring
    from blockstream.streaming.session import Session

    config = this.config
    this.device = device = choose_device(config.device, this.planning)
    assert isinstance(config.threads, int)
    use_threads(config.threads)
    this.measuring = Measuring(*MAY[measure])
    chosen = [*config.attention, *([] if config.backend is None else [config.backend])]
    return (kind or Session)(
        config.budget,
        None if config.arena == "auto" else config.arena,
        config.policy.build(),
        variant=", ".join(json.dumps(c.written(), sort_keys=True) for c in chosen),
        int8=config.int8,
        ledger=this.ledger,
        supply=this.network,
        device=device,
        device_budget=None if device is None else config.device_budget,
        measuring=this.measuring,
        **options,
    )


def _weights_of(session: Session, known: frozenset[str]) -> dict[str, str]:
    """Return what tells the weights of the stages from others, besides those the pipeline has named."""
    opened = session.checkpoints
    return {name: identity_of(opened[name]) for name in opened.keys() - known}


def _blaming(who: str) -> AbstractContextManager[None]:
    """Blame a pipeline for what it raises; what the system refuses it is said as it is."""
    return blaming(who, unless=lambda error: isinstance(error, OSError | MemoryError))


@contextmanager
def _telling_how_to_go_on(folder: RunFolder) -> Iterator[None]:
    """Say how a run goes on that was stopped, by whatever."""
    try:
        yield
    except BaseException:
        if folder.begun:
            log.warning("%s is unfinished; go on with: blockstream run --resume %s", *2 * (folder.path,))
        raise


def _folder(config: RunConfig) -> Path:
    """Return the folder a config names, else the next free one under out/."""
    if config.output is not None:
        return Path(config.output)
    stem = Path(config.source).stem
    names = (stem, *(f"{stem}-{n}" for n in range(2, 10_000)))
    return next(p for p in (Path("out") / name for name in names) if not p.exists())
