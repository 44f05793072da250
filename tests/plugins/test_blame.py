"""A plugin that fails is blamed: by its name, its hook and the cause."""

from __future__ import annotations

import logging

import pytest

from blockstream.errors import BudgetError, PluginError
from blockstream.plan.retention import NONE, RetentionPolicy
from blockstream.plan.segments import Segment, Stage
from blockstream.plugins import AttentionLayer, Choice, Merge, Plugins, entrypoints, hookimpl
from blockstream.plugins.choices import Chosen
from tests.support.packages import site_on_path

LAYER = AttentionLayer("attn", "temporal", grid=(4, 1, 3), width=8, heads=2)


@pytest.fixture
def site(tmp_path, monkeypatch):
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        yield site


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_an_import_that_fails_is_blamed_on_plugin_and_distribution(site, source, cause):
    site.plugin("leaps", source, distribution="leaps-package")
    with pytest.raises(PluginError, match=f"plugin 'leaps'.*leaps-package 1.0.*{cause}") as caught:
        Plugins().load("leaps")
    assert caught.value.__cause__ is not None


def test_a_slow_import_is_reported_by_name(site, caplog):
    site.plugin("leaps", "")
    (leaps,) = [p for p in entrypoints.plugins() if p.name == "leaps"]
    for seconds, reported in ((1.9, False), (2.5, True)):
        caplog.clear()
        times = iter([10.0, 10.0 + seconds])
        with caplog.at_level(logging.WARNING):
            entrypoints.load(leaps, "plugin", lambda times=times: next(times))
        assert ("plugin 'leaps' (leaps_module) took 2.5 s to import" in caplog.text) is reported


class Bad:
    """A plugin with one hook that misbehaves as it is told."""

    def __init__(self, behave):
        self.behave = behave

    @hookimpl
    def samplers(self):
        return self.behave()

    @hookimpl
    def token_merge(self, layer):
        return self.behave()

    @hookimpl
    def attention_kernel(self, layer):
        return self.behave()

    @hookimpl
    def stage_started(self, stage):
        return self.behave()


def failing(error: BaseException):
    def behave():
        raise error

    return behave


@pytest.mark.parametrize("hook", ["token_merge", "attention_kernel", "stage_started"])
def test_a_hook_that_raises_is_blamed_on_plugin_and_hook(hook):
    plugins = Plugins()
    plugins.register(Bad(failing(KeyError("x"))), "bad")
    argument = {"stage_started": "stage"}.get(hook, "layer")
    with pytest.raises(PluginError, match=f"plugin 'bad', hook {hook}: KeyError: 'x'") as caught:
        getattr(plugins.hook, hook)(**{argument: LAYER})
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("hook", "returned", "expected"),
    [
        ("token_merge", (1, 2), "a Merge or None"),
        ("attention_kernel", "flash", "a function or None"),
    ],
)
def test_a_hook_that_returns_something_else_is_blamed(hook, returned, expected):
    plugins = Plugins()
    plugins.register(Bad(lambda: returned), "bad")
    with pytest.raises(PluginError, match=f"plugin 'bad', hook {hook}: returned .* {expected}"):
        getattr(plugins.hook, hook)(layer=LAYER)


@pytest.mark.parametrize("returned", ["euler", ["euler"], 3, [Choice("a", print), None]])
def test_a_list_of_anything_but_choices_is_blamed(returned):
    plugins = Plugins()
    plugins.register(Bad(lambda: returned), "bad")
    with pytest.raises(PluginError, match=r"plugin 'bad', hook samplers.*a list of Choice"):
        plugins.offers("sampler", "bad")


def test_offering_one_name_twice_is_blamed():
    plugins = Plugins()
    plugins.register(Bad(lambda: [Choice("a", print), Choice("a", len)]), "bad")
    with pytest.raises(PluginError, match=r"plugin 'bad', hook samplers: returned several.*a, a"):
        plugins.offers("sampler", "bad")


def test_errors_raised_on_purpose_and_interrupts_pass_unchanged():
    for error in (BudgetError("too small"), KeyboardInterrupt()):
        plugins = Plugins()
        plugins.register(Bad(failing(error)), "bad")
        with pytest.raises(type(error)) as caught:
            plugins.hook.stage_started(stage=None)
        assert caught.value is error


def test_a_hook_nobody_specified_is_blamed_with_the_nearest():
    class Misspelt:
        @hookimpl
        def sampler(self):
            return []

    plugins = Plugins()
    with pytest.raises(PluginError, match=r"'misspelt' implements no hook 'sampler'.*'samplers'"):
        plugins.register(Misspelt(), "misspelt")
    assert "misspelt" not in plugins.loaded


def test_an_argument_nobody_specified_is_blamed_and_leaves_no_trace():
    class Wrong:
        @hookimpl
        def stage_finished(self):
            raise AssertionError("registered all the same")

        @hookimpl
        def stage_started(self, stage, colour):
            pass

    plugins = Plugins()
    with pytest.raises(PluginError, match=r"(?s)plugin 'wrong'.*stage_started.*colour"):
        plugins.register(Wrong(), "wrong")
    assert "wrong" not in plugins.loaded
    plugins.hook.stage_finished(stage=None)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapper_that_raises_is_blamed(when):
    class Wrapper:
        @hookimpl(wrapper=True)
        def token_merge(self, layer):
            if when == "before":
                raise KeyError("x")
            result = yield
            raise KeyError(result)

    plugins = Plugins()
    plugins.register(Wrapper(), "wrapper")
    with pytest.raises(PluginError, match="plugin 'wrapper', hook token_merge: KeyError"):
        plugins.hook.token_merge(layer=LAYER)


def test_a_name_registered_twice_is_refused_and_the_first_stays():
    plugins = Plugins()
    plugins.register(Bad(list), "twice")
    with pytest.raises(PluginError, match=r"plugin 'twice'.*already registered"):
        plugins.register(Bad(list), "twice")
    assert plugins.loaded == ("twice",)


def test_a_wrapper_sees_the_blame_of_what_it_wraps():
    class Wrapper:
        @hookimpl(wrapper=True)
        def token_merge(self, layer):
            try:
                return (yield)
            except PluginError as error:
                seen.append(str(error))
                return None

    seen = []
    plugins = Plugins()
    plugins.register(Bad(failing(KeyError("x"))), "bad")
    plugins.register(Wrapper(), "wrapper")
    assert plugins.hook.token_merge(layer=LAYER) is None
    assert seen == ["plugin 'bad', hook token_merge: KeyError: 'x'"]


def chosen(build, key="sampler"):
    return Chosen(key, "leaps", "leaps", Choice("far", build))


def test_a_build_that_raises_is_blamed():
    with pytest.raises(PluginError, match=r"plugin 'leaps', build\(\) of sampler 'far': KeyError"):
        chosen(lambda options: {}["x"]).build()
    with pytest.raises(BudgetError):
        chosen(lambda options: failing(BudgetError("too small"))()).build()


@pytest.mark.parametrize(
    ("key", "built"),
    [("sampler", "euler"), ("pipeline", None), ("policy", []), ("policy", ["x"]), ("policy", NONE)],
)
def test_a_build_that_returns_something_else_is_blamed(key, built):
    with pytest.raises(PluginError, match=rf"plugin 'leaps', build\(\) of {key} 'far': returned"):
        chosen(lambda options: built, key).build()


def test_what_a_merge_raises_later_is_blamed():
    plugins = Plugins()
    merge = Merge(merge=failing_with(KeyError("x")), unmerge=lambda x: x, positions=None)
    plugins.register(Bad(lambda: merge), "bad")
    given = plugins.hook.token_merge(layer=LAYER)
    assert given.unmerge(3) == 3
    with pytest.raises(PluginError, match=r"plugin 'bad', hook token_merge: merge\(\): KeyError: 'x'"):
        given.merge(1)


def test_what_a_kernel_raises_later_is_blamed():
    plugins = Plugins()
    plugins.register(Bad(lambda: failing_with(ValueError("odd"))), "bad")
    kernel = plugins.hook.attention_kernel(layer=LAYER)
    with pytest.raises(
        PluginError, match="plugin 'bad', hook attention_kernel: its function: ValueError: odd"
    ):
        kernel(1, 2, 3, LAYER)


def test_what_a_policy_raises_later_is_blamed():
    broken = RetentionPolicy("broken", failing_with(ZeroDivisionError("by zero")))
    chosen = Chosen("policy", "bad:broken", "bad", Choice("broken", lambda _: [broken]))
    (policy,) = chosen.build()
    with pytest.raises(PluginError, match=r"plugin 'bad', policy 'broken': retain\(\): ZeroDivisionError"):
        policy.retain(None, 0)


def failing_with(error):
    def call(*arguments):
        raise error

    return call


STAGE = Stage("dit", tuple(Segment(name, 10) for name in "abc"))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "returned None, expected the indices of segments"),
        ("ab", "returned 'ab', expected the indices of segments"),
        ({0: 1}, "expected the indices of segments"),
        (3, "returned 3, expected the indices"),
        (["a"], r"returned \['a'\]; 'a' is no index of the 3 segments"),
        ([999], r"returned \[999\]; 999 is no index of the 3 segments"),
        ([-1], "-1 is no index"),
        ([True], "True is no index"),
        ([1.0], "1.0 is no index"),
        ([0, 1, 2], "take 30 bytes of a room of 25"),
    ],
)
@pytest.mark.parametrize("which", ["retain", "adjust"])
def test_what_a_policy_returns_wrongly_is_blamed_on_it(found, said, which):
    functions = {"retain": lambda stage, room: [], which: lambda *arguments: found}
    choice = Choice("bad", lambda _: [RetentionPolicy("bad", **functions)])
    (policy,) = Chosen("policy", "bad", "stranger", choice).build()
    with pytest.raises(PluginError, match=rf"plugin 'stranger', policy 'bad': {which}\(\): .*{said}"):
        getattr(policy, which)(STAGE, 25, *([()] if which == "adjust" else []))


def test_what_a_policy_returns_rightly_is_taken():
    choice = Choice("good", lambda _: [RetentionPolicy("good", lambda stage, room: (2, 0, 2))])
    (policy,) = Chosen("policy", "good", "stranger", choice).build()
    assert list(policy.retain(STAGE, 25)) == [2, 0, 2]


class Odd:
    """Offers a sampler with options of any kind."""

    def __init__(self, options):
        self.options = options

    @hookimpl
    def samplers(self):
        return [Choice("s", print, self.options)]


@pytest.mark.parametrize("options", [dict, {"a": 1}, int, "text"])
def test_options_that_are_no_pydantic_model_are_refused_by_name(options):
    plugins = Plugins()
    plugins.register(Odd(options), "odd")
    with pytest.raises(PluginError, match=r"the options of 's' are .*have to be a pydantic model"):
        plugins.offers("sampler", "odd")


IMPORT = "from blockstream.plugins import hookimpl\n"


@pytest.mark.parametrize(
    "source",
    [
        "raise RuntimeError('no GPU')",
        f"{IMPORT}@hookimpl\ndef model_families():\n    raise RuntimeError('no GPU')",
        f"{IMPORT}@hookimpl\ndef model_familys():\n    return []",
        "import sys\nsys.exit(0)",
    ],
    ids=["import", "hook", "misspelt", "exit"],
)
def test_a_broken_plugin_is_passed_over_by_what_did_not_name_it(site, source, caplog):
    site.plugin("abroken", source)
    assert Plugins().family("stdit3-xl-2").name == "stdit3-xl-2"
    assert caplog.text.count("it is passed over") == 1
    assert "plugin 'abroken'" in caplog.text
    with pytest.raises(PluginError):
        Plugins().family("abroken:stdit3-xl-2")
