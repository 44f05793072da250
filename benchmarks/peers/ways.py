"""The contestants: each a context manager that sets a network up and yields its forward.

Each is given what its own documentation offers for a model that does not fit in memory, on a processor.
`job.room` is the memory it may fill with weights; a contestant that was killed is tried once more with
none. What it writes to disk goes to `job.scratch`, and is found there again by the next trial.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import t5_xxl
from benchmarks.contestant import BESIDE_NBYTES
from benchmarks.peers.models import Model, config_of
from blockstream.module.empty import empty

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """One contestant's task; `budget` in bytes, None where memory is not limited."""

    model: Model
    name: str
    folder: Path
    scratch: Path
    passes: int
    budget: int | None
    fill: bool = True

    @property
    def room(self) -> int | None:
        """Return the bytes of weights that fit beside torch and activations; None: all of them."""
        if not self.fill:
            return 0
        return None if self.budget is None else max(0, self.budget - BESIDE_NBYTES)


# -- ours ----------------------------------------------------------------------------------------


def ours(policy: str) -> Callable[[Job, dict[str, Any]], AbstractContextManager[Forward]]:
    """Return the contestant that streams by a retention policy."""

    @contextmanager
    def streamed(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
        import blockstream

        with blockstream.open(job.budget, None, policy) as s:
            yield s.stage(
                job.name,
                lambda: job.model.build(job.folder),
                job.folder,
                passes=job.passes,
                example_inputs=job.model.inputs(config_of(job.folder)),
            )
            report, plan = s.report(), s.plan.stages[0]
            loads: dict[int, int] = defaultdict(int)
            for span in s.ledger.spans:
                if span.kind == "load" and span.visit is not None:
                    loads[span.visit.pass_index] += span.nbytes
            facts.update(
                budget=report["budget"],
                stage=report["stages"][0],
                policy=plan.policy,
                slots=plan.slots,
                retained=len(plan.retained),
                loaded_nbytes=[loads[p] for p in range(job.passes)],
            )

    return streamed


# -- plain PyTorch, safetensors ------------------------------------------------------------------


@contextmanager
def mmap(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
    """Compute straight from mapped files: the page cache decides what stays."""
    yield _loaded(job, copy=False)


@contextmanager
def resident(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
    """Hold all weights in memory."""
    yield _loaded(job, copy=True)


def _loaded(job: Job, copy: bool) -> nn.Module:
    from safetensors.torch import load_file

    module = _without_weights(job)
    for path in t5_xxl.files(job.folder):
        weights = load_file(path)
        if copy:
            weights = {k: v.clone() for k, v in weights.items()}
        module.load_state_dict(weights, strict=False, assign=True)
    _tie(module)
    missing = [n for n, t in module.state_dict().items() if t.is_meta]
    assert not missing, f"not in the checkpoint: {missing}"
    return module


def _without_weights(job: Job) -> nn.Module:
    with empty():
        return job.model.build(job.folder)


def _tie(module: nn.Module) -> None:
    if hasattr(module, "tie_weights"):
        module.tie_weights()


# -- accelerate, transformers --------------------------------------------------------------------


@contextmanager
def accelerate(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
    """Load and dispatch with accelerate: the first blocks in memory, the rest offloaded to disk."""
    from accelerate import load_checkpoint_and_dispatch

    module = _without_weights(job)
    _tie(module)
    where = _device_map(job, module, facts)
    yield load_checkpoint_and_dispatch(
        module,
        str(job.folder),
        device_map=where,
        offload_folder=str(job.scratch),
        dtype=job.model.torch_dtype,
    )


@contextmanager
def transformers(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
    """Load with transformers: the first blocks in memory, the rest read from the shards themselves."""
    import transformers as library

    module = _without_weights(job)
    if not isinstance(module, library.PreTrainedModel):
        raise TypeError(f"{type(module).__name__} is no transformers model")
    yield type(module).from_pretrained(
        job.folder,
        dtype=job.model.torch_dtype,
        device_map=_device_map(job, module, facts),
        offload_folder=str(job.scratch),
        local_files_only=True,
    )


def _device_map(job: Job, module: nn.Module, facts: dict[str, Any]) -> dict[str, str]:
    """Return where each part goes: blocks to disk but for the first that there is room for."""
    blocks, where, left = job.model.blocks(module), {}, job.room
    for name, block in blocks.items():
        nbytes = sum(p.nbytes for p in block.parameters())
        fits = left is None or nbytes <= left
        where[name] = "cpu" if fits else "disk"
        if left is not None:
            left = left - nbytes if fits else 0
    facts["retained"] = sum(device == "cpu" for device in where.values())

    def others(parent: nn.Module, prefix: str) -> None:
        for name, _ in [*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False)]:
            where[prefix + name] = "cpu"
        for name, child in parent.named_children():
            path = prefix + name
            if any(block.startswith(path + ".") for block in blocks):
                others(child, path + ".")
            elif path not in blocks:
                where[path] = "cpu"

    others(module, "")
    return where


# -- diffusers -----------------------------------------------------------------------------------


@contextmanager
def diffusers(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
    """Offload groups of one block to disk, as diffusers does for any module with a list of blocks."""
    from diffusers.hooks import apply_group_offloading

    module = _loaded(job, copy=False)
    cpu = torch.device("cpu")
    apply_group_offloading(
        module.get_submodule(job.model.tower),
        onload_device=cpu,
        offload_device=cpu,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(job.scratch),
    )
    yield module


# -- AirLLM --------------------------------------------------------------------------------------


@contextmanager
def airllm(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
    """Stream layer by layer from AirLLM's own split."""
    from airllm import AutoModel

    yield AutoModel.from_pretrained(
        str(job.folder), device="cpu", dtype=job.model.torch_dtype, layer_shards_saving_path=str(job.scratch)
    )


# -- AirCanvas -----------------------------------------------------------------------------------


@contextmanager
def aircanvas(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
    """Stream from AirCanvas's own split, planned by its own solver for the budget."""
    with _aircanvas(job, facts, planned=True) as forward:
        yield forward


@contextmanager
def aircanvas_ring(job: Job, facts: dict[str, Any]) -> Iterator[Forward]:
    """Stream from AirCanvas's own split with nothing resident and its default ring of buffers."""
    with _aircanvas(job, facts, planned=False) as forward:
        yield forward


@contextmanager
def _aircanvas(job: Job, facts: dict[str, Any], planned: bool) -> Iterator[Forward]:
    from aircanvas.sharding.splitter import split_model
    from aircanvas.streaming.engine import StreamingEngine
    from aircanvas.streaming.residency import Workload, solve
    from aircanvas.utils.hw import HardwareProfile

    dtype = str(job.model.torch_dtype).removeprefix("torch.")
    manifest = split_model(str(job.folder), cache_dir=job.scratch, compute_dtype=dtype)
    options: dict[str, Any] = {}
    if planned:
        sample = job.scratch / max(manifest.blocks, key=lambda b: b.n_bytes).file
        hardware = HardwareProfile.probe("cpu", sample_file=sample, cache_dir=job.scratch)
        config = config_of(job.folder)
        width = config.get("d_model") or config.get("hidden_size") or config["caption_projection_dim"]
        # Its estimate of activations; all four forwards have some 300 tokens.
        workload = Workload(steps=30, tokens=300, hidden=width, dtype_bytes=job.model.torch_dtype.itemsize)
        plan = solve(manifest, hardware, workload, ram_budget=job.budget)
        facts.update(retained=plan.resident_blocks, ring=plan.ring_depth)
        options = {
            "config": plan.stream_config(),
            "resident_blocks": plan.resident_blocks,
            "ram_cache_bytes": plan.ram_cache_bytes,
        }
    module = _without_weights(job)
    with StreamingEngine(module, manifest, job.scratch, device="cpu", **options) as engine:
        yield module
        facts["engine"] = dict(engine.stats)


@dataclass(frozen=True)
class Way:
    """A contestant: what runs it, the packages of its environment ("" is the project's own).

    `fills` ways keep weights in the memory they are given, and are tried with none if killed.
    """

    run: Callable[[Job, dict[str, Any]], AbstractContextManager[Forward]]
    packages: tuple[str, ...] = ()
    fills: bool = False


WAYS = {
    "blockstream auto": Way(ours("auto")),
    "blockstream none": Way(ours("none")),
    "blockstream prefix": Way(ours("prefix")),
    "blockstream spread": Way(ours("spread")),
    "resident": Way(resident),
    "safetensors mmap": Way(mmap, ("safetensors",)),
    "accelerate": Way(accelerate, ("accelerate",), fills=True),
    "transformers": Way(transformers, ("transformers", "accelerate"), fills=True),
    "diffusers groups": Way(diffusers, ("diffusers", "accelerate")),
    "AirLLM": Way(airllm, ("airllm",)),
    "AirCanvas": Way(aircanvas, ("aircanvas",)),
    "AirCanvas ring": Way(aircanvas_ring, ("aircanvas",)),
}
OURS = tuple(name for name in WAYS if name.startswith("blockstream"))
