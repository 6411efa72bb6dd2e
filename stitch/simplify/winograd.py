"""Convolutions by three rows and three columns with fewer multiplications: Winograd's algorithm.

    y = contract(window(x), w)   ->   Y = A^T [ sum over channels (G w G^T) * (B^T x B) ] A     for each tile

A tile of m x m results needs (m + 2)^2 multiplications for each pair of channels instead of 9 m^2: 2.25 times fewer
for m = 2, 4 times for m = 4 (Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016, "Fast
algorithms for convolutional neural networks"). In primitives: the rows of overlapping tiles are transformed, then
their columns (a product with a small matrix each, as `reduce_sum(window(x) * B)`), one matrix product for each of the
(m + 2)^2 positions follows, whose second operand is known now, and the way back is like the way in.

The matrices come from m + 1 points at which polynomials are evaluated, and infinity. With 0, 1, -1, 2, -2, as Lavin
and Gray have them, the largest error for m = 4 was measured to be 7 times that of the direct sum; with 0, +-11/16,
+-3/2 it is 1.8 times that (and half of it for m = 2), for the numbers in all three matrices are then of similar size
(Barabasz, Anderson, Soodhalter and Gregg 2020, "Error analysis and improving the accuracy of Winograd convolution for
deep neural networks"). These points also make A and B exact in float32; G w G^T is computed in float64, and rounded
once.

For finite x an element of y differs from the exact one by no more than

    (C + 4 m + 10) 2^-24 AMPLIFICATION[m] max |x| sum |w|        (direct: 9 C 2^-24 max |x| sum |w|)

for C channels, with the sum over the weights of this output channel: one rounding for each term of a sum, and the sum
of all terms' sizes at worst. Random numbers come nowhere near either. No intermediate is larger than AMPLIFICATION[m]
max |x| sum |w|, or 33 max |x|. An infinity or NaN in x reaches all results of its tile: see docs/winograd.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from stitch import dtypes
from stitch.dims import Dim, dim_max
from stitch.graph import Value
from stitch.ops.primitives import ELEMENTWISE, PRIMITIVES, Array
from stitch.rewrite import Rewriter, Rules, Step

TAPS = 3
POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(11, 16), Fraction(-11, 16), Fraction(3, 2), Fraction(-3, 2)),
}
"""For each size of tile, where polynomials are evaluated; infinity is one more."""

AMPLIFICATION = {2: 16.0, 4: 164.0}
"""By how much more than max |x| sum |w| all terms of a result may add up to: see `amplification`."""

LARGEST = 2.0**100
"""Weights below which nothing known at compile time can overflow."""

BLOCK = 1 << 16
"""Numbers that are transformed at once: few enough to stay in a cache."""


# ------------------------------------------------------------------ matrices


@dataclass(frozen=True)
class Matrices:
    """A^T (m, m + 2), G (m + 2, 3) and B^T (m + 2, m + 2): y = A^T ((G w) * (B^T x)) for one row."""

    results: Array
    weights: Array
    inputs: Array


def matrices(m: int) -> Matrices:
    """Toom and Cook's construction, computed in fractions. B has the Lagrange polynomials of the points, whose
    denominators are in G, where they cost nothing."""
    points, size = POINTS[m], m + TAPS - 1
    a, g, b = (np.zeros(shape, object) for shape in ((m, size), (size, TAPS), (size, size)))
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        below = _product([p - q for q in others])
        a[:, i] = [p**k for k in range(m)]
        g[i] = [p**k / below for k in range(TAPS)]
        b[i, :-1] = _polynomial(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = _polynomial(points)
    return Matrices(*(x.astype(np.float64) for x in (a, g, b)))


def _product(factors: Sequence[Fraction]) -> Fraction:
    out = Fraction(1)
    for f in factors:
        out *= f
    return out


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients, lowest first, of the polynomial with these roots and leading coefficient 1."""
    out = [Fraction(1)]
    for root in roots:
        out = [low - root * high for low, high in zip([Fraction(0), *out], [*out, Fraction(0)], strict=True)]
    return out


def amplification(m: int) -> float:
    """The largest factor between sum |A| |G w| |B x| and max |x| sum |w|, for rows and columns."""
    t = matrices(m)
    reach = abs(t.inputs).sum(axis=1)
    return float(np.max(abs(t.results) @ (reach[:, None] * abs(t.weights))) ** 2)


def transformed(w: Array, m: int) -> Array:
    """G w G^T: w (K, C, 3, 3) as [m + 2, m + 2, C, K], rounded once."""
    k, c = w.shape[:2]
    g = matrices(m).weights
    both = np.kron(g, g)
    out = np.empty((len(both), c, k), np.float32)
    step = max(1, BLOCK // (len(both) * k))
    for start in range(0, c, step):
        piece = w[:, start : start + step].transpose(2, 3, 1, 0).astype(np.float64)
        out[:, start : start + step] = (both @ piece.reshape(TAPS * TAPS, -1)).reshape(len(both), -1, k)
    return out.reshape(m + 2, m + 2, c, k)


# ------------------------------------------------------------------ cost

GAIN = 0.9
"""The share of the direct sum's time that must not be exceeded: what is estimated is not known."""

LANES = 16
"""Channels in a vector. With narrower vectors all terms grow alike."""

MOVED = 2.0
"""Multiply-adds in the time of one byte from memory: 59 thousand million a second, and 30 GB (one core of a Zen 4; what
other machines have is not far from this ratio)."""

SPARSE, ALONE, PARTIAL = 2.0, 4.0, 8.0
"""Multiply-adds in the time of one in a transform, measured there: each loads its operand, and few are summed; in a
vector that has none beside it; and in one that is not full."""

NEAR = 1 << 22
"""Bytes of an intermediate that are taken to stay in a cache, which is as fast as SPARSE says. Others go there and
back."""

FULL = 4
"""Rows from which a product's registers are all in use."""

BATCHES = (1, 64)
"""What a symbolic batch is taken to be: the time must be less for all of them."""


@dataclass(frozen=True)
class Size:
    """A convolution: batch, rows and columns of the result, channels in and out."""

    n: int
    h: int
    w: int
    c: int
    k: int


def direct_cost(s: Size) -> float:
    """The time of the direct sum, in those of a multiply-add; or that of its weights' coming from memory."""
    return max(s.n * s.h * s.w * 9 * s.c * _full(s.k), MOVED * 36 * s.c * s.k)


def cost(s: Size, m: int) -> float:
    """The time of the transforms and products, in those of a multiply-add."""
    a, th, tw = m + TAPS - 1, -(-s.h // m), -(-s.w // m)
    tiles = s.n * th * tw
    there = a * a * s.n * th * (tw * m + 2) + a**3 * tiles
    back = (m * a + m * m) * a * tiles
    transforms = there * _vectors(s.c) + back * _vectors(s.k)
    far = sum(2 * MOVED * max(4 * a * a * tiles * channels - NEAR, 0) for channels in (s.c, s.k))
    product = max(max(tiles, FULL) * s.c * _full(s.k), MOVED * 4 * s.c * s.k)
    return transforms + far + a * a * product


def _full(channels: int) -> int:
    return -(-channels // LANES) * LANES


def _vectors(channels: int) -> float:
    """The time of one multiply-add for each channel, in a transform."""
    whole, rest = divmod(channels, LANES)
    return LANES * (whole * (SPARSE if whole > 1 else ALONE) + (PARTIAL if rest else 0.0))


def choose(n: Dim, h: int, w: int, c: int, k: int) -> int:
    """The size of tiles that takes the least time, for a symbolic batch in the worse case; 0: none of them."""
    sizes = [Size(batch, h, w, c, k) for batch in ((n,) if isinstance(n, int) else BATCHES)]
    best, least = 0, GAIN
    for m in POINTS:
        share = max((cost(s, m) / direct_cost(s) for s in sizes if s.n), default=1.0)
        if share < least:
            best, least = m, share
    return best


# ------------------------------------------------------------------ the rule


@dataclass(frozen=True)
class Convolution:
    """What is contracted: x (N, H + 2, W + 2, C), and w (K, C, 3, 3), a constant."""

    x: Value
    w: Array


def found(r: Rewriter, s: Step) -> Convolution | None:
    """The convolution that a contraction is, if it is one by 3 x 3 that takes every position, of known extent, with
    channels last and constant weights."""
    if s.dtype != dtypes.FLOAT32 or len(s.shape) != 4:
        return None
    for k, (name, other) in enumerate((("a", "b"), ("b", "a"))):
        window, w = r.maker(s.inputs[k], "window"), r.array(s.inputs[1 - k])
        if window is None or w is None or w.ndim != 4:
            continue
        sides = window.attrs["axes"], window.attrs["sizes"], window.attrs["strides"], window.attrs["dilations"]
        mine, theirs, out = s.attrs[name], s.attrs[other], s.attrs["out"]
        if sides != ((1, 2), (TAPS, TAPS), (1, 1), (1, 1)) or len(set(mine)) != 6 or len(set(theirs)) != 4:
            continue
        order = (out[3], *mine[3:])
        if out[:3] == mine[:3] and set(order) == set(theirs):
            return Convolution(window.inputs[0], w.transpose([theirs.index(label) for label in order]))
    return None


def _fewer_products(r: Rewriter, s: Step) -> Value | None:
    """contract(window(x), w) -> the same by tiles, where that is estimated to be faster."""
    conv = found(r, s)
    if conv is None:
        return None
    k, c = conv.w.shape[:2]
    n, h, w = s.shape[:3]
    if not isinstance(h, int) or not isinstance(w, int) or 0 in (h, w, c, k) or not np.max(abs(conv.w)) < LARGEST:
        return None
    m = choose(n, h, w, c, k)
    return _by_tiles(r, conv, s, m) if m else None


def _by_tiles(r: Rewriter, conv: Convolution, s: Step, m: int) -> Value:
    n, h, w, k = s.shape
    t, weights = matrices(m), r.const(transformed(conv.w, m))
    x = _padded(r, conv.x, h, w, m)  # N, H + 2, W + 2, C
    x = r.emit("window", x, axes=(1,), sizes=(m + 2,), strides=(m,), dilations=(1,))
    x = _sums(r, x, 4, t.inputs, 2)  # N, tiles of rows, m + 2, W + 2, C
    x = r.emit("window", x, axes=(3,), sizes=(m + 2,), strides=(m,), dilations=(1,))
    x = _sums(r, r.transpose(x, (2, 0, 1, 3, 4, 5)), 5, t.inputs, 0)  # m + 2 columns, m + 2 rows, N, tiles, tiles, C
    y = r.emit("contract", x, weights, a=(0, 1, 2, 3, 4, 5), b=(1, 0, 5, 6), out=(0, 1, 2, 3, 4, 6))
    y = _sums(r, r.transpose(y, (2, 3, 4, 0, 5, 1)), 5, t.results, 2)  # N, tiles of rows, m, tiles of columns, m + 2, K
    y = _sums(r, y, 4, t.results, 4)  # N, tiles of rows, m, tiles of columns, m, K
    y = r.reshape(y, (n, y.shape[1] * m, y.shape[3] * m, k))
    return r.slice(y, (0,) * 4, s.shape, (1,) * 4)


def _padded(r: Rewriter, x: Value, h: Dim, w: Dim, m: int) -> Value:
    """x with what the last tiles take beyond its end; only results that nobody sees depend on that.

    Each element is read several times. What would be computed, or fetched from elsewhere, each time is put into memory
    first: that is what a concat does."""
    lo: list[Dim] = [0] * 4
    hi: list[Dim] = [0, -h % m, -w % m, 0]
    value = 0
    inner = r.maker(x, "pad")
    if inner is not None and np.isfinite(inner.attrs["value"]):
        x, value = inner.inputs[0], inner.attrs["value"]
        lo, hi = list(inner.attrs["lo"]), [a + b for a, b in zip(inner.attrs["hi"], hi, strict=True)]
    if not _is_in_memory(r, x):
        above, below = (r.uniform(value, x.dtype, (x.shape[0], d, *x.shape[2:])) for d in (lo[1], dim_max(hi[1], 1)))
        x = r.emit("concat", above, x, below, axis=1)  # a row too many is in no tile
        lo[1] = hi[1] = 0
    return r.emit("pad", x, lo=tuple(lo), hi=tuple(hi), value=value)


def _is_in_memory(r: Rewriter, x: Value) -> bool:
    """Whether what computes x stores it: no movement, nor elementwise work, unless that is done behind a product."""
    node = r.maker(x)
    if node is None or PRIMITIVES[node.prim].kind in ("reduction", "contraction", "opaque") or node.prim == "concat":
        return True
    waiting, seen = [x], {x}
    while waiting:
        node = r.maker(waiting.pop())
        if node is not None and node.prim == "contract":
            return True
        if node is not None and node.prim in ELEMENTWISE:
            more = [v for v in node.inputs if v.shape == x.shape and v not in seen]
            waiting += more
            seen.update(more)
    return False


def _sums(r: Rewriter, x: Value, axis: int, matrix: Array, to: int) -> Value:
    """The matrix times x along an axis, which is then at another place."""
    shape = (*x.shape[:to], len(matrix), *x.shape[to:])
    summed = axis + (axis >= to)
    table = matrix if to < summed else matrix.T
    table = table.reshape([d if i in (to, summed) else 1 for i, d in enumerate(shape)])
    wide = r.broadcast(r.reshape(x, (*x.shape[:to], 1, *x.shape[to:])), shape)
    factors = r.broadcast(r.const(table, dtypes.FLOAT32), shape)
    return r.emit("reduce_sum", r.emit("mul", wide, factors), axes=(summed,))


WINOGRAD: Rules = {"contract": [_fewer_products]}
