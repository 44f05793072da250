"""Layers with int8 weights: what they compute, streamed as resident, and the packs that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import blockstream
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.write.packer import pack
from blockstream.errors import CheckpointError, ConfigError, ModelError
from blockstream.module.layers import int8
from blockstream.module.layers.int8 import BLOCK_ROWS, FEW_ROWS, Int8Linear, chunk_rows, int8_linear, way_of
from blockstream.module.rehearsal import Alive
from blockstream.module.spec import packing
from blockstream.verify.sessions import CheckedSession, ResidentSession
from tests.support.models import CASES, Case, aligned, aligned_parameter, assert_same, save
from tests.support.streamed import least_of

ROUNDED = ("t5-encoder", "llama-generate-1", "hunyuan-video")


def packed(case_make, folder, dst, dtype="int8"):
    """Pack a folder as `blockstream pack` does; return the pack's folder."""
    source = Checkpoint.open(folder)
    what = packing(case_make(), source, dtype)
    pack(source, dst, what.segments, dtype, float32=what.float32, int8=what.int8, made=what.made)
    return dst


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def resident(module: nn.Module, folder, product) -> nn.Module:
    """Return the module with its int8 layers computed by hand on weights read by safetensors."""
    module = aligned(module)
    found = tensors_of(folder)
    for name in [n for n in found if found[n].dtype == torch.int8]:
        layer = module.get_submodule(name.removesuffix(".weight"))
        weight, scale = aligned_parameter(found[name]), aligned_parameter(found[name + "_scale"])

        def forward(x, layer=layer, weight=weight, scale=scale):
            return int8_linear(x, weight, scale, layer.bias, product)

        layer.forward = forward
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (module, folder, pack) of a case, made once."""
    kept: dict[str, tuple] = {}

    def get(case: Case):
        if case.name not in kept:
            torch.manual_seed(0)
            module = case.make().eval()
            folder = save(module, tmp_path_factory.mktemp(case.name))
            kept[case.name] = module, folder, packed(case.make, folder, folder / "pack")
        return kept[case.name]

    return get


cases = pytest.mark.parametrize("case", [c for c in CASES if c.name in ROUNDED], ids=str)
#: Tokens that are generated are alike or not; how near something is, only forwards can show.
forwards = pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ROUNDED and "generate" not in c.name], ids=str
)


# -- one layer -----------------------------------------------------------------------------------


def layer(rows: int, out: int, columns: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (out, columns), dtype=torch.int8, generator=g)
    scale = torch.rand(out, generator=g) / 127 + 1e-3
    x = torch.randn(rows, columns, generator=g).to(dtype)
    bias = torch.randn(out, generator=g).to(dtype)
    exact = x.double() @ (scale.double()[:, None] * weight).t() + bias.double()
    return x, weight, scale, bias, exact


def apart(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 130])
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (64, 64), (200, 128), (130, 17)])
@pytest.mark.parametrize(
    ("product", "dtype", "most"),
    [
        ("fp32", torch.float32, 1e-6),
        ("fp32", torch.bfloat16, 4e-3),
        ("fp32", torch.float16, 1e-3),
        ("bf16", torch.float32, 8e-3),
        ("bf16", torch.bfloat16, 8e-3),
        ("bf16", torch.float16, 1e-3),
    ],
)
def test_a_layer_gives_the_product_with_the_weights_it_stands_for(
    rows, out, columns, product, dtype, most, monkeypatch
):
    monkeypatch.setattr(int8, "CHUNK_NBYTES", 1)  # 64 rows of the weight at a time
    monkeypatch.setattr(int8, "BLOCK_ROWS", 50)
    x, weight, scale, bias, exact = layer(rows, out, columns, dtype)
    got = int8_linear(x, weight, scale, bias, product)
    assert (got.dtype, got.shape) == (dtype, (rows, out))
    assert apart(got, exact) < most
    folded = int8_linear(x.view(1, rows, 1, columns), weight, scale, None, product)
    assert folded.shape == (1, rows, 1, out)
    assert apart(folded.view(rows, out), exact - bias.double()) < most


def test_shape_dtype_and_product_alone_choose_the_way():
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    assert [way_of("bf16", d, 300, 64) for d in (f32, bf16, f16)] == ["bf16", "bf16", "fp32"]
    assert [way_of("bf16", d, FEW_ROWS, 64) for d in (f32, bf16, f16)] == ["packed", "packed", "fp32"]
    assert [way_of("bf16", f32, 1, columns) for columns in (1, 63, 96, 128)] == ["bf16"] * 3 + ["packed"]
    assert [way_of("fp32", d, n, 64) for d in (f32, bf16, f16) for n in (1, 300)] == ["fp32"] * 6


@pytest.mark.parametrize(
    ("level", "amx", "bf16", "name", "product"),
    [
        ("AVX512", True, True, "amx", "bf16"),
        ("AVX512", False, True, "avx512-bf16", "fp32"),
        ("AVX512", False, False, "avx512", "fp32"),
        ("AVX2", True, True, "avx2", "fp32"),
        ("DEFAULT", False, False, "other", "fp32"),
    ],
)
def test_the_processors_instructions_name_the_product(level, amx, bf16, name, product, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert int8.instructions() == name
    assert int8.resolve("auto") == product
    assert int8.resolve("fp32") == "fp32"
    with pytest.raises(ConfigError, match="int8 'int4': write auto, bf16 or fp32"):
        int8.resolve("int4")


@pytest.mark.parametrize("product", ["bf16", "fp32"])
def test_what_a_layer_needs_beside_its_output_is_bounded_whatever_the_rows(product):
    out, columns = 4096, 1024
    item = 2 if product == "bf16" else 4
    chunk = chunk_rows(columns, torch.bfloat16 if product == "bf16" else torch.float32)
    assert (chunk % 64, chunk * columns * item) == (0, int8.CHUNK_NBYTES)
    most = BLOCK_ROWS * columns * item + chunk * columns * item + 2 * BLOCK_ROWS * chunk * 4
    for rows in (100, BLOCK_ROWS, 5 * BLOCK_ROWS + 1):
        with FakeTensorMode(), Alive() as alive:
            x = torch.empty(rows, columns)
            weight, scale = torch.empty(out, columns, dtype=torch.int8), torch.empty(out)
            before = alive.nbytes
            y = int8_linear(x, weight, scale, None, product)
        assert alive.peak_nbytes - before <= y.nbytes + most


# -- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["bf16", "fp32"])
@cases
def test_streamed_equals_resident(case, product, made):
    module, _, dst = made(case)
    torch.manual_seed(0)
    twin = case.make().eval()
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        want = case.run(resident(twin, dst, product))
        least = least_of(case.make, dst)
        for arena, policy in ((least, "none"), (int(1.5 * least), "auto")):
            with blockstream.Session(arena=arena, policy=policy, int8=product) as s:
                m = s.stage("m", case.make, dst)
                assert_same(case.run(m), want)
        with ResidentSession(int8=product, segments={"m": {}}) as s:
            m = s.stage("m", case.make, dst)
            s.start()
            assert_same(case.run(m), want)
        with CheckedSession(arena="1MiB", int8=product, by_segment=True) as s:
            m = s.stage("m", case.make, dst)
            s.start()
            assert_same(case.run(m), want)


@forwards
def test_the_result_is_near_that_of_the_weights_it_was_packed_from(case, made):
    module, _, dst = made(case)
    with torch.no_grad():
        want = case.run(module)
        with blockstream.stream(case.make, dst, arena="1MiB") as m:
            got = case.run(m)
    first = [x[0] if isinstance(x, tuple | list) else x for x in (got, want)]
    assert 0 < apart(first[0], first[1].double()) < 0.03


@cases
def test_linear_layers_of_the_blocks_are_int8_and_nothing_else(case, made):
    module, _, dst = made(case)
    found = tensors_of(dst)
    rounded = {n for n, t in found.items() if t.dtype == torch.int8}
    linear = {f"{n}.weight" for n, x in module.named_modules() if type(x) is nn.Linear}
    assert rounded
    assert rounded <= linear
    assert {n + "_scale" for n in rounded} == {n for n in found if n.endswith("_scale")}
    assert all(t.dtype == torch.float32 for n, t in found.items() if n not in rounded)


def test_the_module_is_given_back_with_its_own_layers(made):
    case = CASES[0]
    _, _, dst = made(case)
    with blockstream.empty():
        module = case.make().eval()
    names = [n for n, _ in module.named_parameters()]
    with torch.no_grad(), blockstream.stream(module, dst, arena="60KiB") as m:
        assert isinstance(m.encoder.block[0].layer[0].SelfAttention.q, Int8Linear)
        case.run(m)
    assert type(module.encoder.block[0].layer[0].SelfAttention.q) is nn.Linear
    assert [n for n, _ in module.named_parameters()] == names
    assert not hasattr(module.encoder.block[0].layer[0].SelfAttention.q, "product")


def test_blocks_cut_finer_still_compute_in_int8(made):
    case = CASES[0]
    _, _, dst = made(case)
    with torch.no_grad():
        with blockstream.stream(case.make, dst, arena="1MiB") as m:
            want = case.run(m)
            whole = len(blockstream.session(m).plan.schedule.stages[0].segments)
        with blockstream.stream(case.make, dst, arena="30KiB") as m:
            assert_same(case.run(m), want)
            assert len(blockstream.session(m).plan.schedule.stages[0].segments) > whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_rest_may_be_read_in_another_dtype_and_scales_stay(dtype, made):
    case = CASES[0]
    _, _, dst = made(case)
    with torch.no_grad(), blockstream.stream(case.make, dst, arena="1MiB", dtype=dtype) as m:
        kinds = {n: p.dtype for n, p in m.named_parameters()}
        y = case.run(m)[0]
    assert kinds["encoder.block.0.layer.0.SelfAttention.q.weight"] == torch.int8
    assert kinds["encoder.block.0.layer.0.SelfAttention.q.weight_scale"] == torch.float32
    assert kinds["encoder.block.0.layer.0.layer_norm.weight"] == getattr(torch, dtype)
    assert y.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_pack_may_be_packed_again(dtype, made, tmp_path):
    case = CASES[0]
    _, _, dst = made(case)
    again = packed(case.make, dst, tmp_path / "again", dtype)
    a, b = tensors_of(dst), tensors_of(again)
    assert a.keys() == b.keys()
    for name, t in a.items():
        same = t if t.dtype == torch.int8 or name.endswith("_scale") or dtype is None else t.bfloat16()
        assert torch.equal(b[name], same)


def test_what_a_forward_needs_is_known_before_it_runs(made):
    case = CASES[0]
    _, _, dst = made(case)
    ids = torch.ones(2, 40, dtype=torch.long)
    with blockstream.Session(budget="4GiB") as s:
        s.stage("m", case.make, dst, example_inputs=(ids,))
        facts = s.facts["m"]
        assert facts.activations_nbytes is not None
        assert facts.known.call_s is None or facts.known.call_s[""] > 0
        assert not facts.guessed


# -- faults --------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Blocks of one kind of layer, 64 channels."""

    def __init__(self, block, n=3):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(n))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Casting(nn.Module):
    """A block that brings its input to its weight's dtype."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(x.to(self.fc.weight.dtype)).float()


def test_a_model_without_linear_layers_has_nothing_to_round(tmp_path):
    def make():
        return Blocks(lambda: nn.Conv1d(64, 64, 1))

    folder = save(make(), tmp_path / "w")
    with pytest.raises(ModelError, match="has no linear layers in its blocks that could be int8"):
        packed(make, folder, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_weights_that_something_else_reads_are_left_alone(tmp_path):
    def make():
        return Blocks(lambda: nn.TransformerEncoderLayer(64, 4, 64))

    folder = save(make(), tmp_path / "w")
    with pytest.raises(ModelError, match="has no linear layers"):
        packed(make, folder, tmp_path / "pack")


def edited(dst, edit):
    """Change the tensors of the second file of a pack, and take the manifest's knowledge of it away."""
    folder = dst.parent / "edited"
    folder.mkdir()
    found = tensors_of(dst)
    edit(found)
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    return folder


NAME = "encoder.block.1.layer.0.SelfAttention.k.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NAME + "_scale"), f"'{NAME}' is int8 and has no '{NAME}_scale' beside it"),
        (
            lambda t: t.update({NAME + "_scale": torch.ones(3)}),
            r"_scale' is F32 \[3\] and 32 in F32 are needed",
        ),
        (
            lambda t: t.update({NAME + "_scale": torch.ones(32, dtype=torch.bfloat16)}),
            r"_scale' is BF16 \[32\] and 32 in F32",
        ),
        (lambda t: t.update({NAME: torch.ones(32, 31, dtype=torch.int8)}), r"holds shape \[32, 31\]"),
    ],
)
def test_scales_that_are_missing_or_wrong_are_named(edit, message, made):
    case = CASES[0]
    _, _, dst = made(case)
    folder = edited(dst, edit)
    try:
        with pytest.raises(CheckpointError, match=message), blockstream.Session(arena="1MiB") as s:
            s.stage("m", case.make, folder)
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_int8_for_a_layer_that_is_not_linear_is_refused(tmp_path):
    def make():
        return Blocks(lambda: nn.Conv1d(64, 64, 1))

    found = {n: p.detach() for n, p in make().named_parameters()}
    found["blocks.1.weight"] = torch.ones(64, 64, 1, dtype=torch.int8)
    save_file(found, tmp_path / "model.safetensors")
    with (
        pytest.raises(ModelError, match=r"'blocks\.1\.weight' is int8 and belongs to Conv1d"),
        blockstream.Session(arena="1MiB") as s,
    ):
        s.stage("m", make, tmp_path)


def test_a_model_that_casts_to_its_weights_dtype_is_told_so(tmp_path):
    def make():
        return Blocks(Casting)

    dst = packed(make, save(make(), tmp_path / "w"), tmp_path / "pack")
    with (
        torch.no_grad(),
        blockstream.stream(make, dst, arena="1MiB") as m,
        pytest.raises(ModelError, match=r"int8 weights got torch\.int8: the model casts"),
    ):
        m(torch.randn(2, 64))


def test_weights_that_share_bytes_in_the_file_are_left_alone(tmp_path):
    def make():
        return Blocks(lambda: nn.Linear(64, 64), 3)

    module = make()
    state = module.state_dict()
    state["blocks.1.weight"] = state["blocks.0.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    dst = packed(make, tmp_path, tmp_path / "pack")
    assert [n for n, t in tensors_of(dst).items() if t.dtype == torch.int8] == ["blocks.2.weight"]
    x = torch.randn(2, 64)
    with torch.no_grad(), blockstream.stream(make, dst, arena="1MiB") as m:
        y = m(x)
    module.load_state_dict(state)
    assert 0 < apart(y, module(x).detach().double()) < 0.03


def test_linear_layers_that_share_a_weight_share_its_scales(tmp_path):
    def make():
        stack = Blocks(lambda: nn.Linear(64, 64), 3)
        inner = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)]
        for pair in inner:
            pair[1].weight = pair[0].weight
        stack.blocks = nn.ModuleList(inner)
        return stack

    torch.manual_seed(0)
    module = make().eval()
    dst = packed(make, save(module, tmp_path / "w"), tmp_path / "pack")
    x = torch.randn(3, 64)
    with torch.no_grad():
        with blockstream.stream(make, dst, arena="1MiB") as m:
            assert m.blocks[0][0].weight is m.blocks[0][1].weight
            assert m.blocks[0][0].weight_scale is m.blocks[0][1].weight_scale
            y = m(x)
        assert 0 < apart(y, module(x).double()) < 0.03
