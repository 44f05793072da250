"""Mixtures of experts: read as tokens are routed to them, with the bits and within the bytes of all that."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockstream
from blockstream.errors import BudgetError, ModelError, SegmentLoadError
from blockstream.module import heads
from blockstream.verify.difference import DifferenceError
from blockstream.verify.segment_check import SegmentCheck
from tests.support.models import aligned, assert_same

KiB = 1 << 10
COMMON = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def mixtral(**more):
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**COMMON | {"intermediate_size": 64, "num_local_experts": 16} | more)
    )


def qwen3():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON, intermediate_size=96, moe_intermediate_size=64, num_experts=16, head_dim=16,
            norm_topk_prob=True,
        )
    )  # fmt: skip


def deepseek(width=64):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = COMMON | {"num_key_value_heads": 4, "hidden_size": width}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **sizes, intermediate_size=96, moe_intermediate_size=width, n_routed_experts=16, n_group=4,
            topk_group=2, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16,
            v_head_dim=16, first_k_dense_replace=1,
        )
    )  # fmt: skip


def gpt_oss(width=64):
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            **COMMON | {"hidden_size": width}, intermediate_size=width, num_local_experts=16, head_dim=16,
            sliding_window=8,
        )
    )  # fmt: skip


MODELS = {f.__name__: f for f in (mixtral, qwen3, deepseek, gpt_oss)}
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))


def run(module):
    """Return logits of a prompt and tokens decoded with a cache."""
    with torch.no_grad():
        logits = module(IDS, use_cache=False, return_dict=False)[0]
        ids = module.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return logits, ids


def fused(module, folder):
    """Save the parameters as they are: all experts of a layer in one tensor."""
    save_file({k: v.clone() for k, v in module.state_dict().items()}, folder / "model.safetensors")
    return folder


def least(factory, folder, dtype=None) -> int:
    with blockstream.open(arena="1GiB") as s:
        s.stage("m", factory, folder, dtype=dtype)
        return s.finest_arena_nbytes


def layer_of_experts(module) -> int:
    return sum(p.nbytes for n, p in module.named_parameters() if "layers.1.mlp.experts" in n)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_the_resident_model_in_less_than_a_layer_of_experts(name, how, twins):
    def factory():
        made = MODELS[name]()
        made.set_experts_implementation(how)
        return made

    resident, folder = twins(factory)
    arena = least(factory, folder) + 64 * KiB
    assert arena < layer_of_experts(resident)
    want = run(resident)
    with blockstream.open(arena=arena) as s:
        module = s.stage("m", factory, folder)
        assert_same(run(module), want)
        report = s.report()
    assert report["arena"]["touched_nbytes"] <= arena
    assert report["stages"][0]["experts"]["read_nbytes"] > 0


def steps(module, first, n):
    """Decode from one token, one at a time: each routes to few experts."""
    cache, ids = None, torch.tensor([[first]])
    for _ in range(n):
        out = module(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)


def test_a_token_reads_what_it_is_routed_to(twins):
    def factory():
        return mixtral(hidden_size=128, intermediate_size=384)

    resident, folder = twins(factory)
    whole = sum(p.nbytes for n, p in resident.named_parameters() if ".experts." in n)
    with torch.no_grad(), blockstream.open(arena=least(factory, folder)) as s:
        module = s.stage("m", factory, folder)
        steps(module, 5, 6)
        read = s.report()["stages"][0]["experts"]["read_nbytes"]
    assert read <= 1.3 * 6 * whole * 2 / 16


def test_experts_used_last_are_kept_where_the_plan_leaves_room(twins, tmp_path):
    resident, _ = twins(mixtral)
    folder = fused(resident, tmp_path)
    arena = sum(p.nbytes for p in resident.parameters()) * 9 // 10
    read = [0]
    with torch.no_grad(), blockstream.open(arena=arena) as s:
        module = s.stage("m", mixtral, folder)
        for _ in range(3):
            assert_same(module(IDS, use_cache=False).logits, resident(IDS, use_cache=False).logits)
            report = s.report()
            read.append(report["stages"][0]["experts"]["read_nbytes"] - sum(read))
    assert report["stages"][0]["experts"]["nbytes"] > arena // 2
    assert read[3] < 0.7 * read[1]
    assert report["arena"]["touched_nbytes"] <= arena


def test_what_fits_is_not_read_one_by_one(twins):
    _, folder = twins(mixtral)
    with blockstream.open(arena="1GiB") as s:
        module = s.stage("m", mixtral, folder)
        run(module)
        assert "experts" not in s.report()["stages"][0]


def test_a_shelf_that_shrinks_goes_on_with_what_it_needs(twins, tmp_path):
    resident, _ = twins(mixtral)
    folder = fused(resident, tmp_path)
    arena = sum(p.nbytes for p in resident.parameters()) * 9 // 10
    with torch.no_grad(), blockstream.open(arena=arena) as s:
        module = s.stage("m", mixtral, folder)
        module(IDS)
        shelf = s.prepared["m"].shelf
        before, touched = shelf.nbytes, s.touched_nbytes()
        module(IDS)
        assert s.touched_nbytes() > touched
        shelf.resize(0)
        assert shelf.nbytes == shelf.each.least_nbytes < before
        assert s.touched_nbytes() <= touched
        assert_same(run(module), run(resident))


def test_too_small_an_arena_names_the_least(twins):
    _, folder = twins(mixtral)
    with blockstream.open(arena=300 * KiB) as s, pytest.raises(BudgetError, match=r"beside .* experts"):
        s.stage("m", mixtral, folder)
        s.draft()


def test_fused_tensors_in_a_file_are_read_by_slices(twins, tmp_path):
    resident, _ = twins(mixtral)
    fused(resident, tmp_path)
    with blockstream.open(arena=least(mixtral, tmp_path)) as s:
        module = s.stage("m", mixtral, tmp_path)
        assert_same(run(module), run(resident))


def test_bfloat16_of_a_float32_file(twins):
    _, folder = twins(mixtral)
    resident = aligned(type(mixtral()).from_pretrained(folder, dtype=torch.bfloat16))
    with torch.no_grad(), blockstream.open(arena=least(mixtral, folder, "bf16")) as s:
        module = s.stage("m", mixtral, folder, dtype="bf16")
        assert_same(module(IDS, return_dict=False)[0], resident(IDS, return_dict=False)[0])


def in_mxfp4(tensors):
    """Return gpt-oss's tensors with random experts in four bits."""
    made = {n: t for n, t in tensors.items() if not n.endswith(("gate_up_proj", "down_proj"))}
    for name in tensors.keys() - made.keys():
        count, columns, rows = tensors[name].shape
        made[f"{name}_blocks"] = torch.randint(256, (count, rows, columns // 32, 16), dtype=torch.uint8)
        made[f"{name}_scales"] = torch.randint(118, 126, (count, rows, columns // 32), dtype=torch.uint8)
    return made


def in_fp8(tensors):
    """Return tensors with experts as DeepSeek has them: fp8 with a scale a block, a tensor each."""
    made = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            made[f"{name}_scale_inv"] = torch.rand(2, 2)
            tensor = tensor.to(torch.float8_e4m3fn)
        made[name] = tensor
    return made


@pytest.mark.parametrize(
    ("name", "code", "method"), [("gpt_oss", in_mxfp4, "mxfp4"), ("deepseek", in_fp8, "fp8")]
)
def test_coded_experts_are_widened_one_by_one(name, code, method, twins):
    def factory():
        return MODELS[name](width=256)

    _, folder = twins(factory)
    path = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in code(load_file(path)).items()}, path)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    results = []
    for arena in ("1GiB", least(factory, folder)):
        with torch.no_grad(), blockstream.open(arena=arena) as s:
            module = s.stage("m", factory, folder)
            results.append(module(IDS, use_cache=False).logits)
            apart = bool(s.prepared["m"].experts)
        assert apart is (arena != "1GiB")
    assert results[0].isfinite().all()
    assert_same(*results)


def test_a_module_of_ones_own_goes_on_as_a_block(twins):
    def factory():
        made = mixtral()
        for layer in made.model.layers:
            layer.mlp.experts.forward = type(layer.mlp.experts).forward.__get__(layer.mlp.experts)
        return made

    _, folder = twins(mixtral)
    with blockstream.open(arena="2MiB") as s:
        s.stage("m", factory, folder)
        assert s.facts["m"].cut.experts == ()


def test_experts_of_a_compiled_block_are_read_with_it(twins):
    def factory():
        made = mixtral(num_hidden_layers=3)
        for layer in made.model.layers:
            layer.compile(backend="eager")
        return made

    _, folder = twins(lambda: mixtral(num_hidden_layers=3))
    with blockstream.open(arena="4MiB") as s:
        s.stage("m", factory, folder)
        assert s.facts["m"].cut.experts == ()


def test_weights_outside_the_forward_are_refused_by_name(twins):
    _, folder = twins(mixtral)
    with blockstream.open(arena=least(mixtral, folder)) as s:
        module = s.stage("m", mixtral, folder)
        run(module)
        table = module.model.layers[0].mlp.experts.gate_up_proj
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts\.gate_up_proj"):
            table + 1
        with pytest.raises(IndexError):
            table[16]


def test_a_view_that_is_kept_is_never_written_over(twins):
    _, folder = twins(mixtral)
    with torch.no_grad(), blockstream.open(arena=least(mixtral, folder)) as s:
        module = s.stage("m", mixtral, folder)
        run(module)
        table = module.model.layers[0].mlp.experts.down_proj
        kept = [table[0], table[1]]
        with pytest.raises(ModelError, match="in use by views"):
            table[2]
        del kept
        table[2]


def test_verify_compares_experts_one_by_one(twins):
    _, folder = twins(mixtral)
    with torch.no_grad(), blockstream.open(arena=least(mixtral, folder)) as s:
        module = s.stage("m", mixtral, folder)
        s.start()
        table = module.model.layers[1].mlp.experts.down_proj
        right = table.expert
        for expert in (right, lambda i: right(i) + 1):
            table.expert = expert
            with closing(SegmentCheck(s.prepared["m"])):
                if expert is right:
                    module(IDS)
                else:
                    with pytest.raises(DifferenceError, match=r"expert \d+ of 'model\.layers\.1\.mlp"):
                        module(IDS)


def test_a_file_that_changes_is_named(twins):
    _, folder = twins(mixtral)
    with torch.no_grad(), blockstream.open(arena=least(mixtral, folder)) as s:
        module = s.stage("m", mixtral, folder)
        run(module)
        path = next(folder.glob("*.safetensors"))
        save_file(load_file(path), path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
        with pytest.raises(SegmentLoadError, match="replaced"):
            module(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_is_multiplied_by_rows_where_it_does_not_fit(bias, dtype, twins, monkeypatch):
    monkeypatch.setattr(heads, "HEAD_NBYTES", 64 * KiB)
    monkeypatch.setattr(heads, "PART_NBYTES", 32 * KiB)

    def factory():
        made = mixtral(vocab_size=4000)
        made.lm_head = torch.nn.Linear(64, 4000, bias=bias)
        return made.to(dtype)

    resident, folder = twins(factory)
    arena = least(factory, folder)
    with torch.no_grad(), blockstream.open(arena=arena) as s:
        module = s.stage("m", factory, folder)
        assert_same(run(module), run(resident))
        assert "lm_head" in [each.path for each in s.prepared["m"].experts]
        with closing(SegmentCheck(s.prepared["m"])):
            module(IDS)
