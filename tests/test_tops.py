"""Where a difference from a maximum is seen, and that it changes no bit."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims
from stitch.codegen import lower
from stitch.codegen.tops import most
from stitch.dtypes import BFLOAT16, FLOAT16, FLOAT32
from stitch.graph import Builder, Graph, Value
from stitch.simplify import simplify
from tests import pipeline

N = dims.symbol("n")


def known(graph: Graph) -> list[float | None]:
    makers = graph.producers()
    return [most(node, makers) for node in graph.nodes if node.prim == "sub"]


def softmax(shape: tuple[dims.Dim, ...], axis: int, dtype: np.dtype = FLOAT32) -> Graph:
    b = Builder("softmax")
    x = b.input("x", dtype, shape)
    wide = x if dtype == FLOAT32 else b.cast(x, FLOAT32)
    e = b.elementwise("exp", b.sub(wide, b.reduce("reduce_max", wide, [axis], keepdims=True)))
    return b.finish({"y": b.div(e, b.reduce("reduce_sum", e, [axis], keepdims=True))})


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 4, 4), (2, 5, 3), (N, N, N)])
def test_softmax_along_any_axis(shape: tuple[dims.Dim, ...], axis: int, dtype: np.dtype) -> None:
    assert known(simplify(softmax(shape, axis, dtype))) == [0.0]


def square(make: str) -> Graph:
    """x of n by n minus something that looks like its maxima."""
    b = Builder()
    x, other = b.input("x", FLOAT32, (N, N)), b.input("z", FLOAT32, (N, N))
    top = b.reduce("reduce_max", x, [0])
    shown: dict[str, Value] = {
        "beside the wrong axis": b.reshape(top, [N, 1]),
        "of another value": b.reduce("reduce_max", other, [0]),
        "smallest": b.reduce("reduce_min", x, [0]),
        "no more than the largest": b.min(top, b.reduce("reduce_max", other, [0])),
        "as it should be": top,
        "something above": b.max(b.reduce("reduce_max", other, [0]), top),
    }
    if make in shown:
        return b.finish({"y": b.sub(x, b.broadcast(shown[make], [N, N]))})
    y = b.input("y", FLOAT32, (6, 6))
    rows = b.reduce("reduce_max", b.reshape(y, [2, 3, 6]), [1])
    columns = b.reduce("reduce_max", b.reshape(y, [6, 2, 3]), [2])
    parts = {"in parts": rows, "in parts of the other axis": columns, "of a part": rows}
    whole = b.reduce("reduce_max", parts[make], [1] if "other" in make else [0])
    if make == "of a part":
        whole = b.reshape(b.slice(rows, [1, 0], [1, 6]), [6])
    shape = [6, 1] if "other" in make else [1, 6]
    return b.finish({"y": b.sub(y, b.broadcast(b.reshape(whole, shape), [6, 6]))})


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        ("as it should be", True),
        ("something above", True),
        ("in parts", True),
        ("in parts of the other axis", True),
        ("of a part", False),
        ("beside the wrong axis", False),
        ("of another value", False),
        ("smallest", False),
        ("no more than the largest", False),
    ],
)
def test_what_is_proved(make: str, seen: bool) -> None:
    assert known(square(make)) == [0.0 if seen else None]


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 70)),
    st.integers(0, 1),
    st.sampled_from([FLOAT32, FLOAT16]),
    st.integers(0, 2**31),
)
def test_no_bit_changes(shape: tuple[int, int], axis: int, dtype: np.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 5)).astype(dtype)
    special = np.array([np.inf, -np.inf, np.nan, np.finfo(dtype).max, np.finfo(dtype).min, 0, -0.0], dtype)
    x = np.where(rng.random(shape) < 0.05, rng.choice(special, shape), x)
    graph = softmax(shape, axis, dtype)
    with np.errstate(all="ignore"):
        (got,) = pipeline.native(graph, {"x": x})
        with mock.patch.object(lower, "most", return_value=None):
            (want,) = pipeline.native(graph, {"x": x})
    assert np.array_equal(got, want, equal_nan=True)
