"""Guards of a window, peeled off: a padded convolution or pooling tests its edges only at the edges.

    before:  parallel (row, column) { … x[column + k − 1] if 0 <= column + k − 1 < width else 0 … }
    after:   parallel (row)
               for column < 1 { … with the guard }
               for column < width − 2 { … x[1 + column + k − 1] … }
               for column < 1 { … with the guard }

The innermost parallel axis that a guard depends on becomes a loop of the task, in three parts; guards by other axes
stay, and do not change inside that loop. A task is then a row, which is less to hand out, and the processor has several
points in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from stitch import access, dims
from stitch.access import Axis, Bound, Index
from stitch.codegen.loops import (
    Contract,
    Expr,
    Guarded,
    Loop,
    Phase,
    Stmt,
    Transpose,
    Use,
    children,
    expressions,
    walk,
)
from stitch.codegen.lower import Rewriter
from stitch.dims import Dim
from stitch.stitching.schemes import estimate

FEW = 8
"""Tasks that must be left."""


def peeled(phase: Phase) -> Phase:
    """The phase with its guards off the inner loop, if it has some and enough other axes."""
    if any(isinstance(s, Contract | Transpose) for s in walk(phase.body)):
        return phase
    clipped = {s.clip.outer for s in walk(phase.body) if isinstance(s, Loop) and s.clip is not None}
    bounds = list(dict.fromkeys(_bounds(phase.body)))
    for axis in reversed(phase.axes):
        mine = [b for b in bounds if b.index.coefficient(axis) != 0]
        if not mine or axis in clipped:
            continue
        others = tuple(a for a in phase.axes if a is not axis)
        inside = _inside(mine, axis)
        if inside is None or estimate(dims.product(a.extent for a in others)) < FEW:
            return phase
        first, last = inside
        body = _parts(phase.body, axis, first, last)
        return replace(phase, axes=others, body=body, grain=dims.ceil_div(phase.grain, estimate(axis.extent)))
    return phase


def _bounds(body: tuple[Stmt, ...]) -> Iterator[Bound]:
    seen: set[int] = set()
    stack: list[Expr] = [e for s in walk(body) for e in expressions(s)]
    while stack:
        e = stack.pop()
        if id(e) not in seen:
            seen.add(id(e))
            stack += children(e)
            if isinstance(e, Guarded):
                yield from e.bounds


def _inside(bounds: list[Bound], axis: Axis) -> tuple[Dim, Dim] | None:
    """The range of the axis within which all bounds hold, whatever the other axes of their indices; None: unknown."""
    first, last = 0, axis.extent
    for b in bounds:
        step = b.index.coefficient(axis)
        low = high = b.index.offset
        for v, c in b.index.terms:
            if v is axis:
                continue
            if not isinstance(v, Axis) or not isinstance(v.extent, int) or not isinstance(c, int):
                return None
            low, high = low + min(c, 0) * (v.extent - 1), high + max(c, 0) * (v.extent - 1)
        if not isinstance(step, int) or step < 0 or not isinstance(low, int):
            return None
        first = max(first, -(low // step))
        last = dims.dim_min(last, dims.dim_max(b.limit - 1 - high + step, 0) // step)
    begin = dims.dim_min(first, axis.extent)
    return begin, dims.dim_max(last, begin)


def _parts(body: tuple[Stmt, ...], axis: Axis, first: Dim, last: Dim) -> tuple[Stmt, ...]:
    out: list[Stmt] = []
    for start, end, whole in ((0, first, False), (first, last, True), (last, axis.extent, False)):
        if dims.prove_equal(start, end):
            continue
        here = Axis(axis.name, end - start)
        change = _Part(axis, access.of(here).plus(start), whole)
        inner = tuple(change.statement(s) for s in body)
        out += inner if here.extent == 1 else (Loop(here, inner),)
    return tuple(out)


def _is_outside(b: Bound) -> bool:
    """Whether a bound is known to hold nowhere: left to the code generator, that would be a load of nothing."""
    if b.index.terms:
        return False
    at = b.index.offset
    return bool(dims.prove_le(b.limit, at) or dims.prove_le(at, -1))


class _Part(Rewriter):
    """One part of the axis; in the `whole` one, bounds by the axis hold."""

    def __init__(self, axis: Axis, at: Index, whole: bool) -> None:
        super().__init__(lambda _, i: i.substitute({axis: at}))
        self.axis, self.whole = axis, whole

    def _moved(self, b: Bound) -> Bound:
        return Bound(self.change(None, b.index), b.limit)

    def statement(self, s: Stmt) -> Stmt:
        match s:
            case Loop():
                folds = tuple(replace(f, value=self.expr(f.value)) for f in s.folds)
                return replace(s, body=tuple(self.statement(inner) for inner in s.body), folds=folds)
            case _:
                return self.stmt(s)

    def _expr(self, e: Expr) -> Expr:
        if isinstance(e, Guarded):
            if any(_is_outside(self._moved(b)) for b in e.bounds):
                return e.otherwise
            left = tuple(b for b in e.bounds if not (self.whole and b.index.coefficient(self.axis) != 0))
            return super()._expr(replace(e, bounds=left)) if left else self.expr(e.value)
        # An expression means one number: another part has its own, of the same locals too.
        return Use(e.local) if isinstance(e, Use) else super()._expr(e)
