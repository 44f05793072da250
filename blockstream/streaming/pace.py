"""How long the passes of a sampling take beside one another: attention transforms save operations in some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from blockstream.module.attention import HasSeam, attention_hooks, merged_layer
from blockstream.module.rehearsal import rehearse
from blockstream.plugins.protocols import Run
from blockstream.plugins.transforms import AttentionLayer, Merge

#: The layers of a module with what holds each one's seam.
Pairs = Sequence[tuple[HasSeam, AttentionLayer]]


def pace(
    module: nn.Module,
    inputs: Mapping[str, Any],
    run: Run,
    steps: int,
    layers: Callable[[nn.Module], Pairs],
) -> tuple[float, ...]:
    """Return each step's operations as a share of those of a step without transforms; () when none saves any.

    `inputs` are the example inputs of a step, on any device: nothing is computed. `layers(module)` returns
    the pairs that `attention_hooks` takes. It is for `Session.stage(pace=...)`.
    """
    pairs = layers(module)
    known = [layer for _, layer in pairs]
    merging, densities = run.merges_at(known, steps), run.densities_at(known, steps)
    if not any(merging) and not any(densities):
        return ()
    flops: dict[frozenset[str], float] = {}
    for merges in ({}, *merging):
        if (names := frozenset(merges)) not in flops:
            flops[names] = _flops(module, inputs, _merging(pairs, merges))
    if not (whole := flops[frozenset()]):
        return ()
    batch = next((len(x) for x in inputs.values() if isinstance(x, Tensor) and x.dim() > 1), 1)
    saved = [
        _saved(known, m, d, run, steps, i) for i, (m, d) in enumerate(zip(merging, densities, strict=True))
    ]
    return tuple((flops[frozenset(m)] - batch * s) / whole for m, s in zip(merging, saved, strict=True))


def _saved(
    layers: Sequence[AttentionLayer],
    merges: Mapping[str, Merge],
    densities: Mapping[str, float],
    run: Run,
    steps: int,
    step: int,
) -> float:
    """Return the operations that kernels leave out at one step, of one sample."""
    shorter = [merged_layer(x, merges[x.name]) for x in layers if x.name in merges]
    shares = [
        *((x, densities.get(x.name, 1.0)) for x in layers if x.name not in merges),
        *((x, run.densities_at([x], steps)[step].get(x.name, 1.0)) for x in shorter),
    ]
    return sum(4.0 * x.pairs * x.width * (1 - share) for x, share in shares)


def _merging(pairs: Pairs, merges: Mapping[str, Merge]) -> AbstractContextManager[list[AttentionLayer]]:
    """Return the hooks of a step in which the given layers merge."""

    def token_merge(layer: AttentionLayer) -> Merge | None:
        merge = merges.get(layer.name)
        return None if merge is None else replace(merge, active=lambda: True)

    return attention_hooks(pairs, token_merge=token_merge)


def _flops(
    module: nn.Module, inputs: Mapping[str, Any], hooks: AbstractContextManager[list[AttentionLayer]]
) -> float:
    """Return the operations of a step under some hooks; 0 where they cannot be counted."""
    with hooks:
        rehearsed = rehearse(module, dict(inputs))
    return 0.0 if rehearsed is None else rehearsed.flops.get("", 0.0)
