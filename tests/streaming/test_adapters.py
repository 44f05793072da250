"""LoRA beside streamed weights, loaded before, inside or between: the bits of peft with all in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blockstream
from blockstream.errors import ModelError
from tests.support.stable_diffusion import save_stable_diffusion

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[1, 5, 9, 3]])
CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def base(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder / "base").eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a base and adapters "a" and "b", and what peft makes of them in memory."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(folder / "base")
    for name, targets in (("a", ["q_proj", "v_proj"]), ("b", ["q_proj", "down_proj"])):
        settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(base(folder), settings).save_pretrained(folder / name)
    return folder, outputs(loaded(base(folder), folder))


def loaded(model, folder):
    """Return a model with both adapters."""
    model = peft.PeftModel.from_pretrained(model, folder / "a", adapter_name="a").eval()
    model.load_adapter(folder / "b", "b")
    return model


def outputs(model) -> dict[str, torch.Tensor]:
    """Return what each adapter, both with weights, and none of them give, in turn."""
    found = {}
    with torch.no_grad():
        for name in ("a", "b"):
            model.set_adapter(name)
            found[name] = model(IDS).logits
        model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "both", combination_type="cat")
        model.set_adapter("both")
        found["both"] = model(IDS).logits
        with model.disable_adapter():
            found["none"] = model(IDS).logits
        model.set_adapter("a")
        found["tokens"] = model.generate(IDS, max_new_tokens=4, do_sample=False)
    return found


def assert_all_same(got, want):
    assert {name for name in want if not torch.equal(got[name], want[name])} == set()


@pytest.mark.parametrize(("arena", "begun"), [("300KiB", False), ("300KiB", True), ("64MiB", True)])
def test_adapters_loaded_while_a_model_streams_give_the_bits_of_peft(arena, begun, made):
    folder, want = made
    with blockstream.from_pretrained(folder / "base", arena=arena) as model:
        if begun:
            with torch.no_grad():
                assert torch.equal(model(IDS).logits, want["none"])
        assert_all_same(outputs(loaded(model, folder)), want)


def test_a_model_that_has_its_adapters_is_streamed_with_them(made):
    folder, want = made
    model = loaded(base(folder), folder)
    own = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"].weight
    with blockstream.stream(model, folder / "base", arena="300KiB", example_inputs=(IDS,)) as streamed:
        assert streamed is model
        assert not blockstream.session(model).facts["model"].guessed
        assert_all_same(outputs(streamed), want)
        assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"].weight is own
    with torch.no_grad():
        model.set_adapter("b")
        assert torch.equal(model(IDS).logits, want["b"])


def test_blocks_are_cut_finer_around_adapters(made):
    folder, want = made
    with blockstream.from_pretrained(folder / "base", arena="130KiB") as model:
        assert_all_same(outputs(loaded(model, folder)), want)


def test_the_librarys_own_load_adapter(made):
    folder, want = made
    with blockstream.from_pretrained(folder / "base", arena="300KiB") as model, torch.no_grad():
        for name in ("a", "b"):
            model.load_adapter(str(folder / name), adapter_name=name)
        for name in ("b", "a"):
            model.set_adapter(name)
            assert torch.equal(model(IDS).logits, want[name])
        model.disable_adapters()
        assert torch.equal(model(IDS).logits, want["none"])


def test_an_adapter_on_meta_is_refused_with_a_way_out(made):
    folder, _ = made
    with blockstream.empty():
        model = transformers.LlamaForCausalLM(CONFIG).eval()
    model = peft.PeftModel.from_pretrained(model, folder / "a", low_cpu_mem_usage=True)
    with (
        pytest.raises(ModelError, match=r"of an adapter is on meta.*inside the with block"),
        blockstream.stream(model, folder / "base", arena="1MiB"),
    ):
        pass


def test_what_would_write_to_the_weights_is_refused_by_name(made):
    folder, want = made
    with blockstream.from_pretrained(folder / "base", arena="300KiB") as model, torch.no_grad():
        model = peft.PeftModel.from_pretrained(model, folder / "a", adapter_name="a").eval()
        with pytest.raises(ModelError, match="is on disk"):
            model.merge_adapter()
        assert torch.equal(model(IDS).logits, want["a"])
        with pytest.raises(ModelError, match="the next load would lose"):
            model.base_model.model.load_state_dict({"lm_head.weight": torch.zeros(64, 64)}, strict=False)
        with pytest.raises(ModelError, match="its state dict would hold all its weights"):
            model.state_dict()


def test_training_them_is_refused_by_name(made):
    folder, _ = made
    with blockstream.from_pretrained(folder / "base", arena="300KiB") as model:
        model = peft.PeftModel.from_pretrained(model, folder / "a", adapter_name="a", is_trainable=True)
        with pytest.raises(Exception, match=r"lora_A.* requires grad: the graph would keep"):
            model(IDS).logits.sum().backward()


def image(pipe):
    """Return what a pipeline makes of some embeddings and a seed, in two steps."""
    pipe.set_progress_bar_config(disable=True)
    words = torch.randn(
        1, 7, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(2)
    )
    return pipe(
        prompt_embeds=words, negative_prompt_embeds=torch.zeros_like(words), num_inference_steps=2, height=16,
        width=16, generator=torch.Generator().manual_seed(1), output_type="pt",
    ).images  # fmt: skip


def test_a_pipelines_lora_makes_the_image_that_it_makes_resident(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = save_stable_diffusion(tmp_path / "pipe")
    kind = diffusers.StableDiffusionPipeline
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        kind.save_lora_weights(tmp_path / name, unet_lora_layers=peft.get_peft_model_state_dict(unet))

    def images(pipe):
        plain = image(pipe)
        for name in "ab":
            pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        pipe.set_adapters(["a", "b"], [0.7, 0.3])
        return plain, image(pipe)

    want = images(kind.from_pretrained(folder, tokenizer=None))
    with blockstream.pipeline(folder, arena="300KiB") as pipe:
        got = images(pipe)
    assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True)] == [True] * 2
    assert not torch.allclose(want[0], want[1], atol=1e-3)


def test_a_module_of_ones_own_takes_adapters(tmp_path):
    from safetensors.torch import save_file

    def make():
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

    torch.manual_seed(0)
    net = make().eval()
    save_file(dict(net.state_dict()), tmp_path / "m.safetensors")
    settings = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(net, settings).eval()
    x = torch.randn(2, 8)
    with torch.no_grad():
        want = model(x)
        with blockstream.stream(model, tmp_path / "m.safetensors", arena="64KiB") as streamed:
            assert torch.equal(streamed(x), want)
