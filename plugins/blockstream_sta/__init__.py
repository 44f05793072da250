"""Sliding tile attention: full attention over a video, each query seeing the tiles of keys around its own.

    attention: [sta]                                              # the released table, for HunyuanVideo,
    30x48x80 attention: [{name: sta, windows: [3, 3, 3], tile: [2, 4, 4]}] # one window for all heads
    attention: [{name: sta, table: mine.safetensors}]             # of `blockstream sta search`

Method and rule: Fast Video Generation with Sliding Tile Attention (Zhang et al., 2025). Which window a head
takes at which step is measured once a model and canvas and kept in a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockstream.plugins import Choice, hookimpl

from .options import Options, SearchOptions

if TYPE_CHECKING:
    from .search import WindowSearch
    from .transform import SlidingTiles

__all__ = ["Options", "SearchOptions"]


def _sliding(options: Options | None) -> SlidingTiles:
    from .transform import SlidingTiles

    return SlidingTiles(options or Options())


def _searching(options: SearchOptions) -> WindowSearch:
    from .search import WindowSearch

    return WindowSearch(options)


@hookimpl
def attention_transforms() -> Sequence[Choice]:
    """List the transforms of this plugin."""
    return [
        Choice("sta", _sliding, Options, "attend to the tiles of a video around one's own"),
        Choice(
            "search", _searching, SearchOptions, "find the windows that `sta` loses least by, at full cost"
        ),
    ]
