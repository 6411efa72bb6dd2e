"""Shapes from which other loops are chosen: folds in parts, rows streamed, moments by rows, blocks transposed. Each is
compared with numpy in float64, fixed and with open dims, and gives the same bits with one to four threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import parser

import stitch
from stitch import knobs
from stitch.codegen import llvm
from stitch.target import parse

Array = npt.NDArray[np.float64]


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def _rope(x: Array, c: Array, s: Array) -> Array:
    a, b = np.split(x, 2, -1)
    return x * c + np.concatenate([-b, a], -1) * s


def _nll(x: Array, t: Array) -> Array:
    rows = np.log(_softmax(x, 1))[np.arange(len(t)), t.astype(np.int64)]
    return np.asarray(-rows.mean())


def _unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


# name: the graph, its dims, and what it means
CASES: dict[str, tuple[str, dict[str, int], Callable[..., Array]]] = {
    "column sums": (
        "(float[n,m] x) => (float[m] y) <int64[1] a = {0}> { y = ReduceSum<keepdims = 0>(x, a) }",
        {"n": 3001, "m": 1103},
        lambda x: x.sum(0),
    ),
    "few tall columns": (
        "(float[n,m] x) => (float[m] y) <int64[1] a = {0}> { y = ReduceMax<keepdims = 0>(x, a) }",
        {"n": 100_003, "m": 7},
        lambda x: x.max(0),
    ),
    "one long row": (
        "(float[n] x) => (float y) { e = Exp(x) y = ReduceSum<keepdims = 0>(e) }",
        {"n": 300_001},
        lambda x: np.exp(x).sum(),
    ),
    "softmax of one long row": (
        "(float[k,n] x) => (float[k,n] y) { y = Softmax<axis = -1>(x) }",
        {"k": 2, "n": 100_003},
        lambda x: _softmax(x, -1),
    ),
    "softmax of columns": (
        "(float[n,m] x) => (float[n,m] y) { y = Softmax<axis = 0>(x) }",
        {"n": 2003, "m": 601},
        lambda x: _softmax(x, 0),
    ),
    "two axes": (
        """(float[n,m] x) => (float[n,m] y) <int64[1] rows = {1}, int64[1] columns = {0}> {
            e = Exp(x) s = ReduceSum(e, rows) d = Div(e, s) t = ReduceSum(d, columns) y = Div(d, t) }""",
        {"n": 3001, "m": 303},
        lambda x: (d := _softmax(x, 1)) / d.sum(0, keepdims=True),
    ),
    "variance of everything": (
        """(float[n,m] x) => (float y) { mean = ReduceMean<keepdims = 0>(x) d = Sub(x, mean) p = Mul(d, d)
            y = ReduceMean<keepdims = 0>(p) }""",
        {"n": 601, "m": 703},
        lambda x: x.var(),
    ),
    "variance of a batch": (
        """(float[k,n,m] x) => (float[k,a,a] y) <int64[2] axes = {1, 2}> { mean = ReduceMean(x, axes) d = Sub(x, mean)
            p = Mul(d, d) y = ReduceMean(p, axes) }""",
        {"k": 3, "n": 401, "m": 303, "a": 1},
        lambda x: x.var((1, 2), keepdims=True),
    ),
    "squares about what differs along the row": (
        """(float[n,m] x, float[m] w) => (float y) { e = Exp(x) mean = ReduceMean<keepdims = 0>(e) c = Mul(mean, w)
            d = Sub(e, c) p = Mul(d, d) y = ReduceMean<keepdims = 0>(p) }""",
        {"n": 601, "m": 703},
        lambda x, w: ((np.exp(x) - np.exp(x).mean() * w) ** 2).mean(),
    ),
    "transpose": (
        "(float[n,m] x, float[m] b) => (float[m,n] y) { s = Add(x, b) y = Transpose<perm = [1, 0]>(s) }",
        {"n": 1003, "m": 517},
        lambda x, b: (x + b).T,
    ),
    "norm, then channels last": (
        """(float[n,c,h] x, float[c] g) => (float[n,h,c] y) {
            t = Transpose<perm = [0, 2, 1]>(x) y = LayerNormalization(t, g) }""",
        {"n": 3, "c": 67, "h": 1001},
        lambda x, g: (
            (t := x.transpose(0, 2, 1) - x.transpose(0, 2, 1).mean(-1, keepdims=True))
            / np.sqrt((t * t).mean(-1, keepdims=True) + 1e-5)
            * g
        ),
    ),
    "short rows": (
        "(float[n,c] x) => (float[n,c] y) { y = Softmax<axis = -1>(x) }",
        {"n": 20_011, "c": 10},
        lambda x: _softmax(x, -1),
    ),
    "rotary embedding": (
        """(float[h,s,d] x, float[s,d] c, float[s,d] z) => (float[h,s,d] y) {
            a, b = Split<axis = -1, num_outputs = 2>(x) n = Neg(b)
            q = Concat<axis = -1>(n, a) u = Mul(x, c) v = Mul(q, z) y = Add(u, v) }""",
        {"h": 3, "s": 101, "d": 64},
        _rope,
    ),
    "picked losses": (
        """(float[n,c] x, int64[n] t) => (float y) { l = LogSoftmax<axis = -1>(x)
            y = NegativeLogLikelihoodLoss<reduction = "mean">(l, t) }""",
        {"n": 1003, "c": 701},
        _nll,
    ),
    "independent rows": (
        """(float[n,d] x, float[n,d] z) => (float[n] y) <int64[1] last = {-1}> { u = LpNormalization<axis = -1>(x)
            v = LpNormalization<axis = -1>(z) p = Mul(u, v) y = ReduceSum<keepdims = 0>(p, last) }""",
        {"n": 2003, "d": 301},
        lambda x, z: (_unit(x) * _unit(z)).sum(-1),
    ),
}


def model(name: str, fixed: bool) -> onnx.ModelProto:
    text, dims, _ = CASES[name]
    made = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    for value in (*made.graph.input, *made.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and (fixed or dim.dim_param in "ac"):
                dim.dim_value = dims[dim.dim_param]
    return made


def feed(name: str) -> dict[str, np.ndarray]:
    _, dims, _ = CASES[name]
    rng = np.random.default_rng(1)
    found = {}
    for value in model(name, True).graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            found[value.name] = rng.integers(0, dims["c"], shape)
        else:
            found[value.name] = rng.standard_normal(shape).astype(np.float32)
    return found


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "open"])
@pytest.mark.parametrize("name", CASES)
def test_results(name: str, fixed: bool) -> None:
    given = feed(name)
    want = CASES[name][2](*[v.astype(np.float64) for v in given.values()])
    results = []
    for threads in (1, 2, 3, 4):
        (got,) = stitch.optimize(model(name, fixed), threads=threads).run(None, given)
        results.append(got)
    np.testing.assert_allclose(results[0], want, rtol=2e-5, atol=2e-6 * float(np.abs(want).max()))
    for other in results[1:]:
        assert other.tobytes() == results[0].tobytes()


@pytest.mark.parametrize(
    "name", ["short rows", "independent rows", "norm, then channels last", "softmax of one long row"]
)
def test_a_row_alone(name: str) -> None:
    """Where the number of rows is open, a row's result is the same bits in any company."""
    given = feed(name)
    compiled = stitch.optimize(model(name, False))
    (together,) = compiled.run(None, given)
    rows = CASES[name][0].split("]")[0].split("[")[1].split(",")[0]
    count = CASES[name][1][rows]
    for k in (0, count // 2, count - 1):
        alone = {n: v[k : k + 1] if len(v) == count else v for n, v in given.items()}
        assert compiled.run(None, alone)[0].tobytes() == together[k : k + 1].tobytes()


def test_halves_are_added_up_in_float32() -> None:
    """A sum of half a million ones does not fit float16, nor do its rows' sums keep enough digits; the mean does."""
    text = "(float16[n,m] x) => (float16 y) { y = ReduceMean<keepdims = 0>(x) }"
    made = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    for dim, size in zip(made.graph.input[0].type.tensor_type.shape.dim, (601, 901), strict=True):
        dim.dim_value = size
    x = np.random.default_rng(2).uniform(0.5, 100, (601, 901)).astype(np.float16)
    (got,) = stitch.optimize(made).run(None, {"x": x})
    assert got == np.float16(x.astype(np.float64).mean())


@pytest.mark.parametrize("dtype", ["float", "float16", "uint8"])
@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize("rows", [1201, 3, None])
def test_stores_past_the_caches(dtype: str, shift: int, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a chain walks more than the last cache holds, outputs are stored past it, if aligned; with an open dim
    (None), the code decides when it runs."""
    texts: list[str] = []
    module = llvm.module

    def kept(codes: Iterable[llvm.Code], triple: str = "") -> str:
        texts.append(module(codes, triple))
        return texts[-1]

    monkeypatch.setattr(llvm, "module", kept)
    if rows is None:
        monkeypatch.setattr(llvm, "STREAMED", 1 << 16)  # between what the two sizes below store
    graph = f"({dtype}[r,4224] x) => ({dtype}[r,4224] y) {{ y = Add(x, x) }}"
    made = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {graph}')
    for value in (*made.graph.input, *made.graph.output):
        if rows is not None:
            value.type.tensor_type.shape.dim[0].dim_value = rows
    with knobs.using(target="host;l3=0", cache_bytes=0):
        compiled = stitch.optimize(made, threads=2)
    assert ("nontemporal" in texts[0]) == (parse("host").is_x86 and rows != 3)
    kind = {"float": np.float32, "float16": np.float16, "uint8": np.uint8}[dtype]
    for count in (3, 1201) if rows is None else (rows,):
        x = (np.arange(count * 4224) % 101).astype(kind).reshape(count, 4224)
        room = np.empty(x.size + 128, kind)
        start = -room.ctypes.data % 64 // room.itemsize + shift
        y = room[start : start + x.size].reshape(x.shape)
        compiled.run(None, {"x": x}, [y])
        assert np.array_equal(y, x + x)
