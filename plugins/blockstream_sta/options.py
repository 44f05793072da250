"""What a config may set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .tiles import Window

#: The tile of the released models, 384 tokens.
TILE: Window = (6, 8, 8)
#: The share of the steps that stay dense unless told otherwise: 15 of the released table's 50.
DENSE = 0.3


def _steps(value: Any) -> Any:
    """Check a number of steps, or a share of them: 15 or 0.3."""
    if type(value) is float and 0 <= value <= 1:
        return value
    if type(value) is int and value >= 0:
        return value
    raise ValueError(f"{value!r}: write a number of steps (15), or a share of them (0.3)")


def _window(value: Any) -> Any:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or any(type(n) is not int or n < 1 for n in value)
    ):
        raise ValueError(f"{value!r}: write tiles along time, height and width, each at least 1: [3, 3, 3]")
    return tuple(value)


def _windows(value: Any) -> Any:
    """Let one window stand for a list of one."""
    return [value] if isinstance(value, list | tuple) and value and type(value[0]) is int else value


Steps = Annotated[int | float, BeforeValidator(_steps)]
Tiles = Annotated[Window, BeforeValidator(_window)]
Windows = Annotated[tuple[Tiles, ...], BeforeValidator(_windows)]


class Options(BaseModel):
    """Which windows, on which tiles, by which kernel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: Windows | None = Field(
        default=None,
        min_length=1,
        description="one window for all heads, or one for each: [3, 3, 3], in tiles",
    )
    table: str | None = Field(
        default=None,
        description="a file of windows by step, layer and head, as `blockstream sta search` writes it; "
        "without one, and without windows, the released table of HunyuanVideo at 30x48x80",
    )
    tile: Tiles = Field(
        default=TILE, description="tokens of a tile along time, height and width; a table has its own"
    )
    dense_steps: Steps = Field(
        default=DENSE, description="with windows: first steps that see everything, 15 or a share: 0.3"
    )
    kernel: Literal["auto", "gathered", "flex"] = Field(
        default="auto",
        description="gathered copies each window's keys and runs anywhere; flex is compiled by torch; auto "
        "takes flex on a CUDA device",
    )

    @field_validator("table")
    @classmethod
    def _absolute(cls, path: str | None, info: ValidationInfo) -> str | None:
        return None if path is None else found(path, info)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.table is not None and self.windows is not None:
            raise ValueError("write windows or a table, not both")
        if self.windows is None and not {"tile", "dense_steps"}.isdisjoint(self.model_fields_set):
            # A config that was written out names every option, with what a table leaves unused at its
            # default.
            for name in ("tile", "dense_steps"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} goes with windows; a table has its own")
        return self


class SearchOptions(BaseModel):
    """What is tried, and where the table goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str = Field(description="the file to write")
    windows: Windows = Field(
        min_length=1, description="candidates, of about one density: the largest always loses least"
    )
    tile: Tiles = Field(default=TILE, description="tokens of a tile along time, height and width")
    dense_steps: Steps = Field(
        default=DENSE, description="first steps that see everything, 15 or a share: 0.3"
    )

    @field_validator("table")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        return str((Path((info.context or {}).get("base") or "") / Path(path).expanduser()).absolute())


def found(path: str, info: ValidationInfo) -> str:
    """Return a path made absolute: from the config's folder, else from the working one."""
    given = Path(path).expanduser()
    base = Path((info.context or {}).get("base") or "")
    return str(next((p for p in (base / given, given) if p.exists()), base / given).absolute())
