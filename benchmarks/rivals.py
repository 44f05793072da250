"""What LPL is measured against at an equal number of passes: fewer steps, plain or to second order."""

from __future__ import annotations

from blockstream.plugins.euler import sample as euler_steps
from examples.third_party_plugin.blockstream_trio.ab2 import sample as ab2

__all__ = ["ab2", "euler_steps"]
