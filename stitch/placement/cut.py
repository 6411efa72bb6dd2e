"""The least-time assignment to two devices as a minimum cut, exact in polynomial time.

Each item is a node; those on the source's side of the cut run on device 0, the others on device 1. An item's time on a
device is the capacity of the edge that is cut then, and two more nodes for each value count its transfer once, however
many items use it there:

    producer -> across -> users     `across` is cut off its producer if any user is on device 1:  capacity 0 to 1
    users -> back -> producer       and the other way round

Capacities are whole numbers, a fixed part of the largest time, so that the flow (Dinic's algorithm) ends and is exact;
what is rounded is below a billionth of the whole.
"""

from __future__ import annotations

import math
from collections import deque

from stitch.placement.problem import INPUT, Problem

UNITS = 1 << 50  # that the sum of all finite times and transfers is divided into


def cut(problem: Problem) -> tuple[int, ...] | None:
    """Devices 0 and 1 for the items of a problem with two devices; None if one can run on neither."""
    assert len(problem.devices) == 2
    count = len(problem.items)
    network = _Network(count + 2 + 2 * len(problem.values))
    source, sink = count, count + 1  # the sides of device 0 and of device 1
    home = (source, sink)[problem.home]
    times = [(item.seconds[0][-1], item.seconds[1][-1]) for item in problem.items]
    if any(math.isinf(a) and math.isinf(b) for a, b in times):
        return None
    hops = [
        (problem.link(0, 1).seconds(value.bytes), problem.link(1, 0).seconds(value.bytes)) for value in problem.values
    ]
    whole = math.fsum(x for pair in (*times, *hops) for x in pair if math.isfinite(x))
    scale = UNITS / whole if whole > 0 else 1.0

    def units(seconds: float) -> int:
        return network.unlimited if math.isinf(seconds) else round(seconds * scale)

    for k, (first, second) in enumerate(times):
        network.join(source, k, units(second))
        network.join(k, sink, units(first))
    for v, (value, (there, back)) in enumerate(zip(problem.values, hops, strict=True)):
        users = [*dict.fromkeys(value.consumers), *([home] if value.output else [])]
        producer = home if value.producer == INPUT else value.producer
        across, returning = count + 2 + 2 * v, count + 3 + 2 * v
        network.join(producer, across, units(there))
        network.join(returning, producer, units(back))
        for user in users:
            network.join(across, user, network.unlimited)
            network.join(user, returning, network.unlimited)
    near = network.near_side(source, sink)
    return tuple(0 if k in near else 1 for k in range(count))


class _Network:
    """Edges in pairs: number e and e ^ 1 are the two directions of one."""

    unlimited = UNITS << 12

    def __init__(self, nodes: int) -> None:
        self.edges: list[list[int]] = [[] for _ in range(nodes)]
        self.ends: list[int] = []
        self.room: list[int] = []

    def join(self, a: int, b: int, capacity: int) -> None:
        if a == b or capacity == 0:
            return
        for start, end, room in ((a, b, capacity), (b, a, 0)):
            self.edges[start].append(len(self.ends))
            self.ends.append(end)
            self.room.append(room)

    def near_side(self, source: int, sink: int) -> set[int]:
        """The nodes on the source's side of a minimum cut."""
        while True:
            levels = self.levels(source)
            if sink not in levels:
                return set(levels)
            tried = [0] * len(self.edges)
            while self.push(source, sink, levels, tried):
                pass

    def levels(self, source: int) -> dict[int, int]:
        """How many edges with room each node is away from the source."""
        found = {source: 0}
        waiting = deque([source])
        while waiting:
            a = waiting.popleft()
            for e in self.edges[a]:
                if self.room[e] > 0 and self.ends[e] not in found:
                    found[self.ends[e]] = found[a] + 1
                    waiting.append(self.ends[e])
        return found

    def push(self, source: int, sink: int, levels: dict[int, int], tried: list[int]) -> bool:
        """Sends what fits along one shortest path. `tried`: edges of each node that are known to be dead ends."""
        path: list[int] = []
        a = source
        while a != sink:
            edges = self.edges[a]
            while tried[a] < len(edges):
                e = edges[tried[a]]
                if self.room[e] > 0 and levels.get(self.ends[e]) == levels[a] + 1:
                    break
                tried[a] += 1
            else:
                if not path:
                    return False
                a = self.ends[path.pop() ^ 1]
                tried[a] += 1
                continue
            path.append(e)
            a = self.ends[e]
        amount = min(self.room[e] for e in path)
        for e in path:
            self.room[e] -= amount
            self.room[e ^ 1] += amount
        return True
