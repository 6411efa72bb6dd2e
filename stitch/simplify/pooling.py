"""Windows that do not overlap, over the sums of other windows, are pulled up to what those read.

    before:  reduce_max(window(relu(reduce_sum(window(pad(x), 3x3) * w)), 2x2 by 2))
    after:   reduce_max(relu(reduce_sum(window(window(pad(x), 4x4 by 2), 3x3) * w)))

A maximum over four results of a depthwise convolution then has all that it needs at one place of the image, four sums
that share most of what they read; before, the results of a whole image were a tile, which is larger than the caches.
Nothing is computed twice, for no element is in two of the windows, and nothing that was not computed before, but for
the results beyond the last whole window, which go. Values that anything else reads stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from stitch import dims
from stitch.graph import Graph, Node, Value
from stitch.ops.primitives import ELEMENTWISE, REDUCTIONS
from stitch.rewrite import Rewriter, merged, rewrite
from stitch.simplify.algebra import ALGEBRA
from stitch.simplify.movement import MOVEMENT

Make: TypeAlias = Callable[[Rewriter], Value]


def gather_windows(graph: Graph) -> Graph:
    """The graph with such windows pulled up."""
    chosen = {n: make for n in graph.nodes if n.prim == "window" and (make := _Way(graph, n).make()) is not None}
    return rewrite(graph, merged(MOVEMENT, ALGEBRA), chosen) if chosen else graph


class _Way:
    """From a window up to the windows that its elements are sums over."""

    def __init__(self, graph: Graph, window: Node) -> None:
        self.window, self.attrs = window, window.attrs
        self.makers, self.users, self.outputs = graph.producers(), graph.users(), set(graph.outputs)
        self.met = False

    def make(self) -> Make | None:
        a = self.attrs
        if any(
            d != 1 or stride < size for size, stride, d in zip(a["sizes"], a["strides"], a["dilations"], strict=True)
        ):
            return None
        x = self.window.inputs[0]
        at, count = max(a["axes"]) + 1, len(a["axes"])  # lanes run along what is behind, which stays last
        found = self._of(x, a["axes"], at)
        order = (*range(at), *range(at + count, x.rank + count), *range(at, at + count))
        return (lambda r: r.transpose(found(r), order)) if found is not None and self.met else None

    def _of(self, v: Value, axes: Sequence[int], at: int) -> Make | None:
        """How to make the windows along these axes of a value, their own axes before axis `at` of it; None if that is
        not to be."""
        node = self.makers.get(v)
        if node is None:
            return None
        if node.prim == "broadcast":
            return self._of_broadcast(node, axes, at)
        if len(self.users[v]) != 1 or v in self.outputs:
            return None
        if node.prim == "window":
            return self._of_window(node, axes, at)
        attrs = node.attrs
        if node.prim in REDUCTIONS:
            kept = [i for i in range(node.inputs[0].rank) if i not in attrs["axes"]]
            axes, at = tuple(kept[a] for a in axes), kept[at - 1] + 1
            attrs = {"axes": tuple(a + len(axes) if a >= at else a for a in attrs["axes"])}
        elif node.prim not in ELEMENTWISE or any(x.shape != v.shape for x in node.inputs):
            return None
        makes = [self._of(x, axes, at) for x in node.inputs]
        known = [m for m in makes if m is not None]
        if len(known) < len(makes):
            return None
        return lambda r: r.emit(node.prim, *(m(r) for m in known), **attrs)

    def _of_broadcast(self, node: Node, axes: Sequence[int], at: int) -> Make | None:
        """Windows of what is the same along their axes."""
        x, v = node.inputs[0], node.output
        places = [a - (v.rank - x.rank) for a in axes]
        if any(p >= 0 and x.shape[p] != 1 for p in places):
            return None
        shape = list(v.shape)
        for a, n in zip(axes, (self.window.output.shape[a] for a in self.attrs["axes"]), strict=True):
            shape[a] = n
        sizes, place = self.attrs["sizes"], max(at - (v.rank - x.rank), 0)
        ones = [1] * len(sizes) if place else []  # axes before all of x are there without being named
        inner = (*x.shape[:place], *ones, *x.shape[place:])
        return lambda r: r.broadcast(r.reshape(r.new(x), inner), (*shape[:at], *sizes, *shape[at:]))

    def _of_window(self, node: Node, axes: Sequence[int], at: int) -> Make | None:
        """Windows of windows: larger ones first, as far apart as those are, and in them what was a window before."""
        x, inner, own = node.inputs[0], node.attrs, self.attrs
        if inner["axes"] != tuple(axes) or at > x.rank or any(stride != 1 for stride in inner["strides"]):
            return None
        self.met = True
        rows = list(zip(inner["sizes"], inner["dilations"], own["sizes"], own["strides"], strict=True))
        spans = tuple((size - 1) * dilation + count for size, dilation, count, _ in rows)
        counts = [(x.shape[a] - span) // stride + 1 for a, span, (*_, stride) in zip(axes, spans, rows, strict=True)]
        wanted = [self.window.output.shape[a] for a in own["axes"]]
        if not all(dims.prove_equal(m, n) for m, n in zip(counts, wanted, strict=True)):
            return None
        n, ones = len(rows), (1,) * len(rows)
        behind = tuple(range(x.rank, x.rank + n))
        order = (*range(at), *behind, *range(at, x.rank), *range(x.rank + n, x.rank + 2 * n))

        def make(r: Rewriter) -> Value:
            y = r.emit("window", r.new(x), axes=tuple(axes), sizes=spans, strides=own["strides"], dilations=ones)
            y = r.emit("window", y, axes=behind, sizes=inner["sizes"], strides=ones, dilations=inner["dilations"])
            return r.transpose(y, order)

        return make
