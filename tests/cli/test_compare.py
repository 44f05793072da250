"""`compare` measures what two runs made of the same prompts and puts them on one page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from movd.video import write_image, write_video


def moving(shift=0, frames=5, size=32):
    found = np.zeros((frames, size, size, 3), np.uint8)
    for t in range(frames):
        found[t, 8:16, 4 + 2 * t + shift : 12 + 2 * t + shift] = (200, 80, 40)
    return found


@pytest.fixture
def folder(tmp_path):
    def make(name, videos, latents=None):
        """Write a run's folder; `videos` are (prompt, frames)."""
        root = tmp_path / name
        files = []
        for n, (_, frames) in enumerate(videos):
            (root / f"{n:04}").mkdir(parents=True)
            target = root / f"{n:04}" / ("video.mp4" if len(frames) > 1 else "image.png")
            if len(frames) > 1:
                write_video(target, [frames], 8)
            else:
                write_image(target, frames[0])
            if latents is not None:
                save_file({"z": latents}, root / f"{n:04}" / "latents.safetensors")
            files.append(target.relative_to(root).as_posix())
        output = {"files": files, "prompts": [prompt for prompt, _ in videos]}
        (root / "report.json").write_text(json.dumps({"schema": 1, "output": output, "stages": []}))
        return str(root)

    return make


def test_a_run_is_equal_to_itself(command, folder):
    z = np.arange(6, dtype=np.float32)
    a = folder("a", [("a cat", moving())], z)
    b = folder("b", [("a cat", moving())], z)
    code, out, _ = command("compare", a, b, "--json")
    (pair,) = json.loads(out)["pairs"]
    assert code == 0
    assert pair["equal"] is True and pair["psnr_db"] is None
    assert pair["ssim"] == pytest.approx(1) and pair["latent_cosine"] == pytest.approx(1)
    assert pair["flicker_a"] == pair["flicker_b"] < 1
    assert "equal" in command("compare", a, b)[1]


def test_pairs_are_matched_by_prompt_and_the_rest_is_said(command, folder):
    a = folder("a", [("a cat", moving()), ("a dog", moving(4)), ("alone", moving())])
    b = folder("b", [("a dog", moving(5)), ("a cat", moving())])
    code, out, _ = command("compare", a, b, "--json")
    found = json.loads(out)
    by_prompt = {p["prompt"]: p for p in found["pairs"]}
    assert code == 0 and list(by_prompt) == ["a cat", "a dog"]
    assert by_prompt["a cat"]["equal"] and not by_prompt["a dog"]["equal"]
    assert 10 < by_prompt["a dog"]["psnr_db"] < 40
    assert by_prompt["a cat"]["latent_cosine"] is None
    assert found["remarks"] == ["1 results of a alone are left out"]
    _, text, _ = command("compare", a, b)
    assert "median of 2" in text and "1 results of a alone" in text


def test_results_of_other_sizes_are_not_compared_pixel_by_pixel(command, folder):
    a = folder("a", [("a cat", moving())])
    b = folder("b", [("a cat", moving(frames=4))])
    _, out, _ = command("compare", a, b, "--json")
    (pair,) = json.loads(out)["pairs"]
    assert pair["psnr_db"] is None and not pair["equal"]
    assert pair["remark"] == "frames are 5 of 32x32 and 4 of 32x32: not compared pixel by pixel"
    assert pair["flicker_b"] is not None


def test_pictures_are_compared_too(command, folder):
    a = folder("a", [("a cat", moving(frames=1))])
    b = folder("b", [("a cat", moving(2, frames=1))])
    _, out, _ = command("compare", a, b, "--json")
    (pair,) = json.loads(out)["pairs"]
    assert pair["psnr_db"] > 5 and pair["flicker_a"] is None


def test_the_page_holds_its_videos_and_reaches_for_nothing_else(command, folder, tmp_path):
    a = folder("a", [("<script>a cat", moving())])
    b = folder("b", [("<script>a cat", moving(1))])
    page = tmp_path / "pairs.html"
    code, _, _ = command("compare", a, b, "--out", str(page))
    text = page.read_text()
    assert code == 0
    assert text.count('src="data:video/mp4;base64,') == 2
    assert "<script>a cat" not in text and "&lt;script&gt;a cat" in text
    assert not re.search(r"https?://", text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "pairs.txt"], r"name a \.html file"),
        ([], "no result of the same prompt"),
    ],
)
def test_what_cannot_be_compared_is_refused(command, folder, arguments, said):
    a, b = folder("a", [("a cat", moving())]), folder("b", [("a dog", moving())])
    code, _, err = command("compare", a, b, *arguments)
    assert code == 2 and re.search(said, err)


def test_a_file_that_is_no_video_is_named(command, folder, tmp_path):
    a, b = (folder(name, [("a cat", moving())]) for name in "ab")
    (tmp_path / "b" / "0000" / "video.mp4").write_bytes(b"not a video")
    code, _, err = command("compare", a, b)
    assert code == 2 and "b/0000/video.mp4" in err
