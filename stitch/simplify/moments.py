"""Sums over nearly everything, in an order that reads memory once: row by row, then over the rows.

A variance over all elements needs the mean first, and so two passes over what may not fit in any cache. But

    sum (x - m)^2  =  sum over rows of  [ sum (x - r)^2 + n (r - m)^2 ]        r: the row's mean, n: its length

for any m, and a row's part can be had while the row is near, together with its sum (Chan, Golub and LeVeque 1983,
"Algorithms for computing the sample variance"). No term cancels another, so nothing is lost in accuracy.
"""

from __future__ import annotations

import math

from stitch import dtypes
from stitch.graph import Value
from stitch.rewrite import Rewriter, Rules, Step

LARGE = 1 << 18
"""Elements from which a second pass shows."""

FEW = 16
"""Sums up to which they are made row by row: of more, each is likely to stay near by itself."""

WIDE = (dtypes.FLOAT32, dtypes.FLOAT64)
"""Types in which a row's sum is as exact as the whole one: of halves, sums are rounded only at the end."""

SHORTEST = 64
"""Elements and number of rows for which it pays."""


def _is_long(s: Step) -> bool:
    """Whether all of a large float value is added up into few sums, rows of it at first."""
    x, axes = s.x, s.attrs["axes"]
    sizes = [d for d in x.shape if isinstance(d, int)]
    if len(sizes) < x.rank or x.rank < 2 or len(axes) < 2 or axes[-1] != x.rank - 1 or x.dtype not in WIDE:
        return False
    total, row = math.prod(sizes), sizes[-1]
    sums = math.prod(sizes[k] for k in range(x.rank) if k not in axes)
    return total >= LARGE and sums <= FEW and min(row, total // (sums * row)) >= SHORTEST


def _by_rows(r: Rewriter, s: Step) -> Value | None:
    """reduce_sum(x [n, m], axes 0 and 1) -> reduce_sum(reduce_sum(x, axis 1), axis 0)."""
    if not _is_long(s):
        return None
    axes = s.attrs["axes"]
    return r.emit("reduce_sum", r.emit("reduce_sum", s.x, axes=axes[-1:]), axes=axes[:-1])


def _around(r: Rewriter, s: Step) -> Value | None:
    """reduce_sum((x - broadcast(m))^2, axes 0 and 1), where m comes from the sum of x over the same axes."""
    product = r.maker(s.x, "mul") if _is_long(s) else None
    if product is None or product.inputs[0] is not product.inputs[1]:
        return None
    difference = r.maker(product.inputs[0], "sub")
    if difference is None:
        return None
    x, centre = difference.inputs
    axes = s.attrs["axes"]
    rows = r.emit("reduce_sum", x, axes=axes[-1:])
    if not _comes_from(r, centre, r.emit("reduce_sum", rows, axes=axes[:-1])):
        return None
    length = x.shape[-1]
    assert isinstance(length, int)
    means = r.emit("mul", rows, r.uniform(1 / length, x.dtype, rows.shape))
    near = r.emit("sub", x, r.broadcast(r.reshape(means, (*means.shape, 1)), x.shape))
    inside = r.emit("reduce_sum", r.emit("mul", near, near), axes=axes[-1:])
    at = [0] * (x.rank - 1)
    middle = r.reshape(r.slice(centre, [*at, 0], [*x.shape[:-1], 1], [1] * x.rank), x.shape[:-1])
    apart = r.emit("sub", means, middle)
    between = r.emit("mul", r.emit("mul", apart, apart), r.uniform(length, x.dtype, rows.shape))
    return r.emit("reduce_sum", r.emit("add", inside, between), axes=axes[:-1])


def _comes_from(r: Rewriter, value: Value, total: Value) -> bool:
    """Whether a value is a sum times or divided by numbers, the same along each row."""
    repeated = False
    while value is not total:
        node = r.maker(value)
        if node is None:
            return False
        operands = [v for v in node.inputs if r.number(v) is None]
        if node.prim in ("mul", "div"):
            if len(operands) != 1 or (node.prim == "div" and operands[0] is not node.inputs[0]):
                return False
        elif node.prim == "reshape":
            if not repeated and value.shape[-1:] != (1,):
                return False  # what is not yet the same along a row would be laid along it
            repeated = True
        elif node.prim != "broadcast":
            return False
        value = operands[0] if operands else node.inputs[0]
    return True


MOMENTS: Rules = {"reduce_sum": [_around, _by_rows]}
