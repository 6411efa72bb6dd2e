"""Short rows side by side: a task does several of them, so that one row's waiting is another's work.

    before:  parallel (i < 64) { vector j { m max= x[i, j] }    vector j { y[i, j] := x[i, j] − m } }
    after:   parallel (i < 32) { vector j { m max= x[2i, j]; m' max= x[2i + 1, j] }    vector j { … } }

What a row's lanes come to is combined in some ten instructions that wait for each other, and all that follows waits for
them. A processor looks ahead by a few hundred instructions, which is less than a row of some length takes, and a row
that is short is over before much of the next one was begun. Rows of one task share each loop instead: nothing in it
waits for another row, and what is the same for all of them, such as a gain, is loaded once.

Safe where a task is vector loops over axes of their own and what is computed between them: tasks read nothing that
another one stores. Tiles and locals are each row's own. The loops are over the same elements in the same order, so no
bit changes. Only where the rows are a multiple of as many: then no task has fewer; and not where rows come from memory
beyond the caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stitch import access, dims
from stitch.access import Axis, Index, Variable
from stitch.codegen.emit_rules import lanes_of, nodes
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Define,
    Expr,
    Fold,
    Local,
    Loop,
    Phase,
    Prefetch,
    Read,
    Stmt,
    Store,
    Use,
    children,
    expressions,
    walk,
)
from stitch.codegen.lower import Rewriter
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching.schemes import estimate
from stitch.target import Target

SHORT, LONG = 128.0, 768.0
"""Instructions of a row up to which four rows are done side by side, and two."""

TASKS = 16
"""Tasks that there should still be."""


def abreast(phase: Phase, target: Target) -> tuple[Phase, tuple[Buffer, ...]]:
    """The phase with several rows in a task where that pays, and the tiles of all rows but the first."""
    axis = next((a for a in reversed(phase.axes) if a.extent != 1), None)
    if axis is None or not isinstance(axis.extent, int) or not all(map(_is_plain, phase.body)):
        return phase, ()
    loops = [s for s in phase.body if isinstance(s, Loop)]
    work = sum(_instructions(s, target) for s in loops)
    if not any(s.folds for s in loops) or any(not isinstance(s.axis.extent, int) for s in loops):
        return phase, ()
    if _walked(phase) > target.l3_bytes:
        return phase, ()
    tasks = estimate(phase.tasks)
    wanted = (4, 2) if work <= SHORT else (2,) if work <= LONG else ()
    rows = next((k for k in wanted if axis.extent % k == 0 and tasks >= k * TASKS), 1)
    if rows == 1:
        return phase, ()
    return _together(phase, axis, rows)


def _walked(phase: Phase) -> float:
    """Bytes of all that a phase reads or stores outside of its tiles. From memory, rows come fastest one by one: what
    foresees them follows few streams."""
    seen = {x.buffer for s in walk(phase.body) for e in expressions(s) for x in nodes(e) if isinstance(x, Read)}
    seen |= {s.buffer for s in walk(phase.body) if isinstance(s, Store)}
    return float(sum(estimate(b.size) * b.dtype.itemsize for b in seen if b.space == "global"))


def _is_plain(s: Stmt) -> bool:
    """A vector loop without others in it, or what is computed for a row."""
    if not isinstance(s, Loop):
        return isinstance(s, Define | Store)
    return s.mode == "vector" and s.clip is None and all(isinstance(x, Define | Store | Prefetch) for x in s.body)


def _instructions(s: Loop, target: Target) -> float:
    """About how many vector instructions a loop is for one row."""
    seen: set[int] = set()
    stack = [e for x in walk((s,)) for e in expressions(x)]
    total = float(len(s.folds) + sum(isinstance(x, Store) for x in s.body))
    while stack:
        e = stack.pop()
        if id(e) not in seen:
            seen.add(id(e))
            total += PRIMITIVES[e.prim].cost if isinstance(e, Apply) else isinstance(e, Read)
            stack += children(e)
    return total * -(-estimate(s.axis.extent) // lanes_of(s, target))


def _together(phase: Phase, axis: Axis, rows: int) -> tuple[Phase, tuple[Buffer, ...]]:
    """`rows` neighbouring points of an axis as one."""
    assert isinstance(axis.extent, int)
    outer = Axis(axis.name, axis.extent // rows)
    copies = [_Row(axis, access.index(k, (outer, rows)), own=k > 0) for k in range(rows)]
    body: list[Stmt] = []
    for s in phase.body:
        turned = [c.statement(s) for c in copies]
        body += [_joined([t for t in turned if isinstance(t, Loop)])] if isinstance(s, Loop) else turned
    axes = tuple(outer if a is axis else a for a in phase.axes)
    tiles = tuple(t for c in copies for t in c.tiles.values())
    return Phase(axes, tuple(body), dims.ceil_div(phase.grain, rows)), tiles


def _joined(loops: list[Loop]) -> Loop:
    body = tuple(s for x in loops for s in x.body)
    return replace(loops[0], body=body, folds=tuple(f for x in loops for f in x.folds))


class _Row(Rewriter):
    """One of the rows: at a place of its own and, but for the first, with locals and tiles of its own."""

    def __init__(self, axis: Axis, place: Index, own: bool) -> None:
        super().__init__(lambda _, i: self._index(i))
        self.where: Mapping[Axis, Index] = {axis: place}
        self.own = own
        self.locals: dict[Variable, Local] = {}
        self.tiles: dict[Buffer, Buffer] = {}

    def statement(self, s: Stmt) -> Stmt:
        match s:
            case Loop():
                body = tuple(self.statement(x) for x in s.body)
                return replace(s, body=body, folds=tuple(self._fold(f) for f in s.folds))
            case Prefetch():
                return replace(s, index=self._index(s.index))
            case Define():
                return Define(self._local(s.local), self.expr(s.value))
            case Store():
                return Store(self._buffer(s.buffer), self._index(s.index), self.expr(s.value))
        raise AssertionError("checked before")

    def _fold(self, f: Fold) -> Fold:
        return Fold(self._local(f.local), f.op, self.expr(f.value))

    def _expr(self, e: Expr) -> Expr:
        if isinstance(e, Use):
            return Use(self.locals.get(e.local, e.local))
        out = super()._expr(e)
        return replace(out, buffer=self._buffer(out.buffer)) if isinstance(out, Read) else out

    def _index(self, i: Index) -> Index:
        i = i.substitute(self.where)
        return Index(i.offset, tuple((self.locals.get(v, v), c) for v, c in i.terms))

    def _local(self, x: Local) -> Local:
        if self.own:
            self.locals[x] = Local(x.name, x.dtype)
        return self.locals.get(x, x)

    def _buffer(self, b: Buffer) -> Buffer:
        if not self.own or b.space != "tile":
            return b
        if b not in self.tiles:
            self.tiles[b] = replace(b)
        return self.tiles[b]
