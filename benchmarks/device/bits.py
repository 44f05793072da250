"""Models of libraries, resident on the device and streamed over both tiers: equal bits, by kind of memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import blockstream
from benchmarks.device.models import Dit, Shape, inputs
from benchmarks.device.parts import Context
from blockstream.plan.planner import least_arena

Run = Callable[[nn.Module], Any]


def zoo(at: Context) -> dict[str, tuple[Callable[[], nn.Module], Run, torch.dtype]]:
    """Return (factory, run, dtype) of each model; what a library lacks is left out."""
    where = at.where
    ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(1)).to(where)
    found: dict[str, tuple[Callable[[], nn.Module], Run, torch.dtype]] = {}
    shape = Shape(3, 5, 768 if not at.fake else 64, 6 if not at.fake else 4, 32)
    given = inputs(shape, 96, where)
    found["dit bf16"] = (lambda: Dit(shape), lambda m: m(*given), torch.bfloat16)
    try:
        from transformers import (
            BertConfig,
            BertModel,
            CLIPTextConfig,
            CLIPTextModel,
            GPT2Config,
            GPT2LMHeadModel,
            LlamaConfig,
            LlamaForCausalLM,
            T5Config,
            T5EncoderModel,
        )
    except ImportError:
        return found
    n = 256 if not at.fake else 32
    llama = LlamaConfig(
        vocab_size=512, hidden_size=n, intermediate_size=2 * n, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(vocab_size=512, d_model=n, d_ff=2 * n, num_layers=6, num_heads=4, d_kv=n // 4)
    gpt2 = GPT2Config(vocab_size=512, n_embd=n, n_layer=6, n_head=4, n_positions=64)
    sizes = {"vocab_size": 512, "hidden_size": n, "intermediate_size": 2 * n, "num_attention_heads": 4}
    bert = BertConfig(num_hidden_layers=6, **sizes)
    clip = CLIPTextConfig(num_hidden_layers=6, **sizes)

    def hidden(m: nn.Module) -> Any:
        return m(input_ids=ids).last_hidden_state

    def generated(m: Any) -> Any:
        return m.generate(ids, max_new_tokens=8, do_sample=False)

    found |= {
        "t5 encoder bf16": (lambda: T5EncoderModel(t5), hidden, torch.bfloat16),
        "t5 encoder fp32": (lambda: T5EncoderModel(t5), hidden, torch.float32),
        "bert fp32": (lambda: BertModel(bert), hidden, torch.float32),
        "clip text fp16": (lambda: CLIPTextModel(clip), hidden, torch.float16),
        "llama bf16": (lambda: LlamaForCausalLM(llama), lambda m: m(input_ids=ids).logits, torch.bfloat16),
        "llama generate bf16": (lambda: LlamaForCausalLM(llama), generated, torch.bfloat16),
        "gpt2 generate fp32": (lambda: GPT2LMHeadModel(gpt2), generated, torch.float32),
    }
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        return found
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)).to(where)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    found["vae decode fp32"] = (
        lambda: AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **blocks),
        lambda m: m.decode(latents).sample,
        torch.float32,
    )
    return found


def bits(at: Context) -> dict[str, Any]:
    """Compare each model's results, resident and streamed; a model that fails is named with its error."""
    found: dict[str, Any] = {}
    for name, (factory, run, dtype) in zoo(at).items():
        if at.left_s < 10:
            found[name] = "no time left"
            continue
        try:
            found[name] = _compare(at, factory, run, dtype)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:400]
    return found


def _compare(at: Context, factory: Callable[[], nn.Module], run: Run, dtype: torch.dtype) -> dict[str, bool]:
    with tempfile.TemporaryDirectory(dir=at.folder) as folder, torch.no_grad():
        torch.manual_seed(0)
        module = factory().to(dtype).eval().requires_grad_(False)
        save(module, Path(folder) / "model.safetensors")
        module.to(at.where)
        wanted = run(module)
        again = torch.equal(wanted, run(module))
        same = {"resident twice": again}
        least = _least(at, factory, folder)
        held = sum(p.nbytes for p in module.parameters())
        ways = {
            "disk": {"arena": least[1], "device_arena": least[0]},
            "pinned": {"arena": 1 << 30, "device_arena": least[0]},
            "half": {"arena": 1 << 30, "device_arena": least[0] + held // 2},
            "device": {"arena": 1 << 30, "device_arena": 1 << 30},
        }
        for way, rooms in ways.items():
            with blockstream.Session(device=at.device, **rooms) as session:  # type: ignore[arg-type]
                streamed = session.stage("m", lambda: factory().to(dtype).eval(), folder, passes=None)
                same[way] = all(torch.equal(run(streamed), wanted) for _ in range(3))
        return same


def _least(at: Context, factory: Callable[[], nn.Module], folder: str) -> tuple[int, int]:
    """Return the least arenas (device, host) of a model."""
    with blockstream.Session(device=at.device, arena="1GiB", device_arena="1GiB") as session:
        session.stage("m", factory, folder, passes=None)
        schedule = session.draft().schedule
    device = least_arena(schedule)
    host = 2 * max(s.nbytes for stage in schedule.stages for s in stage.segments) + (4 << 20)
    return device, host


def save(module: nn.Module, path: Path) -> None:
    """Write a module's tensors, those that are tied once."""
    seen: set[int] = set()
    kept = {}
    for name, value in module.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            kept[name] = value.contiguous()
    save_file(kept, path)
