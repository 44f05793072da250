"""`schema` and `plugins` say what there is."""

from __future__ import annotations

import json
import sys

import pytest

from blockstream.cli.common import wrapped
from blockstream.run.config import OWN_KEYS


def schema(command, *argv: str):
    code, out, _ = command("schema", *argv)
    assert code == 0
    return json.loads(out)


def test_the_schema_alone_has_the_built_in_choices_and_imports_no_plugin(command, site):
    found = schema(command)
    assert set(found["properties"]) == set(OWN_KEYS)
    assert found["properties"]["sampler"]["anyOf"][0] == {"enum": ["euler"]}
    assert "video.plugin" not in sys.modules


def test_the_schema_of_a_config_has_the_options_of_its_pipeline(command, site):
    found = schema(command, "video.yaml")
    assert set(found["properties"]) == {*OWN_KEYS, "prompt", "steps"}
    assert found["properties"]["pipeline"] == {"enum": ["video"]}
    assert found["additionalProperties"] is False
    assert found["properties"]["sampler"]["anyOf"][0]["enum"] == ["euler", "video:leap", "video:hop"]


def test_the_schema_of_a_config_needs_no_valid_options(command, site):
    assert schema(command, "video.yaml", "--set", "steps=many", "--set", "sampler=video:hop")


def test_the_schema_includes_a_plugin_on_request(command, site):
    found = schema(command, "--plugin", "video")
    assert found["properties"]["pipeline"] == {"enum": ["video", "video:video"]}
    code, _, err = command("schema", "--plugin", "vidoe")
    assert (code, "did you mean 'video'" in err) == (2, True)


def test_the_schema_of_a_config_that_names_nothing_known_is_an_error(command, site):
    code, out, err = command("schema", "video.yaml", "--set", "sampler=nothing")
    assert (code, out) == (2, "")
    assert "no sampler 'nothing'" in err


def test_plugins_are_listed_from_metadata(command, site, monkeypatch):
    site.install("rest", {}, {"blockstream.commands": {"export.x": "nowhere"}})
    code, out, _ = command("plugins")
    assert code == 0
    assert "video.plugin" in out and "video-package 2.0" in out and "export.x" in out
    assert "video.plugin" not in sys.modules
    monkeypatch.setenv("BLOCKSTREAM_DISABLE", "video")
    (line,) = [line for line in command("plugins")[1].splitlines() if "video.plugin" in line]
    assert line.endswith("(hidden by BLOCKSTREAM_DISABLE)")


def test_plugins_as_json(command, site):
    found = json.loads(command("plugins", "--json")[1])
    (video,) = [p for p in found["plugins"] if p["name"] == "video"]
    assert video == {
        "name": "video",
        "value": "video.plugin",
        "distribution": "video-package",
        "version": "2.0",
        "hidden": False,
    }
    assert "video.yaml" in [e["name"] for e in found["examples"]]


def test_hooks_imports_what_is_visible_and_shows_what_it_offers(command, site, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_DISABLE", "movd")
    code, out, _ = command("plugins", "--hooks")
    assert code == 0
    assert "hooks: pipelines, samplers" in out
    assert "pipeline video: text to video" in out
    found = json.loads(command("plugins", "--hooks", "--json")[1])
    (video,) = [p for p in found["plugins"] if p["name"] == "video"]
    assert video["offers"]["sampler"] == {"leap": "", "hop": ""}


def test_hooks_shows_a_plugin_that_fails_beside_the_others(command, site, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_DISABLE", "movd")
    site.plugin("broken", "raise RuntimeError('no GPU')")
    code, out, _ = command("plugins", "--hooks")
    assert code == 1
    assert "fails: plugin 'broken'" in out and "RuntimeError: no GPU" in out
    assert "pipeline video" in out


@pytest.mark.parametrize("argv", [["--help"], ["plugins"], ["plugins", "--hooks"], ["doctor", "--no-disk"]])
def test_no_line_is_wider_than_a_terminal_of_80_columns(command, monkeypatch, argv):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command(*argv)
    assert code == 0 and out.encode("cp1252")
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_what_is_broken_over_lines_keeps_its_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    broken = wrapped("missing    matplotlib>=3.8: pip install 'blockstream-engine[report]'", indent=11)
    assert broken.splitlines() == [
        "missing    matplotlib>=3.8: pip install",
        "           'blockstream-engine[report]'",
    ]
