"""Draw the captioned videos that the tiny model learns from.

A video shows one shape of one colour that moves in one way, slowly or quickly, on a plain
background: 4 shapes x 6 colours x 8 motions x 2 speeds x 3 backgrounds, 64 x 64 pixels, 51 frames at
24 frames a second. Paths are centred, and sizes and positions vary by little more than a pixel: a
model of two million parameters then spends its capacity on what the caption says.

Everything is a pure function of a seed. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SIZE = 64
FRAMES = 51
FPS = 24

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 80, 235),
    "yellow": (240, 210, 40),
    "purple": (165, 45, 200),
    "cyan": (50, 210, 225),
}
MOTIONS = {
    "right": "moving right",
    "left": "moving left",
    "up": "moving up",
    "down": "moving down",
    "growing": "growing",
    "shrinking": "shrinking",
    "circling": "moving in a circle",
    "bouncing": "bouncing up and down",
}
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = {"black": (12, 12, 12), "gray": (118, 118, 118), "white": (243, 243, 243)}

TRAVEL = {"slowly": 13.0, "quickly": 28.0}  # pixels from first to last frame
RADII = {"slowly": (9.0, 13.0), "quickly": (7.3, 16.0)}  # pixels, growing; shrinking is the reverse
TURNS = {"slowly": 1.0, "quickly": 2.0}  # in a circle of ORBIT pixels, from the top, clockwise
BOUNCES = {"slowly": 1.5, "quickly": 3.0}  # arcs of HOP pixels
ORBIT = 9.0
HOP = 18.0

# Tips, outer and inner radius of each shape in units of its nominal radius: areas are then alike.
_POLYGONS = {
    "square": (4, 1.25, 1.25 * np.cos(np.pi / 4)),
    "triangle": (3, 1.45, 0.725),
    "star": (5, 1.5, 0.66),
}


@dataclass(frozen=True)
class Scene:
    """Name what one video shows; every field is a key of the tables above."""

    shape: str
    colour: str
    motion: str
    speed: str
    background: str

    def caption(self, background: bool = True) -> str:
        """Return the sentence that describes the scene, with or without its background."""
        words = f"a {self.colour} {self.shape} {MOTIONS[self.motion]} {self.speed}"
        return f"{words} on a {self.background} background" if background else words

    @property
    def combination(self) -> tuple[str, str, str]:
        """Return (shape, colour, motion), the unit that is held out of training."""
        return self.shape, self.colour, self.motion


def held_out() -> frozenset[tuple[str, str, str]]:
    """Return the 16 of 192 combinations that no DiT training video shows.

    Two for each motion; each shape four times; each colour two or three times.
    """
    colours = tuple(COLOURS)
    chosen = set()
    for i, motion in enumerate(MOTIONS):
        chosen.add((SHAPES[i % 4], colours[i % 6], motion))
        chosen.add((SHAPES[(i + 2) % 4], colours[(i + 3) % 6], motion))
    return frozenset(chosen)


def scenes(held: bool | None = None) -> list[Scene]:
    """Return every scene: all, only held-out ones (True), or only the others (False)."""
    out = held_out()
    return [
        scene
        for shape in SHAPES
        for colour in COLOURS
        for motion in MOTIONS
        for speed in SPEEDS
        for background in BACKGROUNDS
        if (scene := Scene(shape, colour, motion, speed, background))
        and (held is None or (scene.combination in out) == held)
    ]


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Return how much of each pixel the shape covers, float32 [n, size, size] in 0..1.

    x, y, radius: [n], in pixels; (x, y) is the centroid. Edges are one pixel soft.
    """
    return np.clip(0.5 - _distance(shape, x, y, radius, size), 0, 1)


def unit_area(shape: str) -> float:
    """Return the area of the shape of radius 1."""
    if shape == "circle":
        return np.pi
    tips, outer, inner = _POLYGONS[shape]
    return float(tips * outer * inner * np.sin(np.pi / tips))


def near(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, margin: float = 2.0) -> np.ndarray:
    """Return which pixels lie inside the shape or within `margin` of it, bool [n, SIZE, SIZE]."""
    return _distance(shape, x, y, radius, SIZE) < margin


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """Return the signed distance to the outline, negative inside; tips fold into one edge."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    dx = grid[None, None, :] - np.asarray(x, np.float32)[:, None, None]
    dy = grid[None, :, None] - np.asarray(y, np.float32)[:, None, None]
    r = np.asarray(radius, np.float32)[:, None, None]
    rho = np.sqrt(dx * dx + dy * dy)
    if shape == "circle":
        return rho - r
    tips, outer, inner = _POLYGONS[shape]
    half = np.pi / tips
    first_tip = np.pi / 4 if shape == "square" else -np.pi / 2  # a square lies flat, the others point up
    angle = np.abs(np.mod(np.arctan2(dy, dx) - first_tip + half, 2 * half) - half)
    px, py = rho * np.cos(angle), rho * np.sin(angle)
    tip, notch = np.array([outer, 0.0]), inner * np.array([np.cos(half), np.sin(half)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    return ((px - tip[0] * r) * edge[1] - (py - tip[1] * r) * edge[0]).astype(np.float32)


def path(
    scene: Scene, rng: np.random.Generator, frames: int = FRAMES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return centroid x, y and radius for each frame, in pixels, float64 [frames] each."""
    u = np.linspace(0, 1, frames)
    x, y = (SIZE / 2 + rng.uniform(-1.5, 1.5) + np.zeros(frames) for _ in range(2))
    radius = rng.uniform(9.6, 10.4) + np.zeros(frames)
    stretch = rng.uniform(0.96, 1.04)
    travel = TRAVEL[scene.speed] * stretch * (u - 0.5)
    if scene.motion == "right":
        x += travel
    elif scene.motion == "left":
        x -= travel
    elif scene.motion == "down":
        y += travel
    elif scene.motion == "up":
        y -= travel
    elif scene.motion in ("growing", "shrinking"):
        small, large = RADII[scene.speed]
        radius = (small + (large - small) * u) * stretch
        radius = radius if scene.motion == "growing" else radius[::-1]
    elif scene.motion == "circling":
        angle = 2 * np.pi * TURNS[scene.speed] * u
        x += ORBIT * stretch * np.sin(angle)
        y -= ORBIT * stretch * np.cos(angle)
    else:
        y += HOP * stretch * (0.5 - np.abs(np.sin(np.pi * BOUNCES[scene.speed] * u)))
    return x, y, radius


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw one video, uint8 [FRAMES, SIZE, SIZE, 3]."""
    return paint(scene, coverage(scene.shape, *path(scene, rng)))


def paint(scene: Scene, cover: np.ndarray) -> np.ndarray:
    """Blend the scene's colours by coverage [n, h, w] into uint8 [n, h, w, 3]."""
    fore, back = (np.array(c, np.float32) for c in (COLOURS[scene.colour], BACKGROUNDS[scene.background]))
    return np.rint(back + cover[..., None] * (fore - back)).astype(np.uint8)


def single_frames(seed: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield endless batches of frames, uint8 [batch, SIZE, SIZE, 3], and where `near` holds.

    All combinations take part: what is held out is held from the DiT, which learns what words mean.
    """
    rng = np.random.default_rng(seed)
    everything = scenes()
    while True:
        images, masks = [], []
        for _ in range(batch):
            scene = everything[rng.integers(len(everything))]
            at = rng.integers(FRAMES)
            x, y, radius = (v[at : at + 1] for v in path(scene, rng))
            images.append(paint(scene, coverage(scene.shape, x, y, radius)))
            masks.append(near(scene.shape, x, y, radius))
        yield np.concatenate(images), np.concatenate(masks)
