"""A machine with too little memory is told so, before the kernel has to say it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.cgroup import limited, why_not

pytestmark = pytest.mark.skipif(why_not("memory") is not None, reason=str(why_not("memory")))

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
CLI = "import sys; from blockstream.cli.main import main; sys.exit(main(sys.argv[1:]))"
SHORT = ["--set", "frames=17", "--set", "steps=2", "--set", "threads=1", "--set", "cache=off"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def command(name, *more):
        out = ["--out", str(tmp_path / "out")] if name == "run" else []
        return [sys.executable, "-c", CLI, name, "movd.yaml", *SHORT, *out, *more]

    return command


@pytest.mark.parametrize(
    ("name", "mib", "budget"),
    [("run", 250, "auto"), ("plan", 300, "auto"), ("run", 360, "auto"), ("run", 360, "300MiB")],
)
def test_less_than_the_libraries_take_is_refused_before_they_are_imported(command, name, mib, budget):
    with limited(memory_nbytes=mib * MIB) as group:
        done = group.run(command(name, "--set", f"budget={budget}"), timeout=120)
    assert done.returncode == 1, (done.returncode, done.stderr[-500:])
    assert re.search(r"cgroup .* leaves this process \d+ MiB, and torch and the libraries", done.stderr)


def test_too_little_memory_is_refused_by_name_and_nothing_is_written(command, tmp_path):
    with limited(memory_nbytes=2 << 30) as group:
        refused = group.run(command("run", "--set", "budget=60MiB"), timeout=120)
        least = int(re.search(r"the least is (\d+) MiB", refused.stderr)[1]) * MIB
    assert not list(tmp_path.rglob("*.mp4"))
    limit = least - 24 * MIB
    with limited(memory_nbytes=limit) as group:
        for name in ("plan", "run"):
            done = group.run(command(name, "--set", f"budget={least}"), timeout=120)
            assert done.returncode == 1, (name, done.returncode, done.stderr[-500:])
            assert "cgroup" in done.stderr
            named = re.search(
                r"limit has to be (\d+) MiB|raise that limit by at least (\d+) MiB", done.stderr
            )
            wanted = int(named[1]) * MIB if named[1] else limit + int(named[2]) * MIB
            assert least <= wanted < least + 128 * MIB
    spare = 8 * MIB  # what two starts of Python with all its libraries may differ by
    with limited(memory_nbytes=wanted + spare) as group:
        done = group.run(command("run", "--set", f"budget={least + spare}"), timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    assert list((tmp_path / "out").rglob("*.mp4"))
