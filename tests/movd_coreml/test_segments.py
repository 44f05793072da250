"""The segments, chained, are the networks: no package is made here."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from blockstream.cli.main import main
from blockstream.module.attention import attention_hooks
from blockstream.run.activation import activate
from blockstream.run.config import make_config
from movd.attention import attention_layers
from movd.options import MovdOptions
from movd_coreml.int8 import dequantised, is_quantised
from movd_coreml.networks import Networks, What, gather_frames
from movd_coreml.segments_vae import parts_within, temporal_units

SIZES = ((17, 16, 16), (20, 24, 40))


@pytest.fixture(name="networks", params=SIZES, ids=str)
def _networks(coreml_config, request):
    with Networks(coreml_config(), What((request.param,))) as networks:
        yield networks


def whole(networks, name):
    """Return a network with all of its weights bound, for the length of a with block."""
    return networks.network(name).weights(
        [path for path, _ in networks.network(name).module.named_children()]
    )


def walk(networks, stage, values, variant="plain"):
    """Return a stage's output, segment by segment, each with its own weights alone."""
    (stage,) = (s for s in networks.stages if s.name == stage)
    preset = networks.sizes.presets[0].name
    for recipe in stage.segments:
        function = recipe.function(preset, variant)
        with (
            networks.network(recipe.network).weights(recipe.modules),
            function.during(function.example),
            torch.no_grad(),
        ):
            out = function.build().eval()(*(values[t.value] for t in function.inputs))
        out = out if isinstance(out, tuple) else (out,)
        values |= dict(zip(function.outputs, out, strict=True))
    return values[stage.output]


def close(a, b, within=1e-5):
    return a.shape == b.shape and float((a - b).abs().max()) <= within * float(b.abs().max())


def test_segments_of_t5_are_t5(networks):
    ids = torch.randint(0, 64, (1, networks.tokens), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(networks.tokens) < 5).float()[None]
    table = networks.tables()["t5.embedding"]
    got = walk(networks, "t5", {"x": table[ids], "mask": mask})
    with whole(networks, "t5"), torch.no_grad():
        want = networks.network("t5").module(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert close(got, want)


@pytest.mark.parametrize("variant", ["plain", "merged"])
@pytest.mark.parametrize("known", [0, 1], ids=["all-denoised", "first-known"])
def test_segments_of_stdit3_are_stdit3(networks, variant, known):
    preset, dit = networks.sizes.presets[0], networks.network("dit").module
    random = torch.Generator().manual_seed(1)
    T, H, W = dit.grid(*preset.latent)
    x_mask = torch.ones(2, T)
    x_mask[:, :known] = 0
    mask = (torch.arange(networks.tokens) < 5).float()[None]
    values = {
        "z": torch.randn(2, 4, *preset.latent, generator=random),
        "t": torch.full((2,), 700.0),
        "y": torch.randn(2, networks.tokens, 32, generator=random),
        "mask": mask,
        "x_mask": x_mask,
        "fps": torch.tensor([24.0]),
    }
    hook = activate(networks.config).hook
    merge = (lambda layer: _always(hook.token_merge(layer=layer))) if variant == "merged" else None
    with (
        whole(networks, "dit"),
        torch.no_grad(),
        attention_hooks(attention_layers(dit, (T, H, W), 5), token_merge=merge),
    ):
        want = dit(
            values["z"],
            values["t"],
            values["y"][:, None],
            mask=mask.long(),
            x_mask=x_mask.bool(),
            fps=torch.tensor([24.0]),
            height=torch.tensor([float(preset.height)]),
            width=torch.tensor([float(preset.width)]),
        )
    got = walk(networks, "dit", values, variant)
    assert close(got, want)


def test_merging_changes_what_stdit3_gives(networks):
    (stage,) = (s for s in networks.stages if s.name == "dit")
    (pair,) = (r for r in stage.segments if "pair" in r.name)
    random = torch.Generator().manual_seed(2)
    out = {}
    for variant in ("plain", "merged"):
        function = pair.function(networks.sizes.presets[0].name, variant)
        given = [torch.rand(t.shape, generator=random.manual_seed(3)) for t in function.inputs]
        with (
            networks.network("dit").weights(pair.modules),
            function.during(function.example),
            torch.no_grad(),
        ):
            out[variant] = function.build()(*given)
    assert not close(out["plain"], out["merged"], 1e-3)


def test_segments_of_the_vae_are_the_vae(networks):
    preset, vae = networks.sizes.presets[0], networks.network("vae").module
    z = torch.randn(1, 4, *preset.latent, generator=torch.Generator().manual_seed(4))
    start, clips = 0, []
    for n, (_, latent) in enumerate(preset.chunks):
        chunk = z[:, :, start : start + latent]
        x = walk(networks, "vae-temporal", {"z": chunk}, "rest" if n else "plain")
        rows = x[0].transpose(0, 1)
        calls = [walk(networks, "vae-spatial", {"x": c}) for c in gather_frames(rows, preset.frames_a_call)]
        clips.append(torch.cat(calls)[: len(rows)])
        start += latent
    got = torch.cat(clips).transpose(0, 1)[None]
    with whole(networks, "vae"), torch.no_grad():
        want = vae.decode(z, preset.frames)
    assert close(got, want, 1e-4)


def test_weights_of_other_segments_are_not_in_memory(networks):
    (stage,) = (s for s in networks.stages if s.name == "dit")
    dit = networks.network("dit").module
    with networks.network("dit").weights(stage.segments[1].modules):
        real = {name for name, p in dit.named_parameters() if not p.is_meta}
    assert real and all(name.startswith(("spatial_blocks.0.", "temporal_blocks.0.")) for name in real)
    assert all(p.is_meta for p in dit.parameters())


def test_a_pack_in_int8_gives_the_weights_an_int8_package_holds(tmp_path):
    source, packed = tmp_path / "t5", tmp_path / "packed"
    shutil.copytree(MovdOptions(prompt="").t5.folder("t5"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["T5EncoderModel"]}))
    assert main(["pack", str(source), str(packed), "--dtype", "int8"]) == 0
    keys = {"pipeline": "movd", "prompt": "x"}
    with (
        Networks(make_config(keys), What()) as plain,
        Networks(make_config({**keys, "t5": {"path": str(packed)}}), What()) as int8,
    ):
        t5, held = plain.network("t5"), int8.network("t5")
        names = [name for name, _ in t5.module.named_parameters()]
        rounded = [name for name in names if is_quantised(t5.module, name)]
        assert len(rounded) == 2 * 7
        for name in names:
            weight = t5.parameter(name)
            wanted = dequantised(weight) if name in rounded else weight
            assert torch.equal(held.parameter(name), wanted), name
            assert name not in rounded or torch.equal(dequantised(wanted), wanted), "rounding twice is once"


def test_no_part_of_the_vae_exceeds_what_is_given_unless_one_layer_does(networks):
    vae = networks.network("vae").module
    units = temporal_units(vae)

    def size(unit):
        return sum(4 * p.numel() for path in unit.modules for p in vae.get_submodule(path).parameters())

    most = 3 * max(map(size, units)) // 2
    parts = parts_within(vae, units, most)
    assert [unit for part in parts for unit in part] == units and len(parts) > 1
    assert all(sum(map(size, part)) <= most for part in parts)
    assert [len(part) for part in parts_within(vae, units, 1)] == [1] * len(units)


def _always(merge):
    return None if merge is None else replace(merge, active=lambda: True)
