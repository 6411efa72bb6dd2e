"""Elementwise work on a concatenation is done piece by piece, so that nothing has to be put together first.

    before: mul(concat(neg(b), a, axis 1), sin)
    after:  concat(mul(neg(b), sin[:, :32]), mul(a, sin[:, 32:]), axis 1)

A concat is written in pieces, each by the group that computes it: what follows it element by element then needs no
buffer of the whole (a rotary embedding is one kernel), and what is left of it at an output is a place to write to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from stitch import dims
from stitch.dims import Dim
from stitch.graph import Graph, Node, Value
from stitch.ops.primitives import ELEMENTWISE
from stitch.rewrite import Rewriter, merged, rewrite
from stitch.simplify.algebra import ALGEBRA
from stitch.simplify.movement import MOVEMENT

MOST = 4
"""Pieces of a concatenation up to which work on it is divided."""

SHORTEST = 16
"""Adjacent elements that a piece must have: with fewer, its stores would not fill vectors."""


def divide(graph: Graph) -> Graph:
    """The graph with concats after what is computed from them element by element, where nothing else reads them."""
    readers: dict[Value, list[Node]] = {}
    for n in graph.nodes:
        for v in n.inputs:
            readers.setdefault(v, []).append(n)
    outputs = set(graph.outputs)
    divided: set[Value] = set()
    chosen: dict[Node, Callable[[Rewriter], Value]] = {}
    for n in graph.nodes:
        if n.prim == "concat" and len(n.inputs) <= MOST and _has_long_runs(n):
            divided.add(n.output)
        elif n.prim in ELEMENTWISE:
            for v in n.inputs:
                if v in divided and v not in outputs and all(m.prim in ELEMENTWISE for m in readers[v]):
                    chosen[n] = partial(_in_pieces, n, v)
                    divided.add(n.output)
                    break
    return rewrite(graph, merged(MOVEMENT, ALGEBRA), chosen) if chosen else graph


def _has_long_runs(concat: Node) -> bool:
    axis = concat.attrs["axis"]
    return all(dims.prove_le(SHORTEST, dims.product(v.shape[axis:])) for v in concat.inputs)


def _in_pieces(node: Node, whole: Value, r: Rewriter) -> Value:
    """The node's value as a concat of what its pieces give."""
    inputs = [r.new(v) for v in node.inputs]
    concat = r.maker(r.new(whole), "concat")
    if concat is None:  # a rule has made something simpler of it
        return r.emit(node.prim, *inputs, **node.attrs)
    axis = concat.attrs["axis"]
    start: Dim = 0
    pieces = []
    for part in concat.inputs:
        pieces.append(r.emit(node.prim, *(_piece(r, v, axis, start, part.shape[axis]) for v in inputs), **node.attrs))
        start = start + part.shape[axis]
    return r.emit("concat", *pieces, axis=axis)


def _piece(r: Rewriter, v: Value, axis: int, start: Dim, size: Dim) -> Value:
    starts = [start if k == axis else 0 for k in range(v.rank)]
    sizes = [size if k == axis else d for k, d in enumerate(v.shape)]
    return r.slice(v, starts, sizes, [1] * v.rank)
