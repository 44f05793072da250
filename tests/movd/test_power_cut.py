"""A power cut takes nothing of a run that counts: what is renamed is synced before, and so are folders."""

import os

import pytest

from blockstream.run import runner
from blockstream.system.atomic import make_folder, move, write_atomic
from tests.support.power_cut import recorded


@pytest.mark.parametrize(
    ("keys", "made"),
    [
        ({"prompts": ["a red star", "a blue circle"]}, ["0000/video.mp4", "0001/video.mp4"]),
        ({"prompts": ["a red star"], "frames": 1}, ["image.png"]),
    ],
)
def test_videos_images_and_states_are_on_the_disk_before_they_count(
    config, tmp_path, monkeypatch, keys, made
):
    root = tmp_path / "disk"
    root.mkdir()
    asked = config(**keys, save_every=1)
    with recorded(root, monkeypatch) as disk:
        runner.run(asked, root / "a" / "out")
    assert not disk.early
    renamed = [name.removeprefix("a/out/") for name in disk.renames]
    assert {*made, "config.yaml", "report.json"} <= set(renamed)
    assert sum(name.startswith("state/") for name in renamed) > len(made)
    assert set(disk.lost()) <= {"a/out/ledger.jsonl"}  # its last lines, which no report is made of


def test_the_record_of_a_cut_is_right_itself(tmp_path, monkeypatch):
    with recorded(tmp_path, monkeypatch) as disk:
        (tmp_path / "early").write_text("x")
        os.replace(tmp_path / "early", tmp_path / "renamed")
        assert [line.rpartition("/")[2] for line in disk.early] == ["early before renamed"]
        make_folder(tmp_path / "a" / "b")
        assert disk.lost() == ["renamed"]
        write_atomic(tmp_path / "a" / "b" / "file", b"y")
        (tmp_path / "a" / "loose").mkdir()
        assert disk.lost() == ["a/loose", "renamed"]
        (tmp_path / "a" / "loose" / "file").write_text("z")
        move(tmp_path / "a" / "loose", tmp_path / "a" / "b" / "moved")
        (tmp_path / "a" / "b" / "file").write_text("longer")
        assert disk.lost() == ["a/b/file", "renamed"]
        assert len(disk.early) == 1
