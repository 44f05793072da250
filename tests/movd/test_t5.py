import json

import pytest
import torch

import blockstream
from blockstream.errors import CheckpointError, ConfigError
from movd.t5 import T5_V1_1_XXL, embed, t5_encoder
from movd.tokenizer import JSON, SENTENCEPIECE, load_tokenizer, word_tokenizer_json
from tests.support import movd_tiny as tiny
from tests.support.t5_folders import t5_folder
from tests.support.while_running import only_while_running

WORDS = ["a", "red", "blue", "circle", "square", "moving", "right", "left", "quickly"]


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / JSON).write_text(word_tokenizer_json(WORDS))
    return folder


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory):
    """A small sentencepiece model with the special tokens of T5."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    text = folder / "text.txt"
    text.write_text("\n".join(f"{a} {c} {s} is moving" for a in "ab" for c in WORDS for s in WORDS) * 5)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


def test_words_become_ids_with_an_end_token_and_padding(word_folder):
    ids, mask = load_tokenizer(word_folder, max_length=8).encode(["A red circle", "blue, zebra"])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [[3, 4, 6, 1, 0, 0, 0, 0], [5, 2, 2, 1, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [4, 4]


@pytest.mark.parametrize("folder", ["word_folder", "piece_folder"])
def test_an_empty_prompt_is_one_end_token_and_a_long_one_is_cut_before_it(folder, request):
    tokenizer = load_tokenizer(request.getfixturevalue(folder), max_length=6)
    ids, mask = tokenizer.encode(["", "red circle moving right " * 50])
    assert ids[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert ids[1, -1] == 1
    assert (ids[1] > 0).all()
    assert mask.sum(1).tolist() == [1, 6]


def test_the_default_length_is_the_originals(word_folder):
    assert load_tokenizer(word_folder).encode(["a"])[0].shape == (1, 300)


def test_sentencepiece_ids_equal_those_of_the_fast_t5_tokenizer(piece_folder):
    """transformers builds T5's tokenizer of these parts; Open-Sora's ids come from it."""
    import sentencepiece
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(piece_folder / SENTENCEPIECE))
    scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    theirs = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    theirs.normalizer = normalizers.NFKC()
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always", split=True)]
    )
    texts = ["a red circle is moving right", "quickly  left \U0001f600 square", "", "blue, square. moving"]
    ids, mask = load_tokenizer(piece_folder, max_length=60).encode(texts)
    for text, row, real in zip(texts, ids, mask, strict=True):
        assert row[real.bool()].tolist() == [*theirs.encode(text).ids, 1]


def test_the_official_tokenizer_comes_first_and_identity_follows_the_file(
    piece_folder, word_folder, tmp_path
):
    both = tmp_path / "both"
    both.mkdir()
    (both / SENTENCEPIECE).write_bytes((piece_folder / SENTENCEPIECE).read_bytes())
    (both / JSON).write_bytes((word_folder / JSON).read_bytes())
    assert load_tokenizer(both).identity == load_tokenizer(piece_folder).identity
    assert load_tokenizer(both).identity != load_tokenizer(word_folder).identity


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "neither spiece.model nor tokenizer.json"),
        (SENTENCEPIECE, b"not a model", "not a sentencepiece model"),
        (JSON, b"{}", "not a tokenizer.json"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_embedding_keeps_every_position_and_says_which_are_real(word_folder):
    tokenizer = load_tokenizer(word_folder, max_length=10)
    y, mask = embed(tiny.t5(), tokenizer, ["a red circle", "blue"])
    assert y.shape == (2, 1, 10, 8)
    assert mask.sum(1).tolist() == [4, 2]
    alone, _ = embed(tiny.t5(), tokenizer, ["blue"])
    torch.testing.assert_close(y[1:], alone)


def test_blocks_read_their_weights_only_while_they_run():
    ids = torch.tensor([[5, 9, 3, 1, 0]])
    given = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    streamed = tiny.t5()
    names = [f"encoder.block.{i}" for i in range(tiny.T5["num_layers"])]
    with only_while_running(streamed, names) as visits:
        got = streamed(**given).last_hidden_state
    assert torch.equal(got, tiny.t5()(**given).last_hidden_state)
    assert visits == names


def test_the_full_size_encoder_has_the_released_keys_and_parameters():
    with torch.device("meta"):
        model = t5_encoder(T5_V1_1_XXL)
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656
    assert len(model.state_dict()) == 220
    block = sum(p.numel() for p in model.encoder.block[1].parameters())
    assert block == 192_946_176


def test_a_released_config_is_accepted_whole():
    config = {
        **T5_V1_1_XXL,
        "architectures": ["T5EncoderModel"],
        "_name_or_path": "google/t5-v1_1-xxl",
        "decoder_start_token_id": 0,
        "is_encoder_decoder": True,
        "num_decoder_layers": 24,
        "output_past": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.21.1",
        "use_cache": True,
    }
    with torch.device("meta"):
        assert t5_encoder(json.loads(json.dumps(config))).config.d_ff == 10240


@pytest.mark.parametrize("form", ["relu", "gated-gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_encoder_has_the_names_and_bits_of_the_librarys(form, dtype):
    from transformers import T5Config, T5EncoderModel

    sizes = {**tiny.T5, "num_layers": 3, "feed_forward_proj": form}
    theirs = T5EncoderModel(T5Config(**sizes, attn_implementation="eager")).eval().to(dtype)
    filled = {name: tiny.noise(*p.shape).to(dtype) for name, p in theirs.state_dict().items()}
    theirs.load_state_dict(filled)
    ours = t5_encoder(sizes).to(dtype)
    assert list(ours.state_dict()) == list(filled)
    ours.load_state_dict(filled)
    ids = torch.arange(2 * 150).reshape(2, 150) % sizes["vocab_size"]
    with torch.no_grad():
        for mask in (None, torch.arange(150)[None] < torch.tensor([[150], [9]])):
            given = {"input_ids": ids, "attention_mask": None if mask is None else mask.long()}
            assert torch.equal(ours(**given).last_hidden_state, theirs(**given).last_hidden_state)


def test_in_float16_it_keeps_in_float32_what_the_library_keeps(tmp_path):
    from transformers import T5EncoderModel

    folder, ids = t5_folder(tmp_path / "t5"), torch.arange(40)[None]
    theirs = T5EncoderModel.from_pretrained(folder, dtype=torch.float16, attn_implementation="eager").eval()
    config = json.loads((folder / "config.json").read_text())
    made = (lambda: t5_encoder(config), folder)
    with torch.no_grad(), blockstream.stream(*made, dtype=torch.float16, arena="1MiB") as ours:
        assert ours.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
        assert torch.equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)


def test_another_model_is_refused():
    with pytest.raises(ConfigError, match="feed_forward_proj 'swish'"):
        t5_encoder({**tiny.T5, "feed_forward_proj": "swish"})
    with pytest.raises(ConfigError, match="'umt5' is not 't5'"):
        t5_encoder({"model_type": "umt5"})
    with pytest.raises(ConfigError, match=r"needs \['vocab_size'"):
        t5_encoder({"model_type": "t5"})
