"""What the parts found beside what they should: one line a goal, and the page of a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Seconds a pass of others, measured once on an H100: AirCanvas, diffusers' group offload, mmgp.
RIVALS = {"1024": {"AirCanvas": 0.414, "group offload": 1.16, "mmgp": 0.49}, "20480": {"AirCanvas": 0.812}}

Found = dict[str, Any]


def verdicts(found: Found) -> list[str]:
    """Return one line a goal: reached, or not, or why it cannot be said."""
    lines = []
    for name, judge in _GOALS.items():
        try:
            reached, text = judge(found)
            lines.append(f"{'reached' if reached else 'NOT reached'}: {name}: {text}")
        except (KeyError, TypeError, ZeroDivisionError) as error:
            lines.append(f"NOT seen: {name} ({type(error).__name__}: {error})")
    return lines


def bound_s(found: Found, part: str, tokens: str) -> float:
    """Return what a pass cannot beat: compute with all on the device, bytes copied, bytes read from disk."""
    speeds, row = found["link"], found[part][tokens]
    bounds = [found["resident"][tokens]["s"], row["copied_nbytes_a_pass"] / speeds["registered_bytes_per_s"]]
    if part == "disk":
        passed = row["copied_nbytes_a_pass"] - _kept(found[part])
        bounds.append(max(0.0, passed) / speeds["disk_bytes_per_s"])
    return float(max(bounds))


def _kept(part: Found) -> float:
    """Return the bytes that host memory keeps of what a pass copies."""
    host = part["device"]["host"]
    return float(host.get("retained_nbytes", 0))


def _share(part: str, tokens: str, least: float) -> Callable[[Found], tuple[bool, str]]:
    def judge(found: Found) -> tuple[bool, str]:
        s, bound = found[part][tokens]["s"], bound_s(found, part, tokens)
        return bound / s >= least, f"{s:.3f} s, bound {bound:.3f} s: {bound / s:.3f} of at least {least}"

    return judge


def _first(tokens: str) -> Callable[[Found], tuple[bool, str]]:
    def judge(found: Found) -> tuple[bool, str]:
        ours = found["pinned"][tokens]["s"]
        others = dict(RIVALS.get(tokens, {}))
        for part, name in (("offload", "accelerate"), ("groups", "group offload")):
            if tokens in found.get(part, {}):
                others.pop(name, None)
                others[f"{name} (this run)"] = found[part][tokens]["s"]
        text = ", ".join(f"{name} {s:.2f}" for name, s in others.items())
        return all(ours < s for s in others.values()), f"{ours:.3f} s beside {text}"

    return judge


def _bits(found: Found) -> tuple[bool, str]:
    rows = {k: v for k, v in found["bits"].items() if k not in ("took_s", "failed")}
    wrong = [k for k, v in rows.items() if not (isinstance(v, dict) and all(v.values()))]
    dit = [
        f"{part} {n}"
        for part in ("pinned", "half", "disk")
        for n, row in found.get(part, {}).items()
        if isinstance(row, dict) and row.get("same_bits") is False
    ]
    wrong += dit
    return bool(rows) and not wrong, f"{len(rows)} models on 4 kinds of memory; wrong: {wrong or 'none'}"


def _held(found: Found) -> tuple[bool, str]:
    part = found["budget"]
    device, host = part["device"]["budget"], part["budget"]
    held = device["held"] and host["held"] and part["same_bits"] is True
    gb = device["peak_nbytes"] / 1e9
    return held, f"device {gb:.2f} of 8 GB, host {host['peak_nbytes'] / 2**30:.1f} of 16 GiB, same bits"


def _disk_held(found: Found) -> tuple[bool, str]:
    budget = found["disk"]["budget"]
    return budget["held"], f"{budget['peak_nbytes'] / 2**20:.0f} of {budget['nbytes'] / 2**20:.0f} MiB"


def _within(found: Found) -> tuple[bool, str]:
    ratio = found["pinned"][LARGE]["s"] / found["resident"][LARGE]["s"]
    return ratio <= 1.02, f"{ratio:.3f} times resident"


def _settled(found: Found) -> tuple[bool, str]:
    part = found["settled"]
    low, high = part["quartiles"]
    return low <= 1.01 and part["hooks_gone"], f"{part['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _setup(found: Found) -> tuple[bool, str]:
    part = found["setup"]
    whole = part["setup_s"] + part["first_pass_s"]
    reading = part["nbytes"] / found["link"]["disk_bytes_per_s"]
    return (
        whole <= 1.3 * reading,
        f"{whole:.1f} s to the end of the first pass, reading alone {reading:.1f} s",
    )


def _family(part: str, batch: str = "") -> Callable[[Found], tuple[bool, str]]:
    """Judge a whole network: bits, both budgets, and first beside accelerate where that was run."""

    def judge(found: Found) -> tuple[bool, str]:
        row = found[part][batch] if batch else found[part]
        ours, other = row["streamed"]["s"], row.get("accelerate", {}).get("s")
        beside = "accelerate not run" if other is None else f"accelerate {other:.3f} s"
        held = "held" if row["held"] else "BROKEN"
        bits = "same bits" if row["same"] else "OTHER bits"
        text = f"{ours:.3f} s, resident {row['resident']['s']:.3f} s, {beside}; budgets {held}, {bits}"
        return row["held"] and row["same"] and (other is None or ours < other), text

    return judge


def _soak(found: Found) -> tuple[bool, str]:
    part = found["soak"]
    text = (
        f"{part['passes']} of {part['of']} passes, {part['wrong']} wrong, grown {part['grown_nbytes']} bytes"
    )
    good = part["passes"] == part["of"] and not part["wrong"] and part["grown_nbytes"] <= 0
    return good and part["held"], text


def _load(found: Found) -> tuple[bool, str]:
    part = found["load"]
    said = part["said"] or ("same bits" if part["same"] else "OTHER bits")
    return part["same"] and part["taken"] and part["device"]["held"], said


def _opensora(what: str) -> Callable[[Found], tuple[bool, str]]:
    def judge(found: Found) -> tuple[bool, str]:
        row = found["opensora"][what]
        held = row["host"]["held"] and row["device"]["held"]
        stages = ", ".join(f"{name} {s['s']:.1f}" for name, s in row["stages"].items())
        return held, f"{row['s']:.1f} s ({stages}), budgets {'held' if held else 'BROKEN'}"

    return judge


#: The tokens of goals.
SMALL, MIDDLE, LARGE = "1024", "7800", "20480"

_GOALS: dict[str, Callable[[Found], tuple[bool, str]]] = {
    "same bits as resident": _bits,
    "pinned, 1k tokens": _share("pinned", SMALL, 0.97),
    "pinned, 7.8k tokens": _share("pinned", MIDDLE, 0.97),
    "pinned, 20k tokens": _share("pinned", LARGE, 0.97),
    "half retained, 1k tokens": _share("half", SMALL, 0.97),
    "half retained, 7.8k tokens": _share("half", MIDDLE, 0.97),
    "half retained, 20k tokens": _share("half", LARGE, 0.97),
    "from disk, 1k tokens": _share("disk", SMALL, 0.95),
    "within 1.02 of resident at 20k tokens": _within,
    "first beside others at 1k tokens": _first(SMALL),
    "first beside others at 20k tokens": _first(LARGE),
    "everything on the device costs nothing": _settled,
    "set-up": _setup,
    "8 GB of device and 16 GiB of host held": _held,
    "from disk in 3.3 GiB of host held": _disk_held,
    "the same bits while another process takes the device's memory": _load,
    "200 passes": _soak,
    "T5-XXL in 8 GB and 12 GiB": _family("t5"),
    "STDiT3-XL in 8 GB and 12 GiB": _family("stdit"),
    "Open-Sora's VAE in 8 GB and 12 GiB": _family("vae"),
    "Llama 8B, 32 tokens, batch 1": _family("llama", "1"),
    "Llama 8B, 32 tokens, batch 4": _family("llama", "4"),
    "Open-Sora in 8 GB and 8 GiB": _opensora("8 GB and 8 GiB"),
    "Open-Sora in 3.3 GiB of each": _opensora("3.3 GiB of each"),
}


def page(made: dict[str, Any], found: Found) -> str:
    """Return the page of a result."""
    lines = [f"`{made['regenerate']}`", "", f"# On a device, {made['date']}", ""]
    lines += [f"Commit {made['commit']}, {made.get('device')}, {made['versions']}.", "", "## Goals", ""]
    lines += [f"* {line}" for line in verdicts(found)]
    lines += ["", "## A pass of the diffusion transformer of 12.5 GB, seconds", ""]
    ways = ("resident", "pinned", "half", "disk", "offload", "groups")
    tokens = list(dict.fromkeys(n for w in ways for n in found.get(w, {}) if n.isdigit()))
    lines += ["| way | " + " | ".join(tokens) + " |", "|" + "---|" * (len(tokens) + 1)]
    for way in ways:
        rows = [found.get(way, {}).get(n, {}) for n in tokens]
        cells = [f"{r['s']:.4f}" if "s" in r else "" for r in rows]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    failed = {name: part["failed"] for name, part in found.items() if "failed" in part}
    if failed:
        lines += ["", "## Parts that failed", ""]
        lines += [f"* {name}: `{str(why)[-500:]!r}`" for name, why in failed.items()]
    lines += ["", "The numbers of every part are in the JSON file beside this page.", ""]
    return "\n".join(lines)
