"""No path of the machine gets through; what only looks like one stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from blockstream_web.scrub import Scrub


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("t5.path /data/t5 xxl/a does not exist", "t5.path \u2026/t5 xxl/a does not exist"),
        ("'/srv/x/y.yaml', line 3", "'\u2026/y.yaml', line 3"),
        ("path:/etc/ssl/key.pem", "path:\u2026/key.pem"),
        ("go on with --resume /srv/out/0001", "go on with --resume \u2026/0001"),
        ("file:///srv/a/b.html", "\u2026/b.html"),
        ("~/weights/t5/a.safetensors: No such file", "\u2026/a.safetensors: No such file"),
        (r"C:\Users\me\w.bin is", "\u2026/w.bin is"),
        ("(/a/b/c)", "(\u2026/c)"),
    ],
)
def test_a_path_is_its_last_part(said, left):
    assert Scrub().text(said) == left


@pytest.mark.parametrize(
    "said",
    [
        "a star and/or a circle",
        "1/2 of 3/4",
        "http://127.0.0.1:8321/runs/0001/video.mp4",
        "0000/video.mp4",
        "a / b",
    ],
)
def test_what_is_no_path_stays(said):
    assert Scrub().text(said) == said


def test_known_folders_may_have_blanks(tmp_path):
    folder = tmp_path / "my runs"
    scrub = Scrub(folder)
    assert scrub.text(f"{folder}/0001/a.bin is damaged") == "\u2026/a.bin is damaged"
    assert scrub.text(f"in {folder}: full") == "in \u2026/my runs: full"
    assert str(Path.home()) not in scrub.text(f"{Path.home()}/x y/z")


def test_values_are_scrubbed_all_the_way_down():
    found = Scrub().all({"a": ["/x/y/z", 3, None], "b": {"c": ("/q/r/s",)}})
    assert found == {"a": ["\u2026/z", 3, None], "b": {"c": ["\u2026/s"]}}
