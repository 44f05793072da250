"""`blockstream pack SRC DST`: write a checkpoint as one aligned file a segment."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blockstream.system import regular

if TYPE_CHECKING:
    from blockstream.checkpoint.read.manifest import Rounded

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: The most matrices whose errors are printed.
MOST_LINES = 12
#: The small files of a model's folder that a pack takes along; the weights' index is none of them.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "*preprocessor_config.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("src", type=Path, metavar="SRC", help="a checkpoint's folder or file")
    parser.add_argument("dst", type=Path, metavar="DST", help="the folder to write, or to go on with")
    parser.add_argument("--dtype", choices=(*DTYPES, "int8"), help="convert; as in SRC otherwise")
    parser.add_argument(
        "--model", metavar="ARCH", help="the architecture, where SRC's config.json does not say it"
    )


def run(args: argparse.Namespace) -> int:
    """Write the pack; asked again after an interruption, go on with it."""
    from blockstream.budget.amounts import format_nbytes
    from blockstream.checkpoint import Checkpoint
    from blockstream.checkpoint.write.packer import pack
    from blockstream.module.architectures import find, of_folder
    from blockstream.module.spec import packing

    source = Checkpoint.open(args.src)
    folder = args.src if args.src.is_dir() else args.src.parent
    architecture = find(args.model) if args.model else of_folder(folder)
    what = packing(architecture.module(), source, args.dtype)
    shown = sys.stderr.isatty()

    def on_segment(name: str, done: int, of: int) -> None:
        if shown:
            print(f"\r{done} of {of}: {name:60.60}", end="", file=sys.stderr, flush=True)

    manifest = pack(
        source,
        args.dst,
        what.segments,
        args.dtype,
        float32=what.float32,
        int8=what.int8,
        made=what.made,
        beside=_small_files(folder, args.dtype),
        on_segment=on_segment,
    )
    if shown:
        print(file=sys.stderr)
    nbytes = Checkpoint.open(args.dst).nbytes
    print(f"{args.dst}: {len(manifest.segments)} segments, {format_nbytes(nbytes)}")
    if errors := [one for segment in manifest.segments for one in segment.int8]:
        _print_errors(errors)
    return 0


def _print_errors(errors: Sequence[Rounded]) -> None:
    """Print what int8 lost: the matrices that lost most, each one's errors are in the manifest."""
    print(
        f"int8: {len(errors)} matrices; worst error in parts of the largest weight, rms in parts of the rms:"
    )
    rows = sorted(errors, key=lambda e: -e.rms)
    width = max(len(e.name) for e in rows[:MOST_LINES])
    for e in rows[:MOST_LINES]:
        print(f"  {e.name:{width}}  worst {e.worst:.5f}  rms {e.rms:.5f}")
    if more := rows[MOST_LINES:]:
        print(f"  {len(more)} more lost less, rms down to {more[-1].rms:.5f}; the manifest has them")


def _small_files(folder: Path, dtype: str | None) -> dict[str, bytes]:
    """Return config and tokenizer to lie beside the pack, so that it is opened as its source is."""
    found = {path.name: path for pattern in SMALL_FILES for path in sorted(folder.glob(pattern))}
    files = {name: _read(path) for name, path in found.items() if not path.is_dir()}
    if "config.json" in files and dtype in DTYPES:
        files["config.json"] = _with_dtype(files["config.json"], dtype)
    return files


def _read(path: Path) -> bytes:
    from blockstream.checkpoint.read.entries import unreadable

    try:
        return regular.read_bytes(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """Return a config.json that names the dtype the weights are now in, if it named one."""
    settings = json.loads(config)
    changed = {key: DTYPES[dtype] for key in ("dtype", "torch_dtype") if settings.get(key)}
    return json.dumps({**settings, **changed}, indent=2).encode() + b"\n" if changed else config
