"""`blockstream synth ARCH DST`: write a random checkpoint of full size."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from blockstream.errors import ConfigError

if TYPE_CHECKING:
    from blockstream.module.architectures import Architecture

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "arch", metavar="ARCH", help="a model family's name, a config.json, or a folder that has one"
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="the new folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights")
    parser.add_argument(
        "--layout", choices=("safetensors", "bin"), default="safetensors", help="kind of files to write"
    )
    parser.add_argument("--shard", metavar="SIZE", default="10GB", help="most bytes a file")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same bytes")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint, its config.json and what else its family's folders have."""
    from blockstream.budget.amounts import format_nbytes, parse_nbytes
    from blockstream.checkpoint.write.synthesis import synthesise
    from blockstream.module.architectures import find
    from blockstream.module.spec import tensor_spec

    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: write 0 or more")
    shard_nbytes = parse_nbytes(args.shard)
    architecture = find(args.arch)
    spec = tensor_spec(architecture.module(), DTYPES[args.dtype])
    note = {"architecture": architecture.name, "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as folder:
        # First, and aside: what fails here must not fail after many gigabytes.
        small = {path.name: path.read_bytes() for path in _write_small(architecture, Path(folder))}
    made = synthesise(spec, args.dst, args.layout, shard_nbytes, args.seed, note=note, beside=small)
    files = len(made.files)
    print(
        f"{args.dst}: {len(made)} random tensors of {architecture.name}, {format_nbytes(made.nbytes)} in "
        f"{files} file{'s' * (files > 1)}"
    )
    return 0


def _write_small(architecture: Architecture, folder: Path) -> list[Path]:
    """Write the folder's files beside the weights; return them."""
    from blockstream.module.pretrained import CONFIG

    if architecture.config is not None:
        try:
            text = json.dumps(dict(architecture.config), indent=2)
        except TypeError as error:
            raise ConfigError(
                f"the config of model family {architecture.name!r} is no JSON: {error}"
            ) from error
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    if architecture.write_extras is not None:
        architecture.write_extras(folder)
    return sorted(folder.iterdir())
