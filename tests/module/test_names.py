"""A module's parameters and a checkpoint's tensors find each other, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blockstream
from blockstream.errors import CheckpointError, ModelError
from tests.support import models, toys
from tests.support.models import aligned, assert_same, save
from tests.support.streamed import streamed
from tests.support.toys import noise


def rewrite(folder, change):
    """Save a checkpoint anew under other names or with other tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: f"module.{n}",
        lambda n: f"model.diffusion_model.{n}",
        lambda n: f"_orig_mod.{n}",
        lambda n: n,
    ],
    ids=["module", "nested", "compiled", "same"],
)
def test_a_wrappers_prefix_is_stripped(rename, twins):
    resident, folder = twins(toys.Stack)
    rewrite(folder, lambda t: {rename(k): v for k, v in t.items()})
    with streamed(toys.Stack, folder) as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))


def test_a_prefix_is_stripped_beside_tensors_of_others(twins):
    resident, folder = twins(toys.Stack)
    rewrite(folder, lambda t: {**{f"a.{k}": v for k, v in t.items()}, "b.other": torch.zeros(3)})
    with streamed(toys.Stack, folder) as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))


def test_a_wrapper_around_the_module_is_added(twins):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = toys.Stack()

        def forward(self, x):
            return self.inner(x)

    resident, folder = twins(toys.Stack)
    with streamed(Wrapper, folder) as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))


def test_a_base_model_is_streamed_from_the_checkpoint_of_one_with_a_head(tmp_path):
    from transformers import LlamaModel

    torch.manual_seed(0)
    whole = models.llama()
    folder = save(whole, tmp_path / "w")
    ids = torch.tensor([[1, 2, 3]])
    aligned(whole)
    with torch.no_grad():
        want = whole.model(ids).last_hidden_state
        with blockstream.stream((LlamaModel, whole.config), folder, arena="1MiB") as m:
            assert_same(m(ids).last_hidden_state, want)


def test_names_of_old_checkpoints_are_understood(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30
    )
    module = BertModel(config)
    folder = save(module, tmp_path / "w")

    def old(tensors):
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {}
        for name, value in tensors.items():
            for new, before in names.items():
                name = name.replace(new, before)
            renamed[f"bert.{name}"] = value
        return {
            **renamed,
            "cls.predictions.bias": torch.zeros(30),
            "bert.embeddings.position_ids": torch.arange(3),
        }

    rewrite(folder, old)
    aligned(module)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), blockstream.stream((BertModel, config), folder, arena="1MiB") as m:
        assert_same(m(ids).last_hidden_state, module(ids).last_hidden_state)


@pytest.mark.parametrize("factory", [models.mixtral, models.qwen_moe])
def test_experts_are_stacked_from_their_tensors(factory, tmp_path):
    torch.manual_seed(0)
    module = factory()
    folder = save(module, tmp_path / "w")
    assert any(".experts.3." in name for name in load_file(folder / "model.safetensors"))
    aligned(module)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), blockstream.stream(factory, folder, arena="1MiB") as m:
        assert_same(m(ids, use_cache=False).logits, module(ids, use_cache=False).logits)
        report = blockstream.session(m).report()
        assert report["unplanned"] == 0


def refusal(factory, folder, match, kind=CheckpointError):
    with pytest.raises(kind, match=match), blockstream.stream(factory, folder, arena="1MiB"):
        pass


def test_missing_tensors_are_named(twins):
    _, folder = twins(toys.Stack)
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "blocks.2.up" not in k})
    refusal(
        toys.Stack,
        folder,
        r"no tensor for 2 of 28 parameters of Stack \(blocks.2.up.weight, blocks.2.up.bias\)",
    )


def test_a_checkpoint_of_another_model_is_refused(twins):
    _, folder = twins(toys.Codec)
    refusal(toys.Zipped, folder, "another model")


def test_a_tensor_of_another_shape_is_named(twins):
    _, folder = twins(toys.Stack)
    rewrite(folder, lambda t: {k: v[:5] if k == "norm.weight" else v for k, v in t.items()})
    refusal(toys.Stack, folder, r"'norm.weight' holds shape \[5\].*\[16\]")


def test_a_table_of_another_shape_is_named(twins, monkeypatch):
    monkeypatch.setattr("blockstream.module.partition.GATHER_NBYTES", 1000)
    _, folder = twins(toys.Tied)
    rewrite(folder, lambda t: {k: v[:20] if v.shape == (50, 16) else v for k, v in t.items()})
    refusal(toys.Tied, folder, r"\[20, 16\].*\[50, 16\]")


def test_a_transposed_tensor_is_refused(twins):
    _, folder = twins(toys.Stack)
    rewrite(folder, lambda t: {k: v.T if k == "blocks.0.up.weight" else v for k, v in t.items()})
    refusal(toys.Stack, folder, r"blocks.0.up.weight.*\[16, 32\].*\[32, 16\]")


@pytest.mark.parametrize("extra", ["blocks.4.up.weight", "blocks.0.up.scale", "norm.running"])
def test_tensors_of_layers_the_module_should_have_are_refused(extra, twins):
    _, folder = twins(toys.Stack)
    rewrite(folder, lambda t: {**t, extra: torch.zeros(3)})
    refusal(toys.Stack, folder, rf"has no place for \({extra}\)")


@pytest.mark.parametrize("extra", ["decoder.blocks.0.weight", "head.weight", "blocks.0.rotary_emb.inv_freq"])
def test_tensors_of_parts_the_module_lacks_are_passed_over_and_counted(extra, twins):
    resident, folder = twins(toys.Stack)
    rewrite(folder, lambda t: {**t, extra: torch.zeros(3)})
    with streamed(toys.Stack, folder) as m, torch.no_grad():
        assert_same(m(noise()), resident(noise()))
        assert blockstream.session(m).report()["stages"][0]["unused_tensors"] == 1


def test_a_dtype_that_cannot_be_cast_is_refused(twins):
    _, folder = twins(toys.Stack)
    rewrite(
        folder, lambda t: {k: v.to(torch.float8_e8m0fnu) if k == "norm.weight" else v for k, v in t.items()}
    )
    with (
        pytest.raises(CheckpointError, match=r"'norm.weight' is F8_E8M0 and parameter 'norm.weight'"),
        blockstream.stream(toys.Stack, folder, arena="1MiB", dtype="bf16"),
    ):
        pass


def test_a_buffer_of_another_shape_is_refused(twins):
    _, folder = twins(toys.Rotary)
    rewrite(folder, lambda t: {k: v[:3] if k == "shift" else v for k, v in t.items()})
    refusal(toys.Rotary, folder, r"'shift' has shape \[3\]")


class TestFolders:
    """`from_pretrained`: the class a config.json names, from an installed library only."""

    def test_transformers(self, tmp_path):
        torch.manual_seed(0)
        module = models.t5_encoder()
        save(module, tmp_path)
        aligned(module)
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad(), blockstream.from_pretrained(tmp_path, arena="1MiB") as m:
            assert type(m) is type(module)
            assert_same(m(ids).last_hidden_state, module(ids).last_hidden_state)

    def test_diffusers(self, tmp_path):
        torch.manual_seed(0)
        module = models.hunyuan()
        save(module, tmp_path)
        with torch.no_grad(), blockstream.from_pretrained(tmp_path, arena="1MiB") as m:
            assert_same(models.run_hunyuan(m), models.run_hunyuan(aligned(module)))

    def test_code_in_the_folder_is_never_run(self, tmp_path):
        (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
        (tmp_path / "config.json").write_text(
            '{"architectures": ["EvilModel"], "model_type": "evil", '
            '"auto_map": {"AutoModel": "modeling_evil.EvilModel", "AutoConfig": "modeling_evil.EvilConfig"}}'
        )
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        with (
            pytest.raises(ModelError, match=r"EvilModel.*not run"),
            blockstream.from_pretrained(tmp_path, arena="1MiB"),
        ):
            pass

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            (None, r"config\.json"),
            ("[]", r"config\.json"),
            ("{}", "names no"),
            ('{"_class_name": "NoSuchModel"}', "NoSuchModel"),
            ('{"architectures": ["T5Config"]}', "T5Config"),
        ],
    )
    def test_what_is_no_model_is_refused(self, config, match, tmp_path):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=match), blockstream.from_pretrained(tmp_path, arena="1MiB"):
            pass
