"""What forwards without data have shown, kept by fingerprint: in the process, and in the cache folder."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockstream.plan.operations import Op, Work
from blockstream.system import regular
from blockstream.system.cache import cache_folder, write_cached

from .fingerprint import Fingerprint

#: The beginning (True) and end of each call of a module in a forward, by its first path, in turn.
Calls = Sequence[tuple[str, bool]]

SCHEMA = 2
#: Kept in the process, and files kept in the folder: the oldest go.
MOST_HELD, MOST_FILES = 64, 256
MOST_NBYTES = 64_000_000


@dataclass(frozen=True)
class Rehearsal:
    """What one forward of given inputs does.

    `calls` in turn. `flops`: the operations of one call of each module by path ("" is the forward), the mean
    where it is called several times. `peak_nbytes`: the most bytes of results alive at once, work space of
    kernels included; `small_nbytes`: those of results so small that the heap may keep them. `work`: its
    operations one by one.
    """

    calls: Calls
    flops: Mapping[str, float]
    peak_nbytes: int
    small_nbytes: int
    work: Work = field(default_factory=Work)

    @property
    def activations_nbytes(self) -> int:
        """Return what the forward may take beside weights, with room for what the heap keeps."""
        return self.peak_nbytes + self.small_nbytes


_held: OrderedDict[tuple[str, str], Rehearsal] = OrderedDict()


def find(of: Fingerprint, path: str) -> Rehearsal | None:
    """Return what was kept of a forward of the module at `path`; None if nothing was."""
    key = (of.digest, path)
    if key in _held:
        _held.move_to_end(key)
        return _held[key]
    if of.lasting and (found := _read(_file(of), path)) is not None:
        _hold(key, found)
        return found
    return None


def keep(of: Fingerprint, path: str, shown: Rehearsal) -> None:
    """Keep what a forward showed; a cache folder that refuses is done without."""
    _hold((of.digest, path), shown)
    if of.lasting:
        write_cached(_file(of), {**as_json(shown), "path": path})
        _prune(_file(of).parent)


def held() -> int:
    """Return how many the process holds."""
    return len(_held)


def forget() -> None:
    """Forget what the process holds."""
    _held.clear()


def _hold(key: tuple[str, str], shown: Rehearsal) -> None:
    _held[key] = shown
    while len(_held) > MOST_HELD:
        _held.popitem(last=False)


def _file(of: Fingerprint) -> Path:
    return cache_folder() / "rehearsals" / f"{of.digest}.json"


def as_json(shown: Rehearsal) -> dict[str, Any]:
    """Return a rehearsal as plain values for JSON."""
    names = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in shown.calls))}
    return {
        "schema": SCHEMA,
        "names": list(names),
        "calls": [2 * names[name] + begins for name, begins in shown.calls],
        "flops": dict(shown.flops),
        "peak_nbytes": shown.peak_nbytes,
        "small_nbytes": shown.small_nbytes,
        "ops": [list(op) for op in shown.work.ops],
        "own": {path: [[i, n] for i, n in counts.items()] for path, counts in shown.work.own.items()},
    }


def from_json(found: Any) -> Rehearsal:
    """Return what `as_json` made values of. Raises ValueError, KeyError, TypeError, IndexError for others."""
    if found["schema"] != SCHEMA:
        raise ValueError(f"schema {found['schema']!r}")
    names = [str(name) for name in found["names"]]
    calls = tuple((names[n // 2], bool(n % 2)) for n in map(int, found["calls"]))
    flops = {str(name): float(n) for name, n in found["flops"].items()}
    peak, small = int(found["peak_nbytes"]), int(found["small_nbytes"])
    if min(peak, small, *flops.values(), 0) < 0:
        raise ValueError("less than nothing")
    ops = tuple(Op(str(s), str(k), float(f), float(n), str(d)) for s, k, f, n, d in found["ops"])
    own = {
        str(path): {range(len(ops))[int(i)]: float(n) for i, n in counts}
        for path, counts in found["own"].items()
    }
    return Rehearsal(calls, flops, peak, small, Work(ops, own, times_of(calls)))


def times_of(calls: Calls) -> Mapping[str, int]:
    """Return how often each module is called."""
    return Counter(name for name, begins in calls if begins)


def _read(file: Path, path: str) -> Rehearsal | None:
    try:
        found = regular.read_json(file, MOST_NBYTES)
        return from_json(found) if found["path"] == path else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _prune(folder: Path) -> None:
    with suppress(OSError):
        files = list(folder.glob("*.json"))
        if len(files) > MOST_FILES:
            files.sort(key=lambda f: f.stat().st_mtime_ns)
            for file in files[: len(files) - MOST_FILES]:
                file.unlink(missing_ok=True)
