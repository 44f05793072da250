"""Compare retention policies in simulation: what a pass takes, over what stays in memory.

    python -m benchmarks.policies [--trials 3]

28 equal segments, 30 passes, one compute second each. Writes benchmarks/results/DATE-policies.json, .md
and .png: a table, the period of a steady pass over the memory, and the seconds that planning takes.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from itertools import pairwise
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks._results import path_of, summary, table, write
from benchmarks.lru import lru_ends
from blockstream.plan import latency
from blockstream.plan.planner import Plan, make_plan
from blockstream.plan.retention import NONE, POLICIES, PREFIX, SPREAD, RetentionPolicy
from blockstream.plan.segments import Exactly, Schedule, Segment, Stage
from blockstream.plan.simulate import simulate

COMMAND = "python -m benchmarks.policies"
UNIT = 4096
BLOCKS, PASSES = 28, 30
RATIOS = (0.5, 1.0, 1.3, 2.0, 4.0)
SIZES = (100, 1_000, 10_000)
#: Passes by which every policy runs steadily.
STEADY = 6


def equal(load_s: float, passes: int = PASSES, blocks: int = BLOCKS) -> Stage:
    """Return a stage of equal segments that compute for one second each."""
    segments = tuple(Segment(f"block.{i}", UNIT, load_s, 1.0) for i in range(blocks))
    return Stage("dit", segments, passes=Exactly(passes))


def planned(stage: Stage, units: int, *policies: RetentionPolicy, slots: int | None = None) -> Plan:
    return make_plan(Schedule((stage,)), units * UNIT, policies, slots=slots)


# -- the table -----------------------------------------------------------------------------------


def row(load_s: float, retained: int, slots: int) -> dict[str, Any]:
    """Return the seconds of all passes with `retained` segments and `slots` slots."""
    stage, units = equal(load_s), retained + slots

    def total(policy: RetentionPolicy, slots: int | None = slots) -> float:
        return planned(stage, units, policy, slots=slots).predicted.wall_s

    auto = make_plan(Schedule((stage,)), units * UNIT, POLICIES)
    return {
        "l/e": load_s,
        "retained": retained,
        "slots": slots,
        "eq8": PASSES * latency.concurrent_s(BLOCKS, load_s, 1.0),
        "eq9": PASSES * latency.dynamic_s(BLOCKS, retained, load_s, 1.0),
        "none": total(NONE, None),
        "lru": lru_ends(stage, units, PASSES)[-1],
        "prefix": total(PREFIX),
        "spread": total(SPREAD),
        "auto": auto.predicted.wall_s,
        "auto is": f"{auto.stages[0].policy}, {len(auto.stages[0].retained)} + {auto.stages[0].slots}",
        "bound": latency.bound_s(stage, range(retained)),
    }


# -- the figure ----------------------------------------------------------------------------------


def periods(load_s: float) -> dict[str, list[float]]:
    """Return the seconds of a steady pass by policy, for 0, 1, ... segments retained beside two slots."""

    def steady(units: int, policies: tuple[RetentionPolicy, ...], slots: int | None) -> float:
        events = simulate(planned(equal(load_s, 2 * STEADY), units, *policies, slots=slots))
        first, last = (
            max(e.end_s for e in events if e.kind == "execute" and e.visit.pass_index < n)
            for n in (STEADY, 2 * STEADY)
        )
        return (last - first) / STEADY

    found: dict[str, list[float]] = {n: [] for n in ("eq9", "lru", "prefix", "spread", "auto", "bound")}
    for d in range(BLOCKS - 2):
        ends = lru_ends(equal(load_s), d + 2, 2 * STEADY)
        found["eq9"].append(latency.dynamic_s(BLOCKS, d, load_s, 1.0))
        found["lru"].append((ends[-1] - ends[STEADY - 1]) / STEADY)
        found["prefix"].append(steady(d + 2, (PREFIX,), 2))
        found["spread"].append(steady(d + 2, (SPREAD,), 2))
        found["auto"].append(steady(d + 2, POLICIES, None))
        found["bound"].append(latency.spread_bound_s(BLOCKS, d, load_s, 1.0))
    return found


STYLES: dict[str, dict[str, Any]] = {
    "lru": {"color": "#b0413e", "ls": (0, (1, 1.2)), "lw": 2.2, "label": "LRU cache of the same bytes"},
    "eq9": {"color": "#7f7f7f", "ls": (0, (5, 2)), "lw": 1.4, "label": "Eq. 9 (prefix, one visit ahead)"},
    "prefix": {"color": "#d98b2b", "lw": 1.8, "label": "prefix, simulated"},
    "auto": {"color": "#8fc7a3", "lw": 6.0, "label": "auto: spread, slots chosen"},
    "spread": {"color": "#1f5f9e", "lw": 1.8, "label": "spread, two slots"},
    "bound": {"color": "black", "ls": ":", "lw": 1.3, "label": "bound  max(b e, (b \N{MINUS SIGN} d) l)"},
}


def draw(found: dict[float, dict[str, list[float]]]) -> None:
    """Draw a panel for each ratio of load to compute time."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    panels: list[Axes] = list(axes.flat)
    for ratio, panel in zip(RATIOS, panels, strict=False):
        for name, style in STYLES.items():
            values = [x / BLOCKS for x in found[ratio][name]]
            panel.plot(range(len(values)), values, **{k: v for k, v in style.items() if k != "label"})
        panel.set_title(f"l = {ratio:g} e", loc="left", fontweight="bold")
        top = max(1.35, 1.04 * ratio)
        panel.set_ylim(1 - 0.06 * (top - 1), top)
        if ratio <= 1:
            note = "no load takes longer than compute:\none visit ahead hides them all"
            panel.text(0.5, 0.3, note, transform=panel.transAxes, ha="center", color="#555555")
        panel.set_xlim(0, BLOCKS - 3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e4e4e4", lw=0.7)
        panel.set_xlabel(f"segments retained of {BLOCKS}, beside two slots")
        panel.set_ylabel("a pass, in units of its compute time")
    panels[-1].axis("off")
    handles = [plt.Line2D([], [], **style) for style in STYLES.values()]
    panels[-1].legend(handles=handles, loc="center left", frameon=False, fontsize=11, handlelength=3)
    figure.suptitle(
        "What a steady pass takes, by retention policy and memory", x=0.01, ha="left", fontsize=14
    )
    figure.savefig(path_of("policies", ".png"), dpi=110)
    plt.close(figure)


# -- planning time -------------------------------------------------------------------------------


def unequal(blocks: int, seed: int = 0) -> Stage:
    """Return a stage of segments of different sizes, load times and compute times."""
    draws = random.Random(seed)
    segments = tuple(
        Segment(f"block.{i}", draws.randint(1, 9) * UNIT, draws.uniform(1, 3), draws.uniform(0.5, 1.5))
        for i in range(blocks)
    )
    return Stage("dit", segments, passes=Exactly(PASSES))


def planning(trials: int) -> list[dict[str, Any]]:
    """Return the processor seconds that planning takes, by kind and number of segments."""
    found = []
    for kind in ("equal", "unequal"):
        for blocks in SIZES:
            stage = equal(1.7, blocks=blocks) if kind == "equal" else unequal(blocks)
            seconds = []
            for _ in range(trials + 1):  # the first warms up
                begin = time.process_time()
                make_plan(Schedule((stage,)), stage.nbytes // 2)
                seconds.append(time.process_time() - begin)
            found.append({"segments": blocks, "kind": kind, **summary(seconds[1:])})
    for one, two in pairwise(found):
        if two["segments"] > one["segments"]:
            b, c = one["segments"], two["segments"]
            two["growth"] = two["median"] / one["median"]
            two["b log b"] = c * math.log(c) / (b * math.log(b))
    return found


# -- the page ------------------------------------------------------------------------------------

COLUMNS = [
    "l/e",
    "retained",
    "slots",
    "Eq. 8",
    "Eq. 9",
    "lru",
    "prefix",
    "spread",
    "auto",
    "auto is",
    "bound",
]
KEYS = ["l/e", "retained", "slots", "eq8", "eq9", "lru", "prefix", "spread", "auto", "auto is", "bound"]


def page(rows: list[dict[str, Any]], times: list[dict[str, Any]]) -> str:
    """Return the result as Markdown."""

    def cell(x: Any) -> str:
        return f"{x:.1f}" if isinstance(x, float) else str(x)

    totals = table(COLUMNS, [[cell(r[k]) for k in KEYS] for r in rows])
    plans = table(
        ["segments", "kind", "median s", "every trial", "growth", "of b log b"],
        [
            [
                f"{t['segments']:,}",
                t["kind"],
                f"{t['median']:.2f}",
                " ".join(f"{x:.2f}" for x in t["trials"]),
                f"{t['growth']:.1f}" if "growth" in t else "",
                f"{t['b log b']:.1f}" if "growth" in t else "",
            ]
            for t in times
        ],
    )
    return f"""\
## {PASSES} passes of {BLOCKS} equal segments, seconds (e = 1)

{totals}

Every policy of a row has the same bytes: retained segments and slots. `lru` is a cache of as many
segments, filled ahead of need; scanned cyclically it never hits. `auto` may use those bytes in another
number of slots. Eq. 8 and Eq. 9 look one visit ahead and have no wrap-around to fill; the bound counts
what is retained once.

## A steady pass

![period over retained segments]({path_of("policies", ".png").name})

## Planning, processor seconds ({PASSES} passes, arena half of the weights, all policies and slot counts)

{plans}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=3, help="of each planning time")
    options = parser.parse_args()
    rows = [row(2.0, 14, 2), row(1.3, 7, 2), row(1.3, 6, 3), row(1.0, 7, 2), row(4.0, 20, 2)]
    found = {ratio: periods(ratio) for ratio in RATIOS}
    draw(found)
    times = planning(options.trials)
    data = {"blocks": BLOCKS, "passes": PASSES, "totals_s": rows, "periods_s": found, "planning_s": times}
    write("policies", COMMAND, "Retention policies in simulation", page(rows, times), data)


if __name__ == "__main__":
    main()
