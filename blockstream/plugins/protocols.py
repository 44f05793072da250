"""The protocols a pipeline, a flow and a sampler fulfil.

A model supplies a `Flow`, never a loop; a sampler is one function with one loop over a flow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .network import Network
from .transforms import AttentionKernel, AttentionLayer, Merge

if TYPE_CHECKING:
    from torch import Tensor

    from blockstream.checkpoint import Checkpoint
    from blockstream.run.config import RunConfig
    from blockstream.run.files import Files
    from blockstream.streaming.session import Session


class Flow(Protocol):
    """What a sampler may know of a model: its times and its velocity.

    `times` [N] are the model's times from 1 (noise) towards 0 (data), decreasing; `len(times)` as an
    index means t = 0. `straight` says whether the training target is a straight line (rectified
    flow); samplers that extrapolate refuse a flow that is not. A flow may have `scheduler`, the config of a
    diffusers scheduler: `blockstream.plugins.straight.straight` tells from it, and refusals say why. One of
    several of a prompt may have a `name`, such as "unit 3, stage 1", for figures.
    """

    times: Sequence[float]
    straight: bool

    def velocity(self, z: Tensor, i: int) -> Tensor:
        """Return v(z, times[i]) with guidance and masks applied. One pass of the model."""

    def velocity_at(self, z: Tensor, t: float) -> Tensor:
        """Return v(z, t) at any time from times[0] to 0, both included, as `velocity` does. One pass.

        At times[i] it is velocity(z, i). A flow that knows its own times alone has no such method.
        """

    def advance(self, z: Tensor, v: Tensor, i: int, to: int) -> Tensor:
        """Return z moved along v from times[i] to times[to]; `to == len(times)` is t = 0.

        What it adds is proportional to v and to the time between: a part of the way is that part of it.
        """

    def remaining(self, n: int) -> None:
        """Take note that at most `n` more velocities are asked for, from now on.

        Called as soon as it is known, between two of them: with 0, what was read for more passes goes, and
        a further one is refused.
        """

    def step_done(self, i: int, z: Tensor, memory: Mapping[str, Any] | None) -> None:
        """Mark the step up to index `i` as taken: the point that saves, reports and may cancel.

        z is the sample at index `i + 1`, where a resumed run goes on with `memory`: `i + 1` is where the last
        `advance` led to.
        """

    def state(self) -> Mapping[str, Any]:
        """Return what a resumed run needs beside z: tensors and numbers only."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; not called where that was empty."""


class Sampler(Protocol):
    """One function with one loop. One that makes other than one pass a step is a `FullSampler`."""

    def __call__(self, flow: Flow, z: Tensor, i: int = 0, memory: Mapping[str, Any] | None = None) -> Tensor:
        """Return the sample reached from `z` at index `i`; calls `flow.step_done` after each step."""


class FullSampler(Sampler, Protocol):
    """A sampler that says what it will do and what it has done; either of the two may be left out."""

    def passes(self, steps: int) -> tuple[int, int]:
        """Return the least and the most velocities that a whole sampling of so many steps asks for.

        Plans go by it, and what is left of a resumed run is what it says less what was made. (steps, steps)
        where it is left out. One more than the most is refused.
        """

    def report(self, memory: Mapping[str, Any], steps: int) -> Mapping[str, Any]:
        """Return what is to be said of a sampling, from the last memory it gave, as JSON can hold it.

        It goes into report.json. Not called where the memory was None.
        """


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


class Backend(Protocol):
    """What a run's weights are read by, or its segments computed by, in the place of files and of torch.

    The engine asks it for every stage of any pipeline. It has `checkpoint`, `network` or both; `identity` is
    for a `network` that changes results, and `close()`, called as a run ends, for what holds connections.
    """

    def checkpoint(self, path: Path) -> Checkpoint:
        """Return the checkpoint that stands for a path of the config; headers alone are read.

        Its files have a `source`: headers, buffers, tables and segments are read through it, and what it
        cannot read ends the run. Raises ConfigError for a path that it has nothing for.
        """

    def network(self, stage: str, network: Network, run: Run) -> Network | None:
        """Return what a stage is made of in the place of the pipeline's own network: that one, or another.

        Another module is called as the pipeline's own would be, and its parameters are in its checkpoint.
        None: there are no segments for this stage, and the run is refused.
        """

    def identity(self) -> str:
        """Return what results follow from beside the config and the weights: a resumed run is held to it."""


class Run(Protocol):
    """What a pipeline may know and use of the run it is part of.

    `planning`: nothing will run, checkpoints need not be there. `resumed`: it goes on with what is in `out`.
    `backend_identity` tells what the config's backend computes from what others do, None where it names none.
    """

    config: RunConfig
    out: Path
    files: Files
    planning: bool
    resumed: bool
    sampler: FullSampler

    @property
    def backend_identity(self) -> str | None:
        """Return what tells results of this backend from others; None without one."""

    def checkpoint(self, path: str | PathLike[str]) -> Checkpoint:
        """Return the checkpoint at a path, as the config's backend has it. Headers alone are read."""

    def sample(
        self, name: str, flow: Flow, z: Tensor, save_every: int | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return what the run's sampler makes of z and what it says of it, saved under a declared state.

        A resumed run goes on from there: `save_every` is the steps between saves, None: once ten seconds
        would be lost. Remove the state, `files.drop(name)`, once the sample is written.
        """

    def passes(self, steps: int) -> tuple[int, int]:
        """Return the least and the most passes that the run's sampler makes of so many steps."""

    def sampled(self, name: str, steps: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the index and the passes at which a sampling was left: (0, 0) where it was not begun."""

    def check(self, what: str, value: Tensor, again: Callable[[], object] | None = None) -> Tensor:
        """Return a tensor that is finite. Raises NonFiniteError naming it, unless the config lets it pass.

        `again` makes the tensor once more, so that the error can name the module where it went wrong.
        """

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
