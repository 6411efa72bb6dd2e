"""Latency: a device for each item, so that one input is done as early as can be.

Items run one after another, each on all cores of its device, and a value is sent once to each device that needs it.
For two devices that is a minimum cut (`stitch.placement.cut`). For more, dynamic programming over the items in their
order: all that the future needs to know of the past is on which devices the values that are still needed lie.

    state    for each live value, the set of devices that have it
    cost     the least seconds to get there

In networks few values are live at a time, so states are few; where they are not, only the `states` cheapest are kept (a
beam), and the result says so: `exact` is False then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from stitch.errors import NoDevice
from stitch.placement.cut import cut
from stitch.placement.problem import INPUT, Placement, Problem, assignment_seconds

STATES = 2048
Where = tuple[int, ...]  # for each live value a set of devices, as bits
Past = tuple[int, "Past"] | None  # the device of the item before, and what was before that


def place(problem: Problem, states: int = STATES) -> Placement:
    """The assignment with the shortest time. Raises NoDevice."""
    for item in problem.items:
        if all(math.isinf(times[-1]) for times in item.seconds):
            raise NoDevice(item.name, devices=[d.name for d in problem.devices])
    if len(problem.devices) == 2:
        found = cut(problem)
        assert found is not None
        return Placement(found, assignment_seconds(problem, found), True)
    return search(problem, states)


def search(problem: Problem, states: int = STATES) -> Placement:
    """The same by dynamic programming alone, for any number of devices. Every item can run somewhere."""
    lives = Lives(problem)
    front: dict[Where, tuple[float, Past]] = {lives.begin: (0.0, None)}
    exact = True
    for k in range(len(problem.items)):
        following: dict[Where, tuple[float, Past]] = {}
        for where, (seconds, past) in front.items():
            for device, after, took in lives.steps(k, where):
                known = following.get(after)
                if known is None or seconds + took < known[0]:
                    following[after] = (seconds + took, (device, past))
        if len(following) > states:
            exact = False
            kept = sorted(following.items(), key=lambda pair: (pair[1][0], pair[0]))[:states]
            following = dict(kept)
        front = following
    last = min(front, key=lambda where: (front[where][0] + lives.finish(where), where))
    devices = unfold(front[last][1])
    return Placement(devices, assignment_seconds(problem, devices), exact)


def unfold(past: Past) -> tuple[int, ...]:
    """The devices of all items, first to last."""
    found = []
    while past is not None:
        device, past = past
        found.append(device)
    return tuple(reversed(found))


@dataclass(frozen=True)
class _Step:
    """What an item does to the live values: `reads` and `kept` are positions among those before it."""

    reads: tuple[int, ...]
    kept: tuple[int, ...]
    made: int  # values that it makes and somebody needs


class Lives:
    """Which values are live before each item, and how a state changes."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        count = len(problem.items)
        last = [count if v.output else max(v.consumers, default=INPUT) for v in problem.values]
        live = [v for v, value in enumerate(problem.values) if value.producer == INPUT and last[v] > INPUT]
        self.begin: Where = (1 << problem.home,) * len(live)
        self.changes: list[_Step] = []
        self.live: list[tuple[int, ...]] = [tuple(live)]
        for k in range(count):
            reads = tuple(live.index(v) for v in problem.reads[k])
            kept = tuple(p for p, v in enumerate(live) if last[v] > k)
            made = [v for v in problem.makes[k] if last[v] > k]
            self.changes.append(_Step(reads, kept, len(made)))
            live = [*(live[p] for p in kept), *made]
            self.live.append(tuple(live))
        self.wanted = tuple(p for p, v in enumerate(live) if problem.values[v].output)
        devices = range(len(problem.devices))
        self.hops = [[[problem.link(a, b).seconds(v.bytes) for b in devices] for a in devices] for v in problem.values]

    def fetch(self, value: int, holders: int, device: int) -> float:
        """Seconds until a device has a value, from the nearest that has it."""
        if holders >> device & 1:
            return 0.0
        return min(row[device] for a, row in enumerate(self.hops[value]) if holders >> a & 1)

    def steps(self, k: int, where: Where) -> Iterator[tuple[int, Where, float]]:
        """(device, state afterwards, seconds) for each device that item k can run on."""
        change, live = self.changes[k], self.live[k]
        for device, times in enumerate(self.problem.items[k].seconds):
            took = times[-1]
            if math.isinf(took):
                continue
            now = list(where)
            for p in change.reads:
                took += self.fetch(live[p], now[p], device)
                now[p] |= 1 << device
            yield device, (*(now[p] for p in change.kept), *(1 << device,) * change.made), took

    def finish(self, where: Where) -> float:
        """Seconds until all outputs are at home."""
        live = self.live[-1]
        return math.fsum(self.fetch(live[p], where[p], self.problem.home) for p in self.wanted)
