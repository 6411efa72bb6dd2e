"""Throughput: consecutive stages on sets of cores, so that the slowest stage takes as little as possible. Exact.

A stage has any number of cores of one device, each core belongs to one stage, and devices may stay unused or be used
again further down the pipeline. The search is a bisection over the bottleneck T, with dynamic programming telling
whether T can be kept:

    reach[used, d, e][j]   whether the first j items can be stages within T that use `used` cores of each device, the
                           last of them on d, when the next one is going to be on e (which decides its transfer out)

From there a stage of k cores of e ends at j' if in(d, e, j) + sum(j..j') + out(e, f, j') <= T for some j < j'. With
prefix sums S that asks for the smallest in(d, e, j) - S[j] below j': one running minimum over all j' at once. So a
step costs O(items), not O(items^2), and a thousand items on 4 + 4 cores take a fraction of a second. Each bottleneck
that can be kept is replaced by what its pipeline really takes, and the search ends when nothing is between the two
bounds: the result is the optimum to the rounding of the sums.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from stitch.errors import NoDevice, PlacementError
from stitch.placement.problem import Array, Pipeline, Problem, Stage, stage_seconds

Used = tuple[int, ...]
Reach = dict[tuple[Used, int, int], np.ndarray[Any, np.dtype[np.bool_]]]
START = -1  # for the device before the first stage
END = -1  # and behind the last
ROUNDING = 1e-12
ROUNDS = 200  # of bisection: each halves the interval, so that floats run out of numbers between long before


def place(problem: Problem, slack: float = 0.0) -> Pipeline:
    """The pipeline with the highest throughput; or, of those whose bottleneck is at most 1 + `slack` times as long as
    that one's, a pipeline of the fewest stages: in long stages, errors of predicted times average out.

    Raises PlacementError."""
    if not slack >= 0:
        raise ValueError("slack must not be below zero")
    if not problem.items:
        return Pipeline((), (), True)
    for item in problem.items:
        if all(math.isinf(time) for times in item.seconds for time in times):
            raise NoDevice(item.name, devices=[d.name for d in problem.devices])
    search = _Search(problem)
    best = search.within(sys.float_info.max)
    if best is None:
        raise _stuck(problem)
    seconds = stage_seconds(problem, best)
    low, high = 0.0, max(seconds)
    for _ in range(ROUNDS):
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        found = search.within(middle)
        if found is None:
            low = middle
            continue
        best, seconds = found, stage_seconds(problem, found)
        if max(seconds) >= high:  # the same pipeline again, its time summed in another order
            break
        high = max(seconds)
    least = max(seconds)
    fewest = search.fewest(least * (1 + slack))
    if fewest is not None:  # without slack there may be none, for a sum that rounds otherwise
        best, seconds = fewest, stage_seconds(problem, fewest)
    return Pipeline(best, seconds, max(seconds) <= least * (1 + ROUNDING))


@dataclass(frozen=True)
class _Costs:
    """Of a device with a number of cores: prefix sums, and a number for each j that rises where an item cannot run."""

    sums: Array
    barred: Array
    blocked: bool


class _Search:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.count = len(problem.items)
        self.cores = [device.cores for device in problem.devices]
        self.devices = range(len(self.cores))
        self.costs = [
            [_Costs(s, b, bool(b[-1])) for s, b in zip(problem.sums[d], problem.barred[d], strict=True)]
            for d in self.devices
        ]
        self.borders = {(d, e): self.handing(d, e) for d in (START, *self.devices) for e in (END, *self.devices)}
        finite = [float(c.sums[-1]) for row in self.costs for c in row]
        transfers = [b[np.isfinite(b)].max(initial=0.0) for b in self.borders.values()]
        self.range = 4 * (max(finite) + max(transfers)) + 1e-300  # more than any two running minima are apart

    def handing(self, source: int, destination: int) -> Array:
        """Seconds for each border; behind the last item nothing is handed on, and no stage follows."""
        out = np.full(self.count + 1, math.inf)
        if source == START:
            out[0] = 0.0
        elif destination == END:
            out[self.count] = 0.0
        else:
            link = self.problem.link(source, destination)
            out[1:-1] = link.latency + self.problem.crossing[1:-1] / link.bandwidth
        return out

    def uses(self) -> list[Used]:
        """Numbers of cores in use, such that a stage only leads to a later one."""
        return sorted(product(*(range(n + 1) for n in self.cores)), key=sum)

    def within(self, limit: float) -> tuple[Stage, ...] | None:
        """Stages that take at most `limit` each, or None if there are none."""
        reach = self.begin()
        for used in self.uses():
            if sum(used) and any((used, d, END) in reach for d in self.devices):
                return self.backwards([reach] * (sum(used) + 1), used, limit)
            for e in self.devices:
                self.spread(reach, reach, used, e, limit)
        return None

    def fewest(self, limit: float) -> tuple[Stage, ...] | None:
        """The same with as few stages as can be: one `reach` for each number of stages."""
        layers = [self.begin()]
        while layers[-1]:
            following: Reach = {}
            for used, e in dict.fromkeys((used, e) for used, _, e in layers[-1] if e != END):
                self.spread(layers[-1], following, used, e, limit)
            layers.append(following)
            ends = [used for used, _, e in following if e == END]
            if ends:
                return self.backwards(layers, min(ends, key=lambda used: (sum(used), used)), limit)
        return None

    def begin(self) -> Reach:
        nothing = tuple(0 for _ in self.cores)
        begin = np.zeros(self.count + 1, np.bool_)
        begin[0] = True
        return {(nothing, START, e): begin for e in self.devices}

    def spread(self, reach: Reach, following: Reach, used: Used, e: int, limit: float) -> None:
        """Adds to `following` where stages on e, of any number of cores, end that begin where `reach` says."""
        entry = self.entry(reach, used, e) if used[e] < self.cores[e] else None
        if entry is not None:
            for k in range(1, self.cores[e] - used[e] + 1):
                self.extend(following, used, e, k, entry, limit)

    def entry(self, reach: Reach, used: Used, e: int) -> Array | None:
        """For each j the least seconds of transfer into a stage on e that begins there; None if none can."""
        arrays = [
            np.where(reached, self.borders[d, e], math.inf)
            for d in (START, *self.devices)
            if (reached := reach.get((used, d, e))) is not None
        ]
        return np.minimum.reduce(arrays) if arrays else None

    def extend(self, reach: Reach, used: Used, e: int, k: int, entry: Array, limit: float) -> None:
        total = self.totals(e, k, entry)
        after = tuple(n + k if d == e else n for d, n in enumerate(used))
        for f in (END, *self.devices):
            if f != END and after[f] == self.cores[f]:
                continue
            new = total + self.borders[e, f] <= limit
            if new.any():
                old = reach.get((after, e, f))
                reach[after, e, f] = new if old is None else old | new

    def totals(self, e: int, k: int, entry: Array) -> Array:
        """For each j' the least seconds of a stage that ends there, without its transfer out."""
        cost = self.costs[e][k - 1]
        running = np.minimum.accumulate(self.ahead(cost, entry))[:-1]
        out = np.full(self.count + 1, math.inf)
        out[1:] = self.behind(cost, running, slice(1, None)) + cost.sums[1:]
        if cost.blocked:  # nothing but minima from before an item that cannot run
            out[1:][out[1:] - cost.sums[1:] > self.range / 2] = math.inf
        return out

    def ahead(self, cost: _Costs, entry: Array) -> Array:
        """What a stage takes that begins at j, less the sum to its end. Behind each item that cannot run, numbers are
        smaller by more than any two differ, so that a minimum reaches back over it only where there is no other."""
        return entry - cost.sums - self.range * cost.barred if cost.blocked else entry - cost.sums

    def behind(self, cost: _Costs, ahead: Array, at: int | slice) -> Array:
        return ahead + self.range * cost.barred[at] if cost.blocked else ahead

    def backwards(self, layers: Sequence[Reach], used: Used, limit: float) -> tuple[Stage, ...]:
        """The stages of a pipeline that the last of `layers` says is there, found from its end; each begins where the
        layer before says."""
        stages: list[Stage] = []
        d = next(d for d in self.devices if (used, d, END) in layers[-1])
        at, following = self.count, END
        while at > 0:
            reach = layers[-2 - len(stages)]
            begin, cores, before = next(self.before(reach, used, d, at, following, limit))
            stages.append(Stage(d, cores, begin, at))
            used = tuple(n - cores if e == d else n for e, n in enumerate(used))
            at, d, following = begin, before, d
        return tuple(reversed(stages))

    def before(
        self, reach: Reach, used: Used, d: int, at: int, following: int, limit: float
    ) -> Iterator[tuple[int, int, int]]:
        """Where a stage on d that ends at `at` may begin, its cores, and the device before it. The sums are those of
        `totals`, in the same order: what was found there is found here."""
        for cores in range(1, used[d] + 1):
            earlier = tuple(n - cores if e == d else n for e, n in enumerate(used))
            cost = self.costs[d][cores - 1]
            for before in (START, *self.devices):
                reached = reach.get((earlier, before, d))
                if reached is None:
                    continue
                ahead = self.ahead(cost, self.borders[before, d])
                took = self.behind(cost, ahead, at) + cost.sums[at] + self.borders[d, following][at]
                fits = reached & (cost.barred == cost.barred[at]) & (took <= limit)
                for begin in np.flatnonzero(fits[:at]).tolist():
                    yield begin, cores, before


def _stuck(problem: Problem) -> PlacementError:
    """Why no pipeline holds all items: each can run somewhere, but there are too few cores for so many changes."""
    names = ", ".join(f"{d.name!r} ({d.cores})" for d in problem.devices)
    return PlacementError(
        f"no pipeline runs all items, since devices would have to change more often than there are cores: {names}",
        "let items run on more devices, or place for latency",
    )
