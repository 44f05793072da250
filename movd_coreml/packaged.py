"""Segments of an export as modules: a package's blobs are its parameters, read as any checkpoint's are.

So the engine streams packages as it streams modules: each segment is loaded, visited and released, its
weights are views of the arena, and `Predict` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from blockstream.checkpoint import Checkpoint, FileStamp, TensorEntry
from blockstream.checkpoint.read.entries import unreadable
from blockstream.errors import CheckpointError
from blockstream.system import regular
from movd_coreml.interpreter import Blob, Function, Package, evaluate, read_records
from movd_coreml.interpreter.types import PACKED_BITS, TORCH, TensorType
from movd_coreml.manifest import Export, Preset, Program, Segment, Stage, Variant
from movd_coreml.manifest import Tensor as Described
from movd_coreml.segments import TORCH_DTYPES

#: Names of dtypes in packages and in checkpoints.
_DTYPES = {
    "BOOL": "BOOL",
    "FLOAT16": "F16",
    "FLOAT32": "F32",
    "BFLOAT16": "BF16",
    "INT8": "I8",
    "INT16": "I16",
    "INT32": "I32",
    "UINT8": "U8",
    "UINT16": "U16",
    "UINT32": "U32",
}
#: Bytes at the start of a weight file that tell what it is.
_HEADER_NBYTES = 64


class PackagedSegment(nn.Module):
    """One segment for one preset: its functions, and their blobs as parameters without values.

    `forward` takes the values of the pass that the manifest names and returns those the segment gives.
    Raises CheckpointError for packages that are not what the manifest says.
    """

    def __init__(
        self,
        export: Export,
        segment: Segment,
        preset: Preset,
        predict: Predict,
        variants: Sequence[Variant] = ("plain",),
    ) -> None:
        super().__init__()
        self.segment, self.predict = segment, predict
        self.programs: dict[Variant, Program] = {v: segment.program(preset.name, v) for v in variants}
        self.packages = {p.package: Package.open(export.package_of(p)) for p in self.programs.values()}
        self.functions: dict[tuple[str, str], Function] = {}
        self._parameter: dict[tuple[str, int], str] = {}
        self.blobs: dict[str, tuple[Path, Blob]] = {}
        for program in self.programs.values():
            self._add(program)

    def _add(self, program: Program) -> None:
        if (program.package, program.function) in self.functions:
            return
        package = self.packages[program.package]
        function = package.function(program.function)
        _require_agreement(package, program, function)
        self.functions[program.package, program.function] = function
        number = list(self.packages).index(program.package)
        for blob in function.blobs:
            name = f"blob_{number}_{blob.offset}"
            self._parameter[program.package, blob.offset] = name
            if name not in self.blobs:
                self.blobs[name] = (package.file(blob.file), blob)
                self.register_parameter(name, _absent(blob))

    def function(self, program: Program) -> Function:
        """Return the function of a program."""
        return self.functions[program.package, program.function]

    def blob(self, program: Program, offset: int, nbytes: int) -> Tensor:
        """Return the bytes of a blob as they lie in memory now, uint8 [nbytes]."""
        parameter = self._parameters[self._parameter[program.package, offset]]
        assert parameter is not None
        return parameter.reshape(-1).view(torch.uint8)

    def forward(self, values: Mapping[str, Tensor], variant: Variant = "plain") -> dict[str, Tensor]:
        """Return the values this segment gives."""
        program = self.programs[variant]
        inputs = {t.name: values[t.value].to(TORCH_DTYPES[t.dtype]).contiguous() for t in program.inputs}
        results = self.predict(self, program, inputs)
        return {t.value: results[t.name] for t in program.outputs}


#: predict(segment, program, inputs): the outputs of a program by name.
Predict = Callable[[PackagedSegment, Program, Mapping[str, Tensor]], Mapping[str, Tensor]]


def interpreted(
    segment: PackagedSegment, program: Program, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Evaluate a program with torch, on the weights that are bound to the segment."""
    return evaluate(segment.function(program), inputs, lambda at, n: segment.blob(program, at, n))


class PackagedStage(nn.Module):
    """The segments of a stage, by their names without what all have in common, and one pass through them."""

    def __init__(
        self,
        export: Export,
        stage: Stage,
        preset: Preset,
        predict: Predict,
        variants: Sequence[Variant] = ("plain",),
    ) -> None:
        super().__init__()
        self.stage = stage
        names = [name.split(".") for name in stage.order]
        folders = zip(*(parts[:-1] for parts in names), strict=False)
        common = len(list(takewhile(lambda level: len(set(level)) == 1, folders)))
        self.paths = tuple(".".join(parts[common:]) for parts in names)
        for path, name in zip(self.paths, stage.order, strict=True):
            segment = PackagedSegment(export, export.segments[name], preset, predict, variants)
            _place(self, path, segment)

    @cached_property
    def segments(self) -> tuple[PackagedSegment, ...]:
        """Return the segments in the order a pass visits them."""
        found = tuple(self.get_submodule(path) for path in self.paths)
        return tuple(s for s in found if isinstance(s, PackagedSegment))

    def run_pass(self, values: Mapping[str, Tensor], variant: Variant = "plain") -> Tensor:
        """Return the stage's output for its inputs."""
        values = dict(values)
        last = {t.value: i for i, s in enumerate(self.segments) for t in s.programs[variant].inputs}
        for i, segment in enumerate(self.segments):
            values.update(segment(values, variant))
            for name in [n for n in values if last.get(n, -1) <= i and n != self.stage.output]:
                del values[name]
        return values[self.stage.output]


def _require_agreement(package: Package, program: Program, function: Function) -> None:
    """Raise CheckpointError where a function does not take and give what the manifest says."""
    described = ((program.inputs, function.inputs), (program.outputs, function.outputs))
    for tensors, types in described:
        names = [t.name for t in tensors]
        wrong = [t for t in tensors if t.name in types and not _agrees(t, types[t.name])]
        if sorted(names) != sorted(types) or wrong:
            says = ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in wrong or tensors)
            has = ", ".join(f"{name} {types[name]}" for name in ([t.name for t in wrong] or types))
            raise CheckpointError(
                f"{package.root}: function {program.function!r} has {has}, and the manifest says {says}; "
                "they do not belong together: export again"
            )


def _agrees(described: Described, declared: TensorType) -> bool:
    """Return whether a tensor's record fits its declared type; dimensions that are open fit any."""
    return declared.fits(described.shape, TORCH_DTYPES[described.dtype])


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, in modules that hold nothing else."""
    *folders, name = path.split(".")
    for folder in folders:
        if not hasattr(root, folder):
            root.add_module(folder, nn.Module())
        root = root.get_submodule(folder)
    root.add_module(name, module)


def _absent(blob: Blob) -> nn.Parameter:
    """Return a parameter of a blob's shape without memory; packed numbers are bytes."""
    packed = blob.type.dtype in PACKED_BITS
    shape = (blob.type.nbytes,) if packed else tuple(n or 0 for n in blob.type.shape)
    dtype = torch.uint8 if packed else TORCH[blob.type.dtype]
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


# -- where the bytes lie ---------------------------------------------------------------------------


def checkpoint_of(
    root: Path, module: nn.Module, tables: Mapping[str, tuple[Path, Sequence[int]]]
) -> Checkpoint:
    """Return the checkpoint of a module made of packaged segments, and of raw float32 `tables` by path.

    Every record is read and held against its program. Raises CheckpointError naming file and record.
    """
    stamps: dict[Path, FileStamp] = {}
    entries: dict[str, TensorEntry] = {}
    for path, segment in module.named_modules():
        if isinstance(segment, PackagedSegment):
            for entry in _entries(path, segment, stamps):
                entries[entry.name] = entry
    for name, (path, shape) in tables.items():
        stamp = _stamp(path, stamps)
        entries[name] = TensorEntry(name, "F32", tuple(shape), stamp, 0, stamp.nbytes)
    return Checkpoint(root, "raw", entries)


def _entries(path: str, segment: PackagedSegment, stamps: dict[Path, FileStamp]) -> Iterator[TensorEntry]:
    by_file: dict[Path, dict[str, Blob]] = {}
    for name, (file, blob) in segment.blobs.items():
        by_file.setdefault(file, {})[name] = blob
    for file, blobs in by_file.items():
        records = read_records(file, blobs.values())
        for name, blob in blobs.items():
            record = records[blob.offset]
            packed = blob.type.dtype in PACKED_BITS
            if not packed and blob.type.dtype not in _DTYPES:
                raise CheckpointError(f"{file}: {blob.name!r} is {blob.type}, which is not streamed")
            yield TensorEntry(
                f"{path}.{name}",
                "U8" if packed else _DTYPES[blob.type.dtype],
                (record.nbytes,) if packed else tuple(n or 0 for n in blob.type.shape),
                _stamp(file, stamps),
                record.offset,
                record.nbytes,
            )


def _stamp(path: Path, stamps: dict[Path, FileStamp]) -> FileStamp:
    if path not in stamps:
        try:
            with regular.opened(path) as stream:
                stamps[path] = FileStamp.take(stream, path, 0, _HEADER_NBYTES)
        except OSError as error:
            raise unreadable(path, error) from error
    return stamps[path]
