"""Results that may take the place of an operand: proved on the loops of a phase.

A value that dies in a phase may give its memory to one that is born there if nobody reads an element after it was
overwritten. Tasks run in any order, so the proof is about one task: for every read of the operand there is a store
of the result

    * at the same element, as both indices are the same, axis by axis;
    * for the same points, as the loops around them are the same, or go over equal extents;
    * later in the order of the body.

A phase stores each element of a buffer at most once, so no other store touches what that read reads. A softmax in
place is proved so: two loops fold over the row, and the third one stores it. Elements must be equally large: with
smaller ones, element i of the result would lie on element i / 2 of the operand, which is another task's.

A phase whose matmul packs or streams the operand, or that transposes it, or gathers from it, has no such proof.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stitch import dims
from stitch.access import Axis, Bound, Index
from stitch.codegen.emit_rules import nodes
from stitch.codegen.loops import Buffer, Clip, Contract, Gate, Loop, Phase, Read, Stmt, Store, Transpose, expressions


@dataclass(frozen=True)
class _Touch:
    """A read or store: the loops around it, its place in each body from the phase's down to its own, its index.

    What a loop folds is read after the whole body of an iteration."""

    loops: tuple[Loop, ...]
    places: tuple[int, ...]
    index: Index


def replaceable(phase: Phase, born: Collection[Buffer], dying: Collection[Buffer]) -> list[tuple[Buffer, Buffer]]:
    """All (result, operand) of these in a phase for which the proof goes through."""
    reads: dict[Buffer, list[_Touch]] = {}
    stores: dict[Buffer, list[_Touch]] = {}
    barred: set[Buffer] = set()
    for loops, places, s in _statements(phase.body, (), ()):
        match s:
            case Store():
                stores.setdefault(s.buffer, []).append(_Touch(loops, places, s.index))
            case Contract():
                barred |= {s.a, s.b, s.tile}
            case Transpose():
                barred |= {s.to, s.source}
        inner, inside = ((*loops, s), (*places, len(s.body))) if isinstance(s, Loop) else (loops, places)
        for e in expressions(s):
            for x in nodes(e):
                if isinstance(x, Read):
                    reads.setdefault(x.buffer, []).append(_Touch(inner, inside, x.index))
    results = [b for b in stores if b in born and b not in barred and b not in reads]
    operands = [b for b in reads if b in dying and b not in barred and b not in stores]
    return [(to, source) for to in results for source in operands if _is_proved(to, source, stores[to], reads[source])]


def _is_proved(to: Buffer, source: Buffer, stores: Sequence[_Touch], reads: Sequence[_Touch]) -> bool:
    if to.dtype.itemsize != source.dtype.itemsize or to.size != source.size:
        return False
    return all(any(_is_before(r, s) for s in stores) for r in reads)


def _statements(
    body: Sequence[Stmt], loops: tuple[Loop, ...], places: tuple[int, ...]
) -> Iterator[tuple[tuple[Loop, ...], tuple[int, ...], Stmt]]:
    for k, s in enumerate(body):
        yield loops, (*places, k), s
        if isinstance(s, Loop):
            yield from _statements(s.body, (*loops, s), (*places, k))


def _is_before(read: _Touch, store: _Touch) -> bool:
    """Whether what is read is stored at the same point of the loops around both, and later."""
    pairs = zip(read.loops, store.loops, read.places, store.places, strict=False)
    common = next((k for k, (a, b, i, j) in enumerate(pairs) if a is not b or i != j), None)
    if common is None:
        common = min(len(read.loops), len(store.loops))
    if read.places[: common + 1] > store.places[: common + 1]:
        return False
    mine, theirs = read.loops[common:], store.loops[common:]
    renamed = {a.axis: b.axis for a, b in zip(mine, theirs, strict=False)}
    if len(mine) != len(theirs) or not all(_alike(a, b, renamed) for a, b in zip(mine, theirs, strict=True)):
        return False
    return _same(_renamed(read.index, renamed), store.index)


def _alike(read: Loop, store: Loop, renamed: Mapping[Axis, Axis]) -> bool:
    """Whether the two go over the same points."""
    if not _equal(read.axis.extent, store.axis.extent):
        return False
    match read.clip, store.clip:
        case None, None:
            return True
        case Clip() as a, Clip() as b:
            return (a.block, a.limit, renamed.get(a.outer, a.outer)) == (b.block, b.limit, b.outer)
        case Gate() as a, Gate() as b:
            bounds = tuple(Bound(_renamed(x.index, renamed), x.limit) for x in a.bounds)
            return a.without == b.without and bounds == b.bounds
    return False


def _renamed(index: Index, to: Mapping[Axis, Axis]) -> Index:
    return Index(index.offset, tuple((to.get(v, v) if isinstance(v, Axis) else v, c) for v, c in index.terms))


def _same(a: Index, b: Index) -> bool:
    """The same affine function of axes; an index that was loaded may not be what it was."""
    if not all(isinstance(v, Axis) for v, _ in (*a.terms, *b.terms)):
        return False
    return a.offset == b.offset and dict(a.terms) == dict(b.terms)


def _equal(a: dims.Dim, b: dims.Dim) -> bool:
    return a == b or bool(dims.prove_equal(a, b))
