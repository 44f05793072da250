"""The scores of one folder of videos: each video's own, and the means of each category."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dimensions import BY_NAME, DIMENSIONS, quality, quality_as_in_table
from .formulas import average

ALL = "all"
#: Dimensions whose mean weighs each video by the frames compared.
BY_FRAMES = ("subject_consistency", "background_consistency")
_NAME = re.compile(r"(?P<prompt>.+)-(?P<sample>\d+)")


@dataclass(frozen=True)
class Video:
    """One video: its prompt, category, how many frames it has, and its scores by dimension so far."""

    path: Path
    prompt: str
    category: str
    frames: int
    scores: dict[str, float] = field(default_factory=dict)


def prompt_of(path: Path) -> str:
    """Return the prompt in a video's name."""
    match = _NAME.fullmatch(path.stem)
    return match["prompt"] if match else path.stem


def means(videos: Iterable[Video]) -> dict[str, float]:
    """Return each dimension's mean over the videos that all have it."""
    videos = list(videos)
    found = {}
    for name in BY_NAME:
        if videos and all(name in v.scores for v in videos):
            weights = [v.frames - 1 for v in videos] if name in BY_FRAMES else None
            found[name] = average([v.scores[name] for v in videos], weights)
    return found


def by_category(videos: Iterable[Video]) -> dict[str, dict[str, float]]:
    """Return the means of each category, in order, and of all where there are several."""
    videos = list(videos)
    categories = list(dict.fromkeys(v.category for v in videos))
    found = {c: means(v for v in videos if v.category == c) for c in categories}
    return found if len(found) < 2 else {**found, ALL: means(videos)}


def table(named: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[list[str]]:
    """Return a row for each category and folder: the scores, and both quality scores."""
    rows = [["category", "videos of", *(d.short for d in DIMENSIONS), "quality", "as in Table 6"]]
    categories = list(dict.fromkeys(c for scores in named.values() for c in scores))
    for category in categories:
        for name, scores in named.items():
            if category in scores:
                mine = scores[category]
                totals = (quality(mine), quality_as_in_table(mine))
                shown = [mine.get(d.name) for d in DIMENSIONS]
                rows.append([category, name, *(_text(x) for x in (*shown, *totals))])
    return rows


def as_json(videos: Iterable[Video]) -> dict[str, Any]:
    """Return the scores as JSON has them."""
    videos = list(videos)
    return {
        "categories": {
            name: {"scores": scores, "quality": quality(scores), "as_in_table6": quality_as_in_table(scores)}
            for name, scores in by_category(videos).items()
        },
        "videos": [{"file": v.path.name, "category": v.category, **v.scores} for v in videos],
    }


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
