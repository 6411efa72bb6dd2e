"""The math library on the numpy builder: its stated bounds, its special values, its builder."""

import math
import re

import mpmath
import numpy as np
import pytest

from benchmarks.ulp import measure, near_edges
from stitch.codegen.bits import NumpyBuilder, evaluate
from stitch.codegen.mathlib import FUNCTIONS, CountingBuilder

INF, NAN = math.inf, math.nan
MAX, LEAST, LEAST_NORMAL = 3.4028234663852886e38, 2.0**-149, 2.0**-126
UNARY = [name for name, function in FUNCTIONS.items() if function.arity == 1]
ODD = ["expm1", "log1p", "tanh", "erf", "sin", "tan", "asin", "atan", "sinh", "asinh", "atanh"]


def call(name: str, *arguments: float) -> float:
    return float(evaluate(name, *(np.array([a], np.float32) for a in arguments))[0])


def same(got: float, want: float) -> bool:
    """Equal as floats with sign of zero, any NaN being as good as another."""
    return (math.isnan(got) and math.isnan(want)) or (got == want and math.copysign(1, got) == math.copysign(1, want))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bound(name: str) -> None:
    # A prime stride, and every neighbourhood where ranges end.
    worst = measure(name, 60013 if FUNCTIONS[name].arity == 1 else 20011)
    assert worst.ulp <= FUNCTIONS[name].ulp, worst


@pytest.mark.parametrize("name", UNARY)
def test_nan_goes_through(name: str) -> None:
    patterns = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF], np.uint32)
    assert np.isnan(evaluate(name, patterns.view(np.float32))).all()


@pytest.mark.parametrize("name", ODD)
def test_tiny_arguments_are_kept(name: str) -> None:
    x = np.array([0.0, -0.0, LEAST, -LEAST, 3 * LEAST, -5 * LEAST, LEAST_NORMAL], np.float32)
    got = evaluate(name, x)
    assert np.array_equal(np.signbit(got), np.signbit(x))
    slope = 2 / math.sqrt(math.pi) if name == "erf" else 1.0
    assert np.abs(got - slope * x.astype(np.float64)).max() <= LEAST
    if name != "erf":
        assert np.array_equal(got[:2], x[:2])


SPECIAL = [
    ("exp", [(-INF, 0.0), (INF, INF), (0.0, 1.0), (-0.0, 1.0), (MAX, INF), (-MAX, 0.0), (88.73, INF), (-104.0, 0.0)]),
    ("exp2", [(-INF, 0.0), (INF, INF), (0.0, 1.0), (128.0, INF), (127.0, 2.0**127), (-149.0, LEAST), (-151.0, 0.0)]),
    ("expm1", [(-INF, -1.0), (INF, INF), (MAX, INF), (-MAX, -1.0), (88.73, INF)]),
    ("log", [(0.0, -INF), (-0.0, -INF), (1.0, 0.0), (INF, INF), (-INF, NAN), (-1.0, NAN), (-LEAST, NAN)]),
    ("log2", [(0.0, -INF), (1.0, 0.0), (INF, INF), (-1.0, NAN), (LEAST, -149.0), (8.0, 3.0), (0.5, -1.0)]),
    ("log1p", [(-1.0, -INF), (-1.5, NAN), (-INF, NAN), (INF, INF)]),
    ("tanh", [(INF, 1.0), (-INF, -1.0), (9.5, 1.0), (-9.5, -1.0), (MAX, 1.0), (-MAX, -1.0)]),
    ("sigmoid", [(INF, 1.0), (-INF, 0.0), (0.0, 0.5), (-0.0, 0.5), (MAX, 1.0), (-MAX, 0.0), (40.0, 1.0)]),
    ("softplus", [(INF, INF), (-INF, 0.0), (MAX, MAX), (-MAX, 0.0)]),
    ("erf", [(INF, 1.0), (-INF, -1.0), (MAX, 1.0), (-MAX, -1.0), (3.95, 1.0), (-3.95, -1.0)]),
    ("sin", [(INF, NAN), (-INF, NAN)]),
    ("cos", [(INF, NAN), (-INF, NAN), (0.0, 1.0), (-0.0, 1.0), (LEAST, 1.0)]),
    ("tan", [(INF, NAN), (-INF, NAN)]),
    ("asin", [(1.0, math.pi / 2), (-1.0, -math.pi / 2), (1.0000001, NAN), (-2.0, NAN), (INF, NAN), (-INF, NAN)]),
    ("acos", [(1.0, 0.0), (-1.0, math.pi), (0.0, math.pi / 2), (1.0000001, NAN), (-2.0, NAN), (INF, NAN), (-INF, NAN)]),
    ("atan", [(INF, math.pi / 2), (-INF, -math.pi / 2), (MAX, math.pi / 2)]),
    ("sinh", [(INF, INF), (-INF, -INF), (MAX, INF), (89.42, INF), (-89.42, -INF)]),
    ("cosh", [(INF, INF), (-INF, INF), (0.0, 1.0), (-0.0, 1.0), (MAX, INF), (89.42, INF)]),
    ("asinh", [(INF, INF), (-INF, -INF)]),
    ("acosh", [(INF, INF), (1.0, 0.0), (0.5, NAN), (-1.0, NAN), (-3.0, NAN), (-INF, NAN)]),
    ("atanh", [(1.0, INF), (-1.0, -INF), (1.0000001, NAN), (-2.0, NAN), (INF, NAN), (-INF, NAN)]),
    ("sqrt", [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-1.0, NAN), (-INF, NAN), (4.0, 2.0)]),
    ("rsqrt", [(0.0, INF), (-0.0, -INF), (INF, 0.0), (-1.0, NAN), (4.0, 0.5)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "cases"), SPECIAL, ids=[name for name, _ in SPECIAL])
def test_special_values(name: str, cases: list[tuple[float, float]]) -> None:
    for x, want in cases:
        got = call(name, x)
        assert same(got, float(np.float32(want))), (x, got, want)


# C's Annex F, and one case of each sign and size.
POW = [
    (2.0, 3.0, 8.0), (2.0, -149.0, LEAST), (2.0, 127.0, 2.0**127), (2.0, 128.0, INF), (-2.0, 3.0, -8.0),
    (-2.0, 2.0, 4.0), (-2.0, 0.5, NAN), (-1.0, INF, 1.0), (-1.0, -INF, 1.0), (-1.0, 3.0, -1.0),
    (-1.0, NAN, NAN), (1.0, NAN, 1.0),
    (1.0, INF, 1.0), (NAN, 0.0, 1.0), (NAN, -0.0, 1.0), (NAN, 1.0, NAN), (2.0, NAN, NAN), (INF, 0.0, 1.0),
    (0.0, 0.0, 1.0), (0.0, 3.0, 0.0), (-0.0, 3.0, -0.0), (-0.0, 2.0, 0.0), (0.0, -3.0, INF), (-0.0, -3.0, -INF),
    (-0.0, -2.0, INF), (0.0, 1e-30, 0.0), (0.0, -1e-30, INF), (0.0, INF, 0.0), (0.0, -INF, INF), (-0.0, 0.5, 0.0),
    (-0.0, -0.5, INF), (INF, 2.0, INF), (INF, -2.0, 0.0), (INF, 1e-30, INF), (-INF, 3.0, -INF), (-INF, 2.0, INF),
    (-INF, 0.5, INF), (-INF, -3.0, -0.0), (-INF, -2.0, 0.0), (0.5, INF, 0.0), (0.5, -INF, INF), (2.0, INF, INF),
    (2.0, -INF, 0.0), (-0.5, INF, 0.0), (-0.5, -INF, INF), (-2.0, INF, INF), (-2.0, -INF, 0.0), (INF, INF, INF),
    (INF, -INF, 0.0), (-INF, INF, INF), (-INF, -INF, 0.0), (-1.0, 16777215.0, -1.0), (-1.0, 16777216.0, 1.0),
    (MAX, 1.0, MAX), (LEAST, 1.0, LEAST), (MAX, 2.0, INF), (LEAST, 2.0, 0.0), (-MAX, 3.0, -INF), (-LEAST, 3.0, -0.0),
    (1.0000001, MAX, INF), (0.99999994, MAX, 0.0), (3.0, 2.0, 9.0), (5.0, -1e-40, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("x", "y", "want"), POW)
def test_pow_special_values(x: float, y: float, want: float) -> None:
    assert same(call("pow", x, y), want)


@pytest.mark.parametrize(("name", "low", "high"), [("tanh", -1, 1), ("erf", -1, 1), ("sigmoid", 0, 1)])
def test_saturates_without_overshoot(name: str, low: float, high: float) -> None:
    x = np.arange(0, 0x7F800000, 997, dtype=np.uint32).view(np.float32)
    for argument in (x, -x):
        y = evaluate(name, argument)
        assert y.min() >= low
        assert y.max() <= high
    beyond = x[x > 20]
    assert (evaluate(name, beyond) == high).all()


def test_huge_angles() -> None:
    # float32 values nearest to multiples of pi/2, and mpmath as a reference of its own
    for x in (16367173 * 2.0**72, 2.0**127, MAX, 8388608.0, 1e22, 262143.98, 5e5):
        x = float(np.float32(x))
        with mpmath.workprec(400):
            for name in ("sin", "cos", "tan"):
                want = getattr(mpmath, name)(mpmath.mpf(x))
                assert abs(call(name, x) / want - 1) < FUNCTIONS[name].ulp * 2.0**-23, (name, x)


def test_fma_rounds_once() -> None:
    b = NumpyBuilder()
    x = np.concatenate([near_edges(8), np.random.default_rng(2).uniform(-2, 2, 3000).astype(np.float32)])
    x = x[np.isfinite(x)]
    with np.errstate(all="ignore"):
        for shift in (1, 7, 1000):
            y, z = np.roll(x, shift), np.roll(x, 3 * shift + 1) * np.float32(2.0**-20)
            got = b.fma(x, y, z)
            for i in range(0, len(x), 29):
                with mpmath.workprec(800):
                    exact = mpmath.mpf(float(x[i])) * mpmath.mpf(float(y[i])) + mpmath.mpf(float(z[i]))
                    near = [got[i], np.nextafter(got[i], np.float32(INF)), np.nextafter(got[i], np.float32(-INF))]
                    errors = [abs(mpmath.mpf(float(v)) - exact) for v in near]
                    assert np.isinf(got[i]) or errors[0] == min(errors)


def test_fma_on_a_double_rounding_tie() -> None:
    # (1 + 2^-23) * 1 + 2^-24 - 2^-60: float64 rounds the sum to a tie, which would go up to even.
    b = NumpyBuilder()
    a, c = np.array([2.0**-30], np.float32), np.array([1 + 2.0**-23], np.float32)
    product = (2.0**-24 - 2.0**-47) / 2.0**-30
    got = b.fma(a, np.array([product], np.float32), c)
    assert got[0] == np.float32(1 + 2.0**-23)
    tie = b.fma(np.array([2.0**-12 + 2.0**-35], np.float32), np.array([2.0**-12 - 2.0**-35], np.float32), c)
    assert tie[0] == np.float32(1 + 2.0**-23)  # 2^-24 - 2^-70: just below the tie


def test_min_and_max_return_the_second_at_nan() -> None:
    b = NumpyBuilder()
    one, nan = np.array([1.0], np.float32), np.array([NAN], np.float32)
    for operation in (b.fmin, b.fmax):
        assert np.isnan(operation(one, nan)[0])
        assert operation(nan, one)[0] == 1.0


def test_constants_are_float32() -> None:
    with pytest.raises(ValueError, match=re.escape("0.1 is not a float32")):
        NumpyBuilder().const(0.1)


def test_results_do_not_depend_on_the_shape() -> None:
    x = np.linspace(-3, 3, 24, dtype=np.float32)
    for name in UNARY:
        whole = evaluate(name, x)
        assert whole.shape == x.shape
        assert np.array_equal(evaluate(name, x.reshape(2, 3, 4)).ravel(), whole, equal_nan=True)
        assert evaluate(name, x[:0]).shape == (0,)


def test_costs_are_counted() -> None:
    counter = CountingBuilder()
    FUNCTIONS["exp"].build(counter, 0)
    assert FUNCTIONS["exp"].cost == counter.count <= 19
    assert FUNCTIONS["rsqrt"].cost == 2
    # The hot ones do without a division.
    assert all(FUNCTIONS[name].cost <= 32 for name in ("tanh", "sigmoid", "erf", "log"))
