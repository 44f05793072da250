"""`blockstream doctor`: measure this machine and say what limits a run here."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from blockstream.budget.amounts import format_nbytes
from blockstream.system.machine import cpu_name

from .common import add_json, print_json, wrapped
from .extras import DISTRIBUTION, missing_extras
from .hints import hints


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        default=".",
        help="a folder, or a large file, on the disk to measure (default: here)",
    )
    parser.add_argument("--no-disk", action="store_true", help="leave the disk alone")
    parser.add_argument(
        "--fix-hints", action="store_true", help="print only what to do about what was found, a line each"
    )
    add_json(parser, "the facts")


def run(args: argparse.Namespace) -> int:
    """Print the facts about this machine."""
    from blockstream.system.machine import doctor_facts

    if not (args.json or args.no_disk or args.fix_hints):
        print("reading the disk with nothing cached, about three seconds ...", file=sys.stderr)
    facts = {
        "schema": 1,
        **doctor_facts(args.path, measure=not args.no_disk),
        "devices": devices(),
        "missing": missing_extras(),
    }
    facts["gpu"] = None if args.fix_hints else gpu(facts["devices"])
    if args.json:
        print_json({**facts, "hints": list(hints(facts))} if args.fix_hints else facts)
    elif args.fix_hints:
        print("\n".join(hints(facts)) or "nothing to mend was found")
    else:
        for title, text in lines_of(facts):
            print(wrapped(f"{title:<10} {text}".rstrip(), indent=11))
    return 0


def devices() -> list[dict[str, str]]:
    """Return the devices of this machine, without importing torch: kind, name, and what it lacks."""
    found = [{"kind": "cpu", "name": cpu_name()}]
    if sys.platform == "darwin":
        return [*found, {"kind": "mps", "name": "Apple GPU"}] if cpu_name() == "arm" else found
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return found
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [*found, {"kind": "cuda", "name": f"nvidia-smi failed: {error}"}]
    return found + [{"kind": "cuda", "name": line.strip()} for line in listed.stdout.splitlines()]


def gpu(listed: list[dict[str, str]]) -> dict[str, Any] | None:
    """Return what the first CUDA device and its link give; None without one.

    `failed` says why one cannot be used. torch is imported, and a context made, only where one is listed.
    """
    if not any(device["kind"] == "cuda" for device in listed):
        return None
    try:
        from blockstream.device.choose import choose_device
        from blockstream.device.measure import device_facts

        device = choose_device("cuda")
        assert device is not None
        return device_facts(device)
    except Exception as error:  # whatever is wrong with a driver is a fact about this machine
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def lines_of(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (title, text) of each line for people; what continues a line has no title."""
    system, memory, cpu, disk = (facts[key] for key in ("system", "memory", "cpu", "disk"))
    yield "system", f"{system['platform']}, Python {system['python']}"
    yield "memory", f"{format_nbytes(memory['nbytes'])} free under {memory['source']}"
    for limit in memory["limits"]:
        used = f"{format_nbytes(limit['used_nbytes'])} used"
        yield "", f"{limit['source']}: {used} of {format_nbytes(limit['limit_nbytes'])}"
    yield "", f"this process holds {format_nbytes(facts['held']['nbytes'])}"
    yield "processors", f"{cpu['threads']} to compute with: {cpu['source']}"
    for device in facts["devices"]:
        yield "device", f"{device['kind']}: {device['name']}"
    yield from _gpu_lines(facts.get("gpu"))
    yield from _disk_lines(disk)
    installed = {name: version for name, version in facts["versions"].items() if version}
    yield "versions", ", ".join(f"{name} {version}" for name, version in installed.items())
    for extra, names in facts["missing"].items():
        yield "missing", f"{', '.join(names)}: pip install '{DISTRIBUTION}[{extra}]'"


def _gpu_lines(found: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yield what was measured of a GPU, or that there is none to compute with."""
    if found is None:
        yield "", "no GPU to compute with: device is cpu"
        return
    if "failed" in found:
        yield "", f"it cannot be used: {found['failed']}"
        return
    memory, budget, link = found["memory"], found["budget"], found["link"]
    others = memory["others_nbytes"]
    by_others = "not attributable" if others is None else format_nbytes(others)
    yield (
        "",
        (
            f"{format_nbytes(memory['free_nbytes'])} of {format_nbytes(memory['total_nbytes'])} free; "
            f"{format_nbytes(memory['outside_nbytes'])} taken outside torch's allocator, "
            f"by others {by_others}"
        ),
    )
    yield "", f"device_budget auto is {format_nbytes(budget['nbytes'])}"
    fast = link["registered_bytes_per_s"]
    registered = f"{fast / 1e9:.1f} GB/s" if fast else f"refused ({link['refused']})"
    yield "", f"link: registered memory {registered}, pageable {link['pageable_bytes_per_s'] / 1e9:.1f} GB/s"


def _disk_lines(disk: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if disk is None:
        return
    where = disk["file_system"]
    yield "disk", f"{disk['path']}: {where['fstype']} on {where['source']}, read cold"
    for mode in ("direct", "buffered"):
        best = disk[mode]
        if best is not None:
            size = format_nbytes(best["request_nbytes"])
            speed = f"{best['bytes_per_s'] / 1e9:.2f} GB/s"
            yield "", f"{mode:<8} {speed}, {best['depth']} reader threads, requests of {size}"
    if disk["direct_refused"]:
        yield "", f"no direct reads: {disk['direct_refused']}"
    for note in disk["notes"]:
        yield "", note
