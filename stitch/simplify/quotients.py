"""Division by constants that differ from element to element: by their reciprocals, in two floats each.

    div(x, c)  ->  fma(x, h, x * l)      h + l = 1 / c within 2^-48, h nearer to zero, l of its sign

The result is x / c rounded correctly, but for the few x whose quotient is that close to the middle of two floats; a
quotient that is a float is exact, and an infinite x goes through, for l is not zero. Below 2^-100 it may be off by a
unit in the last place. (One constant for all elements is left to the code generator, which tries all x that might go
wrong.)
"""

from __future__ import annotations

import numpy as np

from stitch import dtypes
from stitch.graph import Value
from stitch.rewrite import Rewriter, Rules, Step

SAFE = 2.0**60
"""Up to where neither a reciprocal nor what is left of it is too small to have all its digits."""


def _divided(r: Rewriter, s: Step) -> Value | None:
    x, divisor = s.inputs
    shown = r.maker(divisor, "broadcast")
    c = r.array(shown.inputs[0] if shown is not None else divisor)
    if s.dtype != dtypes.FLOAT32 or c is None or c.size < 2 or not np.all((abs(c) < SAFE) & (abs(c) > 1 / SAFE)):
        return None
    exact = 1 / c.astype(np.float64)
    near = exact.astype(np.float32)
    head = np.where(abs(near.astype(np.float64)) >= abs(exact), np.nextafter(near, np.float32(0)), near)
    rest = (exact - head).astype(np.float32)
    h, low = (r.broadcast(r.const(v), s.shape) for v in (head, rest))
    return r.emit("fma", x, h, r.emit("mul", x, low))


QUOTIENTS: Rules = {"div": [_divided]}
