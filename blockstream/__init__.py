"""Run transformers that do not fit in memory, within a byte budget that is verified while running.

`stream` runs one module with its weights on disk, `open` several as stages of one schedule. What
needs torch is imported on first use: `import blockstream` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from blockstream.plan.segments import AtMost, Exactly, Unknown

if TYPE_CHECKING:
    from blockstream.module.empty import empty
    from blockstream.streaming.pipeline import pipeline
    from blockstream.streaming.session import Session, session
    from blockstream.streaming.stream import from_pretrained, open, stream

__all__ = [
    "AtMost",
    "Exactly",
    "Session",
    "Unknown",
    "empty",
    "from_pretrained",
    "open",
    "pipeline",
    "session",
    "stream",
]

_LAZY = {
    "Session": "streaming.session",
    "empty": "module.empty",
    "from_pretrained": "streaming.stream",
    "open": "streaming.stream",
    "pipeline": "streaming.pipeline",
    "session": "streaming.session",
    "stream": "streaming.stream",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, those not imported yet too."""
    return sorted({*globals(), *__all__})
