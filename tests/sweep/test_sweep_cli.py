"""`blockstream sweep` from its arguments to its exit code."""

import json

import pytest

from blockstream.cli.main import main


@pytest.fixture
def command(painter, tmp_path, monkeypatch, capsys):
    """Run `blockstream sweep` on two prompts; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "painter.yaml").write_text("pipeline: painter\nthreads: 1\n")
    (tmp_path / "prompts.txt").write_text("a star\na circle\n")

    def run(*more, on="painter", out="out"):
        code = main(["sweep", "painter.yaml", "--prompts", "prompts.txt", "--out", out, "--on", on, *more])
        return code, *capsys.readouterr()

    return run


def test_a_sweep_makes_every_prompt_and_says_so(command, tmp_path):
    code, out, _ = command("--set", "colour=blue")
    assert code == 0 and "2 of 2 done" in out
    assert (tmp_path / "out/runs/0000/0000001/0.txt").read_text() == "a circle in blue"
    code, out, _ = command("--set", "colour=blue", "--json")
    assert code == 0 and json.loads(out)["done"] == 2


def test_a_failed_run_is_named_and_makes_the_exit_code_1(command):
    code, out, _ = command("--grid", "fail=['', circle]")
    assert code == 1 and "3 of 4 done, 1 failed" in " ".join(out.split())
    assert "runs/cell-001/0000/0000001" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"on": "rey"}, "no scheduler 'rey'; did you mean 'ray'?"),
        ({"on": "{name: local, at_once: 0}"}, "at_once"),
        ({"on": "{name: painter, fast: true}"}, "unknown key"),
        ({"on": "[ray]"}, "write a name"),
        ({"out": "memory://x"}, "no other process sees"),
        ({"out": "nowhere://x"}, "nowhere"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(command, given, said):
    code, _, err = command(**given)
    assert code == 2 and said in err


def test_a_batch_is_at_least_one_prompt(command):
    code, _, err = command("--batch", "0")
    assert code == 2 and "--batch 0" in err
