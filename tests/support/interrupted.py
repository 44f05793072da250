"""Run a config up to one pass of one stage and stop there: for a kill, or by an exception.

python -m tests.support.interrupted JSON    prints "there" at the gate and waits to be killed
"""

import json
import runpy
import sys
import threading
from pathlib import Path

from blockstream.plugins import Choice, hookimpl
from blockstream.plugins.choices import Chosen
from blockstream.run import runner
from blockstream.run.config import make_config


class Gate:
    """Calls `act` when a pass begins."""

    def __init__(self, stage, pass_index, act):
        self.at, self.act = (stage, pass_index), act

    @hookimpl
    def pass_started(self, stage, pass_index):
        if (stage.name, pass_index) == self.at:
            self.act()


class Passes:
    """Counts the passes of each stage."""

    def __init__(self):
        self.of = {}

    @hookimpl
    def pass_finished(self, stage, pass_index):
        self.of[stage.name] = self.of.get(stage.name, 0) + 1


def two_step(flow, z, i=0, memory=None):
    """Adams-Bashforth of second order: remembers the last velocity and counts its steps."""
    memory = memory or {"last": [], "steps": 0, "largest": 0.0}
    for step in range(i, len(flow.times)):
        v = flow.velocity(z, step)
        flow.remaining(len(flow.times) - step - 1)
        mixed = v if not memory["last"] else 1.5 * v - 0.5 * memory["last"][0]
        z = flow.advance(z, mixed * (1 - 1e-3 * memory["steps"]), step, step + 1)
        largest = max(memory["largest"], float(v.abs().max()))
        memory = {"last": [v], "steps": memory["steps"] + 1, "largest": largest}
        flow.step_done(step, z, memory)
    return z


def heun(*arguments):
    """Return what the example's sampler of two passes a step does."""
    return _example()(*arguments)


def _example():
    path = Path(__file__).parents[2] / "examples/third_party_plugin/blockstream_trio/heun.py"
    return runpy.run_path(str(path))["Heun"]()


heun.passes = lambda steps: _example().passes(steps)
heun.report = lambda memory, steps: _example().report(memory, steps)


def with_sampler(config, name):
    """Return a config with a sampler of this module."""
    if name == "euler":
        return config
    chosen = Chosen("sampler", name, "movd", Choice(name, lambda _: globals()[name]))
    return config.model_copy(update={"sampler": chosen})


def raise_interrupt():
    raise KeyboardInterrupt


def wait_to_be_killed():
    print("there", flush=True)
    threading.Event().wait(120)


def main(keys, sampler, out, resume, stage, pass_index):
    config = with_sampler(make_config(keys), sampler)
    gate = Gate(stage, pass_index, wait_to_be_killed)
    runner.run(config, Path(out), resume=resume, observers=[gate])


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
