"""Long folds in parts: a reduction with few results becomes partial results of blocks, then a fold of these.

Before: parallel (p) { for r < n { total op= f(p, r) }; after(total) }
after:  parallel (part, p) { for r < block { t op= f(p, part·block + r) }; parts[part, p] := t }
        parallel (p) { for part { total op= parts[part, p] }; after(total) }

The order of a sum follows from its extents alone, never from the number of threads; and the error of a long sum grows
with the length of a block and the number of blocks, rather than with their product.

It is safe where the nests of a phase need nothing of each other: what a block reads was made by an earlier phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stitch import access, dims
from stitch.access import Axis, Index
from stitch.codegen.loops import Buffer, Clip, Define, Fold, Local, Read, Store, Use
from stitch.codegen.lower import Nest, Rewriter, cost, expressions, indices
from stitch.graph import Value
from stitch.stitching.schemes import estimate

PART = 16_384
"""Elements that a block folds, or fewer of what takes long, if there are not many blocks."""

MANY = 64
"""Blocks from which there is enough to do for all."""

LEAST = 128
"""Terms that a block folds at least, lest partial results are as many as what they are made from."""

WIDE = 16_384
"""Points that a task takes side by side where memory is far: whole rows if possible, for then it is read in order."""

ENOUGH = 16
"""Tasks from which a phase has enough of them as it is."""


@dataclass(frozen=True, eq=False)
class Work:
    """What becomes one phase: nests under parallel axes. Axes with a clip end early in the last block."""

    parallel: tuple[Axis, ...]
    nests: tuple[Nest, ...]
    clips: Mapping[Axis, Clip] = field(default_factory=dict)


def split(work: Work, wide: int, large: int) -> tuple[tuple[Work, ...], tuple[tuple[Buffer, Value], ...]]:
    """The work as it is, or in two phases, and the buffers of partial results, which nothing else needs. `wide`:
    points of the parallel axes that a task takes if lanes run along these; `large`: bytes of a buffer from which it
    takes more, for the sake of memory."""
    points = estimate(dims.product(a.extent for a in work.parallel))
    whole, work = work, replace(work, nests=tuple(joined(work.nests)))
    if not work.nests or not all(_is_fold(n) for n in work.nests) or _is_read_again(work.nests):
        return (whole,), ()
    longest = [max(n.reduced, key=lambda a: estimate(a.extent)) for n in work.nests]
    extent = longest[0].extent
    terms = max(estimate(dims.product(a.extent for a in n.reduced)) for n in work.nests)
    in_rows = any(_runs_along(n, a, work.parallel) for n, a in zip(work.nests, longest, strict=True))
    together = 1 if in_rows else min(points, WIDE if _is_large(work.nests, large) else wide)
    slow = min(max(round(max(cost(n) for n in work.nests) / 8), 1), 8)
    size = max(PART // slow, min(PART, terms * together // MANY))
    if any(a.extent != extent for a in longest) or points >= ENOUGH * together or terms * together < 2 * size:
        return (whole,), ()
    block = max(size * estimate(extent) // (terms * together) // 16 * 16, LEAST)
    part = Axis("part", dims.ceil_div(extent, block))
    if part.extent == 1:
        return (work,), ()
    first: list[Nest] = []
    second: list[Nest] = []
    clips: dict[Axis, Clip] = {}
    parts: list[tuple[Buffer, Value]] = []
    for n, axis in zip(work.nests, longest, strict=True):
        inner = Axis(axis.name, block)
        clips[inner] = Clip(block, part, extent)
        buffers = [_buffer(f, part, work.parallel) for f in n.folds]
        parts += buffers
        first.append(_partial(n, axis, inner, part, work.parallel, [b for b, _ in buffers]))
        second.append(_combined(n, Axis("part", part.extent), work.parallel, [b for b, _ in buffers]))
    return (Work((part, *work.parallel), tuple(first), clips), Work(work.parallel, tuple(second))), tuple(parts)


def joined(nests: Sequence[Nest]) -> list[Nest]:
    """What is done once at a point, after a fold at that point, is a part of the fold's nest: its result need not be in
    a tile in between."""
    out: list[Nest] = []
    for n in nests:
        if out and not (n.kept or n.reduced or out[-1].kept) and out[-1].reduced:
            out[-1] = replace(out[-1], after=(*out[-1].after, *n.body, *n.after))
        else:
            out.append(n)
    return out


def _runs_along(n: Nest, axis: Axis, parallel: Sequence[Axis]) -> bool:
    """Whether what a nest folds is adjacent along `axis`; what all points share does not count."""
    points = [a for a in parallel if a.extent != 1]
    return any(
        i.coefficient(axis) == 1 and (not points or any(i.coefficient(p) != 0 for p in points))
        for _, i, _ in indices(n)
    )


def _is_large(nests: Sequence[Nest], large: int) -> bool:
    buffers = {b for n in nests for b, _, _ in indices(n) if b is not None}
    return any(estimate(b.size) * b.dtype.itemsize > large for b in buffers)


def _is_fold(n: Nest) -> bool:
    """True for a nest that folds, and reads global buffers only."""
    if n.kept or not n.reduced or not n.folds:
        return False
    if any(b is not None and b.space == "tile" for b, _, _ in indices(n)):
        return False
    own = {s.local for s in (*n.body, *n.after) if isinstance(s, Define)}
    folded = {f.local for f in n.folds}
    return {e.local for e in expressions(n) if isinstance(e, Use)} <= own | folded


def _is_read_again(nests: Sequence[Nest]) -> bool:
    """Whether what a nest stores is read in this phase: it would be there only after the first one of two."""
    stored = {b for n in nests for b, _, is_store in indices(n) if is_store}
    return any(b in stored for n in nests for b, _, is_store in indices(n) if not is_store)


def _place(part: Axis, parallel: tuple[Axis, ...]) -> Index:
    """Where a partial result is: results of one block side by side."""
    axes = (part, *parallel)
    return access.linear([a.extent for a in axes], [access.of(a) for a in axes])


def _buffer(fold: Fold, part: Axis, parallel: tuple[Axis, ...]) -> tuple[Buffer, Value]:
    shape = (part.extent, *(a.extent for a in parallel))
    value = Value("parts", fold.local.dtype, shape)
    return Buffer("p", value.dtype, value.size), value


def _partial(n: Nest, axis: Axis, inner: Axis, part: Axis, parallel: tuple[Axis, ...], buffers: list[Buffer]) -> Nest:
    position = access.index(0, (part, inner.extent), (inner, 1))
    moved = Rewriter(lambda _, i: i.substitute({axis: position})).nest(n, {axis: inner})
    folds = tuple(replace(f, local=Local(f.local.name, f.local.dtype)) for f in moved.folds)
    at = _place(part, parallel)
    stores = tuple(Store(b, at, Use(f.local)) for b, f in zip(buffers, folds, strict=True))
    return replace(moved, folds=folds, after=stores)


def _combined(n: Nest, part: Axis, parallel: tuple[Axis, ...], buffers: list[Buffer]) -> Nest:
    at = _place(part, parallel)
    folds = tuple(replace(f, value=Read(b, at)) for b, f in zip(buffers, n.folds, strict=True))
    return Nest((), (part,), (), folds, n.after)
