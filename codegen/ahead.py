"""Asking memory ahead: while a task computes, the lines that the next one reads first are on their way.

    before:  parallel (i) { vector j { t[j] := x[i, j] … }    vector k { … exp(t[k]) … } }
    after:   parallel (i) { vector j { t[j] := x[i, j] … }    vector k { … exp(t[k]) …; prefetch x[i + 1, k] } }

A task with several loops reads memory in the first, and leaves it idle in the others; the processor looks ahead by some
hundred instructions, its prefetchers by a few lines and not from row to row. Tasks that a worker takes come one after
another, so the next one's place is known. The costliest of the later loops that go over the same points asks: it hides
one more instruction best. The lines go to the second cache: the first one's few slots for misses are left alone, and it
could not hold them in columns, whose rows often fall into one set. Nothing is asked for that is likely there already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stitch import access, dims
from stitch.access import Axis, Index
from stitch.codegen.emit_rules import stored_in
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Contract,
    Define,
    Expr,
    Guarded,
    Loop,
    Phase,
    Prefetch,
    Read,
    Stmt,
    Store,
    Transpose,
    children,
    expressions,
    walk,
)
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching.schemes import estimate
from stitch.target import Target

NEAR = 4096
"""Bytes of a buffer that are asked for ahead, at least: a task may be over before its lines would be there."""

BUSY, SHORT = 10.0, 2048
"""Where the next task's part of a buffer lies behind this one's, the processor looks ahead by itself, and does better,
unless the loop takes so many instructions, and the task so many bytes of the buffer."""

FARTHEST = 8
"""Tasks ahead, at most."""


@dataclass(frozen=True)
class _Nest:
    """Loops around each other, outermost first, and where they stand among a phase's statements."""

    place: int
    loops: tuple[Loop, ...]

    def renamed(self, other: _Nest) -> Mapping[Axis, Index] | None:
        """What this nest's axes are in the other one's, if that goes over the same points in the same order; it may go
        over them in more loops if here is a single one."""
        if len(self.loops) == len(other.loops):
            pairs = list(zip(self.loops, other.loops, strict=True))
            if any(a.axis.extent != b.axis.extent or a.mode != b.mode or a.clip != b.clip for a, b in pairs):
                return None
            return {a.axis: access.of(b.axis) for a, b in pairs if a.axis is not b.axis}
        extents = [x.axis.extent for x in other.loops]
        one, last = self.loops[0], other.loops[-1]
        whole = len(self.loops) == 1 and all(x.clip is None for x in (one, *other.loops))
        if not whole or one.mode != last.mode or dims.product(extents) != one.axis.extent:
            return None
        return {one.axis: access.linear(extents, [access.of(x.axis) for x in other.loops])}

    @property
    def statements(self) -> tuple[Stmt, ...]:
        return (*self.loops, *(s for x in self.loops for s in x.body if not isinstance(s, Loop)))


def asked(phase: Phase, target: Target) -> Phase:
    """The phase, asking for what the next task reads first."""
    axis = next((a for a in reversed(phase.axes) if a.extent != 1), None)
    if axis is None or not target.is_x86 or any(isinstance(s, Contract) for s in walk(phase.body)):
        return phase
    nests = [n for place, s in enumerate(phase.body) if (n := _nest(place, s)) is not None]
    reads = list(_first(nests, stored_in(phase.body)))
    busy = [n for n, read in reads if _bytes(read.buffer) > target.l2_bytes]
    found = [
        _ahead(n, nests, busy, read, axis, target) or _in_rows(n, read, phase.axes, axis, target)
        for n, read in reads
        if _bytes(read.buffer) > target.l2_bytes and all(isinstance(v, Axis) for v, _ in read.index.terms)
    ]
    found += [_turned(s, nests, axis, target) for s in phase.body if isinstance(s, Transpose)]
    body = list(phase.body)
    for nest, prefetch in filter(None, found):
        body[nest.place] = _with(body[nest.place], prefetch)
    return replace(phase, body=tuple(body))


def _nest(place: int, s: Stmt) -> _Nest | None:
    """The loops of a statement, if it is loops with one in each other."""
    loops: list[Loop] = []
    while isinstance(s, Loop):
        loops.append(s)
        inner = [x for x in s.body if isinstance(x, Loop)]
        if len(inner) > 1 or not all(isinstance(x, Loop | Define | Store) for x in s.body):
            return None
        if not inner:
            break
        s = inner[0]
    return _Nest(place, tuple(loops)) if loops else None


def _first(nests: list[_Nest], stored: frozenset[Buffer]) -> Iterator[tuple[_Nest, Read]]:
    """The first read of every global buffer that the phase does not store."""
    seen: set[Buffer] = set()
    for n in nests:
        for e in _values(n):
            if isinstance(e, Read) and e.buffer.space == "global" and e.buffer not in seen | stored:
                seen.add(e.buffer)
                yield n, e


def _values(n: _Nest) -> Iterator[Expr]:
    """The expressions that are evaluated at all points of a nest."""
    stack = [e for s in n.statements for e in expressions(s)]
    seen: set[int] = set()
    while stack:
        e = stack.pop()
        if id(e) not in seen:
            seen.add(id(e))
            yield e
            stack += () if isinstance(e, Guarded) else children(e)


def _bytes(buffer: Buffer) -> int:
    return estimate(buffer.size) * buffer.dtype.itemsize


def _cost(n: _Nest) -> float:
    return sum(PRIMITIVES[e.prim].cost for e in _values(n) if isinstance(e, Apply))


def _ahead(
    first: _Nest, nests: list[_Nest], busy: Collection[_Nest], read: Read, axis: Axis, target: Target
) -> tuple[_Nest, Prefetch] | None:
    """What is asked for, and the nest that asks."""
    later = [n for n in nests if n.place > first.place and first.renamed(n) is not None and n not in busy]
    own = {s.axis: s for s in first.loops}
    vector = [a for a, s in own.items() if s.mode == "vector"]
    step = read.index.coefficient(axis)
    if not later or step == 0 or any(read.index.coefficient(a) != 1 for a in vector) or not vector:
        return None
    item = read.buffer.dtype.itemsize
    points = estimate(dims.product(a.extent for a in own if read.index.coefficient(a) != 0))
    if points * item > 2 * target.l2_bytes:
        return None
    tasks = min(-(-NEAR // (points * item)), FARTHEST)
    asking = max(later, key=_cost)
    if step == points and (_cost(asking) < BUSY or points * item < SHORT):
        return None
    at = read.index.substitute(first.renamed(asking) or {}).plus(step * tasks)
    return asking, Prefetch(read.buffer, at, near=points * item * tasks <= target.l1_bytes // 8)


def _in_rows(n: _Nest, read: Read, axes: Sequence[Axis], axis: Axis, target: Target) -> tuple[_Nest, Prefetch] | None:
    """The same for a loop that goes over rows, one per iteration of a loop around it or one per task: it asks itself,
    if what it goes through again for each row takes the room of what the processor loads ahead, or if there is a gap
    from row to row."""
    vector, item = n.loops[-1], read.buffer.dtype.itemsize
    around = n.loops[-2].axis if len(n.loops) > 1 else axis
    step, extent = read.index.coefficient(around), estimate(vector.axis.extent)
    if vector.mode != "vector" or read.index.coefficient(vector.axis) != 1 or step == 0:
        return None
    again = sum(map(_bytes, _again(vector, (*axes, *(x.axis for x in n.loops[:-1])), target)))
    gap = len(n.loops) > 1 and estimate(step) > extent
    if again <= target.l1_bytes // 2 and not gap:
        return None
    rows = min(-(-2 * NEAR // (extent * item)), FARTHEST)
    return n, Prefetch(read.buffer, read.index.plus(step * rows))


def _turned(t: Transpose, nests: list[_Nest], axis: Axis, target: Target) -> tuple[_Nest, Prefetch] | None:
    """The same for a block that is transposed into a tile, of which each column is a line or two in memory: one of them
    for each vector of the loops over the tile."""
    step, lanes = t.index.coefficient(axis), target.lanes(t.source.dtype)
    fits = [
        n
        for n in nests
        if len(n.loops) == 2
        and n.loops[0].mode == "vector"
        and n.loops[0].axis.extent == t.columns.extent
        and n.loops[1].axis.extent == t.rows.extent
    ]
    far = t.source.space == "global" and _bytes(t.source) > target.l2_bytes
    if not fits or step == 0 or not far or estimate(t.rows.extent) < lanes:
        return None
    vector, inner = (x.axis for x in fits[0].loops)
    column = access.index(0, (vector, t.step), (inner, t.step))
    return fits[0], Prefetch(t.source, access.add(t.index, column).plus(step))


def _again(vector: Loop, around: Sequence[Axis], target: Target) -> set[Buffer]:
    """The buffers that a loop goes through element by element, and from the start again for each point of an axis
    around it."""
    places = [(s.buffer, s.index) for s in vector.body if isinstance(s, Store)]
    places += [(e.buffer, e.index) for e in _values(_Nest(0, (vector,))) if isinstance(e, Read)]
    return {
        b
        for b, i in places
        if i.coefficient(vector.axis) == 1
        and any(i.coefficient(a) == 0 and a.extent != 1 for a in around)
        and (b.space == "tile" or _bytes(b) <= target.l2_bytes)
    }


def _with(s: Stmt, prefetch: Prefetch) -> Stmt:
    """The statement in the innermost of the loops."""
    assert isinstance(s, Loop)
    inner = [x for x in s.body if isinstance(x, Loop)]
    if not inner:
        return replace(s, body=(prefetch, *s.body))
    return replace(s, body=tuple(_with(x, prefetch) if x is inner[0] else x for x in s.body))
