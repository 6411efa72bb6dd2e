"""Random graphs on the compiled path: which of them have one right answer, and other sizes to run them at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stitch import dims, dtypes
from stitch.evaluate import evaluate, numbers
from stitch.graph import Graph, Node
from stitch.ops.primitives import Array

SIZES = ({"n": 7, "m": 2}, {"n": 1, "m": 1}, {"n": 17, "m": 19}, {"n": 0, "m": 3}, {"n": 33, "m": 0}, {"n": 2, "m": 67})
"""One, zero, primes, and more than a vector."""

_EXACT = {"exp": "floor", "tanh": "rint", "sigmoid": "abs", "sin": "sign"}


def exact(graph: Graph) -> Graph:
    """The graph with every function that is right only up to some ulp exchanged for one that is exact, so that
    whoever computes it must find the same bits."""
    swapped = [replace(n, prim=_EXACT.get(n.prim, n.prim)) if n.output.contents is None else n for n in graph.nodes]
    return replace(graph, nodes=tuple(swapped))


def has_one_answer(graph: Graph) -> bool:
    """False if a transcendental function of a constant, which `exact` leaves alone, is in it."""
    return not any(n.prim in _EXACT for n in graph.nodes)


def is_continuous(graph: Graph) -> bool:
    """True if a small difference in a value cannot become a large one."""
    jumps = {"floor", "ceil", "rint", "sign", "eq", "ne", "lt", "le", "argmax", "argmin", "gather"}
    return not any(n.prim in jumps for n in graph.nodes)


def feeds(graph: Graph, sizes: dict[str, int], seed: int, integral: bool) -> dict[str, Array]:
    """Arrays for the inputs at these sizes of the symbols; `integral`: multiples of a half, exactly added."""
    rng = np.random.default_rng(seed)
    out: dict[str, Array] = {}
    for v in graph.inputs:
        shape = numbers(v.shape, sizes)
        if v.dtype == dtypes.BOOL:
            out[v.name] = rng.random(shape) < 0.5
        elif dtypes.is_integer(v.dtype):
            out[v.name] = rng.integers(-4, 5, shape).astype(v.dtype)
        elif integral:
            out[v.name] = (rng.integers(-8, 9, shape) / 2).astype(v.dtype)
        else:
            out[v.name] = rng.uniform(-1.5, 1.5, shape).astype(v.dtype)
    return out


def fits(graph: Graph, sizes: dict[str, int], most: int = 60_000) -> bool:
    """True if no value has more elements than that, and every guard and size holds."""
    shapes = [v.shape for n in graph.nodes for v in n.outputs]
    if any(dims.evaluate(g.left, sizes) != dims.evaluate(g.right, sizes) for g in graph.guards):
        return False
    extents = [numbers(s, sizes) for s in shapes]
    return all(min(s, default=0) >= 0 and int(np.prod(s, dtype=np.int64)) <= most for s in extents)


def magnitude(graph: Graph, given: dict[str, Array]) -> float:
    """The largest finite number that the graph computes anywhere on the way: what rounding errors are relative to."""
    made = tuple(v for n in graph.nodes for v in n.outputs if dtypes.is_float(v.dtype))
    everything = replace(graph, outputs=made, output_names=tuple(f"v{k}" for k in range(len(made))))
    found = [np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in evaluate(everything, given)]
    return max([1.0, *map(float, found)])


def terms(graph: Graph, sizes: dict[str, int]) -> int:
    """The largest number of elements that one sum of the graph adds up, or more."""

    def of(n: Node) -> int:
        size = int(np.prod([dims.evaluate(d, sizes) for v in n.inputs for d in v.shape], dtype=np.int64))
        return size if n.prim in ("reduce_sum", "contract") else 1

    return max([1, *(of(n) for n in graph.nodes)])
