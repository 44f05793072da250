"""The manifest of an export folder: what an app, the engine and `verify` read.

A folder holds `manifest.json`, written last, `config.yaml`, packages (`packages/*.mlpackage`) and tables (raw
arrays, `tables/*`). How a stage runs follows from the manifest alone. One pass of a stage:

    values = the stage's `inputs`, given by who runs it
    for name in stage.order:
        program = the segment's program for the preset and the variant
        out = predict(program, {t.name: values[t.value] for t in program.inputs})
        values |= {t.value: out[t.name] for t in program.outputs}
    the result is values[stage.output]

Stages: `t5` (a pass a prompt), `dit` (a pass a step), `vae-temporal` (a pass a chunk of latent frames) and
`vae-spatial` (a pass for `frames_a_call` frames of the chunk). docs/coreml.md says what their inputs are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from blockstream.checkpoint.read.index import safe_name
from blockstream.checkpoint.read.manifest import Value, read_versioned
from blockstream.errors import CheckpointError, ConfigError
from blockstream.system import regular

MANIFEST_NAME = "manifest.json"
FORMAT = "movd-coreml"
VERSION = 1

Dtype = Literal["fp32", "fp16", "int32"]
#: plain; merged: with the config's token merging; rest: the last chunk of a clip, shorter than the others.
Variant = Literal["plain", "merged", "rest"]


class Tensor(Value):
    """An input or output of a program: its name in the package, and the stage's value it is.

    `shape` is the only one, or where `ranges` [axis, least, most] are given, the one it was traced with.
    An output of a flexible program has no ranges: its shape follows from the inputs'.
    """

    name: str
    value: str
    shape: tuple[int, ...]
    dtype: Dtype = "fp32"
    ranges: tuple[tuple[int, int, int], ...] = ()

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of a shape is one of these."""
        if len(shape) != len(self.shape):
            return False
        low, high = list(self.shape), list(self.shape)
        for axis, least, most in self.ranges:
            low[axis], high[axis] = least, most
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


class Program(Value):
    """One function of a package: what it takes and gives, and the presets it is for, none for all."""

    package: str
    function: str = "main"
    variant: Variant = "plain"
    presets: tuple[str, ...] = ()
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def serves(self, preset: str, variant: Variant) -> bool:
        """Return whether this is the program of a preset and a variant."""
        return variant == self.variant and (not self.presets or preset in self.presets)


class Segment(Value):
    """What is loaded and released together. `modules` are the paths of its weights in the network."""

    name: str
    stage: str
    modules: tuple[str, ...]
    precision: Literal["fp32", "fp16"] = "fp32"
    int8: bool = False
    programs: tuple[Program, ...]

    def program(self, preset: str, variant: Variant = "plain") -> Program:
        """Return the program for a preset; a segment without the variant has one for all of them.

        Raises ConfigError naming the presets there are.
        """
        for wanted in (variant, "plain"):
            for program in self.programs:
                if program.serves(preset, wanted):
                    return program
        known = sorted({p for program in self.programs for p in program.presets})
        raise ConfigError(f"segment {self.name} has no program for preset {preset!r} ({', '.join(known)})")


class Stage(Value):
    """Segments in the order one pass visits them; `inputs` and `output` name values.

    The inputs' shapes are those of the programs that take them.
    """

    name: str
    order: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str


class Preset(Value):
    """One size of video: `frames` of `height` x `width` pixels, latents [frames, height, width].

    `chunks` [frames, latent frames] are decoded one by one, `frames_a_call` frames of each at a time.
    `timesteps` are those of the config's number of steps, in 0..1000.
    """

    name: str
    frames: int
    height: int
    width: int
    latent: tuple[int, int, int]
    chunks: tuple[tuple[int, int], ...]
    frames_a_call: int
    timesteps: tuple[float, ...]


class Table(Value):
    """A raw little-endian array beside the packages; rows of the token embedding are gathered from it."""

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: Literal["fp32", "int32"] = "fp32"
    nbytes: int
    sha256: str


class File(Value):
    """One file of a package, or of the folder."""

    path: str
    nbytes: int
    sha256: str


class Package(Value):
    """One .mlpackage and its files, paths relative to it.

    `sha256` is over all but the package's own manifest, whose identifiers are random.
    """

    path: str
    files: tuple[File, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files."""
        return sum(file.nbytes for file in self.files)


class Manifest(Value):
    """An export as it stands in the file."""

    format: Literal["movd-coreml"] = "movd-coreml"
    version: int = VERSION
    model: Mapping[str, str] = Field(description="what tells t5, dit and vae from other weights")
    target: str
    precision: Literal["fp32", "fp16"]
    int8: tuple[str, ...]
    flexible: bool = Field(False, description="one function ranges over all presets' sizes")
    text_tokens: int
    guidance: float
    fps: float
    attention: tuple[Any, ...] = Field((), description="the transforms of the merged variant, as configured")
    presets: tuple[Preset, ...]
    stages: tuple[Stage, ...]
    segments: tuple[Segment, ...]
    packages: tuple[Package, ...]
    tables: tuple[Table, ...]
    files: tuple[File, ...] = Field(description="the config that was exported and its tokenizer")
    tools: Mapping[str, str]


class Export:
    """An opened export: its folder and its manifest; every file has been found in its size."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.segments = {segment.name: segment for segment in manifest.segments}
        self.packages = {package.path: package for package in manifest.packages}
        self.stages = {stage.name: stage for stage in manifest.stages}

    def preset(self, name: str) -> Preset:
        """Return a preset by name; ConfigError names those there are."""
        for preset in self.manifest.presets:
            if preset.name == name:
                return preset
        known = ", ".join(p.name for p in self.manifest.presets)
        raise ConfigError(
            f"{self.folder}: was not exported for {name}; it has {known}: export again with --preset {name}"
        )

    def preset_for(self, frames: int, height: int, width: int) -> Preset:
        """Return the preset of a size; ConfigError names those there are."""
        return self.preset(preset_name(frames, height, width))

    def package_of(self, program: Program) -> Path:
        """Return the folder of a program's package."""
        return self.folder / program.package

    def table(self, name: str) -> Table:
        """Return a table by name."""
        for table in self.manifest.tables:
            if table.name == name:
                return table
        raise CheckpointError(f"{self.folder / MANIFEST_NAME}: names no table {name!r}; export again")

    def require_model(self, model: Mapping[str, str]) -> None:
        """Raise ConfigError where a network was exported from other weights than `model` names."""
        for part, identity in model.items():
            known = self.manifest.model.get(part)
            if known != identity:
                raise ConfigError(
                    f"{self.folder}: was exported from another {part} ({known}) than the config names "
                    f"({identity}); name that config, or export again to a new folder"
                )

    def check_files(self) -> None:
        """Read every file and compare its hash. Raises CheckpointError naming the first that differs."""
        for path, _, sha256 in self._files():
            if sha256 != file_sha256(path):
                raise CheckpointError(
                    f"{path}: is not what was exported (its hash is another); export again to a new folder"
                )

    def check_sizes(self) -> None:
        """Raise CheckpointError naming the first file that is missing or of another size."""
        for path, nbytes, _ in self._files():
            if not path.is_file():
                raise CheckpointError(f"{path}: is missing from the export; export again")
            found = path.stat().st_size
            if found != nbytes:
                raise CheckpointError(
                    f"{path}: has {found} bytes, exported were {nbytes}; it was cut or edited: export again"
                )

    def _files(self) -> Iterator[tuple[Path, int, str]]:
        for package in self.manifest.packages:
            for file in package.files:
                yield self.folder / package.path / file.path, file.nbytes, file.sha256
        for table in self.manifest.tables:
            yield self.folder / table.path, table.nbytes, table.sha256
        for file in self.manifest.files:
            yield self.folder / file.path, file.nbytes, file.sha256


def preset_name(frames: int, height: int, width: int) -> str:
    """Return the name of a size: 51x256x256 is 51 frames of 256 x 256 pixels."""
    return f"{frames}x{height}x{width}"


def open_export(folder: Path) -> Export:
    """Return the export in a folder, every file there in its size.

    Raises ConfigError where there is none, CheckpointError for one that is damaged or unfinished.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ConfigError(
            f"{folder}: holds no finished Core ML export; make one with "
            f"`blockstream export coreml CONFIG --out {folder}`"
        )
    export = Export(folder, read_manifest(path))
    export.check_sizes()
    return export


def read_manifest(path: Path) -> Manifest:
    """Return the manifest in a file, finished or not, checked within itself."""
    foreign = ConfigError(f"{path}: is no manifest of a Core ML export; name the folder that was exported")
    manifest = read_versioned(path, Manifest, foreign, "export again")
    _check_names(path, manifest)
    return manifest


def describe_package(folder: Path, path: str) -> Package:
    """Return the record of a package that lies in an export folder."""
    root = folder / path
    files = tuple(
        File(path=str(p.relative_to(root)), nbytes=p.stat().st_size, sha256=file_sha256(p))
        for p in sorted(root.rglob("*"))
        if p.is_file()
    )
    data = (f"{f.path} {f.nbytes} {f.sha256}\n" for f in files if f.path.startswith("Data/"))
    whole = hashlib.sha256("".join(data).encode())
    return Package(path=path, files=files, sha256=whole.hexdigest())


def file_sha256(path: Path) -> str:
    """Return a file's hash."""
    with regular.opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_names(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest whose parts name what it does not hold, or files outside its folder."""
    packages = {package.path for package in manifest.packages}
    segments = {segment.name for segment in manifest.segments}
    for package in manifest.packages:
        safe_name(package.path, path)
        for file in package.files:
            safe_name(file.path, path)
    for name in (*(table.path for table in manifest.tables), *(file.path for file in manifest.files)):
        safe_name(name, path)
    used = {p.package for segment in manifest.segments for p in segment.programs}
    finished = path.name == MANIFEST_NAME
    visited = {name for stage in manifest.stages for name in stage.order} if finished else set()
    if absent := sorted(used - packages) or sorted(visited - segments):
        raise CheckpointError(f"{path}: names {absent[0]}, which it does not hold; export again")
