"""T5, STDiT3 and the VAE of the official layouts at tiny size, with weights that are a formula."""

import io
import json

import torch
from safetensors.torch import save_file

from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import t5_encoder
from movd.tokenizer import word_tokenizer_json
from movd.vae import OpenSoraVAE, OpenSoraVAEConfig
from tests.support.movd_tiny import filled

TEXT = "a red blue green star circle square moving left right up down slowly quickly on black"
TOKENS = 40

T5 = {
    "model_type": "t5",
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 3,
    "num_heads": 3,
}
DIT = {
    "model_type": "STDiT3",
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "caption_channels": 16,
    "model_max_length": TOKENS,
}
#: As the release has it: the 2-D VAE and the temporal one apart, micro sizes beside them.
VAE = {
    "model_type": "OpenSoraVAE_V1_2",
    "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4},
    "vae_temporal": {"type": "VAE_Temporal_SD"},
    "micro_frame_size": 17,
    "micro_batch_size": 4,
    "shift": [-0.10, 0.34, 0.27, 0.98],
    "scale": [3.85, 2.32, 2.33, 3.06],
    "spatial": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [4, 4, 8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
    },
    "temporal": {"filters": 4, "num_res_blocks": 1, "num_groups": 2},
}


def write_models(folder, tokens=TOKENS):
    """Write the folders t5, dit and vae; return the keys of a config that name them."""
    write_t5(folder / "t5")
    write_dit(folder / "dit", model_max_length=tokens)
    write_vae(folder / "vae")
    return {part: {"path": str(folder / part)} for part in ("t5", "dit", "vae")}


def write_t5(folder, **more):
    """Write a T5 as DeepFloyd's: two torch files with an index, and a sentencepiece model."""
    config = {**T5, **more}
    _write_config(folder, config)
    state = filled(t5_encoder(config)).state_dict()
    names = sorted(state, key=lambda name: (".block.2" in name or "final" in name, name))
    half = next(i for i, name in enumerate(names) if ".block.2" in name)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:half],
        "pytorch_model-00002-of-00002.bin": names[half:],
    }
    for shard, held in shards.items():
        torch.save({name: state[name] for name in held}, folder / shard)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in state.values())},
        "weight_map": {name: shard for shard, held in shards.items() for name in held},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "spiece.model").write_bytes(sentencepiece())


def write_dit(folder, **more):
    """Write an STDiT3 as hpcai-tech/OpenSora-STDiT-v3: config.json and one safetensors file."""
    config = {**DIT, **more}
    _write_config(folder, config)
    state = filled(STDiT3(STDiT3Config(**config))).state_dict()
    save_file(_plain(state), folder / "model.safetensors", {"format": "pt"})


def write_vae(folder, **more):
    """Write a VAE as hpcai-tech/OpenSora-VAE-v1.2: config.json and one safetensors file."""
    config = {**VAE, **more}
    _write_config(folder, config)
    state = filled(OpenSoraVAE(OpenSoraVAEConfig(**config))).state_dict()
    save_file(_plain(state), folder / "model.safetensors", {"format": "pt"})


def write_word_tokenizer(folder):
    """Replace the sentencepiece model of a T5 folder by a tokenizer.json with one token a word."""
    (folder / "spiece.model").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(word_tokenizer_json(TEXT.split()))


def sentencepiece():
    """Return a sentencepiece model of 64 pieces at most, with T5's special tokens."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "aesthetic score: 6.5."] * 20),
        model_writer=model,
        vocab_size=T5["vocab_size"],
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _write_config(folder, config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def _plain(state):
    return {name: tensor.contiguous() for name, tensor in state.items()}
