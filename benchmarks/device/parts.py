"""The parts: each measures one thing and returns plain values. Called in a process of its own."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import blockstream
from benchmarks.device.models import FULL, TOY, Dit, Shape, inputs, load_dit, write_dit
from blockstream.checkpoint.read.reader import Reader, Wanted
from blockstream.device.choose import choose_device
from blockstream.device.fake import FakeDevice
from blockstream.device.protocol import Device
from blockstream.device.rooms import PinnedArena
from blockstream.engine.arena import Arena
from blockstream.plan.planner import Plan
from blockstream.plan.segments import Extent
from blockstream.system.limits import cpu_count

GIB = 1 << 30
ROUNDS = 5
#: Passes that a round runs one behind the other.
TOGETHER = 4


@dataclass
class Context:
    """Where a part runs: on a device or a fake one, over a folder that parts share."""

    folder: Path
    fake: bool
    seconds: float
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.device: Device = FakeDevice() if self.fake else choose_device("cuda")  # type: ignore[assignment]
        self.shape: Shape = TOY if self.fake else FULL
        self.tokens = (16, 32, 64) if self.fake else (1024, 7800, 20480)
        self.weights = self.folder / "dit"

    @property
    def where(self) -> torch.device:
        """Return where tensors lie."""
        return self.device.where

    @property
    def left_s(self) -> float:
        """Return the seconds that this part has left."""
        return self.seconds - (time.perf_counter() - self.began)

    def gib(self, amount: float) -> int:
        """Return an amount of the full network's bytes, scaled to the toy's, which has two blocks' room."""
        if not self.fake:
            return int(amount * GIB)
        largest = max(f.stat().st_size for f in self.weights.glob("*.safetensors"))
        return int(amount * GIB * self.nbytes / 12.5e9) + 2 * largest + (64 << 10)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the checkpoint's tensors."""
        return sum(f.stat().st_size for f in self.weights.glob("*.safetensors"))

    def timed(self, act: Callable[[], object]) -> float:
        """Return the seconds until what `act` began is over on the device too."""
        self.device.synchronise()
        begin = time.perf_counter()
        act()
        self.device.synchronise()
        return time.perf_counter() - begin

    def rounds(
        self, act: Callable[[], object], rounds: int = ROUNDS, warm: int = 2, together: int = 1
    ) -> dict[str, Any]:
        """Return the seconds of `act` in each round and their median; fewer rounds where time is short.

        A round runs it `together` times, one behind the other, as a denoising loop does: what is read ahead
        for the next pass is then paid for by the pass before.
        """
        first = 1.0
        for _ in range(warm):
            first = self.timed(act)
        rounds = max(1, min(rounds, int(self.left_s / 3 / max(first, 1e-6) / together)))

        def all_of_them() -> None:
            for _ in range(together):
                act()

        seconds = [self.timed(all_of_them) / together for _ in range(rounds)]
        return {"s": statistics.median(seconds), "all_s": seconds, "together": together}


def make(at: Context) -> dict[str, Any]:
    """Write the network's weights."""
    begin = time.perf_counter()
    nbytes = write_dit(at.weights, at.shape, at.where)
    os.sync()  # what is not on the disk yet would be written while others read
    return {"nbytes": nbytes, "s": time.perf_counter() - begin}


def link(at: Context) -> dict[str, Any]:
    """Measure registration, copies from registered and pageable memory, and direct reads of the disk."""
    nbytes = (2 * GIB) if not at.fake else 4 << 20
    arena = Arena(nbytes)
    pinned = PinnedArena(arena, at.device)
    begin = time.perf_counter()
    arena.commit([Extent(0, nbytes)], cpu_count().threads)
    touched = time.perf_counter()
    pinned.register(nbytes)
    registered = time.perf_counter()
    to = at.device.empty(nbytes)
    source = pinned.tensor(Extent(0, nbytes))
    piece = 64 << 20 if not at.fake else 1 << 20

    def copy() -> None:
        for i in range(0, nbytes, piece):
            at.device.copy([(to[i : i + piece], source[i : i + piece])])

    fast = at.rounds(copy)
    reader = Reader()
    speeds, read, begin_s = [], 0, time.perf_counter()
    # All of it: a disk may read its first seconds faster than it goes on.
    for path in sorted(at.weights.glob("*.safetensors")):
        file = reader.open(path)
        size = min(path.stat().st_size, nbytes)
        one_s = time.perf_counter()
        reader.read([Wanted(file, 0, size, arena.view(Extent(0, -(-size // 4096) * 4096)))])
        speeds.append(size / (time.perf_counter() - one_s))
        read += size
        if at.left_s < 6:
            break
    disk_bytes_per_s = read / (time.perf_counter() - begin_s)
    reader.close()
    pinned.unregister()
    slow = at.rounds(copy, rounds=3, warm=1)
    return {
        "refused": pinned.refused,
        "touch_s_per_gib": (touched - begin) / nbytes * GIB,
        "register_s_per_gib": (registered - touched) / nbytes * GIB,
        "registered_bytes_per_s": nbytes / fast["s"],
        "pageable_bytes_per_s": nbytes / slow["s"],
        "disk_bytes_per_s": disk_bytes_per_s,
        "disk_by_file_bytes_per_s": speeds,
        "disk_read_nbytes": read,
        "disk_mode": reader.mode,
    }


def resident(at: Context) -> dict[str, Any]:
    """Time the network with all weights on the device; keep what it computes for the others to compare."""
    module = load_dit(at.weights, at.shape, at.where)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for n in at.tokens:
            given = inputs(at.shape, n, at.where)
            found[str(n)] = at.rounds(lambda given=given: module(*given), together=TOGETHER)  # type: ignore[misc]
            torch.save(module(*given).cpu(), at.folder / f"out-{n}.pt")
    found["memory"] = vars_of(at)
    return found


def vars_of(at: Context) -> dict[str, Any]:
    """Return what the device's memory holds."""
    now = at.device.memory()
    return {name: getattr(now, name) for name in now.__slots__}


@contextmanager
def streamed(at: Context, **options: Any) -> Iterator[tuple[Any, Any, float]]:
    """Yield (session, module, seconds of set-up) of the network while it streams."""
    gc.collect()
    begin = time.perf_counter()
    with torch.no_grad(), blockstream.Session(device=at.device, **options) as session:
        module = session.stage("dit", lambda: Dit(at.shape), at.weights, passes=None, dtype="bf16")
        session.start()
        yield session, module, time.perf_counter() - begin


def _run(
    at: Context, tokens: tuple[int, ...], rounds: int = ROUNDS, together: int = TOGETHER, **options: Any
) -> dict[str, Any]:
    """Time passes of the streamed network and compare what they compute."""
    found: dict[str, Any] = {"options": {k: str(v) for k, v in options.items()}}
    with streamed(at, **options) as (session, module, setup_s):
        found["setup_s"] = setup_s
        for n in tokens:
            given = inputs(at.shape, n, at.where)
            first_s = at.timed(lambda given=given: module(*given))  # type: ignore[misc]
            found[str(n)] = {
                **at.rounds(
                    lambda given=given: module(*given),  # type: ignore[misc]
                    rounds=rounds,
                    warm=1,
                    together=together,
                ),
                "first_s": first_s,
                "same_bits": same(at, n, module(*given)),
                "copied_nbytes_a_pass": copied_a_pass(session.plan),
            }
        report = session.report()
        found["retained"] = len(session.plan.stages[0].retained)
        found["slots"] = session.plan.stages[0].slots
        found["device"], found["budget"] = report["device"], report["budget"]
        found["read_nbytes"] = report["stages"][0]["read_nbytes"]
        found["unplanned"] = report["unplanned"]
        found["memory"] = vars_of(at)
    return found


def copied_a_pass(plan: Plan) -> int:
    """Return the bytes that each pass copies to the device."""
    stage, kept = plan.schedule.stages[0], plan.stages[0].layout.retained
    return sum(stage.segments[i].nbytes for i in stage.order if i not in kept)


def same(at: Context, tokens: int, output: Tensor) -> bool | None:
    """Return whether an output equals the resident one bit for bit; None where there is none."""
    path = at.folder / f"out-{tokens}.pt"
    return torch.equal(output.cpu(), torch.load(path, weights_only=True)) if path.exists() else None


def pinned(at: Context) -> dict[str, Any]:
    """Stream with 2.5 GiB for weights on the device, all of them in registered memory."""
    return _run(at, at.tokens, budget="80%", device_arena=at.gib(2.5))


def half(at: Context) -> dict[str, Any]:
    """The same with half of the weights kept on the device, beside two slots."""
    return _run(at, at.tokens, budget="80%", device_arena=at.nbytes // 2 + at.gib(1.3))


def disk(at: Context) -> dict[str, Any]:
    """Stream from disk: 3.3 GiB of host memory in all, 2.5 GiB for weights on the device."""
    small = {"budget": "3.3GiB"} if not at.fake else {"arena": at.gib(2.0)}
    try:
        return _run(at, at.tokens[:1], rounds=3, together=2, device_arena=at.gib(2.5), **small)
    except blockstream_errors() as error:
        found = _run(at, at.tokens[:1], rounds=3, together=2, device_arena=at.gib(2.5), arena=at.gib(2.0))
        return {**found, "refused": str(error)}


def blockstream_errors() -> type[Exception]:
    """Return the type of the engine's errors."""
    from blockstream.errors import BlockstreamError

    return BlockstreamError


def budget(at: Context) -> dict[str, Any]:
    """Stream within 8 GB of the device and 16 GiB of the host, activations foretold by example inputs."""
    n = at.tokens[1]
    given = inputs(at.shape, n, torch.device("cpu"))
    given_budget = {"budget": "16GiB", "device_budget": "8GB"}
    with torch.no_grad(), blockstream.Session(device=at.device, **given_budget) as session:  # type: ignore[arg-type]
        module = session.stage("dit", lambda: Dit(at.shape), at.weights, 20, "bf16", given)
        out = module(*given)
        equal = same(at, n, out)
        timed = at.rounds(lambda: module(*given), warm=0, together=TOGETHER) if equal is not None else {}
        report = session.report()
        return {
            **timed,
            "same_bits": equal,
            "retained": len(session.plan.stages[0].retained),
            "device": report["device"],
            "budget": report["budget"],
            "memory": vars_of(at),
        }


def settled(at: Context) -> dict[str, Any]:
    """Everything on the device beside the plain module, in turn: hooks gone, cost none."""
    module = load_dit(at.weights, at.shape, at.where)
    n = at.tokens[0]
    given = inputs(at.shape, n, at.where)
    with streamed(at, budget="80%", device_arena=at.nbytes + at.gib(2.0)) as (session, ours, setup_s):
        for _ in range(3):
            ours(*given)
            module(*given)
        pairs = [
            (at.timed(lambda: module(*given)), at.timed(lambda: ours(*given)))
            for _ in range(40 if not at.fake else 5)
        ]
        ratios = sorted(b / a for a, b in pairs)
        gone = any(note.kind == "settled" for note in session.ledger.notes)
        return {
            "setup_s": setup_s,
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "hooks_gone": gone,
            "same_bits": torch.equal(module(*given), ours(*given)),
        }


def setup(at: Context) -> dict[str, Any]:
    """Time from nothing to the end of the first pass, beside reading the same bytes at the disk's speed."""
    with streamed(at, budget="80%", device_arena=at.gib(2.5)) as (_, module, setup_s):
        given = inputs(at.shape, at.tokens[0], at.where)
        first_s = at.timed(lambda: module(*given))
        return {"setup_s": setup_s, "first_pass_s": first_s, "nbytes": at.nbytes}


def offload(at: Context) -> dict[str, Any]:
    """Accelerate's cpu_offload of the same network, for comparison."""
    from accelerate import cpu_offload

    module = load_dit(at.weights, at.shape, torch.device("cpu"))
    cpu_offload(module, at.where)
    return _beside(at, module)


def groups(at: Context) -> dict[str, Any]:
    """Diffusers' group offloading of the same network, block by block with a stream, for comparison."""
    from diffusers.hooks import apply_group_offloading

    module = load_dit(at.weights, at.shape, torch.device("cpu"))
    apply_group_offloading(
        module,
        onload_device=at.where,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=not at.fake,
    )
    return _beside(at, module)


def _beside(at: Context, module: torch.nn.Module) -> dict[str, Any]:
    """Time another library's way of running the network, at the fewest and the most tokens."""
    found = {}
    with torch.no_grad():
        for n in (at.tokens[0], at.tokens[-1]):
            given = inputs(at.shape, n, at.where)
            found[str(n)] = at.rounds(
                lambda given=given: module(*given),  # type: ignore[misc]
                rounds=3,
                warm=1,
                together=2,
            )
            found[str(n)]["same_bits"] = same(at, n, module(*given))
    return found


def attention(at: Context) -> dict[str, Any]:
    """One attention over 115,456 tokens of 24 heads, by torch's kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    n = 115_456 if not at.fake else 128
    heads = 24 if not at.fake else 2
    dtype = torch.bfloat16 if not at.fake else torch.float32
    q, k, v = (torch.randn(1, heads, n, 128, device=at.where, dtype=dtype) for _ in range(3))
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    found: dict[str, Any] = {}
    for name, kernel in kernels.items():
        try:
            with sdpa_kernel(kernel):
                found[name] = at.rounds(
                    lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), rounds=3, warm=1
                )
        except RuntimeError as error:
            found[name] = {"failed": str(error)[:200]}
    return found
