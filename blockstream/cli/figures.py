"""`blockstream figures RUN...`: loading, inference and straightness as the paper draws them."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from blockstream.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="the folder of a run, finished or not"
    )
    parser.add_argument(
        "--to", metavar="DIR", type=Path, default=Path("figures"), help="where to (default: figures)"
    )
    parser.add_argument("--stage", metavar="NAME", help="one stage alone (default: all that the runs share)")
    parser.add_argument(
        "--visits", metavar="N", type=int, default=12, help="blocks to show of a pass (default: 12)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw every figure that the runs have the records for."""
    from blockstream.report.cycles import draw_cycles, stages_of
    from blockstream.report.record import read_run
    from blockstream.report.straightness import draw_straightness

    if args.visits < 1:
        raise ConfigError(f"--visits {args.visits}: at least 1")
    records = [read_run(folder) for folder in args.runs]
    stages = [args.stage] if args.stage else stages_of(records)
    args.to.mkdir(parents=True, exist_ok=True)
    drawn = [(f"cycles-{stage}.png", draw_cycles(records, stage, args.visits)) for stage in stages]
    straight = draw_straightness(records)
    if straight is not None:
        drawn.append(("straightness.png", straight))
    if not drawn:
        raise ConfigError("these runs share no computed stage and recorded no step: nothing to draw")
    for name, figure in drawn:
        print(_write(args.to / re.sub(r"[^\w.-]", "_", name), figure))
    if straight is None:
        print("no run recorded velocities: straightness.png is not drawn")
    return 0


def _write(path: Path, figure: Figure) -> Path:
    from blockstream.system.atomic import write_atomic

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": "blockstream"})
    write_atomic(path, buffer.getvalue())
    return path
