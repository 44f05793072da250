"""Core ML itself as a backend, on macOS: segments are loaded, asked for a prediction and released by visit.

Prediction has not been run on a Mac: see `movd_coreml.compiled`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockstream.engine.store import Loading, Store, StoreAround, Whole
from blockstream.errors import BlockstreamError, ModelError, SegmentLoadError
from blockstream.plan.loads import Load
from blockstream.system.cache import cache_folder
from movd_coreml.backend import PackagesBackend
from movd_coreml.compiled import CompiledPackages, CoreML, Loaded, Runtime
from movd_coreml.interpreter import evaluate
from movd_coreml.manifest import Program
from movd_coreml.options import CoreMLOptions
from movd_coreml.packaged import PackagedSegment, Predict, interpreted

#: How far a first prediction may be from the interpreter's, relative to the largest number. Devices round in
#: other places: this finds wrong results, not rounding.
TOLERANCE = {"fp32": 1e-2, "fp16": 5e-2}


class CoreMLHandle:
    """One segment in memory: the function it was used for last at once, others when they are asked for."""

    def __init__(self, store: CoreMLStore, segment: PackagedSegment) -> None:
        self.segment = segment
        self._store = store
        self._models: dict[tuple[str, str], Loaded] = {}

    def model(self, program: Program) -> Loaded:
        """Return the function of a program, loading it where it is not there."""
        key = program.package, program.function
        if key not in self._models:
            several = len(self.segment.packages[program.package].functions) > 1
            compiled = self._store.compiled
            function = program.function if several else None
            self._models[key] = compiled.runtime.load(
                compiled.path(program.package), compiled.units, function
            )
        return self._models[key]

    def read(self) -> None:
        """Do nothing: the models are there."""

    def release(self) -> None:
        """Let the models go."""
        self._store.forget(self)
        self._models.clear()


class CoreMLStore:
    """Loads the packaged segments of one network, and passes the rest on to the store of files. A `Store`.

    What a model holds is Core ML's; the room a plan has for it stays empty and stands for it.
    """

    def __init__(self, files: Store, network: nn.Module, compiled: CompiledPackages) -> None:
        self.compiled = compiled
        self._files = files
        self._segments = {n: m for n, m in network.named_modules() if isinstance(m, PackagedSegment)}
        self._live: dict[PackagedSegment, list[CoreMLHandle]] = {}
        self._last: dict[PackagedSegment, Program] = {}
        self._lock = threading.Lock()

    def begin(self, load: Load) -> Loading:
        """Begin a load: of Core ML's all happens at its end."""
        module = self._segments.get(load.segment.name)
        return self._files.begin(load) if module is None else Whole(partial(self._load, load, module))

    def _load(self, load: Load, module: PackagedSegment) -> CoreMLHandle:
        """Return a segment with a function in memory. Raises SegmentLoadError naming segment and cause."""
        stage, segment = load.stage, load.segment.name
        handle = CoreMLHandle(self, module)
        try:
            handle.model(self._last.get(module, module.programs["plain"]))
        except BlockstreamError as error:
            raise SegmentLoadError(f"{stage}: segment {segment!r}: {error}") from error
        except Exception as error:  # what Core ML raises has no type of its own
            raise SegmentLoadError(
                f"{stage}: segment {segment!r}: Core ML could not load it: {error}; try other compute_units"
            ) from error
        with self._lock:
            self._live.setdefault(module, []).append(handle)
        return handle

    def handle(self, segment: PackagedSegment, program: Program) -> CoreMLHandle:
        """Return the handle of a segment in use, which computes a program now."""
        self._last[segment] = program
        with self._lock:
            handles = self._live.get(segment)
            if not handles:
                raise ModelError(f"segment {segment.segment.name} computes and is not loaded")
            return handles[0]

    def forget(self, handle: CoreMLHandle) -> None:
        """Take note that a handle was released."""
        with self._lock:
            handles = self._live.get(handle.segment, [])
            if handle in handles:
                handles.remove(handle)

    def close(self) -> None:
        """Forget everything; the store of files is its owner's."""
        with self._lock:
            self._live.clear()


class CoreMLBackend(PackagesBackend):
    """An export whose segments Core ML computes."""

    def __init__(self, options: CoreMLOptions, runtime: Runtime | None = None) -> None:
        runtime = runtime or CoreML()
        super().__init__(Path(options.packages))
        self.check = options.check
        folder = cache_folder() / "movd" / "coreml"
        self.compiled = CompiledPackages(self.export, runtime, options.compute_units, folder)
        self._stores: dict[PackagedSegment, CoreMLStore] = {}

    def __deepcopy__(self, memo: object) -> CoreMLBackend:
        """Stay the same: networks are copied to be run without data, what computes them is not."""
        return self

    def around(self, network: nn.Module) -> StoreAround:
        """Return what makes the store of a network."""

        def make(files: Store) -> Store:
            store = CoreMLStore(files, network, self.compiled)
            self._stores.update({m: store for m in network.modules() if isinstance(m, PackagedSegment)})
            return store

        return make

    @property
    def predict(self) -> Predict:
        """Return what computes a segment."""
        return self._predict

    def _predict(
        self, segment: PackagedSegment, program: Program, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if segment not in self._stores:  # a copy without data, run to count operations
            return interpreted(segment, program, inputs)
        model = self._stores[segment].handle(segment, program).model(program)
        made = model.predict({name: value.numpy() for name, value in inputs.items()})
        outputs = {t.name: _tensor(segment, made, t.name) for t in program.outputs}
        if self.check and not self.compiled.is_checked(program.package, program.function):
            self._compare(segment, program, inputs, outputs)
        return outputs

    def _compare(
        self,
        segment: PackagedSegment,
        program: Program,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Compare a prediction with the interpreter's; ModelError where it is another result."""
        function, package = segment.function(program), segment.packages[program.package]
        with package.weights(function) as weights:
            expected = evaluate(function, inputs, weights)
        error = max(difference(outputs[name], expected[name]) for name in expected)
        most = TOLERANCE[segment.segment.precision]
        if not error <= most:
            raise ModelError(
                f"{program.package} ({program.function}): Core ML's first prediction differs from the "
                f"interpreter's by {error:.2g} of the largest number, at most {most:g} is expected; try "
                "other compute_units, or backend coreml-interpreter"
            )
        self.compiled.note_checked(program.package, program.function, error)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected number; infinite for NaN or infinity."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    largest = float(expected.abs().max()) or 1.0
    return float((found.float() - expected.float()).abs().max()) / largest


def _tensor(segment: PackagedSegment, made: Mapping[str, Any], name: str) -> Tensor:
    """Return an output of Core ML as a tensor of its own."""
    if name not in made:
        raise ModelError(
            f"{segment.segment.name}: Core ML returned {sorted(made)} and no {name!r}; export it again"
        )
    return torch.from_numpy(np.array(made[name]))
