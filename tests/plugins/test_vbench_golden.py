"""VBench's formulas against its own loops, on features, flow and frames that are given."""

import numpy as np
import pytest
from blockstream_vbench import formulas
from blockstream_vbench.dimensions import DIMENSIONS, quality, quality_as_in_table, weighted

pytestmark = pytest.mark.golden
FOLDER = "vbench_formulas"
CLOSE = {"rel": 1e-6, "abs": 1e-6}


def arrays(named):
    return {k: v.numpy() for k, v in named.items()}


def test_flickering(golden):
    given, want = arrays(golden.given("flicker")), golden.expected("flicker")
    scores = [formulas.flicker(given[name]) for name in sorted(given)]
    assert scores == pytest.approx(want["per_video"].tolist(), **CLOSE)
    assert formulas.average(scores) == pytest.approx(float(want["average"]), **CLOSE)


def test_consistency_weighs_videos_by_their_frames(golden):
    given, want = arrays(golden.given("consistency")), golden.expected("consistency")
    found = [formulas.consistency(given[name]) for name in sorted(given)]
    scores, frames = zip(*found, strict=True)
    assert scores == pytest.approx(want["per_video"].tolist(), **CLOSE)
    assert formulas.average(scores, frames) == pytest.approx(float(want["subject"]), **CLOSE)
    assert formulas.average(scores, frames) == pytest.approx(float(want["background"]), **CLOSE)


def test_aesthetics(golden):
    features = arrays(golden.given("consistency"))
    head, want = golden.given("aesthetic"), golden.expected("aesthetic")
    scores = [
        formulas.aesthetic(features[name], head["weight"].numpy(), float(head["bias"]))
        for name in sorted(features)
    ]
    assert scores == pytest.approx(want["per_video"].tolist(), **CLOSE)
    assert formulas.average(scores) == pytest.approx(float(want["average"]), **CLOSE)


def test_motion(golden):
    given, want = arrays(golden.given("dynamic")), golden.expected("dynamic")
    cases = golden.meta["cases"]["dynamic"]
    moved = []
    for n, (frames, height, width, _) in enumerate(cases):
        scores = formulas.flow_scores(given[f"flow{n}"])
        np.testing.assert_allclose(scores, want[f"score{n}"].numpy(), rtol=1e-6, atol=1e-6)
        assert formulas.motion_limits(frames, height, width) == pytest.approx(want[f"params{n}"].tolist())
        moved.append(formulas.moves(scores, frames, height, width))
        assert moved[-1] == bool(want[f"moves{n}"])
    assert set(moved) == {True, False}


def test_smoothness(golden):
    given, want = arrays(golden.given("smooth")), golden.expected("smooth")
    for n in range(2):
        score = formulas.smoothness(given[f"video{n}"], given[f"interpolated{n}"])
        assert score == pytest.approx(float(want[f"score{n}"]), **CLOSE)


def test_the_quality_score_as_published_and_as_in_the_papers_table(golden):
    raw, want = golden.given("quality")["raw"].tolist(), golden.expected("quality")
    for row, parts, score, table in zip(
        raw, want["normalised_weighted"], want["score"], want["as_in_table6"], strict=True
    ):
        scores = {d.name: x for d, x in zip(DIMENSIONS, row, strict=True)}
        assert list(weighted(scores).values()) == pytest.approx(parts.tolist(), **CLOSE)
        assert quality(scores) == pytest.approx(float(score), **CLOSE)
        assert quality_as_in_table(scores) == pytest.approx(float(table), **CLOSE)
