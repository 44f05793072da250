"""docs/write-a-plugin.md, followed word by word by a script: its commands and files, in their order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
import time
import venv
from importlib import metadata

import pytest

from tests.support.imports import ROOT

PAGE = (ROOT / "docs" / "write-a-plugin.md").read_text(encoding="utf-8")
#: A line of a command, or a file whose first line is its name.
PART = re.compile(
    r"^    ((?:blockstream|cd|python) [^\n]+)$|^```yaml\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def script() -> str:
    """Return the page as a script of bash: files are written where the commands have led to."""
    lines = ["set -e"]
    for command, name, text in PART.findall(PAGE):
        if command:
            lines += [f"echo {shlex.quote(f'$ {command}')}", command]
        else:
            lines.append(f"cat > {name} <<'END'\n# {name}\n{text}END")
    return "\n".join(lines) + "\n"


def test_the_script_has_all_of_the_page():
    lines = script().splitlines()
    wanted = [
        "plugins new leaps",
        "cd ",
        "pip install",
        "pytest",
        "--hooks",
        "leaps.yaml <<",
        "blockstream run",
        "wheel",
    ]
    found = [next(i for i, line in enumerate(lines) if part in line) for part in wanted]
    assert found == sorted(found)


@pytest.fixture(name="fresh")
def _fresh(tmp_path):
    """An environment that has what this one has, and what is installed into it: variables for a shell."""
    for needed in ("pip", "setuptools"):
        try:  # looking for the module `pip` would have setuptools replace distutils in this process
            metadata.version(needed)
        except metadata.PackageNotFoundError:
            pytest.skip(f"the page installs a package, which needs {needed} here")
    venv.create(tmp_path / "fresh", symlinks=True)
    ours, theirs = sysconfig.get_path("purelib"), tmp_path / "fresh" / "lib"
    (site,) = theirs.glob("python*/site-packages")
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    program = tmp_path / "fresh" / "bin" / "blockstream"
    python = tmp_path / "fresh" / "bin" / "python"
    program.write_text(f"#!{python}\nimport sys\nfrom blockstream.cli.main import main\nsys.exit(main())\n")
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",  # what the package needs is there: nothing is fetched
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this switch the other way round
        "PYTHONPATH": str(ROOT),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_is_followed_from_its_first_command_to_its_last(fresh, tmp_path, capsys):
    folder = tmp_path / "work"
    folder.mkdir()
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", script()],
        cwd=folder,
        env=fresh,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    with capsys.disabled():
        print(f"\ndocs/write-a-plugin.md, followed word by word: {time.monotonic() - begin:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    made = folder / "blockstream-leaps"
    assert (made / "out" / "video.mp4").stat().st_size > 0
    (excerpt,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert excerpt in (made / "pyproject.toml").read_text()
    assert [path.suffix for path in (made / "dist").iterdir()] == [".whl"]
    assert "leaps" in done.stdout.partition("$ blockstream plugins\n")[2].partition("$ ")[0]
