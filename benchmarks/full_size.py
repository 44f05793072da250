"""Run Open-Sora v1.2 at its full size, prompt to video, under a control group no larger than its budget.

    python -m benchmarks.full_size                   # 26 GB of disk for a while, about half an hour
    python -m benchmarks.full_size --weights DIR     # takes what is there, writes and keeps what is not
    python -m benchmarks.full_size --small           # tried out with the embedded model, nothing is written
    python -m benchmarks.full_size --config laptop.yaml --weights DIR    # 12 GB, everything in bfloat16

Weights that are not there are synthesised (random numbers in the official layouts; the video is noise): T5 in
int8, STDiT3 and the VAE in fp32. phone.yaml is planned as it stands and run with fewer steps: once in its own
budget, once in the least that a plan names. The kernel kills what holds more than the limit. Then plans say
how many frames fit at each resolution, and what bounds them. laptop.yaml is planned and run once.
Writes results/DATE-full-size.{json,md}, or DATE-full-size-laptop; what --skip names is taken from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks._results import path_of, table, write
from blockstream.budget.amounts import format_nbytes, parse_nbytes
from blockstream.engine.ledger import Ledger, read_records
from blockstream.errors import BudgetError
from tests.support.cgroup import limited

#: By config: family, folder as the config names it, and the bytes that making it takes for a while.
NETWORKS = {
    "phone.yaml": {
        "t5": ("t5-v1_1-xxl", "t5-v1_1-xxl-int8", 26 << 30),
        "dit": ("stdit3-xl-2", "OpenSora-STDiT-v3", 5 << 30),
        "vae": ("opensora-vae", "OpenSora-VAE-v1.2", 2 << 30),
    },
    "laptop.yaml": {
        "t5": ("t5-v1_1-xxl", "t5-v1_1-xxl-bf16", 10 << 30),
        "dit": ("stdit3-xl-2", "OpenSora-STDiT-v3-bf16", 3 << 30),
        "vae": ("opensora-vae", "OpenSora-VAE-v1.2-bf16", 1 << 30),
    },
}
#: What each runs in, and what a control group is charged for beside what is held: files' pages, tables.
BUDGETS = {"phone.yaml": "3.3GiB", "laptop.yaml": "8GiB"}
BESIDE_NBYTES = 64 << 20
#: The sizes asked for beside 256 x 256: heights and widths at 9:16.
RESOLUTIONS = ("144p", "240p", "360p", "480p", "720p")
#: What --small runs in place of phone.yaml.
SMALL = ["prompts=[a red circle moving right]", "arena=6MiB"]
#: Lengths that are tried for each size: 0.7 to 42 s.
FRAMES = (17, 34, 51, 68, 102, 136, 204, 272, 408, 544, 816, 1020)
CLI = "import sys; from blockstream.cli.main import main; sys.exit(main(sys.argv[1:]))"


def command(*words: object) -> list[str]:
    """Return a command line of blockstream's own."""
    return [sys.executable, "-c", CLI, *map(str, words)]


@contextmanager
def weights(folder: Path | None, config: str = "phone.yaml") -> Iterator[Path]:
    """Yield a folder with a config's three networks; what is written to one that nobody named is removed."""
    made = folder is None
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="full-size-", dir="."))
    try:
        for part, (family, name, need) in NETWORKS[config].items():
            if not (folder / name).exists():
                free = shutil.disk_usage(folder).free
                if free < need:
                    sys.exit(
                        f"{folder}: {format_nbytes(need)} are needed for {part}, {format_nbytes(free)} free"
                    )
                _make(family, folder / name)
        yield folder.absolute()
    finally:
        if made:
            shutil.rmtree(folder)


def _make(family: str, folder: Path) -> None:
    print(f"synthesising {folder.name} ...", flush=True)
    if not folder.name.endswith("-int8"):
        dtype = ["--dtype", "bf16"] if folder.name.endswith("-bf16") else []
        subprocess.run(command("synth", family, folder, *dtype), check=True)
        return
    whole = folder.with_name(f"{folder.name}-source")
    try:
        subprocess.run(command("synth", family, whole), check=True)
        subprocess.run(command("pack", whole, folder, "--dtype", "int8"), check=True)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def sets(config: str, found: Path | None, **more: object) -> list[str]:
    """Return the --set arguments of a run on these weights."""
    paths = {f"{part}.path": found / name for part, (_, name, _) in NETWORKS[config].items()} if found else {}
    given = [f"{key}={value}" for key, value in {**paths, "cache": "off", **more}.items()]
    return [x for text in [*([] if found else SMALL), *given] for x in ("--set", text)]


def planned(config: str, found: Path | None, **more: object) -> dict[str, Any]:
    """Return `plan --json` of the config, or what refused it."""
    line = command("plan", config, "--json", *sets(config, found, **more))
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"refused": done.stderr.strip().splitlines()[-1]}
    return dict(json.loads(done.stdout))


def run(config: str, found: Path | None, budget: int, beside: int = 0, **more: object) -> dict[str, Any]:
    """Run the config in a group limited to budget and `beside`; return its report, and if it was killed."""
    with tempfile.TemporaryDirectory() as scratch, limited(memory_nbytes=budget + beside) as group:
        out = Path(scratch) / "out"
        line = command("run", config, "--out", out, *sets(config, found, budget=budget, **more))
        done = group.run(line, timeout=4 * 3600)
        facts: dict[str, Any] = {
            "budget_nbytes": budget,
            "limit_nbytes": budget + beside,
            "options": {k: str(v) for k, v in more.items()},
            "exit": done.returncode,
            "killed": done.returncode in (-9, 137),
            "group_peak_nbytes": group.peak_nbytes,
        }
        if done.returncode != 0:
            return {**facts, "error": done.stderr.strip()[-400:], **_left(out)}
        report = json.loads((out / "report.json").read_text())
        kept = ("budget", "stages", "wall_s", "output", "read", "unplanned", "disk")
        facts |= {k: report[k] for k in kept}
        facts["video_nbytes"] = [(out / f).stat().st_size for f in report["output"]["files"]]
        facts["peaks"] = peaks(out / "ledger.jsonl")
        return facts


def _left(out: Path) -> dict[str, Any]:
    """Return how far a run that failed came, by its ledger."""
    ledger = out / "ledger.jsonl"
    with suppress(ValueError, OSError):
        return {"peaks": peaks(ledger)}
    return {}


def peaks(ledger: Path) -> list[dict[str, Any]]:
    """Return the most that was held while each stage computed, and what of it were weights."""
    records = read_records(ledger)
    visits = [s for s in records.spans if s.thread == "compute" and s.visit is not None]
    memory = [(n.at_s, *n.value) for n in records.notes if n.kind == "memory"]
    found = []
    for stage in sorted({s.visit.stage for s in visits if s.visit is not None}):
        own = [s for s in visits if s.visit is not None and s.visit.stage == stage]
        begin, end = min(s.start_s for s in own), max(s.end_s for s in own)
        held = [(nbytes, arena) for at, nbytes, arena in memory if begin <= at <= end]
        nbytes, arena = max(held, default=(0, 0))
        most = max((s for s in own), key=lambda s: s.seconds)
        found.append(
            {
                "stage": stage,
                "peak_nbytes": nbytes,
                "weights_nbytes": arena,
                "beside_nbytes": max((a - b for a, b in held), default=0),
                "longest": most.label,
            }
        )
    return found


def largest(found: Path, budget: int) -> list[dict[str, Any]]:
    """Return, by size, the longest of FRAMES whose plan fits, and the network that leaves the next no room.

    T5, which no size changes, is left out.
    """
    rows = []
    for size in ("256x256", *RESOLUTIONS):
        keys: dict[str, object] = {"height": 256, "width": 256}
        if size != "256x256":
            keys = {"height": "null", "width": "null", "resolution": size}
        low, high, bound = 0, len(FRAMES), ""  # so many fit, and no more than so many
        while low < high:
            middle = (low + high) // 2
            why = refused(found, budget, {**keys, "frames": FRAMES[middle]})
            low, high, bound = (middle + 1, high, bound) if why is None else (low, middle, why)
        rows.append({"size": size, "frames": FRAMES[low - 1] if low else 0, "bound": bound})
        print(f"{size}: {rows[-1]['frames']} frames; {bound}", flush=True)
    return rows


def refused(found: Path, budget: int, more: Mapping[str, object]) -> str | None:
    """Return what leaves no room for a video of some size, None where there is room."""
    from blockstream.run import runner
    from blockstream.run.activation import activate
    from blockstream.run.config import load_config
    from blockstream.run.numerics import pinned

    given = sets("phone.yaml", found, budget=budget, **more)[1::2]
    config = pinned(load_config("phone.yaml", given))
    this = runner.RunInProgress(config, runner.NOWHERE, Ledger(), activate(config))
    with runner.open_session(this) as session:
        pipeline = config.pipeline.build()
        pipeline._declare_text = lambda session, run: None
        pipeline.declare(session, this)
        try:
            session.draft()
        except BudgetError as error:
            said, _, least = str(error).rpartition("the least is ")
            beside = said.rpartition(" beside ")[2].partition(" of ")[0]
            return f"{beside} beside weights; {least} in all"
    return None


def stage_rows(facts: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """Yield the rows of a run's table."""
    for stage, peak in zip(facts["stages"], facts["peaks"], strict=True):
        speed = stage.get("read_bytes_per_s") or 0.0
        yield (
            stage["name"],
            stage["passes"],
            stage["b"],
            stage["d"],
            float(stage["wall_s"]),
            float(stage["stall_s"]),
            format_nbytes(stage["read_nbytes"]),
            speed / 1e9,
            format_nbytes(peak["peak_nbytes"]),
            format_nbytes(peak["weights_nbytes"]),
            format_nbytes(peak["beside_nbytes"]),
        )


HEAD = (
    *("stage", "passes", "segments", "retained", "seconds", "stalled s", "read", "GB/s"),
    *("peak held", "of it weights", "most beside weights"),
)


def described(facts: dict[str, Any]) -> str:
    """Return one run for people."""
    budget_s, group_s = (format_nbytes(facts[k]) for k in ("budget_nbytes", "limit_nbytes"))
    limits = f"Budget {budget_s}, control group {group_s}"
    how = ", ".join(f"{k} {v}" for k, v in facts["options"].items())
    if facts["exit"] != 0:
        verdict = "KILLED by the kernel" if facts["killed"] else f"FAILED: {facts['error']}"
        return f"{limits}; {how}: {verdict}."
    budget = facts["budget"]
    causes = ", ".join(f"{format_nbytes(n)} {cause}" for cause, n in budget["by_cause"].items())
    return "\n".join(
        [
            f"{limits}; {how}: not killed, budget "
            f"{'held' if budget['held'] else 'BROKEN'}, peak {format_nbytes(budget['peak_nbytes'])} while "
            f"{budget.get('peak_during') or 'between stages'} ({causes}). {facts['wall_s']:.0f} s; the group "
            f"was charged {format_nbytes(facts['group_peak_nbytes'])} at most, page cache included. "
            f"Video of {facts['video_nbytes'][0]} bytes; read {facts['read']}.",
            "",
            table(HEAD, stage_rows(facts)),
        ]
    )


def page(found: dict[str, Any]) -> str:
    """Return the result for people."""
    plan = found["plan"]
    if "refused" in plan:
        return f"The plan was refused: {plan['refused']}"
    causes = ", ".join(f"{format_nbytes(n)} {cause}" for cause, n in plan["by_cause"].items())
    lines = [
        "The weights are synthetic unless --weights had others; times and bytes are those of real ones.",
        "",
        f"{found['config']} in full (30 steps) is planned to take {plan['predicted_s'] / 60:.0f} minutes "
        f"here, read {format_nbytes(plan['read_nbytes'])}, wait {plan['stall_s']:.1f} s for it, and hold "
        f"{format_nbytes(plan['peak_nbytes'])} ({causes}). The least its segments work in is "
        f"{format_nbytes(plan['curve'][0]['budget_nbytes'])}"
        f"{'; cut finer, ' + found['least'] if found['least'] else ''}.",
    ]
    for facts in found["runs"].values():
        lines += ["", described(facts)]
    if found["largest"]:
        rows = [(r["size"], r["frames"] or "none", r["bound"]) for r in found["largest"]]
        said = f"The most frames of {', '.join(map(str, FRAMES))} that a plan accepts in {found['budget']}"
        head = ("size", "frames", "the next would need")
        lines += ["", f"{said}, and what bounds them:", "", table(head, rows)]
    return "\n".join(lines)


def least_of(found: Path | None, config: str) -> int:
    """Return the least budget that a refused plan of the config names, in bytes."""
    said = planned(config, found, budget="400MiB").get("refused", "")
    number = said.rpartition("the least is ")[2].removesuffix(" MiB")
    return int(number) << 20 if number.isdigit() else 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder of the networks, filled if need be and kept")
    parser.add_argument("--config", default="phone.yaml", choices=tuple(NETWORKS))
    parser.add_argument("--budget", help="that of the config otherwise")
    parser.add_argument("--frames", type=int, help="those of the config otherwise")
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help="that of the config otherwise")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument(
        "--least", metavar="SIZE", help="budget of the second run; the least planned otherwise"
    )
    parser.add_argument("--skip", nargs="*", default=[], choices=("run", "least", "largest"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(argv)
    more: dict[str, object] = {"steps": options.steps}
    if options.frames:
        more["frames"] = options.frames
    if options.size:
        height, width = options.size.split("x")
        more |= {"height": height, "width": width, "resolution": "null", "aspect_ratio": "null"}
    config = options.config
    budget = parse_nbytes(options.budget or BUDGETS[config])
    if options.small:
        small = {"frames": 17, "steps": 2, "threads": 1}
        least = least_of(None, "movd.yaml")
        runs = {f"{n}": run("movd.yaml", None, n, **small) for n in (1 << 30, 200 << 20)}
        plan = planned("movd.yaml", None, budget=1 << 30)
        said = {"config": "movd.yaml", "least": format_nbytes(least)}
        print(page({"plan": plan, "runs": runs, **said, "largest": []}))
        return
    phone = config == "phone.yaml"
    suite = "full-size" if phone else "full-size-laptop"
    with weights(options.weights, config) as folder:
        plan = planned(config, folder, budget=budget)
        least = 0
        if phone:
            least = parse_nbytes(options.least) if options.least else least_of(folder, config)
        path = path_of(suite, ".json")
        kept = json.loads(path.read_text()) if options.skip and path.exists() else {}
        runs = {}
        for name, nbytes, beside in (("run", budget, 0), ("least", least, BESIDE_NBYTES)):
            if name in options.skip:
                runs |= {n: facts for n, facts in kept.get("runs", {}).items() if n == name}
            elif nbytes:
                runs[name] = run(config, folder, nbytes, beside, **more)
                print(described(runs[name]), flush=True)
        fits = kept.get("largest", [])
        if phone and "largest" not in options.skip:
            fits = largest(folder, budget)
    found = {
        "config": config,
        "plan": plan,
        "runs": runs,
        "least": format_nbytes(least) if least else "",
        "budget": format_nbytes(budget),
        "largest": fits,
    }
    asked = "".join(f" --{k} {getattr(options, k)}" for k in ("frames", "size") if getattr(options, k))
    line = f"python -m benchmarks.full_size --config {config} --steps {options.steps}{asked}"
    title = f"Open-Sora v1.2 at full size under a control group: {config}"
    write(suite, line, title, page(found), found)


if __name__ == "__main__":
    main()
