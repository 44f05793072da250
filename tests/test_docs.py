"""The pages are true: links lead somewhere, what they name exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import blockstream
from blockstream import plugins
from docs import stage

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    broken = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_of_python_that_a_page_names_exists(page):
    """Written whole, or from the folder of its package: `plan/layout.py`."""
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text(encoding="utf-8")))
    tops = (ROOT, ROOT / "blockstream", ROOT / "plugins", page.parent)
    assert not [name for name in named if not any((top / name).is_file() for top in tops)]


def test_the_architecture_has_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "blockstream").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_make_target_a_page_names_exists(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^(?:    |\$ )make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_a_page_runs_is_packaged_or_made_there(page):
    text = page.read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packaged = set(project["entry-points"]["blockstream.examples"])
    named = set(re.findall(r"blockstream (?:run|plan|verify) ([\w.-]+\.yaml)", text))
    written = set(re.findall(r'(?:cat > |# |")([\w.-]+\.yaml)', text))
    beside = {name for name in named if (page.parent / name).is_file()}
    assert named <= packaged | written | beside | {"config.yaml"}


def test_constraints_pin_every_dependency_exactly():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line.strip()
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for name, rs in project["optional-dependencies"].items() if name != "coreml" for r in rs]
    names = {re.match(r"[A-Za-z0-9_.-]+", r).group().lower() for r in [*project["dependencies"], *extras]}
    known = {n.lower().replace("_", "-") for n in pins}
    assert {n for n in names if n.replace("_", "-") not in known} == {"blockstream-engine"}


def test_one_extra_has_all_that_users_may_add():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.search(r"\[(.+)\]", everything).group(1).split(","))
    assert named == set(extras) - {"all", "dev", "docs", "test"}


def test_the_tour_names_every_file_once():
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", (ROOT / "docs" / "tour.md").read_text(encoding="utf-8"))
    assert len(named) == len(set(named)) > 50


def error_classes() -> set[str]:
    """Return the names of all classes of errors that code here may raise."""
    tops = ("blockstream", "movd", "movd_coreml", "plugins")
    code = "\n".join(p.read_text(encoding="utf-8") for top in tops for p in (ROOT / top).rglob("*.py"))
    named = dict(re.findall(r"^class (\w+)\((\w+)\):", code, re.MULTILINE))
    found = {"BlockstreamError", "OSError"}
    while more := {name for name, base in named.items() if base in found} - found:
        found |= more
    return found - {"BlockstreamError", "OSError"}


def test_every_class_of_errors_is_on_the_page_of_messages():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^## (\w+Error)$", page, re.MULTILINE))
    assert headings == {name for name in error_classes() if not name.startswith("_")}


def test_every_page_is_in_the_sites_navigation():
    nav = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    for at in stage.pages().values():
        assert at.parts[0] == "results" or f'"{at.as_posix()}"' in nav, at


@pytest.mark.parametrize(
    ("name", "module"), [("reference/blockstream.md", blockstream), ("reference/plugins.md", plugins)]
)
def test_the_reference_has_every_public_name(name, module):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert sorted(re.findall(rf"^::: {module.__name__}\.(\w+)$", page, re.MULTILINE)) == module.__all__
