"""report.html: one self-contained page about one run, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bars import Bar
from .charts import straightness_svg
from .facts import Fact, comparison_facts, equation_table, fact_cards, pass_table, stage_table
from .record import RunRecord
from .shell import data_uri, escaped, media, page, table
from .thin import thin_bars, thin_samples
from .timeline import headline

#: Bars of one run in the page at most; more are merged.
BARS = 40_000
SAMPLES = 3000
#: Results are embedded until they come to this much together; the rest are links.
EMBED_NBYTES = 24 << 20
VIDEOS = 12
KINDS = ("load", "execute", "stall", "outside")
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
        f"<h1>{escaped(record.name)}</h1>",
        f'<p class="lead">{escaped(headline(record))}</p>',
        *(f'<p class="remark">{escaped(remark)}</p>' for remark in record.remarks),
        _cards(fact_cards(record)),
        _results(record),
        "<h2>Timeline</h2>",
        _tools(),
        _timeline(record),
        _section("Predicted and measured", table(stage_table(record.report))),
        _section("Terms of Eq. 8 and Eq. 9, seconds a pass", table(equation_table(record.report))),
        _section("How straight the flow was", _straightness(record)),
        _details("Every pass", table(pass_table(record))),
        _details("Config", f"<pre>{escaped(record.config)}</pre>" if record.config else ""),
        _details("Versions", table(_versions(record))),
    ]
    return _page(record.name, body, [record])


def compare_html(records: Sequence[RunRecord]) -> str:
    """Return one page about several runs: their figures side by side, their timelines on one scale."""
    body = [
        f"<h1>{len(records)} runs</h1>",
        table(comparison_facts(records)),
        "<h2>Timelines</h2>",
        _tools(),
    ]
    for record in records:
        body += [f"<h3>{escaped(record.name)}</h3>", f'<p class="lead">{escaped(headline(record))}</p>']
        body += [f'<p class="remark">{escaped(remark)}</p>' for remark in record.remarks]
        body.append(_timeline(record))
    return _page(f"{len(records)} runs", body, records)


def _page(title: str, body: Sequence[str], records: Sequence[RunRecord]) -> str:
    return page(title, body, "page.js", [_data(r) for r in records])


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
    return f"<h2>{escaped(title)}</h2>{content}" if content else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{content}</details>" if content else ""


def _cards(facts: Sequence[Fact]) -> str:
    cards = "".join(
        f'<div class="card"><b class="{escaped(f.mood)}">{escaped(f.value)}</b>'
        f"<span>{escaped(f.what)}</span></div>"
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
        f'<div class="timeline" tabindex="0" role="img" aria-label="timeline of {escaped(record.name)}">'
        '<canvas></canvas><div class="tip" hidden></div></div>'
    )


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
        source = data_uri(path) if nbytes <= left else relative
        left -= nbytes if nbytes <= left else 0
        shown.append(_result(path, source, str(caption)))
    more = len(record.results) - VIDEOS
    note = f'<p class="hint">and {more} more in the folder</p>' if more > 0 else ""
    return f'<h2>Result</h2><div class="videos">{"".join(shown)}</div>{note}' if shown else ""


def _result(path: Path, source: str, caption: str) -> str:
    return f"<figure>{media(path, source, caption)}<figcaption>{escaped(caption)}</figcaption></figure>"
