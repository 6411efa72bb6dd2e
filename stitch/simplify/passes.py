"""The ordered list of passes, repeated until nothing changes.

Transposes are what the passes spend most effort on. The importer surrounds convolutions and poolings with transposes
to channels-last and back. `sink` pushes transposes towards the outputs, through everything that does not care about
the order of axes, until one meets its inverse; `hoist` then pulls up what is left wherever that saves bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from stitch import knobs
from stitch.graph import Graph, Node, Value
from stitch.rewrite import Rewriter, merged, rewrite
from stitch.simplify.algebra import ALGEBRA
from stitch.simplify.contractions import CONTRACTION, DECOMPOSITION
from stitch.simplify.folding import FOLDING
from stitch.simplify.halves import HALVES
from stitch.simplify.hoisting import Plans
from stitch.simplify.linear import distribute
from stitch.simplify.moments import MOMENTS
from stitch.simplify.movement import MOVEMENT
from stitch.simplify.permutations import stays, weight
from stitch.simplify.pieces import divide
from stitch.simplify.pooling import gather_windows
from stitch.simplify.quotients import QUOTIENTS
from stitch.simplify.sinking import SINKING
from stitch.simplify.winograd import WINOGRAD

_Pass: TypeAlias = Callable[[Graph], Graph]
_Known: TypeAlias = dict[_Pass, Graph]

_ROUNDS = 8  # a bound on repetition; real models settle in two to four


def simplify(graph: Graph) -> Graph:
    """The graph, simplified; its inputs, outputs' names and guards stay as they are.

    A change of layout is kept if fewer bytes are moved after it, or as many in fewer nodes.
    """
    known: _Known = {}
    graph = _settled(distribute(_settled(graph, known, tidy, fold)), known, decompose, tidy, fold)
    for _ in range(_ROUNDS):
        after = _settled(hoist(_settled(graph, known, sink, tidy, fold)), known, decompose, tidy, fold)
        if _burden(after) >= _burden(graph):
            break
        graph = after
    return last(_settled(divide(gather_windows(graph)), known, tidy, fold))


def _settled(graph: Graph, known: _Known, *passes: _Pass) -> Graph:
    """The graph after these passes, in this order, until none changes it. `known` is what each has last left as it is,
    and would leave so again."""
    for _ in range(_ROUNDS):
        before = graph
        for step in passes:
            if known.get(step) is not graph:
                after = step(graph)
                if after is graph:
                    known[step] = graph
                graph = after
        if graph is before:
            break
    return graph


def _burden(graph: Graph) -> tuple[float, int]:
    return sum(weight(n.output) for n in moving(graph)), len(graph.nodes)


def decompose(graph: Graph) -> Graph:
    """argmax, and contractions that reuse nothing, in plainer primitives (see the rules)."""
    return rewrite(graph, merged(MOVEMENT, CONTRACTION, DECOMPOSITION, ALGEBRA, HALVES))


def tidy(graph: Graph) -> Graph:
    """Algebra and movement."""
    return rewrite(graph, merged(ALGEBRA, HALVES, MOVEMENT, CONTRACTION))


def fold(graph: Graph) -> Graph:
    """What follows from constants or from shapes alone is computed now."""
    return rewrite(graph, merged(FOLDING, ALGEBRA))


def last(graph: Graph) -> Graph:
    """Sums of large values row by row, divisions by constants, convolutions with fewer products (see the rules). Last,
    for algebra would put the sums together again, and does not know what was a division or a convolution."""
    fast = (WINOGRAD,) if knobs.current().winograd else ()
    return rewrite(graph, merged(MOVEMENT, MOMENTS, QUOTIENTS, *fast))


def sink(graph: Graph) -> Graph:
    """relu(transpose(x)) -> transpose(relu(x)) and so on (see the rules); inverse pairs vanish on meeting."""
    return rewrite(graph, merged(MOVEMENT, CONTRACTION, SINKING))


def hoist(graph: Graph) -> Graph:
    """transpose(add(x, transpose(y))) -> add(transpose(x), y): transposes pulled up where fewer bytes are then moved.

    Never through a value that something else reads too: that would compute it twice.
    """
    plans = Plans(graph)
    chosen: dict[Node, Callable[[Rewriter], Value]] = {}
    for node in graph.nodes:
        if node.prim == "transpose" and not stays(node.attrs["perm"], node.inputs[0].shape):
            cost, make = plans.plan(node.inputs[0], node.attrs["perm"], 32, root=True)
            if cost < weight(node.output):
                chosen[node] = make
    return rewrite(graph, merged(MOVEMENT, CONTRACTION), chosen) if chosen else graph


def moving(graph: Graph) -> list[Node]:
    """The transposes that really move data: not merely axes of extent 1."""
    return [n for n in graph.nodes if n.prim == "transpose" and not stays(n.attrs["perm"], n.inputs[0].shape)]
