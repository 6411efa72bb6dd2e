"""Dominants and groups: which values of a cluster are made available, and what is computed with each.

A *dominant* is a value that others cannot simply recompute: a reduction, a value that leaves the cluster, a copy, an
expensive value shown at many places, and a value with rounding that several dominants need (computed twice, two copies
might differ in the last bit). Everything else is evaluated inside the groups that need it. Dominants joined by
one-to-one relations only are then merged into one group with one loop nest: AStitch's largest single gain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from stitch import access, dtypes
from stitch.access import Axis, Index, Loaded
from stitch.dims import Dim, quotient
from stitch.graph import Node, Value
from stitch.ops.primitives import PRIMITIVES, REDUCTIONS
from stitch.stitching.schedule import Group, Root, identity
from stitch.stitching.trace import EXACT, Access, Flow, Trace, domain, trace

EXPENSIVE = 6.0
"""Instructions from which a value shown at many places is kept rather than recomputed."""


CHEAP, CHEAP_FAR = 2.0, 20.0
"""Instructions up to which a value that several dominants need is rather computed by each of them than kept, or, where
it would not stay in a cache, than written to memory and read again."""


UNPACKING = 2.0
"""Instructions that it takes to read a type of fewer bits than are computed with."""


DEEPEST = 64
"""Nodes on a path through one expression: beyond, a value is kept, so that no chain is too long for the compiler."""


def dominants(
    flow: Flow,
    members: Sequence[Node],
    leaving: Collection[Value],
    local: bool = True,
    again: Collection[Value] = (),
) -> tuple[Node, ...]:
    """The dominants of a cluster, in graph order. `leaving`: values that must be made available in any case. `again`:
    values that are rather computed again. Without `local` nothing is evaluated inside another group: every node is a
    dominant."""
    if not local:
        return tuple(members)
    inside = {n.output: n for n in members}
    needed_by: dict[Node, set[Node]] = {n: set() for n in members}
    shown_many: set[Node] = set()
    depth = dict.fromkeys(members, 0)  # of the expression above a node, up to the next dominant
    readers: dict[Node, set[Node]] = {n: set() for n in members}
    repeated: set[Node] = set()
    chosen: list[Node] = []
    for n in reversed(members):
        row = PRIMITIVES[n.prim]
        leaves = n.output in leaving
        fixed = row.kind != "elementwise"
        shared = len(needed_by[n]) > 1 and n.prim not in EXACT
        if shared and (n.output in again or repeatable(flow, n, inside, CHEAP)):
            # Copies of a product may differ, where one is fused with an addition: not if what reads it is repeated too.
            shared = n.prim == "mul" and not readers[n] <= repeated
            if not shared:
                repeated.add(n)
        costly = n in shown_many and _cost(flow, n, inside) >= EXPENSIVE
        if leaves or fixed or shared or costly or depth[n] >= DEEPEST:
            chosen.append(n)
            mine = {n}
            depth[n] = 0
        else:
            mine = needed_by[n]
        for e in flow.reads(n):
            p = inside.get(e.value)
            if p is not None and p is not n:
                needed_by[p] |= mine
                readers[p].add(n)
                depth[p] = max(depth[p], depth[n] + 1)
                if e.many or (n in shown_many and n not in chosen):
                    shown_many.add(p)
    return tuple(reversed(chosen))


def repeatable(flow: Flow, n: Node, inside: Mapping[Value, Node], most: float) -> bool:
    """Whether a value may be computed more than once: in `most` instructions, and from little more than its size."""
    large = [e.value for e in flow.reads(n) if not e.many and e.value.size == n.output.size]
    narrow = sum(UNPACKING for v in large if v.dtype.itemsize < dtypes.compute(v.dtype).itemsize)
    elementwise = PRIMITIVES[n.prim].kind == "elementwise"
    return elementwise and len(large) <= 1 and narrow + _cost(flow, n, inside, n.output.size) <= most


def _cost(flow: Flow, node: Node, inside: Mapping[Value, Node], size: Dim | None = None) -> float:
    """Instructions of evaluating a node from the reductions, copies and given values behind it. `size`: counting only
    values of so many elements: what is the same for a whole row is computed once for it."""
    total, stack, seen = 0.0, [node], {node}
    while stack:
        n = stack.pop()
        total += PRIMITIVES[n.prim].cost
        for e in flow.reads(n):
            p = inside.get(e.value)
            row = p is not None and size is not None and (e.many or p.output.size != size)
            if p is not None and not row and p not in seen and PRIMITIVES[p.prim].kind == "elementwise":
                seen.add(p)
                stack.append(p)
    return total


def roots_of(node: Node) -> tuple[tuple[tuple[Axis, ...], Root], ...]:
    """Domains and roots of one dominant; a concat has one per operand, all others have one."""
    out = node.output
    if node.prim in REDUCTIONS:
        x = node.inputs[0]
        axes = domain(x)
        at = tuple(access.of(a) for a in axes)
        kept = tuple(i for k, i in enumerate(at) if k not in node.attrs["axes"])
        return ((axes, Root(out, x, at, kept, REDUCTIONS[node.prim])),)  # type: ignore[arg-type]
    if node.prim == "concat":
        pieces, start = [], access.ZERO
        for x in node.inputs:
            axes = domain(x)
            at = tuple(access.of(a) for a in axes)
            axis = node.attrs["axis"]
            store = tuple(access.add(i, start) if k == axis else i for k, i in enumerate(at))
            pieces.append((axes, Root(out, x, at, store)))
            start = start.plus(x.shape[axis])
        return tuple(pieces)
    axes = domain(out)
    at = tuple(access.of(a) for a in axes)
    return ((axes, Root(out, out, at, at)),)


def form(
    axes: tuple[Axis, ...], root: Root, walk: Callable[[Root], tuple[tuple[Access, ...], tuple[Node, ...]]]
) -> Group:
    """The group of one root, its axes split until every index is affine. Raises Blocked."""
    while True:
        try:
            accesses, nodes = walk(root)
        except access.NeedsSplit as need:
            mapping, fresh = split(need.axis, need.inner)
            axes = tuple(b for a in axes for b in (fresh if a is need.axis else (a,)))
            root = root.substitute(mapping)
        else:
            axes = tuple(a for a in axes if a.extent != 1)
            return Group(axes, (root,), accesses, nodes)


def split(axis: Axis, inner: Dim) -> tuple[dict[Axis, Index], tuple[Axis, Axis]]:
    """axis -> outer · inner + the rest, and the two new axes."""
    count = quotient(axis.extent, inner)
    assert count is not None
    outer, rest = Axis(f"{axis.name}o", count), Axis(f"{axis.name}i", inner)
    return {axis: access.add(access.of(outer).times(inner), access.of(rest))}, (outer, rest)


def groups(
    flow: Flow,
    members: Sequence[Node],
    leaving: Collection[Value],
    outside: Callable[[Value], bool],
    local: bool = True,
    again: Collection[Value] = (),
    whole: Callable[[Value], bool] | None = None,
) -> list[Group]:
    """The groups of a cluster before merging, in graph order. `outside`: in memory before the cluster runs; `whole`: as
    complete buffers, which any reshape may view linearly (all of them, if not given); `again`: see `dominants`."""
    whole = outside if whole is None else whole
    chosen = dominants(flow, members, leaving, local, again)
    made = {n.output for n in chosen}

    def placed(v: Value) -> bool:
        return v in made or outside(v)

    def walk(root: Root) -> tuple[tuple[Access, ...], tuple[Node, ...]]:
        own = root.source is root.value
        seen = trace(flow, [(root.source, root.at)], placed, whole) if own else _of_source(flow, root, placed, whole)
        return seen.accesses, seen.nodes

    return [form(axes, root, walk) for n in chosen for axes, root in roots_of(n)]


def _of_source(flow: Flow, root: Root, placed: Callable[[Value], bool], whole: Callable[[Value], bool]) -> Trace:
    """As trace, for a source that may itself be in memory (a reduction's operand, a concat's piece)."""
    if root.source in flow.scalars:
        return Trace((), ())
    if placed(root.source):
        return Trace((Access(root.source, root.at),), ())
    return trace(flow, [(root.source, root.at)], placed, whole)


# ------------------------------------------------------------------ merging


def merge(all_groups: Sequence[Group], allowed: bool = True) -> list[Group]:
    """Merges groups joined by one-to-one relations, and independent ones that read the same values alike.

    Two groups that cannot be merged never can be: what others become only adds paths between them. So each pair is
    tried once, and after a merge the search goes on where the order has changed."""
    current = list(all_groups)
    if not allowed:
        return current
    folded = frozenset(r.value for g in current for r in g.roots if r.fold)
    apart: set[tuple[Group, Group]] = set()
    users = _users(current)
    k = 0
    while k < len(current):
        for j in range(k):
            pair = current[j], current[k]
            if pair in apart:
                continue
            merged = _join(current, j, k, folded, users)
            if merged is None:
                apart.add(pair)
                continue
            before = current[:j]
            current = sort([*before, merged, *current[j + 1 : k], *current[k + 1 :]])
            users = _users(current)
            k = next((i for i, g in enumerate(before) if current[i] is not g), j)
            break
        else:
            k += 1
    return current


def sort(all_groups: Sequence[Group]) -> list[Group]:
    """An order in which every group comes after the groups that make what it reads; stable otherwise."""
    makers = _makers(all_groups)
    out: list[Group] = []
    state: dict[int, int] = {}

    def place(i: int) -> None:
        if state.get(i) == 2:
            return
        assert state.get(i) != 1, "groups depend on each other"
        state[i] = 1
        for a in all_groups[i].accesses:
            for m in makers.get(a.value, ()):
                if m != i:
                    place(m)
        state[i] = 2
        out.append(all_groups[i])

    for i in range(len(all_groups)):
        place(i)
    return out


def _makers(all_groups: Sequence[Group]) -> dict[Value, list[int]]:
    makers: dict[Value, list[int]] = {}
    for i, g in enumerate(all_groups):
        for r in g.roots:
            makers.setdefault(r.value, []).append(i)
    return makers


def _users(all_groups: Sequence[Group]) -> dict[Value, list[int]]:
    """The groups that read a value."""
    users: dict[Value, list[int]] = {}
    for i, g in enumerate(all_groups):
        for value in dict.fromkeys(a.value for a in g.accesses):
            users.setdefault(value, []).append(i)
    return users


def _reaches(all_groups: Sequence[Group], users: Mapping[Value, Sequence[int]], start: int, goal: int) -> bool:
    """A path from `start` to `goal` through at least one other group."""
    stack = [u for r in all_groups[start].roots for u in users.get(r.value, ()) if u not in (start, goal)]
    seen = set(stack)
    while stack:
        i = stack.pop()
        for r in all_groups[i].roots:
            for u in users.get(r.value, ()):
                if u == goal:
                    return True
                if u not in seen and u != start:
                    seen.add(u)
                    stack.append(u)
    return False


def _join(
    current: Sequence[Group], j: int, k: int, folded: Collection[Value], users: Mapping[Value, Sequence[int]]
) -> Group | None:
    """Group j and k as one loop nest, or None. j comes first in order. `folded`: all values that groups fold."""
    first, second = current[j], current[k]
    if len(first.axes) != len(second.axes) or _partial(first) or _partial(second):
        return None
    made = {r.value: r for r in first.roots}
    inner = [a for a in second.accesses if a.value in made]
    if inner and second.reduced and _picks(first):
        return None  # what it picks from is rather made at the same points, which a fold over them would forbid
    if bool(first.reduced) != bool(second.reduced) and _follows(second if first.reduced else first, folded):
        return None  # likewise
    relation: dict[Axis, Axis] | None = None
    for a in inner:
        r = made[a.value]
        if r.fold is not None or a.linear:
            return None
        relation = _agree(relation, relate(r.store, a.at, a.value, first.axes, second.axes))
        if relation is None:
            return None
    if not inner:
        relation = _alike(first, second)
        if relation is None:
            return None
    assert relation is not None
    folds = [g.reduced for g in (first, second)]
    mapped = frozenset(_inverse(relation)[a] for a in folds[1])
    if folds[0] and mapped and folds[0] != mapped:
        return None
    if _reaches(current, users, j, k) or _reaches(current, users, k, j):
        return None
    moved = second.substitute({b: access.of(a) for a, b in relation.items()})
    kept = tuple(a for a in moved.accesses if a.value not in made)
    accesses = tuple({(a.value, a.at, a.linear): a for a in (*first.accesses, *kept)}.values())
    nodes = tuple(dict.fromkeys((*first.nodes, *moved.nodes)))
    return replace(first, roots=first.roots + moved.roots, accesses=accesses, nodes=nodes)


def _picks(group: Group) -> bool:
    """True for a group that reads elements by loaded indices."""
    return any(isinstance(v, Loaded) for a in group.accesses for i in a.at for v, _ in i.terms)


def _follows(group: Group, folded: Collection[Value]) -> bool:
    """True for a group that works on totals, one at each of its points."""
    axes = frozenset(group.axes)
    return any(a.value in folded and axes == {x for i in a.at for x in i.axes()} for a in group.accesses)


def _partial(group: Group) -> bool:
    """True for a piece of a concat: others would not find the whole value in the group."""
    return any(r.is_piece for r in group.roots)


def relate(
    store: Sequence[Index], at: Sequence[Index], value: Value, first: Iterable[Axis], second: Iterable[Axis]
) -> dict[Axis, Axis] | None:
    """The one-to-one relation of a producer's axes with a reader's, through a value stored at `store` and read at
    `at`; None if there is none that covers all axes of both."""
    here = identity(store, value, tuple(first))
    there = identity(at, value, tuple(second))
    if here is not None and there is not None:
        by_dim = {k: b for b, k in there.items()}
        if set(here.values()) != set(there.values()):
            return None
        return {a: by_dim[k] for a, k in here.items()}
    if tuple(store) == () or len(store) != len(at):
        return None
    return _split_alike(store, at, tuple(first), tuple(second))


def _split_alike(
    store: Sequence[Index], at: Sequence[Index], first: Sequence[Axis], second: Sequence[Axis]
) -> dict[Axis, Axis] | None:
    """Both sides have split a dim in the same way: compare their terms, coefficient by coefficient."""
    out: dict[Axis, Axis] = {}
    for mine, theirs in zip(store, at, strict=True):
        if mine.offset != 0 or theirs.offset != 0 or len(mine.terms) != len(theirs.terms):
            return None
        by_coefficient = {c: v for v, c in theirs.terms}
        for v, c in mine.terms:
            w = by_coefficient.get(c)
            if not isinstance(v, Axis) or not isinstance(w, Axis) or v.extent != w.extent or v in out:
                return None
            out[v] = w
    complete = set(out) == set(first) and set(out.values()) == set(second)
    return out if complete else None


def _agree(a: dict[Axis, Axis] | None, b: dict[Axis, Axis] | None) -> dict[Axis, Axis] | None:
    return b if a is None or a == b else None


def _inverse(relation: Mapping[Axis, Axis]) -> dict[Axis, Axis]:
    return {b: a for a, b in relation.items()}


def _alike(first: Group, second: Group) -> dict[Axis, Axis] | None:
    """The relation under which two independent groups read a common value at the same elements."""
    theirs = {a.value: a for a in second.accesses if not a.linear}
    for a in first.accesses:
        b = theirs.get(a.value)
        if b is not None and not a.linear:
            relation = relate(a.at, b.at, a.value, first.axes, second.axes)
            if relation is not None:
                return relation
    return None
