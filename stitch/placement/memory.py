"""Latency within limits of memory: the fastest assignment whose peak on each device stays below a limit.

A device needs the weights of all its items at all times, and while an item runs, what it holds of the live values, the
results that are being made and, if it is the one that runs, the item's scratch. A device keeps what it has until nobody
needs the value any more.

To the states of `stitch.placement.latency` come labels, since a state alone no longer tells what is best: seconds, the
bytes of weights so far and the largest need so far, for each device. A label stays unless another one of the same state
is no worse in all of these. That is exact; but sums of weights are a knapsack, so there may be too many: then the most
promising are kept, and `exact` is False.

Where nothing fits, the same search without seconds finds by which factor the limits are too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stitch.errors import MemoryLimit
from stitch.placement import latency
from stitch.placement.latency import Lives, Past, Where, unfold
from stitch.placement.problem import INPUT, Placement, Problem, assignment_seconds

LABELS = 512  # after each item
Vector = np.ndarray[Any, np.dtype[np.float64]]


def place(problem: Problem, limits: Sequence[float], labels: int = LABELS) -> Placement:
    """The fastest assignment with at most `limits` bytes on each device (infinite: no limit), and its peaks.

    Raises MemoryLimit, with the smallest limits that do, and NoDevice."""
    if len(limits) != len(problem.devices) or any(not limit >= 0 for limit in limits):
        raise ValueError("each device has a limit, which is not below zero")
    free = latency.place(problem)
    if _fits(peaks(problem, free.devices), limits):
        return _placement(problem, free.devices, free.exact)
    found, exact = _Search(problem, limits, labels, timed=True).run()
    if found is not None and exact:
        return _placement(problem, found, True)
    smallest, proved = _smallest(problem, limits, labels, free.devices)
    candidates = [c for c in (found, smallest) if c is not None and _fits(peaks(problem, c), limits)]
    if candidates:
        best = min(candidates, key=lambda c: assignment_seconds(problem, c))
        return _placement(problem, best, False)
    needed = peaks(problem, smallest)
    factor = _excess(needed, limits)
    raise MemoryLimit(
        limits={d.name: limit for d, limit in zip(problem.devices, limits, strict=True)},
        smallest={
            d.name: max(size, math.floor(factor * limit))
            for d, limit, size in zip(problem.devices, limits, needed, strict=True)
            if math.isfinite(limit)
        },
        exact=proved,
    )


def peaks(problem: Problem, assignment: Sequence[int]) -> tuple[int, ...]:
    """The bytes that each device needs at most."""
    count = len(problem.devices)
    weights = [0] * count
    for item, device in zip(problem.items, assignment, strict=True):
        weights[device] += item.weights
    held: list[set[int]] = [set() for _ in range(count)]
    last = [len(assignment) if v.output else max(v.consumers, default=v.producer) for v in problem.values]
    held[problem.home] = {v for v, x in enumerate(problem.values) if x.producer == INPUT and last[v] > INPUT}
    most = [_bytes(problem, h) for h in held]
    for k, device in enumerate(assignment):
        held[device] |= {*problem.reads[k], *problem.makes[k]}
        for d in range(count):
            most[d] = max(most[d], _bytes(problem, held[d]) + (problem.items[k].scratch if d == device else 0))
            held[d] = {v for v in held[d] if last[v] > k}
    held[problem.home] |= {v for v, value in enumerate(problem.values) if value.output}
    most[problem.home] = max(most[problem.home], _bytes(problem, held[problem.home]))
    return tuple(w + m for w, m in zip(weights, most, strict=True))


def _bytes(problem: Problem, values: set[int]) -> int:
    return sum(problem.values[v].bytes for v in values)


def _fits(sizes: Sequence[float], limits: Sequence[float]) -> bool:
    return all(size <= limit for size, limit in zip(sizes, limits, strict=True))


def _excess(sizes: Sequence[float], limits: Sequence[float]) -> float:
    """The factor by which limits are too small, or less than 1. A limit of 0 counts as a byte."""
    return max(size / max(limit, 1) for size, limit in zip(sizes, limits, strict=True))


def _placement(problem: Problem, devices: tuple[int, ...], exact: bool) -> Placement:
    return Placement(devices, assignment_seconds(problem, devices), exact, peaks(problem, devices))


def _smallest(
    problem: Problem, limits: Sequence[float], labels: int, known: tuple[int, ...]
) -> tuple[tuple[int, ...], bool]:
    """The assignment that exceeds the limits by the smallest factor, and whether that is proved."""
    runs = [all(math.isfinite(i.seconds[d][-1]) for i in problem.items) for d in range(len(problem.devices))]
    candidates = [known, *((d,) * len(problem.items) for d, able in enumerate(runs) if able)]
    best = min(candidates, key=lambda c: _excess(peaks(problem, c), limits))
    bound = _excess(peaks(problem, best), limits)
    below = [bound * max(limit, 1) for limit in limits]
    found, exact = _Search(problem, below, labels, timed=False).run()
    if found is not None and _excess(peaks(problem, found), limits) < bound:
        best = found
    return best, exact


@dataclass(frozen=True, eq=False)
class _Label:
    """`cost`: seconds (0 if they do not count), weights by device, need by device."""

    cost: Vector
    past: Past


class _Search:
    """The fastest assignment within limits or, not `timed`, the one that uses the smallest share of them."""

    def __init__(self, problem: Problem, limits: Sequence[float], labels: int, timed: bool) -> None:
        self.problem = problem
        self.lives = Lives(problem)
        self.count = len(problem.devices)
        self.limits = np.array(limits, np.float64)
        self.labels = labels
        self.timed = timed

    def run(self) -> tuple[tuple[int, ...] | None, bool]:
        """None if nothing fits, which is proved if the second is True."""
        begin = np.zeros(1 + 2 * self.count)
        begin[1 + self.count :] = self.held(0, self.lives.begin)
        front: dict[Where, list[_Label]] = {self.lives.begin: [_Label(begin, None)]}
        exact = True
        for k in range(len(self.problem.items)):
            following: dict[Where, list[_Label]] = {}
            for where, some in front.items():
                self.extend(k, where, some, following)
            front = {where: _undominated(some) for where, some in following.items()}
            if sum(map(len, front.values())) > self.labels:
                exact = False
                front = self.best(front)
        ends = [label for where, some in front.items() for one in some if (label := self.end(where, one)) is not None]
        if not ends:
            return None, exact
        return unfold(min(ends, key=lambda label: self.rank(label.cost)).past), exact

    def extend(self, k: int, where: Where, some: list[_Label], following: dict[Where, list[_Label]]) -> None:
        item, change = self.problem.items[k], self.lives.changes[k]
        sizes = self.problem.values
        for device, after, took in self.lives.steps(k, where):
            during = self.held(k, where)
            for p in change.reads:
                if not where[p] >> device & 1:
                    during[device] += sizes[self.lives.live[k][p]].bytes
            during[device] += item.scratch + sum(sizes[v].bytes for v in self.problem.makes[k])
            for label in some:
                cost = label.cost.copy()
                cost[0] += took if self.timed else 0.0
                cost[1 + device] += item.weights
                np.maximum(cost[1 + self.count :], during, out=cost[1 + self.count :])
                if self.fits(cost):
                    following.setdefault(after, []).append(_Label(cost, (device, label.past)))

    def end(self, where: Where, label: _Label) -> _Label | None:
        """With the outputs at home."""
        cost = label.cost.copy()
        live = self.lives.live[-1]
        extra = [live[p] for p in self.lives.wanted if not where[p] >> self.problem.home & 1]
        need = self.held(len(self.problem.items), where)[self.problem.home]
        at = 1 + self.count + self.problem.home
        cost[at] = max(cost[at], need + sum(self.problem.values[v].bytes for v in extra))
        cost[0] += self.lives.finish(where) if self.timed else 0.0
        return _Label(cost, label.past) if self.fits(cost) else None

    def held(self, k: int, where: Where) -> Vector:
        """Bytes of the values that lie on each device before item k."""
        out = np.zeros(self.count)
        for v, holders in zip(self.lives.live[k], where, strict=True):
            for d in range(self.count):
                out[d] += self.problem.values[v].bytes * (holders >> d & 1)
        return out

    def fits(self, cost: Vector) -> bool:
        return bool((cost[1 : 1 + self.count] + cost[1 + self.count :] <= self.limits).all())

    def rank(self, cost: Vector) -> tuple[float, float]:
        """What is better comes first."""
        share = float(((cost[1 : 1 + self.count] + cost[1 + self.count :]) / np.maximum(self.limits, 1)).max())
        return float(cost[0]), share

    def best(self, front: dict[Where, list[_Label]]) -> dict[Where, list[_Label]]:
        """As many as may stay: half of them the first by time, half by their share of the limits."""
        every = [(where, label, self.rank(label.cost)) for where, some in front.items() for label in some]
        by_time = sorted(range(len(every)), key=lambda k: every[k][2])
        by_share = sorted(range(len(every)), key=lambda k: every[k][2][::-1])
        half = max(1, self.labels // 2)
        kept: dict[Where, list[_Label]] = {}
        for k in dict.fromkeys([*by_time[:half], *by_share[:half]]):
            kept.setdefault(every[k][0], []).append(every[k][1])
        return kept


def _undominated(some: list[_Label]) -> list[_Label]:
    """Those that no other one is as good as in every respect; one of those that are equal."""
    if len(some) == 1:
        return some
    costs = np.array([label.cost for label in some])
    order = np.lexsort(costs.T[::-1])
    costs = costs[order]
    kept: list[int] = []
    front = np.empty_like(costs)
    for k, cost in enumerate(costs):
        if not (front[: len(kept)] <= cost).all(axis=1).any():
            front[len(kept)] = cost
            kept.append(k)
    return [some[order[k]] for k in kept]
