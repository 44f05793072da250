"""Write every segment of a pipeline as a Core ML package, one at a time, and the manifest last.

A package is written beside its place and renamed when it is whole; a journal lists what is done. An export
that was stopped, even killed, goes on where it was when the same is asked again.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockstream.budget.amounts import format_nbytes
from blockstream.errors import ConfigError
from blockstream.run.config import RunConfig
from blockstream.system import regular
from blockstream.system.atomic import (
    LOCK,
    locked,
    make_folder,
    move,
    replaced,
    unfinished,
    write_atomic,
    write_json,
)
from blockstream.system.machine import versions
from movd_coreml.convert import MULTIFUNCTION, Form, convert, join
from movd_coreml.manifest import (
    MANIFEST_NAME,
    Export,
    File,
    Manifest,
    Package,
    Program,
    Segment,
    Stage,
    Table,
    describe_package,
    file_sha256,
    open_export,
    read_manifest,
)
from movd_coreml.manifest import Tensor as Described
from movd_coreml.networks import Networks, What
from movd_coreml.segments import Function, Recipe
from movd_coreml.tools import coremltools

JOURNAL_NAME = "manifest.unfinished.json"
CONFIG_NAME = "config.yaml"
_PART = ".part"
#: What an unfinished export may lack, and what is told an app beside the packages.
_LATER = ("segments", "packages", "tables", "files", "guidance", "fps", "presets")

OnSegment = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to export. `int8` names the networks whose products' weights are held in int8: t5, dit.

    `precision` fp16 is for STDiT3's products; its norms and sums, T5 and the VAE stay in float32, since their
    values leave the range of half precision.
    """

    what: What = field(default_factory=What)
    form: Form = field(default_factory=Form)
    int8: tuple[str, ...] = ()

    def form_of(self, recipe: Recipe) -> Form:
        """Return how a segment is written."""
        half = self.form.precision == "fp16" and recipe.network == "dit"
        return replace(self.form, precision="fp16" if half else "fp32", int8=recipe.network in self.int8)


def export(
    config: RunConfig, out: Path, settings: Settings | None = None, on_segment: OnSegment | None = None
) -> Export:
    """Write a config's packages to a folder; return the export.

    `on_segment(name, done, of)` hears of each segment. A finished export of the same is returned as it is.
    Raises ConfigError for a folder that holds anything else, ModelError for what cannot be converted.
    """
    settings = settings or Settings()
    coremltools()
    make_folder(out)
    with locked(out), Networks(config, settings.what) as networks:
        return _Exporter(networks, out, settings, on_segment or (lambda name, done, of: None)).run()


class _Exporter:
    """One export: its folder, and what of the manifest is known."""

    def __init__(self, networks: Networks, out: Path, settings: Settings, on_segment: OnSegment) -> None:
        self.networks, self.out, self.settings = networks, out, settings
        self.on_segment = on_segment
        self.manifest = self._draft()

    def run(self) -> Export:
        self._resume()
        recipes = [recipe for stage in self.networks.stages for recipe in stage.segments]
        done = {segment.name for segment in self.manifest.segments}
        self._check_space([recipe for recipe in recipes if recipe.name not in done])
        for n, recipe in enumerate(recipes):
            if recipe.name not in done:
                self.on_segment(recipe.name, n, len(recipes))
                self._write_segment(recipe)
        self.on_segment("tables", len(recipes), len(recipes))
        self._write_rest()
        write_json(self.out / MANIFEST_NAME, self.manifest.model_dump(mode="json"))
        (self.out / JOURNAL_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.out / _PART, ignore_errors=True)
        return open_export(self.out)

    # -- what is asked, and what of it is there ------------------------------------------------

    def _draft(self) -> Manifest:
        """Return the manifest without what is to be written."""
        networks, settings = self.networks, self.settings
        stages = tuple(
            Stage(
                name=stage.name,
                order=tuple(recipe.name for recipe in stage.segments),
                inputs=stage.inputs,
                output=stage.output,
            )
            for stage in networks.stages
        )
        installed = versions()
        return Manifest(
            model=networks.identity(),
            target=settings.form.target,
            precision=settings.form.precision,
            int8=settings.int8,
            flexible=settings.what.flexible,
            text_tokens=networks.tokens,
            guidance=networks.options.guidance,
            fps=float(networks.options.fps),
            attention=tuple(chosen.written() for chosen in networks.config.attention),
            presets=networks.sizes.presets,
            stages=stages,
            segments=(),
            packages=(),
            tables=(),
            files=(),
            tools={"coremltools": str(coremltools().__version__), "torch": str(installed["torch"])},
        )

    def _resume(self) -> None:
        """Take over what an earlier export of the same has written; refuse a folder with anything else."""
        found = next((n for n in (MANIFEST_NAME, JOURNAL_NAME) if (self.out / n).is_file()), None)
        if found is None:
            own = (LOCK, _PART, "packages", unfinished(self.out / JOURNAL_NAME).name)
            there = sorted(p.name for p in self.out.iterdir() if p.name not in own)
            if there:
                raise ConfigError(
                    f"{self.out} is not empty ({', '.join(there[:3])}) and holds no export; "
                    "name another --out"
                )
            self._journal()
            return
        earlier = read_manifest(self.out / found)
        asked, had = (_head(manifest) for manifest in (self.manifest, earlier))
        differs = [key for key in asked if asked[key] != had[key]]
        if differs:
            key = differs[0]
            raise ConfigError(
                f"{self.out}: holds an export of another {key} ({_short(had[key])}, asked for is "
                f"{_short(asked[key])}); name another --out, or remove it"
            )
        whole = {package.path for package in earlier.packages if self._is_whole(package)}
        segments = tuple(s for s in earlier.segments if {p.package for p in s.programs} <= whole)
        used = {p.package for s in segments for p in s.programs}
        packages = tuple(package for package in earlier.packages if package.path in used)
        self.manifest = self.manifest.model_copy(update={"segments": segments, "packages": packages})

    def _is_whole(self, package: Package) -> bool:
        paths = [(self.out / package.path / file.path, file.nbytes) for file in package.files]
        return all(path.is_file() and path.stat().st_size == nbytes for path, nbytes in paths)

    def _journal(self) -> None:
        write_json(self.out / JOURNAL_NAME, self.manifest.model_dump(mode="json"))

    def _check_space(self, recipes: list[Recipe]) -> None:
        """Raise ConfigError where the disk cannot hold what is left, and the largest twice over."""
        nbytes = [self._nbytes(recipe) for recipe in recipes]
        if not nbytes:
            return
        needed, free = sum(nbytes) + 2 * max(nbytes), shutil.disk_usage(self.out).free
        if needed > free:
            raise ConfigError(
                f"{self.out}: has {format_nbytes(free)} free, and what is left to export needs "
                f"{format_nbytes(needed)}; free some, or name --out on another disk"
            )

    def _nbytes(self, recipe: Recipe) -> int:
        form = self.settings.form_of(recipe)
        share = 4 if form.int8 else 2 if form.precision == "fp16" else 1
        copies = 1 if form.target in MULTIFUNCTION else len(recipe.functions)
        return self.networks.network(recipe.network).nbytes(recipe.modules) // share * copies

    # -- one segment ---------------------------------------------------------------------------

    def _write_segment(self, recipe: Recipe) -> None:
        form = self.settings.form_of(recipe)
        network = self.networks.network(recipe.network)
        with self._part() as part:
            outputs = {}
            with network.weights(recipe.modules):
                for function in recipe.functions:
                    with function.during(function.example), torch.no_grad():
                        outputs[function.name] = convert(
                            f"segment {recipe.name}, function {function.name}",
                            function.build(),
                            function.inputs,
                            function.output_names(),
                            form,
                            part / f"{function.name}.mlpackage",
                        )
            _give_back()
            places = self._place(recipe, form, part)
        programs = tuple(
            _program(function, outputs[function.name], *places[function.name], served)
            for function in recipe.functions
            for served in function.serves
        )
        segment = Segment(
            name=recipe.name,
            stage=recipe.stage,
            modules=recipe.modules,
            precision=form.precision,
            int8=form.int8,
            programs=programs,
        )
        packages = [describe_package(self.out, path) for path in dict.fromkeys(p for p, _ in places.values())]
        self.manifest = self.manifest.model_copy(
            update={
                "segments": (*self.manifest.segments, segment),
                "packages": (*self.manifest.packages, *packages),
            }
        )
        self._journal()

    def _place(self, recipe: Recipe, form: Form, part: Path) -> dict[str, tuple[str, str]]:
        """Join or move a segment's packages to their places; return (package, function) by function."""
        names = [function.name for function in recipe.functions]
        made = {name: part / f"{name}.mlpackage" for name in names}
        together = f"packages/{recipe.name}.mlpackage"
        if len(names) == 1:
            self._move(made[names[0]], together)
            return {names[0]: (together, "main")}
        if form.target in MULTIFUNCTION:
            joined = part / "joined.mlpackage"
            join(made, joined)
            self._move(joined, together)
            return {name: (together, name) for name in names}
        apart = {name: f"packages/{recipe.name}.{name}.mlpackage" for name in names}
        for name in names:
            self._move(made[name], apart[name])
        return {name: (apart[name], "main") for name in names}

    def _move(self, package: Path, path: str) -> None:
        target = self.out / path
        make_folder(target.parent)
        shutil.rmtree(target, ignore_errors=True)
        move(package, target)

    @contextmanager
    def _part(self) -> Iterator[Path]:
        part = self.out / _PART
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    # -- what lies beside the packages ---------------------------------------------------------

    def _write_rest(self) -> None:
        tables = tuple(self._write_table(name, t) for name, t in self.networks.tables().items())
        write_atomic(self.out / CONFIG_NAME, self.networks.config.dump().encode())
        paths = [CONFIG_NAME]
        for source in self.networks.tokenizer_files():
            make_folder(self.out / "tokenizer")
            paths.append(f"tokenizer/{source.name}")
            write_atomic(self.out / paths[-1], regular.read_bytes(source))
        files = tuple(
            File(path=path, nbytes=(self.out / path).stat().st_size, sha256=file_sha256(self.out / path))
            for path in paths
        )
        self.manifest = self.manifest.model_copy(update={"tables": tables, "files": files})

    def _write_table(self, name: str, value: Tensor) -> Table:
        path = f"tables/{name}.f32"
        target = self.out / path
        make_folder(target.parent)
        with replaced(target) as temporary:
            value.contiguous().numpy().astype(np.dtype("<f4"), copy=False).tofile(temporary)
        return Table(
            name=name,
            path=path,
            shape=tuple(value.shape),
            nbytes=target.stat().st_size,
            sha256=file_sha256(target),
        )


def _program(
    function: Function,
    outputs: list[tuple[int, ...]],
    package: str,
    name: str,
    served: tuple[Any, tuple[str, ...]],
) -> Program:
    """Return the record of a function as it serves one variant."""
    variant, presets = served
    given = zip(function.output_names(), function.outputs, outputs, strict=True)
    return Program(
        package=package,
        function=name,
        variant=variant,
        presets=presets,
        inputs=function.inputs,
        outputs=tuple(Described(name=name, value=value, shape=shape) for name, value, shape in given),
    )


def _head(manifest: Manifest) -> dict[str, Any]:
    """Return what two exports have in common when one goes on with the other."""
    sizes = [preset.model_dump(exclude={"timesteps"}) for preset in manifest.presets]
    return {**manifest.model_dump(exclude=set(_LATER)), "presets": sizes}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _give_back() -> None:
    """Return freed memory to the system, so that one segment's does not add to the next one's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
