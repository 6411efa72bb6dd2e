"""A chain: a contraction, memory-bound work on rows of its result, and a contraction that reads what comes of it.

    scores = q . k^T;   weights = softmax(scores * scale + mask);   out = weights . v

No value between the two contractions needs more than whole rows of the result of the first (AStitch's regional scheme),
so a task computes some rows of it, all columns, works on them while they are in a cache, and multiplies them by the
second operand: nothing as large as queries x keys is ever in memory (as in Dao et al. 2022, "FlashAttention", but with
whole rows, which fit a CPU's cache). Nothing here knows attention: any memory-bound work will do that data flow shows
to go row by row, with whatever else it reads.

The parts are found (`parts`) while clusters grow; `kernel` makes one kernel of three, over the axes of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from stitch import access, dims
from stitch.access import Axis, Index
from stitch.graph import Node, Value
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching import contractions, dominants, schemes
from stitch.stitching.schedule import Chain, Contraction, Kernel, Phase, Placement
from stitch.stitching.trace import Access, Flow

MOST = 200
"""Nodes that are looked at behind a contraction: what is between two of them is rarely more than a dozen."""


@dataclass(frozen=True)
class Parts:
    """The nodes of a chain."""

    first: tuple[Node, ...]  # a contraction and its epilogue
    rows: tuple[Node, ...]
    last: tuple[Node, ...]  # likewise

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*self.first, *self.rows, *self.last)


class Unchained(Exception):
    """These parts are not one kernel."""


class Unturned(Exception):
    """The second operands of these contractions have to be in memory with their columns contiguous."""

    def __init__(self, *nodes: Node) -> None:
        super().__init__(", ".join(n.output.name for n in nodes))
        self.nodes = nodes


def parts(
    flow: Flow, node: Node, cluster: Callable[[Node], Sequence[Node]], users: Mapping[Value, Sequence[Node]]
) -> Parts | None:
    """The chain that ends with a contraction, if memory-bound nodes lead from one other contraction to it, and all that
    is made on the way is needed only there. `cluster`: the nodes that one is in so far; `users`: the computed nodes
    that read a value."""
    last = tuple(cluster(node))
    if _contractions(last) > 1:
        return None
    for operand in node.inputs:
        found = _between(flow, operand, cluster)
        if found is None:
            continue
        first, rows = found
        home = {*first, *rows, *last}
        made = {n.output: n for n in (*first, *rows)}
        inner = all(u in home for v in made for u in users.get(v, ()))
        whole = not any(v in flow.graph.outputs for v in made)
        if inner and whole and node not in first:
            return Parts(first, rows, last)
    return None


def _contractions(nodes: Sequence[Node]) -> int:
    return sum(n.prim == "contract" for n in nodes)


def _between(
    flow: Flow, operand: Value, cluster: Callable[[Node], Sequence[Node]]
) -> tuple[tuple[Node, ...], tuple[Node, ...]] | None:
    """The one contraction's cluster behind an operand, and the nodes that lead from there to it."""
    leads: dict[Node, bool] = {}
    heads: dict[Node, tuple[Node, ...]] = {}

    def visit(n: Node) -> bool:
        if n in leads:
            return leads[n]
        leads[n] = False
        if not flow.is_computed(n) or len(leads) > MOST:
            return False
        mine = cluster(n)
        head = next((m for m in mine if m.prim == "contract"), None)
        if _contractions(mine) > 1:  # a chain already: what it makes is in memory
            return False
        if head is not None:
            heads[head] = tuple(mine)
            leads[n] = True
            return True
        if len(mine) > 1 or PRIMITIVES[n.prim].kind not in ("elementwise", "reduction"):
            return False
        makers = [flow.producer.get(e.value) for e in flow.reads(n)]
        found = [visit(p) for p in makers if p is not None]
        leads[n] = any(found)
        return leads[n]

    starts = [p for e in flow.edges(operand) if (p := flow.producer.get(e.value)) is not None]
    if len(starts) != 1 or not visit(starts[0]) or len(heads) != 1 or len(leads) > MOST:
        return None
    (first,) = heads.values()
    rows = tuple(n for n in leads if leads[n] and n not in first)
    # Without a reduction no row has to be whole: what is elementwise is done best where tiles are made or read.
    return (first, rows) if any(PRIMITIVES[n.prim].kind == "reduction" for n in rows) else None


def kernel(
    flow: Flow,
    name: str,
    found: Parts,
    leaving: Collection[Value],
    outside: Callable[[Collection[Node]], Callable[[Value], bool]],
    order: Mapping[Node, int],
    budget: int,
) -> Kernel:
    """The parts as one kernel. `outside(nodes)` tells what is in memory before these run, `order` where nodes stand in
    the graph. Raises Unchained, Unturned, or Blocked."""
    read = {e.value for n in found.rows for e in flow.reads(n)}
    first = contractions.kernel(flow, name, found.first, {n.output for n in found.first} & read, outside(found.first))
    last = contractions.kernel(flow, name, found.last, leaving, outside(found.last))
    wanted = {e.value for n in found.last for e in flow.reads(n)}
    passed = {n.output for n in found.rows} & wanted
    rows, placements = _rows(flow, sorted(found.rows, key=order.__getitem__), passed, outside(found.rows), budget)
    head, tail = first.phases[0], last.phases[0]
    heavy, final = head.contraction, tail.contraction
    assert heavy is not None
    assert final is not None
    if len(passed) != 1 or final.a.value not in passed or final.a.linear or final.b.value in passed:
        raise Unchained
    shared = (*heavy.batch, *heavy.rows)
    stores = {r.value: r.store for g in head.groups for r in g.roots}
    rows = _over(shared, stores, rows, [a for g in rows.groups for a in g.accesses])
    stores = {r.value: r.store for g in rows.groups for r in g.roots}
    finer = _finer(shared, stores, final.a)
    if finer:
        head, rows = head.substitute(finer), rows.substitute(finer)
        stores = {r.value: r.store for g in rows.groups for r in g.roots}
        shared = rows.parallel
    assert head.contraction is not None
    heavy = head.contraction
    row = max(reversed(heavy.rows), key=lambda a: schemes.estimate(a.extent), default=None)
    tail = _over(shared, stores, tail, [final.a], keep=final.summed)
    assert tail.contraction is not None
    if any(a in shared for a in (*tail.contraction.columns, *tail.contraction.summed)):
        raise Unchained
    astray = [c.node for c in (heavy, tail.contraction) if not _is_readable(flow, c)]
    if astray:
        raise Unturned(*astray)
    batch = tuple(a for a in shared if a is not row)
    own = (row,) if row is not None else ()
    chain = Chain(batch, row)
    head = Phase(batch, head.groups, replace(heavy, batch=batch, rows=own))
    tail = Phase(batch, tail.groups, replace(tail.contraction, batch=batch, rows=own))
    where: dict[Value, Placement] = {**first.placements, **placements, **last.placements}
    where |= dict.fromkeys((*(v for v, p in first.placements.items() if p == "buffer"), *passed), "block")
    return Kernel(name, (head, rows, tail), where, tuple(sorted(found.nodes, key=order.__getitem__)), chain=chain)


def _is_readable(flow: Flow, c: Contraction) -> bool:
    """Whether panels of the second operand can be read where it is: packed once, or contiguous along columns."""
    node = flow.producer.get(c.b.value)
    return (node is not None and node.prim == "const") or any(c.b.offset.coefficient(x) == 1 for x in c.columns)


def _rows(
    flow: Flow, nodes: Sequence[Node], passed: set[Value], outside: Callable[[Value], bool], budget: int
) -> tuple[Phase, dict[Value, Placement]]:
    """The work between, as one phase, and the places of its values."""
    made = dominants.groups(flow, nodes, passed, outside)
    cut = schemes.phases(dominants.sort(dominants.merge(made)), budget)
    if len(cut) != 1:
        raise Unchained
    placements, _ = schemes.place(cut, passed, budget)
    if any(p == "buffer" and v not in passed for v, p in placements.items()):
        raise Unchained
    return cut[0], placements


def _over(
    shared: Sequence[Axis],
    stores: Mapping[Value, tuple[Index, ...]],
    phase: Phase,
    reads: Sequence[Access],
    keep: Sequence[Axis] = (),
) -> Phase:
    """A phase over the shared axes: those along which it reads what was made at one point of them. Every point of the
    phase must need only what was made at the same point. `keep`: axes that are its own."""
    mapping: dict[Axis, Index] = {}
    inner = [a for a in reads if a.value in stores]
    if not inner or any(a.linear for a in inner):
        raise Unchained
    for a in inner:
        for mine, theirs in zip(stores[a.value], a.at, strict=True):
            if any(x in shared for x in mine.axes()):
                _match(mapping, theirs, mine)
    covered = {x for i in mapping.values() for x in i.axes()}
    own = _own(phase)
    if covered != set(shared) or any(a in mapping for a in keep) or any(a not in mapping for a in own):
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
