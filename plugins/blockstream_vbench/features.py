"""Score by features and flow of the user's own making: a folder `features` beside the videos.

One safetensors file a video, of its name: `dino` and `clip_b32` [frames, n], `clip_l14` [frames, n], `flow`
[pairs, 2, h, w] between frames at 8 fps, `interpolated` [frames, H, W, 3] uint8. What is there is scored.
`aesthetic.safetensors` holds LAION's linear head: `weight` [n] and `bias`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from blockstream.errors import ConfigError
from blockstream.report.frames import read_frames
from blockstream.system import regular

from . import formulas

FOLDER = "features"
HEAD = "aesthetic.safetensors"


def scores_of(video: Path) -> dict[str, float]:
    """Return the scores that a video's features allow, by dimension; none where it has no features.

    Raises ConfigError for a file that cannot be read or features of another shape.
    """
    path = video.parent / FOLDER / f"{video.stem}.safetensors"
    if not path.is_file():
        return {}
    features = _read(path)
    made: dict[str, Callable[[], float]] = {}
    if "dino" in features:
        made["subject_consistency"] = lambda: formulas.consistency(features["dino"])[0]
    if "clip_b32" in features:
        made["background_consistency"] = lambda: formulas.consistency(features["clip_b32"])[0]
    if "clip_l14" in features:
        head = _read(path.parent / HEAD)
        made["aesthetic_quality"] = lambda: formulas.aesthetic(
            features["clip_l14"], head["weight"], float(head["bias"].reshape(()))
        )
    if "flow" in features:
        made["dynamic_degree"] = lambda: _moves(features["flow"])
    if "interpolated" in features:
        made["motion_smoothness"] = lambda: formulas.smoothness(
            np.stack(list(read_frames(video))), features["interpolated"]
        )
    try:
        return {name: make() for name, make in made.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{path}: {error}; the shapes are those the plugin's page names") from error


def _moves(flow: Any) -> float:
    pairs, _, height, width = flow.shape
    return float(formulas.moves(formulas.flow_scores(flow), pairs + 1, height, width))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        regular.check(path)
        found: Mapping[str, Any] = load_file(path)
    except (OSError, SafetensorError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return found
