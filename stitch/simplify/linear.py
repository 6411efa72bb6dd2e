"""A product with constant weights is moved towards the inputs, through what is linear as well, where that is less work.

    before: contract(concat(resize(a), resize(b), c, axis k), w)
    after:  resize(contract(a, w[:ka])) + resize(contract(b, w[ka:kb])) + contract(c, w[kb:])

    before: contract(contract(x, w) + bias, v)
    after:  contract(x, w . v) + bias . v

What enlarges (interpolation, a broadcast, repeated neighbours) is then done to the results, and the product to the
smaller operand; two products without anything but sums between them become one where it needs fewer multiplications.
A value is passed through whose elements are weighted sums, over places along the axes that are not summed, of elements
of its operands, with weights that do not depend on the axes that are. Nothing is matched: `Plans` walks from a
contraction up through whatever is linear, and prices each way.

Sums are rounded elsewhere than before, as with any other order of additions; products of weights are computed in
float64 and rounded once, so that the bound of the error only gets smaller. Only float32 and float64 are moved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np

from stitch import dims, dtypes
from stitch.graph import Graph, Node, Value
from stitch.ops.primitives import PRIMITIVES, Array
from stitch.rewrite import Rewriter, merged, rewrite
from stitch.simplify.movement import MOVEMENT
from stitch.simplify.permutations import blocks_of, weight

MEMORY = 3.0
"""What it costs to write or read an element of a value between two kernels, in multiply-adds."""

GAIN = 0.8
"""The share of the work that may be left for a change to be worth it."""

LEAST = 1 << 17
"""Multiply-adds below which a change is not worth it."""

TABLE = 1 << 16
"""Elements up to which a constant may become larger by having been multiplied."""

MOST = 256
"""Nodes that are looked at above one contraction."""

LARGEST = 2.0**100
"""Weights below which their products cannot overflow."""

Axes: TypeAlias = tuple[int, ...]


class Weights:
    """The second operand: [*summed extents, *new extents], made when asked for."""

    def __init__(self, summed: Sequence[int], new: Sequence[int], make: Callable[[], Array]) -> None:
        self.summed, self.new, self._make = tuple(summed), tuple(new), make

    @cached_property
    def array(self) -> Array:
        return self._make()

    @cached_property
    def largest(self) -> float:
        return float(np.max(np.abs(self.array), initial=0.0))

    @property
    def pairs(self) -> int:
        return int(np.prod(self.summed, dtype=np.int64) * np.prod(self.new, dtype=np.int64))

    def part(self, axis: int, start: int, size: int) -> Weights:
        """Those of a part of the places along the axis."""
        summed = [size if k == axis else n for k, n in enumerate(self.summed)]
        return Weights(summed, self.new, lambda: self.array.take(range(start, start + size), axis))


@dataclass(frozen=True, eq=False)
class Plan:
    """A way to the value of `v` times weights, with the axes of v that are left, then the new ones. `work`: what it
    costs, by what is done, so that what two ways share counts once; `leaves`: values that it takes as they are."""

    work: Mapping[Any, float]
    leaves: frozenset[Value]
    make: Callable[[_Maker], Value]

    @property
    def cost(self) -> float:
        return sum(self.work.values())


@dataclass
class _Maker:
    """Emits plans, each once."""

    r: Rewriter
    made: dict[Plan, Value] = field(default_factory=dict)

    def __call__(self, plan: Plan) -> Value:
        if plan not in self.made:
            self.made[plan] = plan.make(self)
        return self.made[plan]


def distribute(graph: Graph) -> Graph:
    """The graph with products moved up (see above)."""
    plans = Plans(graph)
    chosen = {n: make for n in graph.nodes if n.prim == "contract" and (make := plans.of(n)) is not None}
    return rewrite(graph, merged(MOVEMENT), chosen) if chosen else graph


def _size(v: Value) -> float:
    return weight(v) / v.dtype.itemsize


class Plans:
    def __init__(self, graph: Graph) -> None:
        self._makers = graph.producers()
        self._users = graph.users()
        self._outputs = set(graph.outputs)
        self._memo: dict[Any, Plan] = {}
        self._region: set[Node] = set()

    def of(self, node: Node) -> Callable[[Rewriter], Value] | None:
        """What makes the contraction's value with enough less work, if anything does."""
        found = self._roles(node)
        if found is None:
            return None
        x, axes, w, perm = found
        self._memo, self._region = {}, self._above(node)
        plan = self._plan(x, axes, w)
        before = self._leaf(x, axes, w).cost + self._spared(x, plan, {node})
        if plan.leaves == {x} or plan.cost > min(GAIN * before, before - LEAST):
            return None
        return lambda r: r.transpose(_Maker(r)(plan), perm)

    def _array(self, v: Value) -> Array | None:
        node = self._makers.get(v)
        return node.attrs["array"] if node is not None and node.prim == "const" else None

    def _roles(self, node: Node) -> tuple[Value, Axes, Weights, Axes] | None:
        """The operand that is not constant, its summed axes, the weights, and how the result's axes are ordered."""
        if node.output.dtype not in (dtypes.FLOAT32, dtypes.FLOAT64) or any(
            v.dtype != node.output.dtype for v in node.inputs
        ):
            return None
        out = node.attrs["out"]
        for x, c, mine, theirs in (
            (*node.inputs, node.attrs["a"], node.attrs["b"]),
            (*node.inputs[::-1], node.attrs["b"], node.attrs["a"]),
        ):
            array = self._array(c)
            if array is None or len(set(mine)) < len(mine) or len(set(theirs)) < len(theirs):
                continue
            summed = [label for label in mine if label not in out]
            new = [label for label in out if label not in mine]
            if set(theirs) != {*summed, *new} or not summed:
                continue
            order = [theirs.index(label) for label in (*summed, *new)]
            extents = [array.shape[k] for k in order]
            w = Weights(extents[: len(summed)], extents[len(summed) :], partial(np.transpose, array, order))
            left = [*(label for label in mine if label in out), *new]
            return x, tuple(map(mine.index, summed)), w, tuple(left.index(label) for label in out)
        return None

    def _above(self, root: Node) -> set[Node]:
        """The contraction and what is linear above it, without what something else reads as well."""
        found, stack = {root: None}, list(root.inputs)
        while stack and len(found) < MOST:
            node = self._makers.get(stack.pop(0))
            if node is not None and node not in found and node.prim in _WAYS:
                found[node] = None
                stack += node.inputs
        region = set(found)
        while True:
            shared = {n for n in region - {root} if n.output in self._outputs}
            shared |= {n for n in region - {root} if any(u not in region for u in self._users[n.output])}
            if not shared:
                return region
            region -= shared

    # -------------------------------------------------- prices

    def _leaf(self, x: Value, axes: Axes, w: Weights) -> Plan:
        """The product itself; of a constant, made now, unless it is large and would get larger."""
        rows = _size(x) / max(np.prod(w.summed, dtype=float), 1.0)
        array = self._array(x)
        if array is not None and rows * np.prod(w.new, dtype=float) > max(array.size, TABLE):
            array = None
        work = rows * w.pairs + 2 * MEMORY * rows * np.prod(w.new, dtype=float)

        def make(m: _Maker) -> Value:
            if array is not None:
                wide = np.tensordot(array.astype(np.float64), w.array.astype(np.float64), (axes, range(len(axes))))
                return m.r.const(wide.astype(x.dtype))
            left = [k for k in range(x.rank) if k not in axes]
            fresh = tuple(range(x.rank, x.rank + len(w.new)))
            b = m.r.const(np.ascontiguousarray(w.array))
            return m.r.emit("contract", m.r.new(x), b, a=tuple(range(x.rank)), b=(*axes, *fresh), out=(*left, *fresh))

        return Plan({} if array is not None else {(x, axes, w): work}, frozenset({x}), make)

    def _spared(self, x: Value, plan: Plan, readers: Collection[Node]) -> float:
        """The work of what nothing needs any more if these readers do not, and `x` times weights is as planned."""
        gone, stack, total = set[Node](), [x], 0.0
        while stack:
            v = stack.pop()
            node = self._makers.get(v)
            if node is None or node in gone or v in plan.leaves or v in self._outputs:
                continue
            if all(u in gone or u in readers for u in self._users[v]):
                gone.add(node)
                total += self._own(node)
                stack += node.inputs
        return total

    def _own(self, node: Node) -> float:
        """The work of one node."""
        size = _size(node.output)
        match node.prim:
            case "contract":
                labels = {label: v for v, ls in zip(node.inputs, "ab", strict=True) for label in node.attrs[ls]}
                summed = [label for label in labels if label not in node.attrs["out"]]
                each = [labels[label].shape[self._place(node, labels[label], label)] for label in summed]
                return size * (_number(each) + 2 * MEMORY)
            case "concat":
                return size * 2 * MEMORY
            case "gather":
                return size
            case _:
                return size * PRIMITIVES[node.prim].cost if PRIMITIVES[node.prim].kind == "elementwise" else 0.0

    @staticmethod
    def _place(node: Node, v: Value, label: int) -> int:
        side = "a" if v is node.inputs[0] and label in node.attrs["a"] else "b"
        place: int = node.attrs[side].index(label)
        return place

    # -------------------------------------------------- ways

    def _plan(self, x: Value, axes: Axes, w: Weights) -> Plan:
        """The cheaper of the product itself and of the way through what makes `x`, if all that is linear goes it."""
        key = (x, axes, w)
        if key not in self._memo:
            plain = self._leaf(x, axes, w)
            node, deeper = self._makers.get(x), None
            if node is not None and node.prim in _WAYS and len(self._memo) <= MOST:
                deeper = _WAYS[node.prim](self, node, axes, w)
            if deeper is not None and deeper.cost < plain.cost + self._spared(x, deeper, self._region):
                plain = deeper
            self._memo[key] = plain
        return self._memo[key]

    def _sum(self, plans: Sequence[Plan], prim: str, node: Node, size: float, stored: bool) -> Plan:
        """Results added up, or subtracted."""
        cost = size * (1 + (2 * MEMORY if stored else 0)) * (len(plans) - 1)

        def make(m: _Maker) -> Value:
            first, *rest = [m(p) for p in plans]
            for v in rest:
                first = m.r.emit(prim, first, v)
            return first

        return _joined(plans, {(node, *plans): cost}, make)

    def _through_concat(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        """contract(concat(x, y), w) -> contract(x, w[:k]) + contract(y, w[k:]); what gains nothing stays together."""
        axis = node.attrs["axis"]
        if axis not in axes:
            return None
        extents = [v.shape[axis] for v in node.inputs]
        place, start = axes.index(axis), 0
        kept: list[tuple[Value, int, int]] = []
        plans: list[Plan] = []
        for v, n in zip(node.inputs, extents, strict=True):
            if not isinstance(n, int):
                return None
            part = w.part(place, start, n)
            found = self._plan(v, axes, part)
            if found.leaves == {v} and self._array(v) is None:
                kept.append((v, start, n))
            else:
                plans.append(found)
            start += n
        if not plans:
            return None
        if kept:
            plans.append(self._rest(node, kept, axes, w))
        rows = _size(node.output) / max(np.prod(w.summed, dtype=float), 1.0)
        return self._sum(plans, "add", node, rows * float(np.prod(w.new, dtype=float)), stored=True)

    def _rest(self, node: Node, kept: Sequence[tuple[Value, int, int]], axes: Axes, w: Weights) -> Plan:
        """Some of a concat's parts, put together as before."""
        axis = node.attrs["axis"]
        place = axes.index(axis)
        spans = [range(start, start + n) for _, start, n in kept]
        places = [k for span in spans for k in span]
        summed = [len(places) if k == place else n for k, n in enumerate(w.summed)]
        share = len(places) / max(w.summed[place], 1)
        rows = _size(node.output) / max(np.prod(w.summed, dtype=float), 1.0)
        copied = 2 * MEMORY * share * _size(node.output) if len(kept) > 1 else 0.0
        work = share * rows * w.pairs + 2 * MEMORY * rows * float(np.prod(w.new, dtype=float)) + copied

        def make(m: _Maker) -> Value:
            part = Weights(summed, w.new, lambda: w.array.take(places, place))
            x = kept[0][0] if len(kept) == 1 else None
            whole = m.r.new(x) if x is not None else m.r.emit("concat", *(m.r.new(v) for v, _, _ in kept), axis=axis)
            rank = node.output.rank
            left, fresh = [k for k in range(rank) if k not in axes], tuple(range(rank, rank + len(w.new)))
            b = m.r.const(np.ascontiguousarray(part.array))
            return m.r.emit("contract", whole, b, a=tuple(range(rank)), b=(*axes, *fresh), out=(*left, *fresh))

        return Plan({(node, axes, w): work}, frozenset(v for v, _, _ in kept), make)

    def _through_sum(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        """contract(add(x, y), w) -> add(contract(x, w), contract(y, w)); sub likewise."""
        plans = [self._plan(v, axes, w) for v in node.inputs]
        return self._sum(plans, node.prim, node, self._left(node.output, w), stored=False)

    def _left(self, x: Value, w: Weights) -> float:
        """Elements of the product."""
        return _size(x) / max(float(np.prod(w.summed, dtype=float)), 1.0) * float(np.prod(w.new, dtype=float))

    def _through_scaling(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        """contract(mul(x, s), w) -> mul(contract(x, w), s), for s that is the same along the summed axes; x / s."""
        orders = (node.inputs, node.inputs[::-1])[: 1 if node.prim == "div" else 2]
        found = next(((x, s) for x, scale in orders if (s := self._constant_along(scale, axes)) is not None), None)
        if found is None:
            return None
        x, (source, shape) = found
        plan = self._plan(x, axes, w)
        left = [d for k, d in enumerate(node.output.shape) if k not in axes]

        def make(m: _Maker) -> Value:
            factor = m.r.reshape(m.r.new(source), (*shape, *(1 for _ in w.new)))
            return m.r.emit(node.prim, m(plan), m.r.broadcast(factor, (*left, *w.new)))

        cost = self._left(node.output, w) * PRIMITIVES[node.prim].cost
        return _joined([plan], {(node, plan): cost}, make, {source})

    def _constant_along(self, v: Value, axes: Axes) -> tuple[Value, list[dims.Dim]] | None:
        """A value that `v` repeats along these axes, and its shape without them."""
        node = self._makers.get(v)
        if node is None or node.prim != "broadcast":
            return None
        source = node.inputs[0]
        full = [*[1] * (v.rank - source.rank), *source.shape]
        if any(full[k] != 1 for k in axes):
            return None
        return source, [d for k, d in enumerate(full) if k not in axes]

    def _through_neg(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        plan = self._plan(node.inputs[0], axes, w)
        return _joined([plan], {(node, plan): self._left(node.output, w)}, lambda m: m.r.emit("neg", m(plan)))

    def _through_gather(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        """contract(gather(x, i, axis n), w over k) -> gather(contract(x, w), i, axis n)."""
        x, picked, leading = node.inputs[0], node.attrs["axes"], node.inputs[1].rank
        rest = [k for k in range(x.rank) if k not in picked]
        if any(k < leading for k in axes):
            return None
        mine = tuple(rest[k - leading] for k in axes)
        left = [k for k in range(x.rank) if k not in mine]
        plan = self._plan(x, mine, w)

        def make(m: _Maker) -> Value:
            moved = tuple(left.index(k) for k in picked)
            return m.r.emit("gather", m(plan), *(m.r.new(i) for i in node.inputs[1:]), axes=moved)

        return _joined([plan], {(node, plan): self._left(node.output, w)}, make, node.inputs[1:])

    def _through_transpose(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        x, perm = node.inputs[0], node.attrs["perm"]
        mine = tuple(perm[k] for k in axes)
        left = [k for k in range(x.rank) if k not in mine]
        order = [left.index(perm[k]) for k in range(x.rank) if k not in axes]
        plan = self._plan(x, mine, w)
        new = range(len(left), len(left) + len(w.new))
        return _joined([plan], {}, lambda m: m.r.transpose(m(plan), (*order, *new)))

    def _through_reshape(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        """If each summed axis is one axis before the reshape, too."""
        x, shape = node.inputs[0], node.output.shape
        blocks = blocks_of(x.shape, shape)
        if blocks is None:
            return None
        place: dict[int, int] = {}
        for before, after in blocks:
            ours = [k for k in after if k in axes]
            if ours:
                solid = [k for k in before if x.shape[k] != 1]
                if len(solid) != 1 or any(shape[k] != 1 for k in after if k not in ours):
                    return None
                place[ours[0]] = solid[0]
        if len(place) != len(axes):
            return None
        plan = self._plan(x, tuple(place[k] for k in axes), w)
        left = [d for k, d in enumerate(shape) if k not in axes]
        return _joined([plan], {}, lambda m: m.r.reshape(m(plan), (*left, *w.new)))

    def _through_broadcast(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        """If the summed axes are the operand's own."""
        x, shape = node.inputs[0], node.output.shape
        missing = len(shape) - x.rank
        mine = tuple(k - missing for k in axes)
        if any(k < 0 or x.shape[k] != shape[k + missing] for k in mine):
            return None
        plan = self._plan(x, mine, w)
        left = [d for k, d in enumerate(shape) if k not in axes]

        def make(m: _Maker) -> Value:
            return m.r.broadcast(m(plan), (*left, *w.new))

        return _joined([plan], {}, make)

    def _through_slice(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        """If all of the summed axes is taken, in order."""
        x, (starts, sizes, steps) = node.inputs[0], (node.attrs[k] for k in ("starts", "sizes", "steps"))
        if any(starts[k] != 0 or sizes[k] != x.shape[k] or steps[k] != 1 for k in axes):
            return None
        plan = self._plan(x, axes, w)
        left = [k for k in range(x.rank) if k not in axes]

        def make(m: _Maker) -> Value:
            whole = [(0, n, 1) for n in w.new]
            cut = [*((starts[k], sizes[k], steps[k]) for k in left), *whole]
            return m.r.slice(m(plan), [a for a, _, _ in cut], [n for _, n, _ in cut], [s for _, _, s in cut])

        return _joined([plan], {}, make)

    def _through_contract(self, node: Node, axes: Axes, w: Weights) -> Plan | None:
        """contract(contract(x, u), w) -> contract(x, u . w), where w sums over all that u makes."""
        found = self._roles(node)
        if found is None:
            return None
        x, mine, u, perm = found
        before = len(perm) - len(u.new)
        places = [perm[k] - before for k in axes]  # of what is summed, among what u makes
        if sorted(places) != list(range(len(u.new))) or not max(u.largest, 1.0) * max(w.largest, 1.0) < LARGEST:
            return None

        def product() -> Array:
            first, second = u.array.astype(np.float64), w.array.astype(np.float64)
            out = np.tensordot(first, second, ([len(mine) + p for p in places], range(len(axes))))
            return np.asarray(out.astype(node.output.dtype))

        plan = self._plan(x, mine, Weights(u.summed, w.new, product))
        order = [perm[k] for k in range(len(perm)) if k not in axes]
        new = range(before, before + len(w.new))
        return _joined([plan], {}, lambda m: m.r.transpose(m(plan), (*order, *new)))


def _number(extents: Iterable[dims.Dim]) -> float:
    out = 1.0
    for d in extents:
        out *= d if isinstance(d, int) else 64
    return out


def _joined(
    plans: Sequence[Plan],
    own: Mapping[Any, float],
    make: Callable[[_Maker], Value],
    also: Iterable[Value] = (),
) -> Plan:
    """A step above some plans: what it costs itself, and the values that it takes besides."""
    work = {k: c for p in plans for k, c in p.work.items()} | dict(own)
    return Plan(work, frozenset(also).union(*(p.leaves for p in plans)), make)


_WAYS: Mapping[str, Callable[[Plans, Node, Axes, Weights], Plan | None]] = {
    "add": Plans._through_sum, "sub": Plans._through_sum, "neg": Plans._through_neg,
    "mul": Plans._through_scaling, "div": Plans._through_scaling,
    "concat": Plans._through_concat, "gather": Plans._through_gather, "transpose": Plans._through_transpose,
    "reshape": Plans._through_reshape, "broadcast": Plans._through_broadcast, "slice": Plans._through_slice,
    "contract": Plans._through_contract,
}  # fmt: skip
