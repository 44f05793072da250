"""The keys of a Pyramidal Flow config besides the engine's."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from movd.text_to_video.prompt_options import CheckpointOptions, PromptOptions, found_path

#: Pixels a side that have whole tokens at every stage, and frames a latent stands for.
SIDE, TIME = 64, 8
#: What the original tells the model to leave out, and what it adds to every prompt.
NEGATIVE = (
    "cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, "
    "extra limbs, extra digits, misplaced objects, mutated anatomy, monochrome, horror"
)
SUFFIX = ", hyper quality, Ultra HD, 8K"
Variant = Literal["384p", "768p", "image"]


class PyramidOptions(PromptOptions):
    """Text to video, and image to video, with Pyramidal Flow's miniFLUX networks."""

    negative: str = Field(NEGATIVE, description="what not to show, for every prompt")
    suffix: str = Field(SUFFIX, description="what is added to every prompt")
    height: int = Field(384, ge=64, le=2048, description="pixels, a multiple of 64")
    width: int = Field(640, ge=64, le=2048, description="pixels, a multiple of 64")
    frames: int = Field(121, ge=1, le=241, description="1 for an image, else 8 k + 1; 121 at 24 fps is 5 s")
    steps: tuple[int, ...] = Field(
        (20, 20, 20),
        min_length=3,
        max_length=3,
        description="steps of the first latent frame, stage by stage",
    )
    video_steps: tuple[int, ...] = Field(
        (10, 10, 10), min_length=3, max_length=3, description="steps of every other latent frame, by stage"
    )
    guidance: float = Field(
        7.0, ge=0, le=100, description="guidance of the first latent frame; 0 turns it off for all"
    )
    video_guidance: float = Field(5.0, ge=0, le=100, description="guidance of the other latent frames")
    linear_guidance: bool = Field(
        False, description="let guidance fall from that of the first frame by half a frame, to 2"
    )
    reference: str | None = Field(
        None, min_length=1, description="image that is the first frame: png, jpeg or webp"
    )
    tiles: int | None = Field(
        256, ge=64, multiple_of=32, description="pixels a side the VAE decodes at a time; null: whole frames"
    )
    window: int = Field(
        1, ge=1, le=16, description="latent frames the VAE decodes at a time, after the first"
    )
    model: str | None = Field(
        None, description="a folder with diffusion_transformer_384p/, ..., tokenizer_2/"
    )
    variant: Variant | None = Field(
        None, description="which of model's denoisers; null: 384p up to 640 x 384, else 768p"
    )
    t5: CheckpointOptions | None = Field(None, description="the first text encoder, else model's")
    clip: CheckpointOptions | None = Field(None, description="the second text encoder, else model's")
    dit: CheckpointOptions | None = Field(None, description="the denoiser, else model's")
    vae: CheckpointOptions | None = Field(None, description="the video autoencoder, else model's")

    @field_validator("model", "reference")
    @classmethod
    def _absolute(cls, path: str | None, info: ValidationInfo) -> str | None:
        return None if path is None else str(found_path(path, info))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("height", "width"):
            size = getattr(self, name)
            if size % SIDE:
                near = max(SIDE, round(size / SIDE) * SIDE)
                raise ValueError(f"{name} = {size} is no multiple of {SIDE}; {near} is the nearest")
        if self.frames % TIME != 1:
            near = (self.frames - 1 + TIME // 2) // TIME * TIME + 1
            raise ValueError(f"frames = {self.frames} is not {TIME} k + 1; {near} is the nearest")
        for name in ("steps", "video_steps"):
            if min(getattr(self, name)) < 1 or max(getattr(self, name)) > 1000:
                raise ValueError(f"{name} = {list(getattr(self, name))}: 1 to 1000 are taken in each stage")
        if self.reference is not None and self.frames == 1:
            raise ValueError("reference is the first frame of a video; with frames = 1 nothing is left")
        missing = [name for name in ("t5", "clip", "dit", "vae") if getattr(self, name) is None]
        if self.model is None and missing:
            raise ValueError(f"name the folder of the checkpoints, model, or those of {', '.join(missing)}")
        if self.variant is not None and self.dit is not None:
            raise ValueError(
                "variant says which of model's denoisers is taken; dit names another: leave one out"
            )
        return self

    @property
    def denoiser(self) -> Variant:
        """Return which of the model's denoisers is taken."""
        if self.variant is not None:
            return self.variant
        return "384p" if self.height * self.width <= 640 * 384 else "768p"
