"""Plans for pulling transposes up, towards the inputs, wherever fewer bytes are then moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from stitch.graph import Graph, Node, Value
from stitch.ops.primitives import PRIMITIVES, REDUCTIONS
from stitch.rewrite import Rewriter
from stitch.simplify.permutations import Perm, blocks_of, inverse, permuted, reordered, stays, weight

Plan: TypeAlias = tuple[float, Callable[[Rewriter], Value]]


class Plans:
    """What it would cost, in bytes, to have a value transposed, and how to make it so."""

    def __init__(self, graph: Graph) -> None:
        self._makers = graph.producers()
        self._users = graph.users()
        self._outputs = set(graph.outputs)
        self._there = {(n.inputs[0], n.attrs["perm"]) for n in graph.nodes if n.prim == "transpose"}

    def _only(self, v: Value) -> bool:
        return len(self._users[v]) == 1 and v not in self._outputs

    def plan(self, v: Value, perm: Perm, depth: int, root: bool = False) -> Plan:
        whole = weight(v)
        plain: Plan = (whole, lambda r: r.transpose(r.new(v), perm))
        node = self._makers.get(v)
        if stays(perm, v.shape) or ((v, perm) in self._there and not root):
            return 0.0, plain[1]
        if node is None or depth == 0:
            return plain
        match node.prim:
            case "const" | "iota":
                return 0.0, plain[1]
            case "transpose":
                both = [node.attrs["perm"][p] for p in perm]
                left = 0.0 if stays(both, node.inputs[0].shape) else whole
                return left - (whole if self._only(v) else 0.0), plain[1]
            case "broadcast":
                x = node.inputs[0]
                if x in self._makers and self._makers[x].prim == "const":
                    return 0.0, plain[1]
                if x.rank < v.rank or not self._only(v):
                    return min(weight(x), whole / 2), plain[1]
                cost, make = self.plan(x, perm, depth - 1)
                shape = [v.shape[p] for p in perm]
                return min(cost, whole), lambda r: r.broadcast(make(r), shape)
        deeper = self._through(node, perm, depth - 1) if self._only(v) else None
        return plain if deeper is None or deeper[0] >= whole else deeper

    def _through(self, node: Node, perm: Perm, depth: int) -> Plan | None:
        """By way of the operands of a node that has no other user."""
        attrs = node.attrs
        inner: Perm = perm
        match node.prim:
            case "pad" | "slice":
                attrs = permuted(attrs, perm)
            case "concat":
                attrs = {"axis": perm.index(attrs["axis"])}
            case prim if prim in REDUCTIONS:
                axes = attrs["axes"]
                order = [i for i in range(node.inputs[0].rank) if i not in axes]
                places = iter([order[p] for p in perm])
                inner = tuple(i if i in axes else next(places) for i in range(node.inputs[0].rank))
            case "reshape":
                x, shape = node.inputs[0], node.output.shape
                blocks = blocks_of(shape, x.shape)
                cut = reordered(blocks, inverse(perm), tuple(shape[p] for p in perm)) if blocks else None
                if cut is None:
                    return None
                inner = tuple(j for _, theirs in cut for j in theirs)
                attrs = {"shape": tuple(shape[p] for p in perm)}
            case prim if PRIMITIVES[prim].kind != "elementwise":
                return None
        plans = [self.plan(v, inner, depth) for v in node.inputs]

        def make(r: Rewriter) -> Value:
            return r.emit(node.prim, *[build(r) for _, build in plans], **attrs)

        return sum(cost for cost, _ in plans), make
