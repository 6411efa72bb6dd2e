"""What numbers a value can hold, as far as it follows from how it is made.

Used twice: on graphs, to drop what changes nothing (a clamp to a range that is kept anyway, an integer type's detour),
and in the emitter, to convert without clamping again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stitch import dtypes

_INF = math.inf
_EXACT = {dtypes.FLOAT32: 2.0**24, dtypes.FLOAT64: 2.0**53}
_DEPTH = 12
_LARGE = 80.0  # up to which e^x is finite in any float
_KNOWN = (
    "reshape", "broadcast", "transpose", "slice", "cast", "max", "min", "where", "rint", "floor", "ceil", "abs", "neg",
    "add", "sub", "mul", "div", "exp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Range:
    """All elements, but for NaN where `nan`, are between these. `whole`: they are integers, or infinite. `minus`:
    -0.0 may be among them."""

    low: float
    high: float
    whole: bool = False
    nan: bool = True
    minus: bool = True

    def inside(self, low: float, high: float) -> bool:
        return low <= self.low and self.high <= high


ANYTHING = Range(-_INF, _INF)

Look = Callable[[Any], Any]
"""Of a value: the number that it is, a primitive's name with the operands, or None."""


def range_of(v: Any, look: Look) -> Range:
    """`v` is anything with a dtype that `look` knows."""
    return _range(v, look, {}, _DEPTH)


def _range(v: Any, look: Look, memo: dict[Any, Range], depth: int) -> Range:
    found = memo.get(v)
    if found is None:
        found = memo[v] = _made(v, look, memo, depth) if depth else _of_dtype(v.dtype)
    return found


def _made(v: Any, look: Look, memo: dict[Any, Range], depth: int) -> Range:
    made = look(v)
    if made is None:
        return _of_dtype(v.dtype)
    if not isinstance(made, tuple):
        return _of_number(made)
    prim, args = made
    if prim not in _KNOWN or (dtypes.is_float(v.dtype) and v.dtype not in _EXACT):
        return _of_dtype(v.dtype)
    if prim == "where":
        x, y = (_range(a, look, memo, depth - 1) for a in args[1:])
        if look(args[0]) == ("eq", (args[1], args[1])):  # which NaN is not
            x = replace(x, nan=False)
        return _either(x, y)
    return _transferred(prim, v.dtype, args[0].dtype, [_range(a, look, memo, depth - 1) for a in args])


def _of_dtype(dtype: np.dtype) -> Range:
    if dtypes.is_float(dtype):
        return ANYTHING
    return Range(float(dtypes.lowest(dtype)), float(dtypes.highest(dtype)), True, False, False)


def _of_number(n: Any) -> Range:
    x = float(n)
    if abs(x) >= 2.0**53:
        return ANYTHING
    if x != x:
        return Range(_INF, -_INF)
    return Range(x, x, x == math.floor(x) if math.isfinite(x) else True, False, x == 0 and math.copysign(1, x) < 0)


def _either(x: Range, y: Range) -> Range:
    low, high = min(x.low, y.low), max(x.high, y.high)
    return Range(low, high, x.whole and y.whole, x.nan or y.nan, x.minus or y.minus)


def _transferred(prim: str, dtype: np.dtype, source: np.dtype, args: list[Range]) -> Range:
    x = args[0]
    match prim:
        case "reshape" | "broadcast" | "transpose" | "slice":
            return x
        case "cast":
            return _cast(dtype, source, x)
        case "max" | "min":
            y, pick = args[1], max if prim == "max" else min
            return replace(_either(x, y), low=pick(x.low, y.low), high=pick(x.high, y.high))
    if dtype not in _EXACT:  # integers wrap
        return _of_dtype(dtype)
    match prim:
        case "rint" | "floor" | "ceil":
            return Range(_rounded(prim, x.low), _rounded(prim, x.high), True, x.nan)
        case "abs":
            top = max(abs(x.low), abs(x.high))
            return Range(max(x.low, -x.high, 0.0), top, x.whole, x.nan, False)
        case "neg":
            return Range(-x.high, -x.low, x.whole, x.nan)
        case "exp":
            top = math.exp(x.high) * (1 + 2.0**-20) + 1e-44 if x.high < _LARGE else _INF  # subnormals are coarse
            return Range(0.0, top, False, x.nan, False)
    return _arithmetic(prim, dtype, x, args[1])


def _rounded(prim: str, bound: float) -> float:
    return float(getattr(np, prim)(bound))


def _cast(dtype: np.dtype, source: np.dtype, x: Range) -> Range:
    if dtypes.is_float(dtype):
        if dtypes.is_float(source):
            return x if x.whole and x.inside(-_EXACT[dtype], _EXACT[dtype]) else ANYTHING
        return x if x.inside(-_EXACT[dtype], _EXACT[dtype]) else replace(x, low=-_INF, high=_INF)
    kept = _of_dtype(dtype)
    if dtype == dtypes.BOOL:
        return kept
    if dtypes.is_float(source):  # saturated; NaN is 0
        low, high = (float(np.trunc(np.clip(b, kept.low, kept.high))) for b in (x.low, x.high))
        return Range(min(low, 0.0), max(high, 0.0), True, False, False)
    return x if x.inside(kept.low, kept.high) else kept


def _arithmetic(prim: str, dtype: np.dtype, x: Range, y: Range) -> Range:
    """Of floats. What is not exact is widened, by more than two roundings."""
    nan = x.nan or y.nan or not all(map(math.isfinite, (y.low, y.high)))
    infinite = not all(map(math.isfinite, (x.low, x.high)))
    minus = True
    match prim:
        case "add":
            ends, minus = [x.low + y.low, x.high + y.high], x.minus and y.minus
        case "sub":
            ends, minus = [x.low - y.high, x.high - y.low], x.minus
        case "mul" if not infinite and not nan:
            ends = [a * b for a in (x.low, x.high) for b in (y.low, y.high)]
        case "div" if not nan and not y.low <= 0 <= y.high:
            ends = [a / b for a in (x.low, x.high) for b in (y.low, y.high)]
        case _:
            return ANYTHING
    if any(map(math.isnan, ends)):
        return ANYTHING
    whole = x.whole and y.whole and prim != "div"  # floats too large to be exact are integers all the same
    if whole and max(map(abs, ends)) <= _EXACT[dtype]:
        return Range(min(ends), max(ends), True, nan, minus)
    low, high = (b + sign * (abs(b) * 2.0**-20 + 1e-44) for sign, b in ((-1, min(ends)), (1, max(ends))))
    top = float(np.finfo(dtype).max) / 2
    return Range(low if low > -top else -_INF, high if high < top else _INF, whole, nan, minus)
