"""HunyuanVideo's first text encoder: a LLaMA of which the last layers and the final norm are never run.

The prompt goes into a fixed template; the rows of the template's head are dropped from the result.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError, ConfigError
from blockstream.system import regular
from movd.hunyuan.hunyuan_released import LLAVA_LLAMA_3_8B
from movd.renamed import prefix_before, renamed

if TYPE_CHECKING:
    from transformers import LlamaModel

#: Layers at the end whose result is not used.
SKIPPED_LAYERS = 2
#: Tokens of a prompt, beside the template's.
PROMPT_TOKENS = 256
#: Tokens of the released tokenizer before the prompt, its begin token among them. Where no released
#: tokenizer was at hand to count them the number is diffusers'.
CROP = 95
#: Vocabularies from this size on are the released one.
_RELEASED_VOCABULARY = 128_000
#: What stands before the layers: LlamaModel, LlamaForCausalLM, two forms of llava.
_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.")
_LAYER = re.compile(r"layers\.(\d+)\.")

#: The model was trained on captions that this instruction had drawn up.
HEAD = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
TAIL = "<|eot_id|>"


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the LLaMA's own configuration out of a config.json, that of a llava included.

    Raises ConfigError for another model, or one with too few layers.
    """
    own = dict(config.get("text_config") or config)
    kind = own.get("model_type", "llama")
    if kind != "llama":
        raise ConfigError(f"model_type {kind!r} is not 'llama'; HunyuanVideo reads prompts with a LLaMA 3")
    scaling = own.get("rope_scaling")
    if scaling:
        raise ConfigError(f"rope_scaling = {scaling!r}: HunyuanVideo's LLaMA has none")
    rope = own.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters = {rope!r}: HunyuanVideo's LLaMA has plain rotary positions")
    if "rope_theta" in rope:
        own.setdefault("rope_theta", rope["rope_theta"])
    known = {**{k: LLAVA_LLAMA_3_8B[k] for k in ("model_type", *_DEFAULTS)}, **own}
    kept = {name: known[name] for name in LLAVA_LLAMA_3_8B if name in known}
    missing = LLAVA_LLAMA_3_8B.keys() - kept.keys()
    if missing:
        raise ConfigError(f"a LLaMA configuration needs {sorted(missing)}")
    if kept["num_hidden_layers"] <= SKIPPED_LAYERS:
        raise ConfigError(
            f"num_hidden_layers = {kept['num_hidden_layers']}: the last {SKIPPED_LAYERS} are skipped, at "
            f"least {SKIPPED_LAYERS + 1} are needed"
        )
    return kept


#: Keys that a llava's text_config leaves to LLaMA's defaults.
_DEFAULTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)


def llama_encoder(config: Mapping[str, Any]) -> LlamaModel:
    """Build the layers that are run, in eval mode: all but the last two, without the final norm.

    Its `last_hidden_state` is the whole model's `hidden_states[-3]`. Build it under `blockstream.empty()`
    to spend no memory. Raises ConfigError for another model.
    """
    from transformers import LlamaConfig, LlamaModel

    own = llama_config(config)
    del own["model_type"]
    own["num_hidden_layers"] -= SKIPPED_LAYERS
    model = LlamaModel(LlamaConfig(**own, use_cache=False, attn_implementation="eager"))
    model.norm = nn.Identity()
    return model.eval()


def llama_entries(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """Return the tensors that are read, under LlamaModel's names, of any layout they are published in.

    LlamaForCausalLM's head, a llava's image half, the last layers and the final norm are left out.
    """
    layers = llama_config(config)["num_hidden_layers"] - SKIPPED_LAYERS
    prefix = prefix_before(checkpoint, "embed_tokens.weight", _PREFIXES)

    def name_of(name: str) -> str | None:
        if not name.startswith(prefix) or "rotary_emb" in name:
            return None
        own = name.removeprefix(prefix)
        found = _LAYER.match(own)
        if found is None:
            return own if own == "embed_tokens.weight" else None
        return own if int(found[1]) < layers else None

    return renamed(checkpoint, name_of)


class PromptTokenizer:
    """The LLaMA's `tokenizer.json`: a prompt inside the template, cut or padded on the right.

    `crop` is the number of tokens before the prompt.
    """

    def __init__(self, folder: Path, vocabulary: int, prompt_tokens: int = PROMPT_TOKENS) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{folder} has no tokenizer.json; the LLaMA's tokenizer belongs there")
        try:
            data = regular.read_bytes(path)
            self.identity = hashlib.sha256(data).hexdigest()[:16]
            self._library = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer.json: {error}") from error
        self._library.no_padding()
        self._library.no_truncation()
        self.crop = CROP if vocabulary >= _RELEASED_VOCABULARY else self._head_tokens()
        self.prompt_tokens = prompt_tokens
        self._library.enable_truncation(self.crop + prompt_tokens)

    def _head_tokens(self) -> int:
        """Return what a tokenizer of its own makes of the template's head: tokens before any prompt."""
        rows = [self._library.encode(HEAD + prompt + TAIL).ids for prompt in ("a", "the")]
        return next(i for i, pair in enumerate(zip(*rows, strict=False)) if pair[0] != pair[1])

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [B, crop + prompt_tokens]."""
        found = [self._library.encode(HEAD + text + TAIL).ids for text in texts]
        ids = torch.zeros(len(texts), self.crop + self.prompt_tokens, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(found):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return ids, mask

    def is_full(self, text: str) -> bool:
        """Return whether a prompt fills every position, so that the rest of it is cut."""
        return len(self._library.encode(HEAD + text + TAIL).ids) >= self.crop + self.prompt_tokens


@torch.no_grad()
def embed_prompt(model: LlamaModel, ids: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Return states [B, L, hidden] and mask [B, L] of ids and mask [B, crop + L], the template's head cut."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states[:, crop:], mask[:, crop:]
