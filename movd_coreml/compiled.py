"""Packages compiled for this machine: once each, at a path that follows from their content.

Nothing that calls Core ML has been run on a Mac. It is behind `Runtime`, which tests replace.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from blockstream.errors import CheckpointError, ConfigError
from blockstream.system import regular
from blockstream.system.atomic import make_folder, move, write_json
from movd_coreml.manifest import Export, describe_package

#: The names coremltools has for what Core ML may compute on.
UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-and-gpu": "CPU_AND_GPU", "cpu-and-ne": "CPU_AND_NE"}


class Loaded(Protocol):
    """One function of a compiled package in memory; it goes with the last reference to it."""

    def predict(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the outputs by name, for arrays by name."""


class Runtime(Protocol):
    """What compiles and loads packages. `version` is all that a compiled package depends on beside itself."""

    version: str

    def compile(self, package: Path, to: Path) -> None:
        """Write the compiled form of a package to a folder that does not exist yet."""

    def load(self, compiled: Path, units: str, function: str | None) -> Loaded:
        """Return a function of a compiled package, the only one if None."""


class CoreML:
    """coremltools on macOS. Implements `Runtime`; ConfigError on any other system, or without coremltools."""

    def __init__(self) -> None:
        if sys.platform != "darwin":
            raise ConfigError(
                f"backend coreml needs macOS, this is {platform.system()}; coreml-interpreter computes the "
                "same packages on any system"
            )
        from movd_coreml.tools import coremltools

        self._tools: Any = coremltools()
        self.version = f"coremltools {self._tools.__version__}, macOS {platform.mac_ver()[0]}"

    def compile(self, package: Path, to: Path) -> None:
        """Compile a package without loading it."""
        self._tools.models.utils.compile_model(str(package), str(to))

    def load(self, compiled: Path, units: str, function: str | None) -> Loaded:
        """Load a compiled package; the system keeps what it prepares for the device under this very path."""
        unit = getattr(self._tools.ComputeUnit, UNITS[units])
        model: Loaded = self._tools.models.CompiledMLModel(str(compiled), unit, function)
        return model


class CompiledPackages:
    """Compiled packages in a folder, each at a path made of its content, the versions and the units.

    The system keeps what it prepares for a device by path, so a package is moved there, whole, before it is
    loaded for the first time, and never again.
    """

    def __init__(self, export: Export, runtime: Runtime, units: str, folder: Path) -> None:
        self.export, self.runtime, self.units, self.folder = export, runtime, units, folder
        self._checked: dict[str, dict[str, float]] = {}

    def path(self, package: str) -> Path:
        """Return the compiled form of a package of the export, compiling it if there is none yet.

        Raises CheckpointError where the package is not what the manifest says.
        """
        record = self.export.packages[package]
        facts = f"{record.sha256} {self.runtime.version} {self.units}"
        target = self.folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.mlmodelc"
        if target.is_dir():
            return target
        if describe_package(self.export.folder, package).sha256 != record.sha256:
            raise CheckpointError(
                f"{self.export.folder / package}: is not what was exported (its hash is another); export "
                "again to a new folder"
            )
        make_folder(self.folder)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".compiling-") as scratch:
            made = Path(scratch) / "package.mlmodelc"
            self.runtime.compile(self.export.folder / package, made)
            try:
                move(made, target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
        return target

    def is_checked(self, package: str, function: str) -> bool:
        """Return whether a function's prediction on this machine was compared with the interpreter's."""
        if package not in self._checked:
            self._checked[package] = self._read(package)
        return function in self._checked[package]

    def note_checked(self, package: str, function: str, error: float) -> None:
        """Keep that a function was compared, and how far it was off."""
        known = self._checked[package] = {**self._read(package), function: error}
        write_json(self._notes(package), known, unique=True)

    def _read(self, package: str) -> dict[str, float]:
        try:
            found = json.loads(regular.read_text(self._notes(package)))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _notes(self, package: str) -> Path:
        return self.path(package).with_suffix(".checked.json")
