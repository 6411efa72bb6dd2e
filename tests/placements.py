"""Random problems of placement, and their optima by trying everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

from hypothesis import strategies as st

from stitch.placement.problem import (
    INPUT,
    Device,
    Item,
    Link,
    Problem,
    Stage,
    Value,
    assignment_seconds,
    stage_seconds,
)

SECONDS = st.integers(0, 40).map(lambda n: n / 4)


@st.composite
def problems(
    draw: st.DrawFn, items: int = 6, devices: tuple[int, int] = (1, 3), cores: int = 2, inf: bool = True
) -> Problem:
    """Up to `items` items; times are quarters of seconds, so that sums are exact and ties are common."""
    count = draw(st.integers(1, items))
    sizes = draw(st.lists(st.integers(1, cores), min_size=devices[0], max_size=devices[1]))
    places = range(len(sizes))

    def item(k: int) -> Item:
        able = draw(st.sets(st.sampled_from(places), min_size=1)) if inf else set(places)
        seconds = tuple(tuple(draw(SECONDS) if d in able else math.inf for _ in range(n)) for d, n in enumerate(sizes))
        return Item(f"i{k}", seconds, draw(st.integers(0, 9)), draw(st.integers(0, 9)))

    made = [
        Value(f"v{k}", k, _users(draw, k, count), draw(st.integers(0, 9)), draw(st.booleans())) for k in range(count)
    ]
    given = [
        Value(f"x{k}", INPUT, _users(draw, INPUT, count), draw(st.integers(0, 9)), False)
        for k in range(draw(st.integers(0, 2)))
    ]
    bandwidths = st.sampled_from((0.5, 1.0, 4.0, math.inf))
    links = tuple(tuple(Link() if a == b else Link(draw(SECONDS), draw(bandwidths)) for b in places) for a in places)
    rows = tuple(Device(f"d{d}", n) for d, n in enumerate(sizes))
    every = tuple(item(k) for k in range(count))
    return Problem(every, rows, (*given, *made), links, draw(st.sampled_from(places)))


def _users(draw: Any, producer: int, count: int) -> tuple[int, ...]:
    later = range(producer + 1, count)
    return tuple(sorted(draw(st.sets(st.sampled_from(later), max_size=3)))) if later else ()


def pipelines(problem: Problem) -> Iterator[tuple[Stage, ...]]:
    """All of them: cuts, and for each stage a device and cores, with no core used twice."""
    count = len(problem.items)
    choices = [(d, k) for d, device in enumerate(problem.devices) for k in range(1, device.cores + 1)]
    for length in range(1, min(count, sum(d.cores for d in problem.devices)) + 1):
        for cuts in combinations(range(1, count), length - 1):
            borders = (0, *cuts, count)
            for sets in product(choices, repeat=length):
                used = [sum(k for e, k in sets if e == d) for d in range(len(problem.devices))]
                if all(n <= device.cores for n, device in zip(used, problem.devices, strict=True)):
                    yield tuple(Stage(d, k, borders[s], borders[s + 1]) for s, (d, k) in enumerate(sets))


def best_bottleneck(problem: Problem) -> float:
    return min((max(stage_seconds(problem, stages)) for stages in pipelines(problem)), default=math.inf)


def assignments(problem: Problem) -> Iterator[tuple[int, ...]]:
    yield from product(range(len(problem.devices)), repeat=len(problem.items))


def best_seconds(problem: Problem) -> float:
    return min(assignment_seconds(problem, a) for a in assignments(problem))
