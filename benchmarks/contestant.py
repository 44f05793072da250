"""Run one way to compute with more weights than memory, and print what it took as a line of JSON.

    python -m benchmarks.contestant WAY FOLDER [--passes 4 | --seconds 30] [--tokens 128] [--budget 3.3GiB]

Ways: `blockstream`, `blockstream-packed` (from the pack of FOLDER in FOLDER/packed); `accelerate` (as many
blocks in memory as --budget has room for, the rest offloaded to disk), `accelerate-disk` (all blocks
offloaded), `mmap` (safetensors mapped, the page cache decides); `resident` (all weights in memory, which
needs that much). Started by benchmarks.streaming, each in a process and control group of its own with nothing
of FOLDER in the page cache. Forwards are timed, loading apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import t5_xxl
from blockstream.budget.amounts import parse_nbytes
from blockstream.system.limits import cpu_count, page_cache_nbytes
from blockstream.system.memory import MemoryWatch, held

#: What accelerate's share of the budget leaves to torch, a block being loaded and activations.
BESIDE_NBYTES = 1 << 30

Forward = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def blockstream(folder: Path, options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Forward]:
    """Stream the encoder under the budget, from the files users have."""
    with _streamed(folder, folder, options, facts) as forward:
        yield forward


@contextmanager
def blockstream_packed(folder: Path, options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Forward]:
    """Stream the encoder under the budget, from a pack of those files."""
    with _streamed(folder, t5_xxl.packed(folder), options, facts) as forward:
        yield forward


@contextmanager
def _streamed(
    folder: Path, weights: Path, options: argparse.Namespace, facts: dict[str, Any]
) -> Iterator[Forward]:
    import blockstream as b

    passes = None if options.seconds else options.passes
    with b.open(options.budget, options.arena, options.policy) as s:
        ids = t5_xxl.tokens(options.tokens)
        module = s.stage("t5", lambda: t5_xxl.build(folder), weights, passes=passes, example_inputs=(ids,))
        beside: list[int] = []
        predicted = s.draft().predicted.wall_s
        s.start()

        def forward(ids: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = module(ids).last_hidden_state
            beside.append(held().nbytes - s.touched_nbytes())
            return output

        yield forward
        report = s.report()
        loads: dict[int, int] = defaultdict(int)
        for span in s.ledger.spans:
            if span.kind == "load" and span.visit is not None:
                loads[span.visit.pass_index] += span.nbytes
        s.remember()
        planned = s.plan.stages[0]
        plans = [
            (n.at_s, n.value["arena_nbytes"], n.value["stages"][0])
            for n in s.ledger.notes
            if n.kind == "plan"
        ]
        facts.update(
            read_nbytes=[loads[p] for p in range(report["stages"][0]["passes"])],
            beside_nbytes=beside,
            budget=report["budget"],
            stage=report["stages"][0],
            plans=[[at, arena, p["policy"], p["slots"], p["retained"]] for at, arena, p in plans],
            predicted_s=predicted,
            policy=planned.policy,
            slots=planned.slots,
            retained=len(planned.retained),
            read=report["read"],
        )


@contextmanager
def accelerate(folder: Path, options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Forward]:
    """Offload what the budget has no room for."""
    room = max(0, parse_nbytes(options.budget) - BESIDE_NBYTES)
    with _offloaded(folder, room) as forward:
        yield forward


@contextmanager
def accelerate_disk(folder: Path, options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Forward]:
    """Offload every block."""
    with _offloaded(folder, 0) as forward:
        yield forward


@contextmanager
def _offloaded(folder: Path, room: int) -> Iterator[Forward]:
    from transformers import T5EncoderModel

    blocks = json.loads((folder / "config.json").read_text())["num_layers"]
    fitting = room // t5_xxl.block_nbytes(folder)
    where: dict[str, str] = {
        "shared": "cpu",
        "encoder.embed_tokens": "cpu",
        "encoder.final_layer_norm": "cpu",
    }
    where |= {f"encoder.block.{i}": "cpu" if i < fitting else "disk" for i in range(blocks)}
    with tempfile.TemporaryDirectory() as offload:
        module = T5EncoderModel.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=where, offload_folder=offload, local_files_only=True
        )
        yield lambda ids: module.eval()(ids).last_hidden_state


@contextmanager
def mmap(folder: Path, options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Forward]:
    """Compute straight from mapped files."""
    yield _loaded(folder, copy=False)


@contextmanager
def resident(folder: Path, options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Forward]:
    """Hold all weights."""
    yield _loaded(folder, copy=True)


def _loaded(folder: Path, copy: bool) -> Forward:
    from safetensors.torch import load_file

    from blockstream.module.empty import empty

    with empty():
        module = t5_xxl.build(folder)
    weights = {k: v for path in t5_xxl.files(folder) for k, v in load_file(path).items()}
    if copy:
        weights = {k: v.clone() for k, v in weights.items()}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    module.load_state_dict(weights, assign=True)
    return lambda ids: module(ids).last_hidden_state


WAYS = {
    "blockstream": blockstream,
    "blockstream-packed": blockstream_packed,
    "accelerate": accelerate,
    "accelerate-disk": accelerate_disk,
    "mmap": mmap,
    "resident": resident,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0, help="go on for so long, however many passes")
    parser.add_argument("--tokens", type=int, default=t5_xxl.TOKENS)
    parser.add_argument("--budget", default=None)
    parser.add_argument("--arena", default=None)
    parser.add_argument("--policy", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(cpu_count().threads)
    import transformers.models.t5.modeling_t5  # noqa: F401, what all ways import is no part of any

    facts: dict[str, Any] = {}
    ids = t5_xxl.tokens(options.tokens)
    watch = MemoryWatch()
    begin = time.perf_counter()
    with torch.inference_mode(), watch, WAYS[options.way](options.folder, options, facts) as forward:
        load_s = time.perf_counter() - begin
        passes_s, digests = [], set()
        while len(passes_s) < options.passes or sum(passes_s) < options.seconds:
            start = time.perf_counter()
            output = forward(ids)
            passes_s.append(time.perf_counter() - start)
            digests.add(digest(output))
    assert len(digests) == 1, "every pass gives the same bits"
    facts |= {
        "way": options.way,
        "load_s": load_s,
        "passes_s": passes_s,
        "digest": digests.pop(),
        "peak_nbytes": watch.peak_nbytes,
        "held_nbytes": held().nbytes,
        "page_cache_nbytes": page_cache_nbytes(),
    }
    print(json.dumps(facts))


def digest(output: torch.Tensor) -> str:
    """Return a hash of a tensor's bits."""
    return hashlib.sha256(output.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    main()
