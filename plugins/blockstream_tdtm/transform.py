"""The attention transform: which layers merge, at which steps, by which arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from blockstream.plugins import AttentionKind, AttentionLayer, Merge, current_run, hookimpl

from . import merging

KINDS: tuple[AttentionKind, ...] = get_args(AttentionKind)


def _steps(value: Any) -> Any:
    """Check a number of steps, or a share of them: 15, 0.5 or "50%"."""
    share = value
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip()[:-1]) / 100
        except ValueError:
            share = None
    if type(share) is float and 0 <= share <= 1:
        return share
    if type(value) is int and value >= 0:
        return value
    raise ValueError(f'{value!r}: write a number of steps (15), or a share of them (0.5 or "50%")')


Steps = Annotated[
    int | float,
    BeforeValidator(_steps),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": "^[0-9.]+%$"},
            ]
        }
    ),
]


class Options(BaseModel):
    """What a config may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    merge_steps: Steps = Field(
        default=0.25, description='steps that merge, from the first: 15, or a share: 0.5 or "50%"; 0 is off'
    )
    factor: int = Field(default=2, ge=2, description="frames that become one")
    kinds: tuple[AttentionKind, ...] = Field(default=KINDS, description="the kinds of attention that merge")
    positions: Literal["mean", "reference"] = Field(
        default="mean",
        description="where merged frames stand in time: at the mean of their frames, or numbered 0, 1, 2, "
        "... as in the authors' code",
    )
    last_frame: Literal["kept", "reference"] = Field(
        default="kept",
        description="a last frame without a partner passes unmerged, or is dropped and replaced by a copy of "
        "the last mean as in the authors' code",
    )
    min_tokens: int = Field(
        default=0,
        ge=0,
        description="leave layers alone that have fewer tokens, frames times places: merging costs too",
    )


class TemporalMerging:
    """Merge along time in the layers that qualify by kind and shape, while the step is early enough.

    Whether a layer merges follows from the options and its shape alone; the step is read from the run when
    the layer computes. A model that states no step merges only if all steps do.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()

    @hookimpl
    def token_merge(self, layer: AttentionLayer) -> Merge | None:
        """Return the merge of one layer, None where it stays as it is."""
        o = self.options
        if o.merge_steps == 0 or layer.kind not in o.kinds:
            return None
        frames, tokens = layer.T, layer.T * layer.S
        if frames < o.factor or tokens < o.min_tokens:
            return None
        import torch

        if o.last_frame == "kept":
            merge, unmerge = merging.merge, merging.unmerge
            places = merging.positions(frames, o.factor)
        else:
            merge, unmerge = merging.merge_reference, merging.unmerge_reference
            places = merging.positions(frames // o.factor * o.factor, o.factor)
        if o.positions == "reference":
            places = [float(i) for i in range(len(places))]
        return Merge(
            merge=partial(merge, factor=o.factor),
            unmerge=partial(unmerge, T=frames, factor=o.factor),
            positions=torch.tensor(places),
            active=self.merges_now,
        )

    def merges_now(self) -> bool:
        """Return whether the step of the run in progress is one that merges."""
        limit = self.options.merge_steps
        run = current_run()
        if isinstance(limit, float):
            if limit == 1:
                return True
            if run.steps is None:
                return False
            limit = round(limit * run.steps)
        return run.step is not None and run.step < limit
