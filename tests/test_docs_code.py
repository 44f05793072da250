"""What the pages show runs: their Python as it stands there, their commands as far as their arguments."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import blockstream
from blockstream.cli.main import BUILT_IN
from tests.support.fake_cuda import fake_cuda
from tests.support.models import llama, save
from tests.support.stable_diffusion import save_stable_diffusion

ROOT = Path(__file__).parent.parent
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in ROOT.glob("docs/**/*.md")}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
PYTHON = {
    f"{name}-{n}": code
    for name, text in PAGES.items()
    for n, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL), 1)
}
#: Pages whose blocks other tests run, and those whose blocks need what only they explain: these are compiled.
ELSEWHERE = ("docs/hooks.md", "docs/write-a-pipeline.md")
COMPILED = ("docs/benchmarks.md", "docs/coreml.md", "docs/coreml-backends.md", "docs/formats.md")
HERE = [name for name in PYTHON if name.rpartition("-")[0] not in (*ELSEWHERE, *COMPILED)]


def shown_in(text: str) -> list[str]:
    """Return the commands of a page's blocks."""
    blocks = re.findall(r"(?:^    (?:\S.*| +\S.*)\n)+", text, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [x.partition("  #")[0] for x in lines if x.startswith("blockstream ") and "COMMAND" not in x]


SHOWN = sorted({line for text in PAGES.values() for line in shown_in(text)})
NAMED = sorted({x for t in PAGES.values() for x in re.findall(r"`blockstream ([a-z]+ [^`|]*--[^`|]+)`", t)})


class Inputs(dict):
    """What a tokenizer returns, wherever it is moved."""

    def to(self, device: str) -> Inputs:
        return self


@pytest.fixture(name="given", scope="module")
def _given(tmp_path_factory):
    """Return what the pages take as given: a checkpoint, and what its model is called with."""
    torch.manual_seed(0)
    folder = save(llama(), tmp_path_factory.mktemp("docs") / "checkpoint")
    ids = torch.arange(3, 7)[None]
    inputs = Inputs(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    return {"folder": folder, "inputs": inputs, "x": ids, "factory": llama, "torch": torch}


@pytest.mark.filterwarnings("ignore")  # diffusers' own, of the small pipeline
@pytest.mark.parametrize("block", HERE)
def test_the_python_of_a_page_runs(block, given, monkeypatch, tmp_path):
    monkeypatch.chdir(given["folder"].parent)
    fake_cuda(monkeypatch)
    names = {**given, "blockstream": blockstream}
    code = compile(PYTHON[block], block, "exec")
    if "pipeline(" in PYTHON[block]:
        pytest.importorskip("diffusers")
        names["folder"] = save_stable_diffusion(tmp_path / "pipeline", reads_prompts=True)
    with torch.no_grad():
        exec(code, names)
    if "tokens" in names:
        assert names["tokens"].shape == (1, 6)


@pytest.mark.parametrize("block", [name for name in PYTHON if name.rpartition("-")[0] in COMPILED])
def test_the_python_that_needs_more_compiles_and_imports(block):
    for node in compile(PYTHON[block], block, "exec", ast.PyCF_ONLY_AST).body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []


def parser_of(line: str) -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser of a command, and the arguments it is given."""
    words = shlex.split(line)
    added = {e.name: e for e in entry_points(group="blockstream.commands")}
    length = next(n for n in (2, 1) if ".".join(words[:n]) in {*BUILT_IN, *added})
    name = ".".join(words[:length])
    command = importlib.import_module(BUILT_IN[name][0]) if name in BUILT_IN else added[name].load()
    parser = argparse.ArgumentParser(name, allow_abbrev=False)
    command.configure(parser)
    return parser, words[length:]


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_of_a_page_takes_the_arguments_it_is_given_there(line, capsys):
    parser, arguments = parser_of(line.removeprefix("blockstream "))
    try:
        parser.parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{line}: {capsys.readouterr().err}")


@pytest.mark.parametrize("line", NAMED)
def test_a_command_named_in_a_sentence_has_the_options_it_is_named_with(line):
    parser, arguments = parser_of(line)
    options = {word for word in arguments if word.startswith("--")}
    assert options <= set(re.findall(r"--[a-z-]+", parser.format_help()))
