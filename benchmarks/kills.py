"""Stop a run at each of its file operations in turn, go on with it, and look at what is there.

python -m benchmarks.kills [--how kill|full|interrupt] [--every N]

A run is stopped before its n-th operation on its folder (open for writing, rename, remove, make or remove a
folder, truncate), n = 1, 2, ...: killed, or by a full disk, or by Ctrl-C. Then `--resume` has to end with
exit code 0, every file, the same bits, and nothing else in the folder.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

HOW = ("kill", "full", "interrupt")
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
#: A run of two prompts that takes about a second, by the embedded model.
CONFIG = """\
pipeline: movd
prompts: [a red star, a blue circle]
height: 32
width: 32
frames: 17
steps: 2
save_every: 1
threads: 1
cache: off
"""
#: What differs from run to run, or from part to part.
_OWN = re.compile(r"(ledger(\.\d+)?\.jsonl|report\.(json|html)|timeline\.png|trace\.json|files\.jsonl)")


@dataclass(frozen=True)
class Outcome:
    """What became of a run that was stopped at its n-th operation; `wrong` is empty where all is well."""

    at: int
    how: str
    reached: bool
    wrong: tuple[str, ...]


def attacked(config: Path, folder: Path, how: str = "kill", every: int = 1) -> Iterator[Outcome]:
    """Yield what became of a config's run stopped at each `every`-th operation; `folder` is for the runs."""
    wanted = _whole(config, folder / "whole")
    at = 1
    while True:
        out = folder / f"{how}-{at}"
        code, reached = in_child(["run", str(config), "--out", str(out)], out, at, how)
        if not reached:
            return
        yield Outcome(at, how, reached, tuple(_gone_on(config, out, wanted, code, how)))
        at += every


def in_child(argv: list[str], out: Path, at: int = 0, how: str = "kill") -> tuple[int, bool]:
    """Run a command in a fork, stopped at an operation on `out`; return its exit code and whether it was.

    A command that is killed has code -9. What it prints is in OUT.log.
    """
    from blockstream.cli.main import main

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if at:
                sys.addaudithook(_Stop(out, at, how, Path(f"{out}.reached")))
            code = main(argv)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    reached = Path(f"{out}.reached")
    stopped = reached.exists()
    reached.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), stopped


class _Stop:
    """An audit hook that stops its process before the n-th operation on a folder."""

    def __init__(self, folder: Path, at: int, how: str, reached: Path) -> None:
        self._folder, self._left, self._reached = str(folder), at, reached
        self._act: Callable[[], None] = {"kill": _kill, "full": _full, "interrupt": _interrupt}[how]

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        if event not in EVENTS or not self._left:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event == "os.truncate" or str(args[0]).startswith(self._folder):
            self._left -= 1
            if not self._left:
                self._reached.touch()
                self._act()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupt() -> None:
    raise KeyboardInterrupt


def _whole(config: Path, out: Path) -> dict[str, bytes]:
    code, _ = in_child(["run", str(config), "--out", str(out)], out)
    if code:
        raise RuntimeError(f"the run itself fails: {Path(f'{out}.log').read_text()[-2000:]}")
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a run by name; of those that differ from run to run, the name alone."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if not p.is_dir()}
    return {name: b"" if _OWN.fullmatch(name) else path.read_bytes() for name, path in files.items()}


def _gone_on(config: Path, out: Path, wanted: dict[str, bytes], code: int, how: str) -> Iterator[str]:
    log = Path(f"{out}.log")
    first = log.read_text(errors="replace")
    made = contents(out) if out.is_dir() else {}
    if how != "kill" and code == 0 and not wanted.keys() <= made.keys() and "could not be" not in first:
        yield "was stopped, lacks files, and says that all is well"
    begun = out.is_dir() and (out / "files.jsonl").is_file() and (out / "files.jsonl").stat().st_size > 0
    again = ["--resume", str(out)] if begun else [str(config), "--out", str(out)]
    code, _ = in_child(["run", *again], out)
    if code:
        yield f"exit code {code} from run {' '.join(again)}"
    found = contents(out) if out.is_dir() else {}
    extra = {name for name in found.keys() - wanted.keys() if not re.fullmatch(r"ledger\.\d+\.jsonl", name)}
    folders = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_dir()} - {"0000", "0001"}
    for what, names in (("missing", wanted.keys() - found.keys()), ("left behind", extra | folders)):
        if names:
            yield f"{what}: {', '.join(sorted(names))}"
    if differ := [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]]:
        yield f"other bytes: {', '.join(sorted(differ))}"
    text = log.read_text(errors="replace")[len(first) :]
    for sign in ("Traceback", "could not be drawn", "list index"):
        if sign in text:
            yield f"says {sign!r}"


def main() -> int:
    """Attack; print a line for each operation that something was wrong at, and their number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--how", choices=HOW, default="kill")
    parser.add_argument("--every", type=int, default=1)
    given = parser.parse_args()
    wrong = done = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BLOCKSTREAM_CACHE"] = f"{folder}/cache"
        config = Path(folder) / "two.yaml"
        config.write_text(CONFIG)
        preload()
        for outcome in attacked(config, Path(folder), given.how, given.every):
            done += 1
            if outcome.wrong:
                wrong += 1
                print(f"{outcome.how} at {outcome.at}: {'; '.join(outcome.wrong)}", flush=True)
                print(Path(f"{folder}/{outcome.how}-{outcome.at}.log").read_text()[-1500:], flush=True)
    print(f"{done} operations, {wrong} of them with something wrong")
    return 1 if wrong or not done else 0


def preload() -> None:
    """Import what a run imports, so that its forks need not; no thread is begun."""
    for name in (
        *("av", "diffusers.models.autoencoders.autoencoder_kl", "matplotlib.figure", "tokenizers"),
        *("torch", "transformers.models.t5", "movd.opensora", "movd.text_to_video.pipeline"),
    ):
        import_module(name)
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
