"""Take the paths of this machine out of what a page is told."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PART = r"[^\s/\\'\"<>|,;:()\[\]{}]"
#: An absolute path of two parts or more, or a file's URI; a quotation mark or a blank ends it.
_PATH = re.compile(
    rf"(?<![\w./~\u2026])(?:file:/{{0,2}})?(?:[A-Za-z]:\\|~?/(?!/))(?:{_PART}+[/\\])+({_PART}*)"
)


class Scrub:
    """Leaves of every absolute path in a text the last part: "\u2026/model.safetensors".

    A folder whose name has a blank in it is known only if it lies in one of the `roots`.
    """

    def __init__(self, *roots: Path) -> None:
        known = {
            str(p)
            for root in (*roots, Path.cwd(), Path.home(), Path(sys.prefix))
            for p in (root, root.resolve())
        }
        whole = sorted((root for root in known if len(Path(root).parts) > 1), key=len, reverse=True)
        inside = "|".join(re.escape(root) for root in whole)
        self._inside = re.compile(rf"(?<!\w)(?:{inside})(?![\w-])(?:[/\\]{_PART}*)*")

    def text(self, text: str) -> str:
        """Return a text without paths."""
        text = self._inside.sub(lambda found: f"\u2026/{Path(found[0]).name}", text)
        return _PATH.sub(lambda found: f"\u2026/{found[1]}", text)

    def all(self, value: Any) -> Any:
        """Return plain values in which no text has a path."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.all(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.all(one) for one in value]
        return value
