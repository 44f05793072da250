"""Write a benchmark's dated result: DATE-SUITE.json for machines, DATE-SUITE.md for people.

Both begin with the command that makes them anew and say the commit, machine and versions.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from blockstream.system.limits import cpu_count
from blockstream.system.machine import cpu_name, versions

FOLDER = Path(__file__).parent / "results"


def provenance(command: str) -> dict[str, Any]:
    """Return what a result was made by and on."""
    return {
        "regenerate": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {
            "cpu": cpu_name(),
            "threads": cpu_count().threads,
            "platform": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: v for name, v in versions().items() if v is not None},
        },
    }


def commit() -> str:
    """Return the commit checked out; "+" when the package differs from it, "none" where git is not."""
    here = Path(__file__).parent.parent
    if shutil.which("git") is None:
        return "none"

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "blockstream", "movd", "plugins")
    return (git("rev-parse", "--short=12", "HEAD") or "none") + ("+" if changed else "")


def load() -> str:
    """Return in a sentence how busy the machine was lately: what a timing is worth."""
    lately = os.getloadavg()
    return f"The machine's load was {lately[0]:.1f} in the last minute, {lately[2]:.1f} in the last fifteen."


def summary(trials: Sequence[float]) -> dict[str, Any]:
    """Return every trial, their median and their range."""
    return {"trials": list(trials), "median": statistics.median(trials), "range": [min(trials), max(trials)]}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; numbers to the right."""
    rows = [[f"{x:,.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    ruler = ["---:" if all(_is_number(row[k]) for row in rows) else "---" for k in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in ([*head], ruler, *rows))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").lstrip("-").isdigit()


def path_of(suite: str, suffix: str) -> Path:
    """Return where a result of today goes."""
    FOLDER.mkdir(exist_ok=True)
    return FOLDER / f"{datetime.date.today().isoformat()}-{suite}{suffix}"


def named(value: Any) -> Any:
    """Return JSON values with absolute paths cut to their names: where a file lay is the machine's own."""
    if isinstance(value, dict):
        return {k: named(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [named(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def write(suite: str, command: str, title: str, page: str, data: dict[str, Any]) -> Path:
    """Write and print a result; return the page's path. `page` is Markdown below title and provenance."""
    made = provenance(command)
    kept = named(data)
    path_of(suite, ".json").write_text(json.dumps({**made, "suite": suite, **kept}, indent=1) + "\n")
    machine, known = made["machine"], made["versions"]
    text = (
        f"Regenerate: `{command}`\n\n# {title}\n\n"
        f"{made['date']}, commit {made['commit']}; {machine['cpu']}, {machine['threads']} threads, "
        f"{machine['platform']}; {', '.join(f'{k} {v}' for k, v in known.items())}.\n\n{page.strip()}\n"
    )
    path = path_of(suite, ".md")
    path.write_text(text)
    print(text)
    return path
