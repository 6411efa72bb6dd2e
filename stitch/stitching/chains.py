"""A chain: contractions and memory-bound work on rows beside them, in one kernel without a barrier.

No value between the stages of a chain (see `stitch.stitching.stages`) needs more than whole rows of the one before
(AStitch's regional scheme), so a task takes some rows through all of them while they are in a cache. In attention,
nothing as large as queries x keys is ever in memory (as in Dao et al. 2022, "FlashAttention", but with whole rows,
which fit a CPU's cache); what a depthwise convolution makes goes into the next product from there.

`kernel` makes one kernel of the stages, over the axes that all of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from stitch import access, dims
from stitch.access import Axis, Index
from stitch.graph import Node, Value
from stitch.stitching import contractions, dominants, schemes
from stitch.stitching.schedule import Chain, Contraction, Group, Kernel, Phase, Placement
from stitch.stitching.stages import Stages
from stitch.stitching.trace import Access, Flow, trace

TASKS = 12
"""Blocks of rows from which there are enough of them for several workers: with fewer, one contraction by itself is
better cut along its columns, too."""

ROWS = 8
"""Rows of a block from which a register tile is filled well enough."""


class Unchained(Exception):
    """These stages are not one kernel."""


def kernel(
    flow: Flow,
    name: str,
    stages: Stages,
    leaving: Collection[Value],
    outside: Callable[[Collection[Node]], Callable[[Value], bool]],
    order: Mapping[Node, int],
    budget: int,
) -> Kernel:
    """The stages as one kernel. `outside(nodes)` tells what is in memory before these run, `order` where nodes stand in
    the graph, `budget` how many bytes of a cache a task may fill. Raises Unchained, or Blocked."""
    whole = outside(stages.nodes)  # what another stage makes is no buffer that a reshape could view linearly
    wanted = [{e.value for n in part for e in flow.reads(n)} for part in stages.parts]
    phases: list[Phase] = []
    where: dict[Value, Placement] = {}
    for k, part in enumerate(stages.parts):
        made = {n.output for n in part}
        passed = made & {v for later in wanted[k + 1 :] for v in later}
        away = passed | made & set(leaving)
        nodes, ready = sorted(part, key=order.__getitem__), outside(part)
        if any(n.prim == "contract" for n in part):
            alone = contractions.kernel(flow, name, nodes, away, ready, whole)
            phases += alone.phases
            where |= alone.placements
        else:
            phases.append(_one_phase(dominants.groups(flow, nodes, away, ready, whole=whole), budget))
        where |= dict.fromkeys(passed - set(leaving), "block")
    phases, shared = _together(phases, wanted)
    heavy = [p.contraction for p in phases if p.contraction is not None]
    rows = [a for a in heavy[0].rows if all(a in c.rows for c in heavy)]  # along a batch axis, panels change, too
    row, all_rows = max(reversed(rows), key=lambda a: schemes.estimate(a.extent), default=None), False
    if any(_is_packed(flow, c) and _panels(c) > budget for c in heavy):
        raise Unchained  # they are read again for each block of rows, and so have to stay in a cache
    if len(heavy) == 1:
        row, all_rows = _pays(flow, heavy[0], shared, rows, budget)
    batch = tuple(a for a in shared if a is not row)
    phases = [_at(p, batch, row, all_rows) for p in phases]
    if row is not None and not all_rows and not isinstance(row.extent, int):
        _check_blocks(flow, phases, row, whole)
    for p in phases:
        if p.contraction is None:
            where = _placed(p, where, leaving, budget)
    nodes = sorted(stages.nodes, key=order.__getitem__)
    return Kernel(name, tuple(phases), where, tuple(nodes), chain=Chain(batch, None if all_rows else row))


def _check_blocks(flow: Flow, phases: Sequence[Phase], row: Axis, whole: Callable[[Value], bool]) -> None:
    """What is read through a reshape has to be found from a place in a block of rows, too: of the last block of an open
    number of rows nobody knows that it ends with them. Raises Unchained, or Blocked."""
    outer, inner = Axis("qo", dims.ceil_div(row.extent, ROWS)), Axis("q", ROWS)
    moved = {row: access.index(0, (outer, ROWS), (inner, 1))}
    heavy = {p.contraction.node.output for p in phases if p.contraction is not None}
    roots = [r.substitute(moved) for p in phases for g in p.groups for r in g.roots]
    made = heavy | {r.value for r in roots}

    def placed(v: Value) -> bool:
        return v in made or whole(v)

    for r in roots:
        if r.source in heavy or (placed(r.source) and (r.fold or r.source is not r.value)):
            continue  # read at the place itself
        try:
            seen = trace(flow, [(r.source, r.at)], placed, whole)
        except access.NeedsSplit:
            raise Unchained from None
        if any(a.linear and not whole(a.value) for a in seen.accesses):
            raise Unchained


def _placed(
    rows: Phase, where: Mapping[Value, Placement], leaving: Collection[Value], budget: int
) -> dict[Value, Placement]:
    """The places so far, and those of what is made in rows: nothing else may leave them. Raises Unchained."""
    passed = {v for v, p in where.items() if p == "block"}
    places, _ = schemes.place((rows,), passed | set(leaving), budget)
    if any(p == "buffer" and v not in leaving and v not in passed for v, p in places.items()):
        raise Unchained
    return {**places, **where}


def _together(phases: list[Phase], wanted: Sequence[Collection[Value]]) -> tuple[list[Phase], list[Axis]]:
    """The phases over axes that they share, and these. Raises Unchained."""
    shared = _shared(phases)
    for k in range(1, len(phases)):
        reads = [a for g in phases[k].groups for a in g.accesses]
        if (c := phases[k].contraction) is not None:
            _check_operands(c, phases[:k], wanted[k])
            finer = _finer(shared, _stores(phases[:k]), c.a)
            phases = [p.substitute(finer) for p in phases[:k]] + phases[k:]
            shared = [x for a in shared for x in ([a] if a not in finer else finer[a].parts)]
            reads = [c.a]
        phases[k] = _over(shared, _stores(phases[:k]), phases[k], reads)
    heavy = [p.contraction for p in phases if p.contraction is not None]
    if any(a in shared for c in heavy for a in (*c.columns, *c.summed)):
        raise Unchained
    return phases, shared


def _stores(phases: Sequence[Phase]) -> dict[Value, tuple[Index, ...]]:
    return {r.value: r.store for p in phases for g in p.groups for r in g.roots}


def _shared(phases: Sequence[Phase]) -> list[Axis]:
    """The axes that the first stage has in common with those behind it: all that a contraction does not fold or make,
    or, of rows, those along which the contraction behind them goes."""
    first = phases[0]
    if first.contraction is not None:
        return [*first.contraction.batch, *first.contraction.rows]
    heavy = phases[1].contraction
    assert heavy is not None
    own = {*heavy.batch, *heavy.rows}
    store = _stores(phases[:1]).get(heavy.a.value)
    if store is None or heavy.a.linear:
        raise Unchained
    found = {x for mine, theirs in zip(store, heavy.a.at, strict=True) if own & set(theirs.axes()) for x in mine.axes()}
    if not found <= set(first.parallel):
        raise Unchained
    return [a for a in first.parallel if a in found]


def _check_operands(c: Contraction, before: Sequence[Phase], wanted: Collection[Value]) -> None:
    """Only the first operand may come from the stages before."""
    made = set(_stores(before))
    if c.a.value not in made or c.a.linear or c.b.value in made or len(made & set(wanted)) != 1:
        raise Unchained


def _is_packed(flow: Flow, c: Contraction) -> bool:
    node = flow.producer.get(c.b.value)
    return node is not None and node.prim == "const"


def _panels(c: Contraction) -> int:
    """Bytes of a contraction's second operand at one point of the batch axes, about."""
    return schemes.estimate(dims.product(x.extent for x in (*c.columns, *c.summed))) * c.node.output.dtype.itemsize


def _pays(flow: Flow, c: Contraction, shared: Sequence[Axis], rows: Sequence[Axis], budget: int) -> tuple[Axis, bool]:
    """Which rows a task of a chain with one contraction takes, and whether all of them: rows must fill register tiles,
    and be enough for several workers. Raises Unchained."""
    if not _is_packed(flow, c):
        raise Unchained
    widest = max(schemes.estimate(dims.product(x.extent for x in axes)) for axes in (c.summed, c.columns))
    size = c.node.output.dtype.itemsize
    for row in reversed(rows):
        count = schemes.estimate(row.extent, flow.batches)
        others = schemes.estimate(dims.product(a.extent for a in shared if a is not row), flow.batches)
        fits = isinstance(row.extent, int) and count * widest * size <= budget // 2
        if count >= ROWS and fits and others >= TASKS:
            return row, True
        if count >= ROWS and others * (count // ROWS) >= TASKS:
            return row, False
    raise Unchained


def _at(phase: Phase, batch: tuple[Axis, ...], row: Axis | None, whole: bool) -> Phase:
    """A phase of a task at one point of `batch`. What is before a contraction may have parallel axes of its own, which
    are loops of a task that takes all rows."""
    own = (row,) if row is not None else ()
    if phase.contraction is not None:
        return Phase(batch, phase.groups, replace(phase.contraction, batch=batch, rows=own))
    rest = tuple(a for a in phase.parallel if a not in batch and a is not row) if whole else ()
    return Phase((*batch, *own, *rest), phase.groups)


def _one_phase(groups: Sequence[Group], budget: int) -> Phase:
    """Work before, between or behind contractions, merged, if it is one phase."""
    cut = schemes.phases(dominants.sort(dominants.merge(groups)), budget)
    if len(cut) != 1:
        raise Unchained
    return cut[0]


def _over(
    shared: Sequence[Axis],
    stores: Mapping[Value, tuple[Index, ...]],
    phase: Phase,
    reads: Sequence[Access],
) -> Phase:
    """A phase over the shared axes: those along which it reads what was made at one point of them. Every point of the
    phase must need only what was made at the same point: an axis that it sums over, or that a part of it goes over and
    another one reads at other places, is none of them. Raises Unchained."""
    mapping: dict[Axis, Index] = {}
    inner = [a for a in reads if a.value in stores]
    if not inner or any(a.linear for a in inner):
        raise Unchained
    for a in inner:
        for mine, theirs in zip(stores[a.value], a.at, strict=True):
            if any(x in shared for x in mine.axes()):
                _match(mapping, theirs, mine)
    covered = {x for i in mapping.values() for x in i.axes()}
    if covered != set(shared) or set(mapping) != set(_own(phase)):
        raise Unchained
    return phase.substitute(mapping)


def _finer(shared: Sequence[Axis], stores: Mapping[Value, tuple[Index, ...]], read: Access) -> dict[Axis, Index]:
    """Shared axes that the reader has in two parts (heads in groups, say) as those parts."""
    out: dict[Axis, Index] = {}
    for mine, theirs in zip(stores[read.value], read.at, strict=True):
        axis = mine.axis()
        if axis in shared and theirs.offset == 0 and len(theirs.terms) > 1:
            assert axis is not None
            parts = [(Axis(v.name, v.extent), c) for v, c in theirs.terms if isinstance(v, Axis)]
            size = dims.product(a.extent for a, _ in parts)
            if len(parts) == len(theirs.terms) and dims.prove_equal(size, axis.extent):
                out[axis] = access.index(0, *parts)
    return out


def _own(phase: Phase) -> tuple[Axis, ...]:
    """The axes at whose points a phase stands."""
    heavy = phase.contraction
    return phase.parallel if heavy is None else (*heavy.batch, *heavy.rows)


def _match(mapping: dict[Axis, Index], theirs: Index, ours: Index) -> None:
    """Adds which axis of theirs is what of ours, where both stand at the same dim. Raises Unchained."""
    pairs: list[tuple[Axis, Index]]
    single = theirs.axis()
    if single is not None:
        pairs = [(single, ours)]
    elif theirs.offset == ours.offset == 0 and len(theirs.terms) == len(ours.terms):
        steps = {c: v for v, c in ours.terms}
        pairs = []
        for v, c in theirs.terms:
            w = steps.get(c)
            if not isinstance(v, Axis) or not isinstance(w, Axis) or v.extent != w.extent:
                raise Unchained
            pairs.append((v, access.of(w)))
    else:
        raise Unchained
    for axis, index in pairs:
        if mapping.setdefault(axis, index) != index:
            raise Unchained
