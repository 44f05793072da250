"""The three models through the engine, in an arena smaller than their weights: the same bits."""

import pytest
import torch
from safetensors.torch import save_file

import blockstream
from movd.stdit3 import STDiT3, STDiT3Config
from movd.t5 import t5_encoder
from movd.vae import OpenSoraVAE, OpenSoraVAEConfig
from tests.support import movd_tiny as tiny

IDS = torch.tensor([[5, 9, 3, 1]])
DIT = {**tiny.STDIT3, "hidden_size": 64, "depth": 6}
VAE = {**tiny.VAE, "temporal": {"filters": 8, "num_res_blocks": 2, "num_groups": 2}}
T5 = {**tiny.T5, "d_model": 64, "d_ff": 128, "num_layers": 6}


def build_dit():
    return STDiT3(STDiT3Config(**DIT))


def build_t5():
    return t5_encoder(T5)


def build_vae():
    vae = OpenSoraVAE(OpenSoraVAEConfig(**VAE))
    vae.plan_decode(17, 16, 24)
    return vae


MODELS = {
    "stdit3": (build_dit, lambda m: m(**tiny.dit_inputs())),
    "t5": (build_t5, lambda m: m(input_ids=IDS).last_hidden_state),
    "vae.decode": (build_vae, lambda m: m.decode(tiny.noise(1, 4, 10, 2, 3), 34)),
    "vae.encode": (build_vae, lambda m: m.encode(tiny.noise(1, 3, 5, 16, 16), sample=False)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_model_computes_the_same_bits_in_its_declared_order(name, tmp_path, caplog):
    build, call = MODELS[name]
    resident = tiny.filled(build())
    weights = {k: v for k, v in resident.state_dict().items() if k != "encoder.embed_tokens.weight"}
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    want = call(resident)
    with torch.device("meta"):
        model = build().eval().requires_grad_(False)
    arena = int(0.8 * sum(tensor.nbytes for tensor in weights.values()))
    with torch.no_grad(), blockstream.stream(model, path, arena=arena, policy="none") as streamed:
        assert torch.equal(call(streamed), want)
        assert torch.equal(call(streamed), want)
    if name in ("stdit3", "vae.decode"):  # encoding is not what the VAE declares; T5's order is a first guess
        assert "left its order" not in caplog.text
