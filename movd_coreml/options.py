"""The options of the backends that compute exported packages. Nothing heavy is imported for them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class InterpreterOptions(BaseModel):
    """Where the packages are that `blockstream export coreml` wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    packages: str = Field(description="the folder of an export")

    @field_validator("packages")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        given = Path(path).expanduser()
        base = Path((info.context or {}).get("base") or "")
        return str(next((p for p in (base / given, given) if p.exists()), base / given).absolute())


class CoreMLOptions(InterpreterOptions):
    """The same, and what Core ML may compute on."""

    compute_units: Literal["all", "cpu", "cpu-and-gpu", "cpu-and-ne"] = Field(
        "cpu-and-gpu", description="what Core ML may compute on"
    )
    check: bool = Field(
        True, description="compare each package's first prediction on this machine with the interpreter"
    )
