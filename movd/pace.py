"""How long the passes of a sampling take beside one another: merging tokens saves operations in some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blockstream.module.flops import count_flops
from blockstream.plugins.protocols import AttentionLayer, Merge, Run
from movd.attention import attention_hooks, attention_layers
from movd.stdit3 import STDiT3


def pace(denoiser: STDiT3, inputs: Mapping[str, Any], run: Run, steps: int) -> tuple[float, ...]:
    """Return each step's operations as a share of those of a step without merging; () when none merges.

    `inputs` are the example inputs of a step, on any device: nothing is computed.
    """
    T, H, W = denoiser.grid(*inputs["x"].shape[2:])
    shapes = {"T": T, "S": H * W, "text_tokens": inputs["y"].shape[2]}
    layers = [layer for _, layer in attention_layers(denoiser, **shapes)]
    at = run.merges_at(layers, steps)
    if not any(at):
        return ()
    flops: dict[frozenset[str], float] = {}
    for merges in ({}, *at):
        if (names := frozenset(merges)) not in flops:
            flops[names] = _flops(denoiser, inputs, merges, shapes)
    whole = flops[frozenset()]
    return tuple(flops[frozenset(merges)] / whole for merges in at) if whole else ()


def _flops(
    denoiser: STDiT3, inputs: Mapping[str, Any], merges: Mapping[str, Merge], shapes: Mapping[str, int]
) -> float:
    """Return the operations of a step in which the given layers merge; 0 where they cannot be counted."""

    def token_merge(layer: AttentionLayer) -> Merge | None:
        merge = merges.get(layer.name)
        return None if merge is None else replace(merge, active=lambda: True)

    with attention_hooks(denoiser, **shapes, token_merge=token_merge):
        counted = count_flops(denoiser, dict(inputs))
    return 0.0 if counted is None else counted.get("", 0.0)
