"""The keys of a HunyuanVideo config besides the engine's."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from movd.text_to_video.prompt_options import CheckpointOptions, PromptOptions, found_path

#: Latents a side, and frames, that one token stands for.
SIDE, TIME = 16, 4


class HunyuanOptions(PromptOptions):
    """Text to video with HunyuanVideo's networks."""

    negative: str | None = Field(None, description="what not to show; taken where true_guidance is above 1")
    height: int = Field(544, ge=16, le=2048, description="pixels, a multiple of 16")
    width: int = Field(960, ge=16, le=2048, description="pixels, a multiple of 16")
    frames: int = Field(129, ge=1, le=1025, description="1 for an image, else 4 k + 1; 129 at 24 fps is 5 s")
    steps: int = Field(50, ge=1, le=1000, description="steps of the flow")
    shift: float | None = Field(
        None, gt=0, description="how far times lean towards noise; null: as the scheduler's file says, else 7"
    )
    guidance: float = Field(6.0, ge=0, le=100, description="scale of guidance that the model embeds")
    true_guidance: float = Field(
        1.0, ge=1, le=100, description="scale of classifier-free guidance: above 1 a second pass a step"
    )
    latents: Literal["fp32", "model"] = Field(
        "fp32",
        description="between steps: fp32, as Tencent's; model: rounded to the model's dtype, as diffusers'",
    )
    time_tiles: Literal["diffusers", "tencent", "whole"] = Field(
        "diffusers", description="frames the VAE decodes at a time: 17 as diffusers, 65 as Tencent, or all"
    )
    space_tiles: int | None = Field(
        256,
        ge=64,
        multiple_of=32,
        description="pixels a side the VAE decodes at a time; null: whole frames",
    )
    model: str | None = Field(None, description="a folder with transformer/, text_encoder/, ..., vae/")
    llama: CheckpointOptions | None = Field(None, description="the first text encoder, else model's")
    clip: CheckpointOptions | None = Field(None, description="the second text encoder, else model's")
    dit: CheckpointOptions | None = Field(None, description="the denoiser, either layout, else model's")
    vae: CheckpointOptions | None = Field(None, description="the video autoencoder, else model's")

    @field_validator("model")
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
        if self.negative is not None and self.true_guidance <= 1:
            raise ValueError(
                "negative is read only where true_guidance is above 1 (HunyuanVideo embeds its guidance); "
                "set true_guidance, at twice the passes, or leave negative out"
            )
        if self.negative is None and self.true_guidance > 1:
            raise ValueError('true_guidance above 1 needs a negative prompt; "" is one')
        missing = [name for name in ("llama", "clip", "dit", "vae") if getattr(self, name) is None]
        if self.model is None and missing:
            raise ValueError(f"name the folder of the checkpoints, model, or those of {', '.join(missing)}")
        return self
