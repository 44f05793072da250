"""`blockstream export coreml CONFIG --out DIR`: write every segment of a pipeline as a Core ML package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blockstream.cli.common import add_config, add_json, load_config, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "write every segment of a pipeline as a Core ML package, and a manifest"
    add_config(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--preset",
        dest="presets",
        metavar="FRAMESxHEIGHTxWIDTH",
        action="append",
        default=[],
        help="a size to export, e.g. 51x256x256; may be repeated; the config's own otherwise",
    )
    parser.add_argument(
        "--flexible",
        action="store_true",
        help="one function whose shapes range over all presets; slower on devices than one for each",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="of STDiT3's products; norms, sums, T5 and the VAE are fp32 (default: fp32)",
    )
    parser.add_argument(
        "--int8",
        metavar="NETWORK",
        nargs="*",
        choices=("t5", "dit"),
        help="hold the weights of products in int8, a scale for each row: t5 (where none is named), dit",
    )
    parser.add_argument(
        "--target",
        choices=("iOS18", "macOS15", "iOS17", "macOS14"),
        default="iOS18",
        help="oldest system that runs it; before iOS18 and macOS15 each function is a package of its own",
    )
    add_json(parser, "the manifest")


def run(args: argparse.Namespace) -> int:
    """Export; asked again after an interruption, go on."""
    config = load_config(args.config, args.sets)

    from movd_coreml.convert import Form
    from movd_coreml.export import Settings, export
    from movd_coreml.networks import What, parse_size

    int8 = () if args.int8 is None else tuple(sorted(set(args.int8))) or ("t5",)
    settings = Settings(
        What(tuple(parse_size(text) for text in args.presets), args.flexible),
        Form(args.target, args.precision),
        int8,
    )
    made = export(config, args.out, settings, _show if sys.stderr.isatty() else _print)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if args.json:
        print_json(made.manifest.model_dump(mode="json"))
        return 0

    from blockstream.budget.amounts import format_nbytes

    manifest = made.manifest
    nbytes = sum(item.nbytes for item in (*manifest.packages, *manifest.tables))
    sizes = ", ".join(preset.name for preset in manifest.presets)
    print(f"{args.out}: {len(manifest.segments)} segments for {sizes}, {format_nbytes(nbytes)}")
    print(f"compare it with the networks: blockstream verify coreml {args.out}")
    return 0


def _show(name: str, done: int, of: int) -> None:
    print(f"\r{done} of {of}: {name:40.40}", end="", file=sys.stderr, flush=True)


def _print(name: str, done: int, of: int) -> None:
    print(f"{done} of {of}: {name}", file=sys.stderr, flush=True)
