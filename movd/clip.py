"""CLIP's text half: transformers' CLIPTextModel, of which HunyuanVideo and Pyramidal Flow take one vector."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError, ConfigError
from blockstream.system import regular
from movd.released import CLIP_L
from movd.renamed import prefix_before, renamed

if TYPE_CHECKING:
    from transformers import CLIPTextModel

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_EMBEDDING = "embeddings.token_embedding.weight"


def clip_text_model(config: Mapping[str, Any]) -> CLIPTextModel:
    """Build the text model of a config.json, in eval mode; a whole CLIP's `text_config` serves as well.

    Build it under `blockstream.empty()` to spend no memory. Raises ConfigError for another model.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    own = config.get("text_config") or config
    kind = own.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise ConfigError(f"model_type {kind!r} is not 'clip_text_model', the text half of CLIP")
    missing = [name for name in _NEEDED if name not in own]
    if missing:
        raise ConfigError(f"a CLIP text configuration needs {missing}")
    known = {name: own[name] for name in CLIP_L if name in own and name != "model_type"}
    return CLIPTextModel(CLIPTextConfig(**known, attn_implementation="eager")).eval()


def clip_entries(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return the text half's tensors under the module's names.

    Files say `text_model.` before them, modules of transformers 5 do not; a whole CLIP holds an image half
    too, and old files the row numbers of positions.
    """
    prefix = prefix_before(checkpoint, _EMBEDDING, ("text_model.", ""))
    own = "text_model." if f"text_model.{_EMBEDDING}" in dict(model.named_parameters()) else ""

    def name_of(name: str) -> str | None:
        if not name.startswith(prefix) or name.endswith("position_ids"):
            return None
        kept = name.removeprefix(prefix)
        return own + kept if kept.split(".")[0] in ("embeddings", "encoder", "final_layer_norm") else None

    return renamed(checkpoint, name_of)


@torch.no_grad()
def pooled(model: CLIPTextModel, ids: Tensor) -> Tensor:
    """Return [B, hidden] of ids [B, length]: the end token's row after the last norm.

    Padding is attended to as any token: attention is causal and no mask is passed.
    """
    return model(input_ids=ids).pooler_output


class CLIPTokenizer:
    """CLIP's tokenizer: `tokenizer.json`, else `vocab.json` and `merges.txt`, read by their libraries."""

    def __init__(self, folder: Path, max_length: int) -> None:
        self.max_length = max_length
        files = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")]
        there = [path for path in files if path.exists()]
        if files[0] not in there and len(there) < 2:
            raise CheckpointError(
                f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; CLIP's tokenizer "
                "belongs there"
            )
        used = there[:1] if files[0] in there else there
        try:
            data = [regular.read_bytes(path) for path in used]
            self.identity = hashlib.sha256(b"".join(data)).hexdigest()[:16]
            if files[0] in there:
                from tokenizers import Tokenizer

                self._library = Tokenizer.from_buffer(data[0])
            else:
                from transformers import CLIPTokenizer as Official

                official = Official.from_pretrained(str(folder), local_files_only=True)
                self._library = official.backend_tokenizer
        except Exception as error:  # the libraries raise bare Exception
            raise CheckpointError(f"{used[0]} is no tokenizer that can be read: {error}") from error
        self._library.no_padding()
        self._library.enable_truncation(max_length)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return ids, int64 [B, max_length]: start, text, end, then the end again as padding."""
        found = [encoding.ids for encoding in self._library.encode_batch(list(texts))]
        return torch.tensor([[*ids, *[ids[-1]] * (self.max_length - len(ids))] for ids in found])

    def is_full(self, text: str) -> bool:
        """Return whether a text fills every position, so that the rest of it is cut."""
        return len(self._library.encode(text).ids) >= self.max_length
