"""GELU by its halves: an erf of x / sqrt(2) is twice half_erf(x), and factors of two and a half cancel.

    before:  (x * 0.5) * (erf(x / sqrt(2)) + 1)
    after:   x * (half_erf(x) + 0.5)

Each rule holds by itself, in whatever order an exporter wrote the product.
"""

from __future__ import annotations

import numpy as np

from stitch.dtypes import FLOAT32, FLOAT64
from stitch.graph import Value
from stitch.rewrite import Rewriter, Rules, Step

_PRECISION = {FLOAT32: 2.0**-23, FLOAT64: 2.0**-52}


def _half_of_erf(r: Rewriter, s: Step) -> Value | None:
    """erf(x * sqrt(1/2)) -> half_erf(x) * 2, and of x / sqrt(2), if the constant is that number as near as a float can
    be, or next to it: the argument is then rounded once less."""
    inner = r.maker(s.x)
    if inner is None or inner.prim not in ("mul", "div") or s.dtype not in _PRECISION:
        return None
    root = np.sqrt(0.5 if inner.prim == "mul" else 2.0)
    pairs = (inner.inputs, inner.inputs[::-1]) if inner.prim == "mul" else (inner.inputs,)
    for x, constant in pairs:
        n = r.number(constant)
        if n is not None and abs(float(n) / root - 1) < _PRECISION[s.dtype]:
            return r.emit("mul", r.emit("half_erf", x), r.uniform(2, s.dtype, s.shape))
    return None


def _sum_of_half(r: Rewriter, s: Step) -> Value | None:
    """half_erf(x) * 2 + 1 -> (half_erf(x) + 0.5) * 2: twice the sum is rounded to twice as much."""
    for v, constant in (s.inputs, s.inputs[::-1]):
        n, scaled = r.number(constant), _scaled(r, v)
        if n == 1 and scaled is not None and scaled[1] == 2 and r.maker(scaled[0], "half_erf") is not None:
            half = r.emit("add", scaled[0], r.uniform(0.5, s.dtype, s.shape))
            return r.emit("mul", half, r.uniform(2, s.dtype, s.shape))
    return None


def _cancelled(r: Rewriter, s: Step) -> Value | None:
    """(x * 0.5) * (y * 2) -> x * y; (x * (y * 2)) * 0.5 -> x * y; (x * 2) * 0.5 -> x. A power of two rounds nothing
    but where a product was too large or too small for its type; the result is nearer to what was meant then."""
    if s.dtype not in _PRECISION:
        return None
    for one, other in (s.inputs, s.inputs[::-1]):
        a, b, n = _scaled(r, one), _scaled(r, other), r.number(other)
        if a is not None and b is not None and a[1] * b[1] == 1:
            return r.emit("mul", a[0], b[0])
        if n is None or n not in (0.5, 2):
            continue
        if a is not None and a[1] * n == 1:
            return a[0]
        inner = r.maker(one, "mul")
        for x, y in (inner.inputs, inner.inputs[::-1]) if inner is not None else ():
            b = _scaled(r, y)
            if b is not None and b[1] * n == 1:
                return r.emit("mul", x, b[0])
    return None


def _scaled(r: Rewriter, v: Value) -> tuple[Value, float] | None:
    """x and 2 if `v` is x * 2, or x and a half."""
    product = r.maker(v, "mul")
    for x, constant in (product.inputs, product.inputs[::-1]) if product is not None else ():
        n = r.number(constant)
        if n is not None and n in (0.5, 2) and x.shape == v.shape:
            return x, float(n)
    return None


HALVES: Rules = {"erf": [_half_of_erf], "add": [_sum_of_half], "mul": [_cancelled]}
