"""A stand-in for the command line: `run`, `plan` and `compare` that take no time and compute nothing.

A run whose prompt has "wait" in it waits to be interrupted until the file `go` lies beside its folder; one
with "fail" fails. Every call is noted in `calls.jsonl` beside the run's folder.
"""

import json
import signal
import sys
import time
from pathlib import Path

FACTS = {"read_bytes_per_s": 1.2e9, "held_nbytes": 300 << 20, "budget_nbytes": 512 << 20}
PLAN = {
    "predicted_s": 250.0,
    "peak_nbytes": 3300 << 20,
    "read_nbytes": 9 << 30,
    "budget": {"nbytes": 4 << 30, "arena_nbytes": None},
    "advice": ["3.2 GiB: 250 s, the least that works", "+1.0 GiB saves 50.0 s (the knee)"],
    "curve": [
        {"budget_nbytes": n << 20, "predicted_s": s, "read_nbytes": 1, "arena_nbytes": 1}
        for n, s in ((3300, 250.0), (4324, 200.0), (8000, 190.0))
    ],
    "knee_nbytes": 4324 << 20,
    "enough_nbytes": 8000 << 20,
}


def say(value):
    print(json.dumps(value), flush=True)


def run(args):
    resumed = args[0] == "--resume"
    folder = Path(args[1] if resumed else args[2])
    text = (folder / "config.yaml" if resumed else Path(args[0])).read_text()
    with (folder.parent / "calls.jsonl").open("a") as file:
        file.write(json.dumps(["resume" if resumed else "run", folder.name]) + "\n")
    folder.mkdir(exist_ok=True)
    (folder / "files.jsonl").write_text("{}\n")
    (folder / "config.yaml").write_text(text)
    predicted = {"t5": 1.0, "dit": 8.0, "vae": 1.0}
    for k in range(3):
        at = {"stage": "dit", "pass": k + 1, "passes": 3, "part": k / 3, "left_s": 3.0 - k, "at_s": k / 2}
        say({**FACTS, **at, "predicted_s": predicted})
    if "fail" in text:
        print(f"WARNING: a word\nblockstream: {folder}/weights.bin is damaged", file=sys.stderr)
        return 1
    while "wait" in text and not (folder.parent / "go").exists():
        time.sleep(0.01)
    (folder / "video.mp4").write_bytes(bytes(range(256)) * 4)
    report = {
        "budget": {"nbytes": 512 << 20, "peak_nbytes": 300 << 20, "held": True},
        "sampler": {"passes": 3, "of": 3},
        "output": {"files": ["video.mp4"], "prompts": ["a red star"]},
        "wall_s": 1.5,
        "stages": [{"name": "dit", "files": [f"{folder}/model.safetensors"]}],
    }
    (folder / "report.json").write_text(json.dumps(report))
    say({"report": report})
    return 0


def main(command, *args):
    if command == "run":
        return run(args)
    if command == "plan":
        text = Path(args[0]).read_text()
        if "fail" in text:
            print(f"blockstream: {args[0]}: budget 1 GiB cannot hold it", file=sys.stderr)
            return 1
        say(PLAN)
        return 0
    a, b, _, page, _ = args
    Path(page).write_text(f"<p>{Path(a).name} and {Path(b).name}")
    return 0


def interrupted(number, frame):
    print("blockstream: interrupted", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(main(*sys.argv[1:]))
