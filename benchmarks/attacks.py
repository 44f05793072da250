"""Attack the command line and count what came of it, by kind.

python -m benchmarks.attacks [--every N] [--only KIND]

Each attack ends in one of: *hang* (no end within the limit), *traceback* (an error nobody meant, or a
signal), *silent* (exit code 0 where the attack had to be refused), *lost* (something of the user's, or of a
stopped command, is gone, differs or stays behind), *unnamed* (refused without naming the cause), *refused by
name*, *fine* (done as it should be). Exit code 1 unless the first four are 0.

Most attacks run in forks of this process, which imports what a command imports once; those that need an
environment of their own are processes of their own. All of it takes some minutes: `--every N` tries each
N-th change of a file only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import kills
from benchmarks._results import load, table, write
from benchmarks.attack_commands import BAD, OUTCOMES, Attacked
from benchmarks.attack_inputs import damaged_headers, hostile_files, hostile_values
from benchmarks.attack_surroundings import edge_of_memory, odd_environments
from tests.support import faults

COMMAND = "python -m benchmarks.attacks"


def stopped_runs(folder: Path, every: int) -> Iterator[Attacked]:
    """Stop a run at its changes of files: killed, disk full, Ctrl-C; then resume it."""
    config = folder / "two.yaml"
    config.write_text(kills.CONFIG)
    for how in kills.HOW:
        for one in kills.attacked(config, folder / how, how, every) if (folder / how).mkdir() is None else ():
            bad = "traceback" if any("Traceback" in wrong for wrong in one.wrong) else "lost"
            yield Attacked(
                "stopped run", f"{how} at {one.at}", bad if one.wrong else "fine", "; ".join(one.wrong)
            )


PACK = """
from blockstream.checkpoint.write.packer import pack, verify_pack
from blockstream.checkpoint.write.synthesis import synthesise
SPEC = {"a.weight": ("F32", (8, 8)), "b.weight": ("F32", (8, 8))}
SOURCE = synthesise(SPEC, Path(sys.argv[1]) / "source", seed=1)
STEP = %d
def act(folder):
    pack(SOURCE, folder / "made", {"a": ("a.weight",)}, "bf16", beside={"config.json": b"{}"})
    verify_pack(folder / "made")
"""
SYNTH = """
from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.write.synthesis import synthesise
SPEC = {"a.weight": ("F32", (8, 8)), "b.weight": ("F32", (8, 8))}
STEP = %d
def act(folder):
    if not (folder / "made" / "synthetic.json").exists() or list((folder / "made").glob("*unfinished*")):
        synthesise(SPEC, folder / "made", "safetensors", 300, 3, beside={"config.json": b"{}"})
    assert len(Checkpoint.open(folder / "made")) == 2
"""


def stopped_writers(folder: Path, every: int) -> Iterator[Attacked]:
    """Stop `pack` and `synth` at their changes of files, then ask again."""
    for name, program in (("pack", PACK), ("synth", SYNTH)):
        for row in faults.run(program % every, folder / name):
            code, said, _ = row["again"]
            left = [n for n in faults.names(Path(row["folder"])) if "unfinished" in n]
            wrong = f"exit {code}: {said}" if code else f"left: {left}" if left else ""
            first = row["first"][1]
            outcome = "traceback" if "Traceback" in first + said else "lost" if wrong else "fine"
            yield Attacked(f"stopped {name}", f"{row['kind']} at {row['at']}", outcome, wrong or first)


KINDS: dict[str, Callable[[Path, int], Iterator[Attacked]]] = {
    "values": hostile_values,
    "files": hostile_files,
    "headers": damaged_headers,
    "environments": odd_environments,
    "writers": stopped_writers,
    "memory": edge_of_memory,
    "runs": stopped_runs,
}


def page(found: Sequence[Attacked]) -> str:
    """Return the counts by kind and outcome, and every attack that something was wrong with."""
    counts = Counter((one.kind, one.outcome) for one in found)
    kinds = list(dict.fromkeys(one.kind for one in found))
    rows = [[kind, *(counts[kind, outcome] for outcome in OUTCOMES)] for kind in kinds]
    rows.append(["all", *(sum(counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES)])
    wrong = [one for one in found if one.outcome in (*BAD, "unnamed")]
    listed = [f"* {one.outcome}: {one.kind}, {one.name}: {' '.join(one.said.split())[:300]}" for one in wrong]
    return "\n\n".join(
        [f"{len(found)} attacks. {load()}", table(["kind", *OUTCOMES], rows), "\n".join(listed)]
    )


def main() -> int:
    """Attack; print and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=4, help="try each N-th change of a file")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind only, and write no page")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BLOCKSTREAM_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
        kills.preload()
        for name in given.only or KINDS:
            (Path(folder) / name).mkdir()
            for one in KINDS[name](Path(folder) / name, given.every):
                found.append(one)
                if one.outcome in (*BAD, "unnamed"):
                    print(
                        f"{one.outcome}: {one.kind}, {one.name}: {one.said}".replace(folder, ""), flush=True
                    )
    data = {"every": given.every, "attacks": [vars(one) for one in found if one.outcome in (*BAD, "unnamed")]}
    if given.only:
        print(page(found))
    else:
        command = COMMAND + (f" --every {given.every}" if given.every != parser.get_default("every") else "")
        write("attacks", command, "Attacks, by kind and outcome", page(found).replace(folder, ""), data)
    return 1 if any(one.outcome in BAD for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
