"""Whole networks by family on one device: bits, seconds, what is held, beside plain module and accelerate.

Weights are random, written from the device; sizes are the released ones, with `fake` tiny ones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_map_only

import blockstream
import movd
from benchmarks.device.parts import Context, blockstream_errors
from blockstream.module.architectures import find
from blockstream.module.empty import empty
from movd.t5 import t5_encoder

TINY = Path(movd.__file__).parent / "assets" / "tiny"
#: What each network gets: an 8 GB card and 12 GiB of host memory.
BUDGETS = {"device_budget": "8GB", "budget": "12GiB"}
#: Bytes of a file of weights.
SHARD = 1 << 30
#: The command, for an interpreter that has it nowhere on its path.
BLOCKSTREAM = "import sys; from blockstream.cli.main import main; sys.exit(main())"
#: Passes of the soak.
SOAK = 200

Make = Callable[[], Any]
Run = Callable[[Any], Any]


def family(at: Context, name: str) -> Make:
    """Return what builds a released network, or the tiny one of the same family."""
    if at.fake and name == "t5-v1_1-xxl":
        config = json.loads((TINY / "t5" / "config.json").read_text())
        return lambda: t5_encoder(config)
    module = find(str(TINY / ("dit" if name == "stdit3-xl-2" else "vae")) if at.fake else name).module()
    return lambda: type(module)(module.config)


def write(make: Make, folder: Path, where: torch.device, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write random weights of a network as one sharded checkpoint; return their bytes."""
    folder.mkdir(parents=True)
    with empty():
        module = make()
    random, index, shard, nbytes = torch.Generator(where).manual_seed(0), dict[str, str](), {}, 0
    sizes = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    for k, (name, shape) in enumerate(sizes):
        value = torch.randn(shape, generator=random, device=where, dtype=torch.float32) * 0.02
        shard[name] = (value + 1 if len(shape) == 1 and "weight" in name else value).to(dtype).cpu()
        held = sum(t.nbytes for t in shard.values())
        if held >= SHARD or k == len(sizes) - 1:
            file = f"model-{len(set(index.values())):03}.safetensors"
            save_file(shard, folder / file)
            index |= dict.fromkeys(shard, file)
            shard, nbytes = {}, nbytes + held
    text = json.dumps({"metadata": {"total_size": nbytes}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return nbytes


def resident(make: Make, folder: Path, where: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return the plain module with its weights on a device."""
    from safetensors import safe_open

    with empty():
        module = make()
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt", device=str(where)) as opened:
            # In memory of its own: at other alignments kernels of the processor may round differently.
            state |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    module.load_state_dict(state, assign=True, strict=False)
    plain: nn.Module = module.to(where).eval().requires_grad_(False)
    if hasattr(plain, "tie_weights"):
        plain.tie_weights()
    return plain


def row(at: Context, name: str, make: Make, run: Run, inputs: Any, passes: int) -> dict[str, Any]:
    """Return a network's seconds and bits, streamed within the budgets, resident, and by accelerate.

    What time is too short for is named in `left_out`.
    """
    folder, found = at.folder / name, dict[str, Any]()
    try:
        found["nbytes"] = write(make, folder, at.where)
        given = tree_map_only(torch.Tensor, lambda t: t.to(at.where), inputs)
        with torch.no_grad():
            plain: Any = resident(make, folder, at.where)
            wanted = run(plain)(*given)
            found["resident"] = at.rounds(lambda: run(plain)(*given), rounds=3, warm=0)
            plain = None
            _clear(at)
            with blockstream.Session(device=at.device, **BUDGETS) as session:  # type: ignore[arg-type]
                module = session.stage(name, make, folder, passes)
                found["first_s"] = at.timed(lambda: found.update(same=_same(run(module)(*given), wanted)))
                found["streamed"] = at.rounds(lambda: run(module)(*given), rounds=3, warm=0)
                report = session.report()
                found["held"] = report["budget"]["held"] and report["device"]["budget"]["held"]
                found["peaks"] = {
                    "device_nbytes": report["device"]["budget"]["peak_nbytes"],
                    "host_nbytes": report["budget"]["peak_nbytes"],
                }
            _clear(at)
            if at.fake or at.left_s < 4 * found["resident"]["s"] + 15:
                found["left_out"] = ["accelerate"]
                return found
            from accelerate import cpu_offload

            other = resident(make, folder, torch.device("cpu"))
            cpu_offload(other, at.where)
            found["accelerate"] = at.rounds(lambda: run(other)(*given), rounds=1, warm=1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def t5(at: Context) -> dict[str, Any]:
    """Encode 300 tokens by T5-XXL in bfloat16."""
    tokens = 300 if not at.fake else 12
    ids = torch.randint(1, 30 if at.fake else 32_000, (1, tokens), generator=_seeded())
    run = lambda m: lambda ids, mask: m(input_ids=ids, attention_mask=mask).last_hidden_state  # noqa: E731
    return row(at, "t5", family(at, "t5-v1_1-xxl"), run, (ids, torch.ones_like(ids)), 4)


def stdit(at: Context) -> dict[str, Any]:
    """One step of STDiT3-XL with guidance at 68 frames of 256 x 256."""
    make = family(at, "stdit3-xl-2")
    with empty():
        config = make().config
    latent = (4, 20, 32, 32) if not at.fake else (4, 2, 4, 4)
    length = config.model_max_length
    random = _seeded()
    inputs = (
        torch.randn(2, *latent, generator=random).bfloat16(),
        torch.full((2,), 500.0),
        torch.randn(2, 1, length, config.caption_channels, generator=random).bfloat16(),
        torch.tensor([24.0]),
    )
    pixels = [8.0 * latent[-1]]
    run = lambda m: lambda x, t, y, fps: m(x, t, y, fps=fps, height=pixels, width=pixels)  # noqa: E731
    return row(at, "stdit", make, run, inputs, 30)


def vae(at: Context) -> dict[str, Any]:
    """Decode 17 frames of 256 x 256 by Open-Sora's VAE."""
    size = 32 if not at.fake else 4
    z = torch.randn(1, 4, 5, size, size, generator=_seeded()).bfloat16()
    return row(at, "vae", family(at, "opensora-vae"), lambda m: lambda z: m(z, 17), (z,), 4)


def llama(at: Context) -> dict[str, Any]:
    """Generate 32 tokens by a model shaped as Llama's of 8 billion weights, at batch 1 and 4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if at.fake:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, pad_token_id=0)
    new = 32 if not at.fake else 4
    run = lambda m: lambda ids: m.generate(ids, max_new_tokens=new, do_sample=False)  # noqa: E731
    found: dict[str, Any] = {}
    for batch in (1, 4):
        if found and at.left_s < 2 * found["1"]["took_s"]:
            found["left_out"] = [f"batch {batch}"]
            break
        begin_s = at.left_s
        ids = torch.randint(1, 60, (batch, 16), generator=_seeded())
        found[str(batch)] = row(at, f"llama-{batch}", lambda: LlamaForCausalLM(config), run, (ids,), None)  # type: ignore[arg-type]
        found[str(batch)]["took_s"] = begin_s - at.left_s
    return found


def opensora(at: Context) -> dict[str, Any]:
    """Open-Sora from prompt to video within 8 GB and 8 GiB, then within 3.3 of each: seconds, held."""
    names = {"t5": "t5-v1_1-xxl", "dit": "stdit3-xl-2", "vae": "opensora-vae"}
    sets = ["prompt=a red star", "prompts=null", "cache=off", f"device={'cpu' if at.fake else 'cuda'}"]
    if at.fake:
        sets += ["height=32", "width=32", "frames=1", "steps=1"]
    else:
        sets += ["height=256", "width=256", "frames=68", "steps=30"]
        for part, name in names.items():
            folder, known = at.folder / part, find(name)
            write(family(at, name), folder, at.where)
            assert known.config is not None
            (folder / "config.json").write_text(json.dumps(dict(known.config)))
            if known.write_extras is not None:
                known.write_extras(folder)
            sets.append(f"{part}={{path: {folder}, dtype: bf16}}")
    found: dict[str, Any] = {}
    for what, device, host in (("8 GB and 8 GiB", "8GB", "8GiB"), ("3.3 GiB of each", "3.3GiB", "3.3GiB")):
        if at.left_s < 15:
            found[what] = {"left_out": "no time left"}
            continue
        out = at.folder / f"out-{len(found)}"
        rooms = [f"budget={host}", *([] if at.fake else [f"device_budget={device}"])]
        arguments = [x for one in (*sets, *rooms) for x in ("--set", one)]
        command = [
            sys.executable,
            "-c",
            BLOCKSTREAM,
            "run",
            "movd.yaml",
            "--out",
            str(out),
            "--json",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=at.left_s)
        if done.returncode:
            found[what] = {"failed": done.stderr[-800:]}
            continue
        report = json.loads(done.stdout)
        found[what] = {
            "s": report["wall_s"],
            "stages": {s["name"]: {"s": s["wall_s"], "passes": s["passes"]} for s in report["stages"]},
            "host": report["budget"],
            "device": report.get("device", {}).get("budget"),
        }
    return found


def soak(at: Context) -> dict[str, Any]:
    """Stream 200 passes with half of the weights on the device: every pass the same bits, nothing grows."""
    from benchmarks.device.models import inputs
    from benchmarks.device.parts import streamed

    given = inputs(at.shape, at.tokens[0], at.where)
    with streamed(at, budget="80%", device_arena=at.nbytes // 2 + at.gib(1.3)) as (session, module, _):
        wanted, passes, wrong = module(*given).clone(), 0, 0
        held: list[int] = []
        for _ in range(SOAK if not at.fake else 12):
            if at.left_s < 3:
                break
            wrong += not torch.equal(module(*given), wanted)
            passes += 1
            now = at.device.memory()
            held.append(now.reserved_nbytes + now.outside_nbytes)
        report = session.report()
        return {
            "passes": passes,
            "of": SOAK,
            "wrong": wrong,
            "grown_nbytes": max(held[len(held) // 2 :], default=0) - max(held[: len(held) // 2], default=0),
            "held": report["budget"]["held"] and report["device"]["budget"]["held"],
            "unplanned": report["unplanned"],
        }


def load(at: Context) -> dict[str, Any]:
    """Stream while another process takes all but 2 GiB of what is free: bits, budget, or what is said."""
    from benchmarks.device.models import inputs

    given = inputs(at.shape, at.tokens[0], at.where)
    wanted_path = at.folder / f"out-{at.tokens[0]}.pt"
    options = {"budget": "16GiB", "device_budget": "8GB"} if not at.fake else {"budget": "80%"}
    other = None
    with torch.no_grad(), blockstream.Session(device=at.device, **options) as session:  # type: ignore[arg-type]
        from benchmarks.device.models import Dit

        module = session.stage("dit", lambda: Dit(at.shape), at.weights, 20, "bf16", given)
        before = module(*given).cpu()
        try:
            if not at.fake:
                other = _taker(at)
            equal = all(torch.equal(module(*given).cpu(), before) for _ in range(5))
            said = None
        except blockstream_errors() as error:
            equal, said = False, str(error)
        finally:
            if other is not None:
                other.kill()
                other.wait()
        report = session.report()
        wanted = torch.load(wanted_path, weights_only=True) if wanted_path.exists() else None
        return {
            "same": equal and (wanted is None or torch.equal(before, wanted)),
            "said": said,
            "taken": other is not None,
            "device": report["device"]["budget"],
            "others_nbytes": report["device"]["others_nbytes"],
        }


def _taker(at: Context) -> subprocess.Popen[str]:
    """Return a process that holds all but 2 GiB of what is free on the device."""
    free = at.device.memory().free_nbytes - (2 << 30) - (1 << 30)  # a context of its own
    take = f"x = torch.empty({max(free, 1)}, dtype=torch.uint8, device='cuda')"
    code = f"import torch; {take}; print(1, flush=True); input()"
    made = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert made.stdout is not None
    made.stdout.readline()
    return made


def _same(a: Any, b: Any) -> bool:
    first = lambda x: x if isinstance(x, torch.Tensor) else x[0]  # noqa: E731
    return torch.equal(first(a), first(b))


def _clear(at: Context) -> None:
    if at.where.type == "cuda":
        torch.cuda.empty_cache()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
