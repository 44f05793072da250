"""Streamed is compared with resident on a config: what is equal is said so, what is not is named."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from blockstream.errors import BudgetError, EngineError
from blockstream.module.row_tables import TableReader
from blockstream.verify import sessions as verifying
from blockstream.verify.comparison import verify
from blockstream.verify.difference import Difference
from tests.support.toy_pipeline import PASSES, Flip, ToyPipeline, config, save

MODES = pytest.mark.parametrize("by_segment", [False, True], ids=["whole", "segments"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("toy"))


def how(report) -> dict[str, str]:
    return {s["name"]: s["how"] for s in report["stages"]}


def first_weight(folder, stage: str, param: str) -> float:
    return load_file(folder / stage / "model.safetensors")[param].flatten()[0].item()


def flipped_by(weight: float) -> float:
    """Return how far the lowest bit of the exponent moves a float32."""
    bits = torch.tensor(weight).view(torch.int32)
    return abs(weight - (bits ^ (1 << 23)).view(torch.float32).item())


@MODES
def test_a_sound_pipeline_is_equal_and_all_of_it_is_compared(folder, by_segment):
    report = verify(config(ToyPipeline(folder)), by_segment=by_segment)
    assert (report["equal"], report["difference"]) == (True, None)
    assert how(report) == dict.fromkeys(("text", "net"), "segments" if by_segment else "whole")
    text, net = report["stages"]
    assert (text["forwards"], text["visits"]) == (1, 2)
    assert (net["forwards"], net["visits"]) == (PASSES, 6 * PASSES)
    assert text["nbytes"] > 20_000 * 64 * 4 > net["nbytes"]
    assert net["weights_alone"] == []


@MODES
@pytest.mark.parametrize("stage", ["text", "net"])
def test_a_flipped_bit_is_found_and_named_with_stage_segment_and_size(folder, monkeypatch, stage, by_segment):
    Flip(monkeypatch, stage, "blocks.1", "blocks.1.fc.weight")
    report = verify(config(ToyPipeline(folder)), by_segment=by_segment)
    assert report["equal"] is False
    found = Difference(**report["difference"])
    assert (found.stage, found.segment, found.call) == (stage, "blocks.1", 1)
    assert found.what == "parameter 'blocks.1.fc.weight'"
    assert found.max_abs == pytest.approx(flipped_by(first_weight(folder, stage, "blocks.1.fc.weight")))


@MODES
def test_a_flipped_bit_of_what_stays_resident_is_found(folder, monkeypatch, by_segment):
    Flip(monkeypatch, "net", "rest", "head.bias")
    found = Difference(**verify(config(ToyPipeline(folder)), by_segment=by_segment)["difference"])
    assert (found.stage, found.segment, found.what) == ("net", "rest", "parameter 'head.bias'")
    assert found.max_abs == pytest.approx(flipped_by(first_weight(folder, "net", "head.bias")))


@MODES
def test_a_row_of_a_table_read_wrongly_is_found(folder, monkeypatch, by_segment):
    gather = TableReader.gather
    monkeypatch.setattr(
        TableReader, "gather", lambda self, ids: gather(self, ids) + (ids == 3)[..., None] * 0.5
    )
    found = Difference(**verify(config(ToyPipeline(folder)), by_segment=by_segment)["difference"])
    assert (found.stage, found.what) == ("text", "rows of 'table.weight'")
    assert found.max_abs == pytest.approx(0.5)


@pytest.fixture
def small(monkeypatch, folder):
    """Leave room for the net resident, and not for the text."""
    net = 6 * (64 * 64 + 128) * 4 + (64 * 64 + 64) * 4
    nbytes = verifying.BESIDE_NBYTES + net + (2 << 20)
    monkeypatch.setattr(verifying, "headroom", lambda: SimpleNamespace(nbytes=nbytes))


def test_a_stage_that_does_not_fit_is_compared_by_segment_and_the_others_whole(folder, small):
    report = verify(config(ToyPipeline(folder)))
    assert report["equal"] is True
    assert how(report) == {"text": "segments", "net": "whole"}


@pytest.mark.parametrize("stage", ["text", "net"])
def test_a_flipped_bit_is_found_in_either_kind_of_stage(folder, small, monkeypatch, stage):
    Flip(monkeypatch, stage, "blocks.1", "blocks.1.gain")
    found = Difference(**verify(config(ToyPipeline(folder)))["difference"])
    assert (found.stage, found.segment, found.what) == (stage, "blocks.1", "parameter 'blocks.1.gain'")


def test_memory_that_went_meanwhile_is_an_error_that_says_what_to_do(folder, monkeypatch):
    looks = iter([1 << 40])
    monkeypatch.setattr(verifying, "headroom", lambda: SimpleNamespace(nbytes=next(looks, 1 << 20)))
    with pytest.raises(BudgetError, match=r"of stage 'text' no longer fit in the 1.0 MiB.*--segments"):
        verify(config(ToyPipeline(folder)))


def test_a_difference_that_comes_and_goes_is_said_to(folder, monkeypatch):
    Flip(monkeypatch, "net", "blocks.0", "blocks.0.fc.weight", times=1)
    found = Difference(**verify(config(ToyPipeline(folder)))["difference"])
    assert (found.stage, found.segment, found.max_abs) == ("net", "blocks.0", None)
    assert "it comes and goes" in found.note


def test_an_output_that_differs_though_the_weights_do_not_is_measured(folder, monkeypatch):
    class Pipeline(ToyPipeline):
        def declare(self, session, run):
            super().declare(session, run)
            if isinstance(session, verifying.CheckedSession):  # something about streaming moves a result
                self.net.blocks[2].register_forward_hook(lambda module, args, output: output + 0.25)

    found = Difference(**verify(config(Pipeline(folder)))["difference"])
    assert (found.stage, found.segment, found.call, found.what) == ("net", "blocks.2", 1, "output")
    assert found.max_abs == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize(
    ("longer", "said"), [(2, "the streamed run ended before"), (1, "the resident run ends")]
)
def test_a_run_of_more_calls_than_the_other_differs_in_their_order(folder, longer, said):
    class Pipeline(ToyPipeline):
        runs = 0

        @torch.inference_mode()
        def run(self, session, run):
            self.runs += 1
            super().run(session, run)
            if self.runs == longer:
                self.net(torch.ones(1, 1, 64), [])

    found = Difference(**verify(config(Pipeline(folder)))["difference"])
    assert (found.stage, found.segment, found.call) == ("net", "blocks.0", PASSES + 1)
    assert found.what == "the order of calls" and said in found.note


def test_inputs_without_a_copy_leave_the_weights_to_compare(folder, monkeypatch):
    class Locked(list):
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    class Pipeline(ToyPipeline):
        @torch.inference_mode()
        def run(self, session, run):
            self.net(self.text(torch.tensor([[7]])), Locked())

    report = verify(config(Pipeline(folder)), by_segment=True)
    text, net = report["stages"]
    assert report["equal"] is True
    assert (text["weights_alone"], net["weights_alone"]) == ([], [f"blocks.{i}" for i in range(6)])
    Flip(monkeypatch, "net", "blocks.4", "blocks.4.fc.bias")
    found = Difference(**verify(config(Pipeline(folder)), by_segment=True)["difference"])
    assert (found.segment, found.what) == ("blocks.4", "parameter 'blocks.4.fc.bias'")


@MODES
def test_modules_are_given_back_as_they_were(folder, by_segment):
    pipeline = ToyPipeline(folder)
    verify(config(pipeline), by_segment=by_segment)
    for module in (*pipeline.text.modules(), *pipeline.net.modules()):
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert all(
            p.is_meta and type(p) is torch.nn.Parameter for p in module._parameters.values() if p is not None
        )


def test_the_run_finds_no_cache_and_leaves_neither_it_nor_the_random_numbers_changed(folder, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_CACHE", "/somewhere")
    seen = []
    state = torch.get_rng_state()
    verify(config(ToyPipeline(folder, during=lambda n: seen.append(os.environ["BLOCKSTREAM_CACHE"]))))
    assert len(set(seen)) == 2 and "/somewhere" not in seen
    assert os.environ["BLOCKSTREAM_CACHE"] == "/somewhere"
    assert not any(os.path.exists(os.path.dirname(path)) for path in seen)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pipeline_that_calls_nothing_proves_nothing(folder):
    class Pipeline(ToyPipeline):
        def run(self, session, run):
            return {}

    with pytest.raises(EngineError, match="called none of its stages"):
        verify(config(Pipeline(folder)))


def test_synthetic_weights_are_reported_as_such(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "made")
    (tmp_path / "made" / "net" / "synthetic.json").write_text("{}")
    report = verify(config(ToyPipeline(tmp_path / "made")))
    assert [s["synthetic"] for s in report["stages"]] == [False, True]


def test_an_error_of_the_run_is_the_runs_own(folder):
    def during(n):
        raise RuntimeError("the pipeline broke")

    with pytest.raises(RuntimeError, match="the pipeline broke"):
        verify(config(ToyPipeline(folder, during=during)))


def test_threads_are_the_configs_in_every_run(folder):
    seen = []
    verify(config(ToyPipeline(folder, during=lambda n: seen.append(torch.get_num_threads())), threads=1))
    assert seen == [1] * (2 * PASSES)
