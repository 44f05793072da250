"""What a stage costs before it runs: measured in earlier runs, else counted, else guessed; and after it."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import blockstream
from blockstream.engine.ledger import Ledger
from blockstream.engine.spans import Span
from blockstream.module.rehearsal import rehearse, shapes_of
from blockstream.plan.segments import Exactly, Segment, Stage, Visit
from blockstream.streaming import op_costs, remembered
from blockstream.streaming.costs import ENOUGH, OUTSIDE, Seen, load_of, measured_costs
from blockstream.streaming.session import Session
from blockstream.system import calibration
from blockstream.system.mounts import file_system


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(32, 32)

    def forward(self, x, times=1):
        for _ in range(times):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net").mkdir()
    save_file(Net().state_dict(), tmp_path / "net" / "model.safetensors")
    return tmp_path / "net"


def declared(folder, inputs, **more):
    session = Session(arena=1 << 20, **more)
    net = session.stage("net", Net, folder, passes=2, example_inputs=inputs)
    return session, net


def test_operations_are_counted_by_module_and_nothing_is_computed():
    with blockstream.empty():
        net = Net()
    flops = rehearse(net, {"x": torch.empty(5, 32), "times": 2}).flops
    linear = 2 * 5 * 32 * 32
    assert flops["blocks.0"] == 2 * linear
    assert flops["blocks.1.a"] == linear
    assert flops[""] == 2 * 3 * 2 * linear + linear


def test_attention_on_the_processor_counts():
    class Attention(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q)

    assert rehearse(Attention(), torch.empty(1, 2, 8, 4)).flops[""] == 2 * 2 * (2 * 8 * 8 * 4)


def test_a_forward_that_needs_data_has_no_count():
    class Picky(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert rehearse(Picky(), torch.empty(3)) is None


def test_inputs_are_told_by_shape_and_dtype():
    assert shapes_of(None) is None
    assert shapes_of((torch.empty(2, 3), 17)) == "(float32[2, 3], 17)"
    assert shapes_of({"y": torch.empty(1, dtype=torch.int64), "x": [1.0]}) == "x (1.0), y int64[1]"


def test_without_inputs_costs_are_guessed_from_sizes(folder):
    session, _ = declared(folder, None)
    with session:
        session.draft()
        assert session.costs_from == {"net": "guessed from sizes"}


@pytest.fixture
def clocked(monkeypatch):
    """Have each operation take what it would at 1e9 operations and bytes a second, and count what is run."""
    ran = []

    def seconds(self, op):
        ran.append(op.spec)
        return (op.flops or op.nbytes) / 1e9

    monkeypatch.setattr(op_costs.Measuring, "seconds", seconds)
    monkeypatch.setattr(op_costs.Measuring, "load", 0.0)
    return ran


def planned(folder, rows, most_s=1.0, **more):
    session, _ = declared(folder, torch.empty(rows, 32), measuring=op_costs.Measuring(most_s), **more)
    with session:
        (stage,) = session.draft().schedule.stages
        return stage.segments[1].execute_s, session.costs_from["net"]


def test_with_inputs_costs_are_those_of_their_operations_run_here_once(folder, clocked):
    small, source = planned(folder, 64)
    assert source.startswith("operations of each kind of block, run here on random weights")
    large, _ = planned(folder, 6400)
    products = 6400 * 4 * 32 * 32 / 1e9
    assert products < large < 1.3 * products and small < large / 20
    ran = len(clocked)
    assert planned(folder, 6400)[0] == large
    assert len(clocked) == ran, "what is known is not run again"


def test_what_is_not_measured_follows_from_operations_and_bytes(folder):
    small, source = planned(folder, 64, most_s=0.0)
    assert source.startswith("operations and bytes")
    assert planned(folder, 640_000, most_s=0.0)[0] > 100 * small


def test_polluted_calibrations_move_no_prediction(folder, clocked, monkeypatch):
    inputs = torch.ones(6400, 32)
    before, _ = planned(folder, 6400)
    run(folder, torch.ones(2, 32))  # a tiny network's run
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "version", lambda name: "0.0")
        patch.setattr(op_costs.Measuring, "seconds", lambda self, op: 7.0)
        assert planned(folder, 6400)[0] > 3.0, "another torch has calibrations of its own"
    assert planned(folder, 6400)[0] == before
    session, _ = declared(folder, inputs)
    with session, torch.inference_mode():  # a run beside other work
        seen = Seen({}, {f"blocks.{i}": [20.0, 1.0, 9.0, 9.0, 9.0] for i in range(3)}, 0.0)
        assert load_of([seen]) == pytest.approx(1 - 1 / 7)
        assert load_of([Seen({}, {"a": [1.0], "b": [9.0]}, 0.0)]) == 0.0, "nothing to compare"
        session.draft()
        remembered.remember(session.facts["net"], "", seen, load_of([seen]))
    assert planned(folder, 6400)[0] == pytest.approx(before, rel=0.1)


def test_an_operation_measured_beside_other_work_is_measured_again_when_that_is_gone(
    folder, clocked, monkeypatch
):
    before, _ = planned(folder, 64)
    for kept in (folder.parent / "cache" / "calibration").iterdir():
        about = json.loads(kept.read_text())["about"]
        calibration.write(about, {"s": 1.0}, load=0.6)
        kept.write_text(
            json.dumps(
                {
                    **json.loads(kept.read_text()),
                    "measured": [{"numbers": {"s": 1.0}, "when": time.time(), "load": 0.6}],
                }
            )
        )
    assert planned(folder, 64)[0] == before
    assert planned(folder, 64, most_s=0.0)[0] == before


def run(folder, inputs, **more):
    session, net = declared(folder, inputs, **more)
    with session, torch.inference_mode():
        for _ in range(2):
            net(inputs)
        session.remember()
        (stage,) = session.draft().schedule.stages
        return session.costs_from["net"], stage


def test_the_next_plan_starts_from_what_a_run_measured(folder):
    inputs = torch.ones(8, 32)
    assert run(folder, inputs)[0].startswith("operations")
    session, _ = declared(folder, inputs)
    with session:
        (stage,) = session.draft().schedule.stages
        assert session.costs_from == {"net": "measured in earlier runs"}
    facts = list((folder.parent / "cache" / "calibration").iterdir())
    assert facts
    measured = {s.name: s for s in stage.segments}
    assert measured["blocks.0"].load_s > 0 and measured["blocks.0"].execute_s > 0


@pytest.mark.parametrize("change", ["shape", "variant"])
def test_another_shape_or_variant_is_not_what_was_measured(folder, change):
    run(folder, torch.ones(8, 32), variant="tdtm")
    inputs = torch.ones(9 if change == "shape" else 8, 32)
    session, _ = declared(folder, inputs, variant="tdtm" if change == "shape" else "")
    with session:
        session.draft()
        assert session.costs_from["net"].startswith("operations and bytes")


def test_small_loads_say_nothing_of_the_speed_of_large_ones(folder):
    run(folder, torch.ones(8, 32))
    assert calibration.read(calibration.read_speed_of(file_system(folder).source)) == {}


def test_remembering_changes_no_bit(folder):
    inputs = torch.randn(8, 32)
    net = Net().eval()
    from safetensors.torch import load_file

    net.load_state_dict(load_file(folder / "model.safetensors"))
    for _ in range(2):
        session, streamed = declared(folder, inputs)
        with session, torch.inference_mode():
            assert torch.equal(streamed(inputs), net(inputs))
            session.remember()


def ledger_of(spans):
    ledger = Ledger()
    for span in spans:
        ledger.add(span)
    return ledger


SPANS = [
    Span("loader", "load", 0.0, 1.0, "a", Visit(0, 0, 0), 100),
    Span("compute", "stall", 0.0, 1.0, "a", Visit(0, 0, 0)),
    Span("compute", "execute", 1.0, 3.0, "a", Visit(0, 0, 0)),
    Span("compute", "outside", 3.0, 4.0, "phase"),
    Span("compute", "execute", 4.0, 8.0, "b", Visit(0, 0, 1)),
    Span("compute", "outside", 8.0, 10.0, "phase"),
    Span("compute", "execute", 10.0, 12.0, "a", Visit(0, 1, 0)),
    Span("compute", "outside", 12.0, 13.0, "phase"),
    Span("compute", "execute", 13.0, 17.0, "b", Visit(0, 1, 1)),
    Span("compute", "execute", 20.0, 29.0, "c", Visit(1, 0, 0)),
]


def test_time_outside_the_segments_is_counted_by_pass_and_stage():
    seen = Seen.of(SPANS, 0)
    assert seen.outside_s == pytest.approx((1 + 2 + 1) / 2)
    assert seen.executes == {"a": [2.0, 2.0], "b": [4.0, 4.0]}
    assert Seen.of(SPANS, 1).outside_s == 0.0
    assert Seen.of([], 0).outside_s == 0.0


def test_measured_costs_predict_the_measured_pass():
    stage = Stage("s", (Segment("a", 100, 9.0, 9.0), Segment("b", 300, 9.0, 9.0)), passes=Exactly(2))
    measured = measured_costs(stage, 0, ledger_of(SPANS))
    assert measured.execute_s == pytest.approx(2 + 4 + 2.0)
    assert [s.load_s for s in measured.segments] == [1.0, pytest.approx(3.0)]  # 100 bytes a second


def test_what_is_kept_of_the_outside_has_a_name_no_module_has():
    assert OUTSIDE not in dict(Net().named_modules())


def test_a_segment_seldom_read_takes_what_all_of_its_size_took():
    sizes = {"a": (10, 10), "b": (10, 10), "c": (10, 20), "d": (7, 7)}
    loads = {"a": [9.0], "b": [1.0, 1.0, 2.0], "c": [5.0]}
    assert Seen(loads, {}, 0.0).load_s(sizes) == {"a": 1.5, "b": 1.5, "c": 5.0}


def test_a_segment_read_often_keeps_its_own_time():
    sizes = {"a": (10, 10), "b": (10, 10)}
    loads = {"a": [3.0] * ENOUGH, "b": [1.0] * (ENOUGH - 1)}
    assert Seen(loads, {}, 0.0).load_s(sizes) == {"a": 3.0, "b": 3.0}
