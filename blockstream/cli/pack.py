"""`blockstream pack SRC DST`: write a checkpoint as one aligned file a segment."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("src", type=Path, metavar="SRC", help="a checkpoint's folder or file")
    parser.add_argument("dst", type=Path, metavar="DST", help="the folder to write, or to go on with")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="convert; as in SRC otherwise")
    parser.add_argument(
        "--model", metavar="ARCH", help="the architecture, where SRC's config.json does not say it"
    )


def run(args: argparse.Namespace) -> int:
    """Write the pack; asked again after an interruption, go on with it."""
    from blockstream.budget import format_nbytes
    from blockstream.checkpoint import Checkpoint
    from blockstream.checkpoint.pack import pack
    from blockstream.nn.architectures import CONFIG, find, of_folder
    from blockstream.nn.spec import segment_tensors

    source = Checkpoint.open(args.src)
    folder = args.src if args.src.is_dir() else args.src.parent
    architecture = find(args.model) if args.model else of_folder(folder)
    segments = segment_tensors(architecture.module(), source)
    shown = sys.stderr.isatty()

    def on_segment(name: str, done: int, of: int) -> None:
        if shown:
            print(f"\r{done} of {of}: {name:60.60}", end="", file=sys.stderr, flush=True)

    manifest = pack(source, args.dst, segments, args.dtype, on_segment=on_segment)
    if shown:
        print(file=sys.stderr)
    for extra in sorted(folder.iterdir()):
        is_config = extra.suffix in (".json", ".model", ".txt") and "index" not in extra.name
        if (
            is_config
            and extra.is_file()
            and not (args.dst / extra.name).exists()
            and extra.name != "synthetic.json"
        ):
            shutil.copy(extra, args.dst / extra.name)
    nbytes = Checkpoint.open(args.dst).nbytes
    print(f"{args.dst}: {len(manifest.segments)} segments, {format_nbytes(nbytes)}")
    assert (args.dst / CONFIG).exists() or not (folder / CONFIG).exists()
    return 0
