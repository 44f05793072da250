"""A sweep on a Ray cluster whose nodes are killed at random: what is lost, what is made twice.

python -m benchmarks.sweep_kills [--prompts 200] [--nodes 3] [--every 20]

Ray's own test cluster: a head and some nodes, each with its own processes, on this machine. Every so often
one of them is killed (SIGKILL) and another one comes. The embedded model makes an image of each prompt; in
the end every prompt has to have one run and one image, the bits of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._results import load, write

SUITE = "sweep-kills"
#: A run that takes about a second of a processor, half of it drawing its report.
CONFIG = """\
pipeline: movd
prompt: a red star
height: 32
width: 32
frames: 1
steps: 8
save_every: 1
threads: 1
cache: off
budget: 900MiB
arena: 6MiB
"""
COLOURS = ("red", "blue", "green", "yellow", "purple", "white", "orange", "gray")
SHAPES = ("circle", "square", "triangle", "star")
MOVES = ("moving right", "moving left", "moving up", "growing", "shrinking", "moving in a circle", "standing")


def prompts(count: int) -> list[str]:
    """Return so many different prompts."""
    found = [
        f"a {colour} {shape} {move} {pace}"
        for move in MOVES
        for pace in ("slowly", "quickly")
        for shape in SHAPES
        for colour in COLOURS
    ]
    if count > len(found):
        raise ValueError(f"at most {len(found)} prompts")
    return found[:count]


#: A machine that is busy with other things takes long to answer: that is no death.
PATIENT = {
    "RAY_gcs_rpc_server_connect_timeout_s": "120",
    "RAY_gcs_server_request_timeout_seconds": "240",
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_worker_register_timeout_seconds": "240",
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_niceness": "0",
}


class Nodes:
    """Ray's test cluster: a head without room for runs, and nodes with room for `at_once` each."""

    def __init__(self, count: int, at_once: int, seed: int) -> None:
        from ray.cluster_utils import Cluster

        self._each = {"num_cpus": at_once, "memory": at_once * (1 << 30), "object_store_memory": 80 << 20}
        self._random = random.Random(seed)
        self.killed = 0
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20},
        )
        self._count, self.alive = count, list[Any]()
        self._fill()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill_one(self) -> None:
        """Kill a node at random with all of its processes; others come until there are as many as before."""
        if self.alive:
            node = self.alive.pop(self._random.randrange(len(self.alive)))
            self._cluster.remove_node(node, allow_graceful=False)
            self.killed += 1
        self._fill()

    def _fill(self) -> None:
        for _ in range(self._count - len(self.alive)):
            try:
                self.alive.append(self._cluster.add_node(**self._each))
            except Exception as error:  # a busy machine: it did not come up in time; the next may
                print(f"a node did not come: {error}", flush=True)

    def close(self) -> None:
        self._cluster.shutdown()


def swept(folder: Path, count: int, nodes: Nodes, every_s: float, seed: int) -> tuple[int, float]:
    """Sweep, killing a node about every so many seconds; return the command's exit code and seconds."""
    out, began, chance = folder / "out", time.monotonic(), random.Random(seed)
    command = [sys.executable, "-c", "import sys; from blockstream.cli.main import main; sys.exit(main())"]
    command += ["sweep", str(folder / "sweep.yaml"), "--prompts", str(folder / "prompts.txt")]
    command += ["--out", str(out), "--on", f"{{name: ray, address: '{nodes.address}', retries: 1000}}"]
    with (folder / "sweep.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as sweep:
        while True:
            try:
                code = sweep.wait(every_s * chance.uniform(0.5, 1.5))
                return code, time.monotonic() - began
            except subprocess.TimeoutExpired:
                nodes.kill_one()
                made = sum(1 for _ in out.glob("runs/*/*/report.json"))
                print(f"{time.monotonic() - began:.0f} s: {nodes.killed} killed, {made} made", flush=True)


def lines_of(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a sweep's results."""
    for part in sorted((out / "results").glob("*.jsonl")):
        yield from map(json.loads, part.read_text().splitlines())


def judged(out: Path, wanted: list[str], undisturbed: dict[str, str]) -> dict[str, Any]:
    """Return what became of the prompts: lost, twice, of other bits, gone on with."""
    lines = list(lines_of(out))
    done = [line for line in lines if "error" not in line]
    told = Counter(line["prompts"][0] for line in done)
    images = {line["prompts"][0]: out / line["files"][0] for line in done}
    made = {
        p: (path.parent / "files.jsonl").read_text().count('"made":"image.png"') for p, path in images.items()
    }
    return {
        "prompts": len(wanted),
        "done": sum(told[p] == 1 for p in wanted),
        "lost": sum(told[p] == 0 for p in wanted),
        "twice": sum(told[p] > 1 for p in wanted),
        "failed": len(lines) - len(done),
        "folders": sum(1 for _ in out.glob("runs/*/*/image.png")),
        "made_again": sum(n > 1 for n in made.values()),
        "other_bits": sum(_digest(path) != undisturbed[p] for p, path in images.items()),
        "resumed": sum(line["parts"] > 1 for line in done),
        "most_parts": max((line["parts"] for line in done), default=0),
        "nodes": len({line["where"] for line in done}),
    }


def alone(folder: Path, wanted: list[str]) -> dict[str, str]:
    """Return the digest of each prompt's image, made by one run that nothing disturbs."""
    from blockstream.run import runner
    from blockstream.run.config import load_config

    sets = ["prompt=null", f"prompts={folder / 'prompts.txt'}"]
    report = runner.run(load_config(folder / "sweep.yaml", sets), folder / "alone")
    files = report["output"]["files"]
    return {p: _digest(folder / "alone" / name) for p, name in zip(wanted, files, strict=True)}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Sweep, kill, judge; write the dated result. Return 1 where anything is lost or twice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="runs that a node has room for")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="print what became of it, write no result")
    given = parser.parse_args()
    wanted = prompts(given.prompts)
    os.environ.update(PATIENT)
    with tempfile.TemporaryDirectory(prefix="sweep-kills-") as name:
        folder = Path(name)
        os.environ["BLOCKSTREAM_CACHE"] = str(folder / "cache")
        (folder / "sweep.yaml").write_text(CONFIG)
        (folder / "prompts.txt").write_text("\n".join(wanted))
        nodes = Nodes(given.nodes, given.at_once, given.seed)
        try:
            code, took_s = swept(folder, given.prompts, nodes, given.every, given.seed)
        finally:
            nodes.close()
        print((folder / "sweep.log").read_text()[-4000:])
        found = judged(folder / "out", wanted, alone(folder, wanted))
    found |= {"killed": nodes.killed, "exit_code": code, "took_s": round(took_s)}
    print(json.dumps(found))
    if not given.no_write:
        write(
            SUITE,
            f"python -m benchmarks.sweep_kills --prompts {given.prompts} --nodes {given.nodes} "
            f"--at-once {given.at_once} --every {given.every:g} --seed {given.seed}",
            "A sweep on a Ray cluster whose nodes are killed at random",
            page(found, given.nodes, given.at_once),
            found,
        )
    bad = found["lost"] or found["twice"] or found["failed"] or found["other_bits"] or code
    return 1 if bad or found["folders"] != given.prompts else 0


def page(found: dict[str, Any], count: int, at_once: int) -> str:
    """Return the result's page."""
    import ray

    return f"""
{found["prompts"]} prompts, an image each by the embedded model, on a cluster of {count} nodes with room
for {at_once} run{"s" if at_once > 1 else ""} each (Ray {ray.__version__}, its test cluster on one machine).
{found["killed"]} nodes were killed (SIGKILL, at random times) and as many came.

* {found["done"]} prompts have one run that came to its end, {found["lost"]} were lost, {found["twice"]} are
  in the results twice, {found["failed"]} failed.
* {found["folders"]} images lie in the folders of the runs; {found["other_bits"]} differ in a bit from those
  of one run of all prompts that nothing disturbed.
* {found["resumed"]} runs were gone on with after their node had died, in at most {found["most_parts"]} parts;
  {found["made_again"]} images were written a second time, in the same place.
* {found["nodes"]} nodes made them. The command ended with {found["exit_code"]}, after {found["took_s"]} s.

{load()} What this shows is the outcome, not speed.
"""


if __name__ == "__main__":
    sys.exit(main())
