"""What users write, as values: numbers of passes, policies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from blockstream.errors import ConfigError
from blockstream.plan.retention import POLICIES, RetentionPolicy
from blockstream.plan.segments import AtMost, Exactly, Passes, Unknown

#: A plan looks at each.
MOST_PASSES = 100_000


def parse_passes(passes: int | Passes | None) -> Passes:
    """Return a number of passes: exact for an int, unknown for None; ConfigError for anything else."""
    if passes is None:
        return Unknown()
    if isinstance(passes, Exactly | AtMost | Unknown):
        return passes
    if type(passes) is not int or not 1 <= passes <= MOST_PASSES:
        raise ConfigError(f"passes {passes!r}: write a whole number from 1 to {MOST_PASSES:,}, or None")
    return Exactly(passes)


def parse_policies(policy: str | RetentionPolicy | Sequence[RetentionPolicy]) -> Sequence[RetentionPolicy]:
    """Return the policies that a name or policies stand for: "auto" compares the built-in ones."""
    if isinstance(policy, RetentionPolicy):
        return (policy,)
    if not isinstance(policy, str):
        given = tuple(policy) if isinstance(policy, Iterable) else ()
        if given and all(isinstance(p, RetentionPolicy) for p in given):
            return given
        raise ConfigError(f"policy {policy!r}: write the name of one, or RetentionPolicy values")
    if policy == "auto":
        return POLICIES
    found = [p for p in POLICIES if p.name == policy]
    if not found:
        raise ConfigError(f"policy {policy!r}: write auto, {', '.join(p.name for p in POLICIES)}")
    return tuple(found)
