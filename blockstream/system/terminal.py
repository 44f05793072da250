"""Text for people, wherever it goes: a stream that is closed or knows few characters, a terminal that obeys.

A prompt, a tensor's name or a file's may hold escape sequences that move a terminal's cursor, rename its
window or turn text round. They are shown, not sent.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
import unicodedata

#: Control characters but tab and newline, what replaces an undecodable byte, and what turns text round.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
#: What a narrow encoding shows in place of the characters that the package writes.
_NARROW = {"\u2264": "<=", "\u2265": ">=", "\u2026": "...", "\u00d7": "x", "\u2588": "#", "\u2022": "*"}
_ERRORS = "blockstream-narrow"


def visible(text: object) -> str:
    r"""Return a text with what would steer a terminal written out: an escape becomes `\x1b`."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(text))


def prepare_streams() -> None:
    """Make standard streams that take every text, whatever their encoding and though they were closed.

    A closed descriptor is opened on nothing: the next file that a run opens would get its number, and what a
    library prints would land in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error(_ERRORS, _narrowed)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_VisibleFormatter())


class _VisibleFormatter(logging.Formatter):
    """Writes a record's message with nothing in it that steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _narrowed(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_in_ascii, text)), error.end


def _in_ascii(character: str) -> str:
    if character in _NARROW:
        return _NARROW[character]
    if "\u2500" <= character <= "\u257f":  # lines of boxes
        return "-" if character in "\u2500\u2501\u2550" else "+"
    near = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return near or character.encode("ascii", "backslashreplace").decode()
