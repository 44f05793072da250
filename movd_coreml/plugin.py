"""What computes exported packages by Core ML on macOS: a backend, found by entry point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockstream.plugins import Choice, hookimpl


@hookimpl
def backends() -> Sequence[Choice]:
    """List the backend `coreml`."""
    from movd_coreml.options import CoreMLOptions

    return [Choice("coreml", _backend, CoreMLOptions, summary="exported packages, by Core ML on macOS")]


def _backend(options: Any) -> Any:
    from movd_coreml.macos import CoreMLBackend

    return CoreMLBackend(options)
