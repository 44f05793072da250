"""What each address answers, what it refuses, and that no answer has a path of this machine."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
from blockstream_web import body, command
from blockstream_web.command import HOST

from blockstream.cli.main import main
from blockstream.errors import ConfigError
from blockstream.system.atomic import locked
from movd.reference import FORMATS, MOST_NBYTES

MARK = {"X-Blockstream": "1"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.fixture(scope="module")
def done(shared):
    """A finished run of the shared server."""
    name = shared.make("a red star")
    shared.wait(name, "done")
    return name


@pytest.fixture(scope="module")
def failed(shared):
    name = shared.make("fail")
    shared.wait(name, "failed")
    return name


def test_the_page_and_its_files(shared):
    page = shared.ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    for name in re.findall(r'(?:href|src)="(/page/[^"]+)"', page.text):
        assert shared.ask("GET", name).status == 200
    for name in re.findall(r'from "\./([^"]+)"', shared.ask("GET", "/page/page.js").text):
        assert shared.ask("GET", f"/page/{name}").headers["content-type"].startswith("text/javascript")


def test_a_video_comes_whole_or_in_part(shared, done):
    path = f"/runs/{done}/video.mp4"
    whole = shared.ask("GET", path)
    assert (whole.status, whole.headers["content-type"], len(whole.data)) == (200, "video/mp4", 1024)
    part = shared.ask("GET", path, Range="bytes=256-511")
    assert (part.status, part.data) == (206, bytes(range(256)))


@pytest.mark.parametrize(
    "path",
    [
        "/runs/{id}/config.yaml",
        "/runs/{id}/report.json",
        "/runs/{id}/../{id}.json",
        "/runs/{id}/%2e%2e/{id}.yaml",
        "/runs/{id}/..%2f{id}.json",
        "/runs/{id}//etc/passwd",
        "/runs/{id}/%2fetc%2fpasswd",
        "/runs/{id}/video.mp4%00.png",
        "/runs/../runs/{id}.json",
        "/runs/%2e%2e/report.html",
        "/runs/9999/video.mp4",
        "/runs/9999/report.html",
        "/runs/{id}.json/report.html",
        "/page/app.py",
        "/page/..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/compare/{id}/9999",
        "/compare/{id}/..",
        "/api/runs",
        "/favicon.ico",
    ],
)
def test_nothing_else_is_there(shared, done, path):
    answer = shared.ask("GET", path.format(id=done))
    assert answer.status in (404, 405), answer.text


def test_a_link_out_of_a_run_is_not_followed(shared, done, tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(b"secret")
    link = shared.folder / done / "link.png"
    link.symlink_to(outside)
    try:
        assert shared.ask("GET", f"/runs/{done}/link.png").status == 404
    finally:
        link.unlink()


def test_the_report_is_shown_under_a_policy_of_its_own(shared, done):
    answer = shared.ask("GET", f"/runs/{done}/report.html")
    assert answer.status == 200 and f"<h1>{done}</h1>" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert 'http-equiv="Content-Security-Policy"' in answer.text


def test_two_runs_are_compared_by_the_command(shared, done, failed):
    assert shared.ask("GET", f"/compare/{done}/{failed}").text == f"<p>{done} and {failed}"


def test_a_plan_is_a_sentence_and_a_curve(shared):
    answer = shared.post(
        "/api/plan", {"preset": "movd.yaml", "prompts": ["a star"], "settings": {"steps": 3}}
    )
    assert answer.json["sentence"] == "This takes about 4 min 10 s in 3.2 GiB; +1.0 GiB saves 50 s."
    assert answer.json["curve"][0] == [3300 << 20, 250.0]
    refused = shared.post("/api/plan", {"preset": "movd.yaml", "prompts": ["fail"]})
    assert (refused.status, refused.json["error"]) == (422, "\u2026/config.yaml: budget 1 GiB cannot hold it")


def test_no_answer_has_a_path_of_this_machine(shared, done, failed):
    (shared.folder / failed / "config.yaml").write_text("t5: {path: /data/secret/t5}\n")
    wrong = {"preset": "movd.yaml", "prompts": ["a"], "settings": {"frames": 2}}
    answers = [
        shared.ask("GET", "/api/presets"),
        shared.ask("GET", "/"),
        shared.ask("GET", f"/runs/{done}/report.html"),
        shared.ask("GET", "/runs/9999/report.html"),
        shared.ask("GET", "/nothing"),
        shared.post("/api/plan", {"preset": "movd.yaml", "prompts": ["fail"]}),
        shared.post("/api/plan", {"preset": "/etc/passwd"}),
        shared.post("/api/runs", wrong),
        shared.post(f"/api/runs/{done}/resume"),
    ]
    texts = [answer.text for answer in answers] + [json.dumps(shared.runs())]
    for path in (
        Path(__file__).parents[2],
        Path.home(),
        Path(tempfile.gettempdir()),
        shared.folder,
        "/data/secret",
    ):
        assert not [text for text in texts if f"{path}/" in text or text.endswith(str(path))], path


def test_what_is_wrong_with_a_request_is_said(shared):
    def said(data: bytes) -> tuple[int, str]:
        answer = shared.ask("POST", "/api/runs", data, **MARK)
        return answer.status, answer.json["error"]

    assert said(b"")[0] == said(b"[]")[0] == said(b"{")[0] == said(b"\xff")[0] == 400
    assert said(b"[" * 100_000)[0] == 400
    assert said(b"{}") == (422, "no preset None (presets: movd.yaml)")
    assert "frames" in said(json.dumps({"preset": "movd.yaml", "settings": {"frames": 2}}).encode())[1]
    assert shared.post("/api/runs/9999/stop").status == 404
    assert shared.post("/api/runs/9999/resume").status == 404


def test_an_image_is_kept_with_its_run_and_goes_with_it(served):
    asked = {"preset": "movd.yaml", "prompts": ["a star"], "settings": {}}
    name = served.post("/api/runs", asked, PNG).json["id"]
    served.wait(name, "done")
    assert (served.folder / f"{name}.png").read_bytes() == PNG
    assert f"reference: {served.folder / name}.png" in (served.folder / f"{name}.yaml").read_text()
    assert served.runs()[name]["has_reference"] is True
    served.ask("DELETE", f"/api/runs/{name}", None, **MARK)
    assert [p.name for p in served.folder.iterdir()] == ["calls.jsonl"]


@pytest.mark.parametrize("image", [b"GIF89a" + bytes(50), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"x"])
def test_what_is_no_image_is_refused_and_not_kept(served, image):
    answer = served.post("/api/runs", {"preset": "movd.yaml", "prompts": ["a"]}, image)
    assert (answer.status, answer.json["error"]) == (400, "the image is none of PNG, JPEG and WebP")
    assert list(served.folder.iterdir()) == []


def test_an_upload_is_limited_as_a_reference_is(served, monkeypatch):
    assert body.MOST_IMAGE_NBYTES == MOST_NBYTES
    assert set(FORMATS) == {"PNG", "JPEG", "WEBP"}
    monkeypatch.setattr(body, "MOST_IMAGE_NBYTES", 1 << 16)
    asked = {"preset": "movd.yaml", "prompts": ["a"]}
    assert served.post("/api/runs", asked, PNG + bytes((1 << 16) - len(PNG))).status == 201
    answer = served.post("/api/runs", asked, PNG + bytes(1 << 16))
    assert answer.status == 413 and "the most" in answer.json["error"]
    assert served.post("/api/plan", asked, PNG + bytes(1 << 16)).status == 413
    assert not list(served.folder.glob(".upload*")) and len(served.runs()) == 1


def test_more_than_is_taken_is_refused_before_it_has_come(served):
    connection = served.connect()
    connection.putrequest("POST", "/api/runs")
    connection.putheader("X-Blockstream", "1")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders(b"{}\n")
    assert connection.getresponse().status == 413
    connection.close()
    long = json.dumps({"preset": "movd.yaml", "prompts": ["x" * body.MOST_ASKED_NBYTES]}).encode()
    assert served.ask("POST", "/api/runs", long, **MARK).status == 413


def test_the_queue_is_bounded(served, monkeypatch):
    monkeypatch.setattr("blockstream_web.maker.MOST_WAITING", 1)
    first = served.make("wait")
    served.wait(first, "running")
    served.make("a star")
    answer = served.post("/api/runs", {"preset": "movd.yaml", "prompts": ["a"]})
    assert answer.status == 422 and "wait already" in answer.json["error"]
    assert len(list(served.folder.glob("*.yaml"))) == 2


def test_records_of_another_shape_are_passed_over(serve):
    with serve() as served:
        name = served.make("a star")
        served.wait(name, "done")
        for stem, text in (
            ("0002", "{"),
            ("0003", "[]"),
            ("0004", '{"id": "0009", "preset": "a", "asked": {}}'),
        ):
            (served.folder / f"{stem}.json").write_text(text)
        record = json.loads((served.folder / f"{name}.json").read_text())
        (served.folder / "0005.json").write_text(json.dumps({**record, "id": "0005", "upload": "../x"}))
    with serve() as served:
        assert list(served.runs()) == [name]
        assert served.make("a star") == "0006"


def test_the_command_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys, served):
    with pytest.raises(ConfigError, match="cannot be listened on"):
        command.listening(HOST, served.port)
    monkeypatch.setenv(command.TOKEN, "short")
    with pytest.raises(ConfigError, match="has 5 characters"):
        command.token_for(needed=False)
    monkeypatch.delenv(command.TOKEN)
    assert command.token_for(needed=False) is None and len(command.token_for(needed=True)) >= 32
    with locked(tmp_path):
        assert main(["web", "movd.yaml", "--runs", str(tmp_path), "--port", "0"]) == 2
    assert "another server's" in capsys.readouterr().err
