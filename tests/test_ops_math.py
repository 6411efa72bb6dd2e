"""The operators that compute: ONNX's node cases, symbolic shapes, and what the cases leave out (old opsets, edges)."""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest

from stitch import dims, dtypes
from stitch.errors import InvalidModel, UnsupportedOperator
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.ops import registry
from stitch.ops.primitives import Array
from tests.onnx_cases import all_cases, operators_of, register_operators, run_case

register_operators()

MODULES = {
    "elementwise", "activations", "logic", "reductions", "normalisations", "losses", "quantisation", "attention",
}  # fmt: skip
OPERATORS = {
    name
    for domain, name, opsets in registry.names()
    for fn in [registry.lookup(name, opsets[-1], domain)]
    if fn is not None and fn.__module__.removeprefix("stitch.ops.") in MODULES
}
CASES = [case for case in all_cases() if operators_of(case) & OPERATORS]

# Cases that are refused, by name, and a part of the reason.
UNSUPPORTED = {
    "test_cast*FLOAT8*": "no dtype float8",
    "test_cast*FLOAT4E2M1*": "no dtype float4e2m1",
    "test_cast*_INT[24]*": "no dtype int",
    "test_cast*_UINT[24]*": "no dtype uint",
    "test_*quantizelinear_e[45]m*": "no dtype float8",
    "test_*quantizelinear_float4e2m1": "no dtype float4e2m1",
    "test_*quantizelinear_int[24]": "no dtype int",
    "test_*quantizelinear_uint[24]": "no dtype uint",
    "test_identity_opt": "not a tensor",
    "test_identity_sequence": "not a tensor",
    "test_training_dropout": "drops at random",
    "test_training_dropout_default": "drops at random",
    "test_training_dropout_default_mask": "drops at random",
    "test_training_dropout_mask": "drops at random",
    "test_bernoulli*_expanded": "random",
    "test_affine_grid_*_expanded": "If holds a graph",
    "test_range_*_expanded": "Loop holds a graph",
    "test_linear_attention_*_expanded": "Scan holds a graph",
}
UNSUPPORTED_FOR_SYMBOLS = UNSUPPORTED | {"test_causal_conv_with_state_[!k]*_expanded": "Conv"}


def expect(result: str, name: str, unsupported: dict[str, str]) -> None:
    reasons = [reason for pattern, reason in unsupported.items() if fnmatchcase(name, pattern)]
    if reasons:
        assert result.startswith("unsupported: "), "it passes now: take it off the list"
        assert any(reason in result for reason in reasons), result
    else:
        assert result == "pass"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node_case(case: Any) -> None:
    expect(run_case(case), case.name, UNSUPPORTED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node_case_with_symbols(case: Any) -> None:
    expect(run_case(case, symbolic=True), case.name, UNSUPPORTED_FOR_SYMBOLS)


# ------------------------------------------------------------------ one operator at a time


def build(
    operator: str, shapes: Sequence[Sequence[int | str]], kinds: Sequence[np.dtype], opset: int = 26,
    constants: Sequence[Array | None] = (), outputs: int = 1, **attrs: Any,
) -> Graph:  # fmt: skip
    """One node over inputs x0, x1, ... whose dims may be names, then `constants`."""
    b = Builder(operator)
    inputs: list[Value | None] = [
        b.input(f"x{i}", kind, [dims.symbol(d) if isinstance(d, str) else d for d in shape])
        for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
    ]
    inputs += [None if array is None else b.const(array) for array in constants]
    known = {v: a for v, a in zip(inputs[len(shapes) :], constants, strict=True) if v is not None and a is not None}
    names = tuple(f"y{i}" for i in range(outputs))
    call = registry.Call(operator, "node", opset, attrs, names, tuple(inputs), constants=known)
    results = registry.apply(b, call)[:outputs]
    graph = b.finish({name: value for name, value in zip(names, results, strict=True) if value is not None})
    graph.check()
    return graph


def run(operator: str, *arrays: Array, **options: Any) -> list[Array]:
    graph = build(operator, [a.shape for a in arrays], [a.dtype for a in arrays], **options)
    return evaluate(graph, {f"x{i}": a for i, a in enumerate(arrays)})


def run1(operator: str, *arrays: Array, **options: Any) -> Array:
    return run(operator, *arrays, **options)[0]


def f32(values: Any) -> Array:
    return np.asarray(values, np.float32)


def sample(*shape: int, dtype: np.dtype = dtypes.FLOAT32, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def close(actual: Array, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol, atol)


def softmax(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    return np.asarray((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias)


def group_norm(x: Array, scale: Array, bias: Array) -> Array:
    g = x.reshape(x.shape[0], 2, -1)
    y = ((g - g.mean(2, keepdims=True)) / np.sqrt(g.var(2, keepdims=True) + 1e-5)).reshape(x.shape)
    return np.asarray(y * scale.reshape(-1, 1) + bias.reshape(-1, 1))


SYMBOLIC: list[tuple[str, list[tuple[int | str, ...]], dict[str, Any], Callable[..., Any]]] = [
    ("Add", [("a", "b"), ("b",)], {}, np.add),
    ("Mul", [("a", 1, "b"), ("b",)], {}, np.multiply),
    ("Where", [("a", "b"), ("b",), ("a", 1)], {}, lambda c, x, y: np.where(c > 0, x, y)),
    ("Softmax", [("a", "b", "c")], {"axis": 1}, lambda x: softmax(x, 1)),
    ("Softmax", [("a", "b", "c")], {"axis": 1, "opset": 11}, lambda x: softmax(x, (1, 2))),
    ("LogSoftmax", [("a", "b")], {}, lambda x: np.log(softmax(x))),
    ("Hardmax", [("a", "b", "c")], {"opset": 11}, lambda x: (x == x.max((1, 2), keepdims=True)).astype(float)),
    ("Hardmax", [("a", "b", "c")], {"axis": 0}, lambda x: (x == x.max(0, keepdims=True)).astype(float)),
    ("ReduceMean", [("a", "b", "c")], {"axes": (0, 2), "opset": 13}, lambda x: x.mean((0, 2), keepdims=True)),
    ("ReduceMean", [("a", "b")], {"constants": [np.array([-1])], "keepdims": 0}, lambda x: x.mean(-1)),
    ("ReduceSum", [("a", "b")], {"keepdims": 0}, np.sum),
    ("ReduceL2", [("a", "b")], {"keepdims": 0}, lambda x: np.sqrt((x * x).sum())),
    ("ReduceLogSumExp", [("a", "b")], {"axes": (1,), "opset": 13, "keepdims": 0}, lambda x: np.log(np.exp(x).sum(1))),
    ("ArgMax", [("a", "b")], {"axis": -1, "keepdims": 0}, lambda x: x.argmax(-1)),
    ("ArgMin", [("a", "b")], {"axis": 0}, lambda x: x.argmin(0)[None]),
    ("LayerNormalization", [("a", "b", "c"), ("c",), ("c",)], {}, layer_norm),
    ("GroupNormalization", [("a", 6, "c"), (6,), (6,)], {"num_groups": 2}, group_norm),
    ("GroupNormalization", [("a", "b", "c"), ("b",), ("b",)], {"num_groups": 2}, group_norm),
    ("LpNormalization", [("a", "b")], {}, lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True))),
    ("MeanVarianceNormalization", [("a", "b", "c", 2)], {}, lambda x: (
        (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True))),
    ("RMSNormalization", [("a", "b"), ("b",)], {}, lambda x, s: (
        x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * s)),
]  # fmt: skip


@pytest.mark.parametrize("sizes", [{"a": 2, "b": 4, "c": 3}, {"a": 5, "b": 8, "c": 1}], ids=["small", "other"])
@pytest.mark.parametrize(
    ("operator", "shapes", "options", "formula"), SYMBOLIC, ids=lambda v: getattr(v, "__name__", str(v)[:24])
)
def test_symbolic_shapes(
    operator: str, shapes: list[tuple[int | str, ...]], options: dict[str, Any], formula: Callable[..., Any],
    sizes: dict[str, int],
) -> None:  # fmt: skip
    actual_shapes = [[d if isinstance(d, int) else sizes[d] for d in s] for s in shapes]
    arrays = [sample(*s, seed=i) for i, s in enumerate(actual_shapes)]
    if operator == "Where":
        arrays[0] = arrays[0] > 0
    graph = build(operator, shapes, [a.dtype for a in arrays], **options)
    (actual,) = evaluate(graph, {f"x{i}": a for i, a in enumerate(arrays)})
    close(actual, formula(*arrays), 1e-4, 1e-5)


# ------------------------------------------------------------------ edges


UNARY_FLOATS = [
    "Relu",
    "Gelu",
    "Softplus",
    "Mish",
    "HardSwish",
    "Selu",
    "Erf",
    "Sigmoid",
    "Softmax",
    "LogSoftmax",
    "Hardmax",
]


@pytest.mark.parametrize("operator", UNARY_FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3)], ids=str)
def test_small_ranks_and_empty_values(operator: str, shape: tuple[int, ...]) -> None:
    assert run1(operator, np.ones(shape, np.float32)).shape == shape


@pytest.mark.parametrize("dtype", [dtypes.FLOAT16, dtypes.BFLOAT16], ids=str)
@pytest.mark.parametrize("operator", [*UNARY_FLOATS, "LpNormalization", "MeanVarianceNormalization"])
def test_half_precisions(operator: str, dtype: np.dtype) -> None:
    x = sample(2, 4, 3, 2).astype(dtype)
    actual = run1(operator, x)
    assert actual.dtype == dtype
    wide = run1(operator, x.astype(np.float32))
    close(actual, wide, rtol=2**-6 if dtype == dtypes.BFLOAT16 else 2**-9, atol=2**-7)


def test_half_precision_sums_do_not_overflow() -> None:
    x = np.full((4, 1000), 200, np.float16)
    assert run1("ReduceMean", x, keepdims=0) == 200
    close(run1("ReduceL2", x[:1], keepdims=0), 6324.0, 1e-3)
    y, mean, inverse = run("LayerNormalization", x, sample(1000).astype(np.float16), outputs=3)
    assert (y.dtype, mean.dtype, inverse.dtype) == (np.float16, np.float32, np.float32)
    assert np.all(y == 0)
    assert np.all(mean == 200)


def test_large_arguments_stay_finite() -> None:
    x = np.array([-1000, 0, 1000], np.float32)
    close(run1("Softplus", x), [0, math.log(2), 1000])
    close(run1("Softmax", x), [0, 0, 1])
    close(run1("LogSoftmax", x), [-2000, -1000, 0])
    close(run1("ReduceLogSumExp", x, keepdims=0), 1000.0)


def test_infinite_sums_of_exponentials() -> None:
    x = np.array([[-np.inf, -np.inf], [np.inf, 0], [np.nan, 0]], np.float32)
    close(run1("ReduceLogSumExp", x, axes=(1,), opset=13, keepdims=0), [-np.inf, np.inf, np.nan])


def test_nan_goes_through() -> None:
    x = np.array([np.nan], np.float32)
    for operator in ("Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "HardSigmoid", "HardSwish", "Softplus", "Sign", "Abs"):
        assert np.isnan(run1(operator, x)), operator
    assert np.isnan(run1("Clip", x, constants=[f32(0), f32(1)]))
    assert np.isnan(run1("ReduceMax", np.array([1, np.nan, 2], np.float32)))


@pytest.mark.parametrize(("operator", "expected"), [
    ("ReduceSum", 0), ("ReduceProd", 1), ("ReduceMax", -np.inf), ("ReduceMin", np.inf), ("ReduceMean", np.nan),
    ("ReduceL1", 0), ("ReduceL2", 0), ("ReduceLogSum", -np.inf), ("ReduceLogSumExp", -np.inf), ("ReduceSumSquare", 0),
])  # fmt: skip
def test_reductions_of_nothing(operator: str, expected: float) -> None:
    x = np.zeros((2, 0, 3), np.float32)
    close(run1(operator, x, axes=(1,), opset=11), np.full((2, 1, 3), expected))
    close(run1(operator, x, axes=(-2,), opset=11, keepdims=0), np.full((2, 3), expected))


def test_which_axes_are_reduced() -> None:
    x = sample(2, 3)
    empty = np.zeros(0, np.int64)
    close(run1("ReduceSum", x, constants=[empty]), x.sum(keepdims=True))
    close(run1("ReduceSum", x, constants=[empty], noop_with_empty_axes=1), x)
    close(run1("ReduceSumSquare", x, noop_with_empty_axes=1), x * x)
    close(run1("ReduceLogSumExp", x, noop_with_empty_axes=1), x)
    close(run1("ReduceSum", f32(2), opset=13), 2)
    with pytest.raises(InvalidModel, match="axis 2 is out of range"):
        run("ReduceSum", x, axes=(2,), opset=11)
    with pytest.raises(UnsupportedOperator, match="axes must be a constant"):
        build("ReduceSum", [("a", "b"), ("k",)], [dtypes.FLOAT32, dtypes.INT64])


def test_reductions_of_integers() -> None:
    x = np.array([[3, 4], [-6, 8]], np.int32)
    assert run1("ReduceL2", x, axes=(1,), opset=13, keepdims=0).tolist() == [5, 10]
    assert run1("ReduceMean", x, keepdims=0).dtype == np.int32
    assert run1("ReduceMax", x > 0, axes=(1,), opset=13, keepdims=0).tolist() == [True, True]


# ------------------------------------------------------------------ exponents


@pytest.mark.parametrize("exponent", [-2, -1, 0, 0.5, 1, 2, 3, 4, 5, 7, 8, 1.5, 9])
def test_constant_exponents(exponent: float) -> None:
    x = np.abs(sample(100)) + f32(0.1)
    y = run1("Pow", x, constants=[f32(exponent)])
    expected = x.astype(np.float64) ** exponent
    assert np.all(np.abs(y - expected) <= 4 * np.spacing(expected.astype(np.float32)))


@pytest.mark.parametrize(("exponent", "primitives"), [
    (2, {"mul"}), (0.5, {"sqrt"}), (-1, {"div"}), (1, set()), (3, {"mul"}), (2.5, {"pow"}),
])  # fmt: skip
def test_which_exponents_need_no_pow(exponent: float, primitives: set[str]) -> None:
    graph = build("Pow", [("n", 3)], [dtypes.FLOAT32], constants=[np.array([exponent], np.float64)])
    assert {n.prim for n in graph.nodes} - {"const", "broadcast", "cast"} == primitives


def test_pow_has_the_dtype_of_its_base() -> None:
    base = np.array([1, 2, 3], np.int32)
    assert run1("Pow", base, constants=[np.int64(5)]).tolist() == [1, 32, 243]
    assert run1("Pow", base, np.array([5, 10, 0], np.int64)).tolist() == [1, 1024, 1]
    assert run1("Pow", base, np.array([0.5], np.float32)).tolist() == [1, 1, 1]
    assert run1("Pow", base, np.array([0.5], np.float32)).dtype == np.int32
    assert run1("Pow", base.astype(np.float16), np.array([2.0], np.float64)).dtype == np.float16
    close(run1("Pow", f32([0.5, 2]), constants=[f32(np.inf)]), [0, np.inf])
    close(run1("Pow", f32(3), constants=[np.full((2, 2), 2, np.int64)]), np.full((2, 2), 9))


# ------------------------------------------------------------------ old opsets


def test_broadcasting_by_attributes() -> None:
    x, y = sample(2, 3, 4, 5), sample(3, 4, seed=1)
    close(run1("Add", x, y, opset=6, broadcast=1, axis=1), x + y[:, :, None])
    close(run1("Sub", x, y[0], opset=1, broadcast=1, axis=2, consumed_inputs=(0, 0)), x - y[0][:, None])
    close(run1("Mul", x, x[0, 0, 0], opset=6, broadcast=1), x * x[0, 0, 0])
    assert np.array_equal(run1("Greater", x, y, opset=6, broadcast=1, axis=1), x > y[:, :, None])
    assert np.array_equal(run1("And", x > 0, y > 0, opset=1, broadcast=1, axis=1), (x > 0) & (y > 0)[:, :, None])
    close(run1("Pow", np.abs(x), y, opset=1, broadcast=1, axis=1), np.abs(x) ** y[:, :, None], 1e-4)


def test_attributes_that_became_inputs() -> None:
    x = sample(4)
    close(run1("Clip", x, opset=6, min=-0.5, max=0.5), x.clip(-0.5, 0.5))
    close(run1("Clip", x, opset=6, min=-0.5), x.clip(-0.5))
    close(run1("Clip", x, constants=[None, f32([0.5])]), x.clip(None, 0.5))
    far, largest = f32([-np.inf, np.inf]), np.finfo(np.float32).max  # the bounds in opsets 6 to 10, if none are given
    close(run1("Clip", far, opset=10, min=0.0), f32([0, largest]))
    close(run1("Clip", far, opset=6), f32([-largest, largest]))
    close(run1("Clip", far, opset=1), far)
    close(run1("Clip", x, constants=[f32(1), f32(-1)]), -np.ones(4))
    assert run1("Cast", x, opset=1, to="DOUBLE").dtype == np.float64
    assert run1("Cast", x, opset=5, to="INT8").dtype == np.int8
    far = np.array([2.0**63, -np.inf, np.nan, 2.9], np.float64)
    assert run1("Cast", far, to=7).tolist() == [2**63 - 1, -(2**63), 0, 2]
    with pytest.raises(UnsupportedOperator, match="element type 8"):
        run("Cast", x, to=8)


@pytest.mark.parametrize(("opset", "mask"), [(6, np.float32), (7, np.float32), (10, np.bool_), (13, np.bool_)])
def test_dropout_keeps_all(opset: int, mask: Any) -> None:
    x = sample(3, 2)
    y, kept = run("Dropout", x, opset=opset, outputs=2)
    assert np.array_equal(x, y)
    assert kept.dtype == mask
    assert np.all(kept == 1)


def test_dropout_refuses_to_train() -> None:
    x = sample(3)
    assert np.array_equal(run1("Dropout", x, constants=[f32(0), np.bool_(True)]), x)
    assert np.array_equal(run1("Dropout", x, constants=[None, np.bool_(False)]), x)
    with pytest.raises(UnsupportedOperator, match="export the model for inference"):
        run("Dropout", x, constants=[None, np.bool_(True)])


def test_batch_normalization_without_spatial_sharing() -> None:
    x, (scale, bias, mean, variance) = sample(2, 3, 4), np.abs(sample(4, 3, 4, seed=1))
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
    close(run1("BatchNormalization", x, scale, bias, mean, variance, opset=7, spatial=0), expected, 1e-4)
    flat = (scale.reshape(-1), bias.reshape(-1), mean.reshape(-1), variance.reshape(-1))
    close(run1("BatchNormalization", x, *flat, opset=6, spatial=0, is_test=1), expected, 1e-4)
    shared = [v[:, 0] for v in (scale, bias, mean, variance)]
    with pytest.raises(UnsupportedOperator, match="export the model for inference"):
        run("BatchNormalization", x, *shared, opset=7, outputs=5)


def test_prelu_by_channel() -> None:
    x, slope = sample(2, 3, 4), f32([0.1, 0.2, 0.3])
    close(run1("PRelu", x, slope, opset=6), np.where(x < 0, x * slope[:, None], x))
    close(run1("PRelu", x, slope[:, None], opset=9), np.where(x < 0, x * slope[:, None], x))


def test_group_normalization_by_group() -> None:
    x, scale, bias = sample(2, 6, 4), f32([1, 2]), f32([3, 4])
    expected = group_norm(x, np.repeat(scale, 3), np.repeat(bias, 3))
    close(run1("GroupNormalization", x, scale, bias, num_groups=2, opset=18), expected, 1e-4, 1e-5)


def test_softmax_of_a_matrix_cut_at_the_end() -> None:
    close(run1("Softmax", sample(3), opset=11), np.ones(3))  # axis 1 of rank 1: rows of one element
    close(run1("Hardmax", sample(3), opset=11), np.ones(3))
    close(run1("LogSoftmax", sample(2, 3), opset=1, axis=0), np.log(softmax(sample(2, 3), (0, 1))))


# ------------------------------------------------------------------ integers, bits, positions


def test_integer_division_and_remainders() -> None:
    x, y = np.array([7, -7, 7, -7], np.int32), np.array([2, 2, -2, -2], np.int32)
    assert run1("Div", x, y).tolist() == [3, -3, -3, 3]
    assert run1("Mod", x, y).tolist() == [1, 1, -1, -1]
    assert run1("Mod", x, y, fmod=1).tolist() == [1, -1, 1, -1]
    least = np.array([-(2**31)], np.int32)
    assert run1("Div", least, np.array([2], np.int32)).tolist() == [-(2**30)]


def test_shrink_of_integers() -> None:
    x = np.arange(-2, 3, dtype=np.int8)
    assert run1("Shrink", x, lambd=1.5, bias=1.5).tolist() == [0, 0, 0, 0, 0]
    assert run1("Shrink", x).tolist() == [-2, -1, 0, 1, 2]


def test_known_contents_neither_wrap_nor_round() -> None:
    b = Builder()
    small = b.cast(b.add(b.const([250]), 0), dtypes.UINT8)
    assert b.add(small, 10).contents is None
    assert b.sub(b.const([3], dtypes.UINT8), 5).contents is None
    assert b.cast(b.cast(b.const([2049]), dtypes.FLOAT16), dtypes.INT64).contents is None
    flags = b.cast(b.const([True]), dtypes.INT64)
    (y,) = evaluate(b.finish({"y": b.unary("not", flags)}), {})
    assert y.tolist() == [-2]


def test_special_values() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    assert run1("IsNaN", x).tolist() == [True, False, False, False]
    assert run1("IsInf", x).tolist() == [False, True, True, False]
    assert run1("IsInf", x, detect_negative=0).tolist() == [False, True, False, False]
    assert run1("IsInf", x, detect_positive=0, detect_negative=0).tolist() == [False] * 4


def test_equal_extremes() -> None:
    x = np.array([[1, 3, 3], [2, 2, 1]], np.float32)
    assert run1("ArgMax", x, axis=1, keepdims=0).tolist() == [1, 0]
    assert run1("ArgMax", x, axis=1, keepdims=0, select_last_index=1).tolist() == [2, 1]
    assert run1("Hardmax", x).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert run1("ArgMin", f32(3)).shape == ()


# ------------------------------------------------------------------ quantisation, losses


def test_quantisation_saturates_and_rounds_to_even() -> None:
    x = np.array([-1e30, -1.5, 0.5, 1.5, 2.5, 1e30, np.inf], np.float32)
    y = run1("QuantizeLinear", x, constants=[f32(1), np.uint8(10)])
    assert y.dtype == np.uint8
    assert y.tolist() == [0, 8, 10, 12, 12, 255, 255]
    assert run1("QuantizeLinear", x, constants=[f32(1)], output_dtype=5).dtype == np.int16


def test_quantisation_in_blocks() -> None:
    x, scale = sample(2, 5), np.abs(sample(2, 3, seed=1)) + f32(0.1)
    wide = np.repeat(scale, 2, 1)[:, :5]
    y = run1("QuantizeLinear", x, scale, axis=1, block_size=2, output_dtype=3, opset=21)
    assert np.array_equal(y, np.rint(x / wide).clip(-128, 127).astype(np.int8))
    back = run1("DequantizeLinear", y, scale, axis=1, block_size=2, opset=21)
    close(back, y * wide)


def test_quantisation_of_zeros() -> None:
    y, scale, zero = run("DynamicQuantizeLinear", np.zeros((2, 2), np.float32), outputs=3)
    assert y.tolist() == [[0, 0], [0, 0]]
    assert (float(scale), int(zero)) == (0, 0)


def test_integers_that_a_float_cannot_hold() -> None:
    x = np.array([2**24 + 1], np.int32)
    assert run1("DequantizeLinear", x, constants=[np.float64(1)]).tolist() == [2**24 + 1]


def test_cross_entropy_ignores_a_class() -> None:
    x, target = sample(4, 3), np.array([0, 2, -1, 1])
    p = -np.log(softmax(x, 1))[[0, 1, 3], [0, 2, 1]]
    loss, log = run("SoftmaxCrossEntropyLoss", x, target, ignore_index=-1, outputs=2)
    close(loss, p.mean())
    close(log, np.log(softmax(x, 1)))
    assert np.isnan(run1("SoftmaxCrossEntropyLoss", x, np.full(4, -1), ignore_index=-1))
