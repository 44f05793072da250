"""`blockstream vbench prepare RUNS... --to FOLDER`: name a run's videos as VBench expects them."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from blockstream.errors import ConfigError
from blockstream.report.record import read_run
from blockstream.system import regular
from blockstream.system.atomic import write_json

#: Beside the videos: the category of each prompt. VBench passes over what is no video.
CATEGORIES = "categories.json"
_FOLDER = re.compile(r"(?P<category>.+?)(-\d+-of-\d+)?")
_SAMPLE = re.compile(r"sample-(\d+)")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = """Link the videos of some folders, of `vbench run` on one machine or more, into
        one as PROMPT-0.mp4, PROMPT-1.mp4, ..., which is what VBench reads with its custom input."""
    parser.add_argument("runs", metavar="RUNS", nargs="+", type=Path, help="what `vbench run --out` wrote")
    parser.add_argument("--to", metavar="FOLDER", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--copy", action="store_true", help="copy the videos instead of linking them")


def run(args: argparse.Namespace) -> int:
    """Link every video, and say what is missing."""
    if args.to.exists() and (not args.to.is_dir() or any(args.to.iterdir())):
        raise ConfigError(f"--to {args.to}: name a folder that is new or empty")
    args.to.mkdir(parents=True, exist_ok=True)
    categories: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for sample, category, prompt, video in _videos(args.runs):
        name = args.to / f"{prompt}-{sample}.mp4"
        if name.exists():
            raise ConfigError(f"{video}: sample {sample} of {prompt!r} is there already, from another folder")
        _put(video, name, args.copy)
        categories[prompt] = category
        seen[prompt] += 1
    if not seen:
        raise ConfigError(f"no videos in {', '.join(map(str, args.runs))}; `vbench run` makes them")
    write_json(args.to / CATEGORIES, categories)
    by_category = Counter(categories.values())
    print(f"{args.to}: {seen.total()} videos of {len(seen)} prompts")
    for category, prompts in by_category.items():
        print(f"  {category}: {prompts} prompts")
    if len(set(seen.values())) > 1:
        few = [p for p in seen if seen[p] < max(seen.values())]
        print(f"{len(few)} prompts have fewer samples than others, such as {few[0]!r}")
    return 0


def _videos(roots: list[Path]) -> Iterator[tuple[int, str, str, Path]]:
    """Yield (sample, category, prompt, file) of every finished run below some folders, in order."""
    for root in roots:
        found = [p for p in sorted(root.glob("sample-*/*")) if (p / "report.json").is_file()]
        for folder in found:
            sample, category = _SAMPLE.fullmatch(folder.parent.name), _FOLDER.fullmatch(folder.name)
            if sample is None or category is None:
                continue
            record = read_run(folder)
            prompts = (record.report.get("output") or {}).get("prompts") or []
            for prompt, video in zip(prompts, record.results, strict=True):
                if video.suffix == ".mp4":
                    yield int(sample[1]), category["category"], str(prompt), video


def _put(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        try:
            os.link(source, target)
        except OSError:
            pass  # another file system, or one without links
        else:
            return
    shutil.copyfile(source, target)


def read_categories(folder: Path) -> dict[str, str]:
    """Return the category of each prompt of a prepared folder; all in one where none is said."""
    path = folder / CATEGORIES
    if not path.exists():
        return {}
    try:
        found = regular.read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a mapping of prompts to categories")
    return {str(k): str(v) for k, v in found.items()}
