"""The networks of `benchmarks.cidl`, the modes they run in, and what the equations predict of them."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.write.synthesis import synthesise
from blockstream.engine.ledger import Ledger
from blockstream.engine.spans import Span
from blockstream.module.empty import empty
from blockstream.module.rehearsal import rehearse
from blockstream.module.spec import tensor_spec
from blockstream.plan import latency
from blockstream.plan.planner import Plan
from blockstream.plan.retention import POLICIES, RetentionPolicy
from blockstream.plan.segments import Schedule
from blockstream.report.outcome import predicted_for
from blockstream.report.stages import stage_summaries
from blockstream.streaming.costs import measured_costs
from blockstream.streaming.session import Session
from movd.stdit3 import STDIT3_XL_2, STDiT3, STDiT3Config
from movd.t5 import T5_V1_1_XXL, t5_encoder

MODES = ("sequential", "concurrent", "prefix", "spread", "auto")
PASSES = {"stdit3": 4, "t5": 1}
#: Load over execution, as in the paper's Figures 13 and 14.
RATIO = {"stdit3": 1.0, "t5": 5.0}
#: The part of the blocks that prefix, spread and auto may keep.
KEPT = 0.25
TEXT_TOKENS = 32


@dataclass
class Subject:
    """A network on disk and how it is run: `inputs(n)` for about n tokens, `passes` forwards."""

    name: str
    checkpoint: Checkpoint
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Mapping[str, Any]]
    candidates: Sequence[int]
    passes: int
    tokens: int = 0
    flops: dict[int, float] = field(default_factory=dict)

    @cached_property
    def flops_of_one(self) -> Callable[[int], float]:
        """Return what counts the operations of a pass for so many tokens."""

        def count(tokens: int) -> float:
            if tokens not in self.flops:
                with empty():
                    module = self.build().eval()
                rehearsed = rehearse(module, self.inputs(tokens))
                self.flops[tokens] = 0.0 if rehearsed is None else rehearsed.flops.get("", 0.0)
            return self.flops[tokens]

        return count


@dataclass
class Outcome:
    """One run of one mode: seconds, the equations' terms and the predictions made from its own l and e."""

    subject: str
    mode: str
    pass_s: list[float]
    wall_s: float
    terms: dict[str, Any]
    predicted_s: float
    ledger: Path


# -- subjects ------------------------------------------------------------------------------


def stdit3(folder: Path, small: bool) -> Subject:
    """Return STDiT3 on synthetic weights; tokens are latent patches of one sample, guidance doubles them."""
    config = STDIT3_XL_2
    if small:
        config = STDiT3Config(hidden_size=192, depth=6, num_heads=4, caption_channels=128)

    def inputs(tokens: int) -> dict[str, Any]:
        frames = 5
        side = max(1, round(math.sqrt(tokens / frames)))
        return {
            "x": torch.ones(2, config.in_channels, frames, 2 * side, 2 * side),
            "timestep": torch.full((2,), 500.0),
            "y": torch.ones(2, 1, TEXT_TOKENS, config.caption_channels),
            "fps": torch.tensor([24.0]),
            "height": [16.0 * side],
            "width": [16.0 * side],
        }

    def build() -> nn.Module:
        return STDiT3(config)

    sides = range(1, 25)
    return Subject(
        "stdit3",
        _weights(folder / ("stdit3-small" if small else "stdit3-xl-2"), build),
        build,
        inputs,
        [5 * s * s for s in sides],
        PASSES["stdit3"],
    )


def t5(folder: Path, small: bool) -> Subject:
    """Return the T5 encoder on synthetic weights, in one pass over a text."""
    config = dict(T5_V1_1_XXL)
    if small:
        config |= {
            "vocab_size": 512,
            "d_model": 256,
            "d_kv": 32,
            "d_ff": 640,
            "num_layers": 8,
            "num_heads": 8,
        }

    def inputs(tokens: int) -> dict[str, Any]:
        ids = torch.arange(tokens).remainder(500)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Subject(
        "t5",
        _weights(folder / ("t5-small" if small else "t5-v1_1-xxl"), lambda: t5_encoder(config)),
        lambda: t5_encoder(config),
        inputs,
        [4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256],
        PASSES["t5"],
    )


class Half(nn.Module):
    """Half a block: two matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    """Blocks of two halves, four together: one checkpoint that can be cut at any of these levels."""

    #: Segment size in blocks -> how many levels of the nesting name a segment.
    LEVELS: ClassVar = {0.5: 4, 1.0: 3, 2.0: 2, 4.0: 1}

    def __init__(self, blocks: int, width: int, size: float = 1.0) -> None:
        super().__init__()
        self.size = size
        pair = lambda: nn.Sequential(*(nn.Sequential(Half(width), Half(width)) for _ in range(2)))  # noqa: E731
        self.quads = nn.ModuleList(nn.Sequential(pair(), pair()) for _ in range(blocks // 4))

    def stream_order(self) -> list[str]:
        """Return the modules that are segments at this size."""
        paths = [f"quads.{i}" for i in range(len(self.quads))]
        for _ in range(self.LEVELS[self.size] - 1):
            paths = [f"{path}.{k}" for path in paths for k in range(2)]
        return paths

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for quad in self.quads:
            x = quad(x)
        return x


def chain(folder: Path, small: bool, size: float) -> Subject:
    """Return the chain cut into segments of `size` blocks; a full-size block has STDiT3's bytes."""
    blocks, width = (8, 128) if small else (56, 1152)
    return Subject(
        f"chain-{size:g}",
        _weights(folder / f"chain-{blocks}x{width}", lambda: Chain(blocks, width)),
        lambda: Chain(blocks, width, size),
        lambda tokens: {"x": torch.ones(tokens, width)},
        [2**k for k in range(2, 12)],
        PASSES["stdit3"],
    )


def _weights(folder: Path, build: Callable[[], nn.Module]) -> Checkpoint:
    if not folder.exists():
        with empty():
            spec = tensor_spec(build().eval(), "F32")
        synthesise(spec, folder, shard_nbytes=10 * 10**9, note={"for": "benchmarks"})
    return Checkpoint.open(folder)


# -- runs ----------------------------------------------------------------------------------


def choose_tokens(subject: Subject, ratio: float) -> Outcome:
    """Set the tokens that bring l/e nearest to a ratio, from one pass at the median count, and return it."""
    subject.tokens = subject.candidates[len(subject.candidates) // 2]
    passes, subject.passes = subject.passes, 1
    with tempfile.TemporaryDirectory() as folder:
        first = run(subject, "concurrent", Path(folder) / "ledger.jsonl")
    subject.passes = passes
    speed = subject.flops_of_one(subject.tokens) / (first.terms["b"] * first.terms["e_s"])
    wanted_s = first.terms["l_s"] / ratio * first.terms["b"]

    def distance(tokens: int) -> float:
        return abs(math.log(max(subject.flops_of_one(tokens), 1.0) / speed / wanted_s))

    subject.tokens = min(subject.candidates, key=distance)
    return first


def run(subject: Subject, mode: str, ledger_path: Path) -> Outcome:
    """Run a network in a mode, its passes timed from the ledger."""
    with Ledger(ledger_path) as ledger, _session(subject, mode, ledger) as session:
        module = session.stage(
            subject.name,
            subject.build,
            subject.checkpoint,
            subject.passes,
            "fp32",
            subject.inputs(subject.tokens),
        )
        inputs = subject.inputs(subject.tokens)
        plan = session.plan
        with torch.inference_mode():
            for _ in range(subject.passes):
                module(**inputs)
    return _outcome(subject, mode, plan, ledger, ledger_path)


def _session(subject: Subject, mode: str, ledger: Ledger) -> Session:
    """Return the session of a mode: an arena of two slots, and of what may be kept."""
    policies: Sequence[RetentionPolicy] = POLICIES
    if mode in ("sequential", "concurrent"):
        policies = [p for p in POLICIES if p.name == "none"]
    elif mode != "auto":
        policies = [p for p in POLICIES if p.name == mode]
    keeps = mode not in ("sequential", "concurrent")
    return Session(
        None,
        arena_nbytes(subject, KEPT if keeps else 0.0),
        policies,
        slots=1 if mode == "sequential" else None if mode == "auto" else 2,
        lookahead=1 if mode in ("concurrent", "prefix") else None,
        ledger=ledger,
    )


def arena_nbytes(subject: Subject, kept: float) -> int:
    """Return an arena that holds what is resident, two slots and a part of the blocks."""
    with Session(arena="1TiB") as session:
        session.stage(subject.name, subject.build, subject.checkpoint, 1, "fp32")
        (stage,) = session.draft().schedule.stages
    sizes = [stage.segments[i].nbytes for i in stage.visited if not stage.segments[i].resident]
    resident = stage.nbytes - sum(sizes)
    largest = -(-max(sizes) // 4096) * 4096
    return resident + (2 + round(kept * len(sizes))) * largest + (1 << 20)


def _outcome(subject: Subject, mode: str, plan: Plan, ledger: Ledger, path: Path) -> Outcome:
    (terms,) = stage_summaries(plan, ledger.spans.totals)
    begins, ends = _pass_times(ledger.spans)
    pass_s = [e - b for b, e in zip([begins[0], *ends[:-1]], ends, strict=True)]
    measured = measured_costs(plan.schedule.stages[0], 0, ledger)
    again = Plan(Schedule((measured,)), plan.stages, plan.arena_nbytes, plan.lookahead)
    predicted = predicted_for(again, {subject.name: subject.passes})
    return Outcome(subject.name, mode, pass_s, ends[-1] - begins[0], terms, predicted.wall_s, path)


def _pass_times(spans: Sequence[Span]) -> tuple[list[float], list[float]]:
    """Return when each pass began to wait or compute, and when it ended."""
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}
    for span in spans:
        if span.visit is not None and span.kind in ("execute", "stall"):
            begins.setdefault(span.visit.pass_index, span.start_s)
            ends[span.visit.pass_index] = span.end_s
    return [begins[p] for p in sorted(begins)], [ends[p] for p in sorted(ends)]


def equations_s(outcome: Outcome, sequential: Outcome) -> float:
    """Return the seconds of a pass that Eq. 8 or Eq. 9 predicts from the sequential run's l and e."""
    b, l, e = (sequential.terms[k] for k in ("b", "l_s", "e_s"))
    outside = sequential.wall_s / len(sequential.pass_s) - latency.sequential_s(b, l, e)
    if outcome.mode == "sequential":
        return latency.sequential_s(b, l, e) + outside
    d = 0 if outcome.mode == "concurrent" else min(outcome.terms["d"], b)
    if outcome.mode in ("concurrent", "prefix"):
        return latency.dynamic_s(b, d, l, e) + outside
    return latency.spread_bound_s(b, d, l, e) + outside


def rounds_of(subject: Subject, modes: Sequence[str], rounds: int, folder: Path) -> dict[str, list[Outcome]]:
    """Return the outcomes of each mode; modes take turns, each round beginning with another."""
    found: dict[str, list[Outcome]] = {mode: [] for mode in modes}
    for n in range(rounds):
        for mode in [*modes[n % len(modes) :], *modes[: n % len(modes)]]:
            folder.mkdir(parents=True, exist_ok=True)
            outcome = run(subject, mode, folder / f"{subject.name}-{mode}-{n}.jsonl")
            print(f"{subject.name:9} {mode:10} round {n}: {outcome.wall_s:.2f} s", flush=True)
            found[mode].append(outcome)
    return found


def median_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome of median time."""
    middle = statistics.median_low(o.wall_s for o in outcomes)
    return next(o for o in outcomes if o.wall_s == middle)
