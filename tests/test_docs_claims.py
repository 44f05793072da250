"""What the pages claim holds: messages are the code's, numbers those of dated results, references whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import stage

ROOT = Path(__file__).parent.parent
TOPS = ("blockstream", "movd", "movd_coreml", "plugins")
CODE = [p.read_text(encoding="utf-8") for top in TOPS for p in sorted((ROOT / top).rglob("*.py"))]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_every_message_of_the_page_is_one_of_the_code():
    """As far as it is written out: what stands between two dots of omission, whole."""
    code = "\n".join(re.sub(r'"\n\s*f?"', "", text) for text in CODE)  # literals that follow one another
    rows = re.findall(r"^\| (`.+?) \|", page("troubleshooting.md"), re.MULTILINE)
    shown = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    parts = [part.strip() for message in shown for part in message.split("…")]
    missing = [p for p in parts if len(p) > 1 and p not in code and p not in ("Killed", "verify")]
    assert len(parts) > 80 and missing == []


def test_every_number_in_the_comparison_stands_in_a_result_that_it_links_to():
    text = page("comparison.md")
    links = re.findall(r"\]\(\.\./(benchmarks/results/[^)]+)\)", text)
    results = "\n".join((ROOT / link).read_text(encoding="utf-8") for link in links)
    rows = [row for row in text.splitlines() if row.startswith("|")]
    cells = [cell for row in rows for cell in row.split("|")[2:]]  # the first says what, versions with it
    numbers = {n for cell in cells for n in re.findall(r"\d+\.\d+", cell)}
    assert len(numbers) > 40
    assert sorted(n for n in numbers if n not in results) == []


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as forges and the site make them."""
    text = stage.FENCED.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("source", stage.pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_anchor_that_a_page_links_to_is_a_heading(source):
    text = source.read_text(encoding="utf-8")
    for to, part in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text):
        target = source.parent / to if to else source
        assert part in anchors(target), f"{to}#{part}"


def test_the_site_has_every_page_and_no_link_out_of_it(tmp_path):
    stage.stage(tmp_path)
    pages = list(tmp_path.rglob("*.md"))
    assert len(pages) > len(stage.pages())
    for found in pages:
        text = stage.FENCED.sub("", found.read_text(encoding="utf-8"))
        for link in stage.LINK.finditer(text):
            assert (found.parent / link["to"]).is_file(), f"{found}: {link['to']}"
