"""The pipelines on a device: the bits of the processor on a fake one, and no tensor that stays behind."""

from __future__ import annotations

import pytest
import torch
from blockstream_sta.gathered import attend
from blockstream_sta.tiles import Tiling
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blockstream.device import choose
from blockstream.engine.ledger import Ledger
from blockstream.module.attention import attention_hooks
from blockstream.module.faking import Call, faked
from blockstream.run import runner
from blockstream.run.activation import activate
from blockstream.run.config import make_config
from blockstream.run.numerics import pinned
from blockstream.streaming.session import Session
from movd.attention import attention_layers
from movd.hunyuan.denoiser import joint_layers
from tests.support.fake_cuda import fake_cuda
from tests.support.family_models import write_hunyuan, write_pyramid

PROMPT = "a red star moving left slowly"
#: Where nothing of the processor's may reach: fake tensors refuse to be computed with those of another place.
AWAY = torch.device("meta", 0)


@pytest.fixture(name="keys", scope="module")
def _keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    common = {"prompt": PROMPT, "threads": 1, "cache": "off"}
    small = {"height": 16, "width": 32, "frames": 9, "steps": 2}
    return {
        "movd": {"pipeline": "movd", **common, "height": 32, "width": 32, "frames": 17, "steps": 2},
        "hunyuan": {"pipeline": "hunyuan-video", **common, **small, **write_hunyuan(folder / "h")},
        "pyramid": {"pipeline": "pyramid-flow", **common, **write_pyramid(folder / "p"), **_pyramid()},
    }


def _pyramid():
    return {"height": 64, "width": 64, "frames": 9, "steps": [2, 1, 1], "video_steps": [1, 1, 1]}


@pytest.mark.parametrize("family", ["movd", "hunyuan", "pyramid"])
def test_a_video_is_the_same_where_its_networks_compute_on_a_device(keys, family, monkeypatch, tmp_path):
    own = keys[family]
    runner.run(make_config({**own, "device": "cpu", "int8": "bf16"}), tmp_path / "cpu")
    device = fake_cuda(monkeypatch)
    more = {"device": "cuda", "device_budget": "512MiB", "attention": []}
    report = runner.run(make_config({**own, **more}), tmp_path / "cuda")
    assert torch.equal(*(load_file(tmp_path / x / "latents.safetensors")["z"] for x in ("cpu", "cuda")))
    assert (tmp_path / "cpu" / "video.mp4").read_bytes() == (tmp_path / "cuda" / "video.mp4").read_bytes()
    assert device.copied_nbytes and report["device"]["budget"]["held"]


class Seeing(Session):
    """Keeps what each stage was declared with."""

    def stage(self, name, model, checkpoint, passes=None, dtype=None, example_inputs=None, **more):
        module = super().stage(name, model, checkpoint, passes, dtype, example_inputs, **more)
        self.__dict__.setdefault("seen", []).append((name, module, example_inputs))
        return module


def layers_of(module, pipeline):
    """Return the attention layers of a denoiser with what a transform is told of them."""
    family, latent = pipeline.family, pipeline.family.latent
    if hasattr(module, "grid"):
        return attention_layers(module, module.grid(*latent[1:]), family.length)
    if hasattr(module, "single_transformer_blocks"):
        return joint_layers(module, latent[1:], 4)
    return []


def put_away(module: nn.Module, call: Call) -> Call:
    """Put what a module on fake tensors has, and its inputs, in another place."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    moved = torch.empty_like(tensor, device=AWAY)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    own[name] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(AWAY), (tuple(call.args), dict(call.kwargs))
    )
    return Call(args, kwargs)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("movd", []),
        ("movd", [{"name": "tdtm", "merge_steps": 1.0}]),
        ("hunyuan", []),
        ("hunyuan", [{"name": "tdtm", "merge_steps": 1.0}]),
        ("pyramid", []),
    ],
)
def test_no_tensor_of_a_forward_stays_on_the_processor(keys, family, attention, monkeypatch):
    monkeypatch.setattr(choose, "devices_here", lambda: 0)
    config = pinned(make_config({**keys[family], "attention": attention}))
    run = runner.RunInProgress(config, runner.NOWHERE, Ledger(), activate(config))
    with runner.open_session(run, Seeing) as session:
        pipeline = config.pipeline.build()
        pipeline.declare(session, run)
        assert len(session.seen) >= 3
        for name, module, inputs in session.seen:
            with faked(module, Call.of(inputs)) as (fake, call):
                away = put_away(fake, call)
                hooks = {"token_merge": run.token_merge, "attention_kernel": run.attention_kernel}
                with attention_hooks(
                    layers_of(fake, pipeline) if name == "dit" and attention else [], **hooks
                ) as changed:
                    fake(*away.args, **away.kwargs)
                assert bool(changed) == (name == "dit" and bool(attention))


def test_gathered_windows_stay_where_their_queries_are():
    tiling = Tiling((2, 4, 4), (1, 2, 2))
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 35, 8, device=AWAY) for _ in range(3))
        assert attend(q, k, v, tiling, [(1, 1, 1), (2, 2, 2)], 3).device == AWAY
