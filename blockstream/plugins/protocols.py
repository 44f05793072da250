"""The protocols a pipeline, a flow, a sampler and an attention transform fulfil, and the run context.

A model supplies a `Flow`, never a loop; a sampler is one function with one loop over a flow. An
attention transform is resolved once a run for each `AttentionLayer`; what depends on the step reads
it from `current_run()` when the layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from blockstream.engine.ledger import Span
    from blockstream.plan.segments import Stage
    from blockstream.run.config import RunConfig
    from blockstream.run.files import Files
    from blockstream.streaming.session import Session

AttentionKind = Literal["spatial", "temporal", "cross", "full"]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer as a transform sees it, shapes of this run included.

    `grid` (T, H, W) are the tokens of the video, in this order: frames, rows, columns. `kind` says what
    attends to what: "spatial", the tokens of a frame to each other; "temporal", those of a place; "full",
    all of the grid and its text; "cross", the grid to the text. `leading` and `trailing` text tokens stand
    before and behind the grid; the keys of "cross" are the trailing ones, alone. Called with q, k, v, a
    kernel is told of those that are there, without padding; asked beforehand, of the most there can be.
    `width` channels are split over `heads`.

    `name` is the module's path in its model; `index` says which of the model's `layers` of this kind it is,
    in the order of a pass. `merged`: the grid is what a `Merge` leaves.
    """

    name: str
    kind: AttentionKind
    grid: tuple[int, int, int]
    width: int
    heads: int
    leading: int = 0
    trailing: int = 0
    index: int = 0
    layers: int = 1
    merged: bool = False

    @property
    def T(self) -> int:  # noqa: N802
        """Return the frames."""
        return self.grid[0]

    @property
    def S(self) -> int:  # noqa: N802
        """Return the tokens a frame."""
        return self.grid[1] * self.grid[2]

    @property
    def text_tokens(self) -> int:
        """Return the text tokens on both sides."""
        return self.leading + self.trailing

    @property
    def pairs(self) -> int:
        """Return the pairs of query and key of one sample and head."""
        tokens = self.T * self.S
        if self.kind == "cross":
            return tokens * self.text_tokens
        if self.kind == "full":
            return (tokens + self.text_tokens) ** 2
        return tokens * (self.S if self.kind == "spatial" else self.T)


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Merge:
    """A pair that shortens what a layer attends to and restores its length.

    `merge` maps [B, T, S, C] to [B, T', S, C], `unmerge` maps the layer's result back to
    [B, T, S, C]; `positions` [T'] are the merged tokens' frame indices for rotary embeddings.
    `active` is asked when the layer computes; while False the layer runs as if there were no merge.
    """

    merge: Callable[[Tensor], Tensor]
    unmerge: Callable[[Tensor], Tensor]
    positions: Tensor
    active: Callable[[], bool] = _always


#: fn(q, k, v, layout) -> [B, heads, N, D]; q, k, v are [B, heads, N, D] in the order of tokens that layout,
#: the AttentionLayer of this call, states, padding left out. A "spatial" or "temporal" layer's B counts
#: frames or places too. A kernel that computes part of the pairs has a method `density()`: their share at
#: the step of `current_run()`, by which plans and reports go.
AttentionKernel = Callable[["Tensor", "Tensor", "Tensor", AttentionLayer], "Tensor"]


class Flow(Protocol):
    """What a sampler may know of a model: its times and its velocity.

    `times` [N] are the model's times from 1 (noise) towards 0 (data), decreasing; `len(times)` as an
    index means t = 0. `straight` says whether the training target is a straight line (rectified
    flow); samplers that extrapolate refuse a flow that is not. A flow may have `scheduler`, the config of a
    diffusers scheduler: `blockstream.plugins.straight.straight` tells from it, and refusals say why.
    """

    times: Sequence[float]
    straight: bool

    def velocity(self, z: Tensor, i: int) -> Tensor:
        """Return v(z, times[i]) with guidance and masks applied. One pass of the model."""

    def advance(self, z: Tensor, v: Tensor, i: int, to: int) -> Tensor:
        """Return z moved along v from times[i] to times[to]; `to == len(times)` is t = 0."""

    def remaining(self, n: int) -> None:
        """Take note that at most `n` more calls of `velocity` follow, from now on.

        Called as soon as it is known, after a velocity: with 0, what was read for more passes goes.
        """

    def step_done(self, i: int, z: Tensor, memory: Mapping[str, Any] | None) -> None:
        """Mark the step from index `i` as taken: the point that saves, reports and may cancel."""

    def state(self) -> Mapping[str, Any]:
        """Return what a resumed run needs beside z: tensors and numbers only."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; not called where that was empty."""


class Sampler(Protocol):
    """One function with one loop.

    It may have `passes(n) -> (least, most)`, the passes that n steps take where that is not one each, and
    `report(memory, n)`, what it has to say of a sampling, from the last memory it gave, for report.json.
    """

    def __call__(self, flow: Flow, z: Tensor, i: int = 0, memory: Mapping[str, Any] | None = None) -> Tensor:
        """Return the sample reached from `z` at index `i`; calls `flow.step_done` after each step."""


class Pipeline(Protocol):
    """What turns a config into results: it declares its stages and files, then makes them.

    `run` returns what report.json holds under "output"; its "files" are the results, relative to `run.out`.
    """

    def declare(self, session: Session, run: Run) -> None:
        """Add the stages that have work left, in the order they run; name what will be written.

        `session.stage(name, model, checkpoint, passes=...)`, `run.files.declare(files, states)`. Nothing is
        written yet: the run may still be refused.
        """

    def run(self, session: Session, run: Run) -> Mapping[str, Any]:
        """Make the results, saved by `run.files`."""


class Run(Protocol):
    """What a pipeline may know and use of the run it is part of.

    `planning`: nothing will run, checkpoints need not be there. `resumed`: it goes on with what is in `out`.
    """

    config: RunConfig
    out: Path
    files: Files
    planning: bool
    resumed: bool
    sampler: Sampler

    def sample(
        self, name: str, flow: Flow, z: Tensor, save_every: int = 5
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return what the run's sampler makes of z and what it says of it, saved under a declared state.

        A resumed run goes on from there. Remove the state, `files.drop(name)`, once the sample is written.
        """

    def passes(self, steps: int) -> tuple[int, int]:
        """Return the least and the most passes that the run's sampler makes of so many steps."""

    def sampled(self, name: str, steps: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the index and the passes at which a sampling was left: (0, 0) where it was not begun."""

    def check(self, what: str, value: Tensor) -> Tensor:
        """Return a tensor that is finite. Raises NonFiniteError naming it, unless the config lets it pass."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Name what is done outside the segments, for the ledger."""

    def token_merge(self, layer: AttentionLayer) -> Merge | None:
        """Return the merge a plugin has for a layer."""

    def merges_at(self, layers: Sequence[AttentionLayer], steps: int) -> Sequence[Mapping[str, Merge]]:
        """Return which layers will merge at each of a sampling's steps, by name: what a plan starts from."""

    def attention_kernel(self, layer: AttentionLayer) -> AttentionKernel | None:
        """Return the kernel a plugin has for a layer."""

    def densities_at(self, layers: Sequence[AttentionLayer], steps: int) -> Sequence[Mapping[str, float]]:
        """Return what share of its pairs each layer's kernel computes at each of a sampling's steps, by name.

        Layers whose kernel does not say so are left out.
        """


class Observer(Protocol):
    """Who is told what a session does: the hooks of the run's plugins, called by keyword."""

    def stage_started(self, *, stage: Stage) -> Any:
        """Take note that a stage begins."""

    def stage_finished(self, *, stage: Stage) -> Any:
        """Take note that a stage has ended."""

    def pass_started(self, *, stage: Stage, pass_index: int) -> Any:
        """Take note that a pass begins."""

    def pass_finished(self, *, stage: Stage, pass_index: int) -> Any:
        """Take note that a pass has ended."""

    def segment_loaded(self, *, span: Span) -> Any:
        """Take note of a load, on the loader thread."""

    def segment_executed(self, *, span: Span) -> Any:
        """Take note of a visit."""


@dataclass
class RunContext:
    """What may change while a run goes on and transforms may read: the sampler's step and their number."""

    step: int | None = None
    steps: int | None = None


_current: ContextVar[RunContext | None] = ContextVar("blockstream_run", default=None)


def current_run() -> RunContext:
    """Return the context of the run in progress; one is begun when there is none."""
    context = _current.get()
    if context is None:
        context = RunContext()
        _current.set(context)
    return context


@contextmanager
def new_run() -> Iterator[RunContext]:
    """Begin a context of its own for the length of the block."""
    token = _current.set(RunContext())
    try:
        yield current_run()
    finally:
        _current.reset(token)
