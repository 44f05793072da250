"""Verify on a device: what is compared how, and what a device does not promise."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from blockstream.report.tables import print_verify
from blockstream.verify import promises
from blockstream.verify.comparison import verify
from blockstream.verify.promises import Unpromised
from tests.support.fake_cuda import fake_cuda
from tests.support.toy_pipeline import Flip, ToyPipeline, config, save


@pytest.fixture(name="toy")
def _toy(tmp_path, monkeypatch):
    fake_cuda(monkeypatch)
    pipeline = ToyPipeline(save(tmp_path / "toy"))
    return config(pipeline, device="cuda", device_budget="256MiB", arena="auto")


@pytest.mark.parametrize("by_segment", [False, True])
def test_a_run_on_a_device_is_compared_with_a_resident_one(toy, by_segment):
    report = verify(toy, by_segment=by_segment)
    assert report["equal"] and report["device"] == "cuda" and report["unpromised"] == []
    assert {s["how"] for s in report["stages"]} == {"segments" if by_segment else "whole"}


@pytest.mark.parametrize("by_segment", [False, True])
def test_a_bit_that_flips_on_its_way_to_the_device_is_found(toy, by_segment, monkeypatch):
    Flip(monkeypatch, "net", "blocks.3", "blocks.3.fc.weight")
    report = verify(toy, by_segment=by_segment)
    assert report["difference"]["segment"] == "blocks.3"


def test_what_a_device_does_not_promise_is_said_by_name(toy, monkeypatch):
    monkeypatch.setattr(promises, "UNPROMISED", frozenset({"tanh"}))
    report = verify(toy)
    assert report["equal"] and report["unpromised"] == ["tanh"]
    print_verify(report, Console(file=(shown := io.StringIO()), width=200))
    assert "promises no equal bits on cuda for: tanh; another run may differ there" in shown.getvalue()


def test_adding_by_atomics_is_met_and_writing_is_not():
    x, at = torch.zeros(4), torch.tensor([1, 1])
    with Unpromised() as met:
        x[at] = 1.0
        x.index_add(0, at, torch.ones(2)), x.index_put((at,), torch.ones(2), accumulate=True)
    assert met.names == {"index_add", "index_put"}
