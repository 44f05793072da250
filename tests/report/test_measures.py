"""Measures of videos without weights, against their definitions written out."""

import math
from importlib.util import find_spec

import numpy as np
import pytest

from blockstream.report.measures import cosine, flicker, motion, psnr, ssim

RANDOM = np.random.default_rng(0)
A = RANDOM.integers(0, 256, (2, 14, 17, 3), dtype=np.uint8)


def test_psnr_is_that_of_the_mean_square():
    assert psnr(A, A) == math.inf
    other = np.clip(A.astype(int), 5, 250).astype(np.uint8)
    error = ((A.astype(float) - other) ** 2).mean()
    assert psnr(A, other) == pytest.approx(10 * math.log10(255**2 / error))


def test_ssim_equals_its_definition_at_every_place():
    noise = RANDOM.integers(-30, 31, A.shape)
    other = np.clip(A.astype(int) + noise, 0, 255).astype(np.uint8)
    at = np.arange(11) - 5
    window = np.exp(-(at**2) / 4.5)
    window = np.outer(window, window) / window.sum() ** 2
    found = []
    for x, y in zip(A.astype(float), other.astype(float), strict=True):
        for i in range(14 - 10):
            for j in range(17 - 10):
                for c in range(3):
                    p, q = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    both = (window * (p - mp) * (q - mq)).sum()
                    top = (2 * mp * mq + 2.55**2) * (2 * both + 7.65**2)
                    found.append(top / ((mp**2 + mq**2 + 2.55**2) * (vp + vq + 7.65**2)))
    assert ssim(A, other) == pytest.approx(np.mean(found), rel=1e-9)
    assert ssim(A, A) == pytest.approx(1)


def test_ssim_of_frames_smaller_than_its_window():
    small = A[:, :4, :6]
    assert ssim(small, small) == pytest.approx(1)
    assert ssim(small, 255 - small) < 0.5


def test_flicker_is_one_where_nothing_changes_and_needs_two_frames():
    still = np.repeat(A[:1], 4, 0)
    assert flicker(still) == 1
    black_and_white = np.stack([np.zeros_like(A[0]), np.full_like(A[0], 255)] * 2)
    assert flicker(black_and_white) == 0
    with pytest.raises(ValueError, match="fewer than two frames"):
        flicker(A[:1])


@pytest.mark.skipif(find_spec("cv2") is None, reason="OpenCV is not installed")
def test_motion_grows_with_how_far_a_picture_moves():
    picture = np.kron(RANDOM.integers(0, 256, (12, 12, 1)), np.ones((8, 8, 3))).astype(np.uint8)
    by = {
        n: motion(np.stack([np.roll(picture, n * t, 1)[16:80, 16:80] for t in range(3)])) for n in (0, 1, 3)
    }
    assert by[0] == pytest.approx(0, abs=0.01)
    assert 0.3 < by[1] < by[3]


def test_motion_is_not_known_without_opencv(monkeypatch):
    monkeypatch.setattr("blockstream.report.measures.find_spec", lambda name: None)
    assert motion(A) is None


def test_the_cosine_of_arrays_taken_whole():
    assert cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(0.5**0.5)
    assert cosine(A, A) == pytest.approx(1)
    assert cosine([0.0, 0.0], [1.0, 1.0]) is None
    assert cosine([math.inf, 0.0], [1.0, 1.0]) is None
