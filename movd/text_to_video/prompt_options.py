"""The keys of a config that every text-to-video model has: prompts, seed, what is kept, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from blockstream.budget.amounts import parse_nbytes
from blockstream.errors import ConfigError
from blockstream.system import regular

#: The most prompts one run takes.
MOST_PROMPTS = 10_000
#: The most characters a prompt may have: text encoders read some hundred tokens of it.
MOST_PROMPT = 10_000
#: A file of prompts: as many as a run takes, of more than a text encoder reads.
MOST_PROMPTS_NBYTES = 16_000_000


def found_path(path: str, info: ValidationInfo) -> Path:
    """Return a path made absolute: from the config's folder, or where nothing is there, from the working one.

    The second serves `--set` and packaged configs.
    """
    given = Path(path).expanduser()
    base = Path((info.context or {}).get("base") or "")
    return next((p for p in (base / given, given) if p.exists()), base / given).absolute()


def check_length(prompt: str, what: str) -> None:
    """Raise ValueError for a prompt that is longer than any text encoder could read."""
    if len(prompt) > MOST_PROMPT:
        raise ValueError(
            f"{what} has {len(prompt):,} characters ({prompt[:30]!r}...); at most {MOST_PROMPT:,} are read"
        )


def _steps(value: object) -> object:
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"{value!r} is no number of steps; write auto or a whole number from 1")
    return value


class LoraOptions(BaseModel):
    """Low-rank adapters of the denoiser."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="a safetensors file, or the folder of one")
    scale: float = Field(1.0, description="what they are multiplied by")

    @field_validator("path", mode="before")
    @classmethod
    def _absolute(cls, path: object, info: ValidationInfo) -> object:
        return found_path(path, info) if isinstance(path, str) else path


class PromptOptions(BaseModel):
    """Prompts, seed, the cache of embeddings, how often a run is saved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = Field(None, description="what to show; instead of prompts where both are given")
    prompts: tuple[str, ...] | None = Field(
        None,
        description="several prompts, or a text file with one a line; each gets a folder 0000, 0001, ...",
    )
    seed: int = Field(42, ge=0, lt=1 << 63, description="the same seed and numerics give the same bits")
    lora: tuple[LoraOptions, ...] = Field(
        (), description="adapters beside the denoiser, unmerged: [{path, scale}]"
    )
    frames: int = Field(1, ge=1, description="frames of the video; 1 for an image")
    fps: int = Field(24, ge=1, le=120, description="frames a second")
    cache: int | str = Field(
        "256MiB",
        description="most bytes of prompts' embeddings kept on disk for later runs, or off",
        json_schema_extra={"numerics": False},
    )
    save_every: Annotated[Literal["auto"] | int, BeforeValidator(_steps)] = Field(
        "auto",
        description="steps after which what --resume needs is saved; auto: once ten seconds would be lost",
        json_schema_extra={"numerics": False},
    )

    @model_validator(mode="before")
    @classmethod
    def _prompt_wins(cls, given: object) -> object:
        """Let `--set prompt=...` replace the prompts of a file."""
        if isinstance(given, dict) and given.get("prompt") is not None:
            return {**given, "prompts": None}
        return given

    @field_validator("prompts", mode="before")
    @classmethod
    def _read_prompts(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        path = found_path(value, info)
        try:
            lines = regular.read_text(path, MOST_PROMPTS_NBYTES).removeprefix("\ufeff").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: {error}; write a list of prompts or the path of a text file"
            ) from error
        found = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
        if len(found) > MOST_PROMPTS:
            raise ValueError(f"{path}: {len(found):,} prompts; a run takes {MOST_PROMPTS:,}: cut the file up")
        for n, prompt in found:
            check_length(prompt, f"{path}, line {n}")
        return [prompt for _, prompt in found]

    @field_validator("prompt", "prompts")
    @classmethod
    def _of_some_length(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for n, prompt in enumerate((value,) if isinstance(value, str) else value or ()):
            check_length(prompt, "prompt" if isinstance(value, str) else f"prompt {n}")
        return value

    @field_validator("cache")
    @classmethod
    def _amount(cls, cache: int | str) -> int | str:
        if isinstance(cache, str) and cache.strip().endswith(("%", "auto")):
            raise ValueError(f"{cache!r}: write an amount such as 256MiB, or off")
        if cache not in ("off", 0):
            try:
                parse_nbytes(cache)
            except ConfigError as error:
                raise ValueError(f"{error}, or off") from error
        return cache

    @model_validator(mode="after")
    def _has_prompts(self) -> PromptOptions:
        if self.prompt is None and self.prompts is None:
            raise ValueError("write prompt or prompts")
        if self.prompts is not None and not 1 <= len(self.prompts) <= MOST_PROMPTS:
            raise ValueError(f"{len(self.prompts)} prompts: 1 to {MOST_PROMPTS} are taken")
        return self

    @property
    def steps_a_save(self) -> int | None:
        """Return the steps between saves; None: by the seconds that they take."""
        return None if self.save_every == "auto" else self.save_every

    @property
    def lora_paths(self) -> list[Path]:
        """Return where adapters are."""
        return [lora.path for lora in self.lora]

    @property
    def cache_nbytes(self) -> int:
        """Return the most bytes of embeddings kept for later runs, 0 for none."""
        return 0 if self.cache in ("off", 0) else parse_nbytes(self.cache)

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the prompts, one or several."""
        return self.prompts if self.prompts is not None else (self.prompt or "",)


class CheckpointOptions(BaseModel):
    """Where one network's checkpoint is and what its weights are held as.

    `dtype` None: as in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a checkpoint's folder or file")
    dtype: Literal["fp32", "bf16", "fp16", "int8"] | None = Field(
        None, description="dtype of the weights; int8 is for what `blockstream pack` made so"
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        return str(found_path(path, info))

    @property
    def converted(self) -> str | None:
        """Return the dtype that weights are brought to as they are read, None for that of the file."""
        return None if self.dtype == "int8" else self.dtype
