"""Temporal Dimension Token Merging: attention on the means of neighbouring frames, in the early steps.

    attention: [tdtm]
    attention: [{name: tdtm, merge_steps: 15, kinds: [temporal]}]

In the attention layers, never in the MLP, each two consecutive frames' tokens become their mean, and each
result serves both frames again. Merging follows the norm and the modulation, unmerging precedes the
gate: that is where a model's `token_merge` seam lies. Temporal attention computes a quarter of its scores,
spatial and cross attention half. Method: Mobile-Oriented Video Diffusion, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockstream.plugins import Choice, hookimpl

from .merging import merge, merge_reference, positions, unmerge, unmerge_reference
from .transform import Options, TemporalMerging

__all__ = [
    "Options",
    "TemporalMerging",
    "merge",
    "merge_reference",
    "positions",
    "unmerge",
    "unmerge_reference",
]


@hookimpl
def attention_transforms() -> Sequence[Choice]:
    """List the transform of this plugin."""
    return [Choice("tdtm", TemporalMerging, Options, "attend to the means of neighbouring frames early on")]
