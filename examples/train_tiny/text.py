"""Make the tiny text side: a word-level tokenizer and an untrained T5 encoder of two layers."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

from examples.train_tiny import data
from examples.train_tiny.data import Scene

MAX_TOKENS = 24
SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in every T5
WIDTH = 128

# What a pipeline may add to a prompt; the model learns to look past words it does not know.
SUFFIX = " aesthetic score: 6.5."


def vocabulary() -> list[str]:
    """Return every word that captions use, in the order of their ids."""
    words = dict.fromkeys(word for scene in data.scenes() for word in scene.caption().split())
    return [*SPECIAL, *sorted(words)]


def make_tokenizer() -> Tokenizer:
    """Return the tokenizer: lower case, one id a word, `</s>` at the end, unknown words as `<unk>`."""
    vocab = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=MAX_TOKENS)
    return tokenizer


def make_encoder() -> T5EncoderModel:
    """Return the encoder with T5 v1.1's architecture (gated GELU, relative positions), untrained."""
    config = T5Config(
        vocab_size=len(vocabulary()),
        d_model=WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def encode(tokenizer: Tokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 [n, MAX_TOKENS] each."""
    found = tokenizer.encode_batch(captions)
    return torch.tensor([f.ids for f in found]), torch.tensor([f.attention_mask for f in found])


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption: 30% say nothing of the background, 10% end in words of no meaning."""
    caption = scene.caption(background=rng.random() >= 0.3)
    return caption + SUFFIX if rng.random() < 0.1 else caption
