"""The shell of a page: one self-contained file that opens without a network.

Whatever comes from outside (names, prompts, configs, versions) is escaped; a content security policy lets the
page run its own script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from blockstream.system import regular
from blockstream.system.terminal import visible

#: The largest video that a page holds.
MOST_NBYTES = 1 << 30
_MIME = {".mp4": "video/mp4", ".png": "image/png"}


def page(title: str, body: Sequence[str], script: str, data: Any) -> str:
    """Return a page whose script, the file of that name, reads `data` from the element of that id."""
    here = resources.files(__package__)
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    code = here.joinpath(script).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data: 'self'; media-src data: 'self'; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escaped(title)}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{style}</style></head><body><main>",
            *body,
            "</main>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f"<script>{code}</script></body></html>",
            "",
        ]
    )


def escaped(text: object) -> str:
    """Return text as HTML shows it, in an attribute too."""
    return html.escape(visible(text), quote=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is its head; "" for one without rows."""
    if len(rows) < 2:
        return ""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def media(path: Path, source: str, caption: str, controls: bool = True) -> str:
    """Return a video or picture."""
    if path.suffix == ".mp4":
        return (
            f'<video src="{escaped(source)}"{" controls" if controls else ""} loop muted playsinline '
            f'preload="{"metadata" if controls else "auto"}"></video>'
        )
    return f'<img src="{escaped(source)}" alt="{escaped(caption)}">'


def data_uri(path: Path) -> str:
    """Return a video or picture as a URI that holds it."""
    data = base64.b64encode(regular.read_bytes(path, MOST_NBYTES)).decode()
    return f"data:{_MIME[path.suffix]};base64,{data}"


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
