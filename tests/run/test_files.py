"""A run's files: whole or not at all, checked before they are used again."""

import os

import pytest
import torch

from blockstream.errors import ConfigError, EngineError
from blockstream.run.files import Files
from blockstream.run.journal import Journal


@pytest.fixture(name="files")
def _files(tmp_path):
    files = Files(tmp_path)
    files.begin({}, {})
    files.declare(["a.bin", "0000/b.bin"], ["s"])
    return files


def resumed(folder):
    files = Files(folder, Journal.read(folder), resumed=True)
    files.accept()
    return files


def test_a_written_file_is_whole_for_this_run_and_for_the_one_that_goes_on(files, tmp_path):
    files.write("0000/b.bin", b"data")
    assert (tmp_path / "0000" / "b.bin").read_bytes() == b"data"
    assert resumed(tmp_path).is_whole("0000/b.bin")
    assert not resumed(tmp_path).is_whole("a.bin")
    assert not Files(tmp_path, Journal.read(tmp_path)).is_whole("0000/b.bin")


@pytest.mark.parametrize("data", [b"", b"dat", b"dato", b"\0\0\0\0"])
def test_a_file_that_is_not_as_it_was_written_is_not_whole(files, tmp_path, data, caplog):
    files.write("a.bin", b"data")
    (tmp_path / "a.bin").write_bytes(data)
    assert not resumed(tmp_path).is_whole("a.bin")
    assert "made again" in caplog.text


def test_a_link_or_a_pipe_in_place_of_a_file_is_not_whole(files, tmp_path):
    files.write("a.bin", b"data")
    (tmp_path / "a.bin").rename(tmp_path / "elsewhere")
    (tmp_path / "a.bin").symlink_to(tmp_path / "elsewhere")
    assert not resumed(tmp_path).is_whole("a.bin")
    (tmp_path / "a.bin").unlink()
    os.mkfifo(tmp_path / "a.bin")
    assert not resumed(tmp_path).is_whole("a.bin")


def test_a_failure_while_writing_leaves_what_was_there(files, tmp_path):
    files.write("a.bin", b"data")
    with pytest.raises(RuntimeError), files.writing("a.bin") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "files.jsonl"]
    assert resumed(tmp_path).is_whole("a.bin")


def test_what_a_kill_left_half_written_goes_when_the_run_goes_on_and_nothing_else(files, tmp_path):
    (tmp_path / "0000").mkdir()
    (tmp_path / "state").mkdir()
    half = [".a.bin.part", "0000/.b.bin.part", "state/.s.safetensors.part"]
    mine = [".env.1", ".notes.part", "0000/.c.bin.part", "state/.bak.1", "video.part"]
    for name in (*half, *mine):
        (tmp_path / name).touch()
    resumed(tmp_path)
    assert not any((tmp_path / name).exists() for name in half)
    assert all((tmp_path / name).exists() for name in mine)


def test_nothing_is_written_before_the_run_is_accepted(tmp_path):
    files = Files(tmp_path)
    files.declare(["a.bin"], ["s"])
    for write in (lambda: files.write("a.bin", b""), lambda: files.save("s", {})):
        with pytest.raises(EngineError, match=r"before the run has begun; write in run\(\)"):
            write()
    assert list(tmp_path.iterdir()) == []


STATE = {
    "z": torch.arange(6.0).reshape(2, 3).t(),
    "memory": [None, {"v": torch.ones((), dtype=torch.bfloat16), "n": 3, "f": 0.1, "on": True}],
    "empty": torch.zeros(0, 4),
}


def test_a_state_comes_back_with_its_order_in_memory(files, tmp_path):
    files.save("s", STATE)
    for found in (files.load("s"), resumed(tmp_path).load("s")):
        assert torch.equal(found["z"], STATE["z"]) and found["z"].stride() == STATE["z"].stride()
        assert found["memory"][1]["v"].dtype == torch.bfloat16
        assert (found["memory"][0], found["memory"][1]["n"], found["memory"][1]["on"]) == (None, 3, True)
        assert found["empty"].shape == (0, 4)


def test_a_state_of_an_earlier_run_is_not_loaded(files, tmp_path):
    files.save("s", STATE)
    assert Files(tmp_path, Journal.read(tmp_path)).load("s") is None
    assert resumed(tmp_path).load("other") is None


@pytest.mark.parametrize("what", ["text", b"bytes", object(), {1, 2}])
def test_what_cannot_be_saved_is_named(files, tmp_path, what):
    with pytest.raises(ConfigError, match=r"memory.0.x is \w+; what is to be saved must be tensors"):
        files.save("s", {"memory": [{"x": what}]})
    assert not list((tmp_path / "state").iterdir())


def test_a_state_that_is_not_finite_is_not_used(files, tmp_path, caplog):
    files.save("s", {"z": torch.tensor([1.0, float("nan")])})
    assert resumed(tmp_path).load("s") is None
    assert "z holds numbers that are not finite" in caplog.text


def test_removing_states_removes_their_folder_and_leaves_what_else_is_in_it(files, tmp_path):
    files.save("s", STATE)
    files.drop_states()
    assert not (tmp_path / "state").exists()
    files.save("s", STATE)
    (tmp_path / "state" / "mine").touch()
    files.drop_states()
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["mine"]


def test_other_inputs_than_those_a_run_was_begun_with_are_refused(files, tmp_path):
    files.identify({"dit": "a", "vae": "b"})
    resumed(tmp_path).identify({"dit": "a", "new": "c"})
    with pytest.raises(ConfigError, match="begun with another dit, another vae: its rest"):
        resumed(tmp_path).identify({"dit": "x", "vae": "y", "new": "c"})
