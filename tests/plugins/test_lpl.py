"""Linear Proportional Leap: the published rule, the fixed form, and leaps sized by their error."""

import logging

import blockstream_lpl
import pytest
import torch
from blockstream_lpl import LinearProportionalLeap, Options, passes, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from blockstream.errors import ConfigError
from blockstream.plugins import Plugins
from tests.support.flows import Formula, bending, euler, straight, turning

Z = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
RULES = [{}, {"statistic": "reference"}, {"leap": 2}, {"leap": 3}]


def test_a_step_to_the_next_index_is_eulers():
    flow, rival = Formula(turning), Formula(turning)
    assert torch.equal(sample(flow, Z), euler(rival, Z))
    assert flow.asked == rival.asked == list(range(30))


def test_a_straight_flow_ends_where_all_its_steps_would_with_the_fewest_passes():
    direction = torch.randn_like(Z)
    for rule in RULES:
        flow = Formula(straight(direction))
        torch.testing.assert_close(sample(flow, Z, **rule), Z + direction)
        # The published rule counts the first cosine, 1, as an improvement.
        assert len(flow.asked) == passes(30, **rule)[0] + ("statistic" in rule)


def test_a_flow_whose_velocity_is_linear_in_time_is_leapt_over_without_error():
    a, b = torch.randn_like(Z), torch.randn_like(Z)
    flow, rival = Formula(lambda z, t: a + b * t), Formula(lambda z, t: a + b * t)
    torch.testing.assert_close(sample(flow, Z), euler(rival, Z), atol=1e-5, rtol=1e-5)
    assert len(flow.asked) == passes(30)[0]


def test_what_a_leap_missed_is_put_right_in_the_next_step():
    """A velocity quadratic in time: the line through two passes misses, one second difference mends it."""
    a, b = torch.randn_like(Z), torch.randn_like(Z)
    flow, rival = (Formula(lambda z, t: a + b * t * t) for _ in range(2))
    got, want = sample(flow, Z, tolerance=10.0), euler(rival, Z)
    assert len(flow.asked) == passes(30)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_smaller_tolerance_takes_more_passes_and_ends_nearer_to_all_the_steps():
    want = euler(Formula(bending), Z)
    taken, away = [], []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        flow = Formula(bending)
        away.append(float((sample(flow, Z, tolerance=tolerance) - want).norm() / want.norm()))
        taken.append(len(flow.asked))
        assert away[-1] < tolerance
    assert taken == sorted(taken)
    assert away == sorted(away, reverse=True)
    assert taken[0] < taken[-1]


def test_the_leaps_lie_in_the_straight_middle():
    flow = Formula(bending)
    sample(flow, Z)
    gaps = {i: b - i for i, b in zip(flow.asked, [*flow.asked[1:], 30], strict=True)}
    assert max(gaps, key=gaps.get) in range(5, 20)
    assert flow.asked[:3] == [0, 1, 2]
    assert flow.asked[-1] == 29


def test_every_sample_of_a_batch_holds_its_tolerance():
    """One bent sample holds a straight one back; alone, the straight one leaps further."""
    direction = torch.randn_like(Z[:1])
    both = Formula(lambda z, t: torch.cat((direction, turning(z[1:], t))))
    sample(both, Z)
    alone = Formula(straight(direction))
    sample(alone, Z[:1])
    assert len(both.asked) == 30
    assert len(alone.asked) == passes(30)[0] < 10


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("velocity", [bending, turning, straight(torch.ones_like(Z))])
def test_a_run_resumes_after_any_step(rule, velocity):
    flow = Formula(velocity)
    final = sample(flow, Z, **rule)
    assert len(flow.done) == len(flow.asked)
    for i, z, memory in flow.done:
        assert all(isinstance(value, torch.Tensor | int | float) for value in memory.values())
        rest = Formula(velocity)
        assert torch.equal(sample(rest, z, i + 1, memory, **rule), final)
        assert rest.asked == [k for k in flow.asked if k > i]
        whole = rest.done[-1][2] if rest.done else memory
        assert whole["lpl.steps"].tolist() == flow.asked


def test_a_run_resumes_from_another_samplers_memory():
    flow = Formula(bending)
    z = sample(flow, Z, 10, {"theirs": 3})
    assert flow.asked[:3] == [10, 11, 12]
    assert torch.isfinite(z).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("velocity", [bending, turning, straight(torch.ones_like(Z))])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 30, 50])
def test_the_flow_is_told_what_is_left_before_each_pass_and_at_once_after_it(rule, velocity, n):
    flow = Formula(velocity, n)
    sample(flow, Z, **rule)
    least, most = passes(n, **rule)
    assert least <= len(flow.asked) <= most
    total = len(flow.asked)
    before, after = flow.told[::2], flow.told[1::2]
    assert [taken for taken, _ in before] == list(range(total))
    assert [taken for taken, _ in after] == list(range(1, total + 1))
    bounds = [told for _, told in flow.told]
    assert bounds == sorted(bounds, reverse=True)
    assert all(told >= total - taken for taken, told in flow.told)
    assert bounds[-1] == 0


def test_only_the_published_rule_learns_in_its_last_pass_that_it_is_the_last():
    for rule, before in (({}, 1), ({"leap": 2}, 1), ({"statistic": "reference"}, 13)):
        flow = Formula(straight(torch.ones_like(Z)))
        sample(flow, Z, **rule)
        assert flow.told[-2] == (len(flow.asked) - 1, before)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200))
def test_the_range_of_passes_grows_with_the_number_of_steps(n):
    for rule in RULES:
        least, most = passes(n, **rule)
        flow = Formula(straight(torch.ones(1, 2)), n)
        sample(flow, torch.zeros(1, 2), **rule)
        leapt_late = "statistic" in rule and least < n
        assert len(flow.asked) - leapt_late == least <= most <= n
    assert passes(n)[0] >= min(n, -(-n // 15))


def test_the_fixed_form_takes_its_share_of_the_steps_exactly():
    assert [passes(30, leap=k) for k in (2, 3, 4)] == [(16, 16), (21, 21), (23, 23)]
    assert [passes(n, leap=2)[1] for n in (50, 20, 10, 2, 1)] == [26, 11, 6, 2, 1]
    flow = Formula(bending)
    sample(flow, Z, leap=2)
    assert flow.asked == list(range(16))


def test_the_fixed_form_of_the_authors_code_spares_the_pass_that_leaps():
    more = {"leap": 2, "statistic": "reference"}
    assert [passes(n, **more) for n in (30, 50, 1)] == [(15, 15), (25, 25), (1, 1)]
    flow = Formula(bending)
    sample(flow, Z, **more)
    assert flow.asked == list(range(15))


def test_a_flow_that_is_not_straight_is_refused_with_the_reason():
    flow = Formula(bending)
    flow.straight = False
    for rule in RULES:
        with pytest.raises(ConfigError, match=r"not straight.*DPM-Solver.*sampler: euler"):
            sample(flow, Z, **rule)
    assert not flow.asked


def test_a_trajectory_that_never_straightens_runs_to_the_end_and_says_so(caplog):
    lpl = LinearProportionalLeap()
    with caplog.at_level(logging.WARNING):
        flow = Formula(turning)
        lpl(flow, Z)
    assert "all 30 steps were taken, the flow never became straight enough to leap" in caplog.text
    report = lpl.report(flow.done[-1][2], 30)
    assert (report["straight"], report["passes"], report["leaps"]) == (False, 30, [])
    caplog.clear()
    lpl(Formula(bending), Z)
    assert not caplog.records
    lpl(Formula(bending, 3), Z)
    assert "all 3 steps were taken, there are too few to leap over any" in caplog.text


def test_the_report_tells_steps_leaps_and_straightness_of_each_sample():
    lpl = LinearProportionalLeap(Options(leap=3))
    flow = Formula(lambda z, t: torch.cat((torch.ones_like(z[:1]), turning(z[1:], t))))
    lpl(flow, Z)
    report = lpl.report(flow.done[-1][2], 30)
    assert report["steps"] == list(range(21))
    assert report["leaps"] == [[20, 30]]
    straight_one, bent = report["cosine"]
    assert straight_one == [None, *[pytest.approx(1.0)] * 20]
    assert all(abs(c) < 0.99 for c in bent[1:])


def test_history_does_not_reach_across_a_break_of_the_flow():
    """A flow may name indices where it goes on from something else, of another shape even."""
    flow = Formula(bending)
    flow.breaks = [12]
    advance = flow.advance

    def halved(z, v, i, to):
        z = advance(z, v, i, to)
        return z[..., :3] if to == 12 else z

    flow.advance = halved
    z = sample(flow, Z)
    assert z.shape == (2, 4, 3, 5, 3)
    assert 12 in flow.asked
    assert {13, 14} <= set(flow.asked)


def test_steps_of_no_length_are_taken_plainly():
    times = [1.0, 0.8, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    flow, rival = (Formula(bending, times=times) for _ in range(2))
    torch.testing.assert_close(sample(flow, Z), euler(rival, Z), atol=0.05, rtol=0.05)


def test_half_precision_latents_stay_what_they_are():
    flow = Formula(bending)
    z = sample(flow, Z.bfloat16())
    assert z.dtype == torch.bfloat16
    assert len(flow.asked) < 30


def test_options_out_of_range_are_refused():
    for wrong in ({"leap": 1}, {"tolerance": 0}, {"statistic": "guess"}, {"patience": 3}):
        with pytest.raises(ValidationError):
            Options(**wrong)


def test_the_plugin_offers_one_sampler_that_its_options_build():
    plugins = Plugins()
    plugins.register(blockstream_lpl, "lpl")
    choice = plugins.offers("sampler", "lpl")["lpl"]
    sampler = choice.build(choice.options(leap=2))
    assert sampler.passes(30) == (16, 16)
    flow = Formula(bending)
    assert torch.equal(sampler(flow, Z), sample(Formula(bending), Z, leap=2))


COGVIDEOX = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
HUNYUAN = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}


def test_a_scheduler_that_bends_is_refused_by_its_config_whatever_the_flow_says(caplog):
    flow = Formula(straight(torch.ones(2, 3)))
    flow.scheduler = COGVIDEOX
    with pytest.raises(ConfigError, match=r"not straight \(CogVideoXDDIMScheduler predicts v_prediction"):
        sample(flow, torch.zeros(2, 3))
    assert flow.asked == []
    flow.scheduler = HUNYUAN
    with caplog.at_level("INFO"):
        sample(flow, torch.zeros(2, 3))
    assert "FlowMatchEulerDiscreteScheduler: a rectified flow" in caplog.text
