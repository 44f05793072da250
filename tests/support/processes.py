"""The processes that this one has started."""

from __future__ import annotations

import psutil


def children() -> set[int]:
    """Return the ids of the children of this process that have not ended."""
    return {p.pid for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE}
