"""Judge LPL and TDTM on the embedded model: seeded prompts, each way beside the same seed without it.

    python -m benchmarks.methods                 # 200 prompts; run it again to go on where it was stopped
    python -m benchmarks.methods --jobs 2        # two prompts at a time
    python -m benchmarks.methods --page          # only write the page and pictures again

Each prompt is sampled from its seed by every way, decoded and judged frame by frame by `checker`; PSNR, SSIM,
flicker and motion compare each video with the baseline's. Rivals take as many passes as LPL took for that
prompt. Writes benchmarks/results/DATE-methods.json, .md and pictures; attention seconds are those of the
attention layers alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blockstream_lpl import LinearProportionalLeap
from blockstream_lpl import Options as Leaps
from blockstream_lpl.past import cosine
from blockstream_tdtm import Options as Merging
from blockstream_tdtm import TemporalMerging
from torch import Tensor

from benchmarks import methods_page
from benchmarks.rivals import ab2, euler_steps
from blockstream.module.attention import attention_hooks
from blockstream.plugins import new_run
from examples.train_tiny import checker, data
from examples.train_tiny.data import Scene
from examples.train_tiny.evaluate import environment, prompts, write
from examples.train_tiny.sample import Tiny, decode, load
from movd.attention import Attention, attention_layers
from movd.rflow import OpenSoraFlow
from movd.t5 import embed

STEPS, GUIDANCE, SEED = 30, 3.0, 2024


@dataclass(frozen=True)
class Way:
    """One way to sample; `like` takes as many steps as that way took passes."""

    sampler: Callable[..., Tensor] = euler_steps
    merging: dict[str, Any] | None = None
    like: str | None = None


def lpl(**options: Any) -> LinearProportionalLeap:
    return LinearProportionalLeap(Leaps(**options))


WAYS: dict[str, Way] = {
    "baseline": Way(),
    "lpl": Way(lpl()),
    "lpl tolerance 0.02": Way(lpl(tolerance=0.02)),
    "lpl tolerance 0.2": Way(lpl(tolerance=0.2)),
    "lpl reference": Way(lpl(statistic="reference")),
    "lpl leap 2": Way(lpl(leap=2, statistic="reference")),
    "fewer steps": Way(like="lpl"),
    "fewer steps ab2": Way(ab2, like="lpl"),
    "16 steps": Way(like="16"),
    "tdtm 25%": Way(merging={"merge_steps": "25%"}),
    "tdtm 50%": Way(merging={"merge_steps": "50%"}),
    "tdtm 100%": Way(merging={"merge_steps": "100%"}),
    "tdtm 50% reference": Way(
        merging={"merge_steps": "50%", "positions": "reference", "last_frame": "reference"}
    ),
    "lpl + tdtm 25%": Way(lpl(), {"merge_steps": "25%"}),
    "lpl + tdtm 50%": Way(lpl(), {"merge_steps": "50%"}),
}


@dataclass
class Watched:
    """A flow's passes and the straightness of its steps, and the seconds of attention."""

    passes: int = 0
    cosine: list[float] = field(default_factory=list)
    attention_s: float = 0.0


@contextmanager
def timed(model: torch.nn.Module, watched: Watched) -> Iterator[None]:
    """Add up the seconds spent in attention layers."""
    began = [0.0]

    def begin(*_: object) -> None:
        began[0] = time.perf_counter()

    def end(*_: object) -> None:
        watched.attention_s += time.perf_counter() - began[0]

    layers = [m for m in model.modules() if isinstance(m, Attention)]
    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(end) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class WatchedFlow(OpenSoraFlow):
    def watch(self, watched: Watched) -> WatchedFlow:
        self.watched, self.before = watched, None
        return self

    def velocity(self, z: Tensor, i: int) -> Tensor:
        v = super().velocity(z, i)
        self.watched.passes += 1
        if self.before is not None:
            self.watched.cosine.append(round(float(cosine(v, self.before)), 6))
        self.before = v
        return v


def denoise(tiny: Tiny, caption: str, seed: int, way: Way, steps: int) -> tuple[Tensor, Watched]:
    """Return latents [1, 4, T', h, w] and what was watched."""
    y, mask = embed(tiny.encoder, tiny.tokenizer, [caption])
    shape = (1, 4, tiny.vae.config.latent_frames(data.FRAMES), data.SIZE // 8, data.SIZE // 8)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    watched = Watched()
    size = (data.SIZE, data.SIZE, data.FRAMES, data.FPS)
    flow = WatchedFlow(tiny.dit, y, mask, steps, GUIDANCE, *size).watch(watched)
    grid = tiny.dit.grid(*shape[2:])
    merging = nullcontext()
    if way.merging is not None:
        merge = TemporalMerging(Merging(**way.merging)).token_merge
        text = int(mask.sum(1).max())
        merging = attention_hooks(attention_layers(tiny.dit, grid, text), token_merge=merge)
    with new_run(), merging, timed(tiny.dit, watched):
        return way.sampler(flow, z), watched


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean structural similarity of two clips uint8 [T, H, W, 3], windows of 7 x 7."""
    x, y = (torch.from_numpy(c.astype(np.float64)).permute(0, 3, 1, 2) for c in (a, b))

    def mean(image: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(image, 7, 1)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(likeness.mean())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two clips in dB, 100 where they are equal."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 100.0 if error == 0 else min(100.0, 10 * np.log10(255**2 / error))


def extent(clip: np.ndarray) -> float:
    """Return how far the shape's centroid strays from its mean place, root mean square, in pixels."""
    pixels = clip.astype(np.float64)
    behind = np.median(pixels[:, 0], axis=1)
    weight = np.linalg.norm(pixels - behind[:, None, None], axis=-1)
    weight *= weight > weight.max((1, 2), keepdims=True) / 2
    total = np.maximum(weight.sum((1, 2)), 1e-9)
    grid = np.arange(data.SIZE)
    x, y = weight.sum(1) @ grid / total, weight.sum(2) @ grid / total
    return float(np.sqrt(x.var() + y.var()))


def measures(clip: np.ndarray, base: np.ndarray, scene: Scene) -> dict[str, Any]:
    verdict = checker.read(clip).judge(scene)
    return {
        "right": all(verdict.values()),
        "verdict": verdict,
        "psnr_db": round(psnr(clip, base), 2),
        "ssim": round(ssim(clip, base), 4),
        "flicker": round(float(np.abs(np.diff(clip.astype(np.float64), axis=0)).mean()), 3),
        "extent_px": round(extent(clip), 2),
    }


@torch.inference_mode()
def judge(tiny: Tiny, name: str, scene: Scene, seed: int, ways: Sequence[str]) -> dict[str, Any]:
    """Return the row of one prompt; the baseline is the first of the ways."""
    found: dict[str, Any] = {}
    base: np.ndarray | None = None
    for label in ways:
        way = WAYS[label]
        steps = STEPS if way.like is None else found.get(way.like, {}).get("passes") or int(way.like)
        began = time.perf_counter()
        latents, watched = denoise(tiny, scene.caption(), seed, way, steps)
        seconds = time.perf_counter() - began
        clip = decode(tiny, latents)[0]
        base = clip if base is None else base
        found[label] = {
            "passes": watched.passes,
            "denoise_s": round(seconds, 4),
            "attention_s": round(watched.attention_s, 4),
            **measures(clip, base, scene),
        }
        if label == "baseline":
            found[label]["cosine"] = watched.cosine
    return {"prompt": scene.caption(), "set": name, "seed": seed, "ways": found}


class Judge:
    """Judges prompts in a process of its own."""

    tiny: Tiny

    @classmethod
    def begin(cls, models: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        cls.tiny = load(models)

    @classmethod
    def row(cls, wanted: tuple[str, Scene, int, list[str]]) -> dict[str, Any]:
        return judge(cls.tiny, *wanted)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("movd/assets/tiny"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: all")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-methods.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="prompts at a time, each in a process")
    parser.add_argument("--page", action="store_true", help="write the page and pictures of a result again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    today = datetime.date.today().isoformat()
    out = args.out or Path("benchmarks/results") / f"{today}-methods.json"
    ways = ["baseline", *(w for w in args.ways or WAYS if w != "baseline")]
    settings = {"prompts": args.prompts, "steps": STEPS, "guidance": GUIDANCE, "seed": SEED}
    result: dict[str, Any] = {
        "schema": 1,
        "suite": "methods",
        "date": today,
        "command": "python -m benchmarks.methods",
        "environment": {**environment(), "threads": args.threads},
        "settings": {**settings, "ways": ways},
        "weights": {f.parent.name: digest(f) for f in sorted(args.models.glob("*/model.safetensors"))},
        "rows": [],
    }
    if out.exists():
        before = json.loads(out.read_text())
        same = {**before["settings"], "ways": ways} == result["settings"]
        if not args.page and (not same or before["weights"] != result["weights"]):
            parser.error(f"{out} holds a result of other settings or weights; remove it or name another")
        before["settings"]["ways"] = [w for w in WAYS if w in {*ways, *before["settings"]["ways"]}]
        before.setdefault("went_on", []).append({**result["environment"], "date": today})
        result = before
    wanted = prompts(result["settings"]["prompts"], SEED)
    spawned = multiprocessing.get_context("spawn")
    todo = [] if args.page else list(missing(result, len(wanted)))
    with spawned.Pool(args.jobs, Judge.begin, (args.models, args.threads)) as pool:
        jobs = [(*wanted[n], SEED * 1000 + n, ways) for n, ways in todo]
        for (n, _), row in zip(todo, pool.imap(Judge.row, jobs), strict=True):
            kept = result["rows"][n]["ways"] if n < len(result["rows"]) else {}
            if kept:  # seconds of another time are not held against the baseline's of then
                row["ways"] = {w: {**x, "attention_s": None} for w, x in row["ways"].items()}
            row["ways"] = {w: x for w in WAYS if (x := kept.get(w) or row["ways"].get(w))}
            result["rows"][n:] = [row, *result["rows"][n + 1 :]]
            write(out, result)
            print(n + 1, methods_page.progress(result["rows"][: n + 1]), flush=True)
    methods_page.write(out, result)
    tiny = load(args.models)
    clips = {w: [clip_of(tiny, wanted[n][1], SEED * 1000 + n, w, result) for n in SHOWN] for w in SHEET}
    methods_page.draw(out, result, clips, [wanted[n][1].caption() for n in SHOWN])


def missing(result: dict[str, Any], count: int) -> Iterator[tuple[int, list[str]]]:
    """Yield each prompt's number and the ways it has not been judged by, beside the baseline."""
    for n in range(count):
        there = result["rows"][n]["ways"] if n < len(result["rows"]) else {}
        new = [w for w in result["settings"]["ways"] if w not in there]
        if new:
            likes = [like for w in new if (like := WAYS[w].like) in WAYS]
            yield n, [w for w in WAYS if w == "baseline" or w in {*new, *likes}]


#: What the contact sheet shows: ways, and prompts by number.
SHEET = ("baseline", "lpl", "lpl reference", "lpl leap 2", "fewer steps", "tdtm 50%", "lpl + tdtm 25%")
SHOWN = (0, 1, 2, 3)


@torch.inference_mode()
def clip_of(tiny: Tiny, scene: Scene, seed: int, label: str, result: dict[str, Any]) -> np.ndarray:
    """Return the clip of one way again."""
    way = WAYS[label]
    row = next(r for r in result["rows"] if r["seed"] == seed)
    steps = row["ways"][label]["passes"] if way.like else STEPS
    return decode(tiny, denoise(tiny, scene.caption(), seed, way, steps)[0])[0]


def digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    main()
