"""Time sliding tile attention by its kernels beside dense attention, over windows of growing density.

    python -m benchmarks.sta                                     # 12 x 24 x 24 tokens and 64 of text
    python -m benchmarks.sta --canvas 30x48x80 --tile 6x8x8 --text 256 --heads 24 --width 128 --device cuda

One layer's attention of random queries, keys and values. `dense` sees everything; `mask` is dense attention
under the whole mask, which is what the windows mean, and too large to be held on a large canvas. Trials of
all ways take turns and all are kept; the first of each, in which flex compiles, stands apart. Each way's
output is compared with the mask's. Writes benchmarks/results/DATE-sta.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blockstream_sta.flex import Flex
from blockstream_sta.gathered import attend
from blockstream_sta.tiles import Tiling, Window
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

#: A mask of all pairs is made up to this many tokens.
MOST_MASKED = 16_000


def environment(device: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "machine": platform.machine() if device == "cpu" else torch.cuda.get_device_name(),
    }


def sizes(text: str) -> tuple[int, int, int]:
    t, h, w = (int(n) for n in text.split("x"))
    return t, h, w


def windows_of(tiling: Tiling) -> list[Window]:
    """Return windows from one tile to the whole canvas, each wider along one axis."""
    found: list[Window] = [(1, 1, 1)]
    while found[-1] != tiling.tiles:
        window = list(found[-1])
        axis = min(range(3), key=lambda a: window[a] / tiling.tiles[a])
        window[axis] = min(window[axis] + 2, tiling.tiles[axis])
        found.append(tuple(window))  # type: ignore[arg-type]
    return found


def mask_of(tiling: Tiling, window: Window, text: int, device: str) -> Tensor:
    """Return which keys each query sees, [N, N] bool, told token by token."""
    video = math.prod(tiling.canvas)
    places = torch.cartesian_prod(*(torch.arange(n) for n in tiling.canvas)).T
    keep = torch.ones(video + text, video + text, dtype=torch.bool)
    for place, size, n, k in zip(places, tiling.tile, tiling.tiles, window, strict=True):
        tile, half = place // size, k // 2
        centre = tile.clamp(min=half).clamp(max=n - 1 - half)
        keep[:video, :video] &= (centre[:, None] - tile[None]).abs() <= half
    return keep.to(device)


@torch.inference_mode()
def measure(args: argparse.Namespace, tiling: Tiling, window: Window, qkv: list[Tensor]) -> dict[str, Any]:
    """Return all trials of one window."""
    q, k, v = qkv
    windows, flex = [window] * args.heads, Flex(tiling)
    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "gathered": lambda: attend(q, k, v, tiling, windows, args.text),
        "flex": lambda: flex.attend(q, k, v, windows, args.text),
    }
    want = None
    if q.shape[2] <= MOST_MASKED:
        keep = mask_of(tiling, window, args.text, args.device)
        ways["mask"] = lambda: scaled_dot_product_attention(q, k, v, attn_mask=keep)
        want = ways["mask"]()
    differs = {}
    first = {}
    for way, call in ways.items():
        first[way], out = timed(call, args.device)
        if want is not None and way != "dense":
            differs[way] = float((out - want).abs().max())
    trials = [{way: timed(call, args.device)[0] for way, call in ways.items()} for _ in range(args.trials)]
    return {
        "window": "x".join(map(str, window)),
        "density": tiling.density(window),
        "first_s": first,
        "trials_s": trials,
        "largest_difference_from_mask": differs,
    }


def timed(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Return the seconds of a call: of the processor itself, so that others on the machine do not count."""
    if device == "cpu":
        begin = time.process_time()
        out = call()
        return time.process_time() - begin, out
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out = call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, out


def markdown(result: dict[str, Any]) -> str:
    ways = list(result["rows"][0]["trials_s"][0])
    lines = [
        f"# Sliding tile attention, {result['date']}",
        "",
        f"    {result['command']}",
        "",
        f"Milliseconds of one layer's attention, median of {result['trials']} trials (range); on the "
        "processor its own time, with one thread. Saved is the share of dense attention's time, the median "
        "of pairs in one round, beside what the density of the pairs allows. Difference is the largest from "
        "dense attention under the whole mask.",
        "",
        f"| window | density | {' | '.join(f'{w} ms' for w in ways)} | saved by gathered | by flex | allowed "
        "| difference gathered, flex |",
        "|---" * (6 + len(ways)) + "|",
    ]
    for row in result["rows"]:
        trials = row["trials_s"]
        cells = []
        for way in ways:
            ms = [1e3 * t[way] for t in trials]
            cells.append(f"{statistics.median(ms):.0f} ({min(ms):.0f} to {max(ms):.0f})")
        saved = [statistics.median(1 - t[way] / t["dense"] for t in trials) for way in ("gathered", "flex")]
        found = row["largest_difference_from_mask"]
        differs = ", ".join(f"{found[w]:.0e}" if w in found else "-" for w in ("gathered", "flex"))
        lines.append(
            f"| {row['window']} | {row['density']:.3f} | {' | '.join(cells)} | {saved[0]:.0%} | "
            f"{saved[1]:.0%} | {1 - row['density']:.0%} | {differs} |"
        )
    first = result["rows"][0]["first_s"]["flex"]
    lines += ["", f"The first call of flex, which compiles: {first:.0f} s."]
    return "\n".join([*lines, "", f"Environment: {json.dumps(result['environment'])}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--canvas", type=sizes, default=(12, 24, 24), metavar="TxHxW")
    parser.add_argument("--tile", type=sizes, default=(2, 8, 8), metavar="TxHxW")
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="channels a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiling = Tiling(args.canvas, args.tile)
    random = torch.Generator().manual_seed(0)
    shape = (1, args.heads, math.prod(args.canvas) + args.text, args.width)
    qkv = [torch.randn(shape, generator=random).to(args.device, getattr(torch, args.dtype)) for _ in range(3)]
    today = datetime.date.today().isoformat()
    written = {"canvas": args.canvas, "tile": args.tile}
    given = " ".join(f"--{k} {'x'.join(map(str, v))}" for k, v in written.items())
    result: dict[str, Any] = {
        "schema": 1,
        "suite": "sta",
        "date": today,
        "command": f"python -m benchmarks.sta {given} --text {args.text} --heads {args.heads} "
        f"--width {args.width} --dtype {args.dtype} --device {args.device} --trials {args.trials}",
        "environment": environment(args.device),
        "trials": args.trials,
        "rows": [],
    }
    out = Path("benchmarks/results") / f"{today}-sta{'' if args.device == 'cpu' else '-' + args.device}.json"
    for window in windows_of(tiling):
        result["rows"].append(measure(args, tiling, window, qkv))
        out.write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
