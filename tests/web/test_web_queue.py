"""Runs are made one after another, stop, go on, and end with the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.processes import children

pytestmark = pytest.mark.timeout(120)


def test_runs_are_made_in_order_one_at_a_time(served):
    first, second, third = (served.make(f"wait {n}") for n in range(3))
    served.wait(first, "running")
    assert [served.runs()[n]["state"] for n in (second, third)] == ["waiting", "waiting"]
    (served.folder / "go").touch()
    served.wait(third, "done")
    assert served.calls == [["run", first], ["run", second], ["run", third]]
    run = served.runs()[first]
    assert run["results"] == ["video.mp4"]
    assert (run["wall_s"], run["peak_nbytes"], run["passes"]) == (1.5, 300 << 20, [3, 3])


def test_what_waits_can_leave_the_queue_and_come_again(served):
    first, second = served.make("wait"), served.make("a star")
    assert served.post(f"/api/runs/{second}/stop").json == {"state": "stopped"}
    (served.folder / "go").touch()
    served.wait(first, "done")
    assert served.runs()[second]["state"] == "stopped"
    assert served.post(f"/api/runs/{second}/resume").json == {"state": "waiting"}
    served.wait(second, "done")
    assert served.calls == [["run", first], ["run", second]]  # nothing was begun: it is no resumption


def test_a_run_that_is_stopped_goes_on_where_it_was(served):
    name = served.make("wait")
    served.wait(name, "running")
    wait_for_folder(served, name)
    served.post(f"/api/runs/{name}/stop")
    assert served.wait(name, "stopped")["error"] == ""
    (served.folder / "go").touch()
    served.post(f"/api/runs/{name}/resume")
    served.wait(name, "done")
    assert served.calls == [["run", name], ["resume", name]]


def test_a_failure_says_what_and_hides_where(served):
    name = served.make("fail")
    after = served.make("a star")
    assert served.wait(name, "failed")["error"] == "\u2026/weights.bin is damaged"
    served.wait(after, "done")


def test_what_a_run_is_asked_for_becomes_its_config(served):
    name = served.make(
        'a "red" star: #1 \U0001f31f', seed=7, steps=2, sampler={"name": "lpl", "tolerance": 0.1}
    )
    served.wait(name, "done")
    text = (served.folder / f"{name}.yaml").read_text(encoding="utf-8")
    from blockstream.run.yamlfile import parse

    data = parse(text, "config").data
    assert (data["prompt"], data["seed"], data["steps"]) == ('a "red" star: #1 \U0001f31f', 7, 2)
    assert (data["sampler"]["name"], data["sampler"]["tolerance"]) == ("lpl", 0.1)
    assert data["output"] is None


def wait_for_folder(served, name):
    until = time.monotonic() + 60
    while not (served.folder / name / "files.jsonl").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_ending_the_server_ends_its_run_which_goes_on_with_the_next(serve):
    others = children()
    with serve() as served:
        name, waiting = served.make("wait"), served.make("a star")
        wait_for_folder(served, name)
        assert children() - others
    assert not children() - others
    with serve() as served:
        assert {n: r["state"] for n, r in served.runs().items()} == {name: "stopped", waiting: "stopped"}
        (served.folder / "go").touch()
        served.post(f"/api/runs/{name}/resume")
        served.wait(name, "done")
        assert served.calls == [["run", name], ["resume", name]]
    left = {p.name for p in served.folder.iterdir()} - {"go", "calls.jsonl"}
    assert left == {name, f"{name}.json", f"{name}.yaml", f"{waiting}.json", f"{waiting}.yaml"}


def test_an_open_page_does_not_keep_the_server(serve):
    with serve() as served:
        connection = served.connect()
        connection.request("GET", "/api/events")
        response = connection.getresponse()
        assert response.readline() == b"event: runs\n"
        began = time.monotonic()
    assert time.monotonic() - began < 9, "it waited for the page until its patience ended"
    response.read()
    connection.close()


def test_a_page_is_told_of_what_happens_as_it_happens(served):
    connection = served.connect()
    connection.request("GET", "/api/events")
    response = connection.getresponse()
    assert response.headers["content-type"].startswith("text/event-stream")
    name = served.make("a star")
    told = {}
    while not (run := told.get("runs", {}).get(name)) or run["state"] != "done":
        line = response.readline().decode()
        if line.startswith("event: "):
            kind = line[7:].strip()
            value = json.loads(response.readline()[6:])
            told.setdefault(kind, []) if kind == "sample" else None
            if kind == "runs":
                told["runs"] = {r["id"]: r for r in value["runs"]}
            elif kind == "sample":
                told["sample"].append(value)
    connection.close()
    assert [s["pass"] for s in told["sample"]] == [1, 2, 3]
    assert told["sample"][0]["id"] == name and told["sample"][0]["budget_nbytes"] == 512 << 20


def test_a_page_that_comes_late_is_told_the_curve_so_far(served):
    name = served.make("wait")
    wait_for_folder(served, name)
    until = time.monotonic() + 60
    while len(served.site.maker.course.public()["curve"]) < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    connection = served.connect()
    connection.request("GET", "/api/events")
    response = connection.getresponse()
    lines = [response.readline() for _ in range(5)]
    connection.close()
    assert lines[3] == b"event: course\n"
    course = json.loads(lines[4].removeprefix(b"data: "))
    assert course["id"] == name and course["last"]["pass"] == 3
    assert course["curve"] == [[0.0, 300 << 20], [0.5, 300 << 20], [1.0, 300 << 20]]


def test_deleting_takes_all_of_a_run_and_nothing_else(served):
    first, second = served.make("a star"), served.make("wait")
    served.wait(first, "done")
    served.wait(second, "running")
    refused = served.ask("DELETE", f"/api/runs/{second}", None, X_Blockstream="1")
    assert refused.status == 422 and "stop it first" in refused.json["error"]
    assert served.ask("DELETE", f"/api/runs/{first}", None, X_Blockstream="1").status == 204
    assert not [p for p in served.folder.iterdir() if p.name.startswith(first)]
    assert second in served.runs() and first not in served.runs()


def test_the_command_serves_until_ctrl_c(tmp_path):
    code = "import sys; from blockstream.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "web", "movd.yaml", "--port", "0", "--runs", "runs"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BLOCKSTREAM_CACHE": str(tmp_path / "cache")},
    )
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:") and "token" not in line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert list((tmp_path / "runs").iterdir()) == []
