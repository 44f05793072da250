"""Token merging as a plugin: chosen by a config, resolved by shape, active by step, equal to the original."""

import blockstream_tdtm
import pytest
import torch
from blockstream_tdtm import Options, TemporalMerging
from pydantic import ValidationError

from blockstream.module.attention import attention_hooks
from blockstream.plugins import AttentionLayer, Plugins, current_run, new_run
from movd.attention import attention_layers
from movd.official import load_official
from movd.stdit3 import STDiT3, STDiT3Config

FOLDER = "stdit3_tdtm_tiny"
REFERENCE = {"positions": "reference", "last_frame": "reference"}
CASES = [
    "T8_step0",
    "T7_step1",
    "T15_step2",
    "T5_nomerge_step3",
    "T8_xmask_step0",
    "unofficial_T5_step0",
    "unofficial_T6_step0",
]


def layer(kind="temporal", T=8, S=6):
    return AttentionLayer("blocks.0.attn", kind, grid=(T, 1, S), width=96, heads=4)


def transform(**options):
    return TemporalMerging(Options(**options))


@pytest.fixture
def run():
    with new_run() as run:
        yield run


@pytest.fixture(scope="module")
def model(golden, folder_of):
    model = STDiT3(STDiT3Config(**golden.meta["config"]))
    load_official(model, folder_of("stdit3_tiny").weights)
    return model.eval().requires_grad_(False)


def forward(model, given, tdtm):
    layers = attention_layers(model, model.grid(*given["x"].shape[2:]), given["y"].shape[2])
    with attention_hooks(layers, token_merge=tdtm.token_merge) as changed:
        return model(**given), changed


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_the_reference_settings_equal_the_original(model, golden, case, run):
    given, settings = golden.given(case), golden.meta["cases"][case]
    run.step, run.steps = int(given.pop("step")), 30
    tdtm = transform(merge_steps=settings["merge_steps"], **REFERENCE)
    out, changed = forward(model, given, tdtm)
    assert len(changed) == 4 * model.config.depth
    golden.close(out, golden.expected(case)["out"], case)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["T8_step0", "T7_step1", "T8_xmask_step0"])
def test_the_defaults_differ_from_the_original_and_only_while_merging(model, golden, case, run):
    given = golden.given(case)
    given.pop("step")
    run.step, run.steps = 0, 30
    merged, _ = forward(model, given, transform())
    assert (merged - golden.expected(case)["out"]).abs().max() > 1e-2
    run.step = 15
    late, _ = forward(model, given, transform())
    assert torch.equal(late, model(**given))


@pytest.mark.golden
def test_an_odd_last_frame_attends_unmerged(model, golden, run):
    """Its own token takes part, so it can tell its partnerless frame from the one before."""
    run.step, run.steps = 0, 30
    given = golden.given("unofficial_T5_step0")
    given.pop("step")
    other = {**given, "x": given["x"].clone()}
    other["x"][:, :, 4] += 1.0
    first = (0, slice(None), slice(0, 4))
    kept = [forward(model, g, transform())[0][first] for g in (given, other)]
    assert (kept[0] - kept[1]).abs().max() > 1e-3
    dropped = [forward(model, g, transform(**REFERENCE))[0][first] for g in (given, other)]
    assert torch.equal(*dropped)


def test_off_is_a_no_op():
    for off in (0, 0.0, "0%"):
        assert transform(merge_steps=off).token_merge(layer()) is None


def test_whether_a_layer_merges_follows_from_kind_and_shape():
    assert transform(kinds=["temporal"]).token_merge(layer("cross")) is None
    assert transform(kinds=["temporal"]).token_merge(layer("temporal")) is not None
    assert transform().token_merge(layer(T=1)) is None
    assert transform(factor=4).token_merge(layer(T=3)) is None
    assert transform(min_tokens=49).token_merge(layer(T=8, S=6)) is None
    assert transform(min_tokens=48).token_merge(layer(T=8, S=6)) is not None


def test_positions_are_means_or_numbered_as_the_original_does():
    def places(T, **options):
        return transform(**options).token_merge(layer(T=T)).positions.tolist()

    assert places(5) == [0.5, 2.5, 4.0]
    assert places(5, positions="reference") == [0.0, 1.0, 2.0]
    assert places(5, **REFERENCE) == [0.0, 1.0]
    assert places(5, last_frame="reference") == [0.5, 2.5]
    assert places(8, factor=4) == [1.5, 5.5]


@pytest.mark.parametrize("options", [{}, REFERENCE, {"factor": 3}, {"positions": "reference"}])
@pytest.mark.parametrize("T", [3, 8, 15, 20])
def test_a_merge_is_as_long_as_its_positions(T, options):
    x = torch.randn(2, T, 6, 96)
    merge = transform(**options).token_merge(layer(T=T))
    assert merge.merge(x).shape == (2, len(merge.positions), 6, 96)
    assert merge.unmerge(merge.merge(x)).shape == x.shape


@pytest.mark.parametrize(
    ("merge_steps", "active"), [(15, 15), ("50%", 15), (0.25, 8), (1, 1), (1.0, 30), ("100%", 30), (99, 30)]
)
def test_the_first_steps_merge(merge_steps, active, run):
    now = transform(merge_steps=merge_steps).token_merge(layer()).active
    merging = []
    for run.step in range(30):
        run.steps = 30
        merging.append(now())
    assert merging == [True] * active + [False] * (30 - active)


def test_where_no_step_is_known_only_all_steps_merge(run):
    assert current_run().step is None
    assert not transform(merge_steps=15).token_merge(layer()).active()
    assert not transform(merge_steps=0.5).token_merge(layer()).active()
    assert transform(merge_steps="100%").token_merge(layer()).active()


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "half", "150%", "%", None])
def test_merge_steps_that_are_neither_a_number_nor_a_share_are_refused(wrong):
    with pytest.raises(ValidationError, match="write a number of steps"):
        Options(merge_steps=wrong)


def test_options_survive_being_written():
    for steps in (15, "50%", 0.25, "100%"):
        options = Options(merge_steps=steps, kinds=["temporal", "full"])
        again = Options.model_validate(options.model_dump(mode="json"))
        assert again == options
        assert type(again.merge_steps) is type(options.merge_steps)


def test_the_plugin_offers_one_transform_by_hooks_that_exist():
    plugins = Plugins()
    plugins.register(blockstream_tdtm, "tdtm")
    choice = plugins.offers("attention", "tdtm")["tdtm"]
    built = choice.build(choice.options())
    plugins.register(built, "tdtm:tdtm#0")
    assert plugins.hook.token_merge(layer=layer()).positions.tolist() == [0.5, 2.5, 4.5, 6.5]
    assert plugins.hook.attention_kernel(layer=layer()) is None
