"""Reductions over an axis along which memory is far, in parts: so that a reduction and what it needs take one pass.

    before  m = max(x, rows);  s = sum(exp(x - m), rows)                       twice through x
    after   m' = max(x, rows of a part);  s' = sum(exp(x - m'), rows of a part)        a part stays in a cache
            m = max(m', parts);  s = sum(s' exp(m' - m), parts)

    before  r = sum(x, columns);  s = sum(x / r, rows)
    after   r' = sum(x, columns);  s' = sum(x / r', rows of a part);  s = sum(s', parts)

A reduction over columns that are too high for a cache is a phase of its own, which goes through memory row by row. If
its terms need another reduction over the same elements, that is another phase before it. In parts of so many rows that
they stay in the second cache, one phase does both. Two kinds of reductions can be so needed:

    over other axes behind it   each row's total is known before the row is left
    the maximum (for exp)       sum exp(x - m) = sum over parts of exp(m' - m) sum exp(x - m'), for any m'

The second one costs an exp for each part. The sum is wrong by no more than before but for the error of that exp and the
rounding of a product, 3 u of the sum, since |x - m'| + |m' - m| = |x - m|. The maximum is exact. A part's maximum that
is -inf becomes the lowest number, lest -inf - -inf be NaN where another part has finite numbers; NaN, inf, and columns
of nothing but -inf give NaN as before, for the maximum itself is what everything else sees.

How many rows are a part follows from shapes and the size of the cache, so the bits depend on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from stitch import dtypes
from stitch.graph import Graph, Node, Shape, Value
from stitch.ops.primitives import PRIMITIVES
from stitch.rewrite import Rewriter, rewrite
from stitch.stitching.schemes import FAR, FEW, LANES, STREAMS, estimate

TOTALS = ("reduce_sum", "reduce_max", "reduce_min")

TYPES = (dtypes.FLOAT32, dtypes.FLOAT64)
"""Types in which a part's total is as exact as the whole one: of halves, sums are rounded only at the end."""

LEAST, MOST = 8, 1024
"""Rows of a part: totals of parts are written to memory and read again, and sums of many terms take blocks."""


@dataclass(frozen=True)
class _Cut:
    """A shape with one axis as two: parts, and rows of a part."""

    axis: int
    parts: int
    rows: int

    def shape(self, shape: Shape) -> Shape:
        return (*shape[: self.axis], self.parts, self.rows, *shape[self.axis + 1 :])

    def reshaped(self, r: Rewriter, x: Value) -> Value:
        return r.reshape(x, self.shape(x.shape))

    def repeated(self, r: Rewriter, x: Value, shape: Shape) -> Value:
        """What is known of each part, at every row of it."""
        at = self.axis + 1
        return r.broadcast(r.reshape(x, (*x.shape[:at], 1, *x.shape[at:])), shape)


def in_parts(graph: Graph, budget: int) -> Graph:
    """The graph with such reductions in parts. `budget`: bytes of a part that a worker can keep near."""
    makers = graph.producers()
    changed: dict[Node, Callable[[Rewriter], Value]] = {}
    for n in graph.nodes:
        if n.prim in TOTALS and n not in changed and (cut := _cut(n, budget)) is not None:
            changed |= _along_rows(n, cut, makers, budget) or _of_exponentials(n, cut, makers, budget)
    return rewrite(graph, {}, changed) if changed else graph


def _cut(n: Node, budget: int) -> _Cut | None:
    """Parts for a reduction over one axis, if there is a number that divides its extent and suits."""
    x, axes = n.inputs[0], n.attrs["axes"]
    sizes = [d for d in x.shape if isinstance(d, int)]
    if len(axes) != 1 or len(sizes) < x.rank or x.dtype not in TYPES or 0 in sizes:
        return None
    axis, row = axes[0], math.prod(sizes[axes[0] + 1 :]) * x.dtype.itemsize
    if axis == x.rank - 1 or math.prod(sizes) * x.dtype.itemsize <= 2 * budget:
        return None
    most = min(budget // max(row, LANES * x.dtype.itemsize), sizes[axis] // FEW, MOST)
    rows = next((k for k in range(most, LEAST - 1, -1) if sizes[axis] % k == 0), None)
    return None if rows is None else _Cut(axis, sizes[axis] // rows, rows)


def _column(x: Value, axis: int) -> int:
    """Bytes of as many columns as a task would take side by side."""
    inner = math.prod(estimate(d) for d in x.shape[axis + 1 :])
    return estimate(x.shape[axis]) * min(inner, LANES) * x.dtype.itemsize


def _along_rows(
    n: Node, cut: _Cut, makers: Mapping[Value, Node], budget: int
) -> dict[Node, Callable[[Rewriter], Value]]:
    """The changes if the terms need reductions of the same elements along rows, and no others; where what a block of
    columns reads, keeps and writes does not stay in a cache."""
    if STREAMS * _column(n.inputs[0], cut.axis) <= budget:
        return {}
    needed = [m for m in _reductions(n.inputs[0], makers) if m.inputs[0].shape == n.inputs[0].shape]
    if not needed or any(m.prim not in TOTALS or min(m.attrs["axes"]) <= cut.axis for m in needed):
        return {}
    if any(m.output.dtype not in TYPES for m in needed):
        return {}

    def split(m: Node) -> Callable[[Rewriter], Value]:
        def make(r: Rewriter) -> Value:
            x = cut.reshaped(r, r.new(m.inputs[0]))
            return r.reshape(r.emit(m.prim, x, axes=tuple(k + 1 for k in m.attrs["axes"])), m.output.shape)

        return make

    def whole(r: Rewriter) -> Value:
        x = cut.reshaped(r, r.new(n.inputs[0]))
        return r.emit(n.prim, r.emit(n.prim, x, axes=(cut.axis + 1,)), axes=(cut.axis,))

    return {**{m: split(m) for m in needed}, n: whole}


def _of_exponentials(
    n: Node, cut: _Cut, makers: Mapping[Value, Node], budget: int
) -> dict[Node, Callable[[Rewriter], Value]]:
    """The changes if the terms are exp(x - m) with the maximum m of x over the same axis; where x stays in no cache,
    or its columns would rather be read again than another exp be computed."""
    if _column(n.inputs[0], cut.axis) <= budget or estimate(n.inputs[0].bytes) <= FAR * budget:
        return {}
    exp = makers.get(n.inputs[0])
    difference = makers.get(exp.inputs[0]) if exp is not None and exp.prim == "exp" else None
    if n.prim != "reduce_sum" or difference is None or difference.prim != "sub":
        return {}
    x, shown = difference.inputs
    top = _shown_along(shown, cut.axis, makers)
    if top is None or top.prim != "reduce_max" or top.inputs != (x,) or top.attrs["axes"] != (cut.axis,):
        return {}
    lowest = np.finfo(x.dtype).min

    def near(r: Rewriter) -> tuple[Value, Value]:
        """The rows of each part, and its maximum."""
        rows = cut.reshaped(r, r.new(x))
        return rows, r.emit("reduce_max", rows, axes=(cut.axis + 1,))

    def largest(r: Rewriter) -> Value:
        return r.emit("reduce_max", near(r)[1], axes=(cut.axis,))

    def total(r: Rewriter) -> Value:
        rows, tops = near(r)
        tops = r.emit("max", tops, r.uniform(lowest, x.dtype, tops.shape))
        inside = r.emit("exp", r.emit("sub", rows, cut.repeated(r, tops, rows.shape)))
        sums = r.emit("reduce_sum", inside, axes=(cut.axis + 1,))
        top = largest(r)
        top = r.emit("max", top, r.uniform(lowest, x.dtype, top.shape))
        at = cut.axis
        whole = r.broadcast(r.reshape(top, (*top.shape[:at], 1, *top.shape[at:])), tops.shape)
        return r.emit("reduce_sum", r.emit("mul", sums, r.emit("exp", r.emit("sub", tops, whole))), axes=(at,))

    return {top: largest, n: total}


def _reductions(value: Value, makers: Mapping[Value, Node]) -> Iterator[Node]:
    """The nodes other than elementwise work and movement that a value is made from, and those that they need."""
    stack, seen = [value], {value}
    while stack:
        n = makers.get(stack.pop())
        if n is None:
            continue
        if PRIMITIVES[n.prim].kind == "reduction":
            yield n
        elif PRIMITIVES[n.prim].kind not in ("elementwise", "movement"):
            continue
        stack += [v for v in n.inputs if v not in seen]
        seen.update(n.inputs)


def _shown_along(value: Value, axis: int, makers: Mapping[Value, Node]) -> Node | None:
    """The node whose result a value repeats along `axis`, if it is nothing else."""
    n = makers.get(value)
    if n is None or n.prim != "broadcast":
        return None
    row = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
    x = n.inputs[0]
    if x.shape == row:
        n = makers.get(x)
        if n is None or n.prim != "reshape":
            return None
        x = n.inputs[0]
        return makers.get(x) if x.shape == (*row[:axis], *row[axis + 1 :]) else None
    return makers.get(x) if axis == 0 and x.shape == row[1:] else None
