"""The judge of the tiny model: right on rendered truth, wrong on what is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from examples.train_tiny import checker, data

SCENE = data.Scene("star", "purple", "right", "slowly", "gray")


@pytest.fixture(name="rng")
def _rng():
    return np.random.default_rng(11)


def right(frames, scene):
    return all(checker.read(frames).judge(scene).values())


def test_rendered_truth_is_read_right(rng):
    everything = data.scenes()
    chosen = [everything[i] for i in rng.choice(len(everything), 64, replace=False)]
    assert sum(right(data.render(scene, rng), scene) for scene in chosen) >= 63


def test_a_noisy_video_is_still_read_right(rng):
    frames = data.render(SCENE, rng).astype(float)
    noisy = np.clip(frames + rng.normal(0, 10, frames.shape), 0, 255).astype(np.uint8)
    assert right(noisy, SCENE)


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        ("shape", "triangle"),
        ("colour", "blue"),
        ("motion", "left"),
        ("motion", "circling"),
        ("speed", "quickly"),
        ("background", "black"),
    ],
)
def test_only_the_attribute_that_differs_is_wrong(attribute, other, rng):
    verdict = checker.read(data.render(SCENE, rng)).judge(dataclasses.replace(SCENE, **{attribute: other}))
    wrong = {name for name, good in verdict.items() if not good}
    assert attribute in wrong
    assert wrong <= {attribute, "speed"} if attribute == "motion" else wrong == {attribute}


@pytest.mark.parametrize(("attribute", "other"), [("shape", "circle"), ("colour", "red")])
def test_a_clip_that_drifts_in_its_last_fifth_is_wrong(attribute, other):
    start = data.render(SCENE, np.random.default_rng(1))
    end = data.render(dataclasses.replace(SCENE, **{attribute: other}), np.random.default_rng(1))
    drifting = np.concatenate([start[:40], end[40:]])
    verdict = checker.read(drifting).judge(SCENE)
    assert not verdict.pop(attribute)
    assert all(verdict.values())


def test_a_plain_clip_shows_nothing():
    reading = checker.read(np.full((51, 64, 64, 3), 118, np.uint8))
    assert set(reading.shapes) == {checker.UNNAMED}
    assert reading.motion == checker.UNNAMED


def test_noise_shows_no_shape(rng):
    frames = rng.integers(0, 256, (51, 64, 64, 3), dtype=np.uint8)
    assert set(checker.read(frames).shapes) == {checker.UNNAMED}


def test_a_shape_that_jumps_about_has_no_motion(rng):
    frames = data.render(dataclasses.replace(SCENE, speed="quickly"), rng)
    assert checker.read(frames[rng.permutation(51)]).motion == checker.UNNAMED


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[T, 64, 64, 3\]"):
        checker.read(np.zeros((51, 32, 32, 3), np.uint8))


def test_held_out_combinations_cover_every_value_and_leave_the_rest():
    held = data.held_out()
    assert len(held) == 16
    assert [{combo[i] for combo in held} for i in range(3)] == [
        set(data.SHAPES),
        set(data.COLOURS),
        set(data.MOTIONS),
    ]
    assert not held & {scene.combination for scene in data.scenes(held=False)}
    assert len(data.scenes(held=True)) + len(data.scenes(held=False)) == len(data.scenes())
