"""`report` draws folders of runs again and compares them, whatever is left of them."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.runs import full_size, write_ledger, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "whole", full_size())


@pytest.fixture
def whole(made, tmp_path):
    return shutil.copytree(made, tmp_path / "whole")


@pytest.fixture
def killed(tmp_path):
    (tmp_path / "killed").mkdir()
    write_ledger(tmp_path / "killed" / "ledger.jsonl", full_size(), upto_s=8.0)
    return tmp_path / "killed"


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_one_run_is_drawn_and_printed(command, whole):
    code, out, err = command("report", str(whole))
    assert (code, err) == (0, "")
    assert "predicted  measured" in out and "r, Eq. 9" in out
    assert (whole / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((whole / "trace.json").read_text())["traceEvents"]


def test_drawing_changes_nothing_else(command, whole):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    command("report", str(whole))
    after = {p.name: p.read_bytes() for p in whole.iterdir()}
    assert after.keys() - before.keys() == {"timeline.png", "report.html", "trace.json"}
    assert {name: after[name] for name in before} == before


def test_a_killed_run_is_drawn_as_far_as_it_goes(command, killed):
    code, out, _ = command("report", str(killed))
    assert code == 0
    assert "did not come to its end" in out
    assert next(line.split()[:2] for line in out.splitlines() if line.startswith("dit")) == ["dit", "1"]
    assert (killed / "timeline.png").exists()


def test_several_runs_are_printed_side_by_side(command, whole, killed):
    code, out, _ = command("report", str(whole), str(killed), "--no-draw")
    assert code == 0
    head = out.splitlines()[0].split()
    assert head == ["whole", "killed"]
    assert any(line.split()[:2] == ["dit:", "measured"] for line in out.splitlines())
    assert not (whole / "report.html").exists()


def test_one_page_compares_them(command, whole, killed, tmp_path):
    assert command("report", str(whole), str(killed), "--compare", str(tmp_path / "both.html"))[0] == 0
    assert "<h3>killed</h3>" in (tmp_path / "both.html").read_text()


def test_json_has_the_reports_and_remarks(command, whole, killed):
    _, out, _ = command("report", str(whole), str(killed), "--json", "--no-draw")
    runs = json.loads(out)["runs"]
    assert runs[0]["report"]["stages"][1]["name"] == "dit"
    assert runs[1]["report"] == {} and "did not come to its end" in runs[1]["remarks"][0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "holds no run"),
        (lambda folder: (folder / "ledger.jsonl").write_text("hello\n"), "line 1: not a ledger"),
        (
            lambda folder: append(
                folder / "ledger.jsonl", 'oops\n["compute","execute",8.0,8.5,"a",null,0]\n'
            ),
            "cut the file before that line to show the rest",
        ),
    ],
    ids=["no run", "no ledger", "broken line"],
)
def test_what_cannot_be_read_is_one_message_and_nothing_is_written(command, whole, damage, message):
    damage(whole)
    code, out, err = command("report", str(whole))
    assert (code, out) == (2, "")
    assert message in err and len(err.splitlines()) == 1
    assert not (whole / "report.html").exists()


def test_a_comparison_that_is_no_page_is_refused(command, whole):
    code, _, err = command("report", str(whole), "--compare", "both.png")
    assert (code, "name a .html file" in err) == (2, True)


def test_a_page_is_shown_in_the_browser_or_where_it_is_is_said(command, whole, tmp_path, monkeypatch):
    import webbrowser

    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: not opened.append(url))
    assert command("report", str(whole), "--open")[0] == 0
    assert opened == [(whole / "report.html").absolute().as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    code, _, err = command("report", str(whole), "--compare", str(tmp_path / "x.html"), "--open")
    assert code == 2 and f"no browser was found here; open {tmp_path / 'x.html'} in one" in err
