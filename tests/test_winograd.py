"""Convolutions by tiles: the matrices, the bound on the error, when the rule holds, and what becomes of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stitch import dims, dtypes, evaluate, knobs
from stitch.dims import Dim
from stitch.graph import Builder, Graph
from stitch.ops.primitives import Array
from stitch.simplify import simplify, winograd
from stitch.simplify.winograd import AMPLIFICATION, POINTS, amplification, choose, matrices, transformed
from tests import pipeline

UNIT = 2.0**-24
SIZES = sorted(POINTS)


@dataclass(frozen=True)
class Conv:
    """A convolution of x (n, h, w, c), padded by (top, left, bottom, right), with k output channels."""

    n: Dim
    h: Dim
    w: Dim
    c: int
    k: int
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)

    def weights(self, seed: int = 0) -> Array:
        return np.random.default_rng(seed).standard_normal((self.k, self.c, 3, 3)).astype(np.float32)


def graph(conv: Conv, w: Array, tail: bool = False, fill: float = 0.0, **other: Any) -> Graph:
    """The convolution as the importer writes it; `tail`: with a bias, a residual and an activation behind it."""
    b = Builder()
    x = b.input("x", w.dtype, (conv.n, conv.h, conv.w, conv.c))
    top, left, bottom, right = conv.pads
    given = {"strides": (1, 1), "dilations": (1, 1), "axes": (1, 2), **other}
    padded = b.pad(x, [0, top, left, 0], [0, bottom, right, 0], fill)
    window = b.window(padded, given["axes"], w.shape[2:], given["strides"], given["dilations"])
    y = b.contract(window, b.const(w), [0, 1, 2, 4, 5, 6], [3, 4, 5, 6], [0, 1, 2, 3])
    if tail:
        bias = np.linspace(-1, 1, conv.k, dtype=np.float32)
        y = b.max(b.add(b.add(y, b.const(bias)), b.input("r", w.dtype, y.shape)), 0.0)
    return b.finish({"y": y})


def exact(x: Array, w: Array, pads: Sequence[int], fill: float = 0.0) -> Array:
    top, left, bottom, right = pads
    wide = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), axis=(1, 2))
    return np.asarray(np.einsum("nhwcij,kcij->nhwk", windows, w.astype(np.float64), optimize=True))


def bound(x: Array, w: Array, m: int, fill: float = 0.0) -> Array:
    """For each output channel."""
    terms = w.shape[1] + 4 * m + 10
    largest = max(float(np.max(abs(x), initial=0)), abs(fill))
    return np.asarray(terms * UNIT * AMPLIFICATION[m] * largest * abs(w.astype(np.float64)).sum(axis=(1, 2, 3)))


def by_tiles(conv: Graph, m: int) -> Graph:
    """Simplified with tiles of that size, whatever they cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "choose", lambda *sizes: m)
        return simplify(conv)


def run(simplified: Graph, **feeds: Array) -> list[Array]:
    return pipeline.run(pipeline.build(pipeline.cut(simplified, simplified=False)), feeds)


def is_by_tiles(graph: Graph) -> bool:
    return any(n.prim == "contract" and len(n.attrs["b"]) == 4 and 0 in n.attrs["b"] for n in graph.nodes)


# ------------------------------------------------------------------ matrices


@pytest.mark.parametrize("m", SIZES)
def test_the_matrices_make_a_convolution(m: int) -> None:
    t = matrices(m)
    for x in np.eye(m + 2):
        for w in np.eye(3):
            expected = [float(x[i : i + 3] @ w) for i in range(m)]
            np.testing.assert_allclose(t.results @ ((t.weights @ w) * (t.inputs @ x)), expected, atol=1e-14)


@pytest.mark.parametrize("m", SIZES)
def test_a_and_b_are_exact_in_float32(m: int) -> None:
    t = matrices(m)
    for table in (t.results, t.inputs):
        assert np.array_equal(table, table.astype(np.float32))


@pytest.mark.parametrize("m", SIZES)
def test_amplification(m: int) -> None:
    assert AMPLIFICATION[m] - 1 < amplification(m) <= AMPLIFICATION[m]
    assert np.max(abs(matrices(m).inputs).sum(axis=1)) ** 2 < 33


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("block", [1, 1 << 16])
def test_weights_are_rounded_once(m: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "BLOCK", block)
    w, g = Conv(1, 8, 8, 5, 7).weights(), matrices(m).weights
    expected = np.einsum("ia,jb,kcab->ijck", g, g, w.astype(np.float64))
    np.testing.assert_allclose(transformed(w, m), expected, rtol=UNIT * 1.001)


# ------------------------------------------------------------------ results


@st.composite
def cases(draw: Any) -> tuple[Conv, int, int, int, float]:
    pads = draw(st.tuples(*[st.integers(0, 3)] * 4))
    h, w = (draw(st.integers(max(1, 3 - pads[k] - pads[k + 2]), 14)) for k in range(2))
    channels = st.sampled_from([2, 3, 5, 8, 16, 17, 40])
    conv = Conv(draw(st.integers(1, 3)), h, w, draw(channels), draw(channels), pads)
    return conv, draw(st.sampled_from(SIZES)), draw(st.integers(0, 99)), draw(st.integers(-30, 30)), draw(FILLS)


FILLS = st.sampled_from([0.0, 0.0, 0.0, 1.5])


def values(rng: np.random.Generator, shape: tuple[int, ...], power: int) -> Array:
    """Of one sign or both, some of them zero, some larger than the others by far."""
    x = rng.standard_normal(shape) + rng.choice([0.0, 0.0, 10.0])
    x *= rng.choice([0.0, 1.0, 1.0, 1.0, 1000.0], shape)
    return np.asarray(x * 2.0**power, np.float32)


def check(case: tuple[Conv, int, int, int, float], native: bool) -> None:
    conv, m, seed, power, fill = case
    rng = np.random.default_rng(seed)
    x = values(rng, evaluate.numbers((conv.n, conv.h, conv.w, conv.c), {}), power)
    w = values(rng, (conv.k, conv.c, 3, 3), -power // 2)
    after = by_tiles(graph(conv, w, fill=fill), m)
    after.check()
    assume(is_by_tiles(after))  # a single position has nothing to reuse, and is no contraction
    (y,) = run(after, x=x) if native else evaluate.evaluate(after, {"x": x})
    error = abs(y - exact(x, w, conv.pads, fill))
    assert np.all(error <= bound(x, w, m, fill)), float(np.max(error / bound(x, w, m, fill)))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_results_are_within_the_bound(case: tuple[Conv, int, int, int, float]) -> None:
    check(case, native=False)


@settings(deadline=None, max_examples=15)
@given(cases())
def test_so_are_those_of_the_code(case: tuple[Conv, int, int, int, float]) -> None:
    check(case, native=True)


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("channels", [16, 128])
def test_random_numbers_come_nowhere_near_the_bound(m: int, channels: int) -> None:
    conv = Conv(1, 24, 24, channels, 16)
    x = np.random.default_rng(1).standard_normal((1, 24, 24, channels)).astype(np.float32)
    w = conv.weights()
    y = exact(x, w, conv.pads)
    with knobs.using(winograd=False):
        direct = simplify(graph(conv, w))
    errors = [np.max(abs(run(g, x=x)[0] - y)) for g in (direct, by_tiles(graph(conv, w), m))]
    assert errors[1] <= 5 * errors[0]
    assert errors[1] <= 1e-5 * np.max(abs(y))


@pytest.mark.parametrize("m", SIZES)
def test_what_is_not_finite_stays_in_its_tiles(m: int) -> None:
    conv = Conv(1, 12, 12, 3, 4)
    w = conv.weights()
    after = by_tiles(graph(conv, w), m)
    for bad in (np.inf, -np.inf, np.nan):
        x = np.ones((1, 12, 12, 3), np.float32)
        x[0, 5, 5, 1] = bad
        with np.errstate(all="ignore"):
            (y,) = evaluate.evaluate(after, {"x": x})
            touched = ~np.isfinite(exact(x, w, conv.pads))
        spread = ~np.isfinite(y)
        assert np.all(spread | ~touched)
        reach = [t * m + i for t in range(12 // m) if t * m - 1 <= 5 <= t * m + m for i in range(m)]
        expected = np.zeros_like(spread)
        expected[0, min(reach) : max(reach) + 1, min(reach) : max(reach) + 1] = True
        np.testing.assert_array_equal(spread, expected)


def test_large_numbers_overflow_later_than_by_the_amplification() -> None:
    conv = Conv(1, 8, 8, 4, 4)
    w = np.ones((4, 4, 3, 3), np.float32)
    for m in SIZES:
        largest = float(np.finfo(np.float32).max) / AMPLIFICATION[m] / 36 / 2
        x = np.random.default_rng(0).choice([-largest, largest], (1, 8, 8, 4)).astype(np.float32)
        (y,) = evaluate.evaluate(by_tiles(graph(conv, w), m), {"x": x})
        assert np.all(np.isfinite(y))


# ------------------------------------------------------------------ when


def test_sizes_of_tiles() -> None:
    for n in (1, 8, dims.symbol("n")):
        assert choose(n, 56, 56, 64, 64) == 4  # resnet50
        assert choose(n, 28, 28, 128, 128) == 4
        assert choose(n, 14, 14, 256, 256) == 4
        assert choose(n, 7, 7, 512, 512) != 0
        assert choose(n, 56, 56, 128, 32) == 4  # densenet
        assert choose(n, 224, 224, 3, 64) == 0  # three channels are transformed for less than they save
        assert choose(n, 180, 320, 16, 3) == 0
    assert choose(1, 2, 2, 512, 512) == 0  # 4 times the weights for one row of them
    assert choose(0, 56, 56, 64, 64) == 0


LARGE = Conv(1, 28, 28, 64, 64)


def test_where_it_is_used() -> None:
    w = LARGE.weights()
    assert is_by_tiles(simplify(graph(LARGE, w)))
    with knobs.using(winograd=False):
        assert not is_by_tiles(simplify(graph(LARGE, w)))


@pytest.mark.parametrize(
    ("w", "other"),
    [
        (LARGE.weights(), {"strides": (2, 2)}),
        (LARGE.weights(), {"strides": (1, 2)}),
        (LARGE.weights(), {"dilations": (2, 2)}),
        (np.ones((64, 64, 5, 5), np.float32), {}),
        (np.ones((64, 64, 3, 1), np.float32), {}),
        (LARGE.weights().astype(np.float64), {}),
        (LARGE.weights().astype(np.float16), {}),
        (LARGE.weights().astype(np.int32), {}),
        (LARGE.weights() * np.float32(np.inf), {}),
        (LARGE.weights() * np.float32(1e35), {}),
    ],
)
def test_where_it_is_not(w: Array, other: dict[str, Any]) -> None:
    assert not is_by_tiles(simplify(graph(LARGE, w, **other)))


def test_extents_must_be_known_but_for_the_batch() -> None:
    n, w = dims.symbol("n"), LARGE.weights()
    assert not is_by_tiles(simplify(graph(Conv(1, n, 28, 64, 64), w)))
    after = simplify(graph(Conv(n, 28, 28, 64, 64), w))
    assert is_by_tiles(after)
    artifact = pipeline.build(pipeline.cut(after, simplified=False))
    for batch in (0, 1, 3):
        x = np.random.default_rng(0).standard_normal((batch, 28, 28, 64)).astype(np.float32)
        (y,) = pipeline.run(artifact, {"x": x}, threads=2)
        assert np.all(abs(y - exact(x, w, LARGE.pads)) <= bound(x, w, 4))


def test_weights_that_are_computed_stay() -> None:
    b = Builder()
    x, w = b.input("x", dtypes.FLOAT32, (1, 30, 30, 64)), b.input("w", dtypes.FLOAT32, (64, 64, 3, 3))
    window = b.window(x, (1, 2), (3, 3), (1, 1), (1, 1))
    y = b.contract(window, w, [0, 1, 2, 4, 5, 6], [3, 4, 5, 6], [0, 1, 2, 3])
    assert not is_by_tiles(simplify(b.finish({"y": y})))


# ------------------------------------------------------------------ kernels


@pytest.mark.parametrize("size", [28, 30])
def test_three_kernels(size: int) -> None:
    """The way in, the products, and the way back with all that follows."""
    conv = Conv(1, size, size, 64, 64)
    w = conv.weights()
    stitched = pipeline.cut(graph(conv, w, tail=True))
    kinds = [{n.prim for n in k.nodes} for k in stitched.kernels]
    assert [("contract" in k, "max" in k) for k in kinds] == [(False, False), (True, False), (False, True)]
    rng = np.random.default_rng(0)
    x, r = (rng.standard_normal((1, size, size, 64)).astype(np.float32) for _ in range(2))
    (y,) = pipeline.run(pipeline.build(stitched), {"x": x, "r": r})
    expected = np.maximum(exact(x, w, conv.pads) + np.linspace(-1, 1, 64) + r, 0)
    assert np.all(abs(y - expected) <= bound(x, w, 4) + 4 * UNIT * (1 + abs(r)))


def test_what_is_computed_is_stored_once() -> None:
    """Not computed again by each of the tiles that need it: a concat puts it into memory."""
    b = Builder()
    x = b.input("x", dtypes.FLOAT32, (1, 28, 28, 64))
    scaled = b.max(b.mul(x, 3.0), 0.0)
    y = b.finish({"y": b.contract(
        b.window(b.pad(scaled, [0, 1, 1, 0], [0, 1, 1, 0]), (1, 2), (3, 3), (1, 1), (1, 1)), b.const(LARGE.weights()),
        [0, 1, 2, 4, 5, 6], [3, 4, 5, 6], [0, 1, 2, 3],
    )})  # fmt: skip
    after = simplify(y)
    assert [n.prim for n in after.nodes].count("concat") == 1
    data = np.random.default_rng(0).standard_normal((1, 28, 28, 64)).astype(np.float32)
    (found,) = run(after, x=data)
    given = np.maximum(data * np.float32(3), 0)
    assert np.all(abs(found - exact(given, LARGE.weights(), LARGE.pads)) <= bound(given, LARGE.weights(), 4))
