"""The memory of a native step: which bytes of the arena each value has, from when to when.

Time is counted in phases, between which there is a barrier: a value lives from the first phase that stores some of it
to the last one that touches it. Two values may share bytes if no phase needs both; and a result has the very place of
an operand that dies where it is born, if `inplace` proves that it may.

Sizes are expressions over the model's symbols, and so are places. Values are placed one after the other, those that
live long or are large first, and each has the lowest place where it lies, at all values of the
symbols, provably above or below every other one that lives with it. Where nothing can be proved, it lies above the
larger of the two. How low a place is depends on the symbols: a few choices of them stand for all. Of some orders, the
one whose arena is the smallest over all choices is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from stitch import dims
from stitch.codegen import inplace
from stitch.codegen.emit_rules import stored_in
from stitch.codegen.kernels import Lowered, buffers
from stitch.codegen.loops import Buffer
from stitch.dims import Dim
from stitch.graph import Value
from stitch.stitching.schemes import HINT

ALIGNMENT = 64

FEW, MANY = 1, 512
"""What symbols are taken to be in turn: all HINT; then, one after the other, MANY where the others are FEW."""

GOOD = 1.01
"""How near to the most that lives at once, on average, an arena has to be for no other order to be tried."""

Sizes = tuple[int, ...]  # of one dim, at each choice of the symbols


@dataclass(frozen=True, eq=False)
class Lifetime:
    """`size`: bytes, a multiple of ALIGNMENT. `first`, `last`: numbers of phases. `others`: values that take its place,
    one after the other."""

    value: Value
    size: Dim
    first: int
    last: int
    others: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Offsets in bytes, the bytes of all together, and what they follow from. `replaced`: by result, the operand that
    it takes the place of."""

    offsets: Mapping[Value, Dim]
    total: Dim
    lifetimes: tuple[Lifetime, ...] = ()  # of each value on its own
    replaced: Mapping[Value, Value] = field(default_factory=dict)


def plan(step: Sequence[Lowered], is_local: Callable[[Value], bool]) -> Memory:
    """The memory of consecutive kernels. `is_local`: whether a value lives in the arena, if it is made here."""
    lifetimes = _lifetimes(step, is_local)
    replaced = _replaced(step, {x.value: x for x in lifetimes})
    merged = _merged(lifetimes, replaced)
    placing = _Placing(merged)
    offsets, total = placing.best()
    if replaced and not placing.is_good(total):  # a place that is held for long may be in the way of others
        alone = _Placing(lifetimes)
        apart, size = alone.best()
        if alone.score(size) < alone.score(total):
            return Memory({x.value: at for x, at in apart.items()}, size, tuple(lifetimes))
    places = {v: offsets[x] for x in merged for v in (x.value, *x.others)}
    return Memory(places, total, tuple(lifetimes), replaced)


def _lifetimes(step: Sequence[Lowered], is_local: Callable[[Value], bool]) -> list[Lifetime]:
    found: dict[Value, Lifetime] = {}
    now = 0
    for low in step:
        given = _values(low)
        for phase in low.program.phases:
            stored, touched = stored_in(phase.body), buffers(phase)
            for b, v in given.items():  # in their order, which is that of every process
                if b not in touched or not is_local(v):
                    continue
                if v in found:
                    found[v] = replace(found[v], last=now)
                elif b in stored:
                    found[v] = Lifetime(v, dims.ceil_div(v.bytes, ALIGNMENT) * ALIGNMENT, now, now)
            now += 1
    return sorted(found.values(), key=lambda x: (x.first, x.last, x.value.name))


def _values(low: Lowered) -> dict[Buffer, Value]:
    return {b: v for b, v in zip(low.program.buffers, low.parameters, strict=True) if isinstance(v, Value)}


def _replaced(step: Sequence[Lowered], lives: Mapping[Value, Lifetime]) -> dict[Value, Value]:
    """Results that take the place of an operand; each operand gives it to one result only."""
    out: dict[Value, Value] = {}
    taken: set[Value] = set()
    now = 0
    for low in step:
        given = {b: v for b, v in _values(low).items() if v in lives}
        for phase in low.program.phases:
            born = {b for b, v in given.items() if lives[v].first == now}
            dying = {b for b, v in given.items() if lives[v].last == now > lives[v].first}
            for to, source in inplace.replaceable(phase, born, dying) if born and dying else ():
                result, operand = given[to], given[source]
                if result not in out and operand not in taken:
                    out[result] = operand
                    taken.add(operand)
            now += 1
    return out


def _merged(lifetimes: Sequence[Lifetime], replaced: Mapping[Value, Value]) -> list[Lifetime]:
    """One lifetime for all that have one place."""
    out: dict[Value, Lifetime] = {}  # by the value that had the place first
    head: dict[Value, Value] = {}
    for x in lifetimes:  # an operand is born before what replaces it
        first = head[replaced[x.value]] if x.value in replaced else x.value
        head[x.value] = first
        if first is x.value:
            out[first] = x
        else:
            out[first] = replace(out[first], last=x.last, others=(*out[first].others, x.value))
    return list(out.values())


class _Placing:
    """Offsets for lifetimes; what they are at the chosen values of the symbols is kept beside each dim."""

    def __init__(self, lifetimes: Sequence[Lifetime]) -> None:
        self.lifetimes = lifetimes
        names = sorted({s for x in lifetimes for s in _names(x.size)})
        chosen = [dict.fromkeys(names, HINT), *({**dict.fromkeys(names, FEW), s: MANY} for s in names)]
        self.points = chosen if names else chosen[:1]
        self.known: dict[Dim, Sizes] = {}
        self.scores: dict[Dim, float] = {}
        self.proved: dict[tuple[Dim, Dim], bool] = {}

    def best(self) -> tuple[dict[Lifetime, Dim], Dim]:
        """The offsets from the order that gives the smallest arena, and its size."""
        found: tuple[float, dict[Lifetime, Dim], Dim] | None = None
        for weight in self.weights():
            offsets, total = self.placed(sorted(self.lifetimes, key=weight, reverse=True))
            if found is None or self.score(total) < found[0]:
                found = self.score(total), offsets, total
            if self.is_good(found[2]):
                break
        assert found is not None
        return found[1], found[2]

    def is_good(self, total: Dim) -> bool:
        return self.score(total) <= GOOD * len(self.points)

    def weights(self) -> Iterator[Callable[[Lifetime], float]]:
        """What may come first: what lives long, lest it cuts the arena in two; what is large; both."""
        yield lambda x: x.last - x.first
        yield lambda x: self.score(x.size)
        yield lambda x: (x.last - x.first) * self.score(x.size)

    def placed(self, order: Sequence[Lifetime]) -> tuple[dict[Lifetime, Dim], Dim]:
        offsets: dict[Lifetime, Dim] = {}
        for x in order:
            beside = list(dict.fromkeys(
                (at, at + y.size) for y, at in offsets.items() if x.first <= y.last and y.first <= x.last
            ))  # fmt: skip
            best: tuple[float, Dim] | None = None
            known: dict[Dim, Dim] = {}
            for start in sorted(dict.fromkeys([0, *(end for _, end in beside)]), key=self.score):
                if best is not None and best[0] <= self.score(start):
                    break
                at = self.lowest(start, x.size, beside, known)
                if best is None or self.score(at) < best[0]:
                    best = self.score(at), at
            assert best is not None
            offsets[x] = best[1]
        return offsets, self.largest([at + x.size for x, at in offsets.items()])

    def lowest(self, start: Dim, size: Dim, beside: Sequence[tuple[Dim, Dim]], known: dict[Dim, Dim]) -> Dim:
        """The lowest place from `start` on that is above or below each of these (begin, end), whatever the symbols.
        `known`: what was found from other starts, whose ways up join soon."""
        passed: list[Dim] = []
        while start not in known:
            passed.append(start)
            end = start + size
            hit = [e for b, e in beside if not self.is_least(e, start) and not self.is_least(end, b)]
            higher = self.largest([start, *hit]) if hit else start
            if higher == start:  # free, or all of them end there, which shows only where they are seen together
                known[start] = start
            start = higher
        known.update(dict.fromkeys(passed, known[start]))
        return known[start]

    def largest(self, found: Sequence[Dim]) -> Dim:
        """The maximum, without what another one provably reaches."""
        kept: list[Dim] = []
        for d in sorted(dict.fromkeys(found), key=self.score, reverse=True):
            if not any(self.is_least(d, other) for other in kept):
                kept.append(d)
        return dims.dim_max(*kept) if kept else 0

    def is_least(self, a: Dim, b: Dim) -> bool:
        """Whether a <= b at all values of the symbols. Most of what is not so shows at a chosen point."""
        if isinstance(a, int) and isinstance(b, int):
            return a <= b
        if any(m > n for m, n in zip(self.sizes(a), self.sizes(b), strict=True)):
            return False
        if (a, b) not in self.proved:
            self.proved[a, b] = bool(dims.prove_le(a, b))
        return self.proved[a, b]

    def score(self, d: Dim) -> float:
        """How large a dim is, over all choices, in units of the least arena of each."""
        if d not in self.scores:
            self.scores[d] = sum(n / max(least, 1) for n, least in zip(self.sizes(d), self.floor, strict=True))
        return self.scores[d]

    @cached_property
    def floor(self) -> Sizes:
        """The most bytes that live at the same time."""
        steps = range(max((x.last for x in self.lifetimes), default=0) + 1)
        live = [[self.sizes(x.size) for x in self.lifetimes if x.first <= t <= x.last] for t in steps]
        return tuple(max(sum(s[k] for s in row) for row in live) for k in range(len(self.points)))

    def sizes(self, d: Dim) -> Sizes:
        if d not in self.known:
            self.known[d] = tuple(d if isinstance(d, int) else dims.evaluate(d, p) for p in self.points)
        return self.known[d]


def _names(d: Dim) -> frozenset[str]:
    return frozenset() if isinstance(d, int) else dims.symbols(d)
