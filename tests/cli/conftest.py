"""A runner that runs nothing, and the command line in this process."""

from __future__ import annotations

from types import ModuleType

import pytest

from blockstream import run
from blockstream.cli.main import main
from tests.support.packages import site_on_path

PIPELINE = """
    from pydantic import BaseModel

    from blockstream.plugins import Choice, hookimpl

    class Options(BaseModel):
        prompt: str = "a cat"
        steps: int = 3

    @hookimpl
    def pipelines():
        return [Choice("video", lambda options: options, Options, "text to video")]

    @hookimpl
    def samplers():
        return [Choice("leap", lambda options: print), Choice("hop", lambda options: print)]
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder for packages, with one that has a pipeline, `video`, and an example of it."""
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        groups = {
            "blockstream": {"video": "video.plugin"},
            "blockstream.examples": {"video.yaml": "video:video.yaml"},
        }
        files = {
            "video/__init__.py": "",
            "video/plugin.py": PIPELINE,
            "video/video.yaml": "pipeline: video\n",
        }
        site.install("video-package", files, groups, version="2.0")
        monkeypatch.chdir(tmp_path)
        yield site


@pytest.fixture
def runner(monkeypatch):
    """A stand-in for blockstream.run.runner: remembers its calls, returns or raises what it is told."""
    module = ModuleType("blockstream.run.runner")
    module.calls = []
    module.result = {}

    def call(name):
        def function(*args, **options):
            module.calls.append((name, args, options))
            if isinstance(module.result, BaseException):
                raise module.result
            return module.result

        return function

    module.run, module.plan = call("run"), call("plan")
    monkeypatch.setattr(run, "runner", module, raising=False)
    return module


@pytest.fixture
def command(capsys):
    """Run a command line in this process; return (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
