"""What a config may set beside the engine's own keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from blockstream.system import regular

#: The most prompts of one run, and the most bytes of a file of them.
MOST_PROMPTS = 10_000
MOST_PROMPTS_NBYTES = 16_000_000

Dtype = Literal["fp32", "bf16", "fp16"]


def found_path(path: str, info: ValidationInfo) -> Path:
    """Return a path made absolute: from the config's folder, or where nothing is there, the working one."""
    given = Path(path).expanduser()
    base = Path((info.context or {}).get("base") or "")
    return next((p for p in (base / given, given) if p.exists()), base / given).absolute()


def _scheduler(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Scheduler(BaseModel):
    """A scheduler in the place of the folder's: its class, and what differs from the folder's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="a class of diffusers, such as EulerDiscreteScheduler")
    settings: dict[str, Any] = Field({}, description="those that differ from the folder's, by name")


class Lora(BaseModel):
    """Low-rank adapters of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="a safetensors file, or the folder of one")
    scale: float = Field(1.0, description="what they are multiplied by")

    @field_validator("path", mode="before")
    @classmethod
    def _absolute(cls, path: object, info: ValidationInfo) -> object:
        return found_path(path, info) if isinstance(path, str) else path


class Options(BaseModel):
    """Which pipeline, what it is called with, and how what it makes is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = Field(description="a folder with a model_index.json, a DDUF file, or a hub's id")
    variant: str | None = Field(None, description="one of several sets of weights, such as fp16")
    dtype: Dtype | dict[str, Dtype] | None = Field(
        None, description="dtype of all networks, or of each by its name, with `default` for the rest"
    )
    prompt: str | None = Field(None, description="what to make; instead of prompts where both are given")
    prompts: tuple[str, ...] | None = Field(
        None, description="several, or a text file with one a line; each gets a folder 0000, 0001, ..."
    )
    seed: int = Field(42, ge=0, lt=1 << 63, description="of each prompt's generator")
    call: dict[str, Any] = Field(
        {}, description="arguments of the pipeline's call, by their names in diffusers"
    )
    scheduler: Annotated[Scheduler, BeforeValidator(_scheduler)] | None = Field(
        None, description="another scheduler: a class of diffusers, or its `name` and `settings`"
    )
    lora: tuple[Lora, ...] = Field((), description="adapters, unmerged: files or folders with their scales")
    vae_tiling: bool = Field(False, description="decode in tiles, where the pipeline can: less memory")
    fps: int = Field(24, ge=1, le=120, description="frames a second of videos")

    @field_validator("folder")
    @classmethod
    def _found(cls, folder: str, info: ValidationInfo) -> str:
        found = found_path(folder, info)
        return str(found) if found.exists() else folder

    @field_validator("prompts", mode="before")
    @classmethod
    def _read(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        path = found_path(value, info)
        try:
            lines = regular.read_text(path, MOST_PROMPTS_NBYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: {error}; write a list of prompts or the path of a text file"
            ) from error
        return [line.strip() for line in lines if line.strip()]

    @field_validator("prompts")
    @classmethod
    def _some(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not 1 <= len(value) <= MOST_PROMPTS:
            raise ValueError(f"{len(value)} prompts: 1 to {MOST_PROMPTS:,} are taken")
        return value

    @field_validator("call")
    @classmethod
    def _files(cls, call: Mapping[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Leave the paths of files that are there absolute."""

        def absolute(value: Any) -> Any:
            if isinstance(value, list):
                return [absolute(one) for one in value]
            if isinstance(value, str) and Path(value).suffix and len(value) < 4096:
                found = found_path(value, info)
                return str(found) if found.is_file() else value
            return value

        return {name: absolute(value) for name, value in call.items()}

    @property
    def texts(self) -> tuple[str | None, ...]:
        """Return the prompts, one or several; one None where the pipeline is given none."""
        return (self.prompt,) if self.prompt is not None or self.prompts is None else self.prompts
