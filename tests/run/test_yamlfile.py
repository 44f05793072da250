"""YAML read safely and written so that it reads back the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstream.errors import ConfigError
from blockstream.run.yamlfile import MAX_NBYTES, dump, parse, read, with_set


def data(text: str):
    return parse(text, "test.yaml").data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16:9", "16:9"),
        ("no", "no"),
        ("on", "on"),
        ("2026-01-31", "2026-01-31"),
        ("1_000", "1_000"),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-5", -5),
        ("+5", 5),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.INF", -math.inf),
        ("True", True),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("!!int '3'", 3),
        ("a #b", "a"),
        ("[1, {b: c}]", [1, {"b": "c"}]),
    ],
)
def test_plain_values_follow_yaml_1_2(text, value):
    assert repr(data(f"key: {text}")) == repr({"key": value})


def test_a_merge_key_fills_in_what_a_mapping_leaves_out():
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], z: 3}\n"
    assert data(text)["c"] == {"x": 1, "y": 1, "z": 3}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: duplicate key 'a'"),
        ("a:\n  b: {c: 1, c: 2}\n", "line 2: duplicate key 'c'"),
        ("a: [1\nb: 2", "line 2: "),
        ("- a\n", "expected a mapping of keys to values, got a list of 1"),
        ("text", "expected a mapping of keys to values, got 'text'"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("a: !!python/object/apply:os.system [ls]", "the tag '.*os.system' is not allowed"),
        ("a: !mine {}", "the tag '!mine' is not allowed"),
        ("a: !!timestamp 2026-01-31", "the tag .* is not allowed"),
        ("a: !!int x", "'x' is no int"),
        ("a: " + "9" * 5000, "is no int that can be read"),
        ("[a]: 1", "a key must be plain text"),
        ("a: {<<: 3}", "<< merges mappings only"),
        ("a: *nowhere", "line 1: found undefined alias"),
        ("a: &a [*a]", "nested deeper than 32 levels"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("a: " + "[" * 20000, "nested deeper than 32 levels"),
        ("a: 'b\x00'", "special characters are not allowed"),
        ("#" * (MAX_NBYTES + 1), "larger than 1048576 bytes"),
    ],
)
def test_what_is_not_a_plain_mapping_is_refused_with_its_line(text, problem):
    with pytest.raises(ConfigError, match=f"^test.yaml.*{problem}"):
        data(text)


def test_aliases_that_expand_without_end_are_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    with pytest.raises(ConfigError, match="aliases expand to more"):
        data("\n".join(lines))
    long = "x" * 100_000
    with pytest.raises(ConfigError, match="aliases expand to more"):
        data(f"a: &a {long}\nb: [{', '.join(['*a'] * 100)}]")


def test_text_that_is_not_utf_8_is_refused():
    with pytest.raises(ConfigError, match="not UTF-8 at byte 3"):
        parse(b"a: \xff", "test.yaml")
    assert parse(b"\xef\xbb\xbfa: 1", "test.yaml").data == {"a": 1}


def test_every_value_knows_its_line():
    document = parse("a: 1\nb:\n  c: 2\n  d:\n    - 3\n    - {e: 4}\n", "test.yaml")
    lines = {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d", 0): 5, ("b", "d", 1, "e"): 6}
    assert {path: document.mark(path) for path in lines} == lines
    assert document.mark(("b", "missing")) == 2
    assert document.mark(("missing",)) is None


def test_a_file_is_read_whole_or_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("a: 1\n")
    document = read(tmp_path / "run.yaml")
    assert (document.data, document.base) == ({"a": 1}, tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: is a folder; only regular files are read"):
        read(tmp_path)


def test_an_empty_file_is_an_empty_mapping():
    assert data("# nothing\n") == {}


# Setting


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("steps=10", {"steps": 10}),
        ("t5.dtype=bf16", {"t5": {"path": "x", "dtype": "bf16"}}),
        ("dit.path=y", {"dit": {"path": "y"}}),
        ("sampler.tau=1e-1", {"sampler": {"name": "lpl", "tau": 0.1}}),
        ("attention.1.ratio=2", {"attention": ["a", {"name": "b", "ratio": 2}]}),
        ("attention=[c]", {"attention": ["c"]}),
        ("prompt='a: b # c'", {"prompt": "a: b # c"}),
        ("prompt=x=y", {"prompt": "x=y"}),
        ("prompt=", {"prompt": None}),
    ],
)
def test_set_changes_one_value_and_nothing_else(setting, expected):
    before = {"steps": 30, "t5": {"path": "x"}, "sampler": "lpl", "attention": ["a", "b"]}
    document = parse(dump(before), "test.yaml")
    changed = with_set(document, setting)
    assert changed.data == {**before, **expected}
    assert document.data == before


def test_a_set_value_is_placed_at_its_set_and_not_at_a_line():
    document = with_set(parse("t5: {path: x}\n", "test.yaml"), "t5={path: y}")
    assert document.mark(("t5",)) == document.mark(("t5", "path")) == "--set t5"


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("a..b=3", "write it as key=value"),
        ("steps.x=3", "steps is 30, it has no key 'x'"),
        ("attention.2=a", "attention is a list of 1; write an index from 0, not '2'"),
        ("attention.x=a", "attention is a list of 1; write an index from 0, not 'x'"),
        ("steps=[", "line 1"),
        ("steps=a: b", "line 1"),
        ("steps=1\nother: 2", "one YAML value on one line"),
    ],
)
def test_a_set_that_leads_nowhere_is_refused(setting, problem):
    document = parse("steps: 30\nattention: [a]\n", "test.yaml")
    with pytest.raises(ConfigError, match=rf"--set .*{problem}"):
        with_set(document, setting)


# Writing

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t"))
TRICKY = st.sampled_from(["16:9", "no", "1e3", "0o7", "010", "~", "", "<<", "=", "1_0", "- a", "#"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | TRICKY
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT | TRICKY, v, max_size=4), max_leaves=12
)


@settings(deadline=None)
@given(st.dictionaries(TEXT | TRICKY, VALUES, max_size=5))
def test_what_is_dumped_reads_back_the_same(mapping):
    assert repr(data(dump(mapping))) == repr(mapping)


def test_dumped_text_reads_the_same_under_yaml_1_1():
    import yaml

    tricky = {"a": "no", "b": "16:9", "c": "1e3", "d": "0o7", "e": "2026-01-31", "f": "1_000"}
    assert yaml.safe_load(dump(tricky)) == tricky


def test_shared_values_are_written_out():
    shared = [1, 2]
    assert "&" not in dump({"a": shared, "b": shared})


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text("ab:-[]{}&*!<>|'\"%@#?,\n \t0.~=", max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(raw):
    try:
        assert isinstance(parse(raw, "test.yaml").data, dict)
    except ConfigError as error:
        assert str(error).startswith("test.yaml")
