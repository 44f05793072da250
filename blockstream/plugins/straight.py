"""Whether a leap along the velocity is meaningful, told from a diffusers scheduler's config alone.

A leap goes on along the present velocity, so the path from noise to data has to be a straight line in the
model's own parametrisation. Nothing measured on the way can tell: on the circle that a v-prediction model of
a beta schedule walks, consecutive velocities have cosines of 0.9998, and a leap along one misses the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blockstream.errors import ConfigError

#: flow: straight. flow-solver: straight, by a solver of several steps' memory. renoised, diffusion: not.
Case = Literal["flow", "flow-solver", "renoised", "diffusion"]


@dataclass(frozen=True)
class Verdict:
    """Whether a scheduler's paths are straight, which case it is, and why, in words."""

    straight: bool
    case: Case
    why: str


def straight(config: Mapping[str, Any]) -> Verdict:
    """Return the verdict on a scheduler_config.json, or on the model_index.json of a pipeline known to bend.

    Raises ConfigError for a mapping that names no scheduler, and for a model_index.json that does not tell.
    """
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ConfigError("this is no scheduler's config: it has no _class_name")
    if isinstance(entry := config.get("scheduler"), Sequence) and not isinstance(entry, str):
        scheduler = entry[-1] if entry else None
        if isinstance(scheduler, str) and (name.startswith("CogVideoX") or scheduler.startswith("CogVideoX")):
            return _bent(f"{name} samples by {scheduler}, the solver of a beta schedule")
        raise ConfigError(
            f"a model_index.json ({name}) does not tell whether its paths are straight: read "
            "scheduler/scheduler_config.json beside it"
        )
    if name.startswith("FlowMatch"):
        if config.get("stochastic_sampling"):
            return Verdict(
                False, "renoised", f"{name} with stochastic_sampling: every step renoises, there is no path"
            )
        passes = ", two passes a step" if "Heun" in name else ""
        return Verdict(True, "flow", f"{name}: a rectified flow{passes}")
    predicts = config.get("prediction_type")
    if predicts == "flow_prediction" and config.get("use_flow_sigmas"):
        return Verdict(
            True,
            "flow-solver",
            f"{name} with flow_prediction and use_flow_sigmas: a rectified flow, whose class remembers "
            "several steps; a leap takes plain Euler steps instead of it",
        )
    said = f"predicts {predicts}" if predicts else "does not predict a flow"
    sigmas = " without use_flow_sigmas" if predicts == "flow_prediction" else " on a beta schedule"
    return _bent(f"{name} {said}{sigmas}")


def _bent(why: str) -> Verdict:
    return Verdict(False, "diffusion", f"{why}: paths bend all the way")
