"""Two runs of the same prompts, video by video: how far the second is from the first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from blockstream.errors import ConfigError
from blockstream.report import measures
from blockstream.report.frames import read_frames
from blockstream.report.record import RunRecord
from blockstream.system import regular

LATENTS = "latents.safetensors"
#: The measures of a pair by name, in the order they are shown, and how many digits of each.
SHOWN = {
    "psnr_db": 1,
    "ssim": 4,
    "flicker_a": 4,
    "flicker_b": 4,
    "motion_a": 2,
    "motion_b": 2,
    "latent_cosine": 4,
}


@dataclass(frozen=True)
class Pair:
    """One result of both runs. What could not be measured is None in `measured`, and `remark` says why."""

    prompt: str
    a: Path
    b: Path
    measured: dict[str, float | None]
    remark: str = ""

    @property
    def equal(self) -> bool:
        """Return whether every pixel is the same."""
        return self.measured.get("psnr_db") == math.inf


def paired(a: RunRecord, b: RunRecord) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """Return (prompt, file, file) of what both runs made of the same prompt, and remarks on the rest.

    Raises ConfigError where there is nothing to compare.
    """
    mine, theirs = _by_prompt(a), _by_prompt(b)
    both = [(prompt, mine[key], theirs[key]) for key in mine if key in theirs for prompt in (key[0],)]
    if not both:
        raise ConfigError(
            f"{a.folder} and {b.folder} have no result of the same prompt: {len(mine)} and {len(theirs)} "
            "results"
        )
    remarks = [
        f"{len(alone)} results of {record.name} alone are left out"
        for record, alone in ((a, mine.keys() - theirs.keys()), (b, theirs.keys() - mine.keys()))
        if alone
    ]
    return both, remarks


def measure(prompt: str, a: Path, b: Path) -> Pair:
    """Return a pair measured. Raises ConfigError for files that cannot be read."""
    sizes = [_size(path) for path in (a, b)]
    found: dict[str, float | None] = dict.fromkeys(SHOWN)
    remark = ""
    if sizes[0] == sizes[1]:
        found["psnr_db"] = measures.psnr(read_frames(a), read_frames(b))
        found["ssim"] = measures.ssim(read_frames(a), read_frames(b))
    else:
        remark = f"frames are {_said(sizes[0])} and {_said(sizes[1])}: not compared pixel by pixel"
    for side, path, size in (("a", a, sizes[0]), ("b", b, sizes[1])):
        if size[0] > 1:
            found[f"flicker_{side}"] = measures.flicker(read_frames(path))
            found[f"motion_{side}"] = measures.motion(read_frames(path))
    found["latent_cosine"] = _latents(a, b)
    return Pair(prompt, a, b, found, remark)


def medians(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """Return the median of each measure over the pairs that have it."""
    found = {name: [v for p in pairs if (v := p.measured[name]) is not None] for name in SHOWN}
    return {name: median(values) if values else None for name, values in found.items()}


def rows(pairs: Sequence[Pair]) -> list[list[str]]:
    """Return the table of pairs, its head first, its medians last where there are several."""
    shown = [name for name in SHOWN if any(p.measured[name] is not None for p in pairs)]
    table = [["prompt", *shown], *([p.prompt, *_row(p.measured, shown)] for p in pairs)]
    if len(pairs) > 1:
        table.append([f"median of {len(pairs)}", *_row(medians(pairs), shown)])
    return table


def as_json(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Return the pairs as JSON has them: what is infinite is null, and `equal` true."""
    return [
        {
            "prompt": p.prompt,
            "files": [str(p.a), str(p.b)],
            "equal": p.equal,
            **{k: None if v is None or math.isinf(v) else v for k, v in p.measured.items()},
            **({"remark": p.remark} if p.remark else {}),
        }
        for p in pairs
    ]


def _row(measured: dict[str, float | None], shown: Sequence[str]) -> list[str]:
    return [_text(measured[name], SHOWN[name]) for name in shown]


def _text(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return "equal" if math.isinf(value) else f"{value:.{digits}f}"


def _by_prompt(record: RunRecord) -> dict[tuple[str, int], Path]:
    """Return a run's results by prompt; the same prompt twice is told apart by which it is."""
    prompts = (record.report.get("output") or {}).get("prompts") or []
    seen: Counter[str] = Counter()
    found = {}
    for k, path in enumerate(record.results):
        prompt = str(prompts[k]) if k < len(prompts) else path.relative_to(record.folder).as_posix()
        found[prompt, seen[prompt]] = path
        seen[prompt] += 1
    return found


def _latents(a: Path, b: Path) -> float | None:
    """Return the cosine of the latents beside two results, None where there are none of one shape."""
    paths = [path.parent / LATENTS for path in (a, b)]
    if not all(path.is_file() for path in paths):
        return None
    try:
        for path in paths:
            regular.check(path)
        x, y = (load_file(path) for path in paths)
    except (OSError, SafetensorError, TypeError, KeyError):
        return None
    names = sorted(x.keys() & y.keys())
    if not names or any(x[n].shape != y[n].shape for n in names):
        return None
    return measures.cosine(*(np.concatenate([v[n].reshape(-1) for n in names]) for v in (x, y)))


def _size(path: Path) -> tuple[int, int, int]:
    """Return a result's frames, height and width. Raises ConfigError for one without frames."""
    count, height, width = 0, 0, 0
    for frame in read_frames(path):
        count, (height, width) = count + 1, frame.shape[:2]
    if not count:
        raise ConfigError(f"{path}: no frames in it")
    return count, height, width


def _said(size: tuple[int, int, int]) -> str:
    return f"{size[0]} of {size[1]}x{size[2]}"
