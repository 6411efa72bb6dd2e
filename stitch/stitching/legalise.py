"""Contractions in the forms for which there is machine code.

    before  y: float16 = contract(window(x), w)
    after   y = cast(contract(window(cast(x)), cast(w)))         in float32, rounded once at the end

Half precisions are contracted in float32, narrow and unsigned integers in int32 or int64, whose low bits are the same.
The casts go behind movement, where there are fewest elements. More than three summed axes are brought into one order
in both operands, that in which a window's operand has them in memory: taps along an axis are where that axis is, so
that those along the last one go on with the channels, and are one axis with these in weights laid out anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from stitch import dtypes
from stitch.errors import UnsupportedOperator
from stitch.graph import Graph, Node, Origin, Value
from stitch.ops.primitives import PRIMITIVES

LOOPS = 3
"""Summed axes that a micro-kernel loops over."""

WIDER: Mapping[np.dtype, np.dtype] = {
    **dict.fromkeys((dtypes.FLOAT16, dtypes.BFLOAT16), dtypes.FLOAT32),
    **dict.fromkeys((dtypes.INT8, dtypes.INT16, dtypes.UINT8, dtypes.UINT16, dtypes.UINT32), dtypes.INT32),
    dtypes.UINT64: dtypes.INT64,
}
LEGAL = (dtypes.FLOAT32, dtypes.FLOAT64, dtypes.INT32, dtypes.INT64)


def legalise(graph: Graph) -> Graph:
    """Raises UnsupportedOperator where no type can stand for a contraction's."""
    if all(n.prim != "contract" or (n.output.dtype in LEGAL and len(_summed(n)) <= LOOPS) for n in graph.nodes):
        return graph
    return _Legaliser(graph).run()


def _summed(node: Node) -> list[int]:
    """The summed labels of a contraction that are more than one element long."""
    extent = dict(zip(node.attrs["a"], node.inputs[0].shape, strict=True))
    extent |= {k: d for k, d in zip(node.attrs["b"], node.inputs[1].shape, strict=True) if extent.get(k, 1) == 1}
    return [k for k, d in extent.items() if k not in node.attrs["out"] and d != 1]


class _Legaliser:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.nodes: list[Node] = []
        self.wide: dict[tuple[Value, np.dtype], Value] = {}

    def run(self) -> Graph:
        for n in self.graph.nodes:
            if n.prim == "contract":
                self._contract(n)
            else:
                self.nodes.append(n)
        return replace(self.graph, nodes=tuple(self.nodes))

    def _contract(self, node: Node) -> None:
        dtype = node.output.dtype
        kind = WIDER.get(dtype, dtype)
        if kind not in LEGAL:
            o = node.origin
            raise UnsupportedOperator(
                o.operator, node=o.node, domain=o.domain, opset=o.opset, dtype=dtype.name,
                advice="cast its operands to a float or an integer type",
            )  # fmt: skip
        a, b = (self._widened(v, kind) for v in node.inputs)
        attrs = dict(node.attrs)
        if len(_summed(node)) > LOOPS:
            operands = sorted([(a, attrs["a"]), (b, attrs["b"])], key=lambda x: not self._is_window(x[0]))
            summed = [k for k in self._in_memory(*operands[0]) if k not in attrs["out"] and k in operands[1][1]]
            a, attrs["a"] = self._ordered(node, a, attrs["a"], summed)
            b, attrs["b"] = self._ordered(node, b, attrs["b"], summed)
        if kind == dtype:
            self.nodes.append(replace(node, inputs=(a, b), attrs=attrs))
            return
        wide = Value(f"{node.output.name}.wide", kind, node.output.shape)
        self.nodes.append(replace(node, inputs=(a, b), outputs=(wide,), attrs=attrs))
        self.nodes.append(Node("cast", (wide,), node.outputs, {"dtype": dtype}, node.origin))

    def _is_window(self, x: Value) -> bool:
        node = self.producers.get(x)
        return node is not None and node.prim == "window"

    def _in_memory(self, x: Value, labels: tuple[int, ...]) -> list[int]:
        """Labels of an operand in the order of the axes that they move along."""
        if not self._is_window(x):
            return list(labels)
        node = self.producers[x]
        places = [*range(node.inputs[0].rank), *node.attrs["axes"]]
        return [labels[k] for k in sorted(range(len(labels)), key=lambda k: places[k])]

    def _ordered(
        self, node: Node, x: Value, labels: tuple[int, ...], summed: list[int]
    ) -> tuple[Value, tuple[int, ...]]:
        """The operand with the summed labels last and in this order, and its labels."""
        wanted = (*(k for k in labels if k not in summed), *summed)
        if wanted == labels:
            return x, labels
        perm = tuple(labels.index(k) for k in wanted)
        moved = Value(f"{x.name}.ordered", x.dtype, tuple(x.shape[p] for p in perm))
        made = self.producers.get(x)
        if made is not None and made.prim == "const":
            array = np.ascontiguousarray(made.attrs["array"].transpose(perm))
            self.nodes.append(replace(made, outputs=(moved,), attrs={"array": array}))
        else:
            self.nodes.append(Node("transpose", (x,), (moved,), {"perm": perm}, node.origin))
        return moved, wanted

    def _widened(self, value: Value, dtype: np.dtype) -> Value:
        """The value in another type: constants are cast here, movement is repeated over its cast operand."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.wide:
            node = self.producers.get(value)
            out = Value(f"{value.name}.{dtype.name}", dtype, value.shape)
            if node is not None and node.prim == "const":
                made = replace(node, outputs=(out,), attrs={"array": node.attrs["array"].astype(dtype)})
            elif node is not None and PRIMITIVES[node.prim].kind == "movement" and node.prim != "concat":
                inputs = (self._widened(node.inputs[0], dtype), *node.inputs[1:])
                made = replace(node, inputs=inputs, outputs=(out,))
            else:
                made = Node("cast", (value,), (out,), {"dtype": dtype}, node.origin if node is not None else Origin())
            self.nodes.append(made)
            self.wide[value, dtype] = out
        return self.wide[value, dtype]
