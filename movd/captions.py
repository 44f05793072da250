"""Prompts as Open-Sora prepares them for T5: scored, then cleaned twice.

The model was trained on captions cleaned of what web pages leave behind; a prompt gets the same treatment.
Each rule is what the training data went through (DeepFloyd's cleaning), oddities included. What a rule takes
grows with the caption's length and no faster: a rule that could start anywhere in a run of characters is held
to the run's beginning, where it matches if it matches at all.
"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_FILE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_BOUNDARY = re.compile(r"\b")
_SCHEME = re.compile(r"(?:https?|www):(?:/{1,3}|[a-z0-9%])")
_HOST = re.compile(r"[a-z0-9.\-]*")
_DOMAIN = re.compile(r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)")
_SECTIONS = r"(?:temp|cdata|ignore|include|rcdata|if|else|endif)(?![-_.a-z0-9])"
#: No tag: what is far from its end, as HTMLParser looks through all that follows for the end of each, and
#: marked sections that it does not know, for which it raises AssertionError.
_NO_TAG = re.compile(rf"<(?![^>]{{0,1000}}>)|<(?=!\[(?!{_SECTIONS}))")

#: Between HTML and the repair of broken characters.
MARKS = _rules(
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
    (rf"(?<!\S)\S+\.{_FILE}", ""),  # file names
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"(?<!\s)\s++\.\s+", " "),
)

#: After the repair.
LEFTOVERS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product numbers: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*+\b", " "),
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # sizes: 30x40 (the second x is Cyrillic)
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)

_JOINERS = re.compile("[-_]")
_WORD = re.compile(r"[^\W_]+")


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


def _text_of(markup: str) -> str:
    parser = _Text()
    parser.feed(_NO_TAG.sub("&lt;", markup))
    parser.close()
    return "".join(parser.parts)


def clean_caption(caption: str) -> str:
    """Return a caption cleaned once. Cleaning again can change it again: `official_prompt` does it twice."""
    import ftfy

    text = without_addresses(unquote_plus(caption).strip().lower().replace("<person>", "person"))
    text = _apply(MARKS, _text_of(text))
    if len(_JOINERS.findall(text)) > 3:  # this-is-my-cute-cat
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(LEFTOVERS, text).strip()


def official_prompt(prompt: str, aesthetic: float | None = 6.5) -> str:
    """Return a prompt as Open-Sora gives it to T5: its aesthetic score appended, cleaned twice."""
    if aesthetic is not None and "aesthetic score:" not in prompt:
        prompt = f"{prompt} aesthetic score: {aesthetic:.1f}."
    return clean_caption(clean_caption(prompt))


def lost(prompt: str, caption: str) -> list[str]:
    """Return the words of a prompt, mark-up aside, that its caption does not have: lower case, in order."""
    kept = set(_WORD.findall(caption))
    text = _text_of(unquote_plus(prompt).lower())
    return [word for word in dict.fromkeys(_WORD.findall(text)) if word not in kept]


def without_addresses(text: str) -> str:
    """Return a text without what begins an address at a word's edge: a scheme, else a domain and its path.

    Where no domain begins at one edge in a run of a host's characters, none begins later in the run.
    """
    kept, at, hopeless = [], 0, 0
    for edge in _BOUNDARY.finditer(text):
        start = edge.start()
        if start < at:
            continue
        found = _SCHEME.match(text, start)
        if found is None and start >= hopeless:
            found = _DOMAIN.match(text, start)
            run = _HOST.match(text, start)
            hopeless = run.end() if run else start
        if found is not None:
            kept.append(text[at:start])
            at = found.end()
    return "".join([*kept, text[at:]])


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
