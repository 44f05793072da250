"""What is accepted is obeyed, or refused by its name: threads, device."""

import io
import logging

import pytest
import torch
from rich.console import Console

from blockstream.device import choose
from blockstream.errors import ConfigError
from blockstream.report.outlook import print_plan
from blockstream.run import runner
from blockstream.run.config import RunConfig
from blockstream.run.numerics import pinned
from blockstream.system.limits import cpu_count
from blockstream.verify.comparison import verify
from tests.support.fake_cuda import fake_cuda
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


@pytest.mark.parametrize("what", [runner.run, verify])
def test_a_device_that_is_not_here_is_refused_by_name_before_anything_is_made(
    toy, tmp_path, what, monkeypatch
):
    monkeypatch.setattr(choose, "devices_here", lambda: 0)
    said = "device: cuda:1: torch finds no CUDA device here: .*or write cpu, or auto"
    with pytest.raises(ConfigError, match=said):
        what(config(toy, device="cuda:1"), **({"out": tmp_path / "out"} if what is runner.run else {}))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(choose, "devices_here", lambda: 1)
    with pytest.raises(ConfigError, match="cuda:1: torch has 1 here"):
        pinned(config(toy, device="cuda:1"))


def test_what_a_device_is_called_in_a_config_is_what_it_came_to(toy, monkeypatch, caplog):
    monkeypatch.setattr(choose, "devices_here", lambda: 0)
    assert pinned(config(toy)).device == "cpu"
    with caplog.at_level(logging.WARNING):
        assert pinned(config(toy, device_budget="8GB")).device_budget == "auto"
    assert "device_budget 8GB bounds nothing" in caplog.text
    with pytest.raises(ConfigError, match="device_budget: 8GB: device is cpu"):
        pinned(config(toy, device="cpu", device_budget="8GB"))
    with pytest.raises(ConfigError, match="device_budget: auto: a part of what is free on cuda"):
        pinned(config(toy, device="cuda"), planning=True)
    monkeypatch.setattr(choose, "devices_here", lambda: 2)
    assert pinned(config(toy)).device == "cuda"
    assert pinned(config(toy, device="cuda:1")).int8 == "bf16"


@pytest.mark.parametrize("copies", ["late", "early"])
def test_a_run_on_a_device_gives_what_one_on_the_processor_does_within_both_budgets(
    toy, tmp_path, monkeypatch, copies
):
    torch.manual_seed(0)
    wanted = runner.run(config(toy, device="cpu"), tmp_path / "cpu")["output"]
    device = fake_cuda(monkeypatch, copies=copies)
    torch.manual_seed(0)
    asked = config(toy, device="cuda", device_budget="256MiB", arena="auto")
    report = runner.run(asked, tmp_path / "cuda")
    assert report["output"] == wanted
    assert device.copied_nbytes and not device.registered
    assert report["device"]["budget"]["held"] and report["budget"]["held"]
    assert report["device"]["budget"]["nbytes"] == 256 << 20


def test_a_plan_for_a_device_needs_none(toy, monkeypatch):
    monkeypatch.setattr(choose, "devices_here", lambda: 0)
    plan = runner.plan(config(toy, device="cuda", device_budget="2GB", arena="auto"))
    device = plan["device"]
    assert device["name"] == "cuda (none is here)" and not device["link"]["measured"]
    assert device["budget"]["nbytes"] == 2_000_000_000 >= device["budget"]["peak_nbytes"]
    weights = sum(s["nbytes"] for s in plan["stages"])
    assert [s["name"] for s in plan["stages"]] == ["text", "net"]
    assert all(s["copied_nbytes"] == s["nbytes"] and s["copy_s"] > 0 for s in plan["stages"])
    assert plan["by_cause"]["weights"] < weights  # what stays on the device only passes through
    print_plan(plan, Console(file=(shown := io.StringIO()), width=200))
    assert "its link: 12 GB/s, its arithmetic 40 TFLOP/s, assumed" in shown.getvalue()
