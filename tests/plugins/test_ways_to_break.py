"""Ways to break a plugin, by kind: the message names the plugin and the cause, and nothing else breaks."""

from __future__ import annotations

import json
import re

import pytest

from blockstream.cli.main import main
from blockstream.errors import BlockstreamError, PluginError
from blockstream.plugins import AttentionLayer, Plugins
from blockstream.run.activation import activate
from blockstream.run.config import make_config
from tests.support.packages import site_on_path

HEAD = """
from pydantic import BaseModel, Field, field_validator
from blockstream.plugins import Choice, Merge, ModelFamily, RetentionPolicy, hookimpl

class Pipeline:
    def __init__(self, options=None): pass
    def declare(self, session, run): pass
    def run(self, session, run): return {}

"""
#: Offers a pipeline, so that a config can be made of the rest.
BASE = """
@hookimpl
def pipelines():
    return [Choice("stranger", Pipeline)]

"""
LAYER = AttentionLayer("attn", "temporal", grid=(4, 1, 3), width=8, heads=2)


@pytest.fixture
def site(tmp_path, monkeypatch):
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        yield site


def load(plugins):
    plugins.load("stranger")


def offers(key):
    def ask(plugins):
        plugins.load("stranger")
        plugins.offers(key, "stranger")

    return ask


def family(call):
    def ask(plugins):
        plugins.load("stranger")
        (found,) = plugins.families("stranger").values()
        call(found)

    return ask


def config(**keys):
    return lambda plugins: make_config({"pipeline": "stranger", **keys}, plugins)


def built(key, **keys):
    def build(plugins):
        found = getattr(make_config({"pipeline": "stranger", **keys}, plugins), key)
        return (found[0] if isinstance(found, tuple) else found).build()

    return build


def active(ask=lambda hook: None, **keys):
    def act(plugins):
        ask(activate(make_config({"pipeline": "stranger", **keys}, plugins), plugins).hook)

    return act


def listing(hook, value):
    return f"{HEAD}@hookimpl\ndef {hook}():\n    {value}\n"


def offering(hook, value, before=""):
    return f"{HEAD}{BASE}{before}\n@hookimpl\ndef {hook}():\n    return [{value}]\n"


OBJECT = """
class Made:
    def __init__(self, options=None): pass
    @hookimpl
    def {hook}: {does}
"""


def made(kind, hook, does):
    return offering(kind, 'Choice("stranger", Made)', OBJECT.format(hook=hook, does=does))


def model(fields, kind="samplers"):
    before = f"class Options(BaseModel):\n    {fields}\n"
    return offering(kind, 'Choice("it", lambda options: print, Options)', before)


def merge(layer):
    return lambda hook: hook.token_merge(layer=layer)


def kernel(hook):
    return hook.attention_kernel(layer=LAYER)


WAYS = {
    # import
    "import raises": ("1 / 0", load, "ZeroDivisionError"),
    "import exits well": ("import sys; sys.exit(0)", load, "SystemExit: 0"),
    "import raises what is no exception": ("raise BaseException('odd')", load, "BaseException: odd"),
    "import recurses": ("def f(): f()\nf()", load, "RecursionError"),
    "import of what is not there": ("import nowhere_at_all", load, "ModuleNotFoundError"),
    "no Python": ("def (:", load, "SyntaxError"),
    # hooks
    "hook misspelt": (listing("sampler", "return []"), load, "implements no hook 'sampler'.*'samplers'"),
    "hook of other arguments": (
        f"{HEAD}@hookimpl\ndef token_merge(layre): pass\n",
        load,
        "stranger.*layre",
    ),
    "hook is asynchronous": (
        listing("samplers", "return []").replace("def samplers", "async def samplers"),
        offers("sampler"),
        "hook samplers: is asynchronous",
    ),
    "hook raises": (listing("samplers", "1 / 0"), offers("sampler"), "hook samplers: ZeroDivisionError"),
    "hook exits": (listing("samplers", "raise SystemExit(0)"), offers("sampler"), "SystemExit: 0"),
    "hook yields": (listing("samplers", "yield Choice('a', print)"), offers("sampler"), "a list of Choice"),
    "hook returns one": (listing("samplers", "return Choice('a', print)"), offers("sampler"), "a list of"),
    "hook returns text": (listing("samplers", "return 'abc'"), offers("sampler"), "a list of Choice"),
    "hook returns names": (listing("samplers", "return ['a']"), offers("sampler"), "a list of Choice"),
    "hook returns a mapping": (listing("samplers", "return {'a': print}"), offers("sampler"), "a list of"),
    "two of one name": (
        listing("samplers", "return [Choice('a', print)] * 2"),
        offers("sampler"),
        "several of one name",
    ),
    "a name that is none": (listing("samplers", "return [Choice(3, print)]"), offers("sampler"), "name 3;"),
    "a name of nothing": (listing("samplers", "return [Choice('', print)]"), offers("sampler"), "name '';"),
    "a name of two parts": (
        listing("samplers", "return [Choice('a:b', print)]"),
        offers("sampler"),
        "without : and /",
    ),
    "a plugin of no hooks": (
        f"{HEAD}{BASE}".replace("@hookimpl", ""),
        config(plugins=["stranger"]),
        "implements no hook; mark",
    ),
    # options
    "options that are a dict": (
        offering("samplers", "Choice('it', print, {'a': 1})"),
        config(sampler="stranger:it"),
        "have to be a pydantic model",
    ),
    "an option that is called name": (
        model("name: str = 'x'"),
        config(sampler="stranger:it"),
        "sampler 'it': the option 'name' cannot be set",
    ),
    "a pipeline's option that is the engine's": (
        f"{HEAD}class Options(BaseModel):\n    budget: int = 3\n\n@hookimpl\ndef pipelines():\n"
        '    return [Choice("stranger", Pipeline, Options)]\n',
        config(),
        "the option 'budget' cannot be set",
    ),
    "a validator that fails": (
        model("a: int = 1\n    @field_validator('a')\n    def v(cls, a): return {}[a]"),
        config(sampler={"name": "stranger:it", "a": 2}),
        "sampler 'it': its options: KeyError: 2",
    ),
    "a validator that exits": (
        model("a: int = 1\n    @field_validator('a')\n    def v(cls, a): raise SystemExit(0)"),
        config(sampler={"name": "stranger:it", "a": 2}),
        "its options: SystemExit: 0",
    ),
    "a default that fails": (
        model("a: int = Field(default_factory=lambda: 1 / 0)"),
        config(sampler="stranger:it"),
        "its options: ZeroDivisionError",
    ),
    "options that YAML cannot hold": (
        model("a: object = Field(default_factory=object)"),
        lambda plugins: config(sampler="stranger:it")(plugins).dump(),
        "its options cannot be written: PydanticSerializationError",
    ),
    # build
    "build raises": (
        offering("samplers", "Choice('it', lambda options: {}['x'])"),
        built("sampler", sampler="stranger:it"),
        r"build\(\) of sampler 'it': KeyError",
    ),
    "build exits": (
        offering("samplers", "Choice('it', exit)"),
        built("sampler", sampler="stranger:it"),
        r"build\(\) of sampler 'it': SystemExit",
    ),
    "build takes nothing": (
        offering("samplers", "Choice('it', lambda: print)"),
        built("sampler", sampler="stranger:it"),
        "takes 0 positional arguments",
    ),
    "build is nothing": (
        offering("samplers", "Choice('it', None)"),
        built("sampler", sampler="stranger:it"),
        "'NoneType' object is not callable",
    ),
    "a sampler that is none": (
        offering("samplers", "Choice('it', lambda options: 'fast')"),
        built("sampler", sampler="stranger:it"),
        "returned 'fast', expected a function sample",
    ),
    "a pipeline that is none": (
        f"{HEAD}{BASE}".replace("def run(", "def ran("),
        built("pipeline"),
        r"expected an object with declare\(session, run\) and run",
    ),
    "a policy that is one": (
        offering("retention_policies", "Choice('it', lambda options: RetentionPolicy('it', len))"),
        built("policy", policy="stranger:it"),
        "expected a sequence of RetentionPolicy",
    ),
    # attention
    "a transform without hookimpls": (
        offering("attention_transforms", "Choice('it', lambda options: object())"),
        active(attention=["stranger:it"]),
        "has no hookimpl token_merge or attention_kernel",
    ),
    "a transform that is a list": (
        offering("attention_transforms", "Choice('it', lambda options: [])"),
        active(attention=["stranger:it"]),
        "stranger",
    ),
    "one transform for two": (
        offering("attention_transforms", "Choice('it', lambda options: THE)",
                 OBJECT.format(hook="token_merge(self, layer)", does="return None") + "\nTHE = Made()\n"),
        active(attention=["stranger:it", "stranger:it"]),
        "already registered",
    ),
    "a merge that is none": (
        made("attention_transforms", "token_merge(self, layer)", "return 3"),
        active(merge(LAYER), attention=["stranger"]),
        "hook token_merge: returned 3, expected a Merge",
    ),
    "a merge of nothing": (
        made("attention_transforms", "token_merge(self, layer)", "return Merge(None, None, None)"),
        active(lambda hook: hook.token_merge(layer=LAYER).merge(1), attention=["stranger"]),
        r"merge\(\): returned no function|merge\(\): TypeError|merge is None",
    ),
    "a kernel that is none": (
        made("attention_transforms", "attention_kernel(self, layer)", "return 'flash'"),
        active(kernel, attention=["stranger"]),
        "returned 'flash', expected a function",
    ),
    "a kernel that fails": (
        made("attention_transforms", "attention_kernel(self, layer)", "return lambda q, k: q"),
        active(lambda hook: kernel(hook)(1, 2, 3, LAYER), attention=["stranger"]),
        "its function: TypeError",
    ),
    "a wrapper that makes another result": (
        made("attention_transforms", "token_merge(self, layer)", "\n        yield\n        return 3").replace(
            "    @hookimpl\n    def token_merge", "    @hookimpl(wrapper=True)\n    def token_merge"
        ),
        active(merge(LAYER), attention=["stranger"]),
        "hook token_merge: returned 3, expected a Merge",
    ),
    **{
        f"a density of {said}": (
            made(
                "attention_transforms",
                "attention_kernel(self, layer)",
                "return Kernel()",
            ).replace(
                "class Made",
                "class Kernel:\n    def __call__(self, q, k, v, layout): return q\n"
                f"    def density(self): return {said}\n\nclass Made",
            ),
            active(lambda hook: kernel(hook).density(), attention=["stranger"]),
            r"density\(\): ",
        )
        for said in ("'half'", "float('nan')", "2", "-1", "None", "1 / 0")
    },
    # observers
    "an observer without hookimpls": (
        offering("observers", "Choice('it', lambda options: object())"),
        active(observers=["stranger:it"]),
        "has no hookimpl of an observer",
    ),
    "an observer that merges": (
        made("observers", "token_merge(self, layer)", "return None").replace(
            "class Made:", "class Made:\n    @hookimpl\n    def pass_started(self): pass"
        ),
        active(observers=["stranger"]),
        "hookimpl token_merge: an observer changes nothing",
    ),
    "a plugin of observers that merges": (
        f"{HEAD}{BASE}@hookimpl\ndef token_merge(layer): return None\n",
        active(plugins=["stranger"]),
        "its module has a hookimpl token_merge: an observer changes nothing",
    ),
    "an observer that fails": (
        made("observers", "pass_started(self)", "1 / 0"),
        active(lambda hook: hook.pass_started(stage=None, pass_index=0), observers=["stranger"]),
        "hook pass_started: ZeroDivisionError",
    ),
    "an observer that exits on the loader thread": (
        made("observers", "segment_loaded(self, span)", "raise SystemExit(0)"),
        active(lambda hook: hook.segment_loaded(span=None), observers=["stranger"]),
        "hook segment_loaded: SystemExit: 0",
    ),
    "an observer of options that are unknown": (
        made("observers", "pass_started(self)", "pass"),
        config(observers=[{"name": "stranger", "path": "x"}]),
        "observers.0.path: unknown key",
    ),
    # families
    "a family of no module": (
        offering("model_families", "ModelFamily('it', lambda: 'a module')"),
        family(lambda found: found.module()),
        r"model family 'it': module\(\) returned 'a module', expected a module",
    ),
    "a family that fails": (
        offering("model_families", "ModelFamily('it', lambda: 1 / 0)"),
        family(lambda found: found.module()),
        r"model family 'it': module\(\): ZeroDivisionError",
    ),
    "a family that reads configs wrongly": (
        offering("model_families", "ModelFamily('it', None, from_config=lambda config: config['width'])"),
        family(lambda found: found.from_config({})),
        r"from_config\(\): KeyError: 'width'",
    ),
    "a family that exits as it writes": (
        offering("model_families", "ModelFamily('it', None, write_extras=lambda folder: exit(0))"),
        family(lambda found: found.write_extras(None)),
        r"write_extras\(\): SystemExit: 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("source", "act", "said"), WAYS.values(), ids=WAYS)
def test_the_plugin_and_the_cause_are_named(site, source, act, said):
    site.plugin("stranger", source)
    with pytest.raises(BlockstreamError, match=f"(?s){said}") as caught:
        act(Plugins())
    assert "stranger" in str(caught.value) or "observers.0" in str(caught.value)


COMMAND = """
import asyncio, sys
def configure(parser): {configure}
{how}def run(args): {run}
"""


@pytest.mark.parametrize(
    ("configure", "run", "how", "said"),
    [
        ("pass", "1 / 0", "", "ZeroDivisionError"),
        ("pass", "sys.exit(0)", "", "SystemExit: 0"),
        ("pass", "raise asyncio.CancelledError", "", "CancelledError"),
        ("pass", "return 'fine'", "", "returned 'fine', expected an exit code"),
        ("pass", "return True", "", "returned True, expected an exit code"),
        ("1 / 0", "return 0", "", "configure.*ZeroDivisionError"),
        ("sys.exit(0)", "return 0", "", "configure.*SystemExit: 0"),
    ],
)
def test_a_command_that_fails_is_named(site, capsys, configure, run, how, said):
    files = {"stranger_module.py": COMMAND.format(configure=configure, run=run, how=how)}
    site.install("stranger", files, {"blockstream.commands": {"strange": "stranger_module"}})
    assert main(["strange"]) == 1
    err = capsys.readouterr().err
    assert "command 'strange' of stranger 1.0" in err
    assert re.search(said, err)


PRINTING = f"print('hello')\n{HEAD}{BASE}".replace("def pipelines():", "def pipelines():\n    print('hello')")


@pytest.mark.parametrize("words", [["plugins", "--hooks", "--json"], ["schema", "--plugin", "stranger"]])
def test_what_a_plugin_prints_stays_out_of_json(site, monkeypatch, capsys, words):
    monkeypatch.setenv("BLOCKSTREAM_DISABLE", ",".join(p for p in Plugins().visible if p != "builtin"))
    site.plugin("stranger", PRINTING)
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and "hello" in err


def test_a_command_that_prints_as_it_is_imported_leaves_json_alone(site, capsys):
    source = """
        print("hello")
        from blockstream.cli.common import add_json, print_json
        def configure(parser): add_json(parser, "nothing")
        def run(args):
            print("hello again")
            print_json({"a": 1})
    """
    site.install(
        "stranger", {"stranger_module.py": source}, {"blockstream.commands": {"strange": "stranger_module"}}
    )
    assert main(["strange", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1} and "hello again" in err


# Names that others have.


def test_a_name_of_the_engines_own_plugins_stays_its_own(site, caplog):
    site.plugin(
        "builtin", f"{HEAD}@hookimpl\ndef samplers():\n    return [Choice('euler', print)]\n", "stranger"
    )
    plugins = Plugins()
    plugin, choice = plugins.find("sampler", "euler")
    assert plugin == "builtin" and choice.build is not print
    assert "plugin 'builtin' of stranger 1.0 is passed over" in caplog.text
    assert "stranger/builtin is the other" in caplog.text
    assert Plugins().find("sampler", "stranger/builtin:euler")[1].build is print


def test_two_strangers_of_one_name_are_told_apart_by_full_names(site):
    for who in ("one", "two"):
        source = listing("samplers", f"return [Choice('leaps', print, summary='{who}')]")
        site.install(who, {f"{who}.py": source}, {"blockstream": {"leaps": who}})
    with pytest.raises(PluginError, match=r"by one 1.0, two 1.0; .* write one/leaps or two/leaps"):
        Plugins().find("sampler", "leaps")
    for who in ("one", "two"):
        plugin, choice = Plugins().find("sampler", f"{who}/leaps")
        assert (plugin, choice.summary) == (f"{who}/leaps", who)


def test_a_packaged_config_is_never_replaced_by_a_strangers(site, caplog, capsys):
    from blockstream.plugins.entrypoints import examples
    from blockstream.run.config import read_config

    ours = examples()["movd.yaml"]
    site.install(
        "stranger",
        {"theirs/movd.yaml": "pipeline: theirs\n", "theirs/__init__.py": ""},
        {"blockstream.examples": {"movd.yaml": "theirs"}},
    )
    found = examples()
    assert found["movd.yaml"] == ours
    assert {"stranger:movd.yaml", "blockstream-engine:movd.yaml"} <= set(found)
    assert read_config("movd.yaml").data["pipeline"] == "movd"
    assert "stranger:movd.yaml is another" in caplog.text
    assert read_config("stranger:movd.yaml").data["pipeline"] == "theirs"
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "stranger:movd.yaml" in out and "blockstream-engine:movd.yaml" in out


def test_a_config_that_two_strangers_have_is_asked_for_by_its_full_name(site):
    from blockstream.run.config import read_config

    for who in ("one", "two"):
        files = {f"{who}/mine.yaml": f"pipeline: {who}\n", f"{who}/__init__.py": ""}
        site.install(who, files, {"blockstream.examples": {"mine.yaml": who}})
    with pytest.raises(
        BlockstreamError, match=r"several packages have mine; write one:mine\.yaml or two:mine\.yaml"
    ):
        read_config("mine")
    assert read_config("two:mine.yaml").data["pipeline"] == "two"


# Observers with options.

OBSERVER = """
    from pathlib import Path
    from pydantic import BaseModel
    from blockstream.plugins import Choice, hookimpl

    class Options(BaseModel):
        path: Path
        every: int = 1

    class Notes:
        def __init__(self, options):
            self.options, self.seen = options, []

        @hookimpl
        def pass_finished(self, stage, pass_index):
            if pass_index % self.options.every == 0:
                self.seen.append(pass_index)

        @hookimpl
        def run_failed(self, run, error):
            self.options.path.write_text(f"{self.seen} {error}")

        @hookimpl
        def run_finished(self, run, report):
            self.options.path.write_text(f"{self.seen}")
            report.clear()

    @hookimpl
    def observers():
        return [Choice("notes", Notes, Options, "notes of passes")]
"""


def test_observers_take_options_and_hear_of_both_ends(site, tmp_path):
    from blockstream.run import runner
    from tests.support.toy_pipeline import ToyPipeline, config, save

    site.plugin("notes", OBSERVER)
    folder = save(tmp_path / "weights")
    listed = [
        {"name": "notes", "path": str(tmp_path / "all.txt")},
        {"name": "notes", "path": str(tmp_path / "some.txt"), "every": 2},
    ]
    plain = config(ToyPipeline(folder))
    made = make_config({"pipeline": "movd", "prompt": "a", "observers": listed}).observers
    report = runner.run(plain.model_copy(update={"observers": made}), tmp_path / "out")
    assert (tmp_path / "all.txt").read_text() == "[0, 0, 1, 2]"
    assert (tmp_path / "some.txt").read_text() == "[0, 0, 2]"
    assert report["stages"] and json.loads((tmp_path / "out" / "report.json").read_text())["stages"]
    assert "observers:\n- name: notes\n" in (tmp_path / "out" / "config.yaml").read_text()

    def fail(n):
        raise RuntimeError("half way")

    broken = config(ToyPipeline(folder, lambda n: fail(n) if n == 1 else None))
    with pytest.raises(PluginError, match="pipeline 'toy': RuntimeError: half way"):
        runner.run(broken.model_copy(update={"observers": made}), tmp_path / "broken")
    assert (tmp_path / "all.txt").read_text().startswith("[0, 0] plugin 'builtin', pipeline 'toy'")


@pytest.mark.parametrize(
    ("declared", "returned", "said"),
    [
        (["../mine.txt"], {}, "'../mine.txt' is no name of a run's file"),
        (["/tmp/mine.txt"], {}, "'/tmp/mine.txt' is no name"),
        ([""], {}, "'' is no name"),
        (["report.json"], {}, "report.json is written by the engine"),
        ([], None, r"run\(\) returned None, expected a mapping"),
        ([], {"x": object()}, "TypeError: Object of type object is not JSON serializable"),
        ([], {"files": "a.txt"}, "returned files 'a.txt', expected a list"),
        ([], {"files": ["gone.txt"]}, "returned the file 'gone.txt', which is not there"),
        ([], KeyError("x"), "KeyError: 'x'"),
        ([], SystemExit(0), "SystemExit: 0"),
    ],
)
def test_what_a_pipeline_does_wrongly_is_named(tmp_path, declared, returned, said):
    from blockstream.run import runner
    from tests.support.toy_pipeline import config

    class Pipeline:
        def declare(self, session, run):
            run.files.declare(declared)

        def run(self, session, run):
            if isinstance(returned, BaseException):
                raise returned
            return returned

    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(PluginError, match=f"plugin 'builtin', pipeline 'toy': .*{said}"):
        runner.run(config(Pipeline()), tmp_path / "out")
    assert (tmp_path / "mine.txt").read_text() == "keep me"
