"""Data flow through movement: what a computed value reads, and at which index.

Movement primitives (transpose, slice, pad, gather, ...) compute nothing: they belong to whoever reads them. `Flow`
answers for a whole graph which computed values a value is made of; `trace` follows an expression from one point of a
group's domain down to the values that are in memory, and lists every access with its index.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from stitch import access, dims
from stitch.access import Axis, Index, Loaded
from stitch.dims import Dim
from stitch.graph import Graph, Node, Value
from stitch.ops.primitives import PRIMITIVES

MANY = ("broadcast", "window", "gather")
"""Movement that may show one element of its operand at many places."""

EXACT = frozenset((
    "neg", "abs", "floor", "ceil", "rint", "sign", "not", "min", "max", "and", "or", "xor", "eq", "ne", "lt", "le",
    "where", "cast", "bitcast",
))  # fmt: skip
"""Elementwise primitives without rounding: two copies of one cannot differ, so recomputing them is always safe."""


@dataclass(frozen=True)
class Edge:
    """A computed (or given) value that a node reads; `many`: possibly one element at several points."""

    value: Value
    many: bool


class Flow:
    """The graph seen as computed values joined by movement. `stops`: movement that is carried out, as a copy."""

    def __init__(self, graph: Graph, stops: Collection[Value] = ()) -> None:
        self.graph = graph
        self.stops = frozenset(stops)
        self.producer: Mapping[Value, Node] = graph.producers()
        self._edges: dict[Value, tuple[Edge, ...]] = {}

    def kind(self, value: Value) -> str:
        """The kind of the value's primitive; "input" for graph inputs."""
        node = self.producer.get(value)
        return PRIMITIVES[node.prim].kind if node is not None else "input"

    def is_movement(self, value: Value) -> bool:
        """True where a reader may look through the value at its operand. A concat is written piece by piece."""
        return self.kind(value) == "movement" and self.producer[value].prim != "concat" and value not in self.stops

    def is_computed(self, node: Node) -> bool:
        """True for nodes that do work of their own: not sources, and not movement that readers look through."""
        return PRIMITIVES[node.prim].kind != "source" and not self.is_movement(node.output)

    def edges(self, value: Value) -> tuple[Edge, ...]:
        """What reading `value` reads: itself, or, through movement, the values behind it."""
        if not self.is_movement(value):
            return (Edge(value, False),)
        if value not in self._edges:
            node = self.producer[value]
            grows = _grows(node)
            out: dict[Value, bool] = {}
            for x in node.inputs:
                for e in self.edges(x):
                    out[e.value] = out.get(e.value, False) or e.many or grows
            self._edges[value] = tuple(Edge(v, m) for v, m in out.items())
        return self._edges[value]

    def reads(self, node: Node) -> tuple[Edge, ...]:
        """Every computed or given value behind a node's operands."""
        grows = node.output in self.stops and _grows(node)
        out: dict[Value, bool] = {}
        for x in node.inputs:
            for e in self.edges(x):
                out[e.value] = out.get(e.value, False) or e.many or grows
        return tuple(Edge(v, m) for v, m in out.items())

    @cached_property
    def batches(self) -> frozenset[str]:
        """Symbols that count what inputs hold of a kind, by standing first in their shapes."""
        firsts = [v.shape[0] for v in self.graph.inputs if v.rank > 1]
        return frozenset(name for d in firsts if (name := dims.lone(d)) is not None)

    @cached_property
    def scalars(self) -> frozenset[Value]:
        """Constants of one element: literals in the code, never memory."""
        return frozenset(n.output for n in self.graph.nodes if n.prim == "const" and n.attrs["array"].size == 1)


def _grows(node: Node) -> bool:
    """Whether a reader of the node's value sees more elements than its operand has: computing them there costs more."""
    if node.prim not in MANY:
        return False
    before, after = node.inputs[0].size, node.output.size
    return after != before if node.prim == "broadcast" else not dims.prove_le(after, before)


@dataclass(frozen=True)
class Access:
    """A read of a value in memory; `at` is per dim, or, for a reshaped view of a whole buffer, one linear index."""

    value: Value
    at: tuple[Index, ...]
    linear: bool = False
    guarded: bool = False

    @property
    def offset(self) -> Index:
        """The index in elements into the contiguous value."""
        return self.at[0] if self.linear else access.linear(self.value.shape, self.at)


@dataclass(frozen=True)
class Trace:
    accesses: tuple[Access, ...]
    nodes: tuple[Node, ...]  # elementwise nodes that are evaluated on the way


def trace(
    flow: Flow,
    sources: Sequence[tuple[Value, tuple[Index, ...]]],
    placed: Callable[[Value], bool],
    whole: Callable[[Value], bool],
) -> Trace:
    """Accesses of evaluating each source (value, at). `placed`: in memory, so the walk ends there (but a source
    itself is evaluated). `whole`: in memory as a complete buffer, which any reshape may view linearly.

    Raises access.NeedsSplit, or NotAffine with the node's operand as `blocked`."""
    accesses: dict[tuple[Value, tuple[Index, ...], bool], Access] = {}
    nodes: dict[Node, None] = {}
    seen: set[tuple[Value, tuple[Index, ...], bool]] = set()
    loads: dict[tuple[Value, tuple[Index, ...]], Loaded] = {}

    def visit(value: Value, at: tuple[Index, ...], guarded: bool, first: bool = False) -> None:
        if value in flow.scalars or (value, at, guarded) in seen:
            return
        seen.add((value, at, guarded))
        if placed(value) and not first:
            accesses.setdefault((value, at, False), Access(value, at, guarded=guarded))
            return
        node = flow.producer[value]
        kind = PRIMITIVES[node.prim].kind
        if kind == "elementwise":
            nodes[node] = None
            for x in node.inputs:
                visit(x, at, guarded)
        elif kind == "source":
            if node.prim == "const":
                accesses.setdefault((value, at, False), Access(value, at, guarded=guarded))
        elif node.prim == "gather":
            loaded = []
            for x, axis in zip(node.inputs[1:], node.attrs["axes"], strict=True):
                point = at[: x.rank]
                counted = count(flow, x, point, node.inputs[0].shape[axis])
                if counted is not None:
                    loaded.append(counted)
                    continue
                visit(x, point, guarded)
                key = (x, point)
                loads.setdefault(key, Loaded("ix", x, point, node.inputs[0].shape[axis]))
                loaded.append(Index(0, ((loads[key], 1),)))
            visit(node.inputs[0], access.gather_index(node, at, loaded), guarded)
        elif node.prim == "reshape" and whole(node.inputs[0]) and not access.is_squeeze(node):
            offset = access.linear(value.shape, at)
            x = node.inputs[0]
            accesses.setdefault((x, (offset,), True), Access(x, (offset,), True, guarded))
        elif kind == "movement" and node.prim != "concat":
            try:
                inner = access.operand_index(node, at)
            except access.NotAffine as problem:
                x = node.inputs[0]
                if not placed(x):
                    raise Blocked(x) from problem
                offset = access.linear(value.shape, at)  # only a reshape is ever not affine
                accesses.setdefault((x, (offset,), True), Access(x, (offset,), True, guarded))
                return
            visit(node.inputs[0], inner, guarded or node.prim == "pad")
        else:
            raise Blocked(value)

    for value, at in sources:
        visit(value, at, False, first=True)
    return Trace(tuple(accesses.values()), tuple(nodes))


def count(flow: Flow, value: Value, at: tuple[Index, ...], limit: Dim) -> Index | None:
    """The element at an index as an index itself, if the value counts (an iota, or a view of one) below `limit`."""
    node = flow.producer.get(value)
    while node is not None and flow.is_movement(value) and node.prim not in ("gather", "pad"):
        try:
            at = access.operand_index(node, at)
        except (access.NotAffine, access.NeedsSplit):
            return None
        value = node.inputs[0]
        node = flow.producer.get(value)
    if node is None or node.prim != "iota":
        return None
    axis = node.attrs["axis"]
    return at[axis] if dims.prove_le(value.shape[axis], limit) else None


class Blocked(Exception):
    """`value` has to be in memory as a whole buffer before the rest can be expressed."""

    def __init__(self, value: Value) -> None:
        super().__init__(value.name)
        self.value = value


def domain(value: Value, prefix: str = "i") -> tuple[Axis, ...]:
    """Fresh axes over a value's elements."""
    return tuple(Axis(f"{prefix}{k}", d) for k, d in enumerate(value.shape))
