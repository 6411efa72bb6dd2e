"""A graph evaluated with numpy on the primitives: the first oracle, and constant folding's engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stitch import dims
from stitch.graph import Graph, Node
from stitch.ops.primitives import PRIMITIVES, Array


def evaluate(graph: Graph, feeds: Mapping[str, Array]) -> list[Array]:
    """Outputs of `graph` for arrays by input name. Symbols are read off the shapes of the inputs, and, for
    data-dependent results, off what the host operators returned."""
    env: dict[str, int] = {}
    values: dict[Any, Array] = {}
    for v in graph.inputs:
        values[v] = np.asarray(feeds[v.name])
        bind(v.shape, values[v].shape, env)
    for node in graph.nodes:
        results = apply(node, [values[v] for v in node.inputs], env)
        for v, r in zip(node.outputs, results, strict=True):
            if node.prim == "host":
                bind(v.shape, r.shape, env)
            values[v] = r
    return [values[v] for v in graph.outputs]


def bind(shape: tuple[dims.Dim, ...], actual: tuple[int, ...], env: dict[str, int]) -> None:
    """Adds to `env` the symbols that stand alone in `shape`."""
    for d, n in zip(shape, actual, strict=True):
        if (name := dims.lone(d)) is not None:
            env.setdefault(name, n)


def apply(node: Node, inputs: list[Array], env: Mapping[str, int]) -> tuple[Array, ...]:
    """One node's outputs."""
    attrs = {k: numbers(v, env) for k, v in node.attrs.items()} if node.prim != "host" else node.attrs
    result = PRIMITIVES[node.prim].meaning(attrs, *inputs)
    results = result if isinstance(result, tuple) else (result,)
    return tuple(np.asarray(r).astype(v.dtype, copy=False) for v, r in zip(node.outputs, results, strict=True))


def numbers(v: Any, env: Mapping[str, int]) -> Any:
    """An attribute with every Dim evaluated."""
    if isinstance(v, tuple):
        return tuple(numbers(x, env) for x in v)
    return dims.evaluate(v, env) if isinstance(v, dims.Expr) else v
