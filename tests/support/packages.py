"""Third-party packages as installers leave them: modules beside a dist-info, on sys.path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest


class Site:
    """A folder on sys.path that packages are installed into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: set[str] = set()

    def install(
        self,
        distribution: str,
        files: Mapping[str, str],
        entry_points: Mapping[str, Mapping[str, str]],
        version: str = "1.0",
    ) -> None:
        """Write a distribution: `files` by path, `entry_points` by group and name."""
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text))
            self.modules.add(name.partition("/")[0].removesuffix(".py"))
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        sections = [
            "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in points.items())])
            for group, points in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
        importlib.invalidate_caches()

    def plugin(self, name: str, source: str, distribution: str | None = None) -> None:
        """Install a distribution of one module, its only plugin, both of that name."""
        files = {f"{name}_module.py": source}
        self.install(distribution or name, files, {"blockstream": {name: f"{name}_module"}})

    def imported(self) -> set[str]:
        """Return the installed modules that have been imported."""
        return {m for m in self.modules if m in sys.modules}


@contextmanager
def site_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Put a folder for packages on sys.path; what was imported from it is forgotten at the end."""
    folder.mkdir()
    for variable in ("BLOCKSTREAM_DISABLE", "BLOCKSTREAM_TRACE_PLUGINS", "BLOCKSTREAM_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(folder)
    site = Site(folder)
    try:
        yield site
    finally:
        for name in list(sys.modules):
            if name.partition(".")[0] in site.modules:
                del sys.modules[name]
