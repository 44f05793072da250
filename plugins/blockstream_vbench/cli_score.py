"""`blockstream vbench score FOLDERS...`: score prepared folders, by one's own VBench or by our formulas."""

from __future__ import annotations

import argparse
from pathlib import Path

from blockstream.cli.common import add_json, print_json
from blockstream.errors import ConfigError
from blockstream.report.frames import read_frames
from blockstream.system.atomic import write_json

from . import external, features
from .cli_prepare import read_categories
from .dimensions import BY_NAME, DIMENSIONS
from .formulas import flicker
from .scores import ALL, Video, as_json, by_category, prompt_of, table

NOTE = (
    "quality is VBench's Quality Score as published; the last column is that of the paper's Table 6, where "
    "dynamic degree counts whole in the sum but not in the divisor"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = """Score the videos of prepared folders. Temporal flickering needs nothing; the other
        dimensions need your own VBench environment and its weights, or features beside the videos."""
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="what `vbench prepare` made")
    parser.add_argument(
        "--vbench", metavar="PYTHON", type=Path, help="the python of an environment with vbench 0.1.5"
    )
    parser.add_argument("--device", default="cpu", help="where vbench computes: cpu (default) or cuda")
    parser.add_argument(
        "--dimension",
        metavar="NAME",
        action="append",
        choices=list(BY_NAME),
        help="one alone; may be repeated",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="write the scores, each video's too, as JSON"
    )
    parser.add_argument("--figure", metavar="FILE", type=Path, help="draw the categories, such as vbench.png")
    add_json(parser, "the scores")


def run(args: argparse.Namespace) -> int:
    """Score each folder, print one table, say what is missing."""
    if args.figure is not None and args.figure.suffix not in (".png", ".svg"):
        raise ConfigError(f"--figure {args.figure}: name a .png or .svg file")
    names = [folder.resolve().name for folder in args.folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in args.folders]
    wanted = [d.name for d in DIMENSIONS if not args.dimension or d.name in args.dimension]
    scored = {n: score(f, wanted, args.vbench, args.device) for n, f in zip(names, args.folders, strict=True)}
    report = {"schema": 1, "note": NOTE, "folders": {name: as_json(v) for name, v in scored.items()}}
    if args.out is not None:
        write_json(args.out, report)
    by_name = {name: by_category(videos) for name, videos in scored.items()}
    if args.figure is not None:
        from .figure import draw

        draw(by_name, args.figure)
    if args.json:
        print_json(report)
        return 0
    _print(table(by_name))
    for line in _missing([v for videos in scored.values() for v in videos], wanted, args.vbench):
        print(line)
    return 0


def score(folder: Path, wanted: list[str], python: Path | None, device: str) -> list[Video]:
    """Return the videos of a folder with the scores that can be had, by VBench where it was named."""
    found = sorted(folder.glob("*.mp4"))
    if not found:
        raise ConfigError(f"{folder}: no videos here; `blockstream vbench prepare` makes such a folder")
    categories = read_categories(folder)
    videos = [_video(path, categories.get(prompt_of(path), ALL), wanted) for path in found]
    if python is not None:
        asked = [BY_NAME[name] for name in wanted if not external.missing(BY_NAME[name])]
        results = external.evaluate(python, folder, asked, device) if asked else {}
        for name, of in results.items():
            for video in videos:
                if video.path.name in of:
                    video.scores[name] = of[video.path.name]
    return videos


def _video(path: Path, category: str, wanted: list[str]) -> Video:
    frames = 0

    def counted():  # type: ignore[no-untyped-def]
        nonlocal frames
        for frame in read_frames(path):
            frames += 1
            yield frame

    try:
        value = flicker(counted())
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    own = {"temporal_flickering": value, **features.scores_of(path)}
    return Video(path, prompt_of(path), category, frames, {k: v for k, v in own.items() if k in wanted})


def _missing(videos: list[Video], wanted: list[str], python: Path | None) -> list[str]:
    """Return what to do for each dimension that some video has no score of."""
    lines = []
    for name in wanted:
        without = sum(name not in v.scores for v in videos)
        if not without:
            continue
        files = [str(path) for path in external.missing(BY_NAME[name])]
        python_too = "" if python is not None else " and your VBench's python (--vbench)"
        if files:
            what = f"needs {' and '.join(files)}{python_too}"
        else:
            what = f"needs{python_too.removeprefix(' and')}" if python_too else "vbench gave none"
        lines.append(f"{name}: no score for {without} of {len(videos)} videos; {what}")
    return lines


def _print(rows: list[list[str]]) -> None:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        cells = [
            c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print(NOTE)
