"""What chains are made of: contractions with their epilogues, and memory-bound nodes before, between and behind them.

    scores = q . k^T;  weights = softmax(scores * scale + mask);  out = weights . v       two contractions, rows between
    y = depthwise(x) + bias;  z = gelu(y);  out = z . w                                   rows before one
    h = x . w + residual;  out = layer_norm(h)                                            rows behind one

Nothing here knows attention or a norm: rows are whatever memory-bound nodes data flow shows, as long as there is a
reduction among them. Without one no row has to be whole: what is elementwise is done best where tiles are made or read.
Whether each task can take some rows through all of it is for `stitch.stitching.chains` to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stitch.graph import Node, Value
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching.trace import Flow

MOST = 200
"""Nodes that are looked at beside a contraction: what is between two of them is rarely more than a dozen."""


@dataclass(frozen=True)
class Stages:
    """The nodes of a chain, stage by stage: a contraction and its epilogue, or rows."""

    parts: tuple[tuple[Node, ...], ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(n for part in self.parts for n in part)


@dataclass(frozen=True)
class Surroundings:
    """A graph while clusters grow. `cluster`: the nodes that one is in so far; `users`: the computed nodes that read a
    value; `order`: where nodes stand in the graph."""

    flow: Flow
    cluster: Callable[[Node], Sequence[Node]]
    users: Mapping[Value, Sequence[Node]]
    order: Mapping[Node, int]

    def pair(self, node: Node) -> Stages | None:
        """The chain that ends with a contraction, if memory-bound nodes lead from one other contraction to it, and all
        that is made on the way is needed only there."""
        last = tuple(self.cluster(node))
        if _contractions(last) > 1:
            return None
        for operand in node.inputs:
            found = self._between(operand)
            if found is None:
                continue
            first, rows = found
            home = {*first, *rows, *last}
            made = {n.output: n for n in (*first, *rows)}
            inner = all(u in home for v in made for u in self.users.get(v, ()))
            whole = not any(v in self.flow.graph.outputs for v in made)
            if inner and whole and node not in first:
                return Stages((first, rows, last))
        return None

    def single(self, node: Node) -> Iterator[Stages]:
        """Chains of one contraction with rows before it, behind it, or both: the longest first."""
        heavy = tuple(self.cluster(node))
        if _contractions(heavy) > 1:
            return
        behind = self._behind(heavy)
        for operand in node.inputs:
            before = self._before(operand, heavy)
            if before and behind:
                yield Stages((before, heavy, behind))
            if before:
                yield Stages((before, heavy))
        if behind:
            yield Stages((heavy, behind))

    def _is_free(self, n: Node) -> bool:
        """Memory-bound, and in no cluster yet."""
        kind = PRIMITIVES[n.prim].kind
        return self.flow.is_computed(n) and len(self.cluster(n)) == 1 and kind in ("elementwise", "reduction")

    def _between(self, operand: Value) -> tuple[tuple[Node, ...], tuple[Node, ...]] | None:
        """The one contraction's cluster behind an operand, and the nodes that lead from there to it."""
        leads: dict[Node, bool] = {}
        heads: dict[Node, tuple[Node, ...]] = {}

        def visit(n: Node) -> bool:
            if n in leads:
                return leads[n]
            leads[n] = False
            if not self.flow.is_computed(n) or len(leads) > MOST:
                return False
            mine = self.cluster(n)
            head = next((m for m in mine if m.prim == "contract"), None)
            if _contractions(mine) > 1:  # a chain already: what it makes is in memory
                return False
            if head is not None:
                heads[head] = tuple(mine)
                leads[n] = True
                return True
            if not self._is_free(n):
                return False
            found = [visit(p) for p in self._makers(n)]
            leads[n] = any(found)
            return leads[n]

        starts = [p for e in self.flow.edges(operand) if (p := self.flow.producer.get(e.value)) is not None]
        if len(starts) != 1 or not visit(starts[0]) or len(heads) != 1 or len(leads) > MOST:
            return None
        (first,) = heads.values()
        rows = tuple(n for n in leads if leads[n] and n not in first)
        return (first, rows) if _reduces(rows) else None

    def _makers(self, n: Node) -> list[Node]:
        return [p for e in self.flow.reads(n) if (p := self.flow.producer.get(e.value)) is not None]

    def _before(self, operand: Value, heavy: Sequence[Node]) -> tuple[Node, ...]:
        """The free nodes that an operand is made by, and that make nothing else."""
        stack = [p for e in self.flow.edges(operand) if (p := self.flow.producer.get(e.value)) is not None]
        found: dict[Node, None] = {}
        while stack:
            n = stack.pop()
            if n not in found and self._is_free(n):
                found[n] = None
                stack += self._makers(n)
            if len(found) > MOST:
                return ()
        while True:
            home = {*found, *heavy}
            shared = [
                n for n in found
                if n.output in self.flow.graph.outputs or any(u not in home for u in self.users.get(n.output, ()))
            ]  # fmt: skip
            if not shared:
                break
            for n in shared:
                del found[n]
        return tuple(found) if _reduces(tuple(found)) else ()

    def _behind(self, heavy: Sequence[Node]) -> tuple[Node, ...]:
        """The free nodes that need what a contraction makes, and otherwise only what was there before."""
        first = min(self.order[n] for n in heavy)
        found: dict[Node, None] = {}
        home = set(heavy)
        stack = [u for n in heavy for u in self.users.get(n.output, ()) if u not in home]
        for n in sorted(dict.fromkeys(stack), key=self.order.__getitem__):
            self._follow(n, home, found, first)
        return tuple(found) if _reduces(tuple(found)) else ()

    def _follow(self, start: Node, home: set[Node], found: dict[Node, None], first: int) -> None:
        waiting = [start]
        while waiting and len(found) <= MOST:
            n = waiting.pop(0)
            if n in home or not self._is_free(n):
                continue
            others = [p for p in self._makers(n) if p not in home and self.flow.is_computed(p)]
            if all(self.order[p] < first for p in others):
                home.add(n)
                found[n] = None
                waiting += sorted(self.users.get(n.output, ()), key=self.order.__getitem__)


def _contractions(nodes: Sequence[Node]) -> int:
    return sum(n.prim == "contract" for n in nodes)


def _reduces(nodes: Collection[Node]) -> bool:
    return any(PRIMITIVES[n.prim].kind == "reduction" for n in nodes)
