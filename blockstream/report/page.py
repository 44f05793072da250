"""report.html: one self-contained page about one run, or several side by side. It opens without a network.

Whatever comes from outside (names, prompts, configs, versions) is escaped; a content security policy
lets the page run its own script and nothing else.
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

from .charts import straightness_svg
from .facts import Fact, comparison_facts, equation_table, fact_cards, pass_table, stage_table
from .record import Bar, RunRecord
from .thin import thin_bars, thin_samples
from .timeline import headline

#: Bars of one run in the page at most; more are merged.
BARS = 40_000
SAMPLES = 3000
#: Results are embedded until they come to this much together; the rest are links.
EMBED_NBYTES = 24 << 20
VIDEOS = 12
KINDS = ("load", "execute", "stall", "outside")
_MIME = {".mp4": "video/mp4", ".png": "image/png"}
_KEYS = (
    ("load", "load"),
    ("execute", "execute"),
    ("stall", "stall"),
    ("outside", "outside"),
    ("retained", "kept"),
)


def report_html(record: RunRecord) -> str:
    """Return the page of one run."""
    body = [
        f"<h1>{_e(record.name)}</h1>",
        f'<p class="lead">{_e(headline(record))}</p>',
        *(f'<p class="remark">{_e(remark)}</p>' for remark in record.remarks),
        _cards(fact_cards(record)),
        _results(record),
        "<h2>Timeline</h2>",
        _tools(),
        _timeline(record),
        _section("Predicted and measured", _table(stage_table(record.report))),
        _section("Terms of Eq. 8 and Eq. 9, seconds a pass", _table(equation_table(record.report))),
        _section("How straight the flow was", _straightness(record)),
        _details("Every pass", _table(pass_table(record))),
        _details("Config", f"<pre>{_e(record.config)}</pre>" if record.config else ""),
        _details("Versions", _table(_versions(record))),
    ]
    return _page(record.name, body, [record])


def compare_html(records: Sequence[RunRecord]) -> str:
    """Return one page about several runs: their figures side by side, their timelines on one scale."""
    body = [
        f"<h1>{len(records)} runs</h1>",
        _table(comparison_facts(records)),
        "<h2>Timelines</h2>",
        _tools(),
    ]
    for record in records:
        body += [f"<h3>{_e(record.name)}</h3>", f'<p class="lead">{_e(headline(record))}</p>']
        body += [f'<p class="remark">{_e(remark)}</p>' for remark in record.remarks]
        body.append(_timeline(record))
    return _page(f"{len(records)} runs", body, records)


def _page(title: str, body: Sequence[str], records: Sequence[RunRecord]) -> str:
    here = resources.files(__package__)
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
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
            f"<title>{_e(title)}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{style}</style></head><body><main>",
            *body,
            "</main>",
            f'<script type="application/json" id="data">{_json([_data(r) for r in records])}</script>',
            f"<script>{script}</script></body></html>",
            "",
        ]
    )


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# -- what the script draws -----------------------------------------------------------------


def _data(record: RunRecord) -> dict[str, Any]:
    bars = {kind: [_row(b) for b in shown] for kind, shown in _by_kind(record).items()}
    samples = thin_samples(record.memory, SAMPLES)
    most = max([s.nbytes for s in samples] or [1])
    budget = record.budget_nbytes
    top = max(most, budget) if budget and budget < 3 * most else most
    stages = []
    for name in record.stages:
        computed = [b for b in record.of(name) if b.kind in ("execute", "stall")]
        if computed:
            stages.append([name, min(b.start_s for b in computed), max(b.end_s for b in computed)])
    return {
        "wall_s": record.wall_s,
        "bars": bars,
        "stages": stages,
        "memory": [[round(s.at_s, 4), s.nbytes, s.arena_nbytes] for s in samples],
        "memory_top": 1.12 * top,
        "budget": budget,
    }


def _by_kind(record: RunRecord) -> dict[str, list[Bar]]:
    of = {
        k: [b for b in record.bars if b.kind == k and (k == "load" or b.thread == "compute")] for k in KINDS
    }
    total = sum(map(len, of.values()))
    if total <= BARS:
        return of
    return {kind: thin_bars(bars, BARS * len(bars) // total + 1) for kind, bars in of.items()}


def _row(bar: Bar) -> list[Any]:
    return [
        round(bar.start_s, 6),
        round(bar.end_s, 6),
        bar.label,
        bar.stage,
        bar.pass_index,
        int(bar.retained),
        bar.nbytes,
    ]


# -- parts of the page ---------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<h2>{_e(title)}</h2>{content}" if content else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_e(title)}</summary>{content}</details>" if content else ""


def _cards(facts: Sequence[Fact]) -> str:
    cards = "".join(
        f'<div class="card"><b class="{_e(f.mood)}">{_e(f.value)}</b><span>{_e(f.what)}</span></div>'
        for f in facts
    )
    return f'<div class="cards">{cards}</div>' if facts else ""


def _tools() -> str:
    keys = "".join(
        f'<span class="key"><i style="background:var(--{colour})"></i>{name}</span>' for name, colour in _KEYS
    )
    buttons = (
        '<button type="button" data-act="in" aria-label="zoom in">+</button>'
        '<button type="button" data-act="out" aria-label="zoom out">\u2212</button>'
        '<button type="button" data-act="all">all</button>'
    )
    hint = (
        '<span class="hint">drag to move, pinch or Ctrl and wheel to zoom, double-click to look closer</span>'
    )
    return f'<div class="tools">{buttons}{keys}{hint}</div>'


def _timeline(record: RunRecord) -> str:
    return (
        f'<div class="timeline" tabindex="0" role="img" aria-label="timeline of {_e(record.name)}">'
        '<canvas></canvas><div class="tip" hidden></div></div>'
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is its head; "" for one without rows."""
    if len(rows) < 2:
        return ""
    head = "".join(f"<th>{_e(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _versions(record: RunRecord) -> list[list[str]]:
    found = record.report.get("versions") or {}
    return [["package", "version"], *([str(k), str(v)] for k, v in found.items() if v)]


def _straightness(record: RunRecord) -> str:
    drawing = straightness_svg(record.steps)
    note = "cosine between each velocity and the one before; rings are leaps"
    return f'<figure class="chart">{drawing}<figcaption>{note}</figcaption></figure>' if drawing else ""


def _results(record: RunRecord) -> str:
    prompts = (record.report.get("output") or {}).get("prompts") or []
    shown, left = [], EMBED_NBYTES
    for k, path in enumerate(record.results[:VIDEOS]):
        caption = prompts[k] if k < len(prompts) else path.name
        nbytes = path.stat().st_size
        relative = path.relative_to(record.folder).as_posix()
        source = _data_uri(path) if nbytes <= left else relative
        left -= nbytes if nbytes <= left else 0
        shown.append(_result(path.suffix, source, str(caption)))
    more = len(record.results) - VIDEOS
    note = f'<p class="hint">and {more} more in the folder</p>' if more > 0 else ""
    return f'<h2>Result</h2><div class="videos">{"".join(shown)}</div>{note}' if shown else ""


def _result(suffix: str, source: str, caption: str) -> str:
    if suffix == ".mp4":
        media = f'<video src="{_e(source)}" controls loop muted playsinline preload="metadata"></video>'
    else:
        media = f'<img src="{_e(source)}" alt="{_e(caption)}">'
    return f"<figure>{media}<figcaption>{_e(caption)}</figcaption></figure>"


def _data_uri(path: Path) -> str:
    return f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
