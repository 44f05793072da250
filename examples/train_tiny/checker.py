"""Read off a video what it shows, by classical vision, frame by frame.

A judge that shares nothing with the model but the tables of `data`: background from the border,
shape by the best overlap with four templates of equal area and centroid, colour from the core,
motion and speed from the track of the centroid and the size. Labels belong to frames: a clip counts
as a red circle only when at least `STEADY` of its frames do. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.train_tiny import data
from examples.train_tiny.data import Scene

STEADY = 0.9  # share of frames that must carry a label
CONTRAST = 45.0  # least RGB distance between shape and background
COLOUR_REACH = 75.0  # greatest RGB distance to a named colour
OVERLAP = 0.7  # least intersection over union with the best template
UNNAMED = "?"

# Bounds that tell speeds and motions apart, halfway between what `data` draws.
GROWS, GROWS_QUICKLY = 0.18, 0.575  # change of ln(radius) over the clip
MOVES, MOVES_QUICKLY, STRAIGHT = 6.5, 20.0, 2.5  # pixels: net path, and residual of a straight line
SWAYS = 3.0  # pixels: residual of a path that is no line
FOLLOWS = 0.8  # least correlation with a bouncing or circling path


@dataclass(frozen=True)
class Reading:
    """Hold what each frame shows and how the clip moves; `UNNAMED` where nothing fits."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    motion: str
    speed: str

    def judge(self, scene: Scene) -> dict[str, bool]:
        """Return which attributes of `scene` the clip shows in at least `STEADY` of its frames."""
        return {
            "shape": _share(self.shapes, scene.shape) >= STEADY,
            "colour": _share(self.colours, scene.colour) >= STEADY,
            "motion": self.motion == scene.motion,
            "speed": self.speed == scene.speed,
            "background": _share(self.backgrounds, scene.background) >= STEADY,
        }


def read(frames: np.ndarray) -> Reading:
    """Read a clip, uint8 [T, SIZE, SIZE, 3].

    Raises ValueError for another size: the templates and bounds are in pixels.
    """
    if frames.ndim != 4 or frames.shape[1:] != (data.SIZE, data.SIZE, 3):
        raise ValueError(f"a clip is [T, {data.SIZE}, {data.SIZE}, 3], this one is {list(frames.shape)}")
    pixels = frames.astype(np.float32)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    behind = np.median(border, axis=1)
    distance = np.linalg.norm(pixels - behind[:, None, None], axis=-1)
    peak = np.sort(distance.reshape(len(frames), -1), axis=1)[:, -40:].mean(1)  # of the 40 farthest pixels
    seen = peak > CONTRAST
    # The middle of the ramp is the outline; its ends absorb noise and uneven paint.
    share = distance / np.maximum(peak, 1e-6)[:, None, None]
    cover = np.clip((share - 0.2) / 0.6, 0, 1)
    x, y, area = _moments(cover > 0.5)
    core = share > 0.8
    colour = (pixels * core[..., None]).sum((1, 2)) / np.maximum(core.sum((1, 2)), 1)[:, None]
    shapes = _shapes(cover, x, y, area)
    motion, speed = UNNAMED, UNNAMED
    if seen.mean() >= STEADY:
        motion, speed = _motion(x[seen], y[seen], np.sqrt(area[seen]), np.linspace(0, 1, len(frames))[seen])
    return Reading(
        shapes=tuple(np.where(seen, shapes, UNNAMED)),
        colours=tuple(np.where(seen, _nearest(colour, data.COLOURS), UNNAMED)),
        backgrounds=tuple(_nearest(behind, data.BACKGROUNDS)),
        motion=motion,
        speed=speed,
    )


def _share(labels: tuple[str, ...], label: str) -> float:
    return sum(found == label for found in labels) / len(labels)


def _moments(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return centroid x, y (pixels) and area (pixels) of each mask [T, h, w]."""
    area = np.maximum(mask.sum((1, 2)), 1).astype(np.float64)
    grid = np.arange(mask.shape[1]) + 0.5
    return (mask.sum(1) @ grid) / area, (mask.sum(2) @ grid) / area, area


def _shapes(cover: np.ndarray, x: np.ndarray, y: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Return the name of the template that overlaps each frame's shape best."""
    overlaps = []
    for shape in data.SHAPES:
        template = data.coverage(shape, x, y, np.sqrt(area / data.unit_area(shape)))
        overlaps.append(np.minimum(cover, template).sum((1, 2)) / np.maximum(cover, template).sum((1, 2)))
    best = np.argmax(overlaps, axis=0)
    return np.where(np.max(overlaps, axis=0) >= OVERLAP, np.array(data.SHAPES)[best], UNNAMED)


def _nearest(colours: np.ndarray, table: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Return the name of the nearest entry of `table` to each colour [T, 3]."""
    gaps = np.linalg.norm(colours[:, None] - np.array(list(table.values()), np.float32), axis=-1)
    return np.where(gaps.min(1) <= COLOUR_REACH, np.array(list(table))[gaps.argmin(1)], UNNAMED)


def _line(values: np.ndarray, u: np.ndarray) -> tuple[float, float]:
    """Return a straight line's change over the clip, and the deviation from it."""
    slope, start = np.polyfit(u, values, 1)
    return float(slope), float(np.std(values - start - slope * u))


def _motion(x: np.ndarray, y: np.ndarray, radius: np.ndarray, u: np.ndarray) -> tuple[str, str]:
    """Return the motion and speed of a track; u is each frame's place in the clip, 0..1."""
    (dx, sway_x), (dy, sway_y) = _line(x, u), _line(y, u)
    growth, _ = _line(np.log(radius), u)
    if sway_x > SWAYS and sway_y > SWAYS:
        return _circling(x, y, u)
    if sway_y > SWAYS:
        return _bouncing(y, u)
    if max(sway_x, sway_y) > STRAIGHT:
        return UNNAMED, UNNAMED
    if abs(growth) > GROWS:
        still = max(abs(dx), abs(dy)) < MOVES
        return (
            ("growing" if growth > 0 else "shrinking", _speed(abs(growth) > GROWS_QUICKLY))
            if still
            else (UNNAMED,) * 2
        )
    long, short = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if long < MOVES or short > long / 2:
        return UNNAMED, UNNAMED
    horizontal = "right" if dx > 0 else "left"
    vertical = "down" if dy > 0 else "up"
    return horizontal if abs(dx) > abs(dy) else vertical, _speed(long > MOVES_QUICKLY)


def _circling(x: np.ndarray, y: np.ndarray, u: np.ndarray) -> tuple[str, str]:
    """Tell one turn from two by the correlation with each, whatever phase and direction."""
    x, y = x - x.mean(), y - y.mean()
    scores = {}
    for speed, turns in data.TURNS.items():
        wave = np.exp(2j * np.pi * turns * u)
        both = max(abs(np.vdot(wave, x + 1j * y)), abs(np.vdot(wave, x - 1j * y)))
        scores[speed] = both / (np.linalg.norm(wave) * np.linalg.norm(x + 1j * y))
    return _best("circling", scores)


def _bouncing(y: np.ndarray, u: np.ndarray) -> tuple[str, str]:
    """Tell slow bounces from quick ones by the correlation with each."""
    arcs = {speed: -np.abs(np.sin(np.pi * count * u)) for speed, count in data.BOUNCES.items()}
    return _best("bouncing", {speed: float(np.corrcoef(arc, y)[0, 1]) for speed, arc in arcs.items()})


def _best(motion: str, scores: dict[str, float]) -> tuple[str, str]:
    speed = max(scores, key=scores.__getitem__)
    return (motion, speed) if scores[speed] >= FOLLOWS else (UNNAMED, UNNAMED)


def _speed(quick: bool) -> str:
    return "quickly" if quick else "slowly"
