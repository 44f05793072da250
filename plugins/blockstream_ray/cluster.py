"""The scheduler: each task a Ray task, as many handed out as the cluster has room for and some to follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from blockstream.errors import ConfigError
from blockstream.plugins import Ended, Needs

from .options import RayOptions
from .resources import options_of, room

#: Tasks handed out beside those that have room: a worker that ends finds its next one waiting.
AHEAD = 2
#: How long to wait for what ends before more is handed out.
TURN_S = 0.5
#: How often the cluster is asked what nodes it has.
LOOK_S = 5.0


class RayScheduler:
    """Runs tasks on a Ray cluster. Implements `blockstream.plugins.Scheduler`."""

    def __init__(self, options: RayOptions) -> None:
        self.options = options

    def run(self, perform: Callable[[Any], Any], tasks: Iterable[Any], needs: Needs) -> Iterator[Ended]:
        """Yield every task once it has ended. A cluster that this process is connected to already is used.

        Raises ConfigError where no node has room for one run, unless nodes may yet come.
        """
        taken = options_of(needs, self.options.device_memory)
        ours = not ray.is_initialized()
        if ours:
            ray.init(address=self.options.address, log_to_driver=False, configure_logging=False)
        pending: dict[Any, Any] = {}
        try:
            remote = ray.remote(max_retries=self.options.retries, **taken)(_perform)
            kept, waiting = ray.put(perform), iter(tasks)
            self._refuse_if_too_small(taken)
            looked, most = float("-inf"), 0
            while True:
                if time.monotonic() - looked > LOOK_S:
                    most, looked = AHEAD * max(1, room(taken, _nodes())), time.monotonic()
                while len(pending) < most and (task := next(waiting, None)) is not None:
                    pending[remote.remote(kept, task)] = task
                if not pending:
                    return
                ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=TURN_S)
                for ref in ready:
                    yield _ended(ref, pending.pop(ref))
        finally:
            for ref in pending:
                ray.cancel(ref, force=True)
            if ours:
                ray.shutdown()

    def _refuse_if_too_small(self, taken: dict[str, Any]) -> None:
        nodes = _nodes()
        if self.options.elastic or room(taken, nodes):
            return
        raise ConfigError(
            f"no node of the {len(nodes)} has room for a run, which takes {taken['num_cpus']} CPUs and "
            f"{taken['memory']:,} bytes: lower threads or budget, add a larger node, or, where nodes come on "
            "demand, --on '{name: ray, elastic: true}'"
        )


def _perform(perform: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    """Perform a task on the node that this process belongs to."""
    return f"node {ray.get_runtime_context().get_node_id()[:12]}", perform(task)


def _ended(ref: Any, task: Any) -> Ended:
    try:
        where, result = ray.get(ref)
    except RayError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return Ended(task, lost=f"{type(error).__name__}: {said[0]}")
    return Ended(task, result, where)


def _nodes() -> list[dict[str, float]]:
    """Return the resources of the nodes that are alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
