"""A run that was stopped at any of its file operations goes on to all of its files and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def attack(how, every):
    """Stop a run at each `every`-th operation in forks of a process of its own, without torch's threads."""
    command = [sys.executable, "-m", "benchmarks.kills", "--how", how, "--every", str(every)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "every"), [("kill", 5), ("full", 9), ("interrupt", 9)])
def test_a_run_stopped_anywhere_goes_on_to_all_its_files_and_nothing_else(how, every):
    done = attack(how, every)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "0 of them with something wrong" in done.stdout
