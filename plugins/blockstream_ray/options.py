"""The options of `--on ray`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RayOptions(BaseModel):
    """Which cluster, how stubborn, how large its devices are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(
        None,
        description="the cluster: auto, HOST:PORT; else RAY_ADDRESS, else a cluster of this machine alone",
    )
    retries: int = Field(
        20, ge=0, le=1_000_000, description="how often a run goes on whose node died, before it is given up"
    )
    elastic: bool = Field(
        False, description="nodes may yet come: wait for one with room for a run instead of refusing"
    )
    device_memory: int = Field(
        0, ge=0, description="bytes of memory that each GPU of the cluster has; a run takes its share of one"
    )
