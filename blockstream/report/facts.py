"""The figures of a run as rows of text: the same in the page, the comparison and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from blockstream.budget.amounts import format_nbytes
from blockstream.report.curve import seconds

from .items import SETUP, beside_stages
from .larger import a_year_text, larger_text
from .passes import pass_rows
from .record import RunRecord

#: Passes listed at most.
PASSES = 600
NONE = "\u2013"


class Fact(NamedTuple):
    """One figure: its value and what it is; `mood` is "good", "bad" or ""."""

    value: str
    what: str
    mood: str = ""


def fact_cards(record: RunRecord) -> list[Fact]:
    """Return what is worth knowing first."""
    report, facts = record.report, []
    stages = stages_of(report)
    measured, predicted = total(stages, "wall_s"), total(stages, "predicted_s")
    facts.append(Fact(seconds(record.wall_s), "in all, setup included"))
    if measured is not None and predicted:
        facts.append(
            Fact(
                off(measured, predicted),
                f"the stages' {seconds(measured)} against {seconds(predicted)} predicted",
            )
        )
    facts += memory_facts(record)
    load, stall = total(stages, "load_s"), total(stages, "stall_s")
    if load and stall is not None:
        hidden = max(0.0, 1 - stall / load)
        facts.append(Fact(f"{hidden:.0%}", f"of {seconds(load)} loading hidden behind compute"))
    disk = report.get("disk") or {}
    if disk.get("read_bytes_per_s"):
        said = f"read: {format_nbytes(disk['read_nbytes'])}"
        if disk.get("disk_bytes_per_s"):
            said += f"; this disk gives {gbps(disk['disk_bytes_per_s'])}"
        if year := disk.get("a_year_nbytes"):
            said += f"; {a_year_text(year)}, which wears no SSD"
        facts.append(Fact(gbps(disk["read_bytes_per_s"]), said))
    if text := energy_text(report):
        value, _, more = text.partition(", ")
        facts.append(Fact(value, more))
    if larger := report.get("larger"):
        facts.append(Fact(f"+{format_nbytes(larger[0]['more_nbytes'], up=True)}", larger_text(larger)))
    sampler = report.get("sampler")
    if isinstance(sampler, Mapping) and sampler.get("of"):
        facts.append(Fact(f"{sampler['passes']} of {sampler['of']}", f"steps computed by {name_of(sampler)}"))
    attention = report.get("attention") or {}
    if attention.get("merged_pass_s") and attention.get("plain_pass_s"):
        gain = attention["plain_pass_s"] / attention["merged_pass_s"]
        facts.append(
            Fact(f"{gain:.2f} x", f"faster passes while merging, {attention['merged_passes']} of them")
        )
    return facts


def memory_facts(record: RunRecord) -> list[Fact]:
    """Return the peak against the budget."""
    budget = record.report.get("budget") or {}
    peak = budget.get("peak_nbytes") or max((s.nbytes for s in record.memory), default=0)
    limit = record.budget_nbytes
    if not peak:
        return []
    if not limit:
        return [Fact(format_nbytes(peak), "held at most")]
    held = budget.get("held", peak <= limit)
    watched = not budget.get("unwatched")
    return [_held_fact(peak, limit, held, "held at most", watched), *_device_facts(record)]


def _held_fact(peak: int, limit: int, held: bool, what: str, watched: bool = True) -> Fact:
    said = "was held" if held else "was EXCEEDED" if watched else "was not watched throughout"
    what = f"{what}; the budget of {format_nbytes(limit)} {said}"
    return Fact(format_nbytes(peak), what, "good" if held else "bad")


def _device_facts(record: RunRecord) -> list[Fact]:
    """Return the peak on a device against its budget, where one computed."""
    budget = (record.report.get("device") or {}).get("budget")
    if not budget:
        return []
    return [_held_fact(budget["peak_nbytes"], budget["nbytes"], budget["held"], "held on the device at most")]


def energy_text(report: Mapping[str, Any]) -> str:
    """Return the energy a run took, in words; nothing where the system does not tell."""
    energy = report.get("energy")
    if not isinstance(energy, Mapping) or not energy.get("joules"):
        return ""
    joules, watts = energy["joules"], energy.get("watts")
    value = f"{joules:.0f} J" if joules < 1e4 else f"{joules / 3.6e6:.4f} kWh"
    mean = "" if watts is None else f"{watts:.0f} W on average, "
    return f"{value}, {mean}the whole machine's: {', '.join(energy.get('by_source') or ())}"


def stages_of(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the stages a report tells of."""
    return [s for s in report.get("stages") or () if isinstance(s, Mapping)]


def stage_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return predicted against measured, stage by stage; the first row is the head."""
    stages = stages_of(report)
    if not stages:
        return []
    head = ["stage", "passes", "retained", "read", "GB/s", "predicted", "measured", "error"]
    head += ["execute", "stalled", "outside", "overlap"]
    rows = [head]
    for s in stages:
        predicted, measured = s.get("predicted_s"), s.get("wall_s")
        error = off(measured, predicted)
        speed = s.get("read_bytes_per_s") or _ratio(s.get("read_nbytes"), s.get("load_s"))
        rows.append(
            [
                str(s.get("name")),
                _passes(s),
                f"{s.get('d')} of {s.get('b')}",
                format_nbytes(int(s.get("read_nbytes") or 0)),
                NONE if speed is None else f"{speed / 1e9:.2f}",
                secs(predicted),
                secs(measured),
                error,
                secs(s.get("execute_s")),
                secs(s.get("stall_s")),
                secs(s.get("outside_s")),
                percent(s.get("overlap")),
            ]
        )
    predicted, measured = (beside_stages(report, key) for key in ("predicted_s", "measured_s"))
    for name, took in measured.items():
        own = predicted.get(name)
        row = [name, *[""] * 4, secs(own), secs(took), off(took, own), *[""] * 4]
        rows.insert(1 if name == SETUP else len(rows), row)
    return rows


def equation_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return b, d, l, e, alpha and r of each stage: as Eq. 8 and 9 have r, and as it was."""
    stages = stages_of(report)
    if not stages:
        return []
    rows = [["stage", "b", "d", "l", "e", "l/e", "alpha", "r, Eq. 8", "r, Eq. 9", "r"]]
    for s in stages:
        ratio = _ratio(s.get("l_s"), s.get("e_s"))
        rows.append(
            [
                str(s.get("name")),
                str(s.get("b")),
                str(s.get("d")),
                secs(s.get("l_s")),
                secs(s.get("e_s")),
                NONE if ratio is None else f"{ratio:.2f}",
                secs(s.get("alpha_s")),
                secs(s.get("r8_s")),
                secs(s.get("r9_s")),
                secs(s.get("r_s")),
            ]
        )
    return rows


def pass_table(record: RunRecord, most: int = PASSES) -> list[list[str]]:
    """Return each pass, at most so many; the first row is the head."""
    rows = pass_rows(record)
    straight = any(r.step is not None for r in rows)
    head = ["stage", "pass", "from", "took", "execute", "stalled", "load", "read"]
    table = [[*head, "step", "to", "cosine"] if straight else head]
    for r in rows[:most]:
        row = [r.stage, str(r.pass_index + 1), secs(r.begin_s), secs(r.wall_s), secs(r.execute_s)]
        row += [secs(r.stall_s), secs(r.load_s), format_nbytes(r.nbytes)]
        if straight:
            step = [NONE if v is None else str(v) for v in (r.step, r.to)]
            row += [*step, NONE if r.cosine is None else f"{r.cosine:.4f}"]
        table.append(row)
    if len(rows) > most:
        table.append([f"and {len(rows) - most} more", *[""] * (len(table[0]) - 1)])
    return table


def comparison_facts(records: Sequence[RunRecord]) -> list[list[str]]:
    """Return runs side by side: one row a figure, one column a run."""
    columns = [dict(_figures(r)) for r in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [
        ["", *(r.name for r in records)],
        *([name, *(column.get(name, NONE) for column in columns)] for name in names),
    ]


def _figures(record: RunRecord) -> list[tuple[str, str]]:
    report = record.report
    stages = stages_of(report)
    found = [("in all", secs(record.wall_s) + ("" if record.finished else ", unfinished"))]
    for s in stages:
        name = str(s.get("name"))
        found.append((f"{name}: measured", secs(s.get("wall_s"))))
        found.append((f"{name}: predicted", secs(s.get("predicted_s"))))
        found.append((f"{name}: stalled", secs(s.get("stall_s"))))
        found.append((f"{name}: retained", f"{s.get('d')} of {s.get('b')}, {s.get('policy')}"))
        found.append((f"{name}: read", format_nbytes(int(s.get("read_nbytes") or 0))))
    if not stages:
        for name in record.stages:
            executed = record.executed.get(name)
            found.append((f"{name}: executed", NONE if executed is None else secs(executed)))
    found += [(fact.what.split(";")[0], fact.value) for fact in memory_facts(record)]
    if record.budget_nbytes:
        found.append(("budget", format_nbytes(record.budget_nbytes)))
    sampler = report.get("sampler")
    if isinstance(sampler, Mapping) and sampler.get("of"):
        found.append(("steps computed", f"{sampler['passes']} of {sampler['of']}, {name_of(sampler)}"))
    return found


def total(stages: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the sum of a number over the stages that have it, None where none has."""
    values = [s[key] for s in stages if isinstance(s.get(key), int | float)]
    return sum(values) if values else None


def name_of(sampler: Mapping[str, Any]) -> str:
    """Return a sampler's name as it was chosen."""
    choice = sampler.get("choice")
    return str(choice.get("name") if isinstance(choice, Mapping) else choice)


def secs(value: Any) -> str:
    """Return seconds for people, a dash for what is not known."""
    if not isinstance(value, int | float):
        return NONE
    if 1e-6 < abs(value) < 0.1:
        return f"{value * 1000:.1f} ms"
    return ("-" if value < 0 else "") + seconds(abs(value))


def off(measured: Any, predicted: Any) -> str:
    """Return how far off a prediction was: "+12%" took longer than predicted."""
    if not isinstance(measured, int | float) or not predicted:
        return NONE
    share = round(100 * (measured / predicted - 1))
    return f"{share:+d}%" if share else "0%"


def percent(part: Any) -> str:
    """Return a share for people."""
    return f"{part:.0%}" if isinstance(part, int | float) else NONE


def gbps(bytes_per_s: float) -> str:
    """Return a speed for people."""
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def _passes(s: Mapping[str, Any]) -> str:
    declared = s.get("declared_passes")
    ran = s.get("passes")
    return f"{ran} of {declared}" if declared not in (None, ran) else str(ran)


def _ratio(a: Any, b: Any) -> float | None:
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return None
    return a / b if b > 0 else None


def device_text(report: Mapping[str, Any]) -> str:
    """Return in a line what a run's device is and what went over its link."""
    device = report["device"]
    copied = sum(s.get("copied_nbytes", 0) for s in stages_of(report))
    copy_s = sum(s.get("copy_s", 0.0) for s in stages_of(report))
    text = f"{device['name']}; {format_nbytes(device['copied_nbytes'])} copied"
    if copy_s > 0:
        text += f" at {gbps(copied / copy_s)}"
    if device.get("pageable"):
        text += f", out of pageable memory ({device['pageable']})"
    others = device.get("others_nbytes")
    return text + ("; memory of other processes is not attributable" if isinstance(others, str) else "")
