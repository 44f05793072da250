"""report.html: one file that asks nobody for anything, with everything from outside escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from blockstream.report import page
from blockstream.report.page import compare_html, report_html
from blockstream.report.record import read_run
from tests.support.runs import LABEL, write_ledger, write_run

EVIL = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>&amp;'


class Reader(HTMLParser):
    """Collects elements, their attributes and the text of each kind."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data):
        where = self._open[-1] if self._open else ""
        self.text.setdefault(where, []).append(data)


@pytest.fixture(scope="module")
def html(finished):
    return report_html(read_run(finished))


def test_it_is_whole_html(html):
    read = Reader(html)
    assert html.startswith("<!doctype html>")
    assert not read._open
    for word in ("Timeline", "Predicted and measured", "How straight the flow was"):
        assert word in read.text["h2"]


def test_it_asks_the_network_for_nothing(html):
    read = Reader(html)
    for tag, name, value in read.attributes:
        if name in ("src", "href", "data", "action", "poster", "srcset"):
            assert value.startswith("data:"), (tag, name, value)
    style = "".join(read.text["style"])
    assert "url(" not in style and "@import" not in style
    script = read.text["script"][-1]
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?:", script)


def test_its_policy_allows_its_own_script_alone(html):
    script = Reader(html).text["script"][-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy


def test_everything_from_outside_is_escaped(tmp_path, plan):
    folder = write_run(tmp_path / EVIL.replace("/", "_"), plan, prompt=EVIL)
    report = json.loads((folder / "report.json").read_text())
    report["versions"] = {EVIL: EVIL}
    report["sampler"]["choice"] = EVIL
    report["stages"][0]["name"] = EVIL
    report["output"]["prompts"] = [EVIL]
    (folder / "video.mp4").write_bytes(b"not a video")
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(f"prompt: {EVIL}")
    ledger = (folder / "ledger.jsonl").read_text().replace("encoder.block.3", json.dumps(EVIL)[1:-1])
    (folder / "ledger.jsonl").write_text(ledger)
    for html in (report_html(read_run(folder)), compare_html([read_run(folder)] * 2)):
        read = Reader(html)
        assert read.tags.count("script") == 2
        assert "img" not in read.tags
        assert not [k for _, k, _ in read.attributes if k.startswith("on")]
        data = json.loads(read.text["script"][0])
        assert EVIL in {bar[2] for bar in data[0]["bars"]["load"]}
    assert EVIL in Reader(report_html(read_run(folder))).text["figcaption"]


def test_a_label_that_looks_like_markup_is_only_text(html):
    data = json.loads(Reader(html).text["script"][0])
    assert data[0]["bars"]["outside"][0][2] == LABEL


def test_results_are_embedded_until_they_are_too_many_bytes(copied, monkeypatch):
    (copied / "video.mp4").write_bytes(b"v" * 100)
    whole = report_html(read_run(copied))
    assert f"data:video/mp4;base64,{base64.b64encode(b'v' * 100).decode()}" in whole
    monkeypatch.setattr(page, "EMBED_NBYTES", 50)
    assert '<video src="video.mp4"' in report_html(read_run(copied))


def test_a_picture_is_shown_as_one(copied):
    (copied / "image.png").write_bytes(b"p")
    (copied / "report.json").unlink()
    assert '<img src="data:image/png;base64,cA=="' in report_html(read_run(copied))


def test_many_results_are_shown_in_part(copied):
    report = json.loads((copied / "report.json").read_text())
    names = [f"{n:04d}.mp4" for n in range(20)]
    for name in names:
        (copied / name).write_bytes(b"v")
    report["output"]["files"] = names
    (copied / "report.json").write_text(json.dumps(report))
    html = report_html(read_run(copied))
    assert html.count("<video") == 12 and "and 8 more in the folder" in html


@pytest.mark.parametrize("folder", ["killed", "older"])
def test_parts_of_runs_have_a_page_that_says_what_is_missing(folder, request):
    record = read_run(request.getfixturevalue(folder))
    read = Reader(report_html(record))
    for remark in record.remarks:
        assert remark in read.text["p"]
    assert json.loads(read.text["script"][0])[0]["bars"]["execute"]


def test_a_run_without_a_ledger_has_a_page(copied):
    (copied / "ledger.jsonl").unlink()
    Reader(report_html(read_run(copied)))


def test_runs_are_compared_on_one_page(finished, killed, older):
    records = [read_run(folder) for folder in (finished, killed, older)]
    read = Reader(compare_html(records))
    assert read.text["h3"] == ["finished", "killed", "older"]
    assert len(json.loads(read.text["script"][0])) == 3
    assert "dit: predicted" in read.text["td"]


def test_a_long_run_has_a_small_page(tmp_path, monkeypatch, plan):
    write_ledger(tmp_path / "ledger.jsonl", plan)
    monkeypatch.setattr(page, "BARS", 100)
    data = json.loads(Reader(report_html(read_run(tmp_path))).text["script"][0])[0]
    assert sum(map(len, data["bars"].values())) < 400
    assert data["bars"]["execute"][-1][1] == pytest.approx(data["wall_s"], abs=1e-3)


def test_numbers_that_json_lacks_are_refused_not_written(copied):
    text = (copied / "ledger.jsonl").read_text().splitlines()
    text[5] = '["compute","execute",NaN,Infinity,"x",null,0]'
    (copied / "ledger.jsonl").write_text("\n".join(text) + "\n")
    from blockstream.errors import ConfigError

    with pytest.raises(ConfigError, match="line 6"):
        report_html(read_run(copied))


def test_the_files_of_the_page_are_packaged():
    import tomllib
    from pathlib import Path

    root = Path(__file__).parent.parent.parent
    with (root / "pyproject.toml").open("rb") as file:
        data = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    listed = data.get("blockstream.report", [])
    assert {"*.css", "*.js"} <= set(listed), "the wheel lacks page.css and page.js"
