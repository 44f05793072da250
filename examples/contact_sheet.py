"""Draw a contact sheet and an animation of the videos a run made.

blockstream run movd.yaml --out out/movd
python examples/contact_sheet.py out/movd docs/images
"""

import json
import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

SHOWN = 6  # frames of a video on the sheet
ZOOM = 2
MARGIN, TEXT = 8, 18


def frames_of(path: Path) -> np.ndarray:
    """Return the frames [T, H, W, 3] of an mp4."""
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def enlarged(frame: np.ndarray) -> Image.Image:
    """Return a frame at the size it is shown."""
    height, width = frame.shape[:2]
    return Image.fromarray(frame).resize((width * ZOOM, height * ZOOM), Image.Resampling.NEAREST)


def sheet(clips: list[np.ndarray], prompts: list[str]) -> Image.Image:
    """Return one row of frames a clip, its prompt above it, in two columns."""
    height, width = (n * ZOOM for n in clips[0].shape[1:3])
    wide, high = SHOWN * width + MARGIN, height + TEXT + MARGIN
    rows = -(-len(clips) // 2)
    page = Image.new("RGB", (2 * wide + MARGIN, rows * high + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    for n, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        x, y = MARGIN + (n % 2) * wide, MARGIN + n // 2 * high
        pen.text((x, y), prompt, fill="black", font_size=13)
        for k, i in enumerate(np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)):
            page.paste(enlarged(clip[i]), (x + k * width, y + TEXT))
    return page


def animation(clips: list[np.ndarray]) -> list[Image.Image]:
    """Return every second frame of all clips side by side, five a row."""
    height, width = (n * ZOOM for n in clips[0].shape[1:3])
    rows = -(-len(clips) // 5)
    pages = []
    for i in range(0, min(map(len, clips)), 2):
        page = Image.new("RGB", (5 * (width + 2), rows * (height + 2)), "white")
        for n, clip in enumerate(clips):
            page.paste(enlarged(clip[i]), (n % 5 * (width + 2), n // 5 * (height + 2)))
        pages.append(page.quantize(128))
    return pages


def main() -> None:
    """Draw both."""
    run, to = Path(sys.argv[1]), Path(sys.argv[2])
    output = json.loads((run / "report.json").read_text())["output"]
    clips = [frames_of(run / file) for file in output["files"]]
    to.mkdir(parents=True, exist_ok=True)
    sheet(clips, output["prompts"]).quantize(256).save(to / "contact-sheet.png", optimize=True)
    first, *rest = animation(clips)
    first.save(to / "videos.gif", save_all=True, append_images=rest, duration=83, loop=0, optimize=True)


if __name__ == "__main__":
    main()
