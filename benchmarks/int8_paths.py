"""Time the ways a layer with int8 weights can compute, under each instruction set that this processor has.

    python -m benchmarks.int8_paths                  # some minutes; writes results/DATE-int8-paths.{json,md}
    python -m benchmarks.int8_paths --small          # tried out in seconds, nothing is written

`blockstream.module.layers.int8.PRODUCTS` and FEW_ROWS are read off its result: the product that is fastest
over T5-XXL's layers with a text's rows, and the rows up to which the kernel that reads int8 is. Each
instruction set has a process of its own, in which ATen and oneDNN are told to go no higher. Float weights
held ready stand beside. Trials of all ways take turns and are kept; what takes over a second is timed once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks._results import summary, table, write
from blockstream.module.layers import int8
from blockstream.system.limits import cpu_count

#: What caps ATen and oneDNN, by instruction set. oneDNN's names are its own.
CAPS = {
    "amx": {},
    "avx512-bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
#: Layers (out, in) of T5-XXL: attention, the gated part's two kinds; STDiT3-XL's first of its MLP.
LAYERS = ((4096, 4096), (10240, 4096), (4096, 10240), (4608, 1152))
ROWS = (1, 4, 8, 16, 32, 128, 300)
#: The rows PRODUCTS is chosen by: what T5 computes for a text.
TEXT_ROWS = (128, 300)
#: The kernel that reads int8 takes a second a product beyond this.
MOST_PACKED = 32
SLOW_S = 1.0
SMALL = {"layers": ((256, 128),), "rows": (1, 16), "trials": 2}


def ways(out: int, columns: int, rows: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed for one layer and input."""
    made = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (out, columns), dtype=torch.int8, generator=made)
    scale = torch.rand(out, generator=made) / 127
    x = torch.randn(rows, columns, generator=made).to(dtype)
    wide = (weight * scale[:, None]).to(dtype)

    def chunked(way: int8.Way) -> Tensor:
        y = torch.empty(rows, out, dtype=dtype)
        for a in range(0, rows, int8.BLOCK_ROWS):
            int8.fill(y[a : a + int8.BLOCK_ROWS], x[a : a + int8.BLOCK_ROWS], weight, scale, way)
        return y

    def packed() -> Tensor:
        return torch._weight_int8pack_mm(x.bfloat16(), weight, scale.bfloat16()).to(dtype)

    found = {
        "float weights": lambda: torch.nn.functional.linear(x, wide),
        "bf16": lambda: chunked("bf16"),
        "fp32": lambda: chunked("fp32"),
    }
    return {**found, "packed": packed} if rows <= MOST_PACKED else found


def measure(layers: Sequence[tuple[int, int]], rows: Sequence[int], trials: int) -> list[dict[str, Any]]:
    """Return the seconds of every trial and the error of each way, in this process."""
    torch.set_num_threads(cpu_count().threads)
    found = []
    for out, columns in layers:
        for n in rows:
            for dtype in (torch.float32, torch.bfloat16):
                each = ways(out, columns, n, dtype)
                exact = each["float weights"]().double()
                error, spent = {}, {}
                for name, compute in each.items():
                    first_s, y = timed(compute)
                    error[name] = float((y.double() - exact).norm() / exact.norm())
                    spent[name] = [first_s] if first_s > SLOW_S else []
                for _ in range(trials):
                    for name, compute in each.items():
                        if not spent[name] or spent[name][0] <= SLOW_S:
                            spent[name].append(timed(compute)[0])
                found.append(
                    {
                        "layer": [out, columns],
                        "rows": n,
                        "dtype": str(dtype).removeprefix("torch."),
                        "seconds": {k: summary(v) for k, v in spent.items()},
                        "error": error,
                    }
                )
    return found


def timed(compute: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the seconds of a call, and its result."""
    begin = time.perf_counter()
    y = compute()
    return time.perf_counter() - begin, y


def with_caps(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a process that goes no higher than one instruction set measures."""
    command = [sys.executable, "-m", "benchmarks.int8_paths", "--here", *(["--small"] * options.small)]
    done = subprocess.run(
        command, env={**os.environ, **CAPS[name]}, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def gflops(row: dict[str, Any], way: str) -> float:
    """Return a way's operations a second, by its median trial."""
    out, columns = row["layer"]
    return 2e-9 * out * columns * row["rows"] / row["seconds"][way]["median"]


def judge(rows: list[dict[str, Any]], text_rows: Sequence[int] = TEXT_ROWS) -> dict[str, Any]:
    """Return the fastest product for a text in float32, and up to which rows reading int8 is fastest."""
    text = [r for r in rows if r["rows"] in text_rows and r["dtype"] == "float32"]
    speed = {way: statistics.geometric_mean(gflops(r, way) for r in text) for way in ("bf16", "fp32")}
    few = [r for r in rows if "packed" in r["seconds"] and r["dtype"] == "bfloat16"]
    wins: dict[int, bool] = {}
    for r in few:
        beaten = gflops(r, "packed") >= max(gflops(r, w) for w in ("bf16", "fp32"))
        wins[r["rows"]] = wins.get(r["rows"], True) and beaten
    until = 0
    for n in sorted(wins):
        if not wins[n]:
            break
        until = n
    return {"gflops": speed, "product": max(speed, key=lambda k: speed[k]), "packed_until": until}


def page(found: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = ["Operations a second, in GFLOP/s, by the median of the trials; x in float32 unless said.", ""]
    verdicts = [
        (
            name,
            v["gflops"]["bf16"],
            v["gflops"]["fp32"],
            v["product"],
            int8.PRODUCTS[name],
            v["packed_until"],
        )
        for name, v in found["verdicts"].items()
    ]
    head = ("instructions", "bf16", "fp32", "fastest", "in the table", "packed is fastest up to rows")
    lines += [f"Geometric means over layers and {TEXT_ROWS[0]} and {TEXT_ROWS[1]} rows:", ""]
    lines += [table(head, verdicts), ""]
    lines += [
        f"The table has FEW_ROWS = {int8.FEW_ROWS}, for x in bfloat16 columns (packed rounds x to it).",
        "",
    ]
    for name, rows in found["measured"].items():
        lines += [f"## {name}", ""]
        body = []
        for r in rows:
            cells = [
                gflops(r, w) if w in r["seconds"] else "" for w in ("float weights", "bf16", "fp32", "packed")
            ]
            worst = max(e for w, e in r["error"].items() if w != "float weights")
            body.append(("x".join(map(str, r["layer"])), r["rows"], r["dtype"], *cells, f"{worst:.1e}"))
        head = ("out x in", "rows", "x", "float weights", "bf16", "fp32", "packed", "largest error")
        lines += [table(head, body), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = SMALL if options.small else {"layers": LAYERS, "rows": ROWS, "trials": options.trials}
    if options.here:
        print(json.dumps({"instructions": int8.instructions(), "rows": measure(**asked)}))
        return
    names = list(CAPS)[list(CAPS).index(int8.instructions()) :]
    measured = {}
    for name in names:
        print(name, "...", file=sys.stderr, flush=True)
        measured[name] = with_caps(name, options)["rows"]
    text_rows = SMALL["rows"] if options.small else TEXT_ROWS
    found = {"measured": measured, "verdicts": {k: judge(v, text_rows) for k, v in measured.items()}}
    if options.small:
        print(page(found))
        return
    command = f"python -m benchmarks.int8_paths --trials {options.trials}"
    write("int8-paths", command, "How layers with int8 weights multiply", page(found), found)


if __name__ == "__main__":
    main()
