"""The embedded model, streamed against resident, as its users would verify it."""

from __future__ import annotations

import pytest

from blockstream.run.config import make_config, read_config
from blockstream.verify.comparison import verify

SETS = ["prompts=[a red circle moving right]", "steps=2", "frames=1", "threads=1"]


@pytest.mark.parametrize("by_segment", [False, True], ids=["whole", "segments"])
def test_the_embedded_model_streams_as_it_runs_in_memory(by_segment, monkeypatch):
    report = verify(make_config(read_config("movd.yaml", SETS)), by_segment=by_segment)
    assert report["difference"] is None
    compared = [(s["name"], s["how"], s["forwards"]) for s in report["stages"]]
    how = "segments" if by_segment else "whole"
    assert compared == [("t5", how, 1), ("dit", how, 2), ("vae", how, 1)]
    assert all(s["visits"] > 1 for s in report["stages"])
