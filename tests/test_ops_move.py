"""Operators of movement, indexing, constants, contractions, convolution, pooling and resampling.

ONNX's own cases say what each operator means; the table below them says that it means the same for symbolic shapes:
one graph is built with symbols, evaluated at several sizes, and compared with ONNX's reference implementation.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from stitch import dims, dtypes
from stitch.errors import InvalidModel, StitchError, UnsupportedOperator
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.importer import load
from stitch.ops import registry
from stitch.ops.host import FUNCTIONS
from stitch.ops.primitives import Array
from tests.onnx_cases import cases, operators_of, register_operators, run_case

register_operators()

OPERATORS = {
    *"""
    Reshape Transpose Squeeze Unsqueeze Flatten Expand Tile Concat Split Slice Pad DepthToSpace SpaceToDepth
    ReverseSequence Trilu CenterCropPad Col2Im
    Gather GatherElements GatherND Scatter ScatterElements ScatterND TensorScatter OneHot Compress NonZero Unique TopK
    NonMaxSuppression
    Constant ConstantOfShape Shape Size EyeLike Range
    MatMul Gemm Einsum MatMulInteger QLinearMatMul
    Conv ConvTranspose ConvInteger QLinearConv DeformConv
    MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool MaxUnpool MaxRoiPool RoiAlign
    Resize Upsample GridSample AffineGrid
    """.split()  # noqa: SIM905
}

# ONNX's cases that are refused, and why.
UNSUPPORTED: Mapping[str, str] = {}


def test_onnx_cases() -> None:
    refused, wrong = {}, {}
    for case in cases(OPERATORS):
        try:
            answer = run_case(case)
        except AssertionError as difference:
            wrong[case.name] = str(difference)
            continue
        if answer != "pass":
            refused[case.name] = answer
    assert not wrong
    assert refused.keys() == UNSUPPORTED.keys(), refused


def test_phases_of_a_transposed_convolution_do_not_share_weights() -> None:
    """Three taps at a stride of 2: an infinity reaches three elements of the output, and makes no NaN beside them."""
    shapes = {"x": (1, 1, 4), "w": (1, 1, 3), "y": None}
    x, w, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph([helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2])], "g", [x, w], [y])
    found = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    feeds = {"x": np.array([[[1, np.inf, 1, 1]]], np.float32), "w": np.ones((1, 1, 3), np.float32)}
    np.testing.assert_array_equal(evaluate(found, feeds)[0][0, 0], [1, 1, np.inf, np.inf, np.inf, 1, 2, 1, 1])


def test_every_operator_is_tried() -> None:
    tried = set().union(*(operators_of(case) for case in cases(OPERATORS)))
    assert OPERATORS - tried <= {"Constant", "GlobalLpPool", "MaxRoiPool"}
    assert all(registry.lookup(name, 26 if name not in ("Upsample",) else 9) for name in OPERATORS)


# ------------------------------------------------------------------ symbolic shapes

Argument = str | Array | list[Any] | None  # an input's shape; a constant; a value made of dims; omitted


@dataclass(frozen=True)
class Case:
    """One node. `arguments`: "n 3" is an input of that shape, an array a constant, a list dims (as text or numbers)."""

    operator: str
    arguments: Sequence[Argument]
    sizes: Sequence[Mapping[str, int]]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 22
    dtype: Any = np.float32
    outputs: int = 1
    shape: str | None = None  # of the first result, as text
    oracle: Callable[..., Any] | None = None  # where the reference implementation is wrong, or lacks the opset
    data: Mapping[int, Callable[[tuple[int, ...]], Array]] = field(default_factory=dict)  # elements of some inputs


def shape_of(text: str) -> tuple[dims.Dim, ...]:
    return tuple(dims.parse(t) for t in text.split())


def build(case: Case) -> Graph:
    b = Builder()
    values: list[Value | None] = []
    constants: dict[Value, Array] = {}
    for i, argument in enumerate(case.arguments):
        match argument:
            case None:
                values.append(None)
            case str():
                dtype = case.data[i]((0,) * len(argument.split())).dtype if i in case.data else np.dtype(case.dtype)
                values.append(b.input(f"x{i}", dtype, shape_of(argument)))
            case list():
                values.append(b.dims([dims.parse(str(d)) for d in argument]))
            case _:
                value = b.const(argument)
                constants[value] = argument
                values.append(value)
    names = tuple(f"y{i}" for i in range(case.outputs))
    call = registry.Call(case.operator, "node", case.opset, case.attrs, names, tuple(values), constants=constants)
    results = registry.apply(b, call)
    b.input("symbols", dtypes.BOOL, [dims.symbol(name) for name in case.sizes[0]])  # so that each is bound
    graph = b.finish({name: value for name, value in zip(names, results, strict=False) if value is not None})
    graph.check()
    if case.shape is not None:
        assert graph.outputs[0].shape == shape_of(case.shape)
    return graph


def arrays_of(case: Case, env: Mapping[str, int]) -> list[Array | None]:
    """The arguments at one size."""
    rng = np.random.default_rng(0)
    out: list[Array | None] = []
    for i, argument in enumerate(case.arguments):
        match argument:
            case str():
                shape = tuple(dims.evaluate(d, env) for d in shape_of(argument))
                if i in case.data:
                    out.append(case.data[i](shape))
                elif np.dtype(case.dtype).kind == "f":
                    out.append(rng.standard_normal(shape).astype(case.dtype))
                else:
                    out.append(rng.integers(0, 100, shape).astype(case.dtype))
            case list():
                out.append(np.array([dims.evaluate(dims.parse(str(d)), env) for d in argument], np.int64))
            case _:
                out.append(argument)
    return out


def reference(case: Case, arrays: Sequence[Array | None]) -> list[Array]:
    if case.oracle is not None:
        result = case.oracle(*(a for a in arrays if a is not None))
        return list(result) if isinstance(result, tuple) else [result]
    names = ["" if a is None else f"x{i}" for i, a in enumerate(arrays)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    attrs = {k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in case.attrs.items()}
    node = helper.make_node(case.operator, names, outputs, **attrs)
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), None)
        for n, a in zip(names, arrays, strict=True)
        if a is not None
    ]
    results = [helper.make_tensor_value_info(o, TensorProto.UNDEFINED, None) for o in outputs]
    graph = helper.make_graph([node], "one", infos, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)])
    feeds = {n: a for n, a in zip(names, arrays, strict=True) if a is not None}
    return list(ReferenceEvaluator(model).run(None, feeds))


def check(case: Case) -> None:
    graph = build(case)
    for env in case.sizes:
        arrays = arrays_of(case, env)
        feeds = {f"x{i}": a for i, a in enumerate(arrays) if isinstance(case.arguments[i], str) and a is not None}
        feeds["symbols"] = np.empty(tuple(env.values()), np.bool_)
        for guard in graph.guards:
            assert dims.evaluate(guard.left, env) == dims.evaluate(guard.right, env), guard
        actual = evaluate(graph, feeds)
        for a, e in zip(actual, reference(case, arrays), strict=True):
            assert a.shape == e.shape, f"{env}: shape {a.shape} instead of {e.shape}"
            assert a.dtype == e.dtype
            if a.dtype.kind == "f":
                np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)  # sums of at most 100 terms in float32
            else:
                np.testing.assert_array_equal(a, e)


def sizes(**symbols: Sequence[int]) -> list[dict[str, int]]:
    """{n: a, m: b} for the i-th entry of every symbol."""
    return [dict(zip(symbols, row, strict=True)) for row in zip(*symbols.values(), strict=True)]


def ints(*xs: int) -> Array:
    return np.array(xs, np.int64)


def floats(*xs: float) -> Array:
    return np.array(xs, np.float32)


def weights(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def below(n: int, lowest: int = 0) -> Callable[[tuple[int, ...]], Array]:
    """Integers from `lowest` to n - 1."""
    return lambda shape: np.random.default_rng(2).integers(lowest, n, shape)


def pooling(name: str, attrs: Mapping[str, Any]) -> Callable[[Array], Array]:
    """Pooling over a plane by its definition, for the reference implementation ignores some pads and dilations."""

    def oracle(x: Array) -> Array:
        steps, spread = attrs.get("strides", [1, 1]), attrs.get("dilations", [1, 1])
        pads = attrs.get("pads", [0] * 4)
        taps: list[list[Array]] = []
        for i, k in enumerate(attrs.get("kernel_shape", [3, 2])):
            extent, lo, hi = x.shape[i + 2], pads[i], pads[i + 2]
            room = extent + lo + hi - (k - 1) * spread[i] - 1
            count = (-(-room // steps[i]) if attrs.get("ceil_mode") else room // steps[i]) + 1
            starts = [s * steps[i] - lo for s in range(count) if s * steps[i] < extent + lo]
            taps.append([np.array([t for t in s + np.arange(k) * spread[i] if 0 <= t < extent]) for s in starts])
        reduce: dict[str, Callable[[Array], Any]] = {
            "MaxPool": lambda w: w.max((2, 3)),
            "AveragePool": lambda w: w.mean((2, 3)),
            "LpPool": lambda w: np.sqrt((w * w).sum((2, 3))),
        }
        rows = [np.stack([reduce[name](x[:, :, i][:, :, :, j]) for j in taps[1]], -1) for i in taps[0]]
        return np.stack(rows, 2)

    return oracle


def conv_transpose(strides: tuple[int, int], groups: int) -> Callable[..., Array]:
    """Each input element adds a scaled kernel to the output; the reference implementation has no groups."""

    def oracle(x: Array, w: Array, bias: Array) -> Array:
        (n, c, height, width), (_, m, kh, kw) = x.shape, w.shape
        out = np.zeros((n, m * groups, (height - 1) * strides[0] + kh, (width - 1) * strides[1] + kw), x.dtype)
        for i, j, k in itertools.product(range(height), range(width), range(c)):
            g = k // (c // groups)
            y, z = i * strides[0], j * strides[1]
            out[:, g * m : (g + 1) * m, y : y + kh, z : z + kw] += x[:, k, i, j][:, None, None, None] * w[k]
        return out + bias[:, None, None]

    return oracle


N = sizes(n=(3, 1, 0))
NM = sizes(n=(3, 1, 0), m=(4, 5, 2))
PLANES = sizes(n=(2, 1), h=(7, 9), w=(8, 5))

MOVEMENT = [
    Case("Reshape", ["n m 4", ints(0, -1)], NM, shape="n 4*m", oracle=lambda x, s: x.reshape(len(x), 4 * x.shape[1])),
    Case("Reshape", ["n m 4", ints(-1, 2, 2)], NM, shape="n*m 2 2"),
    Case("Reshape", ["n 6", ["n", 2, -1]], N, shape="n 2 3", oracle=lambda x, s: x.reshape(-1, 2, 3)),
    Case("Reshape", ["n m", ["n*m"]], NM, shape="n*m"),
    Case("Reshape", ["n m"], NM, {"shape": [-1]}, 1, shape="n*m", oracle=lambda x: x.reshape(-1)),
    Case("Transpose", ["n m 2"], NM, {"perm": [2, 0, 1]}, shape="2 n m"),
    Case("Transpose", ["n m"], NM, shape="m n"),
    Case("Squeeze", ["n 1 m", ints(1)], NM, shape="n m"),
    Case("Squeeze", ["n 1"], N, {"axes": [-1]}, 11, shape="n"),
    Case("Unsqueeze", ["n m", ints(0, -1)], NM, shape="1 n m 1"),
    Case("Unsqueeze", ["n"], N, {"axes": [1]}, 1, shape="n 1", oracle=lambda x: x[:, None]),
    Case("Flatten", ["n m 3"], NM, {"axis": 2}, shape="n*m 3", oracle=lambda x: x.reshape(-1, 3)),
    Case("Flatten", ["n m 3"], NM, {"axis": 0}, shape="1 3*n*m"),
    Case("Flatten", ["n m 3"], NM, {"axis": -1}, shape="n*m 3", oracle=lambda x: x.reshape(-1, 3)),
    Case("Expand", ["n 1", ["m", 1, 5]], NM, shape="m n 5"),
    Case("Expand", ["n 1 4", ["m", 1]], NM, shape="n m 4"),
    Case("Tile", ["n 2", ["m", 3]], NM, shape="m*n 6"),
    Case("Concat", ["n 2", "n m"], NM, {"axis": 1}, shape="n m+2"),
    Case("Concat", ["n", "m", "n"], NM, {"axis": -1}, shape="2*n+m"),
    Case("Split", ["n 6"], N, {"axis": 1, "num_outputs": 3}, 18, outputs=3, shape="n 2"),
    Case("Split", ["n"], sizes(n=(7, 8, 5, 0)), {"num_outputs": 3}, 18, outputs=3,
         oracle=lambda x: tuple(x[-(-x.size // 3) * i :][: -(-x.size // 3)] for i in range(3))),
    Case("Split", ["2*n"], N, {"axis": 0}, 13, outputs=2, shape="n"),
    Case("Split", ["n+2", ["n", 2]], N, {"axis": 0}, 13, outputs=2, shape="n"),
    Case("Split", ["5 n"], N, {"axis": 0, "split": [2, 3]}, 2, outputs=2, shape="2 n"),
    Case("Slice", ["n m", ints(1), ints(2**31 - 1), ints(0)], NM, shape="max(n-1,0) m"),
    Case("Slice", ["n m", ints(0), ints(-1), ints(0)], NM, shape="max(n-1,0) m"),
    Case("Slice", ["n m", ints(-1), ints(-(2**63)), ints(1), ints(-1)], NM, shape="n m"),
    Case("Slice", ["n m", ints(-2), ints(1), ints(0), ints(-2)], sizes(n=(9, 3, 1), m=(2, 2, 2))),
    Case("Slice", ["n m", ints(1), ints(7), ints(-1), ints(3)], sizes(n=(1, 2, 0), m=(9, 4, 1))),
    Case("Slice", ["n n+m", [0], ["n"], ints(1)], NM, shape="n n"),
    Case("Slice", ["n n+m", ["n"], ["n+m"], ints(1)], NM, shape="n m"),
    Case("Slice", ["9 n", [0], ["n"], ints(0)], NM, shape="n n"),
    Case("Slice", ["n m", ["-n"], [2**31 - 1], ints(1)], sizes(n=(1, 3, 4), m=(2, 5, 4))),
    Case("Slice", ["n m", ["n-3"], [2**31 - 1], ints(1)], sizes(n=(1, 4, 3, 2), m=(2, 5, 4, 3))),
    Case("Slice", ["n m"], NM, {"starts": [1], "ends": [1000], "axes": [1]}, 1, shape="n max(min(m,1000)-1,0)",
         oracle=lambda x: x[:, 1:]),
    Case("Pad", ["n m", ints(1, 0, 0, 2)], NM, shape="n+1 m+2"),
    Case("Pad", ["n m", ints(1, -1, 0, -1), floats(2.5)[0]], NM, shape="n+1 m-2",
         oracle=lambda x, p, v: np.pad(x, [(1, 0), (0, 0)], constant_values=v)[:, 1:-1]),
    Case("Pad", ["n m", ["n", 0, 0, "m"], floats(7.0)[0]], NM, shape="2*n 2*m"),
    Case("Pad", ["n m", ints(1, 2), "", ints(-1)], NM, shape="n m+3"),
    Case("Pad", ["n m"], NM, {"pads": [0, 1, 1, 0], "value": 3.0}, 2, shape="n+1 m+1",
         oracle=lambda x: np.pad(x, [(0, 1), (1, 0)], constant_values=3.0)),
    *(Case("Pad", ["n m 5", ints(0, 3, 2, 0, 1, 4)], sizes(n=(2, 0, 3), m=(4, 5, 6)), {"mode": mode}, 19,
         shape="n m+4 11")
      for mode in ("edge", "reflect", "wrap")),
    Case("Pad", ["n m", ints(0, 7, 0, 6)], sizes(n=(2, 1), m=(3, 1)), {"mode": "reflect"}, 19),
    Case("Pad", ["n m", ints(0, 7, 0, 6)], sizes(n=(2, 1), m=(3, 1)), {"mode": "wrap"}, 19),
    Case("Pad", ["n m", ints(0, -1, 0, 2)], sizes(n=(2, 1), m=(5, 4)), {"mode": "reflect"}, 19,
         oracle=lambda x, p: np.pad(x[:, 1:], [(0, 0), (0, 2)], mode="reflect")),
    *(Case("DepthToSpace", ["n 12 h w"], PLANES, {"blocksize": 2, "mode": mode},
         shape="n 3 2*h 2*w") for mode in ("DCR", "CRD")),
    Case("DepthToSpace", ["n 4*h h w"], PLANES, {"blocksize": 2}, shape="n h 2*h 2*w"),
    Case("SpaceToDepth", ["n 3 2*h 2*w"], PLANES, {"blocksize": 2}, shape="n 12 h w"),
    Case("ReverseSequence", ["m n 2", "n"], sizes(n=(3, 1), m=(5, 4)), data={1: below(5, 1)}),
    Case("ReverseSequence", ["n m", "n"], sizes(n=(3, 1), m=(5, 4)), {"batch_axis": 0, "time_axis": 1},
         data={1: below(5, 1)}),
    *(Case("Trilu", ["n m", k], NM, {"upper": upper}, shape="n m")
      for k, upper in itertools.product([ints(0)[0], ints(1)[0], ints(-2)[0]], [0, 1])),
    Case("Trilu", ["n m", ""], NM, data={1: lambda shape: np.array(1)}),
    Case("Trilu", ["n m"], NM),
    Case("CenterCropPad", ["n m 3", ints(4, 3)], NM, {"axes": [0, 1]}, shape="4 3 3"),
    Case("CenterCropPad", ["n m", ["m", "n"]], NM, shape="m n"),
    Case("Col2Im", ["n 8 l", ints(5, 5), ints(2, 2)], sizes(n=(2, 1), l=(16, 16))),
]  # fmt: skip

INDEXING = [
    Case("Gather", ["n m 3", "k 2"], sizes(n=(3, 1), m=(4, 5), k=(2, 0)), {"axis": 1}, data={1: below(4, -4)},
         shape="n k 2 3"),
    Case("Gather", ["n m", ints(-1)[0]], sizes(n=(3, 1), m=(4, 5)), {"axis": 1}, shape="n"),
    Case("Gather", ["n m", ints(3, 1)], sizes(n=(3, 1), m=(4, 5)), {"axis": 1}, shape="n 2"),
    Case("Gather", ["n m", ints(-1, 0)], sizes(n=(3, 1), m=(4, 5)), {"axis": 1}, shape="n 2"),
    Case("Gather", ["n m", ints(0, 2, 3)], sizes(n=(3, 1), m=(4, 5)), {"axis": 1}, shape="n 3"),
    Case("GatherElements", ["n m", "n k"], sizes(n=(3, 1), m=(4, 5), k=(2, 0)), {"axis": 1},
         data={1: below(4, -4)}, shape="n k"),
    Case("GatherND", ["n m 3", "k 2"], sizes(n=(3, 1), m=(4, 5), k=(2, 0)), data={1: below(1, -1)}, shape="k 3",
         oracle=lambda x, i: x[i[:, 0], i[:, 1]]),
    Case("GatherND", ["n m 3", "n k 1"], sizes(n=(3, 1), m=(4, 5), k=(2, 6)), {"batch_dims": 1},
         data={1: below(4, -4)}, shape="n k 3"),
    *(Case("ScatterElements", ["n m", "n k", "n k"], sizes(n=(3, 1), m=(4, 5), k=(3, 0)),
         {"axis": 1, "reduction": op}, 18,
           data={1: below(4, -4)}, shape="n m") for op in ("none", "add", "mul", "max", "min")),
    *(Case("ScatterND", ["n m", "k 1", "k m"], sizes(n=(4, 5), m=(4, 5), k=(3, 0)), {"reduction": op}, 18,
           data={1: below(4)}, shape="n m") for op in ("none", "add", "mul", "max", "min")),
    Case("OneHot", ["n m", ["k"], floats(2, 5)], sizes(n=(3, 0), m=(4, 5), k=(6, 4)), {"axis": 1},
         data={0: below(4, -4)}, shape="n k m",
         oracle=lambda i, k, v: np.where((i % k[0])[:, None] == np.arange(k[0])[:, None], v[1], v[0])),
    Case("Compress", ["n m", "m"], NM, {"axis": 1}, data={1: lambda s: np.arange(s[0]) % 2 == 0}),
    Case("Compress", ["n 3", np.array([True, False, True])], N, {"axis": 1}, shape="n 2"),
    Case("NonZero", ["n m"], NM, data={0: below(2)}),
    *(Case("NonZero", [x], [{}], oracle=lambda x: np.zeros((0, np.count_nonzero(x)), np.int64))
      for x in ("", np.array(2.0), np.array(0.0))),
    Case("Unique", ["n m"], NM, outputs=4, data={0: below(4)}),
    Case("Unique", ["n m"], sizes(n=(4, 3), m=(3, 2)), {"axis": 1}, outputs=4, data={0: below(2)}),
    Case("TopK", ["n m", ints(2)], NM, outputs=2, shape="n 2"),
    Case("TopK", ["m n", ["n"]], sizes(n=(3, 1), m=(4, 5)), {"axis": 0, "largest": 0}, outputs=2, shape="n n"),
    Case("TopK", ["m n", "1"], sizes(n=(3, 1), m=(4, 5)), {"axis": 0}, outputs=2, data={1: lambda s: ints(2)}),
]  # fmt: skip

CONSTANTS = [
    Case("ConstantOfShape", [["n", 2]], N, {"value": np.array([5], np.int32)}, shape="n 2"),
    Case("Shape", ["n m 3"], NM, {"start": 1, "end": -1}, 15, shape="1"),
    Case("Shape", ["n m 3"], NM, {"start": -2}, 15, shape="2"),
    Case("Size", ["n m 3"], NM, shape=""),
    Case("EyeLike", ["n m"], NM, {"k": 1}, shape="n m"),
    Case("EyeLike", ["n m"], NM, {"dtype": TensorProto.INT32}, shape="n m"),
]  # fmt: skip

CONTRACTIONS = [
    *(Case("MatMul", [a, c], NM, shape=out) for a, c, out in [
        ("n m", "m 3", "n 3"), ("m", "m n", "n"), ("n m", "m", "n"), ("m", "m", ""), ("n 2 m", "m 3", "n 2 3"),
        ("2 1 n m", "3 m 4", "2 3 n 4"), ("n 1 2 m", "1 5 m 3", "n 5 2 3"), ("1 2 m", "1 m n", "1 2 n"),
        ("m", "n m 3", "n 3"), ("n 2 m", "m", "n 2"), ("n n m", "n m n", "n n n"),
    ]),
    Case("Gemm", ["n m", "m 3", floats(1, 2, 3)], NM, {"alpha": 0.5, "beta": 2.0}, shape="n 3"),
    Case("Gemm", ["m n", "3 m", "n 1"], NM, {"transA": 1, "transB": 1}, shape="n 3"),
    Case("Gemm", ["n m", "m 3"], NM, shape="n 3"),
    *(Case("Einsum", arguments, NM, {"equation": equation}, shape=out) for equation, arguments, out in [
        ("ij,jk->ik", ["n m", "m 3"], "n 3"), ("ij->ji", ["n m"], "m n"), ("ij->j", ["n m"], "m"),
        ("ij", ["n m"], "n m"),
        ("ba", ["n m"], "m n"), ("i,j->ij", ["n", "m"], "n m"), ("ij,ij->i", ["n m", "n m"], "n"),
        ("ii->i", ["n n"], "n"),
        ("ii", ["n n"], ""), ("...ij,...jk->...ik", ["2 1 n m", "5 m 3"], "2 5 n 3"), ("i...->...", ["n m 2"], "m 2"),
        ("bhqd,bhkd->bhqk", ["n 2 m 4", "n 2 3 4"], "n 2 m 3"), ("ij,jk,kl->il", ["n m", "m 3", "3 2"], "n 2"),
        ("ijj,jk->ik", ["n m m", "m 2"], "n 2"), ("ij,kj->", ["n m", "3 m"], ""), ("i,i", ["n", "n"], ""),
        ("...i,i->...", ["n 2 m", "m"], "n 2"),
    ]),
    Case("MatMulInteger", ["n m", "m 3", np.array(7, np.uint8), np.array(9, np.uint8)], NM,
         opset=10, dtype=np.uint8, shape="n 3"),
]  # fmt: skip

# The results of a convolution over a plane: floor((h + pads - span) / stride) + 1.
CONVOLUTION = [
    Case("Conv", ["n 3 h w", weights(4, 3, 3, 3), weights(4)], PLANES, {"pads": [1, 1, 1, 1]}, shape="n 4 h w"),
    Case("Conv", ["n 3 h w", weights(4, 3, 3, 3)], PLANES, {"pads": [1, 0, 0, 2], "strides": [2, 1]},
         shape="n 4 h//2 w"),
    Case("Conv", ["n 3 h w", weights(4, 3, 3, 2)], PLANES, {"dilations": [2, 3]}, shape="n 4 h-4 w-3"),
    Case("Conv", ["n 3 h w", weights(4, 3, 1, 1), weights(4)], PLANES, shape="n 4 h w"),
    Case("Conv", ["n 3 h w", weights(4, 3, 1, 1)], PLANES, {"strides": [2, 3]}, shape="n 4 (h-1)//2+1 (w-1)//3+1"),
    Case("Conv", ["n 6 h w", weights(6, 1, 3, 3), weights(6)], PLANES, {"group": 6, "pads": [1] * 4}, shape="n 6 h w"),
    Case("Conv", ["n 3 h w", weights(6, 1, 3, 3)], PLANES, {"group": 3}, shape="n 6 h-2 w-2"),
    Case("Conv", ["n 6 h w", weights(4, 3, 3, 3)], PLANES, {"group": 2, "strides": [2, 2]},
         shape="n 4 (h-1)//2 (w-1)//2"),
    Case("Conv", ["n 6 h w", weights(4, 3, 1, 1)], PLANES, {"group": 2}, shape="n 4 h w"),
    *(Case("Conv", ["n 1 h w", weights(2, 1, 3, 4)], PLANES, {"auto_pad": mode},
         shape="n 2 h w") for mode in ("SAME_UPPER", "SAME_LOWER")),
    Case("Conv", ["n 2 h", weights(3, 2, 3)], sizes(n=(2, 1, 0), h=(6, 5, 4)), {"pads": [2, 0]}, shape="n 3 h"),
    Case("Conv", ["n 2 h 3 4", weights(3, 2, 2, 2, 2)], sizes(n=(2, 1), h=(6, 5)), shape="n 3 h-1 2 3"),
    Case("Conv", ["n 3 h w", "5 3 2 2", "5"], PLANES, shape="n 5 h-1 w-1"),
    *(Case("ConvTranspose", ["n 4 h w", weights(4, 3 // g, *k), weights(3)], PLANES, {**attrs, "group": g})
         for g, k, attrs in [
        (1, (3, 3), {}), (1, (3, 3), {"strides": [2, 3], "pads": [1, 0, 1, 2], "output_padding": [1, 0]}),
        (1, (2, 2), {"strides": [2, 2]}), (1, (2, 3),
         {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 1]}),
        (1, (3, 2), {"dilations": [2, 2], "strides": [2, 1]}), (1, (1, 1), {"strides": [2, 2]}), (1, (1, 1), {}),
        (1, (4, 4), {"strides": [2, 2], "pads": [1] * 4}), (1, (2, 5), {"strides": [3, 2]}), (1, (1, 4), {}),
        (1, (3, 3), {"dilations": [3, 2], "strides": [3, 4], "pads": [2, 0, 0, 1]}),
    ]),
    *(Case("ConvTranspose", ["n 4 h w", weights(4, 2, *k), weights(4)], PLANES, {"strides": list(s), "group": 2},
           oracle=conv_transpose(s, 2)) for k, s in [((3, 3), (2, 2)), ((2, 2), (2, 2)), ((3, 1), (1, 1)),
                                                        ((5, 1), (3, 2)), ((4, 4), (2, 2))]),
    *(Case("ConvTranspose", ["n 4 h w", weights(4, 1, *k), weights(4)], PLANES, {"strides": list(s), "group": 4},
           oracle=conv_transpose(s, 4)) for k, s in [((3, 3), (2, 2)), ((4, 2), (2, 3)), ((2, 2), (2, 2))]),
    Case("ConvTranspose", ["n 3 h 1", weights(3, 2, 7, 1), weights(2)], sizes(n=(2, 1), h=(6, 1)),
         {"strides": [4, 1]}, shape="n 2 4*h+3 1"),
    Case("ConvTranspose", ["n 4 h w", weights(4, 1, 3, 3)], PLANES, {"group": 4, "pads": [1] * 4}, shape="n 4 h w"),
    Case("ConvTranspose", ["n 2 h w", weights(2, 1, 3, 3)], PLANES,
         {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, shape="n 1 2*h 2*w"),
]  # fmt: skip

POOLING = [
    *(Case(name, ["n 3 h w"], PLANES, {"kernel_shape": [3, 2], **attrs},
         oracle=pooling(name, attrs)) for name in ("MaxPool", "AveragePool", "LpPool") for attrs in (
        {}, {"strides": [2, 3]}, {"pads": [1, 0, 1, 1]}, {"strides": [2, 2], "pads": [1, 1, 0, 0], "ceil_mode": 1},
         {"dilations": [2, 1]}, {"strides": [3, 2], "ceil_mode": 1},
    )),
    *(Case(name, ["n 3 h w"], PLANES, {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 1]},
           shape="n 3 (h+1)//2 w") for name in ("MaxPool", "AveragePool")),
    Case("AveragePool", ["n 3 h w"], PLANES, {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", ["n 3 h w"], PLANES, {"kernel_shape": [3, 2], "pads": [1, 1, 1, 1], "strides": [2, 2],
                                              "ceil_mode": 1, "count_include_pad": 1}),
    Case("MaxPool", ["n 3 h w"], PLANES, {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 1, 1, 0]}, outputs=2),
    Case("MaxPool", ["n 3 h w"], PLANES, {"kernel_shape": [3, 3], "pads": [1] * 4}, dtype=np.uint8, shape="n 3 h w",
         oracle=pooling("MaxPool", {"kernel_shape": [3, 3], "pads": [1] * 4})),
    Case("LpPool", ["n 3 h w"], PLANES, {"kernel_shape": [2, 2], "p": 1}, shape="n 3 h-1 w-1"),
    Case("LpPool", ["n 3 h w"], PLANES, {"kernel_shape": [2, 2], "p": 3}, shape="n 3 h-1 w-1"),
    Case("GlobalAveragePool", ["n 3 h w"], PLANES, shape="n 3 1 1"),
    Case("GlobalMaxPool", ["n 3 h w"], PLANES, shape="n 3 1 1"),
    Case("GlobalLpPool", ["n 3 h w"], PLANES, shape="n 3 1 1",
         oracle=lambda x: np.sqrt((x * x).sum((2, 3), keepdims=True))),
]  # fmt: skip

RESIZE = [
    *(Case("Resize", ["n 2 h w", None, floats(1, 1, *scale)], PLANES,
         {"mode": mode, "coordinate_transformation_mode": where}, 19)
      for mode, where, scale in itertools.product(
          ("nearest", "linear", "cubic"),
          ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"),
          [(2.0, 3.0), (0.6, 1.25), (0.5, 0.25)],
      ) if where != "pytorch_half_pixel" or scale != (0.5, 0.25)),
    *(Case("Resize", ["n 2 h w", None, floats(1, 1, 1.5, 0.5)], sizes(n=(2, 1), h=(6, 8), w=(4, 10)),
           {"mode": mode, "coordinate_transformation_mode": "half_pixel_symmetric"}, 19)
      for mode in ("nearest", "linear", "cubic")),
    *(Case("Resize", ["n 2 h w", None, None, ["n", 2, "2*h", "w+1"]], PLANES,
           {"mode": mode, "coordinate_transformation_mode": where}, 13, shape="n 2 2*h w+1")
      for mode in ("nearest", "linear", "cubic") for where in ("half_pixel", "align_corners", "asymmetric")),
    *(Case("Resize", ["n 2 h w", None, floats(0.5, 0.3)], PLANES, {"mode": mode, "antialias": 1, "axes": [2, 3]}, 19)
      for mode in ("linear", "cubic")),
    Case("Resize", ["n 2 h w", None, floats(0.5, 1.7)], PLANES,
         {"mode": "cubic", "exclude_outside": 1, "axes": [2, 3]}, 19),
    *(Case("Resize", ["n 2 h w", None, floats(1, 1, 2, 3)], PLANES,
           {"nearest_mode": rounding, "coordinate_transformation_mode": where}, 19, shape="n 2 2*h 3*w")
      for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
      for where in ("half_pixel", "asymmetric")),
    *(Case("Resize", ["n 2 h w", roi, floats(1, 1, 1.5, 1.5)], PLANES, {"mode": "linear", "extrapolation_value": 9.0,
           "coordinate_transformation_mode": "tf_crop_and_resize"}, 19,
         data={1: lambda s: floats(0, 0, 0.2, -0.1, 1, 1, 0.7, 1.2)})
      for roi in ("8", floats(0, 0, 0.2, -0.1, 1, 1, 0.7, 1.2))),
    Case("Resize", ["n 2 h w", floats(1, 1, 2, 2)], PLANES, opset=10, shape="n 2 2*h 2*w",
         oracle=lambda x, s: x.repeat(2, 2).repeat(2, 3)),
    Case("Resize", [np.array([-(2**31), 7, 2**31 - 1, 2**24 + 1], np.int32), None, floats(1.5)], [{}],
         {"mode": "linear"},
         oracle=lambda x, s: np.rint(np.interp((np.arange(6) + 0.5) / 1.5 - 0.5, range(4), x)).astype(np.int32)),
    Case("Resize", ["n 2 h w", None, floats(1, 1, 2, 0.5)], PLANES,
         {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}, 11,
         shape="n 2 2*h w//2", oracle=lambda x, s: x.repeat(2, 2)[..., 1 : x.shape[3] // 2 * 2 : 2]),
    Case("Upsample", ["n 2 h w", floats(1, 1, 2, 3)], PLANES, opset=9, shape="n 2 2*h 3*w",
         oracle=lambda x, s: x.repeat(2, 2).repeat(3, 3)),
    Case("Upsample", ["n 2 h w"], PLANES, {"scales": [1.0, 1.0, 2.0, 2.0]}, 7, shape="n 2 2*h 2*w",
         oracle=lambda x: x.repeat(2, 2).repeat(2, 3)),
    Case("AffineGrid", ["n 2 3", ["n", 2, "h", "w"]], PLANES, opset=20, shape="n h w 2"),
    Case("AffineGrid", ["n 2 3", ["n", 2, "h", "w"]], PLANES, {"align_corners": 1}, opset=20, shape="n h w 2"),
    *(Case("GridSample", ["n 2 h w", "n 3 4 2"], PLANES,
         {"mode": mode, "padding_mode": padding, "align_corners": corners}, 20, shape="n 2 3 4")
      for mode in ("nearest", "linear", "cubic") for padding in ("zeros", "border", "reflection")
      for corners in (0, 1)),
]  # fmt: skip

TABLE = [*MOVEMENT, *INDEXING, *CONSTANTS, *CONTRACTIONS, *CONVOLUTION, *POOLING, *RESIZE]


# ------------------------------------------------------------------ forms


def prims(case: Case) -> list[str]:
    return [node.prim for node in build(case).nodes if node.prim not in ("const", "shape")]


def test_forms_that_later_passes_rely_on() -> None:
    plane = "n 6 h w"
    pointwise = prims(Case("Conv", [plane, weights(4, 6, 1, 1)], PLANES))
    assert pointwise == ["transpose", "reshape", "contract", "transpose"]
    depthwise = prims(Case("Conv", [plane, weights(6, 1, 3, 3)], PLANES, {"group": 6}))
    chain = ["transpose", "window", "reshape", "reshape", "broadcast", "mul", "reduce_sum", "transpose"]
    assert depthwise == chain
    assert prims(Case("Resize", [plane, None, floats(1, 1, 2, 2)], PLANES)) == ["reshape", "broadcast", "reshape"] * 2
    assert prims(Case("Gather", ["n m", ints(-1)[0]], NM, {"axis": 1})) == ["slice", "reshape"]
    assert prims(Case("MatMul", ["n 1 2 m", "1 5 m 3"], NM)) == ["reshape", "reshape", "contract"]
    assert prims(Case("Pad", ["n 5", ints(0, 2, 0, 2)], N, {"mode": "reflect"})) == ["slice", "slice", "concat"]
    assert prims(Case("Tile", ["n m", ["n", 1]], NM)) == ["reshape", "broadcast", "reshape"]


def test_guards_name_what_was_assumed() -> None:
    (guard,) = build(Case("Squeeze", ["n m", ints(1)], NM)).guards
    assert {guard.left, guard.right} == {dims.symbol("m"), 1}
    assert len(build(Case("MatMul", ["n m", "k 3"], NM)).guards) == 1
    assert not build(Case("Slice", ["n n+m", [0], ["n"], ints(1)], NM)).guards
    (guard,) = build(Case("Slice", ["9 m", [0], ["n"], ints(0)], NM)).guards
    assert guard.left == dims.parse("min(9, n)")


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        (Case("Reshape", ["n 3", ints(2, 2)], [{}]), InvalidModel, "3*n and 4 differ".replace("*", ".")),
        (Case("Reshape", ["n 3", ints(2, 6)], [{}]), None, ""),
        (Case("Reshape", ["2 3", ints(4)], [{}]), InvalidModel, "6 and 4 differ"),
        (Case("Reshape", ["2 3", ints(-1, -1)], [{}]), InvalidModel, "-1 twice"),
        (Case("Squeeze", ["n 1"], [{}]), UnsupportedOperator, "name the axes"),
        (Case("Squeeze", ["2 3", ints(0)], [{}]), InvalidModel, "2 and 1 differ"),
        (Case("Transpose", ["2 3"], [{}], {"perm": [0, 0]}), InvalidModel, "perm"),
        (Case("Concat", ["2 3", "3 3"], [{}], {"axis": 1}), InvalidModel, "differ"),
        (Case("Concat", ["2 3"], [{}], {"axis": 5}), InvalidModel, "out of range"),
        (Case("Tile", ["2 3", ints(1)], [{}]), InvalidModel, "repeats"),
        (Case("Expand", ["2 3", "1"], [{}]), UnsupportedOperator, "shape must follow from constants"),
        (Case("Slice", ["3", ints(0), ints(1), ints(0), ints(0)], [{}]), InvalidModel, "step"),
        (Case("Pad", ["3", ints(0, 1)], [{}], {"mode": "mirror"}), InvalidModel, "mirror"),
        (Case("MatMul", ["2 3", "4 5"], [{}]), InvalidModel, "differ"),
        (Case("MatMul", ["", "4 5"], [{}]), InvalidModel, "rank 1"),
        (Case("Conv", ["1 3 8 8", weights(4, 2, 3, 3)], [{}]), InvalidModel, "differ"),
        (Case("Conv", ["1 3 8 8", "4 3 k k"], [{}]), UnsupportedOperator, "kernel"),
        (Case("Einsum", ["2 3"], [{}], {"equation": "ij,jk->ik"}), InvalidModel, "operands"),
        (Case("Einsum", ["2 3"], [{}], {"equation": "ijk->k"}), InvalidModel, "ranks"),
        (Case("Resize", ["1 1 2 2"], [{}]), InvalidModel, "neither"),
        (Case("RandomNormal", [], [{}]), UnsupportedOperator, "RandomNormal"),
    ],
    ids=lambda v: v.operator if isinstance(v, Case) else "",
)
def test_refusals(case: Case, error: type[StitchError] | None, text: str) -> None:
    if error is None:
        assert build(case).guards
        return
    with pytest.raises(error, match=text):
        build(case)


def test_host_functions() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (sums,) = FUNCTIONS["cumsum"]({"exclusive": 1, "reverse": 1}, x, ints(1)[0])
    np.testing.assert_array_equal(sums, [[3, 2, 0], [9, 5, 0]])
    (products,) = FUNCTIONS["cumprod"]({"exclusive": 0, "reverse": 0}, x, ints(0)[0])
    np.testing.assert_array_equal(products, [[0, 1, 2], [0, 4, 10]])
    picked, places = FUNCTIONS["topk"]({"axis": 0, "largest": True}, floats(1, 3, 3, 2), ints(3))
    np.testing.assert_array_equal(picked, [3, 3, 2])
    np.testing.assert_array_equal(places, [1, 2, 3])
    assert [a.shape for a in FUNCTIONS["nonzero"]({}, np.zeros((0, 2)))] == [(2, 0)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8])
@pytest.mark.parametrize("values", [5, 2000], ids=["many are equal", "few are equal"])
@pytest.mark.parametrize("nans", [0, 3, 300])
def test_the_first_of_long_rows(dtype: type, values: int, nans: int) -> None:
    """They are selected before they are sorted: in the same order as by sorting all."""
    rng = np.random.default_rng(0)
    x: Array = rng.integers(0, values, (2, 1000, 3)).astype(dtype)
    if np.dtype(dtype).kind == "f":
        x.reshape(-1)[rng.choice(x.size, nans, replace=False)] = np.nan
        x[0, :3, 0] = np.inf, -np.inf, -0.0
    for largest in (True, False):
        keys = np.where(np.isnan(x), np.inf, x) if np.dtype(dtype).kind == "f" else x.astype(np.int64)
        order = np.lexsort(
            (
                np.broadcast_to(np.arange(1000)[None, :, None], x.shape),
                -keys if largest else keys,
                (np.isnan(x) ^ largest) if np.dtype(dtype).kind == "f" else np.zeros(x.shape),
            ),
            axis=1,
        )
        for count in (1, 100, 250):
            picked, places = FUNCTIONS["topk"]({"axis": 1, "largest": largest}, x, ints(count))
            np.testing.assert_array_equal(places, order[:, :count])
            np.testing.assert_array_equal(picked, np.take_along_axis(x, places, 1))


def test_max_roi_pool() -> None:
    """Cells are whole elements and may overlap; ONNX has no case for it."""
    regions = np.array([[0, 0, 0, 3, 2], [1, 1, 1, 1, 1]], np.float32)
    case = Case("MaxRoiPool", ["n 1 h w", regions], [{}], {"pooled_shape": [2, 2]}, shape="2 1 2 2")
    x = np.arange(2 * 4 * 4, dtype=np.float32).reshape(2, 1, 4, 4)
    (y,) = evaluate(build(case), {"x0": x, "symbols": np.array(True)})
    np.testing.assert_array_equal(y[:, 0], [[[5, 7], [9, 11]], [[21, 21], [21, 21]]])


@pytest.mark.parametrize("case", TABLE, ids=[f"{i}-{case.operator}" for i, case in enumerate(TABLE)])
def test_symbolic_shapes(case: Case) -> None:
    check(case)
