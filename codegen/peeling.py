"""Guards of a window, peeled off: a padded convolution or pooling tests its edges only at the edges.

    before:  parallel (row, column) { … x[column + k − 1] if 0 <= column + k − 1 < width else 0 … }
    after:   parallel (row)
               for column < 1 { … with the guard }
               for column < width − 2 { … x[1 + column + k − 1] … }  (none at all, if the row is inside)
               for column < 1 { … with the guard }

The innermost parallel axis that a guard depends on becomes a loop of the task, in three parts; guards by other axes
stay, and do not change inside that loop. A task is then a row, which is less to hand out, and the processor has several
points in flight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from stitch import access, dims
from stitch.access import Axis, Bound, Index
from stitch.codegen.loops import (
    Clip,
    Contract,
    Expr,
    Gate,
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

WRITTEN_OUT = 4
"""Points near an edge up to which each has code of its own, in which it is known what part of its window is outside."""


def peeled(phase: Phase, among: Collection[Axis] | None = None) -> Phase:
    """The phase with its guards off the inner loop, if it has some and enough other axes. `among`: the axes that may be
    peeled, if not all of them."""
    if any(isinstance(s, Contract | Transpose) for s in walk(phase.body)):
        return phase
    clipped = {s.clip.outer for s in walk(phase.body) if isinstance(s, Loop) and isinstance(s.clip, Clip)}
    bounds = list(dict.fromkeys(_bounds(phase.body)))
    for axis in reversed(phase.axes):
        mine = [b for b in bounds if b.index.coefficient(axis) != 0]
        if not mine or axis in clipped or (among is not None and axis not in among):
            continue
        others = tuple(a for a in phase.axes if a is not axis)
        inside = _inside(mine, axis)
        if inside is None or estimate(dims.product(a.extent for a in others)) < FEW:
            return phase
        body = _parts(phase.body, axis, *inside, _around(bounds, mine, others))
        return replace(phase, axes=others, body=body, grain=dims.ceil_div(phase.grain, estimate(axis.extent)))
    return replace(phase, body=tuple(_beside(s, phase.axes) for s in phase.body))


def inside(rows: Loop, axes: tuple[Axis, ...]) -> tuple[Stmt, ...]:
    """A loop over some of the rows of an open number, as two: for where all rows exist, with all that their guards
    allow, and for the others. Most blocks of a large image are of the first kind, and have no guards then."""
    bounds = list(dict.fromkeys(_bounds(rows.body)))
    around = _around(bounds, [], axes)
    if not bounds or len(around) < len(bounds) or isinstance(rows.clip, Gate) or not isinstance(rows.axis.extent, int):
        return (rows,)
    gates = [b for found in around.values() for b in found]
    if rows.clip is not None:
        first = access.of(rows.clip.outer).times(rows.clip.block)
        gates.append(Bound(first.plus(rows.axis.extent - 1), rows.clip.limit))
    all_hold = tuple(dict.fromkeys(gates))
    here, once = Axis(rows.axis.name, rows.axis.extent), Axis("e", 1)
    free = _Part(rows.axis, access.of(here), bounds)
    body = tuple(free.statement(s) for s in rows.body)
    return Loop(here, body, clip=Gate(all_hold)), Loop(once, (rows,), clip=Gate(all_hold, without=True))


def _beside(s: Stmt, axes: tuple[Axis, ...]) -> Stmt:
    """A loop over lanes that go through all points of a task side by side: the innermost of its loops over points takes
    the place of the parallel axis."""
    if not isinstance(s, Loop) or s.folds:
        return s
    body: tuple[Stmt, ...] = ()
    for t in s.body:
        body += _peeled_loop(t, axes, s.axis) if s.mode == "vector" else (_beside(t, (*axes, s.axis)),)
    return replace(s, body=body)


def _peeled_loop(s: Stmt, axes: tuple[Axis, ...], lanes: Axis) -> tuple[Stmt, ...]:
    if not isinstance(s, Loop) or s.folds or s.clip is not None:
        return (s,)
    if any(isinstance(t, Loop) and not t.folds for t in s.body):
        return (replace(s, body=tuple(x for t in s.body for x in _peeled_loop(t, (*axes, s.axis), lanes))),)
    bounds = list(dict.fromkeys(_bounds(s.body)))
    mine = [b for b in bounds if b.index.coefficient(s.axis) != 0]
    inside = _inside(mine, s.axis) if mine else None
    if inside is None or any(b.index.coefficient(lanes) != 0 for b in bounds):
        return (s,)
    return _parts(s.body, s.axis, *inside, _around(bounds, mine, axes))


def _around(bounds: list[Bound], mine: list[Bound], axes: tuple[Axis, ...]) -> dict[Bound, tuple[Bound, ...]]:
    """For the other guards what must hold of the parallel axes for them to hold in the whole window."""
    out: dict[Bound, tuple[Bound, ...]] = {}
    for b in bounds:
        span = None if b in mine else _span(b.index, axes)
        if span is not None:
            place = Index(0, tuple(t for t in b.index.terms if t[0] in axes))
            out[b] = tuple(dict.fromkeys(Bound(place.plus(end), b.limit) for end in span))
    return out


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


def _span(index: Index, but: Collection[Axis]) -> tuple[Dim, Dim] | None:
    """The least and the largest that an index may be, without its terms in some axes; None if that is not known."""
    low = high = index.offset
    for v, c in index.terms:
        if v in but:
            continue
        if not isinstance(v, Axis) or not isinstance(v.extent, int) or not isinstance(c, int):
            return None
        low, high = low + min(c, 0) * (v.extent - 1), high + max(c, 0) * (v.extent - 1)
    return low, high


def _inside(bounds: list[Bound], axis: Axis) -> tuple[Dim, Dim] | None:
    """The range of the axis within which all bounds hold, whatever the other axes of their indices; None: unknown."""
    first, last = 0, axis.extent
    for b in bounds:
        step, span = b.index.coefficient(axis), _span(b.index, (axis,))
        if span is None or not isinstance(step, int) or step < 0 or not isinstance(span[0], int):
            return None
        first = max(first, -(span[0] // step))
        last = dims.dim_min(last, dims.dim_max(b.limit - 1 - span[1] + step, 0) // step)
    begin = dims.dim_min(first, axis.extent)
    return begin, dims.dim_max(last, begin)


def _parts(
    body: tuple[Stmt, ...], axis: Axis, first: Dim, last: Dim, around: Mapping[Bound, tuple[Bound, ...]]
) -> tuple[Stmt, ...]:
    """The statements for each part of the axis; in the middle once for where all guards hold."""
    gates = tuple(dict.fromkeys(b for found in around.values() for b in found))
    out: list[Stmt] = []

    def add(start: Dim, end: Dim, dropped: Collection[Bound], gate: Gate | None = None) -> None:
        count = end - start
        if gate is None and isinstance(count, int) and 1 < count <= WRITTEN_OUT:
            for k in range(count):
                add(start + k, start + k + 1, dropped)
            return
        here = Axis(axis.name, count)
        change = _Part(axis, access.of(here).plus(start), dropped)
        inner = tuple(change.statement(s) for s in body)
        out.extend(inner if here.extent == 1 and gate is None else (Loop(here, inner, clip=gate),))

    mine = {b for b in _bounds(body) if b.index.coefficient(axis) != 0}
    if not dims.prove_equal(0, first):
        add(0, first, ())
    if not dims.prove_equal(first, last):
        if gates:
            add(first, last, mine | set(around), Gate(gates))
        add(first, last, mine, Gate(gates, without=True) if gates else None)
    if not dims.prove_equal(last, axis.extent) or not out:  # a loop over no points stays one that stores its results
        add(last, axis.extent, ())
    return tuple(out)


def _is_outside(b: Bound) -> bool:
    """Whether a bound is known to hold nowhere: left to the code generator, that would be a load of nothing."""
    if b.index.terms:
        return False
    at = b.index.offset
    return bool(dims.prove_le(b.limit, at) or dims.prove_le(at, -1))


class _Part(Rewriter):
    """One part of the axis, in which some bounds hold."""

    def __init__(self, axis: Axis, at: Index, held: Collection[Bound]) -> None:
        super().__init__(lambda _, i: i.substitute({axis: at}))
        self.holding = held

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
            left = tuple(b for b in e.bounds if b not in self.holding)
            return super()._expr(replace(e, bounds=left)) if left else self.expr(e.value)
        # An expression means one number: another part has its own, of the same locals too.
        return Use(e.local) if isinstance(e, Use) else super()._expr(e)
