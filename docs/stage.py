"""Lay out the site's pages: docs/, and what they link to beside it (results, examples, the changelog).

python docs/stage.py DIR    writes them to DIR, from where `zensical build` takes them

On a forge every page is read where it lies; here a link that leaves docs/ leads to a page of the site.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINK = re.compile(r"(?<=\]\()(?P<to>[^)#\s:]+)(?P<part>#[^)\s]*)?(?=\))")
FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)
LANGUAGES = {".py": "python", ".yaml": "yaml", "": "make"}


def pages() -> dict[Path, Path]:
    """Return where each page of the repository stands in the site."""
    found = {p: p.relative_to(ROOT / "docs") for p in sorted((ROOT / "docs").rglob("*.md"))}
    found |= {ROOT / f"{n}.md": Path(f"{n.lower()}.md") for n in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
    found |= {p: Path("results", p.name) for p in sorted(RESULTS.glob("*.md"))}
    readmes = sorted((ROOT / "examples").glob("*/README.md"))
    return found | {p: Path("examples", p.parent.name, "index.md") for p in readmes}


def stage(to: Path) -> None:
    """Write every page to a folder, its links led to where their targets are; one to nothing is an error."""
    placed = pages()
    special = {RESULTS: Path("results", "index.md"), ROOT / "README.md": Path("index.md")}
    shutil.rmtree(to, ignore_errors=True)
    copied: dict[Path, Path] = {}
    for page, at in placed.items():

        def led(link: re.Match[str], page: Path = page, at: Path = at) -> str:
            target = Path(os.path.normpath(page.parent / link["to"]))
            known = placed.get(target) or special.get(target)
            if known is None:
                if not target.is_file():
                    raise SystemExit(f"{page.relative_to(ROOT)}: links to {link['to']}, which is no file")
                known = copied[target] = _place(target)
            return os.path.relpath(known, at.parent) + (link["part"] or "")

        parts = FENCED.split(page.read_text(encoding="utf-8"))
        _write(to / at, "".join(p if p.startswith("```") else LINK.sub(led, p) for p in parts))
    _write(to / "results" / "index.md", _results(placed))
    for source, at in copied.items():
        if at.suffix == ".md":
            text = source.read_text(encoding="utf-8")
            fence = f"```{LANGUAGES[source.suffix]}\n{text.rstrip()}\n```\n"
            _write(to / at, f"# {source.relative_to(ROOT).as_posix()}\n\n{fence}")
        else:
            (to / at).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to / at)
    for asset in ("site.css",):
        shutil.copyfile(ROOT / "docs" / asset, to / asset)


def _place(file: Path) -> Path:
    """Return where a file that a page links to stands: text in a page of its own, a picture as it is."""
    path = file.relative_to(ROOT)
    if path.parts[0] == "docs":
        return Path(*path.parts[1:])
    return Path("files", f"{path.as_posix()}.md") if file.suffix in LANGUAGES else Path("files", path)


def _results(placed: dict[Path, Path]) -> str:
    """Return the page that lists every dated result, the newest first."""
    rows = []
    for page in sorted((p for p in placed if p.parent == RESULTS), reverse=True):
        title = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M)
        rows.append(f"| {page.name[:10]} | [{title[1] if title else page.stem}]({page.name}) |")
    head = (
        "# Results\n\nEach begins with the command that makes it anew; commit and machine stand beside it.\n"
    )
    return "\n".join([head, "| date | |", "|---|---|", *rows, ""])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
