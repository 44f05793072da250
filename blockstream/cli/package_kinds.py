"""What a new plugin's package is made of: the files that every kind has, and what each kind says in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Template

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "blockstream-$name"
version = "0.1.0"
description = "$summary"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["blockstream-engine"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.$group]
$name = "$module"

[tool.setuptools]
packages = ["$module"]
"""

README = """\
# blockstream-$name

$summary

    python -m pip install --editable '.[test]'
    python -m pytest

$use
"""

TEST = '''\
"""The plugin as blockstream finds it once it is installed, and what it does."""

$imports


def test_blockstream_finds_the_plugin_by_its_name():
    $found

$tests'''

#: How a test finds a plugin; a command is found by its own way.
LOADED = """plugins = Plugins()
    plugins.load("$name")
    """


@dataclass(frozen=True)
class Kind:
    """One kind of plugin: its module, and what differs in the other files.

    `files` are further files of the package by name; `group` is that of its entry point.
    """

    summary: str
    module: str
    found: str
    imports: str
    tests: str
    yaml: str = ""
    shell: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    group: str = "blockstream"

    def filled(self, name: str) -> dict[str, str]:
        """Return the text of each file of a package, by its path in the package's folder."""
        module = f"blockstream_{name.replace('-', '_')}"
        words = {"name": name, "module": module, "summary": self.summary}

        def fill(text: str) -> str:
            return Template(text).substitute(words)

        group = self.group if self.group.isidentifier() else f'"{self.group}"'
        found = self.found if self.group != "blockstream" else LOADED + self.found
        words |= {"group": group, "found": fill(found), "use": fill(self._use)}
        words |= {key: fill(getattr(self, key)) for key in ("imports", "tests")}
        return {
            "pyproject.toml": fill(PYPROJECT),
            "README.md": fill(README),
            f"{module}/__init__.py": fill(self.module),
            **{f"{module}/{path}": fill(text) for path, text in self.files.items()},
            f"tests/test_{module.removeprefix('blockstream_')}.py": fill(TEST),
        }

    @property
    def _use(self) -> str:
        if self.yaml:
            return f"In a config:\n\n```yaml\n{self.yaml}\n```"
        return f"On the command line:\n\n    {self.shell}"
