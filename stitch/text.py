"""Graphs as text, for people and for golden tests: a header, then one line per node.

    graph tiny
    input %0 'x' : float32[batch, 4]
    guard batch == n  # Add 'sum'
    %1 = const {2.0} : float32[]
    %2 = broadcast(%1) shape=[batch, 4] : float32[batch, 4]  # Mul 'scale'
    %3 = mul(%0, %2) : float32[batch, 4]  # Mul 'scale'
    output 'y' = %3

Values are numbered in order, so that equal graphs have equal texts whatever their values are called.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from stitch.dims import Expr
from stitch.graph import Graph, Node, Origin, Value
from stitch.ops.primitives import Array

_INLINE = 8  # elements of a constant that are spelt out


def render(graph: Graph) -> str:
    """The text of a graph."""
    numbers: dict[Value, int] = {}
    for v in (*graph.inputs, *(v for node in graph.nodes for v in node.outputs)):
        numbers[v] = len(numbers)

    def name(v: Value) -> str:
        return f"%{numbers[v]}"

    lines = [f"graph {graph.name}"]
    lines += [f"input {name(v)} {v.name!r} : {_type(v)}" for v in graph.inputs]
    lines += [f"guard {g.left} == {g.right}" + (f"  # {g.where}" if g.where else "") for g in graph.guards]
    for node in graph.nodes:
        targets = ", ".join(map(name, node.outputs))
        types = ", ".join(map(_type, node.outputs))
        lines.append(f"{targets} = {_operation(node, [name(v) for v in node.inputs])} : {types}{_origin(node.origin)}")
    lines += [f"output {n!r} = {name(v)}" for n, v in zip(graph.output_names, graph.outputs, strict=True)]
    return "\n".join(lines) + "\n"


def _operation(node: Node, inputs: list[str]) -> str:
    if node.prim == "const":
        return f"const {_array(node.attrs['array'])}"
    attrs = [f" {key}={_attribute(v)}" for key, v in node.attrs.items()]
    return f"{node.prim}({', '.join(inputs)}){''.join(attrs)}"


def _type(v: Value) -> str:
    return f"{v.dtype.name}[{', '.join(map(str, v.shape))}]"


def _origin(origin: Origin) -> str:
    if not origin.operator:
        return ""
    domain = f"{origin.domain}." if origin.domain else ""
    return f"  # {domain}{origin.operator} {origin.node!r}"


def _attribute(v: Any) -> str:
    match v:
        case tuple() | list():
            return f"[{', '.join(map(_attribute, v))}]"
        case np.dtype():
            return str(v.name)
        case np.ndarray():
            return _array(v)
        case Expr() | str() | np.generic():
            return str(v)
    return repr(v)


def _array(array: Array) -> str:
    """`{1, 2}` for a small array, `{hash}` of its dtype, shape and elements for a large one."""
    if array.size <= _INLINE:
        return f"{{{', '.join(str(x) for x in array.reshape(-1).tolist())}}}"
    digest = hashlib.blake2b(f"{array.dtype.name}{array.shape}".encode(), digest_size=4)
    digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return f"{{{digest.hexdigest()}}}"
