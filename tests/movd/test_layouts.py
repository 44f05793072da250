"""Checkpoints in their official layouts: loaded strictly, sharded as they are, or refused with the reason."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load, save_file

from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError, ConfigError
from blockstream.run import identity, runner
from movd.weights import Part
from tests.support.movd_models import write_t5, write_word_tokenizer


@pytest.fixture(name="own")
def _own(models, tmp_path):
    """Copies of the checkpoints, to be damaged: {part: folder}."""
    found = {}
    for part in ("t5", "dit", "vae"):
        found[part] = tmp_path / part
        shutil.copytree(models[part]["path"], found[part])
    return found


def run(config, folders, out, **more):
    paths = {part: {"path": str(folder)} for part, folder in folders.items()}
    return runner.run(config(**paths, **{"cache": "off", "steps": 1, **more}), out)


def edit(folder, **changes):
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    """Rewrite a folder's safetensors file with `change` applied to its tensors."""
    path = folder / "model.safetensors"
    tensors = load(path.read_bytes())
    change(tensors)
    save_file(tensors, path)


def test_t5_is_read_from_its_two_torch_files_where_they_are(own):
    checkpoint = Checkpoint.open(own["t5"])
    assert checkpoint.form == "torch"
    assert [f.path.name for f in checkpoint.files] == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    ]
    assert {"shared.weight", "encoder.block.2.layer.1.DenseReluDense.wo.weight"} <= set(checkpoint.names)


def test_every_form_of_one_t5_gives_the_same_video(config, own, tmp_path):
    run(config, own, tmp_path / "torch")
    state = {}
    for shard in sorted(own["t5"].glob("*.bin")):
        state.update(torch.load(shard, weights_only=True))
        shard.unlink()
    (own["t5"] / "pytorch_model.bin.index.json").unlink()
    torch.save(state, own["t5"] / "pytorch_model.bin")
    run(config, own, tmp_path / "one")
    (own["t5"] / "pytorch_model.bin").unlink()
    state.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    save_file({k: v.clone() for k, v in state.items()}, own["t5"] / "model.safetensors")
    run(config, own, tmp_path / "safetensors")
    videos = {(tmp_path / n / "video.mp4").read_bytes() for n in ("torch", "one", "safetensors")}
    assert len(videos) == 1


def test_a_whole_t5_with_its_decoder_serves_as_well(config, own, tmp_path):
    run(config, own, tmp_path / "encoder")
    shard = own["t5"] / "pytorch_model-00002-of-00002.bin"
    index = own["t5"] / "pytorch_model.bin.index.json"
    more = {"decoder.final_layer_norm.weight": torch.ones(16), "lm_head.weight": torch.ones(64, 16)}
    torch.save({**torch.load(shard, weights_only=True), **more}, shard)
    known = json.loads(index.read_text())
    known["weight_map"].update(dict.fromkeys(more, shard.name))
    index.write_text(json.dumps(known))
    run(config, own, tmp_path / "whole")
    videos = {(tmp_path / n / "video.mp4").read_bytes() for n in ("encoder", "whole")}
    assert len(videos) == 1


def test_a_tokenizer_json_serves_where_there_is_no_sentencepiece_model(config, own, tmp_path):
    write_word_tokenizer(own["t5"])
    run(config, own, tmp_path / "out")
    assert (tmp_path / "out" / "video.mp4").exists()


def test_a_packed_denoiser_gives_the_same_video(config, own, tmp_path):
    from blockstream.checkpoint.write import packer as packing

    run(config, own, tmp_path / "plain")
    source = Checkpoint.open(own["dit"])
    packed = tmp_path / "packed"
    segments = {"all": list(source.names)}
    packing.pack(source, packed, segments)
    shutil.copy(own["dit"] / "config.json", packed)
    run(config, {**own, "dit": packed}, tmp_path / "out")
    assert (tmp_path / "out" / "video.mp4").read_bytes() == (tmp_path / "plain" / "video.mp4").read_bytes()


# -- refusals ------------------------------------------------------------------------------------

REFUSALS = []


def refusal(damage):
    """Note a way to point at a wrong checkpoint: it returns the error and what that says."""
    REFUSALS.append(damage)
    return damage


@refusal
def no_folder(own):
    own["dit"] = own["dit"] / "nowhere"
    return ConfigError, r"dit.path .*nowhere: does not exist; name the folder"


@refusal
def a_file(own):
    own["dit"] = own["dit"] / "model.safetensors"
    return ConfigError, r"dit.path .*: is a file; name the folder"


@refusal
def empty_folder(own):
    own["vae"] = own["vae"].parent / "empty"
    own["vae"].mkdir()
    return ConfigError, r"vae.path .*empty: has no config.json but nothing; name the folder"


@refusal
def t5_folder_for_the_denoiser(own):
    own["dit"] = own["t5"]
    return ConfigError, r"dit.path .*t5: .*configuration of 't5'; only STDiT3"


@refusal
def vae_folder_for_the_denoiser(own):
    own["dit"] = own["vae"]
    return ConfigError, r"dit.path .*vae: .*configuration of 'opensoravae_v1_2'"


@refusal
def denoisers_folder_for_t5(own):
    own["t5"] = own["dit"]
    return ConfigError, r"t5.path .*dit: model_type 'STDiT3' is not 't5'"


@refusal
def config_that_is_no_json(own):
    (own["dit"] / "config.json").write_text("{")
    return ConfigError, r"config.json: cannot be read as JSON"


@refusal
def no_weights(own):
    (own["dit"] / "model.safetensors").unlink()
    return CheckpointError, r"dit.path .*dit: holds no safetensors file, no .bin file .*, but config.json"


@refusal
def cut_weights(own):
    os.truncate(own["dit"] / "model.safetensors", 100_000)
    return CheckpointError, r"dit.path .*model.safetensors"


@refusal
def a_shard_is_missing(own):
    (own["t5"] / "pytorch_model-00002-of-00002.bin").unlink()
    return CheckpointError, r"t5.path .*1 of 2 files that are not there \(pytorch_model-00002-of-00002.bin\)"


@refusal
def a_lone_shard(own):
    (own["t5"] / "pytorch_model.bin.index.json").unlink()
    (own["t5"] / "pytorch_model-00002-of-00002.bin").unlink()
    return CheckpointError, r"t5.path .*one shard pytorch_model-00001-of-00002.bin and no index"


@refusal
def stdit2_configuration(own):
    edit(own["dit"], model_type="STDiT2")
    return ConfigError, r"dit.path .*configuration of 'stdit2'; only STDiT3"


@refusal
def stdit2_weights(own):
    def rename(tensors):
        for name in list(tensors):
            if name.startswith("temporal_blocks"):
                del tensors[name]
            elif name.startswith("spatial_blocks"):
                tensors[name.replace("spatial_blocks", "blocks")] = tensors.pop(name)
        tensors["blocks.0.attn_temp.qkv.weight"] = torch.zeros(4)

    edit_weights(own["dit"], rename)
    return CheckpointError, r"does not fit STDiT3: .*looks like an Open-Sora 1.0/1.1 .*use OpenSora-STDiT-v3"


@refusal
def another_depth(own):
    edit(own["dit"], depth=2)
    return CheckpointError, r"does not fit STDiT3: .*unexpected.*an STDiT3 of depth 3 and hidden_size 32"


@refusal
def another_width(own):
    edit(own["dit"], hidden_size=64)
    return CheckpointError, r"does not fit STDiT3: .*is \(.*32.*\), not \(.*64"


@refusal
def a_tensor_is_missing(own):
    edit_weights(own["vae"], lambda tensors: tensors.pop("temporal_vae.encoder.conv_in.conv.weight"))
    return CheckpointError, r"vae.path .*1 missing \(temporal_vae.encoder.conv_in.conv.weight\)"


@refusal
def a_plain_autoencoder(own):
    def strip(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.startswith("spatial_vae.module."):
                tensors[name.removeprefix("spatial_vae.module.")] = tensor

    edit_weights(own["vae"], strip)
    return CheckpointError, r"does not fit OpenSoraVAE: .*plain 2-D AutoencoderKL"


@refusal
def widths_that_differ(own):
    shutil.rmtree(own["t5"])
    write_t5(own["t5"], d_model=24)
    return ConfigError, r"t5 \(.*\) gives 24 channels a token and dit \(.*\) takes 16: .*do not belong"


@refusal
def no_tokenizer(own):
    (own["t5"] / "spiece.model").unlink()
    return CheckpointError, r"t5.path .*has neither spiece.model nor tokenizer.json"


@refusal
def a_tokenizer_that_is_none(own):
    (own["t5"] / "spiece.model").write_bytes(b"not a model")
    return CheckpointError, r"t5.path .*spiece.model is not a sentencepiece model"


@refusal
def t5_without_a_config_is_the_official_size(own):
    (own["t5"] / "config.json").unlink()
    return ConfigError, r"gives 4096 channels a token"


@pytest.mark.parametrize("damage", REFUSALS, ids=lambda damage: damage.__name__)
def test_what_is_no_such_checkpoint_is_refused_by_name(config, own, tmp_path, damage):
    kind, said = damage(own)
    with pytest.raises(kind, match=said) as error:
        run(config, own, tmp_path / "out")
    assert all(str(error.value).count(f"{folder}:") <= 1 for folder in own.values())
    assert not (tmp_path / "out").exists()


# -- identity ------------------------------------------------------------------------------------


def test_weights_are_the_same_wherever_they_lie_and_others_once_a_byte_changes(own, tmp_path):
    shutil.copytree(own["dit"], tmp_path / "moved")
    os.utime(tmp_path / "moved" / "model.safetensors", (1, 1))
    parts = [Part("dit", folder, {}) for folder in (own["dit"], tmp_path / "moved")]
    assert parts[0].identity == parts[1].identity
    data = bytearray((own["dit"] / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (own["dit"] / "model.safetensors").write_bytes(data)
    assert Part("dit", own["dit"], {}).identity != parts[1].identity
    assert Part("dit", tmp_path / "moved", {"depth": 2}).identity != parts[1].identity


def test_large_weights_are_told_apart_without_being_read(own, monkeypatch):
    monkeypatch.setattr(identity, "HASHED_NBYTES", 1)
    path = own["dit"] / "model.safetensors"
    before = Part("dit", own["dit"], {}).identity
    monkeypatch.setattr(identity, "contents", lambda file: pytest.fail(f"{file.path} was read"))
    assert Part("dit", own["dit"], {}).identity == before
    os.utime(path, (1, 1))
    assert Part("dit", own["dit"], {}).identity != before
    assert path.stat().st_size < 64 << 20


@pytest.mark.slow
@pytest.mark.parametrize("part", ["dit", "vae"])
def test_the_release_s_own_configuration_is_read_and_its_keys_are_the_module_s(tmp_path, part):
    """The config.json of the releases, with the keys of full-size weights that are headers alone."""
    released = {
        "dit": {
            "model_type": "STDiT3",
            "architectures": ["STDiT3"],
            "auto_map": {"AutoModel": "hpcai-tech/OpenSora-STDiT-v3--modeling_stdit3.STDiT3"},
            "caption_channels": 4096,
            "class_dropout_prob": 0.1,
            "depth": 28,
            "drop_path": 0.0,
            "enable_flash_attn": True,
            "enable_layernorm_kernel": True,
            "enable_sequence_parallelism": False,
            "freeze_y_embedder": True,
            "hidden_size": 1152,
            "in_channels": 4,
            "input_size": [None, None, None],
            "input_sq_size": 512,
            "mlp_ratio": 4.0,
            "model_max_length": 300,
            "num_heads": 16,
            "only_train_temporal": False,
            "patch_size": [1, 2, 2],
            "pred_sigma": True,
            "qk_norm": True,
            "skip_y_embedder": False,
            "torch_dtype": "float32",
            "transformers_version": "4.38.2",
        },
        "vae": {
            "model_type": "OpenSoraVAE_V1_2",
            "architectures": ["OpenSoraVAE_V1_2"],
            "micro_batch_size": 4,
            "micro_frame_size": 17,
            "scale": [3.85, 2.32, 2.33, 3.06],
            "shift": [-0.1, 0.34, 0.27, 0.98],
            "freeze_vae_2d": False,
            "cal_loss": False,
        },
    }
    from blockstream.plugins import Plugins

    module = Plugins().family("stdit3-xl-2" if part == "dit" else "opensora-vae").module()
    (tmp_path / "config.json").write_text(json.dumps(released[part]))
    sparse(tmp_path / "model.safetensors", module)
    found = Part(part, tmp_path, released[part])
    found.check(module)
    if part == "dit":
        assert 4e9 < found.checkpoint.nbytes < 5e9


def sparse(path, module):
    """Write a safetensors file of a module's keys whose data are a hole."""
    header, at = {}, 0
    for name, tensor in module.state_dict().items():
        end = at + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
