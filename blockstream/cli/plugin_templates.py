"""What `blockstream plugins new` writes: one small working plugin of each kind, with its test."""

from __future__ import annotations

from .network_templates import FAMILY, PIPELINE
from .package_kinds import Kind
from .weight_templates import BACKEND, COMMAND, FORMAT

SAMPLER = Kind(
    summary="A sampler that advances several times with one velocity.",
    yaml="sampler: {name: $name, stride: 2}",
    module='''\
"""$summary"""

from __future__ import annotations

from functools import partial

from pydantic import BaseModel, Field

from blockstream.plugins import Choice, hookimpl


class Options(BaseModel):
    """What a config may set."""

    stride: int = Field(2, ge=1, description="times that one velocity serves")


def sample(flow, z, i=0, memory=None, *, stride=2):
    """Return the sample reached from `z` at index `i`.

    After each step `flow.step_done` gets the last index taken, the sample there and what a resumed run
    needs to know, tensors and numbers only: nothing here.
    """
    n = len(flow.times)
    while i < n:
        to = min(i + stride, n)
        v = flow.velocity(z, i)
        flow.remaining(-(-(n - to) // stride))  # so many more velocities, from here on
        z = flow.advance(z, v, i, to)
        flow.step_done(to - 1, z, None)
        i = to
    return z


@hookimpl
def samplers():
    """List the sampler: a config names it, its options are checked, `build` makes it."""
    return [Choice("$name", lambda options: partial(sample, stride=options.stride), Options)]
''',
    imports="import pytest\nfrom $module import sample\n\nfrom blockstream.plugins import Plugins",
    found='assert plugins.offers("sampler", "$name")["$name"].options(stride=3).stride == 3',
    tests='''
class Steady:
    """A flow of velocity 2 at times 1, 3/4, 1/2, 1/4; samples are plain numbers here."""

    straight = True
    times = (1.0, 0.75, 0.5, 0.25)

    def __init__(self):
        self.asked, self.done = [], []

    def velocity(self, z, i):
        self.asked.append(i)
        return 2.0

    def advance(self, z, v, i, to):
        ahead = self.times[to] if to < len(self.times) else 0.0
        return z + v * (self.times[i] - ahead)

    def remaining(self, n):
        self.left = n

    def step_done(self, i, z, memory):
        self.done.append((i, z, memory))


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_every_stride_reaches_the_end_with_its_number_of_passes(stride):
    flow = Steady()
    assert sample(flow, 0.0, stride=stride) == pytest.approx(2.0)
    assert flow.asked == list(range(0, 4, stride))
    assert flow.left == 0


def test_a_run_resumes_after_any_step():
    flow = Steady()
    end = sample(flow, 0.0, stride=2)
    for i, z, memory in flow.done:
        assert sample(Steady(), z, i + 1, memory, stride=2) == end
''',
)

ATTENTION = Kind(
    summary="An attention kernel that sharpens what each layer attends to.",
    yaml="attention: [{name: $name, scale: 1.1}]",
    module='''\
"""$summary"""

from __future__ import annotations

from pydantic import BaseModel, Field

from blockstream.plugins import Choice, hookimpl


class Options(BaseModel):
    """What a config may set."""

    scale: float = Field(1.1, gt=0, description="factor on the queries; 1 changes nothing")


class Sharpen:
    """An object with hookimpls: it is registered for the runs that choose it."""

    def __init__(self, options: Options) -> None:
        self.scale = options.scale

    @hookimpl
    def attention_kernel(self, layer):
        """Return the kernel of one layer, None to leave the layer as it is. Asked once a run."""
        if layer.kind == "cross":
            return None
        from torch.nn.functional import scaled_dot_product_attention

        return lambda q, k, v, layout: scaled_dot_product_attention(q * self.scale, k, v)


@hookimpl
def attention_transforms():
    """List the transform: a config names it, its options are checked, `build` makes it."""
    return [Choice("$name", Sharpen, Options)]
''',
    imports=(
        "import torch\nfrom $module import Options, Sharpen\n\n"
        "from blockstream.plugins import AttentionLayer, Plugins"
    ),
    found='assert plugins.offers("attention", "$name")["$name"].options().scale > 1',
    tests="""
def layer(kind):
    return AttentionLayer("blocks.0.attn", kind, grid=(4, 1, 3), width=8, heads=2)


def test_a_scale_of_one_is_plain_attention_and_more_is_sharper():
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    one, two = (Sharpen(Options(scale=s)).attention_kernel(layer("temporal")) for s in (1, 2))
    assert torch.equal(one(q, k, v, layer("temporal")), plain)
    assert not torch.allclose(two(q, k, v, layer("temporal")), plain)


def test_attention_to_text_is_left_alone():
    assert Sharpen(Options()).attention_kernel(layer("cross")) is None
""",
)

POLICY = Kind(
    summary="A retention policy that keeps the segments which take longest to load.",
    yaml="policy: $name",
    module='''\
"""$summary"""

from __future__ import annotations

from blockstream.plugins import Choice, RetentionPolicy, hookimpl


def retain_slowest(stage, room):
    """Return the indices of segments of `stage` that stay in `room` bytes. A pure function."""
    chosen = []
    for i in sorted(stage.visited, key=lambda i: -stage.segments[i].load_s):
        segment = stage.segments[i]
        if not segment.resident and segment.nbytes <= room:
            chosen.append(i)
            room -= segment.nbytes
    return chosen


@hookimpl
def retention_policies():
    """List the policy; of the policies that `build` returns, the plan of least predicted time wins."""
    return [Choice("$name", lambda options: [RetentionPolicy("$name", retain_slowest)])]
''',
    imports=("from $module import retain_slowest\n\nfrom blockstream.plugins import Plugins, Segment, Stage"),
    found='assert plugins.offers("policy", "$name")["$name"].build(None)[0].name == "$name"',
    tests="""
def test_the_slowest_that_fit_stay():
    a, b, c = Segment("a", 50, load_s=1.0), Segment("b", 90, load_s=3.0), Segment("c", 10, load_s=2.0)
    stage = Stage("dit", (a, b, c))
    assert retain_slowest(stage, 100) == [1, 2]
    assert retain_slowest(stage, 60) == [2, 0]
    assert retain_slowest(stage, 5) == []
""",
)

OBSERVER = Kind(
    summary="An observer that writes how long each pass took.",
    yaml="plugins: [$name]",
    module='''\
"""$summary"""

from __future__ import annotations

import time

from blockstream.plugins import hookimpl

_begun = {}
_rows = []


@hookimpl
def run_started(run):
    """Begin anew: a process may hold several runs."""
    _begun.clear()
    _rows.clear()


@hookimpl
def pass_started(stage, pass_index):
    """Note the time."""
    _begun[stage.name] = time.perf_counter()


@hookimpl
def pass_finished(stage, pass_index):
    """Note how long it took."""
    _rows.append((stage.name, pass_index, time.perf_counter() - _begun[stage.name]))


@hookimpl
def run_finished(run, report):
    """Write the table into the run's folder."""
    lines = ["stage,pass,seconds", *(f"{name},{index},{s:.6f}" for name, index, s in _rows)]
    run.files.declare(["passes.csv"])
    run.files.write("passes.csv", ("\\n".join(lines) + "\\n").encode())
''',
    imports="from types import SimpleNamespace\n\nfrom blockstream.plugins import Plugins\n"
    "from blockstream.run.files import Files",
    found='assert "pass_finished" in plugins.hooks_of("$name")',
    tests="""
def test_every_pass_is_a_row(tmp_path):
    plugins = Plugins()
    plugins.load("$name")
    run, stage = SimpleNamespace(files=Files(tmp_path)), SimpleNamespace(name="dit")
    run.files.begin({}, {})
    plugins.hook.run_started(run=run)
    for i in range(3):
        plugins.hook.pass_started(stage=stage, pass_index=i)
        plugins.hook.pass_finished(stage=stage, pass_index=i)
    plugins.hook.run_finished(run=run, report={})
    rows = [line.split(",") for line in (tmp_path / "passes.csv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["stage", "pass"], ["dit", "0"], ["dit", "1"], ["dit", "2"]]
    assert all(float(row[2]) >= 0 for row in rows[1:])
""",
)

KINDS = {
    "sampler": SAMPLER,
    "attention": ATTENTION,
    "policy": POLICY,
    "observer": OBSERVER,
    "pipeline": PIPELINE,
    "backend": BACKEND,
    "family": FAMILY,
    "format": FORMAT,
    "command": COMMAND,
}


def files_of(name: str, kind: str) -> dict[str, str]:
    """Return the text of each file of a package, by its path in the package's folder."""
    return KINDS[kind].filled(name)
