"""The published rule and the fixed form equal the authors' code on flows given as formulas."""

import pytest
import torch
from blockstream_lpl import sample
from blockstream_lpl.rules import rows_cosine

from movd.rflow import OpenSoraFlow

pytestmark = pytest.mark.golden
FOLDER = "rflow_lpl"
CASES = ["straight", "decay", "curl", "rot_a", "rot_b", "rot_c", "rot_d", "rot_never"]
ANGLES = {  # of the rotating velocities, as functions of s = t / 1000
    "rot_a": (82.159, 2),
    "rot_b": (16.933, 2),
    "rot_c": (20.418, 2),
    "rot_d": (47.803, 8),
    "rot_never": (43.82, 2),
}


def toy(name, given):
    """The formula of that name in the golden data's meta, with a second half that must be ignored."""
    a, b = given["a"], given["b"]

    def model(z, t, y, mask=None, x_mask=None, **size):
        s = t[0] / 1000
        c = 0.05 * y.mean(dim=(1, 2, 3))[:, None, None, None, None]
        if name == "straight":
            v = a + c
        elif name == "decay":
            v = -z + 0.1 * torch.sin(z + s) + c
        elif name == "curl":
            v = -z + 3.0 * torch.roll(z, 1, -1) * s + c
        else:
            factor, power = ANGLES[name]
            h = factor * s**power
            v = torch.cos(h) * a + torch.sin(h) * b + c
        return torch.cat((v, torch.full_like(v, 123.0)), 1)

    return model


class Noted(OpenSoraFlow):
    """A flow that notes velocities and where each step started."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.velocities = [], []

    def velocity(self, z, i):
        self.seen.append((i, z))
        self.velocities.append(super().velocity(z, i))
        return self.velocities[-1]


def run(golden, name, steps=None, **options):
    given, config = golden.inputs, golden.meta["config"]
    flow = Noted(
        toy(name, given),
        given["y"],
        None,
        steps or config["N"],
        config["cfgs"],
        config["H"],
        config["W"],
        config["F"],
        24,
        y_null=given["y_null"],
        discrete=golden.meta["defaults"]["use_discrete_timesteps"],
    )
    return sample(flow, given["z"], **options), flow


@pytest.mark.parametrize("name", CASES)
def test_the_reference_rule_leaps_where_the_authors_code_does(golden, name):
    want, case = golden.expected(f"lpl.{name}"), golden.meta["cases"][f"lpl.{name}"]
    final, flow = run(golden, name, statistic="reference")
    assert [i for i, _ in flow.seen] == case["steps_fed"]
    golden.close(flow.timesteps[: len(flow.seen)], want["t"], "times")
    golden.close(flow.seen[-1][1], want["z_before_last"], "before the last step")
    golden.close(final, want["final"], "final")
    pairs = zip(flow.velocities, flow.velocities[1:], strict=False)
    golden.close(torch.tensor([rows_cosine(b, a) for a, b in pairs]), want["cos"], "cosine")


def test_the_reference_rule_keeps_to_its_own_number_of_steps(golden):
    final, flow = run(golden, "straight", 12, statistic="reference")
    assert len(flow.seen) == golden.meta["cases"]["lpl_12steps.straight"]["model_calls"]
    golden.close(final, golden.expected("lpl_12steps.straight")["final"])


def test_one_run_leaves_nothing_to_the_next(golden):
    """The authors' sampler object does, which moves the second run's leap; its first run is a fresh one's."""
    first, _ = run(golden, "rot_never", statistic="reference")
    golden.close(first, golden.expected("lpl_shared_state.0_rot_never")["final"])
    second, _ = run(golden, "rot_b", statistic="reference")
    golden.close(second, golden.expected("lpl.rot_b")["final"])
    assert not torch.allclose(second, golden.expected("lpl_shared_state.3_rot_b")["final"], atol=1e-4)


@pytest.mark.parametrize("name", ["N2.decay", "N2.rot_never", "N3.rot_never", "N4.rot_never"])
def test_the_fixed_form_equals_the_authors_where_their_rule_does_not_leap_first(golden, name):
    case = golden.meta["cases"][f"fixed1.{name}"]
    assert case["dynamic_leap"] == -1
    final, flow = run(golden, name[3:], leap=case["custom_N"], statistic="reference")
    assert len(flow.seen) == case["model_calls"]
    golden.close(final, golden.expected(f"fixed1.{name}")["final"])


def test_a_batch_is_sampled_as_its_members_are_by_the_first_ones_leap(golden):
    given = dict(golden.inputs)
    one, alone = run(golden, "decay", statistic="reference")
    config = golden.meta["config"]
    z = torch.cat((given["z"], given["z"].flip(-1)))
    model = toy("decay", given)
    size = (config["N"], config["cfgs"], config["H"], config["W"], config["F"], 24)
    two = (given[name].repeat(2, 1, 1, 1) for name in ("y", "y_null"))
    y, y_null = two
    flow = Noted(model, y, None, *size, y_null=y_null, discrete=True)
    both = sample(flow, z, statistic="reference")
    assert [i for i, _ in flow.seen] == [i for i, _ in alone.seen]
    torch.testing.assert_close(both[:1], one)
