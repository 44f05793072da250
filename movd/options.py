"""The keys of a MOVD config besides the engine's, and what they come to: sizes, frames, prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from blockstream.budget.amounts import parse_nbytes
from blockstream.errors import ConfigError
from blockstream.system import regular
from movd.sizes import ASPECT_RATIOS, RESOLUTIONS, check_frames, size_of

#: The embedded model, wherever it is installed.
TINY = "movd/tiny"
_ASSETS = Path(__file__).parent / "assets"

#: The most prompts one run takes.
MOST_PROMPTS = 10_000
#: The most characters a prompt may have: T5 reads 300 tokens of it.
MOST_PROMPT = 10_000
#: A file of prompts: as many as a run takes, of more than T5 reads.
MOST_PROMPTS_NBYTES = 16_000_000


class ModelOptions(BaseModel):
    """Where one network's checkpoint is and what its weights are held as.

    `dtype` None: as in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a checkpoint's folder, or movd/tiny for the embedded one")
    dtype: Literal["fp32", "bf16", "fp16", "int8"] | None = Field(
        None, description="dtype of the weights; int8 is for what `blockstream pack` made so"
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        return path if path == TINY else str(_found(path, info))

    @property
    def converted(self) -> str | None:
        """Return the dtype that weights are brought to as they are read, None for that of the file."""
        return None if self.dtype == "int8" else self.dtype

    def folder(self, part: str) -> Path:
        """Return the folder of this network; `part` is t5, dit or vae."""
        if self.path == TINY:
            return _ASSETS / "tiny" / part
        folder = Path(self.path)
        if not folder.is_dir():
            reason = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(f"{part}.path {folder}: {reason}; name the folder of the checkpoint")
        return folder


def _found(path: str, info: ValidationInfo) -> Path:
    """Return a path made absolute: from the config's folder, or where nothing is there, from the working one.

    The second serves `--set` and packaged configs.
    """
    given = Path(path).expanduser()
    base = Path((info.context or {}).get("base") or "")
    return next((p for p in (base / given, given) if p.exists()), base / given).absolute()


def _check_length(prompt: str, what: str) -> None:
    if len(prompt) > MOST_PROMPT:
        raise ValueError(
            f"{what} has {len(prompt):,} characters ({prompt[:30]!r}...); at most {MOST_PROMPT:,} are read"
        )


def _tiny() -> ModelOptions:
    return ModelOptions(path=TINY)


class MovdOptions(BaseModel):
    """Text to video with Open-Sora v1.2's networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = Field(None, description="what to show; instead of prompts where both are given")
    prompts: tuple[str, ...] | None = Field(
        None,
        description="several prompts, or a text file with one a line; each gets a folder 0000, 0001, ...",
    )
    height: int | None = Field(None, ge=16, le=2048, description="pixels")
    width: int | None = Field(None, ge=16, le=2048, description="pixels")
    resolution: str | None = Field(None, description=f"instead of a size: {', '.join(RESOLUTIONS)}")
    aspect_ratio: str | None = Field(None, description=f"with resolution: {', '.join(ASPECT_RATIOS)}")
    frames: int = Field(51, ge=1, le=1024, description="1 for an image, else 17 or more; 51 at 24 fps is 2 s")
    fps: int = Field(24, ge=1, le=120, description="frames a second")
    steps: int = Field(30, ge=1, le=1000, description="steps of the flow, each one pass of STDiT3")
    guidance: float = Field(7.0, ge=0, le=100, description="scale of classifier-free guidance")
    seed: int = Field(42, ge=0, lt=1 << 63, description="the same seed and numerics give the same bits")
    aesthetic: float | None = Field(6.5, description="aesthetic score appended to the prompt, null for none")
    reference: str | None = Field(
        None, min_length=1, description="image that is the first frame: png, jpeg or webp"
    )
    t5: ModelOptions = Field(default_factory=_tiny, description="the text encoder")
    dit: ModelOptions = Field(default_factory=_tiny, description="STDiT3")
    vae: ModelOptions = Field(default_factory=_tiny, description="the video autoencoder")
    cache: int | str = Field(
        "256MiB",
        description="most bytes of prompts' embeddings kept on disk for later runs, or off",
        json_schema_extra={"numerics": False},
    )
    save_every: int = Field(
        5,
        ge=1,
        description="steps after which what --resume needs is saved; slow steps are saved each",
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
        path = _found(value, info)
        try:
            lines = regular.read_text(path, MOST_PROMPTS_NBYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: {error}; write a list of prompts or the path of a text file"
            ) from error
        found = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
        if len(found) > MOST_PROMPTS:
            raise ValueError(f"{path}: {len(found):,} prompts; a run takes {MOST_PROMPTS:,}: cut the file up")
        for n, prompt in found:
            _check_length(prompt, f"{path}, line {n}")
        return [prompt for _, prompt in found]

    @field_validator("prompt", "prompts")
    @classmethod
    def _of_some_length(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for n, prompt in enumerate((value,) if isinstance(value, str) else value or ()):
            _check_length(prompt, "prompt" if isinstance(value, str) else f"prompt {n}")
        return value

    @field_validator("reference")
    @classmethod
    def _absolute(cls, path: str | None, info: ValidationInfo) -> str | None:
        return None if path is None else str(_found(path, info))

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
    def _fits(self) -> Self:
        if self.prompt is None and self.prompts is None:
            raise ValueError("write prompt or prompts")
        if self.prompts is not None and not 1 <= len(self.prompts) <= MOST_PROMPTS:
            raise ValueError(f"{len(self.prompts)} prompts: 1 to {MOST_PROMPTS} are taken")
        try:
            check_frames(self.frames)
            _ = self.size
            if self.reference is not None and self.frames == 1:
                raise ConfigError("reference is the first frame of a video; with frames = 1 nothing is left")
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        if (self.height is None) != (self.width is None):
            raise ConfigError("height and width go together")
        if self.height is not None and self.width is not None:
            if self.resolution or self.aspect_ratio:
                raise ConfigError("write height and width, or resolution and aspect_ratio, not both")
            return self.height, self.width
        return size_of(self.resolution or "240p", self.aspect_ratio or "9:16")

    @property
    def cache_nbytes(self) -> int:
        """Return the most bytes of embeddings kept for later runs, 0 for none."""
        return 0 if self.cache in ("off", 0) else parse_nbytes(self.cache)

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the prompts, one or several."""
        return self.prompts if self.prompts is not None else (self.prompt or "",)
