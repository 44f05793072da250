"""A package is evaluated as it says, or refused by the name of what is wrong with it."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from blockstream.errors import CheckpointError, ConfigError, ModelError
from movd_coreml.interpreter import FiniteWatch, MappedWeights, Package, evaluate, proto
from movd_coreml.interpreter.program import Blob
from movd_coreml.interpreter.run import blob_tensor
from movd_coreml.interpreter.types import TensorType
from tests.support.written import Written

proto.messages()  # else there is nothing to test with

W = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
X = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 5


def linear(written=None):
    """A program of one linear layer, its weight in the weight file."""
    written = written or Written()
    written.input("x", 3, 4)
    written.constant("w", W)
    written.operation("linear", "y", (3, 5), x="x", weight="w")
    written.output("y")
    return written


def run(folder, inputs=None, function=None, watch=None):
    package = Package.open(folder)
    program = package.function(function)
    with package.weights(program) as weights:
        return evaluate(program, {"x": X} if inputs is None else inputs, weights, watch)


def test_a_package_is_evaluated_with_the_weights_of_its_file(tmp_path):
    (y,) = run(linear().save(tmp_path / "a.mlpackage")).values()
    assert torch.equal(y, X @ torch.from_numpy(W).T)


def test_reading_a_package_imports_the_messages_alone():
    code = (
        "import sys; import movd_coreml.backend; from movd_coreml.interpreter import proto; proto.messages();"
        "assert 'coremltools' not in sys.modules;"
        "from movd_coreml.tools import coremltools;"
        "ours = proto.messages()[0].Model; theirs = coremltools().proto.Model_pb2.Model;"
        "theirs().CopyFrom(ours(specificationVersion=9))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_coremltools_the_error_says_how_to_install_it(monkeypatch):
    proto.messages.cache_clear()
    monkeypatch.setitem(sys.modules, "coremltools", None)
    for name in [n for n in sys.modules if n.startswith(("coremltools.", proto.OWN_NAME))]:
        monkeypatch.delitem(sys.modules, name)
    try:
        with pytest.raises(
            ConfigError, match=r"needs coremltools.*pip install 'blockstream-engine\[coreml\]'"
        ):
            proto.messages()
    finally:
        monkeypatch.undo()
        proto.messages()


def test_each_function_of_a_package_is_found_by_name(tmp_path):
    written = linear(Written("long"))
    written.begin("short")
    written.input("x", 3, 4)
    written.operation("relu", "y", (3, 4), x="x")
    written.output("y")
    written.model.description.defaultFunctionName = "long"
    folder = written.save(tmp_path / "a.mlpackage")
    assert Package.open(folder).functions == ("long", "short")
    assert run(folder)["y"].shape == (3, 5)
    assert torch.equal(run(folder, function="short")["y"], X)
    with pytest.raises(CheckpointError, match="has no function 'main'; there are 'long', 'short'"):
        run(folder, function="main")


def test_dimensions_that_are_open_take_any_size(tmp_path):
    written = Written()
    written.input("x", None, 4)
    written.operation("relu", "y", (None, 4), x="x")
    written.output("y")
    folder = written.save(tmp_path / "a.mlpackage")
    assert run(folder, {"x": torch.ones(7, 4)})["y"].shape == (7, 4)
    with pytest.raises(
        ModelError, match=r"input 'x' is float32\[7, 5\] and the package takes float32\[\?, 4\]"
    ):
        run(folder, {"x": torch.ones(7, 5)})


def test_outputs_share_no_memory_with_weights(tmp_path):
    written = Written()
    written.input("x", 3, 4)
    written.constant("w", W)
    written.operation("transpose", "t", (4, 5), x="w", perm=np.array([1, 0]))
    written.output("w", "t")
    package = Package.open(written.save(tmp_path / "a.mlpackage"))
    function = package.function()
    with package.weights(function) as weights:
        out = evaluate(function, {"x": X}, weights)
        mine = weights(function.blobs[0].offset, W.nbytes).untyped_storage()._cdata
        assert all(value.untyped_storage()._cdata != mine for value in out.values())
    assert torch.equal(out["w"].T, out["t"])


def test_values_go_as_soon_as_nothing_needs_them(tmp_path):
    written = Written()
    written.input("x", 3, 4)
    for n in range(4):
        written.operation("relu", f"y{n}", (3, 4), x=f"y{n - 1}" if n else "x")
    written.output("y1", "y3")
    function = Package.open(written.save(tmp_path / "a.mlpackage")).function()
    assert [op.drops for op in function.operations] == [("x",), ("y0",), (), ("y2",)]


def test_numbers_that_are_none_are_blamed_on_the_operation_they_began_in(tmp_path):
    written = Written()
    written.input("x", 3, 4)
    written.operation("square", "big", (3, 4), x="x")
    written.operation("cast", "half", (3, 4), "FLOAT16", x="big", dtype=np.array("fp16"))
    written.operation("rsqrt", "y", (3, 4), "FLOAT16", x="half", epsilon=np.float32(0))
    written.operation("relu", "z", (3, 4), "FLOAT16", x="y")
    written.output("z")
    watch = FiniteWatch()
    run(written.save(tmp_path / "a.mlpackage"), {"x": torch.full((3, 4), 300.0)}, watch=watch)
    assert [str(found) for found in watch.found] == ["cast 'half': 0 NaN, 12 infinite"]
    watch = FiniteWatch()
    run(tmp_path / "a.mlpackage", {"x": torch.tensor([0.0, 1, 2, 300]).expand(3, 4)}, watch=watch)
    assert [(found.operation, found.began) for found in watch.found] == [
        ("half", True),
        ("y", False),
        ("z", False),
    ]
    assert [str(found) for found in watch.causes] == ["cast 'half': 0 NaN, 3 infinite"]
    assert str(watch.found[-1]) == "relu 'z': 0 NaN, 3 infinite, as were its inputs"


def test_four_bit_numbers_are_unpacked_low_bits_first():
    blob = Blob("w", "f", 64, TensorType("INT4", (2, 2)))
    data = torch.tensor([0x71, 0x8F], dtype=torch.uint8)
    assert blob_tensor(blob, lambda offset, nbytes: data).tolist() == [[1, 7], [-1, -8]]


def test_the_identity_of_a_package_is_that_of_its_bytes(tmp_path):
    a, b = (linear().save(tmp_path / name) for name in ("a.mlpackage", "b.mlpackage"))
    (b / "Manifest.json").write_text((b / "Manifest.json").read_text() + "\n")
    assert Package.open(a).identity == Package.open(b).identity
    weights = b / "Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert Package.open(a).identity != Package.open(b).identity


# -- what is wrong with a package -------------------------------------------------------------------


def folder_of(tmp_path):
    return linear().save(tmp_path / "a.mlpackage")


def test_a_folder_that_is_no_package_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no folder; name a \.mlpackage"):
        Package.open(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds no Manifest\.json but notes\.txt"):
        Package.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "does not say which of its items is the model"),
        ('{"rootModelIdentifier": "A", "itemInfoEntries": {}}', "rootModelIdentifier 'A'"),
        ('{"rootModelIdentifier": "A", "itemInfoEntries": {"A": {"path": "../../x"}}}', "only files inside"),
        ('{"rootModelIdentifier": "A", "itemInfoEntries": {"A": {"path": "x/y"}}}', "which is not there"),
    ],
)
def test_a_manifest_that_names_no_model_is_refused(tmp_path, text, said):
    folder = folder_of(tmp_path)
    (folder / "Manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        Package.open(folder)


def test_a_model_file_that_is_none_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    model = folder / "Data/com.apple.CoreML/model.mlmodel"
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is not a Core ML model"):
        run(folder)
    spec = proto.messages()[0].Model(specificationVersion=5)
    spec.neuralNetwork.SetInParent()
    model.write_bytes(spec.SerializeToString())
    with pytest.raises(CheckpointError, match="type neuralNetwork, and only ML programs are evaluated"):
        run(folder)


def cut(weights, offset):
    del weights[-80:]


def gone(weights, offset):
    del weights[offset + 10 :]


def lies_of_bytes(weights, offset):
    weights[offset + 8 : offset + 16] = (1 << 50).to_bytes(8, "little")


def lies_of_dtype(weights, offset):
    weights[offset + 4] = 1


def lies_of_place(weights, offset):
    weights[offset + 16 : offset + 24] = (1 << 40).to_bytes(8, "little")


def misplaced(weights, offset):
    weights[offset + 16] += 4


def no_record(weights, offset):
    weights[offset] ^= 0xFF


def other_version(weights, offset):
    weights[4] = 7


def empty(weights, offset):
    weights.clear()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "says its 80 bytes begin at 128, and the file ends at byte 176: it was cut short"),
        (gone, "lies past the file's 74 bytes: it was cut short"),
        (
            lies_of_bytes,
            "says 1125899906842624 bytes of FLOAT32, and the program declares float32[5, 4], 80 bytes",
        ),
        (lies_of_dtype, "says 80 bytes of FLOAT16, and the program declares float32[5, 4]"),
        (lies_of_place, "begin at 1099511627776, and the file ends at byte 256"),
        (misplaced, "puts its data at byte 132, no multiple of 64"),
        (no_record, "begins with 0xdeadbe10, not 0xdeadbeef"),
        (other_version, "is a weight file of version 7, version 2 is read"),
        (empty, "has 0 bytes and no header"),
    ],
)
def test_a_damaged_weight_file_is_refused_before_it_is_used(tmp_path, damage, said):
    written = Written()
    written.input("x", 3, 4)
    offset = written.constant("w", W)
    written.operation("linear", "y", (3, 5), x="x", weight="w")
    written.output("y")
    damage(written.weights, offset)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        run(written.save(tmp_path / "a.mlpackage"))


def test_a_weight_file_that_is_not_there_is_named(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "Data/com.apple.CoreML/weights/weight.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the weight file weight\.bin; copy the package whole"):
        run(folder)


def test_a_record_that_was_not_checked_is_not_read(tmp_path):
    package = Package.open(folder_of(tmp_path))
    function = package.function()
    path = package.file(function.weight_file)
    with (
        MappedWeights(path, function.blobs) as weights,
        pytest.raises(CheckpointError, match="no open record"),
    ):
        weights(64, 8)


def edited(change):
    written = linear()
    change(written)
    return written


def undeclared(written):
    written.block.operations[1].inputs["weight"].arguments[0].name = "v"


def later(written):
    written.block.operations.reverse()


def twice(written):
    written.block.operations.add().CopyFrom(written.block.operations[1])


def other_shape(written):
    written.block.operations[1].outputs[0].type.tensorType.dimensions[1].constant.size = 6


def other_dtype(written):
    written.block.operations[1].outputs[0].type.tensorType.dataType = 10


def other_rank(written):
    written.block.operations[1].outputs[0].type.tensorType.rank = 3


def unknown_type(written):
    written.block.operations[1].outputs[0].type.tensorType.dataType = 99


def unknown_operation(written):
    written.block.operations[1].type = "linear_quantum"


def foreign_input(written):
    written.block.operations[1].inputs["speed"].arguments.add(name="x")


def no_input(written):
    del written.block.operations[1].inputs["x"]


def two_values(written):
    written.block.operations[1].inputs["x"].arguments.add(name="x")


def no_value(written):
    del written.block.operations[0].attributes["val"]


def no_output(written):
    written.block.outputs[0] = "z"


def control_flow(written):
    written.block.operations[1].blocks.add()


def no_block(written):
    written.function.opset = "CoreML5"


def outside(written):
    written.block.operations[0].attributes["val"].blobFileValue.fileName = "@model_path/../../secret"


def elsewhere(written):
    written.block.operations[0].attributes["val"].blobFileValue.fileName = "/etc/passwd"


def larger_constant(written):
    constant = written.block.operations[0]
    for message in (constant.outputs[0].type, constant.attributes["val"].type):
        message.tensorType.dimensions[0].constant.size = 50


def not_matching(written):
    constant = written.block.operations[0]
    for message in (constant.outputs[0].type, constant.attributes["val"].type):
        message.tensorType.dimensions[0].constant.size = 4
        message.tensorType.dimensions[1].constant.size = 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            undeclared,
            "a.mlpackage (main): operation linear 'y', input 'weight': names 'v', which is declared nowhere",
        ),
        (later, "names 'w', which is declared nowhere before"),
        (twice, "declares 'y' again"),
        (other_shape, "operation linear 'y' declares 'y' as float32[3, 6] and computes float32[3, 5]"),
        (other_dtype, "declares 'y' as float16[3, 5] and computes float32[3, 5]"),
        (other_rank, "declares rank 3 and 2 dimensions"),
        (unknown_type, "has the unknown data type 99"),
        (unknown_operation, "operation linear_quantum 'y': is not one of the"),
        (foreign_input, "has inputs ['speed'] that are not evaluated; it takes ['bias', 'weight', 'x']"),
        (no_input, "lacks its inputs ['x']"),
        (two_values, "input 'x': has 2 values, expected one"),
        (no_value, "is a constant without a value"),
        (no_output, "returns 'z', which is declared nowhere"),
        (control_flow, "control flow is not evaluated"),
        (no_block, "has no block for its operation set 'CoreML5' but CoreML8"),
        (outside, "names the file '../../secret'; only files inside its own folder are read"),
        (elsewhere, "names the weight file '/etc/passwd', expected one under @model_path/"),
        (larger_constant, "says 80 bytes of FLOAT32, and the program declares float32[50, 4], 800 bytes"),
        (not_matching, "operation linear 'y' cannot be computed of weight float32[4, 5], x float32[3, 4]"),
    ],
)
def test_an_edited_program_is_refused_by_the_name_of_the_operation(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        run(edited(change).save(tmp_path / "a.mlpackage"))


@pytest.mark.parametrize("given", [{}, {"x": X, "y": X}, {"y": X}])
def test_other_inputs_than_declared_are_refused(tmp_path, given):
    with pytest.raises(ModelError, match=r"takes the inputs \['x'\] and was given"):
        run(folder_of(tmp_path), given)


@pytest.mark.parametrize("x", [X[:2], X.half(), X[None], X.int()])
def test_inputs_of_another_size_or_dtype_are_refused(tmp_path, x):
    with pytest.raises(
        ModelError, match=r"the package takes float32\[3, 4\]; it was exported for another size"
    ):
        run(folder_of(tmp_path), {"x": x})


def test_what_an_operation_does_not_do_is_said_with_its_name(tmp_path):
    written = Written()
    written.input("x", 3, 4)
    written.operation("gelu", "y", (3, 4), x="x", mode=np.array("SOFT"))
    written.output("y")
    with pytest.raises(
        ModelError, match=r"a.mlpackage \(main\): operation gelu 'y': gelu has no mode 'SOFT'"
    ):
        run(written.save(tmp_path / "a.mlpackage"))


def test_a_constant_shorter_than_declared_is_refused(tmp_path):
    written = Written()
    written.input("x", 3, 4)
    written.constant("c", np.ones(4, np.float32), blob=False)
    written.block.operations[0].attributes["val"].immediateValue.tensor.floats.values.pop()
    written.operation("add", "y", (3, 4), x="x", y="c")
    written.output("y")
    with pytest.raises(CheckpointError, match=r"const 'c': holds 3 floats, and float32\[4\] was declared"):
        run(written.save(tmp_path / "a.mlpackage"))
