"""Commands are found by name, imported when named, and fail with one message and an exit code."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockstream.cli.main import BUILT_IN, SPIN_COUNT, main
from blockstream.errors import BudgetError, ConfigError
from blockstream.run.config import OWN_KEYS, make_config
from blockstream.run.yamlfile import parse

PAGE = Path(__file__).parent.parent.parent / "docs" / "cli.md"
HEAVY = ("torch", "transformers", "diffusers", "matplotlib", "numpy", "rich", "pydantic", "yaml")

COMMAND = """
    def configure(parser):
        parser.add_argument("--fail", default="")

    def run(args):
        if args.fail:
            raise eval(args.fail)
        print("exported")
        return 0
"""


@pytest.mark.parametrize("argv", [["--help"], ["plugins"], ["plugins", "--json"], ["run", "--help"]])
def test_help_and_listing_import_nothing_heavy(argv):
    program = (
        "import sys; from blockstream.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print(*[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert done.stdout


def test_help_lists_commands_with_those_of_packages_and_examples(command, site):
    site.install("exporter", {"exporter.py": COMMAND}, {"blockstream.commands": {"export.x": "exporter"}})
    code, out, _ = command("--help")
    assert code == 0
    names = [name.replace(".", " ") for name in BUILT_IN]
    for text in (*names, "export x", "from exporter 1.0", "video.yaml", "BLOCKSTREAM_DISABLE"):
        assert text in out
    assert "exporter" not in sys.modules


@pytest.mark.parametrize("told", ["", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_threads_that_wait_soon_sleep_unless_told_otherwise(command, exporter, monkeypatch, told):
    environment = {"PATH": ""} | ({told: "7"} if told else {})
    monkeypatch.setattr("os.environ", environment)
    assert command("emit", "toy")[0] == 0
    assert environment == {"PATH": "", told or "GOMP_SPINCOUNT": "7" if told else SPIN_COUNT}


def test_no_command_at_all_is_wrong_usage(command):
    code, out, err = command()
    assert (code, out) == (2, "")
    assert err.startswith("usage: blockstream COMMAND")


def test_version_is_that_of_the_distribution(command):
    code, out, _ = command("--version")
    assert code == 0
    assert re.fullmatch(r"blockstream \d+\.\d+\S*\n", out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rnu", "movd.yaml"], "blockstream: no command 'rnu'; did you mean 'run'?"),
        (["--jsno"], "blockstream: unknown option '--jsno'"),
        (["plan"], "the following arguments are required: CONFIG"),
        (["plugins", "--jso"], "unrecognized arguments: --jso"),
        (["run"], "blockstream: name a config"),
        (["run", "--set", "a=1", "--out", "x", "--resume", "y"], "not allowed with argument"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(command, argv, message):
    code, out, err = command(*argv)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("no such key"), 2, "blockstream: no such key\n"),
        (BudgetError("too small"), 1, "blockstream: too small\n"),
        (OSError(28, "No space left on device"), 1, "blockstream: No space left on device; free some space"),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError: oops (BLOCKSTREAM_DEBUG=1 shows where)"),
        (KeyboardInterrupt(), 130, "blockstream: interrupted\n"),
    ],
)
def test_an_error_is_one_message_and_its_exit_code(command, site, runner, error, code, message):
    runner.result = error
    got, out, err = command("plan", "video.yaml")
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_debugging_shows_the_traceback(command, site, runner, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_DEBUG", "1")
    runner.result = BudgetError("too small")
    code, _, err = command("plan", "video.yaml")
    assert code == 1
    assert "Traceback" in err and err.endswith("blockstream: too small\n")


def test_a_reader_that_leaves_early_is_no_error():
    program = "import sys; from blockstream.cli.main import main; sys.exit(main(['schema']))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


# Commands of packages


@pytest.fixture
def exporter(site):
    groups = {"blockstream.commands": {"emit.toy": "exporter", "emit.onnx": "exporter"}}
    site.install("exporter", {"exporter.py": COMMAND}, groups)
    return site


def test_a_dotted_command_is_run_by_its_words(command, exporter):
    assert command("emit", "toy") == (0, "exported\n", "")


def test_the_words_before_a_subcommand_list_what_there_is(command, exporter):
    code, out, _ = command("emit")
    assert code == 2
    assert "emit toy" in out and "emit onnx" in out
    assert command("emit", "--help")[0] == 0
    assert command("emit", "nothing")[0] == 2


def test_a_command_of_a_package_that_fails_is_blamed(command, exporter):
    code, _, err = command("emit", "toy", "--fail", "KeyError('x')")
    assert code == 1
    assert err == "blockstream: command 'emit.toy' of exporter 1.0: KeyError: 'x'\n"
    assert command("emit", "toy", "--fail", "KeyboardInterrupt()")[0] == 130


def test_a_command_that_cannot_be_imported_is_blamed(command, site):
    site.install("broken", {}, {"blockstream.commands": {"mend": "nowhere_at_all"}})
    code, _, err = command("mend")
    assert code == 1
    assert "command 'mend' (nowhere_at_all, from broken 1.0) cannot be imported" in err


def test_a_command_of_two_packages_is_refused(command, exporter):
    exporter.install("rival", {}, {"blockstream.commands": {"emit.toy": "rival"}})
    code, _, err = command("emit", "toy")
    assert code == 1
    assert "registered by exporter 1.0, rival 1.0; uninstall all but one" in err


def test_a_built_in_command_cannot_be_replaced(command, site):
    site.install("rival", {"rival.py": COMMAND}, {"blockstream.commands": {"plugins": "rival"}})
    code, out, _ = command("plugins")
    assert code == 0
    assert out.startswith("plugins:")


def test_a_longer_name_wins_over_the_argument_of_a_shorter(command, exporter):
    exporter.install("more", {"more.py": COMMAND}, {"blockstream.commands": {"plugins.mine": "more"}})
    assert command("plugins", "mine") == (0, "exported\n", "")


def test_a_hidden_package_has_no_commands(command, exporter, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_DISABLE", "exporter")
    code, _, err = command("emit", "toy")
    assert (code, "no command 'emit'" in err) == (2, True)


# The page


def options_of(name: str) -> set[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(BUILT_IN[name][0]).configure(parser)
    strings = {s for action in parser._actions for s in action.option_strings}
    return {s for s in strings if s.startswith("--")} - {"--help"}


def test_the_page_documents_every_command_and_option_and_no_other():
    sections = dict(
        re.findall(r"^## `blockstream ([a-z ]*[a-z]).*?`\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.S | re.M)
    )
    documented = {n: set(re.findall(r"^\| `(--[a-z-]+)", text, re.M)) for n, text in sections.items()}
    assert documented == {name.replace(".", " "): options_of(name) for name in BUILT_IN}


def test_the_page_shows_every_key_of_the_engine_with_its_default(site):
    text = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.S).group(1)
    shown = parse(text, "docs/cli.md").data
    assert set(shown) == set(OWN_KEYS)
    shown["pipeline"] = "video"
    assert make_config(shown).resolved() == make_config({"pipeline": "video"}).resolved()


def test_the_installed_script_is_this_main():
    script = Path(sys.executable).parent / "blockstream"
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.startswith("blockstream ")) == (0, True)
    assert main(["--version"]) == 0
