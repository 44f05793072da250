"""What computes exported packages with torch on any system: a backend, found by entry point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockstream.plugins import Choice, hookimpl


@hookimpl
def backends() -> Sequence[Choice]:
    """List the backend `coreml-interpreter`."""
    from movd_coreml.options import InterpreterOptions

    return [
        Choice(
            "coreml-interpreter",
            _backend,
            InterpreterOptions,
            summary="exported packages, evaluated with torch on any system",
        )
    ]


def _backend(options: Any) -> Any:
    from movd_coreml.backend import PackagesBackend

    return PackagesBackend(Path(options.packages))
