"""Results go to a folder or to a URL: the same calls, the same files."""

import uuid

import fsspec
import pytest

from blockstream.errors import ConfigError
from blockstream.sweep.mirror import Mirror
from blockstream.sweep.place import Place


@pytest.fixture(params=["folder", "file", "memory"])
def place(request, tmp_path):
    """A new place of each kind."""
    if request.param == "memory":
        name = f"memory://{uuid.uuid4().hex}"
        yield Place(name)
        fsspec.filesystem("memory").rm(name, recursive=True)
    else:
        yield Place(f"{'file://' if request.param == 'file' else ''}{tmp_path}/place")


def test_what_is_written_is_read_listed_and_removed(place, tmp_path):
    place.write("sweep.json", b"1")
    place.write("runs/0/report.json", b"2")
    source = tmp_path / "video.mp4"
    source.write_bytes(b"film")
    place.put(source, "runs/0/a/video.mp4")
    assert place.read("sweep.json") == b"1" and place.read("nothing") is None
    assert place.names("runs/0") == ["a/video.mp4", "report.json"]
    assert place.names("nothing") == []
    place.fetch("runs/0", tmp_path / "here")
    assert (tmp_path / "here" / "a" / "video.mp4").read_bytes() == b"film"
    place.remove(["runs/0/report.json", "runs/0/gone"])
    assert place.names("runs/0") == ["a/video.mp4"]


def test_a_folder_is_known_as_one_and_memory_as_nobody_elses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Place("out").folder == tmp_path / "out"
    assert Place(f"file://{tmp_path}/out").folder == tmp_path / "out"
    assert Place("memory://out").folder is None and not Place("memory://out").is_shared
    assert Place("out").is_shared


def test_an_unknown_url_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"nowhere://x: .*fsspec"):
        Place("nowhere://x")


def test_a_mirror_copies_what_changed_now_and_then_and_the_report_last(place, tmp_path, monkeypatch):
    folder, now, copied = tmp_path / "run", [0.0], []
    (folder / "state").mkdir(parents=True)
    for name in ("files.jsonl", "ledger.jsonl", "report.json", ".video.mp4.part", "state/0000.safetensors"):
        (folder / name).write_text(name)
    mirror = Mirror(folder, place, "runs/0", every_s=60, clock=lambda: now[0])
    put = place.put
    monkeypatch.setattr(place, "put", lambda path, name: (copied.append(name), put(path, name)))
    mirror.pass_finished()
    assert copied == []
    now[0] = 61
    mirror.pass_finished()
    assert copied == ["runs/0/files.jsonl", "runs/0/state/0000.safetensors"]
    now[0] = 122
    (folder / "files.jsonl").write_text("longer than before")
    mirror.pass_finished()
    assert copied[2:] == ["runs/0/files.jsonl"]
    (folder / "state" / "0000.safetensors").unlink()
    mirror.finish()
    assert copied[3:] == ["runs/0/ledger.jsonl", "runs/0/report.json"]
    assert place.names("runs/0") == ["files.jsonl", "ledger.jsonl", "report.json"]


def test_a_copy_that_fails_meanwhile_is_said_and_ends_no_run(tmp_path, caplog):
    class Full(Place):
        def put(self, path, name):
            raise OSError("no space")

    (tmp_path / "files.jsonl").write_text("x")
    mirror = Mirror(tmp_path, Full("memory://full"), "runs/0", every_s=0)
    mirror.pass_finished()
    assert "no space" in caplog.text
    with pytest.raises(OSError, match="no space"):
        mirror.finish()
