"""Long sums: blocks cover all terms in order, and the error stays within what `stitch.codegen.sums` states."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import parser

import stitch
from stitch.codegen.sums import block_of, runs

Array = npt.NDArray[np.float64]

LONG = 1_000_003
ERROR = 3e-5  # relative, of a million terms of one sign; one chain of equal ones is wrong by a hundredth


@given(st.tuples(st.integers(0, 9), st.integers(0, 9), st.one_of(st.integers(0, 99), st.integers(1000, 3000))))
def test_runs(extents: tuple[int, int, int]) -> None:
    terms, lengths = [], [0]
    for place, run, full in runs(extents):
        terms += [(*place, k) for k in run]
        lengths[-1] += len(run)
        lengths += [0] if full else []
    assert terms == list(itertools.product(*map(range, extents)))
    n, limit = math.prod(extents), block_of(math.prod(extents))
    assert max(lengths) <= limit
    assert len(lengths) <= 2 * n / limit + 2


@given(st.integers(1, 1 << 40))
def test_blocks_are_as_many_as_their_terms(n: int) -> None:
    assert block_of(n) == 1024 if n < 1 << 20 else math.sqrt(n) <= block_of(n) <= 2 * math.sqrt(n)


def _sum(axis: int | None) -> Callable[[Array], Array]:
    return lambda x: np.asarray(x.sum(axis))


def _reduced(kind: str, axis: str) -> str:
    given = f"<int64[1] a = {{{axis}}}>"
    return f"(float[p,n,m] x) => (float[q,r] y) {given} {{ y = {kind}<keepdims = 0>(x, a) }}"


# name: the graph, its dims, and what it means
CASES: dict[str, tuple[str, dict[str, int], Callable[..., Array]]] = {
    "matmul": ("(float[m,k] a, float[k,n] b) => (float[m,n] y) { y = MatMul(a, b) }",
               {"m": 3, "k": LONG, "n": 40}, lambda a, b: a @ b),
    "vector times matrix": ("(float[m,k] a, float[k,n] b) => (float[m,n] y) { y = MatMul(a, b) }",
                            {"m": 1, "k": LONG, "n": 40}, lambda a, b: a @ b),
    "matrix times vector": ("(float[m,k] a, float[k] b) => (float[m] y) { y = MatMul(a, b) }",
                            {"m": 4, "k": LONG}, lambda a, b: a @ b),
    "dot": ("(float[k] a, float[k] b) => (float y) { y = MatMul(a, b) }", {"k": LONG}, lambda a, b: a @ b),
    "all": ("(float[p,n] x) => (float y) { y = ReduceSum<keepdims = 0>(x) }", {"p": 3, "n": LONG}, _sum(None)),
    "last": (_reduced("ReduceSum", "2"), {"p": 1, "n": 20, "m": LONG}, _sum(2)),
    "mean": (_reduced("ReduceMean", "2"), {"p": 1, "n": 20, "m": LONG}, lambda x: x.mean(2)),
    "leading": (_reduced("ReduceSum", "0"), {"p": LONG, "n": 1, "m": 20}, _sum(0)),
    "norms of columns": (_reduced("ReduceL2", "1"), {"p": 1, "n": LONG, "m": 20}, lambda x: np.sqrt((x * x).sum(1))),
    "middle": (_reduced("ReduceSum", "1"), {"p": 20, "n": 100_003, "m": 17}, _sum(1)),
    "rows of a large array": (_reduced("ReduceSum", "1"), {"p": 2, "n": 50_003, "m": 300}, _sum(1)),
    "convolution": ("(float[b,c,h,w] x, float[o,c,h,w] f) => (float[b,o,1,1] y) { y = Conv(x, f) }",
                    {"b": 1, "c": 100, "h": 100, "w": 100, "o": 8},
                    lambda x, f: np.einsum("bchw,ochw->bo", x, f)[..., None, None]),
}  # fmt: skip


def model(name: str, fixed: bool) -> onnx.ModelProto:
    text, dims, _ = CASES[name]
    made = parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> g {text}')
    for value in (*made.graph.input, *made.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dims and (fixed or name == "convolution"):
                dim.dim_value = dims[dim.dim_param]
    return made


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "open"])
@pytest.mark.parametrize("name", CASES)
def test_error(name: str, fixed: bool) -> None:
    _, dims, meaning = CASES[name]
    compiled = [stitch.optimize(model(name, fixed), threads=threads) for threads in (1, 3)]
    for terms in (lambda shape: np.full(shape, 0.1, np.float32), np.random.default_rng(0).random):
        feed = {}
        for port in compiled[0].inputs:
            shape = [d if isinstance(d, int) else dims[d] for d in port.shape]
            feed[port.name] = np.asarray(terms(shape), np.float32)
        got, other = (c.run(None, feed)[0] for c in compiled)
        want = meaning(*(v.astype(np.float64) for v in feed.values()))
        np.testing.assert_allclose(got, want.reshape(got.shape), rtol=ERROR)
        assert got.tobytes() == other.tobytes()
