"""Draw a contact sheet: one row a prompt, one frame in seven.

python -m examples.train_tiny.sheet --out docs/tiny.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from examples.train_tiny import checker, evaluate, sample

LABEL = 16  # pixels above each row


def draw(clips: list[np.ndarray], labels: list[str], zoom: int = 2) -> Image.Image:
    """Return the sheet of clips uint8 [T, h, w, 3], each row under its label."""
    rows = [np.concatenate(list(clip[::7]), axis=1).repeat(zoom, 0).repeat(zoom, 1) for clip in clips]
    height, width = rows[0].shape[:2]
    image = Image.new("RGB", (width, (height + LABEL) * len(rows)), "white")
    pen = ImageDraw.Draw(image)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pen.text((4, i * (height + LABEL) + 2), label, fill="black")
        image.paste(Image.fromarray(row), (0, i * (height + LABEL) + LABEL))
    return image


def main() -> None:
    """Sample prompts that no earlier run has seen, seen and held-out combinations in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("movd/assets/tiny"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    tiny = sample.load(args.models)
    chosen = evaluate.prompts(args.prompts, args.seed)
    seeds = [args.seed + i for i in range(len(chosen))]
    latents = sample.sample(tiny, [scene.caption() for _, scene in chosen], seeds)
    clips = sample.decode(tiny, latents)
    labels = []
    for clip, (name, scene) in zip(clips, chosen, strict=True):
        wrong = [a for a, good in checker.read(clip).judge(scene).items() if not good]
        verdict = "right" if not wrong else "wrong: " + ", ".join(wrong)
        labels.append(f"{scene.caption()} ({name.replace('_', ' ')}; {verdict})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(clips, labels).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
