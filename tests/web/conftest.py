"""A server in a thread of its own, its runs made by a stand-in."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from blockstream_web.app import Site
from blockstream_web.guard import Guard
from blockstream_web.presets import load_presets
from blockstream_web.process import COMMAND
from blockstream_web.server import Server

FAKE = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "support" / "fake_blockstream.py"))
MARK = {"X-Blockstream": "1"}


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.data = response.status, response.headers, response.read()

    @property
    def text(self) -> str:
        return self.data.decode()

    @property
    def json(self):
        return json.loads(self.data)


class Served:
    """One server; `ask` asks it. Use as a context manager."""

    def __init__(self, presets, folder: Path, command=FAKE, token=None, any_address=False, port=0) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.token = folder, token
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.site = Site(presets, folder, command, patience_s=(20.0,))
        guard = Guard(self.site.app, ["studio.example"], any_address, token)
        self.server = Server(guard, self.site.hub)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), name="server")

    def __enter__(self):
        self.thread.start()
        wait_for(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body=None, **headers: str) -> Answer:
        connection = self.connect()
        try:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, sent)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def post(self, path: str, asked=None, image: bytes = b"") -> Answer:
        body = json.dumps(asked or {}).encode() + (b"\n" + image if image else b"")
        return self.ask("POST", path, body, **MARK)

    def make(self, prompt: str, **settings) -> str:
        asked = {"preset": "movd.yaml", "prompts": [prompt], "settings": settings}
        answer = self.post("/api/runs", asked)
        assert answer.status == 201, answer.text
        return answer.json["id"]

    def runs(self):
        """Return the runs by name, as a page that comes now is told."""
        connection = self.connect()
        try:
            connection.request("GET", "/api/events")
            response = connection.getresponse()
            assert response.readline() == b"event: runs\n"
            found = json.loads(response.readline().removeprefix(b"data: "))
        finally:
            connection.close()
        return {run["id"]: run for run in found["runs"]}

    def wait(self, name: str, *states: str):
        return wait_for(lambda: (run := self.runs()[name])["state"] in states and run)

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds: float = 60):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
    return value


@pytest.fixture(scope="session")
def presets():
    return load_presets(["movd.yaml"])


@pytest.fixture(scope="module")
def shared(presets, tmp_path_factory):
    """A server for tests that leave nothing open."""
    with Served(presets, tmp_path_factory.mktemp("web") / "runs") as served:
        yield served


@pytest.fixture
def served(presets, tmp_path):
    """A server with an empty folder."""
    with Served(presets, tmp_path / "runs") as served:
        yield served


@pytest.fixture
def serve(presets, tmp_path):
    """Return a server that is not started, of the same folder each time; `real` makes real runs."""

    def make(real: bool = False, presets=presets, **options):
        return Served(presets, tmp_path / "runs", COMMAND if real else FAKE, **options)

    return make
