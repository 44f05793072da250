"""Plugins of packages installed for the test: found, loaded when named, traced, activated."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from blockstream.errors import ConfigError, PluginError
from blockstream.plan.retention import NONE, PREFIX, SPREAD
from blockstream.plugins import AttentionLayer, Plugins, entrypoints, hookimpl
from blockstream.plugins.builtin import retention_policies
from blockstream.run.activation import activate
from blockstream.run.config import make_config
from tests.support.packages import site_on_path

LAYER = AttentionLayer("attn", "temporal", grid=(4, 1, 3), width=8, heads=2)

SAMPLERS = """
    from blockstream.plugins import Choice, hookimpl

    @hookimpl
    def samplers():
        return [{choices}]
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        yield site


def offering(*names: str) -> str:
    """Return the source of a plugin that offers samplers of these names; one returns its name."""
    choices = (f"Choice({name!r}, lambda options: lambda flow, z: {name!r})" for name in names)
    return SAMPLERS.format(choices=", ".join(choices))


def found(site, ref: str) -> tuple[str, str]:
    plugin, choice = Plugins().find("sampler", ref)
    return plugin, choice.name


# Found and loaded


def test_installed_plugins_are_listed_without_being_imported(site):
    site.plugin("leaps", "raise RuntimeError('imported')")
    (leaps,) = [p for p in entrypoints.plugins() if p.name == "leaps"]
    assert (leaps.value, leaps.provider, leaps.hidden) == ("leaps_module", "leaps 1.0", False)
    Plugins()
    assert not site.imported()


def test_a_choice_imports_the_plugin_it_names_and_no_other(site):
    site.plugin("leaps", offering("leaps"))
    site.plugin("other", offering("other"))
    assert found(site, "leaps") == ("leaps", "leaps")
    assert site.imported() == {"leaps_module"}


def test_a_built_in_choice_imports_no_plugin(site):
    site.plugin("leaps", offering("euler"))
    assert found(site, "euler") == ("builtin", "euler")
    assert not site.imported()


def test_a_name_is_the_namesake_or_the_only_item_of_an_entry_point(site):
    site.plugin("one", offering("only"))
    site.plugin("leaps", offering("far", "leaps"))
    assert found(site, "one") == ("one", "only")
    assert found(site, "leaps") == ("leaps", "leaps")


def test_entry_point_and_item_name_one_of_several(site):
    site.plugin("leaps", offering("far", "near", "euler"))
    assert found(site, "leaps:near") == ("leaps", "near")
    assert found(site, "leaps:euler") == ("leaps", "euler")
    with pytest.raises(ConfigError, match=r"offers several of sampler.*leaps:far, leaps:near"):
        found(site, "leaps")
    with pytest.raises(ConfigError, match="no sampler 'nera'; did you mean 'near'"):
        found(site, "leaps:nera")


def test_a_bare_name_is_an_item_of_a_plugin_already_loaded(site):
    site.plugin("leaps", offering("far", "near"))
    site.plugin("jumps", offering("far"))
    plugins = Plugins()
    plugins.load("leaps")
    assert plugins.find("sampler", "far")[0] == "leaps"
    plugins.load("jumps")
    with pytest.raises(ConfigError, match="write leaps:far or jumps:far"):
        plugins.find("sampler", "far")


def test_a_plugin_without_the_kind_asked_for_says_so(site):
    site.plugin("leaps", offering("leaps"))
    with pytest.raises(ConfigError, match="plugin 'leaps' offers no policy"):
        Plugins().find("policy", "leaps")


def test_an_unknown_name_is_refused_with_the_nearest(site):
    site.plugin("leaps", offering("leaps"))
    with pytest.raises(ConfigError, match=r"no sampler 'leap'; did you mean 'leaps'.*built in: euler"):
        found(site, "leap")
    with pytest.raises(ConfigError, match="no plugin 'leap' is installed; did you mean 'leaps'"):
        found(site, "leap:far")
    assert not site.imported()


def test_disabled_plugins_are_hidden_with_the_commands_of_their_package(site, monkeypatch):
    groups = {
        "blockstream": {"leaps": "leaps.plugin"},
        "blockstream.commands": {"export.leaps": "leaps.export"},
    }
    site.install("leaps", {"leaps/__init__.py": "", "leaps/plugin.py": ""}, groups)
    assert [c.name for c in entrypoints.commands() if c.package == "leaps"] == ["export.leaps"]
    monkeypatch.setenv("BLOCKSTREAM_DISABLE", "none, leaps")
    assert "leaps" not in Plugins().visible
    assert not [c for c in entrypoints.commands() if c.package == "leaps"]
    with pytest.raises(ConfigError, match="'leaps' is hidden by BLOCKSTREAM_DISABLE"):
        found(site, "leaps")
    assert not site.imported()


def test_two_distributions_of_one_plugin_name_are_refused(site):
    site.plugin("leaps", offering("leaps"))
    site.install("leaps-fork", {}, {"blockstream": {"leaps": "fork"}})
    with pytest.raises(PluginError, match=r"registered by leaps 1.0, leaps-fork 1.0; uninstall"):
        Plugins().load("leaps")


def test_the_built_in_plugin_needs_no_metadata(monkeypatch):
    monkeypatch.setattr(entrypoints, "entry_points", lambda group: [])
    assert Plugins().find("sampler", "euler")[0] == "builtin"


def test_a_plugin_may_be_an_object_in_a_module(site):
    source = """
        from blockstream.plugins import Choice, hookimpl

        class Leaps:
            @hookimpl
            def samplers(self):
                return [Choice("leaps", lambda options: print)]

        leaps = Leaps()
    """
    site.install("leaps", {"leaps.py": source}, {"blockstream": {"leaps": "leaps:leaps"}})
    assert found(site, "leaps") == ("leaps", "leaps")


def test_model_families_are_found_by_plugin_and_by_bare_name(site):
    source = """
        import torch
        from blockstream.plugins import ModelFamily, hookimpl

        @hookimpl
        def model_families():
            return [ModelFamily("tower", torch.nn.Identity)]
    """
    site.plugin("towers", source)
    assert isinstance(Plugins().family("towers:tower").module(), torch.nn.Identity)
    assert site.imported() == {"towers_module"}
    with pytest.raises(ConfigError, match="no model family 'towr'; did you mean 'tower'"):
        Plugins().family("towers:towr")


def test_a_bare_family_is_looked_for_in_every_visible_plugin(site, monkeypatch):
    monkeypatch.setenv("BLOCKSTREAM_DISABLE", "movd")
    site.plugin("aaa", "")
    site.plugin(
        "zzz",
        """
        import torch
        from blockstream.plugins import ModelFamily, hookimpl

        @hookimpl
        def model_families():
            return [ModelFamily("tower", torch.nn.Identity)]
    """,
    )
    assert isinstance(Plugins().family("tower").module(), torch.nn.Identity)


class Quiet:
    @hookimpl
    def token_merge(self, layer):
        return None


class Loud(Quiet):
    @hookimpl
    def stage_started(self, stage):
        raise KeyError("x")


# Traced


def test_tracing_prints_every_hook_call_who_is_asked_and_what_comes_back(monkeypatch, capsys):
    monkeypatch.setenv("BLOCKSTREAM_TRACE_PLUGINS", "1")
    plugins = Plugins()
    plugins.register(Quiet(), "quiet")
    plugins.hook.token_merge(layer=LAYER)
    plugins.register(Loud(), "loud")
    with pytest.raises(PluginError):
        plugins.hook.stage_started(stage="dit")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("blockstream: token_merge(layer=") and lines[0].endswith("asks quiet")
    assert lines[1] == "blockstream: token_merge = None"
    assert lines[2] == "blockstream: stage_started(stage='dit') asks loud"
    assert lines[3].startswith("blockstream: stage_started raised PluginError")


def test_nothing_is_traced_unless_asked(monkeypatch, capsys):
    monkeypatch.setenv("BLOCKSTREAM_TRACE_PLUGINS", "0")
    plugins = Plugins()
    plugins.register(Quiet(), "quiet")
    plugins.hook.token_merge(layer=LAYER)
    assert capsys.readouterr().err == ""


# Activated for a run

RUN = """
    from blockstream.plugins import Choice, hookimpl

    class Kernel:
        def __init__(self, name):
            self.name = name

        @hookimpl
        def attention_kernel(self, layer):
            return None if self.name == "shy" else lambda *args: self.name

    @hookimpl
    def pipelines():
        return [Choice("run", lambda options: "a pipeline")]

    @hookimpl
    def attention_transforms():
        return [Choice(n, lambda options, n=n: Kernel(n)) for n in ("shy", "first", "second")]

    seen = []

    @hookimpl
    def stage_started(stage):
        seen.append(stage)
"""


def test_a_run_asks_its_attention_transforms_in_the_order_of_the_config(site):
    site.plugin("run", RUN)
    config = make_config({"pipeline": "run", "attention": ["shy", "second", "first"]})
    kernel = activate(config).hook.attention_kernel(layer=LAYER)
    assert kernel() == "second"


def test_observers_named_by_the_config_see_the_run_and_others_do_not(site):
    site.plugin("run", RUN)
    site.plugin("watch", RUN)
    site.plugin("other", RUN)
    plugins = activate(make_config({"pipeline": "run", "plugins": ["watch"]}))
    plugins.hook.stage_started(stage="dit")
    assert sys.modules["watch_module"].seen == ["dit"]
    assert "other_module" not in sys.modules


def test_one_run_registers_nothing_for_the_next(site):
    site.plugin("run", RUN)
    activate(make_config({"pipeline": "run", "attention": ["first"]}))
    plugins = activate(make_config({"pipeline": "run"}))
    assert plugins.hook.attention_kernel(layer=LAYER) is None


def test_the_built_in_policies_are_those_of_the_planner():
    built = {choice.name: list(choice.build(None)) for choice in retention_policies()}
    assert built == {
        "auto": [NONE, PREFIX, SPREAD],
        "none": [NONE],
        "prefix": [PREFIX],
        "spread": [SPREAD],
    }


def test_the_built_in_sampler_is_euler():
    from blockstream.plugins.euler import sample

    choice = Plugins().find("sampler", "euler")[1]
    assert choice.build(SimpleNamespace()) is sample
