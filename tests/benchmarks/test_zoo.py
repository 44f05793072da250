"""A dozen architectures of each library, loaded as its own from_pretrained loads them, bit for bit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.compare import compare
from benchmarks.zoo.models import DIFFUSERS, TRANSFORMERS

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

TEXT = [
    "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM",
    "MixtralForCausalLM", "BertModel", "DebertaV2Model", "T5EncoderModel", "MarianMTModel", "CLIPTextModel",
    "ResNetForImageClassification", "ViTModel",
]  # fmt: skip
IMAGE = [name for name in DIFFUSERS if name != "DiTTransformer2DModel"]
#: As saved in float32 and asked for; some without a dtype, as the library then decides.
BARE = {"LlamaForCausalLM", "T5EncoderModel", "WanTransformer3DModel", "AutoencoderKL"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*TEXT, *IMAGE])
def test_an_architecture_computes_what_its_librarys_from_pretrained_computes(name, tmp_path):
    animal = {**TRANSFORMERS, **DIFFUSERS}[name]
    assert compare(animal, tmp_path / "a", torch.float32, torch.bfloat16, "64MiB") == "equal"
    if name in BARE:
        assert compare(animal, tmp_path / "b", torch.bfloat16, None, "64MiB") == "equal"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["T5EncoderModel", "GPTJForCausalLM"])
def test_what_a_library_keeps_in_float32_stays_so_in_float16(name, tmp_path):
    assert compare(TRANSFORMERS[name], tmp_path, torch.float32, torch.float16, "64MiB") == "equal"


@pytest.mark.filterwarnings("ignore")
def test_a_module_called_past_its_block_is_refused_by_name(tmp_path):
    found = compare(DIFFUSERS["DiTTransformer2DModel"], tmp_path, torch.float32, None, "64MiB")
    assert found.startswith("refused: parameter 'transformer_blocks.0.norm1.emb")
