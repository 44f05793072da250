"""Time STDiT3-XL/2 with and without token merging, by kind of attention, beside what operations predict.

    python -m benchmarks.tdtm_step                            # 68 frames, 256 x 256
    python -m benchmarks.tdtm_step --sizes 17x32x32 17x64x64 51x144x256 68x256x256

One spatial and one temporal block of the released model's shape with random weights, both halves of guidance;
a step is 28 of each. Trials with and without alternate; all are kept, the median is shown. Attention costs
come from hooks on the layers inside the same trials. Writes benchmarks/results/DATE-tdtm-step.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from blockstream_tdtm import Options, TemporalMerging
from torch import Tensor

from blockstream.module.attention import attention_hooks
from blockstream.plugins import new_run
from examples.train_tiny.evaluate import environment
from movd.attention import Attention, attention_layers
from movd.layers import TemporalRope
from movd.stdit3 import STDIT3_XL_2, STDiT3Block
from movd.vae import OpenSoraVAEConfig

TEXT = 300
PAIRS = STDIT3_XL_2.depth
C = STDIT3_XL_2.hidden_size
WAYS = ("plain", "merged")


class Pair(torch.nn.Module):
    """One spatial and one temporal block."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = STDiT3Block(STDIT3_XL_2, "spatial")
        self.temporal = STDiT3Block(STDIT3_XL_2, "temporal")
        self.rope = TemporalRope(C // STDIT3_XL_2.num_heads)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        merge = self.temporal.attn.seam.merging()
        places = torch.arange(x.shape[1]) if merge is None else merge.positions
        return self.temporal(self.spatial(x, t, y), t, y, None, *self.rope(places))


def operations(kind: str, T: int, S: int, merged: bool) -> float:
    """Return the operations of one attention layer, two for each multiplication, both halves of guidance."""
    frames = -(-T // 2) if merged else T
    tokens = frames * S
    if kind == "cross":
        return 2 * (2 * tokens * C * C * 2 + TEXT * C * C * 4 + tokens * TEXT * C * 4)
    keys = S if kind == "spatial" else frames
    return 2 * (tokens * C * C * 8 + tokens * keys * C * 4)


def rest(T: int, S: int) -> float:
    """Return the operations of one block outside attention: its MLP."""
    return 2 * T * S * C * C * 16


def predicted(T: int, S: int) -> dict[str, float]:
    """Return the speed-up that operations predict, by kind of attention and for a step."""
    kinds = ("spatial", "temporal", "cross")
    ops = {k: [operations(k, T, S, merged) for merged in (False, True)] for k in kinds}
    found = {k: plain / merged for k, (plain, merged) in ops.items()}
    step = [ops["spatial"][m] + ops["temporal"][m] + 2 * ops["cross"][m] + 2 * rest(T, S) for m in (0, 1)]
    return {**found, "step": step[0] / step[1]}


@torch.inference_mode()
def trial(pair: Pair, x: Tensor, t: Tensor, y: Tensor, way: str) -> dict[str, float]:
    """Return the seconds of a step, and of its attention by kind."""
    spent: dict[str, float] = defaultdict(float)
    begun: dict[int, float] = {}
    handles = []
    for layer in (m for m in pair.modules() if isinstance(m, Attention)):
        handles.append(
            layer.register_forward_pre_hook(lambda m, _: begun.__setitem__(id(m), time.perf_counter()))
        )

        def add(m: Attention, *_: object) -> None:
            spent[m.kind] += PAIRS * (time.perf_counter() - begun[id(m)])

        handles.append(layer.register_forward_hook(add))
    merge = TemporalMerging(Options(merge_steps="100%")).token_merge
    _, T, S, _ = x.shape
    merging = attention_hooks(attention_layers(pair, (T, 1, S), TEXT), token_merge=merge)
    with new_run(), merging if way == "merged" else nullcontext():
        begin = time.perf_counter()
        pair(x, t, y)
        spent["step"] = PAIRS * (time.perf_counter() - begin)
    for handle in handles:
        handle.remove()
    return dict(spent)


def measure(frames: int, height: int, width: int, trials: int) -> dict[str, Any]:
    """Return all trials of one size; the first of each way is a warm-up and apart."""
    T, S = OpenSoraVAEConfig().latent_frames(frames), -(-(height // 8) // 2) * -(-(width // 8) // 2)
    gen = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    pair = Pair().eval()
    x = torch.randn(2, T, S, C, generator=gen)
    t, y = torch.randn(2, 1, 6 * C, generator=gen), torch.randn(2, TEXT, C, generator=gen)
    warm = {way: trial(pair, x, t, y, way) for way in WAYS}
    runs = [{way: trial(pair, x, t, y, way) for way in WAYS} for _ in range(trials)]
    return {
        "size": f"{frames}x{height}x{width}",
        "T": T,
        "S": S,
        "warm_up": warm,
        "trials": runs,
        "predicted": predicted(T, S),
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# Token merging in STDiT3-XL/2, {result['date']}",
        "",
        f"    {result['command']}",
        "",
        "Seconds of a step (28 pairs of blocks, both halves of guidance), median of "
        f"{result['trials']} trials (range); speed-up as the median of pairs that ran one after the other "
        "and, in brackets, as operations predict.",
        "",
        "| frames x height x width | tokens | plain s | merged s | step | spatial | temporal | cross |",
        "|---" * 8 + "|",
    ]
    for row in result["rows"]:

        def seconds(way: str, key: str, row: dict[str, Any] = row) -> list[float]:
            return [run[way][key] for run in row["trials"]]

        cells = []
        for way in WAYS:
            s = seconds(way, "step")
            cells.append(f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})")
        for key in ("step", "spatial", "temporal", "cross"):
            pairs = [a / b for a, b in zip(*(seconds(way, key) for way in WAYS), strict=True)]
            cells.append(f"{statistics.median(pairs):.2f} ({row['predicted'][key]:.2f})")
        lines.append(f"| {row['size']} | {row['T']} x {row['S']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Environment: {json.dumps(result['environment'])}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["68x256x256"], metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    today = datetime.date.today().isoformat()
    out = Path("benchmarks/results") / f"{today}-tdtm-step.json"
    result: dict[str, Any] = {
        "schema": 1,
        "suite": "tdtm-step",
        "date": today,
        "command": f"python -m benchmarks.tdtm_step --sizes {' '.join(args.sizes)} --trials {args.trials}",
        "environment": {**environment(), "threads": args.threads},
        "trials": args.trials,
        "rows": [],
    }
    for size in args.sizes:
        result["rows"].append(measure(*(int(n) for n in size.split("x")), args.trials))
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
