"""What is known of a stage's costs before it runs, and how it carries over to another cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

#: Bytes a second, before anything has been measured: a common NVMe disk.
READ_SPEED = 1.2e9
#: The time of a pass outside all segments: the sampler's, files', first and last layers'.
OUTSIDE = "(outside)"


@dataclass(frozen=True)
class Known:
    """What is known of a stage's costs before it runs; `source` says in words where from.

    `load_s`, `execute_s` in seconds by segment, what earlier runs measured. `call_s`: what one call of a
    module takes, by path, as its operations add up to; None where they are not known. The speed is in bytes a
    second.
    """

    load_s: Mapping[str, float] = field(default_factory=dict)
    execute_s: Mapping[str, float] = field(default_factory=dict)
    call_s: Mapping[str, float] | None = None
    read_speed: float = READ_SPEED
    source: str = "guessed from sizes"

    def of_cut(self, sizes: Mapping[str, int]) -> Known:
        """Return the same of a cut whose segments have these sizes in bytes, whatever cut was measured.

        What was measured of its pieces adds up to a block, what was measured of a block is shared among its
        pieces by their bytes.
        """
        load_s, execute_s = (_recut(seconds, sizes) for seconds in (self.load_s, self.execute_s))
        return replace(self, load_s=load_s, execute_s=execute_s)


def _recut(seconds: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return seconds by segment of another cut than the one they were measured of; {} has none to tell."""
    found = {name: seconds[name] for name in sizes if name in seconds}
    shared: dict[str, list[str]] = defaultdict(list)
    for name in sizes:
        if name in found:
            continue
        if pieces := [s for other, s in seconds.items() if other.startswith(f"{name}.")]:
            found[name] = sum(pieces)
        elif (block := next((x for x in _parents(name) if x in seconds), None)) is not None:
            shared[block].append(name)
    for block, names in shared.items():
        all_of_them = sum(sizes[n] for n in sizes if n.startswith(f"{block}."))
        found |= {n: seconds[block] * sizes[n] / max(1, all_of_them) for n in names}
    return found | {OUTSIDE: seconds[OUTSIDE]} if OUTSIDE in seconds else found


def _parents(path: str) -> list[str]:
    """Return the paths of the modules that hold one, the nearest first."""
    names = path.split(".")
    return [".".join(names[:n]) for n in range(len(names) - 1, 0, -1)]
