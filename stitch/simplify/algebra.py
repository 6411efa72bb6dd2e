"""Rules on elementwise operators and reductions: units, inverses, what is decided or repeated."""

from __future__ import annotations

from typing import Any

import numpy as np

from stitch import dtypes
from stitch.dims import Dim, prove_le
from stitch.graph import Value
from stitch.ops.primitives import ELEMENTWISE, PRIMITIVES, REDUCTIONS
from stitch.ranges import Range, range_of
from stitch.rewrite import Rewriter, Rules, Step, for_each, merged

_MANTISSA = {dtypes.FLOAT16: 11, dtypes.BFLOAT16: 8, dtypes.FLOAT32: 24, dtypes.FLOAT64: 53}
_EXPONENT = {dtypes.FLOAT16: 5, dtypes.BFLOAT16: 8, dtypes.FLOAT32: 8, dtypes.FLOAT64: 11}


def _units(r: Rewriter, s: Step) -> Value | None:
    """x * 1 -> x; x / 1; x - 0; x + -0.0; and(x, true); or(x, false); xor(x, 0). For integers x + 0, too.

    x + 0.0 stays: it turns -0.0 into 0.0.
    """
    x, y = s.inputs
    for value, other in ((x, y), (y, x)) if PRIMITIVES[s.prim].commutative else ((x, y),):
        n = r.number(other)
        if n is not None and _is_unit(s.prim, n):
            return value
    return None


def _is_unit(prim: str, n: Any) -> bool:
    real = dtypes.is_float(n.dtype)
    match prim:
        case "mul" | "div":
            return bool(n == 1)
        case "add" | "sub":
            return bool(n == 0) and (not real or bool(np.signbit(n)) == (prim == "add"))
        case "or" | "xor":
            return bool(n == 0)
        case "and":
            return bool(np.invert(n) == 0)
    return False


def _absorbed(r: Rewriter, s: Step) -> Value | None:
    """and(x, false) -> false; or(x, true) -> true; x * 0 -> 0 for integers."""
    for v in s.inputs:
        n = r.number(v)
        if n is None:
            continue
        zero = bool(n == 0)
        if (s.prim == "and" and zero) or (s.prim == "mul" and zero and not dtypes.is_float(s.dtype)):
            return v
        if s.prim == "or" and bool(np.invert(n) == 0):
            return v
    return None


def _idempotent(r: Rewriter, s: Step) -> Value | None:
    """max(x, x) -> x; min, and, or."""
    return s.x if s.inputs[1] is s.x else None


def _inverse_pair(r: Rewriter, s: Step) -> Value | None:
    """neg(neg(x)) -> x; not(not(x)) -> x."""
    inner = r.maker(s.x, s.prim)
    return inner.inputs[0] if inner is not None else None


def _sign_dropped(r: Rewriter, s: Step) -> Value | None:
    """abs(neg(x)) -> abs(x); abs(abs(x)) -> abs(x)."""
    inner = r.maker(s.x)
    if inner is None or inner.prim not in ("neg", "abs"):
        return None
    return s.x if inner.prim == "abs" else r.emit("abs", inner.inputs[0])


def _reciprocal(r: Rewriter, s: Step) -> Value | None:
    """x / 8 -> x * 0.125, for a power of two: both are the same real number, rounded once."""
    n = r.number(s.inputs[1])
    if n is None or not dtypes.is_float(s.dtype):
        return None
    wide = float(n)
    if not np.isfinite(wide) or abs(np.frexp(wide)[0]) != 0.5:
        return None
    inverse = np.asarray(1 / wide).astype(s.dtype)
    if not np.isfinite(inverse) or abs(float(inverse)) < _smallest_normal(s.dtype) or 1 / float(inverse) != wide:
        return None
    return r.emit("mul", s.x, r.uniform(inverse, s.dtype, s.x.shape))


def _smallest_normal(dtype: np.dtype) -> float:
    return 2.0**-14 if dtype == dtypes.FLOAT16 else 2.0**-1022 if dtype == dtypes.FLOAT64 else 2.0**-126


def _power(r: Rewriter, s: Step) -> Value | None:
    """pow(x, 1) -> x; pow(x, 2) -> x * x; pow(x, 3) -> x * x * x, within 1.5 ulp; pow(x, -1) -> 1 / x; pow(x, 0.5) ->
    sqrt(x), if x is neither negative nor -0.0, where they differ: pow(-0.0, 0.5) is 0.0, pow(-inf, 0.5) is inf."""
    n = r.number(s.inputs[1])
    if n is None or not dtypes.is_float(s.dtype):
        return None
    match float(n):
        case 1.0:
            return s.x
        case 2.0:
            return r.emit("mul", s.x, s.x)
        case 3.0 if s.dtype not in (dtypes.FLOAT16, dtypes.BFLOAT16):
            return r.emit("mul", r.emit("mul", s.x, s.x), s.x)
        case -1.0:
            return r.emit("div", r.uniform(1, s.dtype, s.x.shape), s.x)
        case 0.5 if _positive(r, s.x, 8):
            return r.emit("sqrt", s.x)
    return None


def _positive(r: Rewriter, v: Value, depth: int) -> bool:
    """Whether no element is negative or -0.0; NaN may be."""
    n = r.number(v)
    if n is not None:
        return bool(n == n and not np.signbit(n))
    node = r.maker(v)
    if node is None or depth == 0:
        return False
    match node.prim:
        case "abs" | "exp" | "sigmoid" | "sqrt":
            return node.prim != "sqrt" or _positive(r, node.inputs[0], depth - 1)
        case "mul" if node.inputs[0] is node.inputs[1]:
            return True
        case "mul" | "add" | "div" | "reduce_sum" | "reduce_max" | "reduce_min" | "reshape" | "broadcast" | "transpose":
            return node.prim != "reduce_max" and all(_positive(r, i, depth - 1) for i in node.inputs)
    return False


def _of_itself(r: Rewriter, s: Step) -> Value | None:
    """x == x -> true; x < x -> false. For all but floats: there is NaN."""
    if s.inputs[1] is not s.x or dtypes.is_float(s.x.dtype):
        return None
    return r.uniform(s.prim in ("eq", "le"), dtypes.BOOL, s.shape)


def _decided(r: Rewriter, s: Step) -> Value | None:
    """where(true, x, y) -> x; where(c, x, x) -> x; where(not(c), x, y) -> where(c, y, x)."""
    c, x, y = s.inputs
    if x is y:
        return x
    n = r.number(c)
    if n is not None:
        return x if n else y
    inner = r.maker(c, "not")
    return r.emit("where", inner.inputs[0], y, x) if inner is not None else None


def _cast(r: Rewriter, s: Step) -> Value | None:
    """cast(x) to the dtype of x -> x; cast(cast(x)) -> cast(x), if the inner one loses nothing.

    Not cast.int8(cast.float32(x)) of an uint8: floats are saturated, and integers wrap.
    """
    if s.x.dtype == s.dtype:
        return s.x
    inner = r.maker(s.x, "cast")
    if inner is not None and _lossless(inner.inputs[0].dtype, s.x.dtype):
        y = inner.inputs[0]
        through = dtypes.is_float(s.x.dtype) and not dtypes.is_float(y.dtype)
        if through and dtypes.is_integer(s.dtype) and not _lossless(y.dtype, s.dtype):
            return None
        return y if y.dtype == s.dtype else r.emit("cast", y, dtype=s.dtype)
    return None


def _lossless(a: np.dtype, b: np.dtype) -> bool:
    """Whether `b` has every value of `a`."""
    if a == dtypes.BOOL or a == b:
        return True
    if b == dtypes.BOOL:
        return False
    if dtypes.is_float(a):
        return dtypes.is_float(b) and _MANTISSA[a] <= _MANTISSA[b] and _EXPONENT[a] <= _EXPONENT[b]
    bits = a.itemsize * 8 - (a.kind == "i")
    if dtypes.is_float(b):
        return bits <= _MANTISSA[b] and bits < 2 ** (_EXPONENT[b] - 1)
    return bits <= b.itemsize * 8 - (b.kind == "i") and not (a.kind == "i" and b.kind == "u")


# ------------------------------------------------------------------ ranges


def _range(r: Rewriter, v: Value) -> Range:
    """The numbers that `v` can hold, as far as its makers tell."""

    def look(v: Value) -> Any:
        n = r.number(v)
        node = r.maker(v)
        return n if n is not None or node is None else (node.prim, node.inputs)

    return range_of(v, look)


def _clamped(r: Rewriter, s: Step) -> Value | None:
    """max(x, -128) -> x, min(x, 127) -> x, if x is never beyond."""
    for v, other in (s.inputs, s.inputs[::-1]):
        n = r.number(other)
        if n is None or n != n or s.dtype in (dtypes.FLOAT16, dtypes.BFLOAT16):
            continue
        kept = _range(r, v)
        if kept.low >= n.item() if s.prim == "max" else kept.high <= n.item():
            return v
    return None


def _whole(r: Rewriter, s: Step) -> Value | None:
    """rint(x) -> x, floor and ceil, of integers."""
    return s.x if _range(r, s.x).whole else None


def _requantised(r: Rewriter, s: Step) -> Value | None:
    """rint(n * s / s) -> n, for integers n of up to 20 bits: two roundings move n by less than a half.

    Through relu, too: rint(max(n * s, 0) / s) -> max(n, 0).
    """
    ratio = r.maker(s.x, "div")
    if ratio is None or s.dtype != dtypes.FLOAT32:
        return None
    x, scale = ratio.inputs
    n = r.number(scale)
    if n is None or not 2.0**-100 < n < 2.0**100:
        return None
    relu = r.maker(x, "max")
    if relu is not None and r.number(relu.inputs[1]) == 0:
        x = relu.inputs[0]
    else:
        relu = None
    product = r.maker(x, "mul")
    if product is None or r.number(product.inputs[1]) != n:
        return None
    whole = product.inputs[0]
    known = _range(r, whole)
    if not known.whole or not known.inside(-(2.0**20), 2.0**20):
        return None
    return whole if relu is None else r.emit("max", whole, relu.inputs[1])


def _moved_back(r: Rewriter, s: Step) -> Value | None:
    """n - 3 + 3 -> n, n + 3 - 3 -> n, for small integers in floats, none of them -0.0."""
    inner = r.maker(s.x, "sub" if s.prim == "add" else "add")
    n = r.number(s.inputs[1])
    if inner is None or n is None or not dtypes.is_float(s.dtype) or r.number(inner.inputs[1]) != n:
        return None
    x = inner.inputs[0]
    known = _range(r, x)
    top = 2.0 ** (_MANTISSA[s.dtype] - 1)
    small = known.whole and not known.minus and known.inside(-top, top) and n == np.floor(n) and abs(n) <= top
    return x if small else None


def _through_integer(r: Rewriter, s: Step) -> Value | None:
    """cast.float32(cast.int8(x)) -> x, if x holds integers of that range, and neither NaN nor -0.0. NaN becomes 0."""
    inner = r.maker(s.x, "cast")
    if inner is None or inner.inputs[0].dtype != s.dtype or not dtypes.is_integer(s.x.dtype):
        return None
    x = inner.inputs[0]
    known = _range(r, x)
    low, high = dtypes.lowest(s.x.dtype), dtypes.highest(s.x.dtype)
    if not known.whole or known.minus or not known.inside(low, high):
        return None
    return x if not known.nan else r.emit("where", r.emit("eq", x, x), x, r.uniform(0, s.dtype, s.shape))


def _narrowed(r: Rewriter, s: Step) -> Value | None:
    """exp(broadcast(x)) -> broadcast(exp(x)); add(broadcast(x), const 2) -> broadcast(add(x, const 2)).

    If every operand repeats its elements along an axis, so does the result.
    """
    sources: list[Value] = []
    for v in s.inputs:
        node = r.maker(v, "broadcast")
        if node is None or v.shape != s.shape:
            return None
        sources.append(node.inputs[0])
    rank = max(v.rank for v in sources)
    joint: list[Dim] = [1] * rank
    for v in sources:
        for i, d in enumerate(v.shape, rank - v.rank):
            joint[i] = d if joint[i] == 1 else joint[i]
    if tuple(joint) == s.shape:
        return None
    inner = r.emit(s.prim, *[r.broadcast(v, joint) for v in sources], **s.attrs)
    return r.broadcast(inner, s.shape)


# ------------------------------------------------------------------ reductions


def _of_ones(r: Rewriter, s: Step) -> Value | None:
    """reduce(x [n, 1], axis 1) -> reshape(x, [n]). Axes of extent 1 among others are dropped first."""
    axes = s.attrs["axes"]
    ones = [a for a in axes if s.x.shape[a] == 1]
    if not ones:
        return None
    rest = [i for i in range(s.x.rank) if i not in ones]
    x = r.reshape(s.x, [s.x.shape[i] for i in rest])
    left = tuple(rest.index(a) for a in axes if a not in ones)
    return r.emit(s.prim, x, axes=left) if left else x


def _twice(r: Rewriter, s: Step) -> Value | None:
    """reduce(reduce(x, axis 2), axis 2) -> reduce(x, axes 2 and 3), of the same kind."""
    inner = r.maker(s.x, s.prim)
    if inner is None or s.dtype in (dtypes.FLOAT16, dtypes.BFLOAT16):
        return None
    kept = [i for i in range(inner.inputs[0].rank) if i not in inner.attrs["axes"]]
    axes = sorted({*inner.attrs["axes"], *(kept[a] for a in s.attrs["axes"])})
    return r.emit(s.prim, inner.inputs[0], axes=tuple(axes))


def _of_repeated(r: Rewriter, s: Step) -> Value | None:
    """reduce_max(broadcast(x), axis 0) -> broadcast(x) without axis 0, if x is repeated there, and at least once."""
    node = r.maker(s.x, "broadcast")
    if node is None:
        return None
    x, axes = node.inputs[0], s.attrs["axes"]
    missing = s.x.rank - x.rank
    repeated = [a < missing or (x.shape[a - missing] == 1) for a in axes]
    if not all(repeated) or not all(prove_le(1, s.x.shape[a]) for a in axes):
        return None
    full = [*[1] * missing, *x.shape]
    return r.broadcast(r.reshape(x, [d for i, d in enumerate(full) if i not in axes]), s.shape)


ALGEBRA: Rules = merged(
    for_each(("add", "sub", "mul", "div", "and", "or", "xor"), _units),
    for_each(("and", "or", "mul"), _absorbed),
    for_each(("and", "or", "min", "max"), _idempotent),
    for_each(("neg", "not"), _inverse_pair),
    for_each(("eq", "ne", "lt", "le"), _of_itself),
    {"abs": [_sign_dropped], "div": [_reciprocal], "pow": [_power], "where": [_decided]},
    {"cast": [_cast, _through_integer], "rint": [_requantised]},
    for_each(("min", "max"), _clamped),
    for_each(("rint", "floor", "ceil"), _whole),
    for_each(("add", "sub"), _moved_back),
    for_each(ELEMENTWISE, _narrowed),
    for_each(REDUCTIONS, _of_ones, _twice),
    for_each(("reduce_max", "reduce_min"), _of_repeated),
)
