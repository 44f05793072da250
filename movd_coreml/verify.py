"""Compare an export with the torch modules it was made from: function by function, and chained.

Every function is given what the torch modules computed up to it; besides, the stages run one after the
other on the packages alone. Packages are evaluated by `movd_coreml.interpreter`, on macOS by Core ML as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockstream.run.config import RunConfig, load_config
from movd_coreml.compare import TOLERANCES, Chained, Compared, Opened, Values, difference, mean_difference
from movd_coreml.export import CONFIG_NAME
from movd_coreml.int8 import dequantised, dequantised_half, is_quantised
from movd_coreml.interpreter import FiniteWatch
from movd_coreml.manifest import Export, Preset, Program, Segment, Variant, open_export
from movd_coreml.networks import Networks, What, gather_frames
from movd_coreml.segments import Recipe
from movd_coreml.segments_dit import tables

SCHEMA = 1
OnSegment = Callable[[str, int, int], None]


@dataclass
class Lane:
    """One way through a stage: a preset and a variant, and the values so far, by torch and by packages."""

    preset: Preset
    variant: Variant
    torch: Values
    packages: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.packages = {**self.torch, **self.packages}


def verify(
    folder: Path, config: RunConfig | None = None, on_segment: OnSegment | None = None
) -> dict[str, Any]:
    """Compare an export with its networks; return what `verify coreml --json` prints.

    `config` None: the one that was exported, which the folder holds. Raises CheckpointError for a file that
    is not as exported, ConfigError for other weights than those exported.
    """
    made = open_export(folder)
    made.check_files()
    config = config or load_config(folder / CONFIG_NAME)
    sizes = tuple((p.frames, p.height, p.width) for p in made.manifest.presets)
    with Networks(config, What(sizes, made.manifest.flexible)) as networks, torch.inference_mode():
        made.require_model(networks.identity())
        check = Verification(made, networks, on_segment or (lambda name, done, of: None))
        check.run()
    results = [*check.functions, *check.chains]
    return {
        "schema": SCHEMA,
        "equal": all(result.equal for result in results),
        "predicted": sys.platform == "darwin",
        "functions": [{**asdict(c), "equal": c.equal} for c in check.functions],
        "chains": [{**asdict(c), "equal": c.equal} for c in check.chains],
    }


class Verification:
    """The comparisons of one export."""

    def __init__(self, made: Export, networks: Networks, on_segment: OnSegment) -> None:
        self.made, self.networks, self.on_segment = made, networks, on_segment
        self.functions: list[Compared] = []
        self.chains: list[Chained] = []
        self.recipes = {recipe.name: recipe for stage in networks.stages for recipe in stage.segments}
        self.random = torch.Generator().manual_seed(0)
        self._done = self._stages = 0
        self._chained = 0.0

    def run(self) -> None:
        """Compare stage after stage, each given what the torch modules made of the one before."""
        (text,) = self._stage("t5", [self._text()])
        latents = self._stage("dit", list(self._denoising(text)))
        frames = self._stage("vae-temporal", list(self._chunks(latents)))
        self._stage("vae-spatial", list(self._calls(frames)))

    # -- what enters each stage ------------------------------------------------------------------

    def _text(self) -> Lane:
        """Return a text of random tokens, padded by a quarter."""
        table = self.networks.tables()["t5.embedding"]
        tokens = self.networks.tokens
        ids = torch.randint(len(table), (1, tokens), generator=self.random)
        mask = (torch.arange(tokens) < -(-tokens * 3 // 4)).float()[None]
        return Lane(self.made.manifest.presets[0], "plain", {"x": table[ids], "mask": mask})

    def _denoising(self, text: Lane) -> Iterator[Lane]:
        dit = self.networks.network("dit").module
        null = dit.y_embedder.y_embedding.float()[None]
        for preset in self.made.manifest.presets:
            z = self._normal(1, dit.config.in_channels, *preset.latent)
            T = dit.grid(*preset.latent)[0]
            x_mask = torch.ones(2, T)
            x_mask[:, 0] = 0 if T > 1 else 1
            given = {
                "z": torch.cat((z, z)),
                "t": torch.full((2,), preset.timesteps[len(preset.timesteps) // 2]),
                "mask": text.torch["mask"],
                "x_mask": x_mask,
                "fps": torch.tensor([self.made.manifest.fps]),
                **(tables(dit, preset) if self.made.manifest.flexible else {}),
            }
            for variant in self._variants("dit", preset):
                yield Lane(
                    preset,
                    variant,
                    {**given, "y": torch.cat((text.torch["x"], null))},
                    {"y": torch.cat((text.packages["x"], null))},
                )

    def _chunks(self, latents: list[Lane]) -> Iterator[Lane]:
        """Yield the chunks that differ in shape, of the clips that one step makes of noise."""
        seen = set()
        for lane in latents:
            if lane.variant != "plain":
                continue
            by_torch, by_packages = (self._stepped(values) for values in (lane.torch, lane.packages))
            start = 0
            for frames, n in lane.preset.chunks:
                variant: Variant = "plain" if start == 0 else "rest"
                if start and frames == lane.preset.chunks[0][0]:
                    variant = "plain"
                key = (variant, frames, *lane.preset.latent[1:])
                if key not in seen:
                    seen.add(key)
                    part = slice(start, start + n)
                    yield Lane(
                        lane.preset, variant, {"z": by_torch[:, :, part]}, {"z": by_packages[:, :, part]}
                    )
                start += n

    def _calls(self, clips: list[Lane]) -> Iterator[Lane]:
        """Yield the first call of each size."""
        seen = set()
        for lane in clips:
            key = (lane.preset.frames_a_call, *lane.preset.latent[1:])
            if lane.variant == "plain" and key not in seen:
                seen.add(key)
                by_torch, by_packages = (
                    gather_frames(values["x"][0].transpose(0, 1), key[0])[0]
                    for values in (lane.torch, lane.packages)
                )
                yield Lane(lane.preset, "plain", {"x": by_torch}, {"x": by_packages})

    def _stepped(self, values: Values) -> Tensor:
        """Return the latents that one guided step over all of the time makes."""
        cond, null = values["v"][:, : values["z"].shape[1]].chunk(2)
        return values["z"][:1] + null + self.made.manifest.guidance * (cond - null)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def _variants(self, stage: str, preset: Preset) -> list[Variant]:
        served = {
            program.variant
            for name in self.made.stages[stage].order
            for program in self.made.segments[name].programs
            if not program.presets or preset.name in program.presets
        }
        return sorted(served, reverse=True)

    # -- one stage -------------------------------------------------------------------------------

    def _stage(self, name: str, lanes: list[Lane]) -> list[Lane]:
        stage = self.made.stages[name]
        for at in stage.order:
            self.on_segment(at, self._done, len(self.recipes))
            self._done += 1
            self._segment(self.made.segments[at], self.recipes[at], lanes)
        self._chained = max(
            self._chained, *(TOLERANCES[self.made.segments[at].precision] for at in stage.order)
        )
        self._stages += 1
        for lane in lanes:
            # What a stage is off enters the next, which may be off by as much again.
            tolerance = self._chained * self._stages
            error = mean_difference(lane.packages[stage.output], lane.torch[stage.output])
            self.chains.append(Chained(name, lane.preset.name, lane.variant, error, tolerance))
        return lanes

    def _segment(self, segment: Segment, recipe: Recipe, lanes: list[Lane]) -> None:
        network = self.networks.network(recipe.network)

        def change(path: str, weight: Tensor) -> Tensor:
            if not is_quantised(network.module, path):
                return weight
            return dequantised_half(weight) if segment.precision == "fp16" else dequantised(weight)

        with network.weights(recipe.modules, change if segment.int8 else None):
            for lane in lanes:
                self._lane(segment, recipe, lane)

    def _lane(self, segment: Segment, recipe: Recipe, lane: Lane) -> None:
        program = segment.program(lane.preset.name, lane.variant)
        function = recipe.function(lane.preset.name, lane.variant)
        with function.during(lane.preset.name):
            given = [lane.torch[t.value] for t in program.inputs]
            outputs = function.build().eval()(*given)
        wanted = outputs if isinstance(outputs, tuple) else (outputs,)
        watch = FiniteWatch()
        with Opened(self.made.package_of(program), program) as package:
            got = package(lane.torch, watch)
            lane.packages |= package(lane.packages)
        compared = [
            difference(got[t.value], want, lane.torch.get(t.value))
            for t, want in zip(program.outputs, wanted, strict=True)
        ]
        self.functions.append(
            Compared(
                segment.name,
                program.package,
                program.function,
                lane.preset.name,
                lane.variant,
                max(compared),
                TOLERANCES[segment.precision],
                tuple(str(cause) for cause in watch.causes),
                self.predicted(program, lane.torch, wanted),
            )
        )
        lane.torch |= {t.value: want for t, want in zip(program.outputs, wanted, strict=True)}

    def predicted(self, program: Program, values: Values, wanted: tuple[Tensor, ...]) -> float | None:
        """Return how far Core ML's own result is from torch's; None where it does not run."""
        if sys.platform != "darwin":
            return None
        from movd_coreml.tools import coremltools

        ct = coremltools()
        named = None if program.function == "main" else program.function
        model = ct.models.MLModel(
            str(self.made.package_of(program)),
            function_name=named,
            compute_units=ct.ComputeUnit.CPU_ONLY,
        )
        out = model.predict({t.name: values[t.value].numpy() for t in program.inputs})
        return max(
            difference(torch.from_numpy(out[t.name]), want, values.get(t.value))
            for t, want in zip(program.outputs, wanted, strict=True)
        )
