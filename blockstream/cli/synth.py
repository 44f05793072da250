"""`blockstream synth ARCH DST`: write a random checkpoint of full size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from blockstream.errors import BlockstreamError

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
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint, its config.json and what else its family's folders have."""
    from blockstream.budget import format_nbytes, parse_nbytes
    from blockstream.checkpoint.synth import synthesise
    from blockstream.checkpoint.writer import write_json
    from blockstream.nn.architectures import CONFIG, find
    from blockstream.nn.spec import tensor_spec

    architecture = find(args.arch)
    spec = tensor_spec(architecture.module(), DTYPES[args.dtype])
    made = synthesise(
        spec,
        args.dst,
        args.layout,
        parse_nbytes(args.shard),
        args.seed,
        note={"architecture": architecture.name, "dtype": args.dtype},
    )
    if architecture.config is not None:
        write_json(args.dst / CONFIG, _plain(architecture.config))
    if architecture.write_extras is not None:
        architecture.write_extras(args.dst)
    print(f"{args.dst}: {len(made)} tensors of {architecture.name}, {format_nbytes(made.nbytes)}, random")
    return 0


def _plain(config: Any) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    except TypeError as error:
        raise BlockstreamError(f"the architecture's config is no JSON: {error}") from error
    return plain
