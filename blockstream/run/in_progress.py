"""A run as its pipeline and its observers see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockstream.budget.amounts import resolve_budget
from blockstream.checkpoint import Checkpoint
from blockstream.engine.ledger import Ledger
from blockstream.plugins.manager import Plugins
from blockstream.plugins.network import Network
from blockstream.plugins.protocols import Flow, FullSampler
from blockstream.plugins.run_context import new_run
from blockstream.plugins.transforms import AttentionKernel, AttentionLayer, Merge
from blockstream.report.items import measured_items
from blockstream.report.sampling import WatchedKernels, WatchedMerge

from . import around
from .config import RunConfig
from .files import Files
from .finite import Finite
from .steps import sample, saved_step
from .supply import Supply
from .watched import WatchedSampler

if TYPE_CHECKING:
    from torch import Tensor

    from blockstream.device.protocol import Device
    from blockstream.plan.planner import Plan
    from blockstream.streaming.op_costs import Measuring

#: The folder of a run that is only planned: nothing of an earlier run is found there, nothing is written.
NOWHERE = Path(os.devnull) / "run"


class RunInProgress:
    """A run as its pipeline and its observers see it; see `protocols.Run` and the hook `run_started`.

    Without `files` it has those of an empty folder that is its own.
    """

    def __init__(
        self, config: RunConfig, out: Path, ledger: Ledger, plugins: Plugins, files: Files | None = None
    ) -> None:
        self.config = config
        self.out = out
        self.planning = out == NOWHERE
        self.files = Files(out) if files is None else files
        self.resumed = self.files.resumed
        self.ledger = ledger
        self.budget_nbytes = resolve_budget(config.budget).nbytes
        #: The device that networks compute on, None for the processor, and the budget there.
        self.device: Device | None = None
        self.device_budget_nbytes: int | None = None
        self.predicted_s: dict[str, float] = {}
        self.finite = Finite(config.allow_nonfinite)
        self.files.finite = not config.allow_nonfinite
        self.sampler: FullSampler = WatchedSampler(
            config.sampler.build(), ledger, config.sampler.who, self.finite.refuse
        )
        self.merges = WatchedMerge(ledger)
        self.kernels = WatchedKernels()
        self._supply = Supply(config.backend, config.pipeline.ref)
        self.hook = plugins.hook
        #: What may be measured for its plan, and when that was made.
        self.measuring: Measuring | None = None
        self._planned_s = self.rest_s = 0.0
        #: Whether its observers have been told of it.
        self.begun = False

    @property
    def backend_identity(self) -> str | None:
        """Return what tells results of the config's backend from others; None without one."""
        return self._supply.identity

    def checkpoint(self, path: str | os.PathLike[str]) -> Checkpoint:
        """Return the checkpoint at a path, as the config's backend has it."""
        return self._supply.checkpoint(path)

    def network(self, stage: str, network: Network) -> Network:
        """Return what a stage is made of: what the pipeline names, or what the backend has in its place."""
        return self._supply.network(stage, network, self)

    def close(self) -> None:
        """Let the backend close what it holds."""
        self._supply.close()

    def items(self, first: Plan | None) -> list[dict[str, Any]]:
        """Return what the run consists of, as its first plan predicts it."""
        self.predicted_s = {} if first is None else {s.name: s.wall_s for s in first.predicted.stages}
        self._planned_s = before = self.ledger.now()
        if self.planning and self.measuring is not None:  # what is known then need not be found out again
            before -= self.measuring.spent_s + self.measuring.rehearsed_s
        found = around.predicted(*self._around(), before, self.predicted_s, self.planning)
        self.rest_s = found[-1]["predicted_s"]
        return found

    def measured(
        self, items: Any, stages: Sequence[Mapping[str, Any]], wall_s: float
    ) -> list[dict[str, Any]]:
        """Return the same with what each took; what was around the stages is kept for later plans."""
        found = measured_items(items, stages, wall_s)
        around.remember(*self._around(), self._planned_s, found)
        return found

    def _around(self) -> tuple[str, int]:
        return str(self.config.pipeline.ref), int(self.config.threads)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Name what is done outside the segments, for the ledger."""
        return self.ledger.phase(name)

    def sample(
        self, name: str, flow: Flow, z: Tensor, save_every: int | None = None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return what the sampler makes of z and what it says of it, saved under a declared state."""
        return sample(self.sampler, self.files, name, flow, z, save_every)

    def sampled(self, name: str, steps: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the index and the passes at which a sampling was left: (0, 0) where it was not begun."""
        step = saved_step(self.files, name, steps, shape)
        return (0, 0) if step is None else (step.index, step.passes)

    def passes(self, steps: int) -> tuple[int, int]:
        """Return the least and the most passes that the sampler makes of so many steps."""
        return self.sampler.passes(steps)

    def check(self, what: str, value: Tensor, again: Callable[[], object] | None = None) -> Tensor:
        """Return a tensor that is finite. Raises NonFiniteError naming it, unless the config lets it pass."""
        return self.finite.check(what, value, again)

    def token_merge(self, layer: AttentionLayer) -> Merge | None:
        """Return the merge a plugin has for a layer."""
        found: Merge | None = self.hook.token_merge(layer=layer)
        return None if found is None else self.merges.watch(layer, found)

    def merges_at(self, layers: Sequence[AttentionLayer], steps: int) -> list[dict[str, Merge]]:
        """Return which layers will merge at each of a sampling's steps, by name: what a plan starts from."""
        merges: dict[str, Merge | None] = {x.name: self.hook.token_merge(layer=x) for x in layers}
        with new_run() as context:
            context.steps = steps
            found = []
            for context.step in range(steps):
                found.append({name: m for name, m in merges.items() if m is not None and m.active()})
        return found

    def attention_kernel(self, layer: AttentionLayer) -> AttentionKernel | None:
        """Return the kernel a plugin has for a layer."""
        found: AttentionKernel | None = self.hook.attention_kernel(layer=layer)
        return None if found is None else self.kernels.watch(layer, found)

    def densities_at(self, layers: Sequence[AttentionLayer], steps: int) -> list[dict[str, float]]:
        """Return the share of its pairs that each layer's kernel computes, by step and name."""
        kernels = {x.name: self.hook.attention_kernel(layer=x) for x in layers}
        shares = {name: k.density for name, k in kernels.items() if hasattr(k, "density")}
        with new_run() as context:
            context.steps = steps
            found = []
            for context.step in range(steps):
                found.append({name: float(density()) for name, density in shares.items()})
        return found
