"""What is computed in fewer steps than it is written in: quotients by constants, conversions to integers, half
precisions. Every result must be that of the plain steps, which numpy takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stitch import dtypes, target
from stitch.access import Axis, index
from stitch.codegen import bits, divisors
from stitch.codegen.bits import NumpyBuilder
from stitch.codegen.loops import Apply, Buffer, Define, Expr, Loop, Phase, Read, Store
from stitch.codegen.quotients import reciprocal
from stitch.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from stitch.evaluate import evaluate
from stitch.graph import Builder, Value
from stitch.target import Target
from tests import pipeline

Array = npt.NDArray[Any]
HOST = pipeline.host()
SMALLER = [t for t in map(target.parse, ("avx2", "sse2")) if HOST.is_x86 and (t.vector_bits == 128 or HOST.has("avx2"))]
TARGETS = [HOST, *SMALLER]
EVERY = pytest.mark.parametrize("on", TARGETS, ids=lambda t: f"{t.vector_bits}")

SCALES = [float(np.float32(s)) for s in (0.05, 1 / 128, 1 / 3, 0.02352941, 1.7e-5, 0.99999994, 1.0000001, 255, 3e-9)]
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, -3e38, 1e-38, 2**31, -(2.0**31)], np.float32
)


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def native(make: Callable[[Builder, Value], Value], x: Array, on: Target) -> Array:
    b = Builder()
    graph = b.finish({"y": make(b, b.input("x", x.dtype, x.shape))})
    (y,) = pipeline.run(pipeline.compile(graph, target=on), {"x": x})
    (want,) = evaluate(graph, {"x": x})
    assert y.dtype == want.dtype
    if dtypes.is_float(y.dtype):
        a, c = y.astype(np.float64), want.astype(np.float64)
        same = ((a == c) & (np.signbit(a) == np.signbit(c))) | (np.isnan(a) & np.isnan(c))
    else:
        same = y == want
    wrong = np.flatnonzero(~same)
    assert not wrong.size, f"of {x[wrong[:4]]!r}: {y[wrong[:4]]}, not {want[wrong[:4]]}"
    return y


def halves(dtype: np.dtype) -> Array:
    """All numbers of a half precision."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def around_ties(scale: float, steps: int = 300) -> Array:
    """Multiples of half a scale and what is next to them, then all kinds of numbers."""
    rng = np.random.default_rng(1)
    ties = (np.arange(-steps, steps + 1) * 0.5 * scale).astype(np.float32).view(np.int32)
    near = np.concatenate([ties + k for k in range(-4, 5)]).view(np.float32)
    anything = rng.integers(-(1 << 31), 1 << 31, 20_000).astype(np.int32).view(np.float32)
    usual = (rng.standard_normal(20_000) * scale * 60).astype(np.float32)
    return np.concatenate([near, anything, usual, SPECIAL])


def quantised(b: Builder, x: Value, scale: float, zero: int | None, dtype: np.dtype, wide: np.dtype = FLOAT32) -> Value:
    info = np.iinfo(dtype)
    q = b.unary("rint", b.div(b.cast(x, wide), scale))
    q = q if zero is None else b.add(q, float(zero))
    return b.cast(b.min(b.max(q, float(info.min)), float(info.max)), dtype)


def dequantised(b: Builder, q: Value, scale: float, zero: int | None) -> Value:
    x = b.cast(q, FLOAT32)
    return b.mul(x if zero is None else b.sub(x, float(zero)), scale)


# ------------------------------------------------------------------ quotients


@pytest.mark.parametrize("c", [0.05, 0.3, 1.0000001, 1.9999999, 255.0])
def test_a_quotient_by_a_constant_is_right_for_all_mantissas(c: float) -> None:
    c = float(np.float32(c))
    parts = reciprocal(c)
    assert parts is not None
    head, rest = (np.full(1, p, np.float32) for p in parts)
    x = np.arange(1 << 23, 1 << 24, dtype=np.float32)
    assert np.array_equal(NumpyBuilder().fma(x, head, x * rest), x / np.float32(c))


def test_most_constants_have_a_reciprocal() -> None:
    scales = np.random.default_rng(0).uniform(1e-4, 1, 500).astype(np.float32)
    found = [reciprocal(float(s)) for s in scales]
    assert sum(p is None for p in found) < 25
    for s, p in zip(scales, found, strict=True):
        if p is not None:
            assert all(float(np.float32(v)) == v and v > 0 for v in p)
            assert abs((Fraction(p[0]) + Fraction(p[1])) * Fraction(float(s)) - 1) < Fraction(1, 2**45)


@pytest.mark.parametrize("c", [0.5, 1.0, 0.1, np.inf, 1e30, 1e-30, 0.0])
def test_other_constants_have_none(c: float) -> None:
    assert reciprocal(c) is None


@EVERY
@pytest.mark.parametrize("scale", [*SCALES, -0.05])
def test_rounded_quotients(scale: float, on: Target) -> None:
    native(lambda b, x: b.unary("rint", b.div(x, scale)), around_ties(scale), on)


@EVERY
def test_rounded_quotients_of_constants_without_a_reciprocal(on: Target) -> None:
    scales = np.random.default_rng(0).uniform(1e-4, 1, 500).astype(np.float32)
    for scale in [s for s in map(float, scales) if reciprocal(s) is None][:2]:
        native(lambda b, x, s=scale: b.unary("rint", b.div(x, s)), around_ties(scale), on)  # type: ignore[misc]


def assert_quotients(got: Array, x: Array, d: Array) -> None:
    """Those of numpy, but for a unit in the last place of one in a million, or below 2^-100."""
    want = (x / d).astype(np.float32)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    ordinary = np.isfinite(want)
    same = np.where(ordinary, got, 0).view(np.int32) == np.where(ordinary, want, 0).view(np.int32)
    assert np.array_equal(got[np.isinf(want)], want[np.isinf(want)])
    assert np.all(abs(np.spacing(want)) >= abs(got - want), where=ordinary & ~same)
    assert np.count_nonzero(~same & ordinary & (abs(want) > 2.0**-100)) <= 1 + x.size // 1_000_000
    whole = ordinary & (want == np.rint(want)) & (abs(want) < 2.0**20) & (want.astype(np.float64) * d == x)
    assert np.array_equal(got[whole], want[whole])


def many(rows: int, columns: int) -> Array:
    """Of all sizes; first those that are special; whole numbers in the second half."""
    rng = np.random.default_rng(2)
    sizes = np.exp(rng.uniform(-100, 88, (rows, columns)))
    x: Array = (sizes * rng.choice([-1, 1], (rows, columns))).astype(np.float32)
    x[rows // 2 :] = rng.integers(-1000, 1000, x[rows // 2 :].shape)
    x[:, : len(SPECIAL)] = SPECIAL
    return x


@EVERY
def test_quotients_by_one_number_for_each_row(on: Target) -> None:
    x = many(600, 700)
    d = np.concatenate([SPECIAL, many(600, 20)[len(SPECIAL) :, -1]])[:, None]
    b = Builder()
    given, rows = b.input("x", x.dtype, x.shape), b.input("d", d.dtype, d.shape)
    graph = b.finish({"y": b.div(given, rows)})
    (got,) = pipeline.run(pipeline.compile(graph, target=on), {"x": x, "d": d})
    assert_quotients(got, x, d)


def test_divisors_of_which_parts_are_shared_take_linear_time() -> None:
    """Whether one stays the same is asked once for each part of it, however often it occurs."""
    row, lane = Axis("i", 8), Axis("j", 4096)
    x, total, y = Buffer("x", FLOAT32, 8 * 4096), Buffer("d", FLOAT32, 8), Buffer("y", FLOAT32, 8 * 4096)
    d: Expr = Read(total, index(0, (row, 1)))
    for _ in range(60):
        d = Apply("max", (d, d), FLOAT32)
    at = index(0, (row, 4096), (lane, 1))
    loop = Loop(lane, (Store(y, at, Apply("div", (Read(x, at), d), FLOAT32)),), (), "vector", None, 4)
    found = divisors.shared(Phase((row,), (loop,)), 16).body
    assert [type(s) for s in found] == [Define] * 5 + [Loop]


@EVERY
@pytest.mark.parametrize("axis", [0, 1])
def test_quotients_by_constants(on: Target, axis: int) -> None:
    x = many(700, 600)
    d: Array = np.random.default_rng(3).uniform(0.01, 100, (x.shape[axis],)).astype(np.float32)
    d[:20] = np.arange(1, 21)
    d = d[:, None] if axis == 0 else d
    b = Builder()
    graph = b.finish({"y": b.div(b.input("x", x.dtype, x.shape), b.const(d))})
    (got,) = pipeline.run(pipeline.compile(graph, target=on), {"x": x})
    assert_quotients(got, x, d)


# ------------------------------------------------------------------ quantising


@EVERY
@pytest.mark.parametrize("dtype", [dtypes.INT8, dtypes.UINT8, dtypes.INT16, dtypes.UINT16], ids=str)
@pytest.mark.parametrize("zero", [None, 0, 3, 127])
def test_quantising(dtype: np.dtype, zero: int | None, on: Target) -> None:
    for scale in SCALES:
        native(lambda b, x, s=scale: quantised(b, x, s, zero, dtype), around_ties(scale), on)  # type: ignore[misc]


@EVERY
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("zero", [None, 3])
def test_quantising_all_halves(dtype: np.dtype, zero: int | None, on: Target) -> None:
    for scale in SCALES[:4]:
        native(lambda b, x, s=scale: quantised(b, x, s, zero, dtypes.INT8), halves(dtype), on)  # type: ignore[misc]


@EVERY
@pytest.mark.parametrize("dtype", [dtypes.INT8, dtypes.UINT8, dtypes.UINT16], ids=str)
@pytest.mark.parametrize("zero", [None, 0, 3])
def test_quantising_and_back(dtype: np.dtype, zero: int | None, on: Target) -> None:
    """NaN becomes the zero of integers, and not minus zero points."""
    for scale, second in ((0.05, 0.05), (0.05, 0.03), (1 / 3, 0.007)):
        scale, second = float(np.float32(scale)), float(np.float32(second))

        def chain(b: Builder, x: Value, scale: float = scale, second: float = second) -> Value:
            once = dequantised(b, quantised(b, x, scale, zero, dtype), scale, zero)
            return dequantised(b, quantised(b, b.max(once, 0.0), second, zero, dtype), second, zero)

        native(lambda b, x, s=scale: dequantised(b, quantised(b, x, s, zero, dtype), s, zero), around_ties(scale), on)  # type: ignore[misc]
        native(chain, around_ties(scale), on)


@EVERY
def test_requantising_all_bytes(on: Target) -> None:
    x = np.arange(-128, 128, dtype=np.int8)
    for zero in (None, 0, -7):
        y = native(lambda b, q, z=zero: quantised(b, dequantised(b, q, 0.3, z), 0.3, z, dtypes.INT8), x, on)  # type: ignore[misc]
        assert np.array_equal(x, y)


# ------------------------------------------------------------------ conversions


@EVERY
@pytest.mark.parametrize("to", [*dtypes.SIGNED, *dtypes.UNSIGNED, dtypes.BOOL], ids=str)
@pytest.mark.parametrize("source", [FLOAT32, FLOAT64], ids=str)
def test_floats_to_integers(source: np.dtype, to: np.dtype, on: Target) -> None:
    bounds = [b * s for p in (7, 8, 15, 16, 31, 32, 63, 64) for b in (2.0**p,) for s in (1, -1)]
    edges = np.array(bounds, source)
    near = [edges, np.nextafter(edges, source.type(0)), np.nextafter(edges, edges * 2), edges - 1, edges + 0.5]
    x = np.concatenate([*near, SPECIAL.astype(source), around_ties(1.0, 40).astype(source)])
    native(lambda b, x: b.cast(x, to), x, on)
    native(lambda b, x: b.cast(b.min(b.max(x, -3.5), 100.25), to), x, on)


@EVERY
@pytest.mark.parametrize("to", [FLOAT32, FLOAT64, FLOAT16, BFLOAT16], ids=str)
def test_booleans_to_floats(to: np.dtype, on: Target) -> None:
    native(lambda b, x: b.cast(x, to), np.arange(37) % 3 == 0, on)


@EVERY
@pytest.mark.parametrize("to", [FLOAT16, BFLOAT16], ids=str)
def test_rounding_to_halves(to: np.dtype, on: Target) -> None:
    every = halves(to).astype(np.float32).view(np.uint32)
    ties = np.concatenate([every + np.uint32(k) for k in (0, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    native(lambda b, x: b.cast(x, to), ties.view(np.float32), on)


@EVERY
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_halves_that_only_move_keep_their_bits(dtype: np.dtype, on: Target) -> None:
    x = halves(dtype).reshape(256, 256)
    b = Builder()
    graph = b.finish({"y": b.transpose(b.input("x", dtype, x.shape), [1, 0])})
    (y,) = pipeline.run(pipeline.compile(graph, target=on), {"x": x})
    assert np.array_equal(y.view(np.uint16), x.T.view(np.uint16))


# ------------------------------------------------------------------ other primitives


@EVERY
@pytest.mark.parametrize("dtype", [*dtypes.SIGNED, *dtypes.UNSIGNED], ids=str)
@pytest.mark.parametrize("prim", ["div", "mod", "fmod"])
def test_integer_division(prim: str, dtype: np.dtype, on: Target) -> None:
    info = np.iinfo(dtype)
    rng = np.random.default_rng(2)
    edges = [info.min, info.min + 1, info.max, info.max - 1, 0, 1, 2, 3, 7, *(k for k in (-1, -2, -7) if info.min < 0)]
    x = np.concatenate([edges, rng.integers(info.min, info.max, 500, dtype, endpoint=True)]).astype(dtype)
    for n in (1, 2, 7, 8, -1, -3, info.max, info.min, 0):
        if not info.min <= n or (prim != "div" and n == 0):
            continue
        native(lambda b, x, n=n: b.apply(prim, x, b.broadcast(b.const(n, dtype), x.shape)), x, on)  # type: ignore[misc]
    pairs = np.array(np.meshgrid(x[:40], x[:40])).reshape(2, -1)
    pairs = pairs if prim == "div" else pairs[:, pairs[1] != 0]
    n = pairs.shape[1]
    native(lambda b, v: b.apply(prim, *(b.reshape(b.slice(v, [k, 0], [1, n]), [n]) for k in (0, 1))), pairs, on)


@EVERY
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_extremes_with_a_constant_first_and_signs(dtype: np.dtype, on: Target) -> None:
    x = around_ties(1.0, 20).astype(dtype)
    x = x[x != 0]  # of two zeros either may be the larger one
    native(lambda b, x: b.max(b.broadcast(b.const(0.0, dtype), x.shape), x), x, on)
    native(lambda b, x: b.min(b.broadcast(b.const(1.5, dtype), x.shape), x), x, on)
    native(lambda b, x: b.unary("sign", x), np.concatenate([x, [0.0, -0.0]]).astype(dtype), on)


@EVERY
def test_cubes(on: Target) -> None:
    x = around_ties(1.0, 20)
    b = Builder()
    graph = b.finish({"y": b.pow(b.input("x", FLOAT32, x.shape), 3.0)})
    (y,) = pipeline.run(pipeline.compile(graph, target=on), {"x": x})
    want = x.astype(np.float64) ** 3
    narrow = want.astype(np.float32)
    usual = np.isfinite(narrow) & (np.abs(narrow) > 1e-37)
    assert (np.abs(y[usual] - want[usual]) <= np.abs(want[usual]) * 2.0**-22).all()
    assert np.array_equal(np.isnan(y), np.isnan(x))
    assert np.array_equal(y[~np.isfinite(narrow) & ~np.isnan(x)] > 0, x[~np.isfinite(narrow) & ~np.isnan(x)] > 0)


# ------------------------------------------------------------------ functions of what is known to be in a range


@EVERY
def test_functions_of_what_is_known_have_the_same_bits(on: Target) -> None:
    """e^-|x|, log(1 + e^-|x|), and the logarithm of what a clamp leaves."""
    rng = np.random.default_rng(8)
    x = np.concatenate([SPECIAL, rng.standard_normal(3000).astype(np.float32) * 40])
    b = Builder()
    given = b.input("x", FLOAT32, x.shape)
    power = b.elementwise("exp", b.unary("neg", b.unary("abs", given)))
    clamped = b.min(b.max(given, 0.25), 1e6)
    outputs = {
        "power": power,
        "soft": b.elementwise("log1p", power),
        "high": b.elementwise("exp", b.min(given, 90.0)),
        "log": b.elementwise("log1p", clamped),
    }
    got = pipeline.run(pipeline.compile(b.finish(outputs), target=on), {"x": x})
    powers = bits.evaluate("exp", -np.abs(x))
    highs = bits.evaluate("exp", np.minimum(x, np.float32(90)))
    want = [powers, bits.evaluate("log1p", powers), highs]
    want.append(bits.evaluate("log1p", np.clip(x, np.float32(0.25), np.float32(1e6))))
    for a, c in zip(got, want, strict=True):
        same = (a.view(np.int32) == c.view(np.int32)) | (np.isnan(a) & np.isnan(c))
        assert same.all(), x[~same][:4]


@pytest.mark.parametrize("low", [-1.0, -0.5, -0.0, 0.0])
def test_log1p_where_its_argument_may_be_an_edge(low: float) -> None:
    """-1 has an infinite logarithm, and -0 keeps its sign."""
    x = np.array([-2, -1, -0.75, -0.5, -0.0, 0.0, 1, np.inf, np.nan], np.float32)
    b = Builder()
    graph = b.finish({"y": b.elementwise("log1p", b.max(b.input("x", FLOAT32, x.shape), low))})
    (got,) = pipeline.run(pipeline.compile(graph), {"x": x})
    (want,) = evaluate(graph, {"x": x})
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (np.signbit(got) == np.signbit(want))[~np.isnan(want) & (want != 0)].all()
