"""The keys of a MOVD config besides the engine's, and what they come to: sizes, frames."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from blockstream.errors import ConfigError
from movd.sizes import ASPECT_RATIOS, RESOLUTIONS, check_frames, size_of
from movd.text_to_video.prompt_options import CheckpointOptions, PromptOptions, found_path

#: The embedded model, wherever it is installed.
TINY = "movd/tiny"
_ASSETS = Path(__file__).parent / "assets"


class ModelOptions(CheckpointOptions):
    """Where one network's checkpoint is and what its weights are held as.

    `dtype` None: as in the file.
    """

    path: str = Field(description="a checkpoint's folder, or movd/tiny for the embedded one")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        return path if path == TINY else str(found_path(path, info))

    def folder(self, part: str) -> Path:
        """Return the folder of this network; `part` is t5, dit or vae."""
        if self.path == TINY:
            return _ASSETS / "tiny" / part
        folder = Path(self.path)
        if not folder.is_dir():
            reason = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(f"{part}.path {folder}: {reason}; name the folder of the checkpoint")
        return folder


def _tiny() -> ModelOptions:
    return ModelOptions(path=TINY)


class MovdOptions(PromptOptions):
    """Text to video with Open-Sora v1.2's networks."""

    height: int | None = Field(None, ge=16, le=2048, description="pixels")
    width: int | None = Field(None, ge=16, le=2048, description="pixels")
    resolution: str | None = Field(None, description=f"instead of a size: {', '.join(RESOLUTIONS)}")
    aspect_ratio: str | None = Field(None, description=f"with resolution: {', '.join(ASPECT_RATIOS)}")
    frames: int = Field(51, ge=1, le=1024, description="1 for an image, else 17 or more; 51 at 24 fps is 2 s")
    steps: int = Field(30, ge=1, le=1000, description="steps of the flow, each one pass of STDiT3")
    guidance: float = Field(7.0, ge=0, le=100, description="scale of classifier-free guidance")
    aesthetic: float | None = Field(6.5, description="aesthetic score appended to the prompt, null for none")
    reference: str | None = Field(
        None, min_length=1, description="image that is the first frame: png, jpeg or webp"
    )
    t5: ModelOptions = Field(default_factory=_tiny, description="the text encoder")
    dit: ModelOptions = Field(default_factory=_tiny, description="STDiT3")
    vae: ModelOptions = Field(default_factory=_tiny, description="the video autoencoder")

    @field_validator("reference")
    @classmethod
    def _absolute(cls, path: str | None, info: ValidationInfo) -> str | None:
        return None if path is None else str(found_path(path, info))

    @model_validator(mode="after")
    def _fits(self) -> Self:
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
