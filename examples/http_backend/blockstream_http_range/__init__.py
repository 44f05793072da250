"""A backend that reads weights from a web server: headers, buffers, tables and segments, by ranges.

    backend: {name: http-range, url: "https://host/models/", root: models}

Every checkpoint that a config names in the folder `root` is read from `url` instead; the folder need not be
there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from blockstream.plugins import Choice, hookimpl


class Options(BaseModel):
    """What a config may set. None of it changes a bit of the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(
        pattern=r"^https?://[^/?#]+/([^?#]*/)?$", description="where the files are, with a / at its end"
    )
    root: Path = Field(description="the folder whose files are read from there")
    retries: int = Field(4, ge=0, le=100, description="how often a request is made again")
    backoff_s: float = Field(0.2, ge=0, description="wait before the second of them; it doubles")
    timeout_s: float = Field(30, gt=0, description="how long nothing may arrive")
    connections: int = Field(8, ge=1, le=64, description="connections at once")
    digests: Literal["when-sent", "required"] = Field(
        "when-sent", description="whether the server has to send the SHA-256 of what it sends"
    )

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: Path, info: ValidationInfo) -> Path:
        return (Path((info.context or {}).get("base") or "") / root.expanduser()).absolute()


def _backend(options):
    from .reading import HttpRange

    return HttpRange(options)


@hookimpl
def backends():
    """List the backend. What is heavy is imported when it is built."""
    return [Choice("http-range", _backend, Options, "weights from a web server, by ranges of their files")]
