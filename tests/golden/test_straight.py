"""Which diffusers schedulers walk straight paths, told from their configs; a cosine could not tell."""

import json
import re

import pytest
from torch.nn.functional import cosine_similarity

from blockstream.errors import ConfigError
from blockstream.plugins.straight import straight
from tests.support.golden import GOLDEN

pytestmark = pytest.mark.golden
FOLDER = "cogvideox_ddim"


def read(name):
    path = GOLDEN / "schedulers" / name
    if not path.is_file():
        pytest.skip(f"the golden data {path} is not there")
    return json.loads(path.read_text())


def test_every_verdict_agrees():
    verdicts = read("verdicts.json")
    assert len(verdicts) >= 14
    for name, want in verdicts.items():
        got = straight(read(f"{name}.scheduler_config.json"))
        assert got.straight == want["straight"], (name, got.why, want["why"])


@pytest.mark.parametrize(
    ("name", "case", "said"),
    [
        ("hunyuanvideo", "flow", "FlowMatchEulerDiscreteScheduler: a rectified flow"),
        ("flow-heun", "flow", "two passes a step"),
        ("wan", "flow-solver", "UniPCMultistepScheduler.*plain Euler steps"),
        ("flow-stochastic", "renoised", "every step renoises"),
        ("cogvideox-2b", "diffusion", "CogVideoXDDIMScheduler predicts v_prediction on a beta schedule"),
        ("lcm", "diffusion", "LCMScheduler predicts epsilon"),
    ],
)
def test_the_reason_is_said(name, case, said):
    verdict = straight(read(f"{name}.scheduler_config.json"))
    assert verdict.case == case
    assert re.search(said, verdict.why), verdict.why


def test_a_model_index_tells_only_of_what_is_known_to_bend():
    verdict = straight(read("cogvideox-2b.model_index.json"))
    assert not verdict.straight and "CogVideoXPipeline samples by CogVideoXDDIMScheduler" in verdict.why
    flow = {
        "_class_name": "HunyuanVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    with pytest.raises(ConfigError, match=r"scheduler/scheduler_config\.json"):
        straight(flow)
    with pytest.raises(ConfigError, match="no _class_name"):
        straight({"beta_start": 0.1})


def test_a_cosine_would_let_a_bent_path_leap_far_from_the_data(golden):
    """The run's velocities point the same way from step to step, and a leap along one misses its x0.

    x = cos(a) x0 + sin(a) noise, and v is its derivative by the angle a.
    """
    out, x0 = golden.outputs, golden.inputs["x0"]
    v = out["v_by_step"].flatten(1)
    cosines = cosine_similarity(v[1:], v[:-1])
    middle = range(15, 35)
    assert cosines[list(middle)].min() > 0.99
    for i in middle:
        angle = (1 - out["alphas_cumprod"][i]).sqrt().asin()
        leapt = out["latents_by_step"][i] - angle * out["v_by_step"][i]
        assert (leapt - x0).norm() / x0.norm() > 0.2
    end = out["latents_by_step"][-1]
    assert (end - x0).norm() / x0.norm() < 0.2
