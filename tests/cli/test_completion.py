"""A shell is told what may come next, by scripts that ask this command."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from blockstream.cli.completion import SCRIPTS, candidates
from blockstream.cli.main import BUILT_IN


def test_commands_come_first_then_their_options_and_configs(site):
    first = candidates([])
    assert {name.partition(".")[0] for name in BUILT_IN} | {"--help", "--version"} <= set(first)
    assert {"new", "--json", "--hooks"} <= set(candidates(["plugins"]))
    assert {"--kind", "--into"} <= set(candidates(["plugins", "new"]))
    assert {"video.yaml", "--out", "--resume"} <= set(candidates(["run"]))
    assert "video.yaml" not in candidates(["pack"])
    assert candidates(["no-such-command"]) == []


@pytest.mark.parametrize("shell", [shell for shell in SCRIPTS if shutil.which(shell)])
def test_a_script_is_one_that_its_shell_reads(command, shell, tmp_path):
    code, script, _ = command("completion", shell)
    assert code == 0
    (tmp_path / "script").write_text(script)
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_a_command(tmp_path):
    (tmp_path / "blockstream").write_text(
        f"#!{sys.executable}\nimport sys\nfrom blockstream.cli.main import main\nsys.exit(main())\n"
    )
    (tmp_path / "blockstream").chmod(0o755)
    program = (
        f"PATH={tmp_path}:$PATH\n{SCRIPTS['bash']}\nCOMP_WORDS=(blockstream doctor --no)\nCOMP_CWORD=2\n"
        "_blockstream\necho ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "--no-disk\n"


def test_another_shell_is_refused_by_name(command):
    code, _, err = command("completion", "csh")
    assert code == 2 and "csh" in err
