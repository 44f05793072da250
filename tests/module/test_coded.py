"""Weights with companions: what the libraries that write them widen, streamed; faults by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blockstream
from blockstream.checkpoint import Checkpoint
from blockstream.errors import CheckpointError
from blockstream.verify.sessions import ResidentSession
from tests.support.models import aligned

F8 = torch.float8_e4m3fn


class Net(nn.Module):
    """Blocks of linear layers with biases."""

    def __init__(self, width=256, n=3):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(n))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def write(folder, code, method=None, **settings):
    """Write a net coded by `code(name, weight) -> (tensors, numbers)`; return it with its numbers."""
    torch.manual_seed(0)
    net = Net().eval()
    tensors = {n: p.detach() for n, p in net.named_parameters() if n.endswith("bias")}
    for name, param in list(net.named_parameters()):
        if name.endswith("weight"):
            found, numbers = code(name, param.detach())
            tensors.update(found)
            net.get_parameter(name).data = numbers.to(torch.float32)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if method:
        config = {"quantization_config": {"quant_method": method, **settings}}
        (folder / "config.json").write_text(json.dumps(config))
    return net


def by_tensor(name, weight):
    from compressed_tensors.quantization.lifecycle import forward_helpers  # noqa: F401

    scale = (weight.abs().max() / 448).reshape(1).bfloat16()
    q = (weight / scale).to(F8)
    return {name: q, name + "_scale": scale, name[:-6] + "input_scale": torch.ones(1)}, dequantised(q, scale)


def dequantised(q, scale):
    """Return what compressed-tensors makes of a weight."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    strategy = "tensor" if scale.numel() == 1 else "channel"
    kind = {"type": "float"} if q.dtype == F8 else {"type": "int"}
    return dequantize(q, scale, args=QuantizationArgs(num_bits=8, strategy=strategy, **kind))


def by_row(name, weight):
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    q = (weight / scale).to(F8)
    return {name: q, name + "_scale": scale}, q.to(torch.bfloat16) * scale


def int8_by_row(name, weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round().to(torch.int8)
    return {name: q, name + "_scale": scale}, q.float() * scale


def by_group(name, weight):
    scale = weight.view(256, 4, 64).abs().amax(2) / 448
    q = (weight.view(256, 4, 64) / scale[..., None]).to(F8)
    return {name: q.view(256, 256), name + "_scale": scale}, (q.float() * scale[..., None]).view(256, 256)


def by_block(name, weight):
    scale = weight.view(2, 128, 2, 128).abs().amax((1, 3)) / 448
    q = (weight.view(2, 128, 2, 128) / scale[:, None, :, None]).to(F8).view(256, 256)
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    numbers = Fp8Dequantize(None).convert({"weight": [q], "weight_scale_inv": [scale]})["weight"]
    return {name: q, name + "_scale_inv": scale}, numbers


def comfy(name, weight):
    scale = weight.abs().max() / 448
    q = (weight / scale).to(F8)
    stem = name.removesuffix("weight")
    tensors = {name: q, stem + "scale_weight": scale, stem + "scale_input": torch.ones(())}
    return {**tensors, "scaled_fp8": torch.zeros(2, dtype=F8)}, q.float() * scale


def bnb_int8(name, weight):
    largest = weight.abs().amax(1)
    q = (weight / largest[:, None] * 127).round().to(torch.int8)
    stem = name.removesuffix("weight")
    tensors = {name: q, stem + "SCB": largest, stem + "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, q * largest.view(-1, 1) * 7.874015718698502e-3


def four_bit(kind, nested):
    def code(name, weight):
        functional = pytest.importorskip("bitsandbytes").functional
        q, state = functional.quantize_4bit(weight.bfloat16(), quant_type=kind, compress_statistics=nested)
        packed = {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        return {name: q, **packed}, functional.dequantize_4bit(q, state)

    return code


CODES = {
    "fp8 a tensor": (by_row, "compressed-tensors"),
    "int8 a row": (int8_by_row, "compressed-tensors"),
    "fp8 a group": (by_group, "compressed-tensors"),
    "fp8 blocks": (by_block, "fp8"),
    "comfy": (comfy, None),
    "bnb int8": (bnb_int8, "bitsandbytes"),
    "nf4": (four_bit("nf4", False), "bitsandbytes"),
    "nf4 nested": (four_bit("nf4", True), "bitsandbytes"),
    "fp4": (four_bit("fp4", False), "bitsandbytes"),
}


@pytest.mark.parametrize("name", CODES)
def test_a_net_computes_with_the_numbers_of_the_library(name, tmp_path):
    code, method = CODES[name]
    net = write(tmp_path, code, method)
    x = torch.randn(5, 256)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            y = x.to(dtype)
            want = aligned(net.to(dtype))(y)
            with blockstream.stream(Net, tmp_path, arena="600KiB", dtype=dtype) as m:
                assert torch.equal(m(y), want)
                assert m.blocks[0].weight.dtype is dtype
        with ResidentSession(segments={"m": {}}) as s:
            m = s.stage("m", Net, tmp_path, dtype="bf16")
            s.start()
            assert torch.equal(m(y), want)


@pytest.mark.parametrize("code", [by_tensor])
def test_compressed_tensors_own_function_is_the_reference(code, tmp_path):
    pytest.importorskip("compressed_tensors")
    net = write(tmp_path, code, "compressed-tensors")
    x = torch.randn(5, 256)
    with torch.no_grad(), blockstream.stream(Net, tmp_path, arena="600KiB") as m:
        assert torch.equal(m(x), aligned(net)(x))


def test_segments_are_as_large_as_the_file(tmp_path):
    write(tmp_path, by_block, "fp8")
    with blockstream.Session(arena="1MiB") as s:
        s.stage("m", Net, tmp_path)
        layouts = s.prepared["m"].layouts.values()
        assert {x.bound_nbytes for x in layouts} == {256 * 256 + 2 * 2 * 4 + 256 * 4}


class Experts(nn.Module):
    """Experts of one tensor, asked for one at a time, as gpt-oss has them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(4, 64, 32))
        self.down = nn.Linear(32, 64)

    def forward(self, x):
        return self.down(sum(x @ self.up_proj[i] for i in (1, 3)) + (x @ self.up_proj[0:2])[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_experts_are_those_of_transformers(dtype, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    net, tensors = Experts().to(dtype).eval(), {}
    for i, layer in enumerate(net.layers):
        blocks = torch.randint(0, 256, (4, 32, 2, 16), dtype=torch.uint8)
        scales = torch.randint(118, 125, (4, 32, 2), dtype=torch.uint8)
        layer.up_proj.data = convert_moe_packed_tensors(blocks, scales).to(dtype)
        tensors |= {f"layers.{i}.up_proj_blocks": blocks, f"layers.{i}.up_proj_scales": scales}
        tensors |= {f"layers.{i}.down.{n}": p.detach() for n, p in layer.down.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    x = torch.randn(3, 64, dtype=dtype)
    with torch.no_grad(), blockstream.stream(Experts, tmp_path, arena="64KiB", dtype=dtype) as m:
        assert torch.equal(m(x), net(x))


def test_experts_that_a_library_stacks_are_widened_each_by_itself(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    plain, coded = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "experts." in name:
            scale = (weight.abs().max() / 448).reshape(1, 1)
            q = (weight / scale).to(F8)
            coded |= {name: q, name + "_scale_inv": scale}
            plain[name] = Fp8Dequantize(None).convert({"weight": [q], "weight_scale_inv": [scale]})["weight"]
    (tmp_path / "coded").mkdir()
    save_file(plain, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    save_file(coded, tmp_path / "coded" / "model.safetensors", {"format": "pt"})
    said = {**config.to_dict(), "architectures": ["MixtralForCausalLM"], "dtype": "float32"}
    said["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "coded" / "config.json").write_text(json.dumps(said))
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        want = MixtralForCausalLM.from_pretrained(tmp_path / "whole").eval()(ids).logits
        with blockstream.from_pretrained(tmp_path / "coded", arena="1MiB") as m:
            assert torch.equal(m(ids).logits, want)


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "torchao", "hqq", None])
def test_what_no_row_reads_is_refused_by_its_method(method, tmp_path):
    def code(name, weight):
        stem = name.removesuffix("weight")
        return {stem + "qweight": torch.zeros(32, 256, dtype=torch.int32)}, weight

    write(tmp_path, code, method)
    said = f"quant_method '{method}'" if method else "has no tensor for 3 of 6 parameters"
    with pytest.raises(CheckpointError, match=said), blockstream.stream(Net, tmp_path, arena="1MiB"):
        pass


def test_a_config_that_says_more_than_the_files_hold_is_refused(tmp_path):
    write(tmp_path, lambda name, weight: ({name: weight}, weight), "fp8")
    with (
        pytest.raises(CheckpointError, match="quant_method 'fp8'"),
        blockstream.stream(Net, tmp_path, arena="1MiB"),
    ):
        pass


@pytest.mark.parametrize(
    ("code", "change", "said"),
    [
        (
            by_row,
            lambda t, n: t.update({n + "_scale": torch.ones(3, 1)}),
            "needs one, one a row",
        ),
        (by_block, lambda t, n: t.update({n + "_scale_inv": torch.ones(2, 3)}), r"needs \[2, 2\]"),
        (bnb_int8, lambda t, n: t.update({n[:-6] + "SCB": torch.ones(3)}), r"needs \[256\], one a row"),
        (
            bnb_int8,
            lambda t, n: t.update({n + "_format": torch.tensor(1, dtype=torch.uint8)}),
            "order of one device's own",
        ),
        (four_bit("nf4", False), lambda t, n: t.pop(n + ".absmax"), "does not say how"),
        (
            four_bit("nf4", False),
            lambda t, n: t.update({n + ".absmax": torch.ones(7)}),
            "in blocks of 64; fetch the file again",
        ),
        (
            by_row,
            lambda t, n: t.update({n + "_zero_point": torch.ones(256, 1, dtype=torch.int8)}),
            "zero points that are not zero",
        ),
    ],
)
def test_companions_that_do_not_fit_are_named(code, change, said, tmp_path):
    write(tmp_path, code)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, "blocks.1.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said), blockstream.stream(Net, tmp_path, arena="1MiB"):
        pass


def rewrite(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_tensor_of_four_bits_that_nothing_needs_refuses_no_file(tmp_path):
    net = Net(8)
    save_file(dict(net.state_dict()), tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    end = len(raw) - 8 - n
    header["extra.other"] = {"dtype": "F4", "shape": [3, 2], "data_offsets": [end, end + 3]}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + raw[8 + n :] + bytes(3)
    )
    x = torch.randn(2, 8)
    with torch.no_grad(), blockstream.stream(lambda: Net(8), tmp_path, arena="1MiB") as m:
        assert torch.equal(m(x), net(x))
    header["blocks.1.weight"] |= {"dtype": "F4", "shape": [8, 64]}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + raw[8 + n :] + bytes(3)
    )
    with (
        pytest.raises(CheckpointError, match=r"'blocks\.1\.weight' is in the format F4, which is not read"),
        blockstream.stream(lambda: Net(8), tmp_path, arena="1MiB"),
    ):
        pass


@pytest.mark.parametrize("kind", ["fp8-blocks", "bitsandbytes-int8"])
def test_a_pack_keeps_coded_bytes_and_streams_with_the_same_numbers(kind, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from blockstream.cli.main import main

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    tensors = {}
    for name, value in LlamaForCausalLM(config).state_dict().items():
        if "proj" not in name:
            tensors[name] = value.clone()
        elif kind == "fp8-blocks":
            tensors |= {name: value.to(F8), name + "_scale_inv": torch.rand(1, 1) + 0.5}
        else:
            tensors |= {name: (value * 500).to(torch.int8), name[:-6] + "SCB": torch.rand(len(value)) + 0.5}
    folder = tmp_path / "coded"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    said = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    method = {"quant_method": "fp8" if kind == "fp8-blocks" else "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": method}))
    assert main(["pack", str(folder), str(tmp_path / "packed")]) == 0
    made = []
    for path in (folder, tmp_path / "packed"):
        with blockstream.from_pretrained(path, arena="1MiB", dtype="fp32") as model, torch.no_grad():
            assert blockstream.session(model).prepared["model"].matched.sources  # read as what it is
            made.append(model(torch.arange(5)[None]).logits)
    assert torch.equal(*made)
    held = Checkpoint.open(tmp_path / "packed")
    assert {n: e.nbytes for n, e in held.entries.items()} == {n: t.nbytes for n, t in tensors.items()}
    assert main(["pack", str(folder), str(tmp_path / "half"), "--dtype", "bf16"]) != 0
