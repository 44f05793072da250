"""What runs took around their stages is what the next is predicted to take."""

from __future__ import annotations

from blockstream.report.items import REST, SETUP, measured_items
from blockstream.run import around


def test_a_plan_and_a_run_start_from_what_the_last_run_took(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_CACHE", str(tmp_path))
    first = around.predicted("movd", 2, 3.0, {"dit": 9.0}, planning=True)
    assert [x["predicted_s"] for x in first] == [3.0 + around.START_S, 9.0, around.REST_S]
    stages = [{"name": "dit", "begin_s": 4.0, "wall_s": 8.0, "predicted_s": 9.0}]
    around.remember("movd", 2, 3.5, measured_items(first, stages, 13.5))
    plan = {x["name"]: x["predicted_s"] for x in around.predicted("movd", 2, 99.0, {}, planning=True)}
    run = {x["name"]: x["predicted_s"] for x in around.predicted("movd", 2, 2.0, {}, planning=False)}
    assert plan == {SETUP: 4.0, REST: 1.5}
    assert run == {SETUP: 2.5, REST: 1.5}
    assert around.predicted("another", 2, 1.0, {}, planning=True)[0]["predicted_s"] == 1.0 + around.START_S
