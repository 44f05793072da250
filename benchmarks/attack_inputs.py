"""Attacks by what is put in: odd files, damaged headers, values that no key takes."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.attack_commands import Attacked, forked, judged, run_argv
from tests.support import mutations


def odd(path: Path, what: str) -> Path:
    """Put something at a path that is not what its reader expects."""
    if path.is_dir():
        path = path / "x"
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        here = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
    elif what == "folder":
        path.mkdir()
    elif what == "endless":
        path.symlink_to("/dev/zero")
    elif what == "loop":
        path.symlink_to(path)
    elif what == "a terabyte":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(
            {"empty": b"", "noise": random.Random(5).randbytes(5000), "deep": b"[" * 100_000}[what]
        )
    return path


ODD = ("fifo", "socket", "folder", "endless", "loop", "a terabyte", "empty", "noise", "deep")
#: What a user or a file names, and the command that reads it; {} is the path.
READ_BY = {
    "config": ["run", "{}", "--out", "OUT"],
    "planned": ["plan", "{}"],
    "prompts": ["prompts={}"],
    "reference": ["reference={}"],
    "pack's source": ["pack", "{}", "OUT"],
    "architecture": ["synth", "{}", "OUT"],
    "ledger": ["report", "RUN", "--no-draw"],
    "state": ["run", "--resume", "RUN"],
}
PARTS = [
    "t5/config.json",
    "t5/model.safetensors",
    "t5/tokenizer.json",
    "dit/config.json",
    "dit/model.safetensors",
]
PARTS += ["vae/config.json", "vae/model.safetensors"]


def hostile_files(folder: Path, every: int) -> Iterator[Attacked]:
    """Put odd files where a user, a config or a folder names one."""
    kind, log = "hostile file", folder / "log"
    for n, (door, what) in enumerate((door, what) for door in (*READ_BY, *PARTS) for what in ODD):
        here = folder / f"{n}"
        here.mkdir()
        out = here / "out"
        if door in PARTS:
            assets = Path(__file__).parent.parent / "movd" / "assets" / "tiny"
            subprocess.run(["cp", "-r", str(assets), str(here / "tiny")], check=True)
            path = odd(here / "tiny" / door, what)
            argv = run_argv(out, *(f"{part}.path={here / 'tiny' / part}" for part in ("t5", "dit", "vae")))
        else:
            path = odd(
                here / ("ledger.jsonl" if door == "ledger" else "config.yaml" if door == "state" else "x"),
                what,
            )
            words = [w.format(path).replace("OUT", str(out)).replace("RUN", str(here)) for w in READ_BY[door]]
            argv = run_argv(out, *words) if "=" in words[0] else words
        before = sorted(p.name for p in here.iterdir())
        code, said = forked(argv, log)
        # An empty config, or an empty list of prompts, is told by its keys and not by its path.
        needle = path.name if what != "empty" or door in PARTS else ""
        if (door, what) == ("ledger", "empty"):  # a run that has just begun
            needle = None
        found = judged(kind, f"{what} as {door}", code, said, needle)
        made = sorted(p.name for p in here.iterdir() if p.name != "out")
        if made != before or (
            found.outcome not in ("silent", "hang") and out.exists() and any(out.iterdir())
        ):
            found = Attacked(
                kind, found.name, "lost", f"the folder had {before} and has {made}, out: {out.exists()}"
            )
        yield found


def damaged_headers(folder: Path, every: int) -> Iterator[Attacked]:
    """Parse damaged headers of both kinds of checkpoint: refused, or every tensor within the file."""
    makers = {
        "safetensors": (mutations.damaged_safetensors, mutations.check_safetensors),
        "torch zip": (mutations.damaged_torch_zip, mutations.check_torch_zip),
    }
    for name, (make, check) in makers.items():
        for seed in range(0, 3000, every):
            try:
                check(make(seed))
            except Exception as error:
                yield Attacked(
                    "damaged header", f"{name} {seed}", "traceback", f"{type(error).__name__}: {error}"
                )
            else:
                yield Attacked("damaged header", f"{name} {seed}", "fine")


VALUES = {
    "steps": ["0", "-1", "1.5", "1e9", "99999999999999999999", "nan", "[]", "true"],
    "frames": ["-1", "16", "1000000", "1.5"],
    "height": ["0", "15", "1e9", "-32"],
    "fps": ["0", "-1", "nan"],
    "seed": ["-1", "1.5", "99999999999999999999999", "x"],
    "guidance": ["nan", "-1", ".inf", "x"],
    "budget": ["0", "-1GiB", "1MiB", "nan", "3 parsecs", "200%", "-5%"],
    "arena": ["0", "1KiB", "-1", "x"],
    "threads": ["0", "-1", "1.5", "1000000000"],
    "save_every": ["0", "-1", "1.5"],
    "cache": ["-1", "50%", "x"],
    "sampler": ["nosuch", "{name: euler, x: 1}", "[]", "{}", "3"],
    "policy": ["nosuch", "{}", "3"],
    "backend": ["nosuch", "{}"],
    "attention": ["nosuch", "[nosuch]", "{}", "[[[]]]"],
    "device": ["tpu", "cuda:99", "3"],
    "prompts": ["[]", "[1]", "[[a]]", "{}", "/nonexistent/prompts.txt", "3"],
    "prompt": ["[]", "{}", "3.5", '"' + "a." * 30_000 + '"'],
    "reference": ["/nonexistent.png", "3", '""'],
    "no_such_key": ["1"],
    "t5.path": ["/nonexistent", "/", "/dev", "3"],
    "t5.dtype": ["fp7", "int8", "3"],
    "resolution": ["1p", "3", "[]"],
}


def hostile_values(folder: Path, every: int) -> Iterator[Attacked]:
    """Write values that no key takes; and texts that would steer a terminal."""
    for key, values in VALUES.items():
        for k, value in enumerate(values):
            out = folder / f"{key}-{k}"
            code, said = forked(run_argv(out, f"{key}={value}"), folder / "log")
            found = judged("hostile value", f"{key}={value[:30]}", code, said, key.partition(".")[0])
            if out.exists() and found.outcome not in ("silent", "hang"):
                found = Attacked(found.kind, found.name, "lost", f"a folder stays; {found.said}")
            yield found
    out = folder / "escapes"
    code, said = forked(run_argv(out, 'prompts=["\\e]0;owned\\a a red star \\e[2J"]'), folder / "log")
    page = (out / "report.html").read_text() if (out / "report.html").exists() else ""
    sent = "\x1b" in said + page
    yield Attacked("hostile value", "escapes in a prompt", "silent" if sent or code else "fine", said[-200:])
