"""Phases and placements: which groups run at the same parallel point, and how values get from one to the next.

Two groups share a phase if there are parallel axes at whose every point the reader needs only what the writer made at
that point (local and regional stitching); otherwise a barrier stands between them and the value goes through memory
(global stitching). A value inside a phase is a register if it is one number at a point, else a tile, unless the tiles
exceed the cache budget: then the largest is demoted to a buffer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from stitch import access, dims
from stitch.access import Axis
from stitch.dims import Dim
from stitch.graph import Value
from stitch.stitching.schedule import Group, Phase, Placement, Root
from stitch.stitching.trace import Access

HINT = 64
"""What a symbol is taken to be where a decision needs a number. Results never depend on it."""

FAR = 32
"""Budgets of tiles from which a value does not stay in any cache."""

FEW = 16
"""Tasks below which a phase does not give up parallel axes to take in another group, if it has more without."""

LANES = 64
"""Columns that a task takes side by side, where lanes run across columns."""

STREAMS = 3
"""Columns in a cache at a time, where columns are read, changed and stored."""

LONG = 1 << 16
"""Elements from which a group's work at one point is cut over workers, if there are few points: a phase of its own."""


def estimate(d: Dim, single: Collection[str] = ()) -> int:
    """A dim as a number, for decisions only; the symbols in `single` are taken to be 1."""
    return d if isinstance(d, int) else dims.evaluate(d, {s: 1 if s in single else HINT for s in dims.symbols(d)})


@dataclass
class _Open:
    """A phase while groups are being added. `axes` are the parallel axes, as axes of the phase's first group."""

    axes: list[Axis]
    single: Collection[str] = ()
    groups: list[Group] = field(default_factory=list)
    made: dict[Value, Root] = field(default_factory=dict)

    def tasks(self, axes: Sequence[Axis]) -> int:
        return self.count(dims.product(a.extent for a in axes))

    def count(self, d: Dim) -> int:
        return estimate(d, self.single)


def phases(
    groups: Sequence[Group], budget: int, regional: bool = True, single: Collection[str] = ()
) -> tuple[Phase, ...]:
    """Groups in phases, in order; the axes of groups that share a phase are the same objects. `budget`: bytes of tiles
    that a worker may use. `single`: symbols that may well be 1 (batches), which had better not be all that is
    parallel."""
    waiting = list(groups)
    out: list[Phase] = []
    while waiting:
        first = waiting.pop(0)
        now = _Open([a for a in first.axes if a not in first.reduced], single)
        _admit(now, first)
        if regional:
            left: list[Group] = []
            blocked: set[Value] = set()
            for k, g in enumerate(waiting):
                later = waiting[k + 1 :]
                joined = None if any(a.value in blocked for a in g.accesses) else _try(now, g, later, budget)
                if joined is None:
                    left.append(g)
                    blocked.update(r.value for r in g.roots)
                else:
                    now.axes, g = joined
                    _admit(now, g)
            waiting = left
        out.append(Phase(tuple(now.axes), tuple(now.groups)))
    return tuple(out)


def _admit(now: _Open, g: Group) -> None:
    now.groups.append(g)
    now.made.update({r.value: r for r in g.roots})


def _try(now: _Open, g: Group, later: Sequence[Group], budget: int) -> tuple[list[Axis], Group] | None:
    """The parallel axes and the group renamed to them, if `g` may join the open phase. `later`: groups after it."""
    inner = [a for a in g.accesses if a.value in now.made]
    relation: dict[Axis, Axis | None] = {}
    if any(now.made[a.value].is_piece for a in inner):
        return None
    if inner:
        for a in inner:
            _constrain(relation, now, now.made[a.value].store, a)
    else:
        common = next(((m, a) for h in now.groups for m in h.accesses for a in g.accesses if _same_place(m, a)), None)
        if common is not None:
            _constrain(relation, now, common[0].at, common[1])
        else:
            relation |= _beside(now, g, later)
    reduced = g.reduced
    kept = [a for a in now.axes if relation.get(a) is not None and relation[a] not in reduced]
    if not kept and now.axes and not _small(now, g):
        return None
    if not kept and any(len(h.axes) for h in (*now.groups, g)) and not _small(now, g):
        return None
    before, after = now.tasks(now.axes), now.tasks(kept)
    if after < min(before, FEW) and not _small(now, g):
        return None
    height = now.tasks(g.axes) // max(after, 1)
    if after < FEW and height >= LONG:
        return None
    if _is_tall(now, kept, g, height, budget):
        return None
    taken = {relation[a]: a for a in kept}
    if len(taken) != len(kept):
        return None
    return kept, g.substitute({b: access.of(a) for b, a in taken.items() if b is not None and b is not a})


def _beside(now: _Open, g: Group, later: Sequence[Group]) -> dict[Axis, Axis]:
    """The relation, axis by axis, of a group that has nothing to do with the open phase, but goes over points of the
    same extents and is needed together with it."""
    own = [a for a in g.axes if a not in g.reduced]
    if [a.extent for a in own] != [a.extent for a in now.axes]:
        return {}
    ours, theirs = set(now.made), {r.value for r in g.roots}
    for h in later:
        reads = {a.value for a in h.accesses}
        if reads & ours and reads & theirs:
            return dict(zip(now.axes, own, strict=True))
        for made in (ours, theirs):
            if reads & made:
                made |= {r.value for r in h.roots}
    return {}


def _is_tall(now: _Open, kept: Sequence[Axis], g: Group, height: int, budget: int) -> bool:
    """Whether the phase would go through columns too high to stay in a cache, `height` elements of each by `g`. Rows
    that are next to each other are then better read twice in a row than a few lanes of each at a time. Columns that
    the phase does not go through anyway should leave room for what is stored, too."""
    sizes = (min(now.tasks(h.axes), now.count(a.value.size)) for h in now.groups for a in h.accesses)
    before = max(sizes, default=0) // max(now.tasks(kept), 1)
    if len(kept) < len(now.axes):
        height = max(height, before)
    fresh = before * FEW <= height
    if not g.accesses or height * LANES * 4 * (STREAMS if fresh else 1) <= budget:
        return False
    accesses = [a for h in now.groups for a in h.accesses]
    return any(_lane(a) in kept and any(x not in kept for i in a.at for x in i.axes()) for a in accesses)


def _lane(a: Access) -> Axis | None:
    """The axis along which the elements of an access are adjacent, if there is one."""
    if a.linear:
        return next((x for x in a.offset.axes() if a.offset.coefficient(x) == 1), None)
    return a.at[-1].axis() if a.at else None


def _same_place(a: Access, b: Access) -> bool:
    return a.value is b.value and not a.linear and not b.linear


def _small(now: _Open, g: Group) -> bool:
    """Certainly too little work to be worth a barrier."""
    sizes = [dims.product(a.extent for a in h.axes) for h in (*now.groups, g)]
    return all(isinstance(n, int) and n <= 4096 for n in sizes)


def _constrain(relation: dict[Axis, Axis | None], now: _Open, store: Sequence[access.Index], a: Access) -> None:
    """Adds what one access says about which axis of the reader each parallel axis is (None: no single one)."""
    for p in now.axes:
        found: Axis | None = None
        if not a.linear:
            for mine, theirs in zip(store, a.at, strict=True):
                if mine.axis() is p:
                    axis = theirs.axis()
                    found = axis if axis is not None and axis.extent == p.extent else None
                elif p in mine.axes():
                    found = _matching_term(mine, theirs, p)
        if p in relation and relation[p] is not found:
            found = None
        relation[p] = found


def _matching_term(mine: access.Index, theirs: access.Index, p: Axis) -> Axis | None:
    """The reader's axis that stands where `p` stands in a dim that both sides split alike."""
    if mine.offset != 0 or theirs.offset != 0 or len(mine.terms) != len(theirs.terms):
        return None
    pairs = {c: v for v, c in theirs.terms}
    for v, c in mine.terms:
        w = pairs.get(c)
        if not isinstance(v, Axis) or not isinstance(w, Axis) or v.extent != w.extent:
            return None
        if v is p:
            return w
    return None


def place(
    kernel_phases: Sequence[Phase], leaving: Collection[Value], budget: int
) -> tuple[dict[Value, Placement], tuple[str, ...]]:
    """Where every value lives, and reason codes. `budget`: bytes of tiles per worker (symbols taken as HINT)."""
    placements: dict[Value, Placement] = {}
    reasons: list[str] = []
    read_in: dict[Value, set[int]] = {}
    for k, p in enumerate(kernel_phases):
        for g in p.groups:
            for a in g.accesses:
                read_in.setdefault(a.value, set()).add(k)
    for k, p in enumerate(kernel_phases):
        tiles: list[tuple[int, Value]] = []
        pieces = _pieces(p.groups)
        for g in p.groups:
            for r in g.roots:
                v = r.value
                if v in leaving or read_in.get(v, {k}) - {k} or v in pieces:
                    placements[v] = "buffer"
                    if v not in leaving:
                        reasons.append("global")
                    continue
                inside = [a for i in r.store for a in i.axes() if a not in p.parallel]
                if not inside:
                    placements[v] = "register"
                    continue
                placements[v] = "tile"
                tiles.append((estimate(dims.product(a.extent for a in inside)) * v.dtype.itemsize, v))
        tiles.sort(key=lambda t: t[0])
        while tiles and sum(size for size, _ in tiles) > budget:
            placements[tiles.pop()[1]] = "buffer"
            reasons.append("over-budget")
    return placements, tuple(dict.fromkeys(reasons))


def _pieces(groups: Sequence[Group]) -> set[Value]:
    """Values that are put together from several roots."""
    count: dict[Value, int] = {}
    for g in groups:
        for r in g.roots:
            count[r.value] = count.get(r.value, 0) + (2 if r.is_piece else 1)
    return {v for v, n in count.items() if n > 1}
