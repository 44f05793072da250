"""The record of a run: read back whatever a kill or a power cut left of it, and never beyond its folder."""

import json

import pytest

from blockstream.errors import ConfigError
from blockstream.run.journal import Journal, Made

MADE = Made(3, "ab")


@pytest.fixture(name="journal")
def _journal(tmp_path):
    journal = Journal(tmp_path)
    journal.begin({"seed": 1}, {"torch": "2"})
    journal.declare(["video.mp4", "0001/video.mp4"], ["state/0000.safetensors"])
    journal.note_inputs({"dit": "x"})
    journal.note_made("video.mp4", MADE)
    return journal


def parts(journal):
    return (
        journal.begun,
        journal.config,
        journal.versions,
        journal.inputs,
        journal.files,
        journal.states,
        journal.made,
        journal.left,
    )


def test_what_was_noted_is_read_back(journal, tmp_path):
    assert parts(Journal.read(tmp_path)) == parts(journal)
    assert journal.made == {"video.mp4": MADE}


def test_nothing_is_known_of_a_folder_without_a_record(tmp_path):
    assert not Journal.read(tmp_path).begun


def test_a_run_in_place_of_another_leaves_the_names_of_the_other(journal, tmp_path):
    journal.begin({"seed": 2}, {})
    journal.declare(["video.mp4"])
    again = Journal.read(tmp_path)
    assert (again.config, again.made, again.inputs) == ({"seed": 2}, {}, {})
    assert again.left == {"0001/video.mp4", "state/0000.safetensors"}
    journal.note_gone(["0001/video.mp4"])
    assert Journal.read(tmp_path).left == {"state/0000.safetensors"}


def test_what_is_gone_does_not_count(journal, tmp_path):
    journal.note_gone(["video.mp4", "never"])
    assert Journal.read(tmp_path).made == {}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_is_left_out_and_written_over(journal, tmp_path, cut):
    path = tmp_path / "files.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Journal.read(tmp_path)
    assert again.made == {}
    again.note_made("video.mp4", MADE)
    assert path.read_bytes() == whole


def test_zeros_after_a_power_cut_are_no_line(journal, tmp_path):
    path = tmp_path / "files.jsonl"
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert Journal.read(tmp_path).made == {"video.mp4": MADE}


@pytest.mark.parametrize("text", [b"", b"\0" * 100, b'{"schema":1,"config":{"see', b'{"sch'])
def test_a_first_line_that_was_never_finished_is_no_run(tmp_path, text):
    (tmp_path / "files.jsonl").write_bytes(text)
    journal = Journal.read(tmp_path)
    assert not journal.begun
    journal.begin({}, {})
    assert Journal.read(tmp_path).begun


HEAD = '{"schema":1,"config":{},"versions":{}}\n'


@pytest.mark.parametrize(
    "text",
    [
        "mine\n",
        "mine",
        '{"schema":9,"config":{},"versions":{}}\nmore\n',
        '{"files":[],"states":[]}\n' + HEAD,
        HEAD + "[]\n" + HEAD,
        HEAD + '{"files":["../up"],"states":[]}\n' + HEAD,
        HEAD + '{"files":["/etc/passwd"],"states":[]}\n' + HEAD,
        HEAD + '{"made":"a/../../b","nbytes":1,"sha256":""}\n' + HEAD,
        HEAD + '{"files":["a\\u0000b"],"states":[]}\n' + HEAD,
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path, text):
    (tmp_path / "files.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"files.jsonl.*not the record of a run"):
        Journal.read(tmp_path)


def test_a_link_is_no_record(tmp_path):
    (tmp_path / "mine").write_text(HEAD)
    (tmp_path / "files.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="not the record"):
        Journal.read(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "", "a//b", "./a"])
def test_no_name_leads_out_of_the_folder(journal, name):
    with pytest.raises(ValueError, match="no path inside"):
        journal.declare([name])


def test_each_line_is_json(journal, tmp_path):
    lines = (tmp_path / "files.jsonl").read_text().splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["schema", "files", "inputs", "made"]
