"""What is accepted is obeyed, or refused by its name: threads, device."""

import logging

import pytest

from blockstream.errors import ConfigError
from blockstream.run import runner
from blockstream.run.config import RunConfig
from blockstream.run.numerics import pinned
from blockstream.system.limits import cpu_count
from tests.support.toy_pipeline import ToyPipeline, config, save


@pytest.fixture(name="toy")
def _toy(tmp_path):
    return ToyPipeline(save(tmp_path / "toy"))


def threads_of(toy) -> RunConfig:
    return pinned(config(toy)).threads


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("5,2", 5), (" 2 ", 2)])
def test_omp_num_threads_is_obeyed(toy, monkeypatch, said, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads_of(toy) == threads
    assert pinned(config(toy, threads=1)).threads == 1


@pytest.mark.parametrize("said", ["0", "-1", "many", "1.5", "²"])
def test_a_number_of_threads_that_is_none_is_said_to_be_left_aside(toy, monkeypatch, caplog, said):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    with caplog.at_level(logging.WARNING):
        assert threads_of(toy) == cpu_count().threads
    assert "OMP_NUM_THREADS is" in caplog.text


def test_without_a_word_there_are_as_many_threads_as_processors(toy, monkeypatch):
    for nothing in (None, ""):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if nothing is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert threads_of(toy) == cpu_count().threads


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
@pytest.mark.parametrize("what", ["run", "plan"])
def test_a_device_that_a_run_cannot_use_is_refused_by_name(toy, tmp_path, device, what):
    own = config(toy, device=device)
    with pytest.raises(ConfigError, match=f"device: {device}: a run computes on"):
        runner.plan(own) if what == "plan" else runner.run(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()
