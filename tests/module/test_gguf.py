"""GGUF: blocks as the gguf package widens them, models as transformers loads them, faults by name."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import blockstream
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.formats import TABLE, by_name
from blockstream.errors import CheckpointError
from blockstream.module import partition
from blockstream.module.narrow import Narrow, Spec, Stored
from blockstream.module.pretrained import from_folder
from blockstream.streaming.model_plan import plan_model
from blockstream.verify.sessions import CheckedSession, ResidentSession
from tests.support import gguf_files

gguf = pytest.importorskip("gguf")

KINDS = [f.name for f in TABLE if f.name.startswith("Q")]
IDS = torch.tensor([[1, 5, 9, 3]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return the file of a small llama, and what transformers gives for some tokens, by dtype."""
    folder = tmp_path_factory.mktemp("llama")
    file = gguf_files.llama(folder / "tiny.gguf")
    return file, {dtype: resident(file, dtype) for dtype in (torch.float32, torch.bfloat16)}


def resident(file, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_gives_the_numbers_of_the_gguf_package(kind):
    row = by_name(TABLE)[kind]
    raw = gguf_files.blocks(kind, (7, 2 * row.block), np.random.default_rng(0))
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (row.block, row.block_nbytes)
    want = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    stored = Stored(torch.from_numpy(raw).reshape(-1), {}, (7, 2 * row.block), torch.float32)
    assert torch.equal(row.widen()(stored), want)
    part = row.widen()(stored.cut(2, 5))
    assert torch.equal(part, want[2:5])


@pytest.mark.parametrize(("dtype", "arena"), [(torch.float32, "600KiB"), (torch.bfloat16, "8MiB")])
def test_a_model_computes_as_transformers_loads_it(dtype, arena, llama):
    file, want = llama
    with torch.no_grad(), blockstream.from_pretrained(file, arena=arena, dtype=dtype) as model:
        assert torch.equal(model(IDS).logits, want[dtype])
        weight = model.model.layers[0].mlp.up_proj.weight
        assert (weight.dtype, tuple(weight.shape)) == (dtype, (512, 256))
    with torch.inference_mode(), blockstream.from_pretrained(file, arena=arena, dtype=dtype) as model:
        assert torch.equal(model(IDS).logits, want[dtype])


def test_its_bytes_in_memory_are_those_of_the_file(llama):
    file, _ = llama
    with blockstream.from_pretrained(file, arena="2MiB") as model:
        segments = blockstream.session(model).draft().schedule.stages[0].segments
    assert sum(s.nbytes for s in segments) < 1.1 * file.stat().st_size


def test_rows_of_a_large_table_are_read_alone(llama, monkeypatch):
    file, want = llama
    monkeypatch.setattr(partition, "GATHER_NBYTES", 1)
    with torch.no_grad(), blockstream.from_pretrained(file, arena="1MiB") as model:
        assert torch.equal(model(IDS).logits, want[torch.float32])
        with pytest.raises(IndexError):
            model(torch.tensor([[64]]))


def test_ids_beyond_a_table_are_refused_as_torch_does(llama):
    file, _ = llama
    for ids in (64, -1):
        with (
            torch.no_grad(),
            blockstream.from_pretrained(file, arena="1MiB") as model,
            pytest.raises(IndexError),
        ):
            model(torch.tensor([[ids]]))


def test_verify_reads_it_another_way(llama):
    file, want = llama
    checkpoint = Checkpoint.open(file)
    made = from_folder(file, "F32", checkpoint)
    with torch.no_grad():
        for session in (
            ResidentSession(segments={"m": {}}),
            CheckedSession(arena="1MiB", by_segment=True),
        ):
            with session as s:
                model = s.stage("m", made, checkpoint, dtype=torch.float32)
                s.start()
                assert torch.equal(model(IDS).logits, want[torch.float32])


def test_what_a_forward_needs_beside_it_counts_what_is_widened(llama):
    file, _ = llama
    with blockstream.Session(arena="1MiB") as s:
        made = from_folder(file, "F32", checkpoint := Checkpoint.open(file))
        s.stage("m", made, checkpoint, dtype="fp32", example_inputs={"input_ids": IDS})
        facts = s.facts["m"]
        assert not facts.guessed
        assert facts.rehearsal is not None
        assert facts.rehearsal.peak_nbytes > 512 * 256 * 4  # one matrix


def test_a_weight_in_its_format_answers_as_a_parameter_and_is_never_written_to():
    row = by_name(TABLE)["Q8_0"]
    raw = torch.from_numpy(gguf_files.blocks("Q8_0", (6, 32), np.random.default_rng(0))).reshape(-1)
    net = torch.nn.Linear(32, 6, bias=False)
    weight = Narrow.of(Spec("Q8_0", row.widen(), (6, 32), torch.float32, by_row=True), raw, {})
    wide = weight.wide()
    net._parameters["weight"] = weight
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(net(x), torch.nn.functional.linear(x, wide))
        assert torch.equal(x @ weight.T, x @ wide.T)
        assert torch.equal(weight[2], wide[2])
        assert torch.equal(weight[1:4], wide[1:4])
        assert torch.equal(weight.data + 0, wide)
        assert weight.to(torch.float32) is weight
        assert torch.equal(weight.to(torch.float64), wide.double())
        assert isinstance(weight, torch.nn.Parameter)
        with pytest.raises(Exception, match=r"written to by mul_; streamed weights are read-only"):
            weight.mul_(2)


@pytest.mark.parametrize(
    ("architecture", "change"),
    [("gemma2", "norms less one"), ("gpt2", "matrices the other way round")],
)
def test_what_the_library_makes_of_the_numbers_is_made(architecture, change, tmp_path):
    file = SMALL[architecture](tmp_path / "tiny.gguf")
    want = resident(file, torch.float32)
    with torch.no_grad(), blockstream.from_pretrained(file, arena="2MiB") as model:
        assert torch.equal(model(IDS).logits, want), change


def gemma2(path):
    rng = np.random.default_rng(2)
    norm = lambda: (1 + rng.normal(scale=0.1, size=64)).astype(np.float32)  # noqa: E731
    tensors: dict = {"token_embd.weight": ("Q8_0", (64, 64)), "output_norm.weight": norm()}
    for i in range(2):
        for name in ("attn_q", "attn_output"):
            tensors[f"blk.{i}.{name}.weight"] = ("Q8_0", (64, 64))
        for name in ("attn_k", "attn_v"):
            tensors[f"blk.{i}.{name}.weight"] = ("Q4_0", (32, 64))
        for name in ("ffn_gate", "ffn_up"):
            tensors[f"blk.{i}.{name}.weight"] = ("Q5_0", (128, 64))
        tensors[f"blk.{i}.ffn_down.weight"] = ("Q5_1", (64, 128))
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            tensors[f"blk.{i}.{name}.weight"] = norm()
    settings = {
        "general.name": "tiny", "gemma2.block_count": 2, "gemma2.context_length": 64,
        "gemma2.embedding_length": 64, "gemma2.feed_forward_length": 128, "gemma2.attention.head_count": 2,
        "gemma2.attention.head_count_kv": 1, "gemma2.attention.key_length": 32,
        "gemma2.attention.layer_norm_rms_epsilon": 1e-6, "gemma2.vocab_size": 64,
    }  # fmt: skip
    return gguf_files.write(path, "gemma2", settings, tensors)


def gpt2(path):
    rng = np.random.default_rng(3)
    some = lambda *shape: rng.normal(scale=0.1, size=shape).astype(np.float32)  # noqa: E731
    tensors: dict = {
        "token_embd.weight": ("Q8_0", (64, 64)), "position_embd.weight": some(1024, 64),
        "output_norm.weight": 1 + some(64), "output_norm.bias": some(64), "output.weight": ("Q8_0", (64, 64)),
    }  # fmt: skip
    shapes = {"attn_qkv": (192, 64), "attn_output": (64, 64), "ffn_up": (256, 64), "ffn_down": (64, 256)}
    for i in range(2):
        for name, shape in shapes.items():
            tensors[f"blk.{i}.{name}.weight"] = ("Q8_0" if i else "Q4_1", shape)
            tensors[f"blk.{i}.{name}.bias"] = some(shape[0])
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = 1 + some(64)
            tensors[f"blk.{i}.{name}.bias"] = some(64)
    settings = {
        "general.name": "tiny", "gpt2.block_count": 2, "gpt2.context_length": 64,
        "gpt2.embedding_length": 64, "gpt2.feed_forward_length": 256, "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": 1e-5, "tokenizer.ggml.tokens": [str(i) for i in range(64)],
    }  # fmt: skip
    return gguf_files.write(path, "gpt2", settings, tensors)


SMALL = {"gemma2": gemma2, "gpt2": gpt2}


def test_a_file_is_planned_by_its_own_settings(llama):
    file, _ = llama
    (stage,) = plan_model(str(file), ["budget=4GiB", "arena=1MiB"])["stages"]
    assert stage["nbytes"] < 1.1 * file.stat().st_size


def test_a_format_that_is_not_read_refuses_only_what_needs_it(tmp_path):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mine")
    kind = gguf.GGMLQuantizationType.IQ4_XS
    writer.add_tensor("1.weight", rng.integers(0, 256, (256, 136), dtype=np.uint8), raw_dtype=kind)
    writer.add_tensor("0.weight", rng.normal(size=(256, 256)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def make(n):
        return lambda: torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(n)))

    with blockstream.stream(make(1), tmp_path / "m.gguf", arena="1MiB") as m, torch.no_grad():
        assert m(torch.ones(1, 256)).shape == (1, 256)
    with (
        pytest.raises(CheckpointError, match=r"'1\.weight' is in the format IQ4_XS, which is not read"),
        blockstream.stream(make(2), tmp_path / "m.gguf", arena="1MiB"),
    ):
        pass


@pytest.mark.parametrize("keep", [3, 20, 200, 0.5, -1])
def test_a_file_cut_short_is_refused_by_name(keep, llama, tmp_path):
    whole = llama[0].read_bytes()
    n = int(len(whole) * keep) if isinstance(keep, float) else keep
    (tmp_path / "m.gguf").write_bytes(whole[:n])
    with pytest.raises(CheckpointError, match=r"m\.gguf: .*(truncated|fetch it again)"):
        Checkpoint.open(tmp_path / "m.gguf")


def test_without_the_package_what_to_install_is_said(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'blockstream-engine\[gguf\]'"):
        Checkpoint.open(llama[0])
