from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as library_save

from blockstream.checkpoint.read.entries import MOST
from blockstream.checkpoint.read.safetensors_header import MOST_HEADER_NBYTES, read_header
from blockstream.errors import CheckpointError
from tests.support.checkpoint_files import arrays, safetensors_bytes
from tests.support.mutations import check_safetensors, damaged_safetensors


def raw(table: object, data: bytes = b"", **options: object) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def row(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data_mod_64", range(0, 64, 8))
def test_entries_say_where_each_tensors_bytes_are(tmp_path, data_mod_64):
    tensors = arrays((3, 5), (7,), (), (0, 4))
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(tensors, data_mod_64))
    header = read_header(path)
    content = path.read_bytes()
    assert header.data_start % 64 == data_mod_64
    assert list(header.entries) == list(tensors)
    for name, e in header.entries.items():
        assert (e.dtype, e.shape) == ("F32", tensors[name].shape)
        assert content[e.offset : e.end] == tensors[name].tobytes()


def test_a_file_of_the_safetensors_library_is_read_with_its_metadata(tmp_path):
    tensors = {**arrays((4, 4)), "i": np.arange(3)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(library_save(tensors, {"format": "pt"}))
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {n: e.dtype for n, e in header.entries.items()} == {"t0": "F32", "i": "I64"}


def test_a_file_shorter_than_its_length_field_is_refused(tmp_path):
    refused(tmp_path, b"\0" * 7, "has 7 bytes")


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    refused(tmp_path, struct.pack("<Q", 100) + b"{}", "claims a header of 100 bytes in a file of 10")


@pytest.mark.parametrize("n", [MOST_HEADER_NBYTES + 1, 2**63, 2**64 - 1])
def test_a_header_over_100_mb_is_refused_before_it_is_read(tmp_path, n):
    refused(tmp_path, struct.pack("<Q", n) + b"{}", f"claims a header of {n} bytes, the format allows")


@pytest.mark.parametrize("missing", [1, 40, 63])
def test_a_truncated_file_is_refused_naming_the_tensor(tmp_path, missing):
    content = safetensors_bytes(arrays((4,), (16,)))
    refused(tmp_path, content[:-missing], "'t1' lies at bytes .* truncated")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"nonsense", "is not a JSON table"),
        (b"\xff\xfe{}", "is not a JSON table"),
        (b"[" * 100_000, "is not a JSON table"),
        (b"[]", "is a list"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "occurs twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not a JSON table"),
        ({"a": 3}, "without dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": []}}, "without dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, "not a table of strings"),
        ({"__metadata__": 5}, "not a table of strings"),
        ({"a": row(dtype="F31")}, "the dtype 'F31'"),
        ({"a": row(dtype=["F32"])}, "the dtype"),
        ({"a": row(shape=(-2,))}, "the shape"),
        ({"a": row(shape=(2.0,))}, "the shape"),
        ({"a": row(shape=(True, 2))}, "the shape"),
        ({"a": row(shape=(2**63,))}, "the shape"),
        ({"a": row(shape=(2**32, 2**32))}, "more than 2\\^63 bytes"),
        ({"a": row(shape=[2**40] * 1000)}, "more than 2\\^63 bytes"),
        ({"a": row(offsets=(8, 0))}, "-8 bytes, but F32"),
        ({"a": row(offsets=(-8, 0))}, "places 'a' at"),
        ({"a": row(offsets=(0, 8, 9))}, "places 'a' at"),
        ({"a": row(offsets=("0", "8"))}, "places 'a' at"),
        ({"a": row(offsets=(0, 4))}, "4 bytes, but F32 of shape \\[2\\] is 8"),
        ({"a": row(shape=(0,), offsets=(MOST, MOST))}, "beyond 2\\^63"),
        ({"a": row(shape=(0,), offsets=(2**64, 2**64))}, "places 'a' at"),
        ({"a": row(), "b": row(offsets=(4, 12))}, "'a' ends at byte .* after 'b' begins"),
        ({"a": row(), "b": row()}, "cannot overlap"),
        ({"a": row(offsets=(12, 20))}, "lies at bytes"),
    ],
)
def test_a_lying_header_is_refused(tmp_path, table, message):
    refused(tmp_path, raw(table, b"\0" * 16), message)


def test_a_file_that_cannot_be_opened_is_refused_with_the_cause(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"none\.safetensors.*No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a folder; only regular files are read"):
        read_header(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=40))
def test_no_bytes_make_the_parser_raise_anything_else(text, data):
    check_safetensors(struct.pack("<Q", len(text)) + text + data)
    check_safetensors(text)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_a_damaged_header_is_refused_or_still_describes_bytes_of_the_file(seed):
    check_safetensors(damaged_safetensors(seed))
