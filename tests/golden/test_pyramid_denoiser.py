import pytest
import torch

from blockstream.plugins.euler import sample
from movd.official import load_official
from movd.pyramid.legs import StageFlow, Words
from movd.pyramid.miniflux import MiniFlux, MiniFluxConfig, positions
from movd.pyramid.stages import local_times, make_stages

pytestmark = pytest.mark.golden
FOLDER = "pyramid_flux_tiny"


@pytest.fixture(scope="module")
def model(golden):
    model = MiniFlux(MiniFluxConfig(**golden.meta["config"])).eval()
    load_official(model, golden.weights)
    return model.requires_grad_(False)


@pytest.mark.parametrize("case", ["image", "video3", "lowres"])
def test_the_output_and_every_block_equal_the_originals(model, golden, case):
    given, want = golden.given(case), golden.expected(case)
    seen, hooks = {}, []

    def note(name):
        def hook(module, inputs, output):
            if isinstance(output, tuple):
                seen[f"{name}.video"], seen[f"{name}.text"] = output
            else:
                seen[name] = output

        return hook

    names = {name.removesuffix(".video").removesuffix(".text") for name in want} - {"out", "image_ids"}
    for name in names:
        hooks.append(model.get_submodule(name).register_forward_hook(note(name)))
    clips = [given[f"sample.{i}"] for i in range(sum(name.startswith("sample.") for name in given))]
    mask = given["encoder_attention_mask"]
    seen["out"] = model(
        clips, given["timestep_ratio"], given["encoder_hidden_states"], mask, given["pooled_projections"]
    )
    for hook in hooks:
        hook.remove()
    seen["image_ids"] = positions(clips).expand(len(mask), -1, -1)
    assert seen.keys() == want.keys()
    real = mask.bool()
    for name, value in want.items():
        mine = seen[name]
        if name.endswith(".text"):
            mine, value = mine[real], value[real]
        elif name.startswith("single_transformer_blocks"):
            rows = torch.cat((real, torch.ones(len(real), mine.shape[1] - real.shape[1]).bool()), 1)
            mine, value = mine[rows], value[rows]
        golden.close(mine, value, f"{case}.{name}")


TABLES = {"default": {}, "shift3": {"shift": 3.0}, "stages2": {"count": 2, "ranges": (0, 0.5, 1)}}


@pytest.mark.parametrize("table", TABLES)
def test_the_stages_times_equal_the_originals(golden, table):
    want, stages = golden.expected(f"sched.{table}"), make_stages(**TABLES[table])
    for i, stage in enumerate(stages):
        assert stage.start == pytest.approx(float(want["start_sigmas"][i]), abs=1e-6)
        assert stage.end == pytest.approx(float(want["end_sigmas"][i]), abs=1e-6)
        for n in (10, 20):
            for name, mine in (("timesteps", stage.timesteps(n)), ("sigmas", local_times(n))):
                torch.testing.assert_close(
                    torch.from_numpy(mine), want[f"N{n}.stage{i}.{name}"], atol=1e-4, rtol=0
                )


def test_steps_within_a_stage_equal_the_originals(golden):
    z, want = golden.given("sched_run")["z"], golden.expected("sched_run")["z_steps"]
    z = z if z.dim() == 5 else z[:, :, None]

    def toy(clips, t, *words):
        return -clips[-1] + 0.1 * torch.sin(clips[-1] + t.view(-1, 1, 1, 1, 1) / 1000)

    words = Words(torch.zeros(1, 1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    seen = [z]
    flow = StageFlow(toy, words, [], make_stages()[1], 8, None, on_step=lambda i, z, memory: seen.append(z))
    sample(flow, z)
    golden.close(torch.stack(seen).reshape(want.shape), want, "z_steps")
