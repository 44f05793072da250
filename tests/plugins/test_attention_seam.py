"""What the engine promises a kernel and a merge, and what it does about one that breaks its own promise."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from blockstream.engine.ledger import Ledger
from blockstream.errors import ModelError, PluginError
from blockstream.module.attention import UNCHANGED, Kernel, attention_hooks, numbered
from blockstream.plugins import AttentionLayer, Merge, Plugins, current_run, hookimpl, new_run
from blockstream.report.sampling import WatchedKernels
from blockstream.run.activation import activate
from blockstream.run.config import make_config
from blockstream.run.runner import RunInProgress
from blockstream.streaming.pace import pace

FULL = AttentionLayer("blocks.0.attn", "full", grid=(2, 2, 2), width=8, heads=2, trailing=4)
FIRST = AttentionLayer("blocks.0.attn", "full", grid=(2, 2, 2), width=8, heads=2, leading=4)
CROSS = AttentionLayer("blocks.0.cross", "cross", grid=(2, 2, 2), width=8, heads=2, trailing=4)


def exact(q, k, v, layout):
    return scaled_dot_product_attention(q, k, v)


def some(tokens, batch=2, seed=0):
    return torch.randn(batch, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


def asked(plugin, hook, layer):
    plugins = Plugins()
    plugins.register(plugin, "mine")
    return getattr(plugins.hook, hook)(layer=layer)


class Kernels:
    """A plugin whose kernel is the function it was made with."""

    def __init__(self, kernel):
        self.kernel = kernel

    @hookimpl
    def attention_kernel(self, layer):
        return self.kernel


class Merges:
    def __init__(self, **merge):
        self.merge = {"merge": halves, "unmerge": doubled, "positions": torch.tensor([0.5])} | merge

    @hookimpl
    def token_merge(self, layer):
        return Merge(**self.merge)


def halves(x):
    return x.mean(1, keepdim=True)


def doubled(x):
    return x.expand(-1, 2, -1, -1)


@contextmanager
def resolved(plugin, layer=FULL):
    plugins, holder = Plugins(), SimpleNamespace(seam=UNCHANGED)
    plugins.register(plugin, "mine")
    hook = plugins.hook
    with attention_hooks(
        [(holder, layer)],
        token_merge=lambda x: hook.token_merge(layer=x),
        attention_kernel=lambda x: hook.attention_kernel(layer=x),
    ):
        yield holder


@pytest.mark.parametrize("layer", [FULL, FIRST])
@pytest.mark.parametrize("valid", [(4, 4), (3, 3), (1, 4), (0, 2)])
def test_a_kernel_gets_real_tokens_only_and_is_told_how_many(layer, valid):
    q, k, v = (some(12, seed=i) for i in range(3))
    seen = []

    def kernel(q, k, v, layout):
        seen.append((len(q), q.shape[2] - 8, k.shape[2] - 8, layout.leading, layout.trailing))
        return exact(q, k, v, layout)

    out = Kernel(kernel, layer)(q, k, v, valid)
    for i, n in enumerate(valid):
        real = torch.tensor(
            [True] * 8 + [t < n for t in range(4)]
            if layer is FULL
            else [t < n for t in range(4)] + [True] * 8
        )
        want = scaled_dot_product_attention(*(x[i : i + 1, :, real] for x in (q, k, v)))
        torch.testing.assert_close(out[i : i + 1, :, real], want)
        assert not out[i, :, ~real].any()
    assert {(a, b) for _, a, b, *_ in seen} == {(n, n) for n in valid}
    assert {(lead, trail) for *_, lead, trail in seen} == {(0, n) if layer is FULL else (n, 0) for n in valid}


def test_the_keys_of_cross_attention_are_cut_and_its_queries_are_not():
    q, k, v = some(8), some(4, seed=1), some(4, seed=2)
    out = Kernel(exact, CROSS)(q, k, v, (1, 4))
    torch.testing.assert_close(out[:1], scaled_dot_product_attention(q[:1], k[:1, :, :1], v[:1, :, :1]))
    torch.testing.assert_close(out[1:], scaled_dot_product_attention(q[1:], k[1:], v[1:]))


def test_lengths_that_cannot_be_are_the_pipelines_fault():
    q = some(12)
    with pytest.raises(ModelError, match=r"\[3\] text tokens are said to be real, of 4 in 2 samples"):
        Kernel(exact, FULL)(q, q, q, (3,))
    with pytest.raises(ModelError, match=r"\[5, 5\] text tokens are said to be real, of 4"):
        Kernel(exact, FULL)(q, q, q, (5, 5))


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda q, k, v, layout: exact(q, k, v, layout)[:, :, 1:], r"returned \[2, 2, 11, 4\] float32"),
        (lambda q, k, v, layout: exact(q, k, v, layout).double(), r"returned \[2, 2, 12, 4\] float64"),
        (lambda q, k, v, layout: None, "returned None"),
        (lambda q, k, v, layout: exact(q, k, v, layout) / 0, "returned NaN or infinity"),
    ],
)
def test_a_kernel_that_returns_something_else_is_named(kernel, said):
    q = some(12)
    with (
        resolved(Kernels(kernel)) as holder,
        pytest.raises(PluginError, match=f"plugin 'mine', hook attention_kernel.*{said}.*blocks.0.attn"),
    ):
        holder.seam.kernel(q, q, q)


def test_what_is_not_finite_already_is_not_the_kernels_fault():
    q = some(12)
    q[0, 0, 0, 0] = float("nan")
    with resolved(Kernels(exact)) as holder:
        assert holder.seam.kernel(q, q, q).isnan().any()


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ({"positions": torch.tensor([0.0, 1.0, 2.0])}, r"merge\(\): positions \[3\] float32.*from 1 to 2"),
        ({"positions": [0.5]}, r"merge\(\): positions \[0.5\]"),
        ({"merge": lambda x: x}, r"merge\(\): returned \[1, 2, 4, 8\] float32.*expected \[1, 1, 4, 8\]"),
        ({"merge": lambda x: halves(x).double()}, r"merge\(\): returned \[1, 1, 4, 8\] float64"),
        ({"unmerge": lambda x: x}, r"unmerge\(\): returned \[1, 1, 4, 8\].*expected \[1, 2, 4, 8\]"),
    ],
)
def test_a_merge_of_the_wrong_shape_is_named(merge, said):
    x = torch.randn(1, 2, 4, 8)
    with (
        pytest.raises(PluginError, match=f"plugin 'mine', hook token_merge: {said}"),
        resolved(Merges(**merge)) as holder,
    ):
        holder.seam.around(x, lambda x, kernel: x)


def test_an_attention_transform_without_hookimpls_is_refused(tmp_path, monkeypatch):
    from tests.support.packages import site_on_path

    source = """
        from blockstream.plugins import Choice, hookimpl

        class Unmarked:
            def attention_kernel(self, layer):
                return None

        @hookimpl
        def attention_transforms():
            return [Choice("unmarked", lambda options: Unmarked())]

        @hookimpl
        def pipelines():
            return [Choice("unmarked", lambda options: "a pipeline")]
    """
    with site_on_path(tmp_path / "site", monkeypatch) as site:
        site.plugin("unmarked", source)
        with pytest.raises(
            PluginError, match=r"attention 'unmarked'.*no hookimpl token_merge or attention_k"
        ):
            activate(make_config({"pipeline": "unmarked", "attention": ["unmarked"]}))


def test_layers_are_numbered_by_kind():
    layers = numbered([FULL, CROSS, FULL])
    assert [(x.kind, x.index, x.layers) for x in layers] == [("full", 0, 2), ("cross", 0, 1), ("full", 1, 2)]


class Sparse:
    """A kernel that says it computes all in the first step and a quarter afterwards."""

    def __call__(self, q, k, v, layout):
        return exact(q, k, v, layout)

    def density(self):
        return 1.0 if current_run().step == 0 else 0.25


def test_a_kernels_calls_and_share_are_counted_step_by_step():
    watch, q = WatchedKernels(), some(12)
    kernel = watch.watch(FULL, asked(Kernels(Sparse()), "attention_kernel", FULL))
    with new_run() as context:
        for context.step in range(3):
            kernel(q, q, q, FULL)
    account = watch.account()
    assert account == {
        "layers": 1,
        "merged_layers": 0,
        "calls": 3,
        "density": 0.5,
        "by_step": {"0": 1.0, "1": 0.25, "2": 0.25},
    }


class Layer(torch.nn.Module):
    """Full attention over a grid, all of whose operations are its scores."""

    def __init__(self):
        super().__init__()
        self.seam = UNCHANGED

    def forward(self, x):
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return scaled_dot_product_attention(q, q, q)


def test_a_plan_follows_the_share_that_a_kernel_computes(tmp_path, monkeypatch):
    plugins = Plugins()
    plugins.register(Kernels(Sparse()), "mine")
    config = SimpleNamespace(
        budget="1GiB",
        allow_nonfinite=False,
        backend=None,
        pipeline=SimpleNamespace(ref="none"),
        sampler=SimpleNamespace(build=lambda: None, who="none"),
    )
    run = RunInProgress(config, tmp_path, Ledger(), plugins)
    layer = AttentionLayer("attn", "full", grid=(2, 2, 2), width=8, heads=2)
    steps = pace(Layer(), {"x": torch.empty(3, 8, 8)}, run, 3, lambda module: [(module, layer)])
    assert steps == (1.0, 0.25, 0.25)
