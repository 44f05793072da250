"""The page of `blockstream compare`: the results of two runs side by side, played in step."""

from __future__ import annotations

from collections.abc import Sequence

from .pairs import Pair, rows
from .shell import data_uri, escaped, media, page, table

#: Results are embedded until they come to this much together; further pairs are in the table alone.
EMBED_NBYTES = 96 << 20


def side_by_side_html(names: tuple[str, str], pairs: Sequence[Pair], remarks: Sequence[str]) -> str:
    """Return the page of two runs, named by their folders; it holds the videos themselves."""
    title = f"{names[0]} and {names[1]}"
    shown, left = [], EMBED_NBYTES
    for pair in pairs:
        left -= sum(path.stat().st_size for path in (pair.a, pair.b))
        if left < 0:
            break
        shown.append(_pair(names, pair))
    if len(shown) < len(pairs):
        remarks = [
            *remarks,
            f"{len(pairs) - len(shown)} pairs are in the table alone: the page would be too large",
        ]
    body = [
        f"<h1>{escaped(title)}</h1>",
        *(f'<p class="remark">{escaped(remark)}</p>' for remark in remarks),
        table(rows(pairs)),
        '<div class="tools"><button type="button" data-act="play">pause</button>'
        '<button type="button" data-act="step">next frame</button>'
        '<span class="hint">all videos run in step; press on a pair to lay one over the other</span></div>',
        *shown,
    ]
    return page(title, body, "side_by_side.js", {})


def _pair(names: tuple[str, str], pair: Pair) -> str:
    figures = "".join(
        f"<figure>{media(path, data_uri(path), pair.prompt, controls=False)}"
        f"<figcaption>{escaped(name)}</figcaption></figure>"
        for name, path in zip(names, (pair.a, pair.b), strict=True)
    )
    remark = f'<p class="remark">{escaped(pair.remark)}</p>' if pair.remark else ""
    return f'<h3>{escaped(pair.prompt)}</h3>{remark}<div class="pair" tabindex="0">{figures}</div>'
