"""Budgets and threads as Ray's resources; a sweep on Ray's test cluster whose nodes are killed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from blockstream_ray.options import RayOptions
from blockstream_ray.resources import options_of, room

from blockstream.errors import ConfigError
from blockstream.plugins import Needs, Plugins

ROOT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


def test_threads_and_budget_are_what_ray_reserves():
    assert options_of(Needs(4, 3 << 30), 0) == {"num_cpus": 4, "memory": 3 << 30}


def test_runs_on_a_gpu_never_take_more_of_it_than_it_has():
    taken = options_of(Needs(1, 1 << 30, device_nbytes=27_000_000_000), device_memory=80_000_000_000)
    assert taken["num_gpus"] == 0.3375
    assert options_of(Needs(1, 1, device_nbytes=1), 3)["num_gpus"] == 0.3334
    assert options_of(Needs(1, 1, device_nbytes=1), 100_000_000)["num_gpus"] == 0.0001


@pytest.mark.parametrize(
    ("needs", "said"), [(Needs(1), "name an amount"), (Needs(1, 1, device_nbytes=5), "device_memory is 0")]
)
def test_what_cannot_be_reserved_is_refused(needs, said):
    with pytest.raises(ConfigError, match=said):
        options_of(needs, 0)


def test_a_node_has_room_for_as_many_runs_as_its_scarcest_resource():
    nodes = [
        {"CPU": 8.0, "memory": 3.5 * 2**30},
        {"CPU": 1.0, "memory": 64.0 * 2**30},
        {"CPU": 0.0, "memory": 64.0 * 2**30},
        {"memory": 1.0},
    ]
    assert room(options_of(Needs(1, 1 << 30), 0), nodes) == 4
    assert room(options_of(Needs(2, 1 << 30), 0), nodes) == 3


def test_ray_is_found_by_its_name_and_its_options_are_checked():
    plugin, choice = Plugins().find("scheduler", "ray")
    assert (plugin, choice.options) == ("ray", RayOptions)
    assert choice.options.model_validate({"retries": 3}).address is None


@needs_ray
@pytest.mark.slow
def test_a_cluster_whose_nodes_are_killed_loses_no_prompt_and_makes_none_twice():
    command = [sys.executable, "-m", "benchmarks.sweep_kills", "--prompts", "4", "--nodes", "1"]
    command += ["--every", "30", "--no-write"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(next(t for t in reversed(done.stdout.splitlines()) if t.startswith("{")))
    assert (found["done"], found["lost"], found["twice"], found["other_bits"]) == (4, 0, 0, 0)
