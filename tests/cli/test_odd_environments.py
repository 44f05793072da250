"""Output that cannot be written, folders that are gone, text that steers a terminal: one line each."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import psutil
import pytest
from rich.console import Console

from blockstream.budget.amounts import resolve_budget
from blockstream.errors import ConfigError, EngineError
from blockstream.plan.segments import AtMost, Exactly, Unknown
from blockstream.report.shell import escaped
from blockstream.report.tables import grid, lines
from blockstream.streaming.options import MOST_PASSES, parse_passes
from blockstream.system.limits import SystemMemory
from blockstream.system.memory import HeldReader
from blockstream.system.terminal import prepare_streams, visible

MAIN = "import sys; from blockstream.cli.main import main; sys.exit(main(sys.argv[1:]))"


COMMAND = """
    def configure(parser):
        pass

    def run(args):
        raise OSError(%d, %r, "/x/y")
"""


def shell(line, **options):
    """Run a shell line in which {} is the command."""
    line = line.replace("{}", f"'{sys.executable}' -c '{MAIN}'")
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_done_without(redirection):
    done = shell(f"{{}} plugins {redirection}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    program = (
        "import os, sys; from blockstream.cli.main import main; main(['--version']); "
        f"f = os.open({str(tmp_path / 'x')!r}, os.O_CREAT | os.O_WRONLY); sys.exit(f)"
    )
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "{program}" >&- 2>&-'], timeout=60, check=False
    )
    assert done.returncode > 2


def test_output_that_cannot_be_written_is_said_once():
    done = shell("{} plugins --json > /dev/full")
    assert done.returncode == 1
    assert done.stderr == ("blockstream: No space left on device; free some space and run the same again\n")
    assert shell("{} plugins --json | head -c 1").stderr == ""


def test_a_working_folder_that_is_gone_is_refused_by_name(tmp_path):
    done = shell("mkdir gone && cd gone && rmdir ../gone && {} plan movd.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "the working folder cannot be used" in done.stderr and "change to one that is there" in done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "/x/y: No space left on device; free some space"),
        (errno.EACCES, "/x/y: Permission denied; check its permissions"),
        (errno.ENOENT, "/x/y: No such file or directory; it may have been deleted or moved"),
        (errno.EROFS, "/x/y: Read-only file system; name a folder that can be written"),
        (errno.EMFILE, "/x/y: Too many open files; raise the limit of open files"),
    ],
)
def test_what_the_system_refuses_is_said_with_the_file_and_what_to_do(command, site, code, said):
    text = COMMAND % (code, os.strerror(code))
    site.install("odd", {"odd.py": text}, {"blockstream.commands": {"odd": "odd"}})
    got, _, err = command("odd")
    assert got == 1
    assert said in err and "Error" not in err


def narrow(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream.reconfigure(errors="blockstream-narrow")
    return stream


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_cell_of_a_table_is_whole_in_every_encoding_and_width(encoding, width):
    prepare_streams()
    stream = narrow(encoding)
    rows = [
        ["stage", *(f"head {k}" for k in range(8))],
        ["dit", *(f"\u2264 {k}0 h 47 min" for k in range(8))],
    ]
    console = Console(file=stream, width=width)
    console.print(grid(rows))
    console.print(lines([("costs", "\u2588\u2588 \u00d7 \u732b caf\u00e9", False)]))
    stream.flush()
    said = stream.buffer.getvalue().decode(encoding)
    for k in range(8):
        assert f" {k}0 h 47 min" in said and f"head {k}" in said
    assert "\u2026" not in said and "..." not in said
    if encoding == "ascii":
        assert "<= 10 h 47 min" in said and "## x \\u732b cafe" in said


HOSTILE = "\x1b]0;owned\x07 \x1b[2J \x9b31m \r\b \u202egnp.exe \ud800"


def test_text_that_steers_a_terminal_is_shown_and_not_sent(command, tmp_path):
    shown = visible(f"{HOSTILE}\tand\nlines")
    assert shown.endswith("\tand\nlines") and "\\x1b]0;owned\\x07" in shown and "\\u202e" in shown
    assert shown.replace("\t", "").replace("\n", "").isprintable()
    out = io.StringIO()
    console = Console(file=out, width=200)
    console.print(grid([["a", "b"], [HOSTILE, "x"]]))
    console.print(lines([(HOSTILE, HOSTILE, True)]))
    assert not set("\x1b\x9b\r\b\x07\u202e") & set(out.getvalue())
    assert "\x1b" not in escaped(HOSTILE) and "\\x1b" in escaped(HOSTILE)
    code, _, err = command("run", f"{tmp_path}/\x1b[2J.yaml")
    assert code == 2
    assert "\x1b" not in err and "\\x1b[2J.yaml" in err


def test_memory_is_known_without_meminfo(tmp_path, monkeypatch):
    known = SystemMemory.now()
    for text in (None, "", "MemTotal: nonsense\n"):
        if text is not None:
            (tmp_path / "meminfo").write_text(text)
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
        found = SystemMemory.now()
        assert found.total == pytest.approx(known.total, rel=0.1) and 0 < found.available <= found.total
    assert resolve_budget("auto").nbytes > 0


def test_without_proc_what_is_held_cannot_be_known(tmp_path):
    with pytest.raises(EngineError, match=r"status: No such file or directory; .*mount /proc"):
        HeldReader(tmp_path / "status")


@pytest.mark.parametrize(
    "passes", [1.5, -1, 0, True, "3", MOST_PASSES + 1, 10**30, float("nan"), float("inf")]
)
def test_a_number_of_passes_that_is_none_is_refused_by_name(passes):
    with pytest.raises(ConfigError, match=rf"passes {passes!r}.*whole number from 1 to 100,000"):
        parse_passes(passes)


def test_numbers_of_passes_stay_what_they_are():
    assert parse_passes(3) == Exactly(3)
    assert parse_passes(AtMost(5)) == AtMost(5)
    assert isinstance(parse_passes(None), Unknown)
