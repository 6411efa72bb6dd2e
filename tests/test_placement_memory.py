"""Placement within limits of memory, and operators split over devices."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stitch.errors import MemoryLimit, NoDevice
from stitch.placement import latency, memory, split
from stitch.placement.problem import INPUT, Device, Item, Link, Problem, Value, assignment_seconds
from stitch.placement.split import Kind, Operator, Split
from tests.placements import assignments, problems


def fits(problem: Problem, devices: tuple[int, ...], limits: list[float]) -> bool:
    return all(size <= limit for size, limit in zip(memory.peaks(problem, devices), limits, strict=True))


def excess(problem: Problem, devices: tuple[int, ...], limits: list[float]) -> float:
    return max(p / max(limit, 1) for p, limit in zip(memory.peaks(problem, devices), limits, strict=True))


@given(problems(items=5, cores=1), st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_the_fastest_that_fits(problem: Problem, sizes: list[int]) -> None:
    limits: list[float] = [*map(float, sizes[: len(problem.devices)])]
    times = {a: assignment_seconds(problem, a) for a in assignments(problem)}
    fitting = [t for a, t in times.items() if math.isfinite(t) and fits(problem, a, limits)]
    if fitting:
        found = memory.place(problem, limits)
        assert found.exact
        assert found.peak == memory.peaks(problem, found.devices)
        assert fits(problem, found.devices, limits)
        assert found.seconds == pytest.approx(min(fitting), rel=1e-9, abs=1e-9)
        return
    with pytest.raises(MemoryLimit) as caught:
        memory.place(problem, limits)
    assert caught.value.exact
    least = min(excess(problem, a, limits) for a, t in times.items() if math.isfinite(t))
    named = [float(caught.value.smallest[d.name]) for d in problem.devices]
    assert max(n / max(limit, 1) for n, limit in zip(named, limits, strict=True)) <= least * (1 + 1e-12)
    assert fits(problem, memory.place(problem, named).devices, named)


@settings(max_examples=50)
@given(problems(items=7, devices=(2, 2), cores=1), st.integers(1, 60), st.integers(1, 60))
def test_too_few_labels_never_break_a_limit(problem: Problem, first: int, second: int) -> None:
    limits = [float(first), float(second)]
    try:
        found = memory.place(problem, limits, labels=2)
    except MemoryLimit as error:
        named = [float(error.smallest[d.name]) for d in problem.devices]
        assert fits(problem, memory.place(problem, named, labels=2).devices, named)
        return
    assert fits(problem, found.devices, limits)
    best = memory.place(problem, limits, labels=100_000)
    assert best.exact
    assert found.seconds >= best.seconds - 1e-9
    if found.exact:
        assert found.seconds == pytest.approx(best.seconds)


def test_peaks_by_hand() -> None:
    """Weights are always there; a value from when it is made, or sent, until nobody needs it."""
    items = (Item("a", ((1.0,), (1.0,)), 100, 7), Item("b", ((1.0,), (1.0,)), 200), Item("c", ((1.0,), (1.0,)), 400))
    values = (Value("x", INPUT, (0,), 1), Value("y", 0, (1,), 10), Value("z", 1, (2,), 20), Value("r", 2, (), 40, True))
    problem = Problem(items, (Device("p"), Device("q")), values)
    assert memory.peaks(problem, (0, 0, 0)) == (700 + 60, 0)
    assert memory.peaks(problem, (0, 1, 1)) == (100 + 40, 600 + 60)
    assert memory.peaks(problem, (1, 0, 1)) == (200 + 40, 500 + 60)


def test_the_message_names_the_limit() -> None:
    problem = Problem((Item("a", ((1.0,),), 100, 7),), (Device("cpu:0"),))
    with pytest.raises(MemoryLimit, match=r"bytes 50 for 'cpu:0'; the smallest bytes that do are 107 for 'cpu:0'"):
        memory.place(problem, [50])
    assert memory.place(problem, [107]).peak == (107,)
    assert memory.place(problem, [math.inf]) == memory.place(problem, [1e9])


def test_a_limit_moves_weights_to_a_slower_device() -> None:
    items = tuple(Item(f"i{k}", ((1.0,), (3.0,)), 100) for k in range(4))
    problem = Problem(items, (Device("fast"), Device("slow")))
    assert latency.place(problem).devices == (0, 0, 0, 0)
    found = memory.place(problem, [250, math.inf])
    assert (found.seconds, found.peak, found.exact) == (8.0, (200, 200), True)


@pytest.mark.parametrize("limits", [[1.0], [1.0, -1.0], [1.0, math.nan]])
def test_limits_make_sense(limits: list[float]) -> None:
    problem = Problem((), (Device("a"), Device("b")))
    with pytest.raises(ValueError, match="each device has a limit"):
        memory.place(problem, limits)


# ------------------------------------------------------------------ one operator


@st.composite
def operators(draw: st.DrawFn) -> tuple[Operator, int]:
    count = draw(st.integers(1, 3))
    kinds: st.SearchStrategy[Kind] = st.sampled_from(("contraction", "convolution", "rowwise"))
    tile = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = st.integers(0, 50)
    seconds = tuple(draw(st.one_of(st.integers(0, 40).map(float), st.just(math.inf))) for _ in range(count))
    operator = Operator(
        draw(kinds), tile[0] * draw(st.integers(1, 5)), tile[1] * draw(st.integers(1, 5)), seconds, draw(sizes),
        draw(sizes), draw(sizes), tile, draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans()),
    )  # fmt: skip
    return operator, count


def every_split(operator: Operator, links: tuple[tuple[Link, ...], ...], home: int, start: float) -> float:
    """The least time over all ways and all numbers of tiles."""
    costs = split._Costs(operator, links, home, start)
    able = [d for d, s in enumerate(operator.seconds) if math.isfinite(s)]
    best = math.inf
    ways = [("rows", operator.rows, operator.tile[0])]
    ways += [] if operator.kind == "rowwise" else [("columns", operator.columns, operator.tile[1])]
    for way, extent, tile in ways:
        tiles = extent // tile
        for given_tiles in product(range(tiles + 1), repeat=len(able)):
            if sum(given_tiles) == tiles and (way == "rows" or max(given_tiles) < tiles):
                took = [costs.of(way, d, n * tile) for d, n in zip(able, given_tiles, strict=True) if n]  # type: ignore[arg-type]
                best = min(best, max(took))
    return best


@given(operators(), st.integers(0, 5), st.data())
def test_splits_are_the_best_of_all(given_operator: tuple[Operator, int], start: int, data: st.DataObject) -> None:
    operator, count = given_operator
    assume(any(math.isfinite(s) for s in operator.seconds))
    places = range(count)
    links = tuple(tuple(Link() if a == b else Link(data.draw(st.integers(0, 3)), 10.0) for b in places) for a in places)
    home = data.draw(st.integers(0, count - 1))
    found = split.choose(operator, [Device(f"d{d}") for d in range(count)], links, home, float(start))
    assert found.seconds == pytest.approx(every_split(operator, links, home, float(start)))
    check(operator, found)


def check(operator: Operator, found: Split) -> None:
    """Shares are whole tiles, one behind the other, and cover everything."""
    extent, tile = (operator.columns, operator.tile[1]) if found.way == "columns" else (operator.rows, operator.tile[0])
    assert [s.begin for s in found.shares] == [0, *(s.end for s in found.shares[:-1])]
    assert found.shares[-1].end == extent
    assert all(s.begin % tile == 0 and s.begin < s.end for s in found.shares)
    assert found.seconds == max(s.seconds for s in found.shares)
    assert (found.way == "whole") == (len(found.shares) == 1)
    assert all(seconds >= found.seconds for _, seconds in found.others)


TWO = [Device("big"), Device("little")]


def test_shares_follow_speed() -> None:
    found = split.choose(Operator("contraction", 1, 90, (1.0, 2.0)), TWO)
    assert found.way == "columns"
    assert [s.end - s.begin for s in found.shares] == [60, 30]
    assert found.seconds == pytest.approx(2 / 3)


def test_whole_tiles() -> None:
    found = split.choose(Operator("contraction", 90, 1, (1.0, 2.0), tile=(16, 16)), TWO)
    assert [s.end - s.begin for s in found.shares] == [64, 26]


def test_what_starting_costs_decides_whether_to_split() -> None:
    small = Operator("contraction", 64, 64, (1e-5, 1e-5))
    assert split.choose(small, TWO, start=1e-5).way == "whole"
    assert split.choose(small, TWO, start=1e-6).way != "whole"


def test_halos_favour_columns_and_large_inputs_rows() -> None:
    links = ((Link(), Link(0.0, 1e6)), (Link(0.0, 1e6), Link()))
    image = Operator("convolution", 64, 64, (1.0, 1.0), input=400_000, weights=10_000, window=3)
    assert split.choose(image, TWO, links).way == "rows"  # half of the input and a row, rather than all of it
    tall = Operator("convolution", 4, 64, (1.0, 1.0), input=400_000, weights=10_000, window=40)
    assert split.choose(tall, TWO, links).way == "columns"  # the halo is nearly everything, and four rows are few


def test_weights_that_are_values_must_be_sent() -> None:
    links = ((Link(), Link(0.0, 1e6)), (Link(0.0, 1e6), Link()))
    constant = Operator("contraction", 64, 64, (1.0, 1.0), weights=900_000)
    moving = Operator("contraction", 64, 64, (1.0, 1.0), weights=900_000, moving=True)
    assert split.choose(constant, TWO, links).seconds == 0.5
    assert split.choose(moving, TWO, links).seconds > 0.6


def test_rowwise_operators_keep_their_rows() -> None:
    found = split.choose(Operator("rowwise", 8, 1000, (1.0, 1.0)), TWO)
    assert found.way == "rows"
    assert "columns" not in dict(found.others)
    with pytest.raises(NoDevice, match="'rowwise' can run on none"):
        split.choose(Operator("rowwise", 8, 8, (math.inf, math.inf)), TWO)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"window": 0}, {"input": -1}, {"seconds": (math.nan,)}])
def test_operators_make_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must not be below zero|of at least one"):
        Operator(**{"kind": "contraction", "rows": 1, "columns": 1, "seconds": (1.0,)} | wrong)  # type: ignore[arg-type]
