"""How many examples of a property are tried: all in `make test`, a tenth in `make quick`."""

from __future__ import annotations

import os

from hypothesis import settings

SHARE = 10 if os.environ.get("BLOCKSTREAM_QUICK") else 1


def examples(number: int) -> settings:
    """Return the decorator that tries so many, however long each takes."""
    return settings(max_examples=-(-number // SHARE), deadline=None)
