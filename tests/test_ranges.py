"""What a value can hold: what clamps, casts and functions make of the numbers where such claims are tight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch.dtypes import FLOAT32, FLOAT64, INT8, INT16, INT32, INT64, UINT8
from stitch.evaluate import evaluate
from stitch.graph import Builder
from tests import pipeline


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("prim", ["max", "min"])
@pytest.mark.parametrize("first", [True, False])
def test_a_bound_that_is_nan_is_the_result(prim: str, dtype: np.dtype, first: bool) -> None:
    """A literal as the second operand was taken for a number: the result was x."""
    b = Builder("nan")
    x = b.input("x", dtype, (37,))
    nan = b.broadcast(b.const(np.nan, dtype), (37,))
    y = b.elementwise(prim, *((nan, x) if first else (x, nan)))
    z = b.max(b.min(b.elementwise(prim, b.unary("abs", x), nan), 3.0), 1.0)
    feed = {"x": np.linspace(-3, 3, 37).astype(dtype)}
    for got in pipeline.native(b.finish({"y": y, "z": z}), feed):
        assert np.isnan(got).all()


@pytest.mark.parametrize("source", [INT8, UINT8, INT16])
@pytest.mark.parametrize("between", [FLOAT32, FLOAT64, INT64])
@pytest.mark.parametrize("to", [INT8, UINT8, INT16])
def test_integers_through_floats_are_saturated(source: np.dtype, between: np.dtype, to: np.dtype) -> None:
    """cast.int8(cast.float32(x)) of an uint8 became cast.int8(x), which wraps."""
    b = Builder("through")
    x = b.input("x", source, (256,))
    graph = b.finish({"y": b.cast(b.cast(x, between), to)})
    info = np.iinfo(source)
    values = np.linspace(info.min, info.max, 256).astype(source)
    (got,) = pipeline.native(graph, {"x": values})
    saturated = values.clip(np.iinfo(to).min, np.iinfo(to).max).astype(to)
    np.testing.assert_array_equal(got, values.astype(to) if between == INT64 else saturated)


def test_a_bound_of_53_bits_and_the_next() -> None:
    """2^53 + 1 is no float64: taken for 2^53, it made the second bound seem needless."""
    b = Builder("bounds")
    x = b.input("x", INT64, (20,))
    y = b.min(b.min(x, 2**53 + 1), 2**53)
    (got,) = pipeline.native(b.finish({"y": y}), {"x": np.full(20, 2**60)})
    assert (got == 2**53).all()


def test_a_bound_of_subnormal_exponentials() -> None:
    """e^-102.7 is 1.8 times the least float32, and rounded to twice that: more than its range said."""
    b = Builder("tiny")
    x = b.cast(b.input("x", INT8, (20,)), FLOAT32)
    e = b.unary("exp", b.min(x, -102.7))
    for _ in range(3):
        e = b.mul(e, 1e15)
    (got,) = pipeline.native(b.finish({"y": b.min(e, 2.6)}), {"x": np.full(20, 5, np.int8)})
    assert (got == np.float32(2.6)).all()


NUMBERS = st.sampled_from(
    [0.0, 0.5, -0.5, 1.0, -1.0, 127.0, -128.0, 255.0, 90.0, 80.0, -103.5, -0.9999999, 1e30, -3e38, 2.0**24, 2.0**31,
     np.inf, -np.inf, np.nan]
)  # fmt: skip
STEPS = [
    "clip",
    "clip",
    "clip",
    "exp",
    "log1p",
    "rint",
    "floor",
    "neg",
    "abs",
    "add",
    "mul",
    "div",
    "integer",
    "number",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), NUMBERS, NUMBERS), min_size=2, max_size=7), st.booleans())
def test_chains_of_clamps_and_functions(steps: list[tuple[str, float, float]], byte: bool) -> None:
    """Compiled, such a chain is what it is operator by operator: within some ulp, and NaN where it was."""
    b = Builder("chain")
    v = b.cast(b.input("x", INT8, (40,)), FLOAT32) if byte else b.input("x", FLOAT32, (40,))
    for step, c, d in steps:
        if step == "clip":
            v = b.min(b.max(v, c), d)
        elif step in ("add", "mul", "div"):
            v = b.elementwise(step, v, b.broadcast(b.const(c, FLOAT32), (40,)))
        elif step == "integer":
            v = b.cast(b.cast(v, [INT8, UINT8, INT32, INT64][int(abs(c)) % 4 if np.isfinite(c) else 0]), FLOAT32)
        elif step == "number":
            v = b.where(b.eq(v, v), v, b.broadcast(b.const(c, FLOAT32), (40,)))
        else:
            v = b.unary(step, v)
        if step in ("exp", "log1p"):  # a last bit must not become an integer
            v = b.cast(b.unary("rint", b.mul(b.min(v, 1e3), 8.0)), FLOAT32)
    graph = b.finish({"y": v})
    special = [0, -0.0, 0.5, 1.5, -1, -0.99999994, 88.7, 89.9, 90.1, 127.5, -128.5, 255.5, 1e-45, 3e38, -3e38, 2.0**31,
               np.inf, -np.inf, np.nan]  # fmt: skip
    rng = np.random.default_rng(1)
    feed = rng.integers(-128, 128, 40).astype(np.int8) if byte else np.resize(special, 40).astype(np.float32)
    with np.errstate(all="ignore"):
        (want,) = evaluate(graph, {"x": feed})
    (got,) = pipeline.native(graph, {"x": feed})
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, 1e-4, 1e-6)
