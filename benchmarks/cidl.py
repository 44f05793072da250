"""The paper's findings on concurrent inference and dynamic loading, at full size, on synthetic weights.

    python -m benchmarks.cidl --weights DIR              # STDiT3-XL/2 and T5-XXL in float32: 28 GB, minutes
    python -m benchmarks.cidl --weights DIR --small      # the same on small networks, in seconds
    python -m benchmarks.cidl --weights DIR --only sizes # Eq. 8's r against the size of a segment

Modes, of equal memory where memory matters: *sequential* (one slot, nothing overlaps), *concurrent*
(Eq. 8: two slots, one visit ahead, nothing stays), *prefix* (Eq. 9: the first d blocks stay), *spread* (d
blocks evenly spaced), *auto*. STDiT3 runs several passes, T5 one. Token counts are chosen so that l/e comes
near the paper's, from operations counted and the speeds of a first pass, and are stated. Modes take turns
within each round; every trial is shown. Weights are kept in DIR for the next time.
`pytest benchmarks/test_cidl.py --benchmark-only` is the same as one benchmark run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.cidl_modes import (
    MODES,
    RATIO,
    Chain,
    Outcome,
    Subject,
    chain,
    choose_tokens,
    rounds_of,
    stdit3,
    t5,
)
from benchmarks.cidl_page import write_modes, write_sizes
from blockstream.system.limits import cpu_count


def subjects(folder: Path, small: bool, names: Sequence[str]) -> Iterator[Subject]:
    """Yield the networks with their token counts chosen."""
    makers = {"stdit3": stdit3, "t5": t5}
    for name in names:
        subject = makers[name](folder, small)
        choose_tokens(subject, RATIO[name])
        yield subject


def sizes(
    folder: Path, small: bool, rounds: int, ledgers: Path
) -> dict[float, tuple[Subject, dict[str, list[Outcome]]]]:
    """Return the chain's outcomes, sequential and concurrent, by size of a segment in blocks."""
    found: dict[float, tuple[Subject, dict[str, list[Outcome]]]] = {}
    tokens = 0
    for size in Chain.LEVELS:
        subject = chain(folder, small, size)
        if not tokens:
            choose_tokens(subject, RATIO["stdit3"])
            tokens = subject.tokens
        subject.tokens = tokens
        found[size] = (subject, rounds_of(subject, ("sequential", "concurrent"), rounds, ledgers))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder for the synthetic weights, kept")
    parser.add_argument(
        "--small", action="store_true", help="small networks: a trial of the benchmark itself"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("stdit3", "t5", "sizes"), action="append")
    options = parser.parse_args()
    torch.set_num_threads(cpu_count().threads)
    wanted = options.only or ["stdit3", "t5", "sizes"]
    command = f"python -m benchmarks.cidl --weights DIR --rounds {options.rounds}{' --small' * options.small}"
    with tempfile.TemporaryDirectory() as scratch:
        ledgers = Path(scratch)
        names = [n for n in ("stdit3", "t5") if n in wanted]
        found = {
            s.name: (s, rounds_of(s, MODES, options.rounds, ledgers))
            for s in subjects(options.weights, options.small, names)
        }
        if found:
            write_modes(found, command, options.small)
        if "sizes" in wanted:
            write_sizes(
                sizes(options.weights, options.small, options.rounds, ledgers), command, options.small
            )


if __name__ == "__main__":
    main()
