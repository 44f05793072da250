"""Tokenizers with one face: text in, ids and mask of a fixed length out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from blockstream.checkpoint.read.entries import unreadable
from blockstream.errors import CheckpointError
from blockstream.system import regular

PAD, EOS, UNKNOWN = 0, 1, 2
#: What Open-Sora truncates and pads to.
MAX_LENGTH = 300

SENTENCEPIECE = "spiece.model"
JSON = "tokenizer.json"


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer. `identity` names it in cache keys."""

    max_length: int
    identity: str

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [B, max_length]: an end token, then padding on the right."""


class SentencePieceTokenizer:
    """The official T5 tokenizer, read from its `spiece.model`."""

    def __init__(self, path: Path, max_length: int = MAX_LENGTH) -> None:
        from sentencepiece import SentencePieceProcessor

        self.max_length = max_length
        data = _read(path)
        self.identity = _digest(data)
        try:
            self._pieces = SentencePieceProcessor(model_proto=data)
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} is not a sentencepiece model: {error}") from error
        ends = self._pieces.eos_id()
        if ends != EOS:
            raise CheckpointError(f"{path} ends a text with token {ends}; T5's tokenizer has {EOS}")

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [B, max_length]; long texts are cut, the end token stays."""
        rows = self._pieces.encode(list(texts))
        return _padded([[*row[: self.max_length - 1], EOS] for row in rows], self.max_length)


class JsonTokenizer:
    """Any `tokenizer.json` of the `tokenizers` library whose end token its post-processor adds."""

    def __init__(self, path: Path, max_length: int = MAX_LENGTH) -> None:
        from tokenizers import Tokenizer as Library

        self.max_length = max_length
        data = _read(path)
        self.identity = _digest(data)
        try:
            self._library = Library.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer.json: {error}") from error
        self._library.no_padding()
        self._library.enable_truncation(max_length)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [B, max_length]; long texts are cut, the end token stays."""
        rows = [encoding.ids for encoding in self._library.encode_batch(list(texts))]
        return _padded(rows, self.max_length)


def word_tokenizer_json(words: Iterable[str]) -> str:
    """Return a tokenizer.json with one token a word: lower case, split at spaces and punctuation.

    Ids 0 to 2 are padding, end and unknown, as in T5; the words follow in the order given.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocabulary = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    library = Library(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return str(library.to_str(pretty=True))


def write_stand_in(folder: Path) -> None:
    """Write a small `spiece.model` into a folder of synthetic weights: it splits text, and means nothing.

    Ids are T5's where they are fixed: 0 pads, 1 ends, 2 is unknown.
    """
    import io

    from sentencepiece import SentencePieceTrainer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c for a in letters[::2] for b in "aeiou" for c in letters[1::2]]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i : i + 40]) for i in range(0, len(words), 40)]),
        model_writer=model,
        vocab_size=256,
        hard_vocab_limit=False,
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNKNOWN,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / SENTENCEPIECE).write_bytes(model.getvalue())


def load_tokenizer(folder: Path, max_length: int = MAX_LENGTH) -> Tokenizer:
    """Return the tokenizer in a T5 folder: `spiece.model`, else `tokenizer.json`."""
    folder = Path(folder)
    if (folder / SENTENCEPIECE).exists():
        return SentencePieceTokenizer(folder / SENTENCEPIECE, max_length)
    if (folder / JSON).exists():
        return JsonTokenizer(folder / JSON, max_length)
    raise CheckpointError(f"{folder} has neither {SENTENCEPIECE} nor {JSON}; T5's tokenizer belongs there")


def _read(path: Path) -> bytes:
    try:
        return regular.read_bytes(path)
    except OSError as error:
        raise unreadable(Path(path), error) from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _padded(rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(rows), length), PAD, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask
