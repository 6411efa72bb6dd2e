"""Nests that go over the same rows as one loop over these: a row is read once, and used by all while it is near.

    before:  for i { vector j { s add= x[i, j] }  r[i] := s }
             vector j { for i { t add= x[i, j] / r[i] }  y[j] := t }
    after:   vector j { t[j] := 0 }
             for i { vector j { s add= x[i, j] }  r[i] := s;  vector j { t[j] := t[j] + x[i, j] / r[i] } }
             vector j { y[j] := t[j] }

A fold over the rows has its results in a tile. What a nest makes of a row others may read at that row only, and what it
folds over rows is there after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from stitch import access, dims
from stitch.access import Axis, Index, Variable
from stitch.codegen.across import BLOCK
from stitch.codegen.emit_rules import identity
from stitch.codegen.loops import Apply, Buffer, Clip, Define, Expr, Literal, Local, Loop, Read, Stmt, Store, Use
from stitch.codegen.lower import Nest, Rewriter, expressions, indices
from stitch.dims import Dim
from stitch.stitching.schemes import estimate

Loops = Callable[[Nest, Axis], tuple[Stmt, ...]]
"""A nest as loops, given the axis that becomes a vector loop."""


def together(
    work: Sequence[Nest], vectors: Sequence[Axis | None], clips: Mapping[Axis, Clip], large: int
) -> tuple[Axis, ...]:
    """The row axes of the first nests, as many as had better be one loop over rows; none if they should not.
    `large`: bytes of what they read from which a second time shows."""
    for axis in (*work[0].kept, *work[0].reduced) if work else ():
        count = 1
        rows = [axis]
        while count < len(work) and (other := _same_rows(work[count], axis, vectors[count], clips)) is not None:
            if not all(_is_ready(a, r, work[count], other) for a, r in zip(work, rows, strict=False)):
                break
            rows.append(other)
            count += 1
        first = _same_rows(work[0], axis, vectors[0], clips)
        folds = sum(r in n.reduced for n, r in zip(work, rows, strict=False))
        if count > 1 and first is axis and 0 < folds < count and _shared_bytes(work[:count], rows) > large:
            return tuple(rows)
    return ()


def _same_rows(n: Nest, axis: Axis, vector: Axis | None, clips: Mapping[Axis, Clip]) -> Axis | None:
    """The axis of a nest that goes over as many rows as `axis`, and around which its vector loop can be."""
    for a in (axis, *n.kept, *n.reduced):
        if a not in (*n.kept, *n.reduced) or a is vector or a in clips or vector is None:
            continue
        fits = a in n.kept or (n.reduced == (a,) and n.kept and vector in n.kept)
        few = isinstance(a.extent, int) and a.extent <= BLOCK  # then a sum is one block
        if a.extent == axis.extent and fits and few:
            return a
    return None


def _is_ready(first: Nest, row: Axis, second: Nest, other: Axis) -> bool:
    """Whether what the second nest reads of what the first one makes is there as soon as that is done with a row."""
    made = [(b, i) for b, i, is_store in indices(first) if is_store and b is not None]
    defined = {s.local for s in (*first.body, *first.after) if isinstance(s, Define)} | {f.local for f in first.folds}
    if any(isinstance(e, Use) and e.local in defined for e in expressions(second)):
        return False
    touched = {b for b, _, _ in indices(first)}
    for b, i, is_store in indices(second):
        if is_store and b in touched:
            return False
        for place in (i for m, i in made if m is b):
            if row in first.reduced or not _in_one_row(place, row, i, other):
                return False
    return True


def _in_one_row(store: Index, row: Axis, read: Index, other: Axis) -> bool:
    """Whether what is read at a row is only what is stored at that row: indices that are alike but for what moves them
    by less than a row."""
    step = store.coefficient(row)
    if not isinstance(step, int) or step < 1 or read.coefficient(other) != step or store.offset != read.offset:
        return False
    fixed: list[set[tuple[Variable, Dim]]] = []
    for i, own in ((store, row), (read, other)):
        within, around = 0, set()
        for v, c in i.terms:
            if v is own:
                continue
            if isinstance(v, Axis) and isinstance(v.extent, int) and isinstance(c, int) and 0 < c < step:
                within += c * (v.extent - 1)
            else:
                around.add((v, c))
        if within >= step:
            return False
        fixed.append(around)
    return fixed[0] == fixed[1]


def _shared_bytes(work: Sequence[Nest], rows: Sequence[Axis]) -> int:
    """Bytes of what several of the nests read row by row."""
    seen: dict[Buffer, int] = {}
    total = 0
    for n, row in zip(work, rows, strict=True):
        own = (*n.kept, *n.reduced)
        read = {b: i for b, i, is_store in indices(n) if not is_store and b is not None and b.space == "global"}
        for b, i in read.items():
            if i.coefficient(row) == 0:
                continue
            points = estimate(dims.product(a.extent for a in own if i.coefficient(a) != 0)) * b.dtype.itemsize
            total += min(points, seen.get(b, 0))
            seen[b] = points
    return total


def by_row(
    work: Sequence[Nest], rows: Sequence[Axis], vectors: Sequence[Axis], loops: Loops
) -> tuple[tuple[Stmt, ...], tuple[Buffer, ...]]:
    """The nests as one loop over rows, and the tiles in which folds over rows have their results."""
    row = rows[0]
    before: list[Stmt] = []
    body: list[Stmt] = []
    after: list[Stmt] = []
    tiles: dict[Local, Buffer] = {}
    for n, own, vector in zip(work, rows, vectors, strict=True):
        if own in n.kept:
            inside = replace(n, kept=tuple(a for a in n.kept if a is not own))
        else:
            size = dims.product(a.extent for a in n.kept)
            at = access.linear([a.extent for a in n.kept], [access.of(a) for a in n.kept])
            mine = {f.local: Buffer(f.local.name, f.local.dtype, size, "tile") for f in n.folds}
            kinds = [(f, mine[f.local]) for f in n.folds]
            empty = [Store(t, at, Literal(identity(f.op, t.dtype), t.dtype)) for f, t in kinds]
            before += loops(Nest(n.kept, (), tuple(empty)), vector)
            folded = [Store(t, at, Apply(f.op, (Read(t, at), f.value), t.dtype)) for f, t in kinds]
            inside = Nest(n.kept, (), (*n.body, *folded))
            total = _Totals(mine, at)
            after += loops(Nest(n.kept, (), tuple(total.stmt(s) for s in n.after)), vector)
            tiles |= mine
        body += loops(_renamed(inside, own, row), vector)
    return (*before, Loop(row, tuple(body), (), "serial"), *after), tuple(tiles.values())


def _renamed(n: Nest, axis: Axis, to: Axis) -> Nest:
    return n if axis is to else Rewriter(lambda _, i: i.substitute({axis: access.of(to)})).nest(n, {})


class _Totals(Rewriter):
    """Reads what was a local from a tile."""

    def __init__(self, tiles: Mapping[Local, Buffer], at: Index) -> None:
        super().__init__(lambda _, i: i)
        self.tiles, self.at = tiles, at

    def _expr(self, e: Expr) -> Expr:
        if isinstance(e, Use) and e.local in self.tiles:
            return Read(self.tiles[e.local], self.at)
        return super()._expr(e)
