"""Prompts as Open-Sora prepares them for T5: scored, then cleaned twice.

The model was trained on captions cleaned of what web pages leave behind; a prompt gets the same treatment.
Each rule is what the training data went through (DeepFloyd's cleaning), oddities included.
"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


#: Before HTML is taken out.
_ADDRESSES = _rules(
    ("<person>", "person"),
    (rf"\b(?:(?:https?|www):(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
)

#: Between HTML and the repair of broken characters.
_MARKS = _rules(
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes to unified ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_FILE}", ""),  # file names
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

#: After the repair.
_LEFTOVERS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product numbers: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes: 30x40 (the second x is Cyrillic)
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)

_JOINERS = re.compile("[-_]")


class _Text(HTMLParser):
    """Collects the text of an HTML fragment, without comments, scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style", "template")

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            self.hidden -= tag in ("script", "style", "template")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def clean_caption(caption: str) -> str:
    """Return a caption cleaned once. Cleaning again can change it again: `official_prompt` does it twice."""
    import ftfy

    text = _apply(_ADDRESSES, unquote_plus(caption).strip().lower())
    parser = _Text()
    parser.feed(text)
    parser.close()
    text = _apply(_MARKS, "".join(parser.parts))
    if len(_JOINERS.findall(text)) > 3:  # this-is-my-cute-cat
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_LEFTOVERS, text).strip()


def official_prompt(prompt: str, aesthetic: float | None = 6.5) -> str:
    """Return a prompt as Open-Sora gives it to T5: its aesthetic score appended, cleaned twice."""
    if aesthetic is not None and "aesthetic score:" not in prompt:
        prompt = f"{prompt} aesthetic score: {aesthetic:.1f}."
    return clean_caption(clean_caption(prompt))


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
