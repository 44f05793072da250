"""Time the parts against the products they are made of, and T5 against transformers' own, weights in memory.

    python -m benchmarks.parts --weights DIR            # DIR as for benchmarks.streaming; minutes
    python -m benchmarks.parts --small                  # tried out in seconds, nothing is written

STDiT3-XL/2: one spatial and one temporal block with random weights, both halves of guidance. Each part (MLP,
self- and cross-attention) takes turns with the bare matrix products inside it: the same operands, nothing
else. What is left of a block is listed by operation, from torch's profiler. The machine's peak is the best of
square products in the same run. `torch.compile` of a block is timed apart. T5: the encoder of
benchmarks.streaming, streamed with everything in memory, in turn with the plain module; in bfloat16, and in
int8 against both transformers' int8 weights (by torchao, where it is installed) and its bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

import blockstream
from benchmarks import resident, t5_xxl
from benchmarks._results import load, summary, table, write
from blockstream.system.limits import cpu_count
from movd.layers import TemporalRope
from movd.stdit3 import STDIT3_XL_2, STDiT3Block, STDiT3Config
from movd.vae import OpenSoraVAEConfig

#: What a part may take, times its products.
GOALS = {"mlp": 1.15, "attn": 1.4, "cross_attn": 1.4}
TEXT = 300
#: The share of transformers' own speed that T5 keeps.
T5_GOAL = 0.97
Timed = Callable[[], object]


def seconds(work: Timed) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def turns(ways: dict[str, Timed], trials: int) -> dict[str, list[float]]:
    """Return the seconds of each way, each once first without being counted, then in turn."""
    for work in ways.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(trials):
        for name, work in ways.items():
            found[name].append(seconds(work))
    return found


def peak_flops_per_s(dtype: torch.dtype, trials: int) -> float:
    """Return the most operations a second of square products, sizes in turn."""
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        times = turns({"product": lambda a=a, b=b: a @ b}, trials)["product"]
        best = max(best, 2 * n**3 / min(times))
    return best


class Case:
    """One block with its inputs, its parts, and the products of each."""

    def __init__(self, kind: str, config: STDiT3Config, T: int, S: int, dtype: torch.dtype) -> None:
        made = torch.Generator().manual_seed(0)
        c = config.hidden_size
        self.kind, self.heads, self.block = kind, config.num_heads, STDiT3Block(config, kind).eval().to(dtype)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made).to(dtype)

        self.x, self.t, self.y = noise(2, T, S, c), noise(2, 1, 6 * c), noise(2, TEXT, c)
        rope = TemporalRope(c // config.num_heads)(torch.arange(T)) if kind == "temporal" else (None, None)
        self.rope = rope
        self.parts: dict[str, Timed] = {
            "attn": lambda: self.block.attn(self.x, *rope),
            "cross_attn": lambda: self.block.cross_attn(self.x, self.y, None),
            "mlp": lambda: self.block.mlp(self.x),
        }
        tokens, self.sequence = self.x.flatten(0, 2), S if kind == "spatial" else T
        hidden = noise(len(tokens), self.block.mlp.fc1.out_features)
        head = c // config.num_heads
        q = noise(2 * T * S // self.sequence * self.heads, self.sequence, head)
        weights = noise(len(q), self.sequence, self.sequence)
        q_cross, k_cross = noise(2 * self.heads, T * S, head), noise(2 * self.heads, TEXT, head)
        w_cross = noise(2 * self.heads, T * S, TEXT)
        text = self.y.flatten(0, 1)
        attn, cross, mlp = self.block.attn, self.block.cross_attn, self.block.mlp
        self.products: dict[str, Timed] = {
            "attn": lambda: (
                linear(tokens, attn.qkv.weight),
                torch.bmm(q, q.transpose(1, 2)),
                torch.bmm(weights, q),
                linear(tokens, attn.proj.weight),
            ),
            "cross_attn": lambda: (
                linear(tokens, cross.q_linear.weight),
                linear(text, cross.kv_linear.weight),
                torch.bmm(q_cross, k_cross.transpose(1, 2)),
                torch.bmm(w_cross, k_cross),
                linear(tokens, cross.proj.weight),
            ),
            "mlp": lambda: (linear(tokens, mlp.fc1.weight), linear(hidden, mlp.fc2.weight)),
        }

    def whole(self) -> Tensor:
        return self.block(self.x, self.t, self.y, None, *self.rope)

    def measure(self, trials: int, compiled: bool) -> dict[str, Any]:
        """Return the seconds of the block, its parts and their products, and its operations."""
        ways: dict[str, Timed] = {"block": self.whole}
        for name in self.parts:
            ways |= {name: self.parts[name], f"{name} products": self.products[name]}
        found = turns(ways, trials)
        with FlopCounterMode(display=False) as counter:
            self.whole()
        return {
            "flops": counter.get_total_flops(),
            "seconds": {name: summary(times) for name, times in found.items()},
            "operations": operations(self.whole),
            "compiled": self.compiled(trials) if compiled else None,
        }

    def compiled(self, trials: int) -> dict[str, Any]:
        """Return the seconds of the block eager and compiled, in turn, and those of compiling."""
        eager = self.whole
        block = torch.compile(self.block)
        try:
            first = seconds(lambda: block(self.x, self.t, self.y, None, *self.rope))
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        ways: dict[str, Timed] = {
            "eager": eager,
            "compiled": lambda: block(self.x, self.t, self.y, None, *self.rope),
        }
        return {"first_s": first, **{k: summary(v) for k, v in turns(ways, trials).items()}}


def operations(work: Timed) -> list[tuple[str, float, int]]:
    """Return each operation's own seconds and calls, most first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    own = [(e.key, e.self_cpu_time_total / 1e6, e.count) for e in profile.key_averages()]
    return sorted((x for x in own if x[0].startswith("aten::")), key=lambda x: -x[1])


def t5(folder: Path, count: int) -> list[dict[str, Any]]:
    """Return pairs of T5 streamed with everything in memory and plain, in bfloat16 and int8."""
    ids = t5_xxl.tokens()
    packed = t5_xxl.packed(folder, "int8")
    found = []
    for name, weights, other, plain in (
        ("bf16", folder, "bf16", resident.plain),
        ("int8", packed, "int8, torchao", int8_by_torchao),
        ("int8", packed, "bf16", resident.plain),
    ):
        theirs = plain(folder)
        if theirs is None:
            continue
        with torch.inference_mode(), blockstream.open(arena="100GiB") as s:
            mine: nn.Module = s.stage("t5", lambda: t5_xxl.build(folder), weights, passes=None)
            for _ in range(3):
                same = torch.equal(mine(ids).last_hidden_state, theirs(ids).last_hidden_state)
            pairs = resident.pairs(mine, theirs, ids, count, 1)
            hooks = resident.hooks(mine)
        found.append({"weights": name, "other": other, **pairs, "same_bits": same, "hooks": hooks})
    return found


def int8_by_torchao(folder: Path) -> nn.Module | None:
    """Return the plain encoder with int8 weights in its linear layers, as transformers' TorchAoConfig has it.

    None where torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None
    module = resident.plain(folder)
    quantize_(module, Int8WeightOnlyConfig())
    return module


def page(found: dict[str, Any]) -> str:
    lines = [
        f"STDiT3-XL/2, {found['size']}, both halves of guidance, {found['dtype']}; medians of "
        f"{found['trials']} trials in turn. The machine's peak is "
        f"{found['peak_flops_per_s'] / 1e9:.0f} GFLOP/s.",
    ]
    for kind, case in found["blocks"].items():
        times = {name: s["median"] for name, s in case["seconds"].items()}
        rows = [
            (
                name,
                f"{times[name]:.3f}",
                f"{times[f'{name} products']:.3f}",
                f"{ratio(case, name):.2f}",
                f"{goal}",
            )
            for name, goal in GOALS.items()
        ]
        rate = case["flops"] / times["block"]
        rest = times["block"] - sum(times[name] for name in GOALS)
        lines += [
            "",
            f"## A {kind} block",
            "",
            f"{case['flops'] / 1e9:.0f} GFLOP in {times['block']:.3f} s: {rate / 1e9:.0f} GFLOP/s, "
            f"{rate / found['peak_flops_per_s']:.0%} of the peak. Outside its parts: {rest:.3f} s.",
            "",
            table(("part", "seconds", "its products", "ratio", "at most"), rows),
            "",
            table(
                ("operation", "own seconds", "calls"),
                [(name, f"{s:.4f}", n) for name, s, n in case["operations"][:14]],
            ),
        ]
        done = case["compiled"]
        if done and "failed" in done:
            lines += ["", f"torch.compile failed: {done['failed']}"]
        elif done:
            eager, compiled = done["eager"]["median"], done["compiled"]["median"]
            lines += [
                "",
                f"torch.compile: {compiled:.3f} s beside {eager:.3f} eager in turn "
                f"({eager / compiled:.2f}x), "
                f"{done['first_s']:.0f} s to compile. Its bits differ from eager's: it is another numerics.",
            ]
    if found["t5"]:
        rows = [
            (
                f["weights"],
                1e3 * f["streamed_s"]["median"],
                f["other"],
                1e3 * f["plain_s"]["median"],
                f"{1 / f['ratio']:.3f}",
                f"{1 / f['interval'][1]:.3f} to {1 / f['interval'][0]:.3f}",
                "the same" if f["same_bits"] else "rounded weights",
            )
            for f in found["t5"]
        ]
        head = (
            "weights",
            "blockstream ms",
            "transformers",
            "its ms",
            "share of its speed",
            "95% interval",
            "bits",
        )
        lines += [
            "",
            "## T5 with everything in memory",
            "",
            f"12 blocks as wide as XXL, {t5_xxl.TOKENS} tokens, pairs in turn. At least {T5_GOAL} of the "
            "speed of transformers with the same weights is asked for; int8 saves memory and reading, not "
            "arithmetic, and costs time beside bfloat16 where the processor multiplies that:",
            "",
            table(head, rows),
        ]
    return "\n".join([*lines, "", load()])


def ratio(case: dict[str, Any], part: str) -> float:
    """Return the median over trials of a part's seconds over those of its products."""
    pairs = zip(case["seconds"][part]["trials"], case["seconds"][f"{part} products"]["trials"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, help="the encoder of benchmarks.streaming; T5 is left out without"
    )
    parser.add_argument("--size", default="34x256x256", metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(cpu_count().threads)
    frames, height, width = (int(n) for n in ("17x64x64" if options.small else options.size).split("x"))
    T, S = OpenSoraVAEConfig().latent_frames(frames), -(-(height // 8) // 2) * -(-(width // 8) // 2)
    dtype = getattr(torch, options.dtype)
    trials = 2 if options.small else options.trials
    found: dict[str, Any] = {
        "size": f"{frames} frames of {height} x {width}: {T} x {S} tokens",
        "dtype": options.dtype,
        "trials": trials,
        "goals": GOALS,
    }
    with torch.inference_mode():
        found["peak_flops_per_s"] = peak_flops_per_s(dtype, trials)
        found["blocks"] = {
            kind: Case(kind, STDIT3_XL_2, T, S, dtype).measure(
                trials, not (options.no_compile or options.small)
            )
            for kind in ("spatial", "temporal")
        }
    found["t5"] = None
    if options.small:
        with tempfile.TemporaryDirectory() as made:
            found["t5"] = t5(t5_xxl.checkpoint(Path(made) / "t5", "small"), 2)
        print(page(found))
        return
    if options.weights:
        found["t5"] = t5(t5_xxl.checkpoint(options.weights), options.pairs)
    line = f"python -m benchmarks.parts --weights DIR --size {options.size} --dtype {options.dtype}"
    write("parts", line, "The parts beside their products, T5 beside transformers", page(found), found)


if __name__ == "__main__":
    main()
