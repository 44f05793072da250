"""Every hook: specified by a docstring alone, documented exactly, its example at work."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from blockstream import plugins, stream
from blockstream.engine.spans import Span
from blockstream.plan.segments import Exactly, Segment, Stage
from blockstream.plugins import AttentionLayer, Plugins, hookspecs
from blockstream.plugins.manager import KNOWN_HOOKS
from blockstream.run.files import Files

PAGE = Path(__file__).parent.parent / "docs" / "hooks.md"
SECTION = re.compile(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", re.S | re.M)
BLOCK = re.compile(r"```python\n(.*?)```", re.S)
SECTIONS = {name: BLOCK.findall(text) for name, text in SECTION.findall(PAGE.read_text())}

STAGE = Stage("dit", (Segment("a", 100, 1.0, 1.0), Segment("b", 40, 1.0, 1.0)), passes=Exactly(3))
LOADED = Span("loader", "load", 1.0, 3.0, "a", nbytes=100)
EXECUTED = Span("compute", "execute", 1.0, 1.5, "a")
TEMPORAL = AttentionLayer("blocks.0.attn_temp", "temporal", grid=(4, 1, 3), width=8, heads=2)


class Example:
    """The example of one hook, registered as a plugin."""

    def __init__(self, hook: str) -> None:
        self.module = ModuleType("example")
        code = compile(SECTIONS[hook][1], f"docs/hooks.md, {hook}", "exec", dont_inherit=True)
        exec(code, vars(self.module))
        self.plugins = Plugins()
        self.plugins.register(self.module, "example")
        assert self.plugins.hooks_of("example") == (hook,)

    def choice(self, key: str):
        (choice,) = self.plugins.offers(key, "example").values()
        return choice

    def call(self, hook: str, **arguments):
        return getattr(self.plugins.hook, hook)(**arguments)


def test_every_hook_has_a_test_of_its_name():
    tests = {name.removeprefix("test_hook_") for name in globals() if name.startswith("test_hook_")}
    assert tests == set(KNOWN_HOOKS)


def test_every_hook_is_documented_and_nothing_else_is():
    assert list(SECTIONS) == list(KNOWN_HOOKS)


@pytest.mark.parametrize("hook", KNOWN_HOOKS)
def test_the_documented_signature_is_the_specified_one(hook):
    scope: dict = {}
    code = compile(SECTIONS[hook][0], hook, "exec", flags=annotations_as_text())
    exec(code, scope)
    assert inspect.signature(scope[hook]) == inspect.signature(getattr(hookspecs, hook))


def annotations_as_text() -> int:
    import __future__

    return __future__.annotations.compiler_flag


@pytest.mark.parametrize("hook", KNOWN_HOOKS)
def test_a_hook_is_a_docstring_only(hook):
    lines = inspect.getsource(getattr(hookspecs, hook)).rstrip()
    assert lines.endswith('"""'), f"{hook} has a body"
    assert inspect.getdoc(getattr(hookspecs, hook))


def test_hook_pipelines(monkeypatch, tmp_path):
    choice = Example("pipelines").choice("pipeline")
    translate = ModuleType("mypackage.translate")
    translate.Translation = lambda text, beams: (text, beams)
    monkeypatch.setitem(sys.modules, "mypackage", ModuleType("mypackage"))
    monkeypatch.setitem(sys.modules, "mypackage.translate", translate)
    options = choice.options.model_validate({"text": "in.txt"}, context={"base": tmp_path})
    assert choice.build(options) == (tmp_path / "in.txt", 1)


def test_hook_model_families():
    example = Example("model_families")
    module = example.plugins.family("example:tower-3b").module()
    assert sum(p.numel() for p in module.parameters()) == 48 * (4096 * 4096 + 4096)
    assert all(p.is_meta for p in module.parameters())


def test_hook_weight_formats(tmp_path, monkeypatch):
    (row,) = Example("weight_formats").plugins.weight_formats()
    monkeypatch.setattr(Plugins, "weight_formats", lambda self: (row,))
    net = three_layers()
    numbers = {f"{i}.weight": torch.randint(-9, 9, (8, 8), dtype=torch.int8) for i in range(3)}
    save_file({**numbers, **{f"{n}.step": torch.tensor(0.25) for n in numbers}}, tmp_path / "m.safetensors")
    net.load_state_dict({name: value * 0.25 for name, value in numbers.items()})
    x = torch.randn(2, 8)
    with torch.no_grad(), stream(three_layers, tmp_path / "m.safetensors", arena="64KiB") as streamed:
        assert torch.equal(streamed(x), net(x))


def three_layers():
    return torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))


def test_hook_backends(tmp_path):
    choice = Example("backends").choice("backend")
    backend = choice.build(choice.options(folder=tmp_path / "packs"))
    for folder in ("packs/a", "b"):
        (tmp_path / folder).mkdir(parents=True)
        save_file({"x": torch.ones(1)}, tmp_path / folder / "model.safetensors")
    opened = [backend.checkpoint(tmp_path / name).root for name in ("a", "b")]
    assert opened == [tmp_path / "packs" / "a", tmp_path / "b"]


class LineFlow:
    """dz/dt = -1 from t = 1 to 0 over three times."""

    times = (1.0, 0.75, 0.5)
    straight = True

    def __init__(self) -> None:
        self.left: list[int] = []
        self.steps: list[int] = []

    def velocity(self, z, i):
        return 1.0

    def advance(self, z, v, i, to):
        times = (*self.times, 0.0)
        return z + v * (times[i] - times[to])

    def remaining(self, n):
        self.left.append(n)

    def step_done(self, i, z, memory):
        self.steps.append(i)


def test_hook_samplers():
    choice = Example("samplers").choice("sampler")
    flow = LineFlow()
    assert choice.build(choice.options(stride=2))(flow, 0.0) == 1.0
    assert (flow.left, flow.steps) == ([1, 0], [1, 2])


def test_hook_attention_transforms():
    torch = pytest.importorskip("torch")
    choice = Example("attention_transforms").choice("attention")
    made = Plugins()
    made.register(choice.build(choice.options(scale=0.0)), "sharpen")
    kernel = made.hook.attention_kernel(layer=TEMPORAL)
    q, k, v = torch.randn(3, 1, 2, 4, 4)
    torch.testing.assert_close(kernel(q, k, v, TEMPORAL)[:, :, 0], v.mean(2))


def test_hook_retention_policies():
    choice = Example("retention_policies").choice("policy")
    (policy,) = choice.build(None)
    assert policy.retain(STAGE, 60) == [1]
    assert policy.retain(STAGE, 140) == [1, 0]


def test_hook_schedulers():
    scheduler = Example("schedulers").choice("scheduler").build(None)
    ended = list(scheduler.run(str.upper, iter("ab"), plugins.Needs(1)))
    assert [(e.task, e.result, e.lost) for e in ended] == [("a", "A", None), ("b", "B", None)]


def test_hook_observers(tmp_path):
    choice = Example("observers").choice("observers")
    made = Plugins()
    made.register(choice.build(choice.options(path=tmp_path / "notes.txt")), "notes")
    run = SimpleNamespace(out=Path("out"))
    made.hook.run_failed(run=run, error=OSError("no disk"))
    assert (tmp_path / "notes.txt").read_text() == "out: no disk\n"
    made.hook.run_finished(run=run, report={"wall_s": 3.2})
    assert (tmp_path / "notes.txt").read_text() == "out: 3 s\n"


def test_hook_token_merge():
    torch = pytest.importorskip("torch")
    merge = Example("token_merge").call("token_merge", layer=TEMPORAL)
    x = torch.arange(2 * 4 * 3 * 8.0).reshape(2, 4, 3, 8)
    assert merge.merge(x).shape == (2, 2, 3, 8)
    assert merge.unmerge(merge.merge(x)).shape == x.shape
    assert merge.positions.tolist() == [0, 2]


def test_hook_attention_kernel():
    torch = pytest.importorskip("torch")
    kernel = Example("attention_kernel").call("attention_kernel", layer=TEMPORAL)
    q, k, v = torch.randn(3, 1, 2, 4, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(kernel(q, k, v, TEMPORAL), expected)


def run_in(folder):
    run = SimpleNamespace(out=folder, files=Files(folder), budget_nbytes=5)
    run.files.begin({}, {})
    return run


def test_hook_run_started(tmp_path):
    run = run_in(tmp_path)
    Example("run_started").call("run_started", run=run)
    assert (tmp_path / "host.txt").read_text() == "budget 5 bytes\n"


def test_hook_run_finished(tmp_path):
    report = {"stages": [{"name": "t5", "wall_s": 1.0}, {"name": "dit", "wall_s": 2.0}]}
    Example("run_finished").call("run_finished", run=run_in(tmp_path), report=report)
    assert (tmp_path / "slowest.txt").read_text() == "dit"


def test_hook_run_failed(tmp_path):
    example = Example("run_failed")
    example.call("run_failed", run=run_in(tmp_path), error=RuntimeError("lost"))
    assert example.module.failures == [(tmp_path.name, "RuntimeError")]


def test_hook_stage_started():
    example = Example("stage_started")
    example.call("stage_started", stage=STAGE)
    assert example.module.begun == [("dit", 3)]


def test_hook_stage_finished():
    example = Example("stage_finished")
    example.call("stage_finished", stage=STAGE)
    assert example.module.ended == ["dit"]


def test_hook_pass_started():
    example = Example("pass_started")
    example.call("pass_started", stage=STAGE, pass_index=1)
    assert example.module.seen == ["dit 2"]


def test_hook_pass_finished():
    example = Example("pass_finished")
    example.call("pass_finished", stage=STAGE, pass_index=0)
    example.call("pass_finished", stage=STAGE, pass_index=1)
    assert example.module.passes["dit"] == 2


def test_hook_segment_loaded():
    example = Example("segment_loaded")
    example.call("segment_loaded", span=LOADED)
    assert example.module.speeds == {"a": 50.0}


def test_hook_segment_executed():
    example = Example("segment_executed")
    example.call("segment_executed", span=EXECUTED)
    assert example.module.seconds["a"] == 0.5


def test_the_page_lists_all_that_a_plugin_imports():
    page = (PAGE.parent / "plugins.md").read_text().partition("## What to import")[2].partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(plugins.__all__) and all(hasattr(plugins, name) for name in named)
