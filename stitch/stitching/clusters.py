"""Clusters: sets of computed nodes that become one kernel each, grown over the graph without making a cycle.

Contractions go first: each takes the elementwise nodes behind it that see its result one to one (its epilogue); two of
them with work on rows between, and one with such work before or behind it, become a chain. Then the memory-bound nodes
grow together along data flow, whatever they are. A cluster may grow only if no path leaves it and comes back, for then
neither side could run first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from stitch import access
from stitch.graph import Node, Value
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching.schedule import Kernel
from stitch.stitching.stages import Stages, Surroundings
from stitch.stitching.trace import Blocked, Flow, domain, trace


class Clusters:
    """A partition of the computed nodes under merging; answers whether a merge would close a cycle."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.nodes = [n for n in flow.graph.nodes if flow.is_computed(n)]
        self.order = {n: k for k, n in enumerate(self.nodes)}
        self.of = {n: k for k, n in enumerate(self.nodes)}
        self.members: dict[int, list[Node]] = {k: [n] for k, n in enumerate(self.nodes)}
        self.before: dict[int, set[int]] = {k: set() for k in self.members}
        self.after: dict[int, set[int]] = {k: set() for k in self.members}
        self.users: dict[Value, list[Node]] = {}
        self.chains: dict[int, Kernel] = {}
        for n in self.nodes:
            for e in flow.reads(n):
                self.users.setdefault(e.value, []).append(n)
                p = flow.producer.get(e.value)
                if p is not None and p in self.order:
                    self.before[self.of[n]].add(self.of[p])
                    self.after[self.of[p]].add(self.of[n])

    def can_merge(self, *some: int) -> bool:
        """No path from one to another of these through a cluster that is not one of them."""
        return len(set(some)) > 1 and not any(self._detour(k, set(some)) for k in some)

    def _detour(self, start: int, goals: Collection[int]) -> bool:
        """A path from `start` to another of the goals through a cluster that is none. It is looked for from both ends
        in turn, as there may be little at one of them: so a chain of n nodes takes no n * n steps."""
        stacks = [
            [k for k in self.after[start] if k not in goals],
            [k for goal in goals if goal != start for k in self.before[goal] if k not in goals],
        ]
        seen = [set(stack) for stack in stacks]
        if seen[0] & seen[1]:
            return True
        while stacks[0] and stacks[1]:
            for side, ways in enumerate((self.after, self.before)):
                for j in ways[stacks[side].pop()] if stacks[side] else ():
                    if j in seen[1 - side]:
                        return True
                    if j not in seen[side] and j not in goals:
                        seen[side].add(j)
                        stacks[side].append(j)
        return False

    def merge(self, a: int, b: int) -> int:
        """Puts b's nodes into a."""
        for n in self.members.pop(b):
            self.of[n] = a
            self.members[a].append(n)
        for k in self.before.pop(b):
            self.after[k].discard(b)
            if k != a:
                self.after[k].add(a)
                self.before[a].add(k)
        for k in self.after.pop(b):
            self.before[k].discard(b)
            if k != a:
                self.before[k].add(a)
                self.after[a].add(k)
        self.before[a].discard(b)
        self.after[a].discard(b)
        return a

    def release(self, node: Node) -> None:
        """Takes a node that no other one of its cluster reads out of it."""
        home, own = self.of[node], self.order[node]
        self.members[home].remove(node)
        self.members[own], self.of[node] = [node], own
        for j in self.before[home]:
            self.after[j].discard(home)
        for j in self.after[home]:
            self.before[j].discard(home)
        self.before[own], self.after[own] = set(), set()
        for k in (home, own):
            nodes = self.members[k]
            makers = (self.flow.producer.get(e.value) for n in nodes for e in self.flow.reads(n))
            self.before[k] = {self.of[p] for p in makers if p is not None and p in self.order} - {k}
            self.after[k] = {self.of[u] for n in nodes for v in n.outputs for u in self.users.get(v, ())} - {k}
            for j in self.before[k]:
                self.after[j].add(k)
            for j in self.after[k]:
                self.before[j].add(k)

    def sorted(self) -> list[list[Node]]:
        """The clusters in an order in which they can run, each with its nodes in graph order."""
        done: set[int] = set()
        out: list[list[Node]] = []

        waiting = sorted(self.members, key=lambda k: min(self.order[n] for n in self.members[k]))
        while waiting:
            rest = []
            for k in waiting:
                if self.before[k] <= done:
                    done.add(k)
                    out.append(sorted(self.members[k], key=self.order.__getitem__))
                else:
                    rest.append(k)
            assert len(rest) < len(waiting), "the clusters form a cycle"
            waiting = rest
        return out


def grow(
    flow: Flow,
    memory_bound: bool = True,
    epilogues: bool = True,
    chained: Callable[[Clusters, Stages], Kernel | None] = lambda *_: None,
) -> Clusters:
    """The clusters of a graph. With `memory_bound` false every memory-bound node stays alone (for ablation). `chained`:
    the kernel of a chain, if it is to be one."""
    clusters = Clusters(flow)
    heavy_nodes = [n for n in clusters.nodes if n.prim == "contract"]
    if epilogues:
        for n in heavy_nodes:
            _absorb(clusters, n)
            _shed(clusters, n)
    around = Surroundings(flow, lambda m: clusters.members[clusters.of[m]], clusters.users, clusters.order)
    for n in heavy_nodes:
        pair = around.pair(n)
        if pair is not None:
            _chain(clusters, pair, chained)
    for n in heavy_nodes:
        any(_chain(clusters, found, chained) for found in around.single(n))
    if memory_bound:
        heavy = {clusters.of[n] for n in clusters.nodes if n.prim in ("contract", "scatter", "host")}
        for n in clusters.nodes:
            if clusters.of[n] in heavy:
                continue
            for e in flow.reads(n):
                p = flow.producer.get(e.value)
                if p is None or p not in clusters.of or clusters.of[p] in heavy:
                    continue
                if clusters.can_merge(clusters.of[p], clusters.of[n]):
                    clusters.merge(clusters.of[p], clusters.of[n])
    return clusters


def _chain(clusters: Clusters, found: Stages, chained: Callable[[Clusters, Stages], Kernel | None]) -> bool:
    """Makes one cluster of the stages, if they are to be a chain."""
    homes = dict.fromkeys(clusters.of[m] for m in found.nodes)
    if not clusters.can_merge(*homes) or (kernel := chained(clusters, found)) is None:
        return False
    home, *others = homes
    for k in others:
        clusters.merge(home, k)
    clusters.chains[home] = kernel
    return True


def _absorb(clusters: Clusters, contract: Node) -> None:
    """Grows a contraction's cluster by elementwise nodes in the same domain."""
    flow = clusters.flow
    home = clusters.of[contract]
    inside = {contract.output}
    tried: set[Node] = set()
    while True:
        users = [n for k in sorted(clusters.after[home]) for n in clusters.members[k] if n not in tried]
        for n in sorted(users, key=clusters.order.__getitem__):
            tried.add(n)
            alone = len(clusters.members[clusters.of[n]]) == 1
            fits = alone and PRIMITIVES[n.prim].kind == "elementwise" and _one_to_one(flow, n, inside, contract.output)
            if fits and clusters.can_merge(home, clusters.of[n]):
                clusters.merge(home, clusters.of[n])
                inside.add(n.output)
                break
        else:
            return


def _shed(clusters: Clusters, contract: Node) -> None:
    """Leaves to its readers what they can make of one operand that they get anyway.

    Before: h and h * h are stored, and read by the norm behind; after: only h is."""
    flow, home = clusters.flow, clusters.of[contract]

    def away(v: Value) -> list[Node]:
        return [u for u in clusters.users.get(v, ()) if clusters.of[u] != home]

    found = True
    while found:
        found = False
        for n in [m for m in clusters.members[home] if m is not contract]:
            readers = clusters.users.get(n.output, ())
            if n.output in flow.graph.outputs or not readers or len(away(n.output)) < len(readers):
                continue
            if any(
                u.prim == "contract" or PRIMITIVES[u.prim].kind not in ("elementwise", "reduction") for u in readers
            ):
                continue
            large = {e.value for e in flow.reads(n) if e.value.size == n.output.size}
            if len(large) == 1 and all(v in flow.graph.outputs or away(v) for v in large):
                clusters.release(n)
                found = True


def _one_to_one(flow: Flow, node: Node, inside: Iterable[Value], result: Value) -> bool:
    """True if every element of `node` needs exactly the same element of each value of `inside` that it reads: the same
    in row-major order, for a reshape may lie between."""
    held = set(inside)
    points = tuple(access.of(a) for a in domain(result))

    def place(v: Value) -> tuple[access.Index, ...]:
        return access.through_reshape(v.shape, result.shape, points)

    def stop(v: Value) -> bool:
        return not (flow.is_movement(v) or flow.kind(v) == "source")

    try:
        seen = trace(flow, [(node.output, place(node.output))], stop, lambda v: v not in held and stop(v))
        mine = [a for a in seen.accesses if a.value in held]
        return bool(mine) and all(not a.linear and a.at == place(a.value) for a in mine)
    except (access.NeedsSplit, access.NotAffine, Blocked):
        return False
