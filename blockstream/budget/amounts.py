"""Amounts of memory as people write them, and the budget that follows from one.

`"3.3GiB"`, `"80%"`, `"auto"` or a number of bytes become a limit on what the process holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from blockstream.errors import ConfigError
from blockstream.system.limits import Headroom, headroom
from blockstream.system.memory import held

#: The part of the headroom that "auto" takes.
AUTO_PERCENT = 80

_UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_AMOUNT = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,19})?) ?([A-Za-z]*|%)")
_FORMS = (
    'a number of bytes, an amount such as "3.3GiB" or "3300 MB" '
    '(B, kB, MB, GB, TB, KiB, MiB, GiB, TiB), a percentage of the headroom such as "80%", or "auto"'
)


def parse_nbytes(value: str | int, headroom_nbytes: int | None = None, held_nbytes: int = 0) -> int:
    """Return the bytes that `value` asks for, exactly, rounded down to a whole byte.

    A percentage is what the process holds plus that part of the headroom; "auto" is 80%. Without
    `headroom_nbytes` both are measured now. Raises ConfigError, naming the accepted
    forms, for anything else, for nothing at all and for what no machine has.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ConfigError(f"{value!r} is no amount of memory: write {_FORMS}")
    if isinstance(value, int):
        return _checked(value, value)
    text = f"{AUTO_PERCENT}%" if value.strip() == "auto" else value.strip()
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{value!r} is no amount of memory: write {_FORMS}")
    number, unit = Fraction(match[1]), match[2]
    if unit == "%":
        if not 0 < number <= 100:
            raise ConfigError(f"{value!r}: a percentage of the headroom is above 0 and at most 100")
        if headroom_nbytes is None:
            headroom_nbytes, held_nbytes = headroom().nbytes, held().nbytes
        return held_nbytes + floor(number * headroom_nbytes / 100)
    if unit not in _UNITS:
        near = [u for u in _UNITS if u and u.lower() in (unit.lower(), f"{unit}b".lower())]
        hint = f"did you mean {match[1]}{near[-1]}? Write" if near else "write"
        raise ConfigError(f"{value!r}: no unit {unit!r}; {hint} {_FORMS}")
    if unit == "" and number.denominator != 1:
        raise ConfigError(f"{value!r} has no unit: write {_FORMS}")
    return _checked(floor(number * _UNITS[unit]), value)


def headroom_part(value: str | int | None) -> float | None:
    """Return the part of the headroom that a budget asks for, 0..1; None for an amount."""
    if isinstance(value, int):
        return None
    text = f"{AUTO_PERCENT}%" if value is None or value.strip() == "auto" else value.strip()
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else None


def _checked(nbytes: int, value: str | int) -> int:
    if not 0 < nbytes < 2**63:
        raise ConfigError(f"{value!r} is {nbytes} bytes: an amount is above 0 and below 8 EiB")
    return nbytes


def format_nbytes(nbytes: int, up: bool = False) -> str:
    """Return an amount for people: "3.3 GiB", "736 MiB", "17 B".

    With `up` the text has two decimals and is never less than `nbytes`: what is named as the least
    that works has to work when it is typed back.
    """
    size, unit = Fraction(abs(nbytes)), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if _rounded(size, unit, up) < 1024:
            break
        size, unit = size / 1024, larger
    decimals = _decimals(size, unit, up)
    return f"{'-' if nbytes < 0 else ''}{float(_rounded(size, unit, up)):.{decimals}f} {unit}"


def _decimals(size: Fraction, unit: str, up: bool) -> int:
    if unit == "B":
        return 0
    if unit in ("GiB", "TiB"):
        return 2 if up else 1
    return 1 if size < 10 else 0


def _rounded(size: Fraction, unit: str, up: bool) -> Fraction:
    scale = 10 ** _decimals(size, unit, up)
    return Fraction(ceil(size * scale) if up else round(size * scale), scale)


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on what the process holds, with what it was derived from.

    `explicit` says that it was asked for as an amount, not as a part of the headroom. `warning` is
    a sentence when the amount is more than the process can have, None otherwise.
    """

    nbytes: int
    explicit: bool
    held_nbytes: int
    headroom: Headroom
    warning: str | None = None


def resolve_budget(value: str | int | None = None, now: Headroom | None = None) -> Budget:
    """Return the budget that `value` means here and now; None is "auto".

    Raises ConfigError for a value that is no amount. An amount above what is held plus the headroom
    is kept and carries a warning: memory may yet be freed, and the run shrinks if it is not.
    """
    now = now or headroom()
    here = held().nbytes
    nbytes = parse_nbytes("auto" if value is None else value, now.nbytes, here)
    explicit = headroom_part(value) is None
    warning = None
    if nbytes > here + now.nbytes:
        warning = (
            f"budget {format_nbytes(nbytes)} is above the {format_nbytes(here + now.nbytes)} this "
            f"process can hold ({format_nbytes(here)} held, {format_nbytes(now.nbytes)} free by "
            f"{now.source}); the run keeps to what is free"
        )
    return Budget(nbytes, explicit, here, now, warning)
