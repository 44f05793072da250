"""Cleaning takes as long as the caption is, and the rules that were rewritten for it do what they did."""

from __future__ import annotations

import random
import re

import pytest

from blockstream.errors import ConfigError
from blockstream.run.config import make_config, read_config
from movd import captions
from movd.captions import official_prompt
from movd.text_to_video.prompt_options import MOST_PROMPT

#: What repeats of these met: rules and parsers that looked through all that follows at every place.
UNITS = [
    "a.",
    "a.com@",
    "-",
    "_",
    " .",
    "1",
    "a1",
    "1.",
    "x",
    "\n",
    "#1",
    "<",
    "<a ",
    "<a b='",
    "<a/",
    "<a ' ",
]
UNITS += [
    "<!--",
    "</",
    "<![",
    "<![CDATA[",
    "<script",
    "&",
    "&#",
    "%",
    "@a",
    "a.png",
    "png.",
    "é",
    "猫",
    "'\"",
    "free ",
]
FRAMES = [("", ""), ("<a ", ""), ("", "@"), ("a1a", "_"), ("", ">")]


@pytest.mark.parametrize("unit", UNITS)
def test_a_caption_of_the_greatest_length_is_cleaned_in_steps_that_grow_with_it(unit):
    """A rule that looks through all that follows at every place would take minutes here."""
    for before, after in FRAMES:
        text = before + unit * (MOST_PROMPT // len(unit) - 2) + after
        assert len(official_prompt(text, None)) <= 2 * len(text)


DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
#: The rules as they were published, and the functions or rules that stand for them.
PUBLISHED = [
    (rf"\b(?:(?:https?|www):(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", "", captions.without_addresses),
    (r"\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", "", r"(?<!\S)"),
    (r"\s+\.\s+", " ", r"\s++"),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " ", r"*+\b"),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", "", "[xх×]"),
]
TOKENS = [
    "a",
    ".",
    "com",
    "co",
    "-",
    "/",
    "@",
    "_",
    "é",
    " ",
    "https:",
    "www:",
    "b1",
    "%",
    "png",
    ".mp4",
    "x",
]
TOKENS += ["1", "22", "\n", "٣", "х", "it", "."]


@pytest.mark.parametrize(("pattern", "replacement", "now"), PUBLISHED)
def test_a_rule_does_what_it_did_before_it_was_made_linear(pattern, replacement, now):
    if isinstance(now, str):
        ((compiled, same),) = [r for r in (*captions.MARKS, *captions.LEFTOVERS) if now in r[0].pattern]
        assert same == replacement
    then = re.compile(pattern)
    rng, changed = random.Random(7), 0
    for _ in range(20_000):
        text = "".join(rng.choices(TOKENS, k=rng.randint(1, 14)))
        expected = then.sub(replacement, text)
        changed += expected != text
        assert (compiled.sub(replacement, text) if isinstance(now, str) else now(text)) == expected, text
    assert changed > 20


def test_no_text_makes_cleaning_fail():
    rng = random.Random(3)
    pieces = [
        *UNITS,
        *TOKENS,
        ">",
        "</a>",
        "]]>",
        "<!doctype [",
        "<?php",
        "--!>",
        "\x00",
        "\ud800",
        "&#x110000;",
        "\x1b[2J",
    ]
    for _ in range(3_000):
        official_prompt("".join(rng.choices(pieces, k=rng.randint(1, 12))))


def config(*sets):
    return make_config(read_config("movd.yaml", list(sets)))


def test_a_prompt_that_is_too_long_is_refused_by_name(tmp_path):
    long = "a." * 30_000
    with pytest.raises(ConfigError, match=r"prompt has 60,000 characters \('a\.a\..*at most 10,000"):
        config(f"prompt={long}")
    (tmp_path / "prompts.txt").write_text(f"a cat\n\n{long}\n")
    with pytest.raises(ConfigError, match=r"prompts\.txt, line 3 has 60,000 characters"):
        config(f"prompts={tmp_path / 'prompts.txt'}")
    (tmp_path / "prompts.txt").write_text("x" * 10_000_000)
    with pytest.raises(ConfigError, match=r"prompts\.txt, line 1 has 10,000,000 characters"):
        config(f"prompts={tmp_path / 'prompts.txt'}")


def test_a_file_of_prompts_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "prompts.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        ConfigError, match=r"has 1,099,511,627,776 bytes or more, at most 16,000,000 are read"
    ):
        config(f"prompts={tmp_path / 'prompts.txt'}")
    (tmp_path / "prompts.txt").write_text("a\n" * 10_001)
    with pytest.raises(ConfigError, match=r"prompts\.txt: 10,001 prompts; a run takes 10,000"):
        config(f"prompts={tmp_path / 'prompts.txt'}")
