"""The hooks a plugin may implement. Docstrings only; docs/hooks.md shows each with an example.

A plugin is a module (or object) named by an entry point of the group `blockstream`. It is imported
when a config or a command names it, never otherwise. Mark implementations with `hookimpl` and take
the arguments you need, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from blockstream.checkpoint.formats import Format

from .choices import Choice, ModelFamily

if TYPE_CHECKING:
    from blockstream.engine.spans import Span
    from blockstream.plan.segments import Stage

    from .transforms import AttentionKernel, AttentionLayer, Merge

__all__ = ["Choice", "ModelFamily", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("blockstream")
hookimpl = pluggy.HookimplMarker("blockstream")


# What a config can name. Called when the plugin is loaded; return quickly and import nothing heavy:
# that is for `Choice.build`.


@hookspec
def pipelines() -> Sequence[Choice]:  # type: ignore[empty-body]
    """List the pipelines of this plugin: what `pipeline:` may name.

    `build(options)` returns a Pipeline. `options` is the model of every key of the YAML that is not
    the engine's own. Its validators find the folder that relative paths start from in
    `info.context["base"]` and leave paths absolute, so that the dumped config can be run again.
    """


@hookspec
def model_families() -> Sequence[ModelFamily]:  # type: ignore[empty-body]
    """List the architectures that `synth` and `plan` know by name.

    `module()` returns the full-size module with its parameters on the meta device.
    """


@hookspec
def weight_formats() -> Sequence[Format]:  # type: ignore[empty-body]
    """List the formats of weights that this plugin reads: rows of the table in `checkpoint.formats`.

    Asked where the table's own rows do not fit a checkpoint. `Format.find(tensors)` yields the weights it
    knows as coded entries, `Format.layer(stored)` returns one of them widened, in `stored.shape` and
    `stored.dtype`; it may not keep or return a view of what is stored.
    """


@hookspec
def backends() -> Sequence[Choice]:  # type: ignore[empty-body]
    """List the backends of this plugin: what `backend:` may name.

    `build(options)` returns a `Backend`: `checkpoint(path)` opens weights that lie elsewhere,
    `network(stage, network, run)` gives a stage other segments, or a store of its own. The engine
    asks it for every stage of any pipeline.
    """


@hookspec
def samplers() -> Sequence[Choice]:  # type: ignore[empty-body]
    """List the samplers of this plugin: what `sampler:` may name.

    `build(options)` returns a `Sampler`: `sample(flow, z, i=0, memory=None) -> z`, one function
    with one loop that calls `flow.step_done(i, z, memory)` after each step. `memory` holds tensors
    and numbers only, so that a run resumes from it.
    """


@hookspec
def attention_transforms() -> Sequence[Choice]:  # type: ignore[empty-body]
    """List the attention transforms of this plugin: what `attention:` may name.

    `build(options)` returns an object with hookimpls `token_merge`, `attention_kernel` or both. It
    is registered for the run; the first of the list in the YAML is asked first.
    """


@hookspec
def retention_policies() -> Sequence[Choice]:  # type: ignore[empty-body]
    """List the retention policies of this plugin: what `policy:` may name.

    `build(options)` returns the `RetentionPolicy` values that compete: the plan of least predicted
    time wins. Each is a pure function of a stage and the bytes there are.
    """


@hookspec
def schedulers() -> Sequence[Choice]:  # type: ignore[empty-body]
    """List the schedulers of this plugin: what `sweep --on` may name.

    `build(options)` returns a `Scheduler`: `run(perform, tasks, needs)` yields each task once, as `Ended`,
    whatever machine or process dies over it. It gives a machine no more runs than `needs` leave room for.
    """


@hookspec
def observers() -> Sequence[Choice]:  # type: ignore[empty-body]
    """List the observers of this plugin that have options: what `observers:` may name.

    `build(options)` returns an object with hookimpls of those below, `run_started` to `segment_executed`. It
    is registered for the run and changes nothing of its results.
    """


# Asked once a run for each attention layer.


@hookspec(firstresult=True)
def token_merge(layer: AttentionLayer) -> Merge | None:
    """Run one attention layer on fewer tokens.

    Called once a run for each `AttentionLayer` (grid, kind, heads, width, text tokens); the step is
    read from the run context when the layer computes. Return Merge(merge, unmerge, positions):
    merge maps [B, T, S, C] to the tokens attended to, unmerge maps the result back, positions
    are the merged tokens' frame indices for rotary embeddings. Both must trace. None: unchanged.
    """


@hookspec(firstresult=True)
def attention_kernel(layer: AttentionLayer) -> AttentionKernel | None:
    """Compute one attention layer by another kernel.

    Called once a run for each `AttentionLayer`, and for each as it is while its tokens are merged.
    Return fn(q, k, v, layout) with q, k, v of [B, heads, N, D] in the order of tokens that layout, the
    layer, states, without padding; it returns the same shape and dtype as q. A method `density()` says
    which share of the pairs it computes at the step of the run context. None: PyTorch's own.
    """


# Observers. Their results are ignored; what they raise ends the run, under the plugin's name.


@hookspec
def run_started(run: Any) -> None:
    """Observe that a run begins: it has been planned and accepted, and nothing has been loaded yet.

    `run` has `config` (the RunConfig), `out` (the folder it writes, a Path), `files` (what it writes
    there: declare a name, then write it), `budget_nbytes`, and `predicted_s`: the predicted seconds of
    each stage by name, in order, kept up to date.
    """


@hookspec
def run_finished(run: Any, report: dict[str, Any]) -> None:
    """Observe that a run has ended well. `report` is what report.json holds."""


@hookspec
def run_failed(run: Any, error: BaseException) -> None:
    """Observe that a run that was begun has failed, or was interrupted; `error` is what ended it.

    What this raises is logged: it does not take the error's place.
    """


@hookspec
def stage_started(stage: Stage) -> None:
    """Observe that a stage begins, on the compute thread. `stage.passes` says how many passes."""


@hookspec
def stage_finished(stage: Stage) -> None:
    """Observe that a stage has ended, on the compute thread: a sampler may end it early."""


@hookspec
def pass_started(stage: Stage, pass_index: int) -> None:
    """Observe that a pass (one forward of the stage) begins, on the compute thread."""


@hookspec
def pass_finished(stage: Stage, pass_index: int) -> None:
    """Observe that a pass has ended, on the compute thread."""


@hookspec
def segment_loaded(span: Span) -> None:
    """Observe that a segment has been read, on the loader thread. Return at once."""


@hookspec
def segment_executed(span: Span) -> None:
    """Observe that a segment has computed, on the compute thread. Return at once."""
