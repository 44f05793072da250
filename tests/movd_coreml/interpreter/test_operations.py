"""Every operation is what coremltools computes where it folds constants, else what torch computes."""

import numpy as np
import pytest
import torch
from torch import nn

from blockstream.errors import ModelError
from movd_coreml import tools
from movd_coreml.interpreter.operations import OPERATORS

A = np.random.default_rng(0)
X = A.standard_normal((2, 3, 4, 6)).astype(np.float32)
Y = A.standard_normal((3, 1, 6)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
SMALL = np.clip(X / 3, -0.9, 0.9)
WHOLE = A.integers(-9, 9, (2, 3, 4)).astype(np.int32)
DIVISOR = np.array([2, -3, 4, 5], np.int32)
TRUE = X > 0
ROWS = np.array([[0, -1, 2], [1, 1, 0]], np.int32)

UNARY = """abs atan ceil cos cosh erf exp exp2 floor identity relu relu6 sigmoid sign sin sinh softplus
    softsign square tan tanh"""
BINARY = "add equal greater greater_equal less less_equal maximum minimum mul not_equal sub"
REDUCED = [
    (f"reduce_{name}", {"x": POSITIVE, "axes": axes, "keep_dims": keep})
    for name in [
        "l1_norm",
        "l2_norm",
        "log_sum",
        "log_sum_exp",
        "max",
        "mean",
        "min",
        "prod",
        "sum",
        "sum_square",
    ]
    for axes, keep in (([1, -1], True), ([0], False))
]
SLICES = [
    {"begin": [0, 1, 0, 2], "end": [2, 3, 4, 6], "stride": [1, 1, 2, 3]},
    {"begin": [1, 0, -3, 0], "end": [0, 0, -1, 0], "squeeze_mask": [True, False, False, False],
     "begin_mask": [False, True, False, True], "end_mask": [False, True, False, True]},
    {"begin": [0, 0, 3, 5], "end": [2, 3, 0, 0], "stride": [1, 1, -1, -2],
     "end_mask": [False, False, False, True]},
]  # fmt: skip
CASES = [
    *((name, {"x": X}) for name in UNARY.split()),
    *((name, {"x": X, "y": Y}) for name in BINARY.split()),
    *REDUCED,
    ("acos", {"x": SMALL}),
    ("asin", {"x": SMALL}),
    ("sqrt", {"x": POSITIVE}),
    ("rsqrt", {"x": POSITIVE, "epsilon": np.float32(0.1)}),
    ("inverse", {"x": POSITIVE, "epsilon": np.float32(0.1)}),
    ("log", {"x": POSITIVE, "epsilon": np.float32(0.1)}),
    ("clip", {"x": X, "alpha": np.float32(-0.5), "beta": np.float32(0.25)}),
    ("threshold", {"x": X, "alpha": np.float32(0.3)}),
    ("leaky_relu", {"x": X, "alpha": np.float32(0.2)}),
    ("elu", {"x": X, "alpha": np.float32(0.7)}),
    ("round", {"x": X * 3}),
    ("gelu", {"x": X, "mode": "EXACT"}),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}),
    ("softmax", {"x": X, "axis": 1}),
    ("pow", {"x": POSITIVE, "y": Y}),
    ("mod", {"x": X, "y": Y}),
    ("mod", {"x": WHOLE, "y": DIVISOR}),
    ("real_div", {"x": X, "y": Y}),
    ("floor_div", {"x": X, "y": Y}),
    ("floor_div", {"x": WHOLE, "y": DIVISOR}),
    ("add", {"x": WHOLE, "y": np.int32(3)}),
    *((f"logical_{name}", {"x": TRUE, "y": ~TRUE[:, :, :, ::-1]}) for name in ("and", "or", "xor")),
    ("logical_not", {"x": TRUE}),
    ("select", {"cond": TRUE, "a": X, "b": -POSITIVE}),
    ("cast", {"x": X, "dtype": "int32"}),
    ("cast", {"x": WHOLE, "dtype": "fp16"}),
    ("cast", {"x": X, "dtype": "bool"}),
    ("reduce_argmax", {"x": X, "axis": 2, "keep_dims": True}),
    ("reduce_argmin", {"x": X, "axis": -1, "keep_dims": False}),
    ("cumsum", {"x": X, "axis": 2}),
    ("cumsum", {"x": X, "axis": 3, "reverse": True}),
    ("layer_norm",
     {"x": X, "axes": [-1], "gamma": X[0, 0, 0], "beta": X[1, 0, 0], "epsilon": np.float32(1e-3)}),
    ("layer_norm", {"x": X, "axes": [2, 3], "epsilon": np.float32(1e-3)}),
    ("l2_norm", {"x": X, "epsilon": np.float32(0.5)}),
    ("linear", {"x": X, "weight": X[0, 0], "bias": X[0, 0, :, 0]}),
    ("matmul", {"x": X, "y": X[:, :1], "transpose_x": False, "transpose_y": True}),
    ("reshape", {"x": X, "shape": [0, -1, 2]}),
    ("transpose", {"x": X, "perm": [2, 0, -1, 1]}),
    ("squeeze", {"x": X[:1, :, :1], "axes": [0, -2]}),
    ("squeeze", {"x": X[:1, :, :1]}),
    ("expand_dims", {"x": X[0, 0], "axes": [0, -1]}),
    ("concat", {"values": (X, X[:, :2]), "axis": 1}),
    ("stack", {"values": (X, -X), "axis": 1}),
    ("stack", {"values": (X, -X), "axis": -1}),
    ("split", {"x": X, "num_splits": 2, "axis": -1}),
    ("split", {"x": X, "split_sizes": [1, 3], "axis": 2}),
    *(("slice_by_index", {"x": X, **where}) for where in SLICES),
    ("slice_by_size", {"x": X, "begin": [0, 1, 1, 2], "size": [-1, 2, 2, -1]}),
    ("tile", {"x": X[0, 0], "reps": [2, 3]}),
    ("shape", {"x": X}),
    ("fill", {"shape": [2, 3], "value": np.float32(1.5)}),
    ("range_1d", {"end": np.int32(11), "start": np.int32(2), "step": np.int32(3)}),
    ("range_1d", {"end": np.float32(2.0), "start": np.float32(0.0), "step": np.float32(0.5)}),
    ("gather", {"x": X, "indices": ROWS, "axis": 1}),
    ("gather", {"x": X, "indices": np.array([[3, 0], [1, -1]], np.int32), "axis": 2, "batch_dims": 1}),
    ("gather", {"x": X[0, 0, 0], "indices": np.int32(-2), "axis": 0}),
    ("gather_along_axis", {"x": X[0, 0], "indices": np.array([[1] * 6, [-1] * 6], np.int32), "axis": 0}),
    ("band_part", {"x": X, "lower": 1, "upper": 0}),
    ("band_part", {"x": X, "lower": -1, "upper": 2}),
    ("reverse", {"x": X, "axes": [1, -1]}),
    ("reverse", {"x": X}),
    ("pad", {"x": X, "pad": [1, 2, 0, 3], "mode": "constant", "constant_val": np.float32(2)}),
    ("pad", {"x": X, "pad": [2, 1, 0, 3], "mode": "reflect"}),
    ("pad", {"x": X, "pad": [1, 2, 0, 3], "mode": "replicate"}),
    ("scaled_dot_product_attention",
     {"query": X, "key": X[:, :, :3], "value": X[:, :, 1:], "attn_mask": X[..., :3] * 4}),
    ("scaled_dot_product_attention",
     {"query": X, "key": X[:, :, :3], "value": X[:, :, 1:],
      "attn_mask": np.array([[True, False, True]] * 4)}),
]  # fmt: skip


def computed(name, given):
    """Return the results of one operation of ours, as arrays."""
    operator = OPERATORS[name]
    assert not operator.mismatch(given)
    tensors = {
        key: tuple(torch.from_numpy(v.copy()) for v in value)
        if isinstance(value, tuple)
        else value
        if isinstance(value, str)
        else torch.as_tensor(np.array(value))
        for key, value in given.items()
    }
    return [result.numpy() for result in operator(tensors)]


@pytest.fixture(name="builder", scope="module")
def _builder():
    ct = tools.coremltools()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function

    with tools.quiet(), Function({}, opset_version=ct.target.iOS18):
        yield Builder


@pytest.mark.parametrize(("name", "given"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_an_operation_is_what_coremltools_computes_of_constants(builder, name, given):
    with np.errstate(all="ignore"):
        made = getattr(builder, name)(**given)
    expected = [v.val for v in (made if isinstance(made, tuple | list) else [made])]
    assert all(v is not None for v in expected), "coremltools does not compute this one"
    found = computed(name, given)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == np.shape(b)
        assert a.dtype == np.asarray(b).dtype
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def parameters(module):
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_that_of_torch(n, groups):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][n - 1](4, 6, 3, stride=2, padding=1, dilation=2, groups=groups)
    x = torch.randn(2, 4, *[9, 8, 7][:n])
    given = {"x": x.numpy(), **parameters(conv), "strides": [2] * n, "pad_type": "custom",
             "pad": [1] * 2 * n, "dilations": [2] * n, "groups": groups}  # fmt: skip
    np.testing.assert_allclose(computed("conv", given)[0], conv(x).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(("kind", "stride"), [("same", 1), ("same", 2), ("same_lower", 2)])
def test_a_convolution_pads_unevenly_where_it_must(kind, stride):
    x, w = torch.randn(1, 2, 7, 8), torch.randn(3, 2, 4, 3)
    found = computed("conv", {"x": x.numpy(), "weight": w.numpy(), "strides": [stride] * 2, "pad_type": kind})
    assert found[0].shape[2:] == (-(-7 // stride), -(-8 // stride))
    rows = 4 - 1 if stride == 1 else (4 - 1) * 2 + 4 - 7
    columns = 3 - 1 if stride == 1 else (4 - 1) * 2 + 3 - 8
    around = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
    if kind == "same_lower":
        around = [around[1], around[0], around[3], around[2]]
    expected = nn.functional.conv2d(nn.functional.pad(x, around), w, stride=stride)
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_transposed_convolution_is_that_of_torch(n):
    kind = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][n - 1]
    conv = kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    x = torch.randn(2, 4, *[5, 4, 3][:n])
    y = conv(x)
    given = {"x": x.numpy(), **parameters(conv), "strides": [2] * n, "pad_type": "custom",
             "pad": [1] * 2 * n, "output_shape": list(y.shape), "groups": 2}  # fmt: skip
    np.testing.assert_allclose(computed("conv_transpose", given)[0], y.detach().numpy(), atol=1e-5)


def test_what_no_input_of_a_transposed_convolution_reaches_is_its_bias():
    x, w, b = torch.randn(1, 1, 2), torch.randn(1, 1, 1), torch.tensor([7.0])
    given = {
        "x": x.numpy(),
        "weight": w.numpy(),
        "bias": b.numpy(),
        "strides": [3],
        "output_shape": [1, 1, 6],
    }
    y = nn.functional.conv_transpose1d(x, w, b, stride=3, output_padding=2)
    np.testing.assert_allclose(computed("conv_transpose", given)[0], y.numpy())


X_ = torch.from_numpy(X)
WIDE = torch.arange(2 * 12 * 2 * 3, dtype=torch.float32).reshape(2, 12, 2, 3)
LIKE_TORCH = [
    ("silu", {"x": X}, nn.functional.silu(X_)),
    ("instance_norm", {"x": X, "gamma": X[0, :, 0, 0], "beta": X[0, :, 1, 0]},
     nn.functional.instance_norm(X_, weight=X_[0, :, 0, 0], bias=X_[0, :, 1, 0])),
    ("batch_norm", {"x": X, "mean": X[0, :, 0, 0], "variance": POSITIVE[0, :, 0, 0], "beta": X[0, :, 1, 0]},
     nn.functional.batch_norm(
         X_, X_[0, :, 0, 0], torch.from_numpy(POSITIVE[0, :, 0, 0]), bias=X_[0, :, 1, 0])),
    ("layer_norm", {"x": X, "axes": [1], "gamma": X[0, :, 0, 0], "beta": X[0, :, 1, 0]},
     nn.functional.layer_norm(X_.movedim(1, -1), (3,), X_[0, :, 0, 0], X_[0, :, 1, 0]).movedim(-1, 1)),
    ("pixel_shuffle", {"x": WIDE.numpy(), "upscale_factor": 2}, nn.functional.pixel_shuffle(WIDE, 2)),
    ("pixel_unshuffle", {"x": X, "downscale_factor": 2}, nn.functional.pixel_unshuffle(X_, 2)),
    ("upsample_nearest_neighbor", {"x": X, "scale_factor_height": 2, "scale_factor_width": 3},
     X_.repeat_interleave(2, 2).repeat_interleave(3, 3)),
    ("upsample_bilinear", {"x": X, "scale_factor_height": np.float32(2), "scale_factor_width": np.float32(3),
                           "align_corners": False},
     nn.functional.interpolate(X_, scale_factor=(2, 3), mode="bilinear", align_corners=False)),
    ("max_pool", {"x": X, "kernel_sizes": [3, 2], "strides": [2, 1], "pad_type": "custom", "pad": [1] * 4},
     nn.functional.max_pool2d(X_, (3, 2), (2, 1), 1)),
    ("avg_pool", {"x": X, "kernel_sizes": [3, 2], "strides": [2, 1], "pad_type": "custom", "pad": [1] * 4,
                  "exclude_padding_from_average": True},
     nn.functional.avg_pool2d(X_, (3, 2), (2, 1), 1, count_include_pad=False)),
    ("avg_pool", {"x": X, "kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "valid"},
     nn.functional.avg_pool2d(X_, 2)),
    ("einsum", {"values": (X, X), "equation": "nchw,nkhw->nchk"}, torch.einsum("nchw,nkhw->nchk", X_, X_)),
    ("cumsum", {"x": X, "axis": 3, "exclusive": True, "reverse": True},
     X_.flip(3).cumsum(3).flip(3) - X_),
    ("concat", {"values": (X, -X), "axis": 2, "interleave": True}, torch.stack((X_, -X_), 3).flatten(2, 3)),
    ("one_hot", {"indices": np.array([[0, 2], [1, 1]], np.int32), "one_hot_vector_size": 3, "axis": 1,
                 "on_value": np.float32(5), "off_value": np.float32(-1)},
     nn.functional.one_hot(torch.tensor([[0, 2], [1, 1]]), 3).movedim(-1, 1) * 6.0 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "expected"), LIKE_TORCH, ids=[case[0] for case in LIKE_TORCH])
def test_an_operation_is_that_of_torch(name, given, expected):
    found = computed(name, given)[0]
    assert found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_blocks_of_channels_move_to_places_and_back():
    wide = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
    flat = computed("depth_to_space", {"x": wide, "block_size": 2})[0]
    assert flat.tolist() == [[[[0, 2], [4, 6]], [[1, 3], [5, 7]]]]
    assert computed("space_to_depth", {"x": flat, "block_size": 2})[0].tolist() == wide.tolist()


CONSTANTS = [
    ("constexpr_blockwise_shift_scale",
     {"data": A.integers(-127, 127, (4, 6)).astype(np.int8), "scale": POSITIVE[0, 0, :, :1]}),
    ("constexpr_blockwise_shift_scale",
     {"data": A.integers(0, 255, (4, 6)).astype(np.uint8), "scale": POSITIVE[0, 0, :2, :3],
      "offset": A.integers(0, 255, (2, 3)).astype(np.uint8)}),
    ("constexpr_lut_to_dense",
     {"indices": A.integers(0, 256, (4, 6)).astype(np.uint8),
      "lut": A.standard_normal((2, 1, 256, 1)).astype(np.float32)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given"), CONSTANTS, ids=lambda case: case if isinstance(case, str) else "")
def test_a_compressed_constant_is_what_coremltools_makes_of_it(builder, name, given):
    made = getattr(builder, name)(**given)
    np.testing.assert_allclose(computed(name, given)[0], made.op.materialized_val_inference(), rtol=1e-6)


def test_older_compressed_constants_are_what_they_stand_for():
    data = np.array([[1, -2, 3], [4, 5, -6]], np.int8)
    scale = {"scale": np.array([0.5, 2], np.float32), "zero_point": np.array([1, 2], np.int8), "axis": 0}
    found = computed("constexpr_affine_dequantize", {"quantized_data": data, **scale})[0]
    assert found.tolist() == [[0, -1.5, 1], [4, 6, -16]]
    bits = np.packbits([1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0], bitorder="little")  # 5, 3, 6, 0
    table = np.arange(8, dtype=np.float32) * 10
    shape = np.array([2, 2], np.uint32)
    found = computed("constexpr_lut_to_dense", {"indices": bits, "lut": table, "shape": shape})[0]
    assert found.tolist() == [[50, 30], [60, 0]]


def test_half_precision_is_computed_in_single_and_rounded_once():
    x, w = torch.randn(3, 64).half(), torch.randn(5, 64).half()
    (found,) = OPERATORS["linear"]({"x": x, "weight": w})
    assert found.dtype is torch.float16
    assert torch.equal(found, (x.float() @ w.float().T).half())
    (moved,) = OPERATORS["transpose"]({"x": x, "perm": torch.tensor([1, 0])})
    assert moved.dtype is torch.float16
    assert moved.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("gelu", {"x": X, "mode": "SOFT"}, "gelu has no mode 'SOFT'"),
        ("cast", {"x": X, "dtype": "fp8"}, "cast to 'fp8' is not evaluated"),
        ("pad", {"x": X, "pad": [1, 1], "mode": "wrap"}, "pad has no mode 'wrap'"),
        ("conv", {"x": X, "weight": X, "pad_type": "odd"}, "pad_type 'odd' is not evaluated"),
        ("max_pool", {"x": X, "kernel_sizes": [2, 2], "ceil_mode": True}, "ceil_mode True is not evaluated"),
        ("split", {"x": X, "axis": 1}, "neither num_splits nor split_sizes"),
        ("gather", {"x": X, "indices": ROWS, "axis": 0, "batch_dims": 1}, "batch_dims 1 along axis 0"),
    ],
)
def test_what_an_operation_does_not_do_is_said(name, given, said):
    with pytest.raises(ModelError, match=said):
        computed(name, given)
