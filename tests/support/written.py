"""Packages written by hand, message by message: small, and as wrong as a test wants them."""

import json
import struct

import numpy as np

from movd_coreml.interpreter.proto import messages

DTYPES = {"float32": ("FLOAT32", 2), "float16": ("FLOAT16", 1), "int32": ("INT32", 14), "int8": ("INT8", 4)}


class Written:
    """A program that grows by operations; `save` writes its package."""

    def __init__(self, function="main"):
        model, mil = messages()
        self.mil = mil
        self.model = model.Model(specificationVersion=9)
        self.weights = bytearray(struct.pack("<II", 0, 2).ljust(64, b"\0"))
        self.begin(function)

    def begin(self, function):
        """Go on with another function."""
        self.function = self.model.mlProgram.functions[function]
        self.function.opset = "CoreML8"
        self.block = self.function.block_specializations["CoreML8"]
        return self

    def type(self, message, dtype, shape):
        message.tensorType.dataType = self.mil.DataType.Value(dtype)
        message.tensorType.rank = len(shape)
        for n in shape:
            dimension = message.tensorType.dimensions.add()
            if n is None:
                dimension.unknown.variadic = False
            else:
                dimension.constant.size = n

    def input(self, name, *shape, dtype="FLOAT32"):
        value = self.function.inputs.add(name=name)
        self.type(value.type, dtype, shape)
        return name

    def output(self, *names):
        self.block.outputs.extend(names)

    def operation(self, kind, name, shape, gives="FLOAT32", /, **inputs):
        """Add an operation of one result; inputs are names, lists of names, or arrays."""
        op = self.block.operations.add(type=kind)
        self.type(op.outputs.add(name=name).type, gives, shape)
        for key, given in inputs.items():
            for one in given if isinstance(given, list) else [given]:
                binding = op.inputs[key].arguments.add()
                if isinstance(one, str):
                    binding.name = one
                else:
                    self.immediate(binding.value, one)
        return op

    def immediate(self, value, array):
        array = np.asarray(array)
        if array.dtype.kind == "U":
            self.type(value.type, "STRING", array.shape)
            value.immediateValue.tensor.strings.values.extend([str(array)])
            return
        if array.dtype == bool:
            self.type(value.type, "BOOL", array.shape)
            value.immediateValue.tensor.bools.values.extend(array.reshape(-1).tolist())
        elif array.dtype.kind == "i":
            self.type(value.type, "INT32", array.shape)
            value.immediateValue.tensor.ints.values.extend(array.reshape(-1).tolist())
        else:
            self.type(value.type, "FLOAT32", array.shape)
            value.immediateValue.tensor.floats.values.extend(array.reshape(-1).tolist())

    def constant(self, name, array, blob=True):
        """Add a constant, in the weight file unless told otherwise; return the offset of its record."""
        array = np.asarray(array)
        dtype, _ = DTYPES.get(str(array.dtype), ("FLOAT32", 2))
        op = self.block.operations.add(type="const")
        self.type(op.outputs.add(name=name).type, dtype, array.shape)
        value = op.attributes["val"]
        if not blob:
            self.immediate(value, array)
            return None
        self.type(value.type, dtype, array.shape)
        value.blobFileValue.fileName = "@model_path/weights/weight.bin"
        value.blobFileValue.offset = self.record(array)
        return value.blobFileValue.offset

    def record(self, array):
        """Append a record to the weight file; return its offset."""
        at = len(self.weights)
        number = DTYPES[str(array.dtype)][1]
        self.weights += struct.pack("<IIQQQ", 0xDEADBEEF, number, array.nbytes, at + 64, 0).ljust(64, b"\0")
        self.weights += array.tobytes() + b"\0" * (-array.nbytes % 64)
        return at

    def save(self, folder):
        data = folder / "Data" / "com.apple.CoreML"
        (data / "weights").mkdir(parents=True)
        (data / "model.mlmodel").write_bytes(self.model.SerializeToString())
        (data / "weights" / "weight.bin").write_bytes(self.weights)
        entry = {"path": "com.apple.CoreML/model.mlmodel", "name": "model.mlmodel"}
        manifest = {"rootModelIdentifier": "A", "itemInfoEntries": {"A": entry}}
        (folder / "Manifest.json").write_text(json.dumps(manifest))
        return folder
