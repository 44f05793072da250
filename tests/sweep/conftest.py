"""A pipeline that paints prompts, and sweeps of it."""

from __future__ import annotations

import pytest

from blockstream.run.yamlfile import Document
from blockstream.sweep.drive import Sweep
from tests.support.packages import site_on_path

PAINTER = """
    from pathlib import Path

    from pydantic import BaseModel

    from blockstream.plugins import Choice, Ended, hookimpl

    class Options(BaseModel):
        prompts: list[str] = ["none"]
        colour: str = "red"
        fail: str = ""

    class Painter:
        def __init__(self, options):
            self.options = options

        def declare(self, session, run):
            self.names = [f"{n}.txt" for n in range(len(self.options.prompts))]
            run.files.declare(self.names)

        def run(self, session, run):
            for name, prompt in zip(self.names, self.options.prompts):
                if self.options.fail and self.options.fail in prompt:
                    raise ValueError(f"cannot paint {prompt}")
                if not run.files.is_whole(name):
                    run.files.write(name, f"{prompt} in {self.options.colour}".encode())
            return {"files": self.names, "prompts": self.options.prompts}

    class InTurn:
        def run(self, perform, tasks, needs):
            for task in tasks:
                yield Ended(task, perform(task), "here")

    @hookimpl
    def schedulers():
        return [Choice("in-turn", lambda _: InTurn())]

    @hookimpl
    def pipelines():
        return [Choice("painter", Painter, Options)]
"""


@pytest.fixture
def painter(tmp_path, monkeypatch):
    """The document of a config whose pipeline writes a line for each prompt; nothing is drawn."""
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        site.plugin("painter", PAINTER)
        monkeypatch.setattr("blockstream.run.drawing.draw_finished", lambda folder: None)
        monkeypatch.setattr("blockstream.run.folder.draw_finished", lambda folder: None)
        yield Document("painter.yaml", {"pipeline": "painter", "threads": 1})


@pytest.fixture
def sweep_of(painter):
    """Make a sweep of some prompts."""

    def make(prompts, where, cells=({},), batch=1, **keys):
        document = Document("painter.yaml", {**painter.data, **keys})
        return Sweep(document, prompts, "digest of " + "|".join(prompts), str(where), cells, batch)

    return make
