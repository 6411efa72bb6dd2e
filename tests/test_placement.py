"""Placement for throughput and for latency: every exact algorithm finds what trying everything finds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stitch.errors import NoDevice, PlacementError
from stitch.placement import latency, pipeit, throughput
from stitch.placement.cut import cut
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
from tests.placements import best_bottleneck, best_seconds, pipelines, problems


def line(times: list[list[float]], cores: list[int], size: int = 0, link: Link | None = None) -> Problem:
    """Items one after another; times[i][d] on one core, shared evenly by more."""
    items = tuple(
        Item(f"i{k}", tuple(tuple(t / n for n in range(1, c + 1)) for t, c in zip(row, cores, strict=True)))
        for k, row in enumerate(times)
    )
    values = tuple(Value(f"v{k}", k, (k + 1,), size) for k in range(len(times) - 1))
    links = tuple(tuple(link for _ in cores) for _ in cores) if link else ()
    return Problem(items, tuple(Device(f"d{d}", c) for d, c in enumerate(cores)), values, links)


# ------------------------------------------------------------------ throughput


@given(problems(items=5, devices=(1, 2), cores=2))
def test_pipelines_are_the_best_of_all(problem: Problem) -> None:
    best = best_bottleneck(problem)
    if math.isinf(best):
        with pytest.raises(PlacementError):
            throughput.place(problem)
        return
    found = throughput.place(problem)
    assert found.bottleneck == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert found.seconds == stage_seconds(problem, found.stages)
    check(problem, found.stages)


@settings(max_examples=30)
@given(problems(items=4, devices=(3, 3), cores=2))
def test_with_three_devices(problem: Problem) -> None:
    best = best_bottleneck(problem)
    if math.isfinite(best):
        assert throughput.place(problem).bottleneck == pytest.approx(best, rel=1e-12, abs=1e-12)


def check(problem: Problem, stages: tuple[Stage, ...]) -> None:
    """Stages hold all items in order, and no more cores than there are."""
    assert [s.begin for s in stages] == [0, *(s.end for s in stages[:-1])]
    assert stages[-1].end == len(problem.items)
    assert all(s.begin < s.end for s in stages)
    for d, device in enumerate(problem.devices):
        assert sum(s.cores for s in stages if s.device == d) <= device.cores


@given(problems(items=7, devices=(1, 3), cores=3))
def test_pipeit_is_never_better_than_the_optimum(problem: Problem) -> None:
    heuristic = pipeit.place(problem)
    check(problem, heuristic.stages)
    assert not heuristic.exact
    try:
        best = throughput.place(problem).bottleneck
    except PlacementError:
        assert math.isinf(heuristic.bottleneck)
        return
    assert heuristic.bottleneck >= best * (1 - 1e-12)


@given(problems(items=5, devices=(1, 2), cores=2), st.sampled_from((0.0, 0.1, 0.5)))
def test_the_fewest_stages_within_a_slack(problem: Problem, slack: float) -> None:
    best = best_bottleneck(problem)
    assume(math.isfinite(best))
    found = throughput.place(problem, slack)
    check(problem, found.stages)
    assert found.bottleneck <= best * (1 + slack) * (1 + 1e-12) + 1e-12
    assert found.exact == (found.bottleneck <= best * (1 + 1e-12))
    fitting = [p for p in pipelines(problem) if max(stage_seconds(problem, p)) <= best * (1 + slack) * (1 - 1e-12)]
    assert not fitting or len(found.stages) <= min(map(len, fitting))


def test_slack_saves_stages() -> None:
    problem = line([[1.0] * 3] * 3, [1, 1, 1])
    for slack, stages in ((0.0, 3), (0.9, 3), (1.0, 2), (2.0, 1)):
        found = throughput.place(problem, slack)
        assert len(found.stages) == stages
        assert found.exact == (slack < 1)
    with pytest.raises(ValueError, match="slack"):
        throughput.place(problem, slack=-0.1)


def test_two_equal_cores_halve_equal_items() -> None:
    found = throughput.place(line([[1.0]] * 6, [2]))
    assert found.bottleneck == 3.0
    assert found.exact


def test_a_slow_core_gets_its_share() -> None:
    found = throughput.place(line([[1.0, 2.5]] * 7, [1, 1]))
    assert found.bottleneck == 5.0
    assert sorted((s.device, s.end - s.begin) for s in found.stages) == [(0, 5), (1, 2)]


def test_transfers_may_make_one_stage_the_best() -> None:
    found = throughput.place(line([[1.0, 1.0]] * 4, [1, 1], size=10, link=Link(0.0, 1.0)))
    assert found.stages == (Stage(0, 1, 0, 4),) or found.stages == (Stage(1, 1, 0, 4),)
    assert found.bottleneck == 4.0


def test_pipeit_merges_cores_of_a_kind() -> None:
    """One long item: nothing flows, so that all cores of the fastest device end in one stage."""
    found = pipeit.place(line([[8.0, 40.0]], [4, 4]))
    assert found.stages == (Stage(0, 4, 0, 1),)


def test_what_a_stage_does_not_use_travels_through_it() -> None:
    values = (Value("x", INPUT, (2,), 4), Value("a", 0, (1, 2), 1), Value("b", 1, (2,), 2))
    problem = replace(line([[1.0]] * 3, [3]), values=values, links=((Link(0.5, 2.0),),))
    assert problem.crossing.tolist() == [4.0, 5.0, 7.0, 0.0]
    stages = (Stage(0, 1, 0, 1), Stage(0, 1, 1, 2), Stage(0, 1, 2, 3))
    assert stage_seconds(problem, stages) == (1 + 3.0, 1 + 3.0 + 4.0, 1 + 4.0)


def test_a_thousand_items() -> None:
    """Large enough that an algorithm of a higher order would be noticed; how long it takes is for benchmarks."""
    rng = np.random.default_rng(0)
    problem = line([[t, 3 * t] for t in rng.random(1000).tolist()], [4, 4], 1000, Link(1e-3, 1e7))
    found = throughput.place(problem)
    check(problem, found.stages)
    ideal = float(problem.sums[0][0][-1]) / (4 + 4 / 3)
    assert ideal <= found.bottleneck < 1.01 * ideal + 2e-2


def test_items_that_run_nowhere_are_named() -> None:
    with pytest.raises(NoDevice, match="'i1' can run on none of the devices 'd0'"):
        throughput.place(line([[1.0], [math.inf]], [1]))
    with pytest.raises(NoDevice, match="onnxruntime"):
        latency.place(line([[1.0], [math.inf]], [1]))


def test_too_many_changes_of_devices() -> None:
    inf = math.inf
    with pytest.raises(PlacementError, match="more often than there are cores: 'd0' \\(1\\), 'd1' \\(1\\)"):
        throughput.place(line([[1.0, inf], [inf, 1.0], [1.0, inf]], [1, 1]))


def test_nothing_to_place() -> None:
    empty = line([], [1, 1])
    assert throughput.place(empty).stages == pipeit.place(empty).stages == ()
    assert latency.place(empty).seconds == 0.0


# ------------------------------------------------------------------ latency


@given(problems(items=5))
def test_assignments_are_the_best_of_all(problem: Problem) -> None:
    found = latency.place(problem)
    assert found.exact
    assert found.seconds == assignment_seconds(problem, found.devices)
    assert found.seconds == pytest.approx(best_seconds(problem), rel=1e-9, abs=1e-9)


@given(problems(items=9, devices=(2, 2), cores=1))
def test_the_cut_and_the_search_agree(problem: Problem) -> None:
    devices = cut(problem)
    assert devices is not None
    searched = latency.search(problem)
    assert searched.exact
    assert assignment_seconds(problem, devices) == pytest.approx(searched.seconds, rel=1e-9, abs=1e-9)


@given(problems(items=6, devices=(3, 3), cores=1))
def test_a_beam_says_so_and_is_never_better(problem: Problem) -> None:
    whole, beam = latency.search(problem), latency.search(problem, states=1)
    assert beam.seconds >= whole.seconds - 1e-9
    assert beam.seconds == assignment_seconds(problem, beam.devices)
    if beam.exact:
        assert beam.seconds == pytest.approx(whole.seconds)


def test_a_value_is_sent_once_to_a_device() -> None:
    problem = line([[0.0, 9.0], [9.0, 0.0], [9.0, 0.0]], [1, 1], link=Link(1.0, 2.0))
    problem = replace(problem, values=(Value("a", 0, (1, 2), 4),))
    assert latency.place(problem).devices == (0, 1, 1)
    assert latency.place(problem).seconds == 3.0


def test_values_are_fetched_from_the_nearest_device() -> None:
    far, near = Link(100.0), Link(1.0)
    links = ((Link(), near, far), (near, Link(), near), (far, near, Link()))
    problem = line([[0.0, 99.0, 99.0], [99.0, 0.0, 99.0], [99.0, 99.0, 0.0]], [1, 1, 1])
    problem = replace(problem, values=(Value("a", 0, (1, 2), 1),), links=links)
    assert latency.place(problem).seconds == 2.0
    assert latency.place(problem).devices == (0, 1, 2)


def test_outputs_are_wanted_at_home() -> None:
    problem = line([[5.0, 1.0]], [1, 1], link=Link(3.0))
    given_and_wanted = (Value("x", INPUT, (0,)), Value("y", 0, (), 0, True))
    problem = replace(problem, values=given_and_wanted)
    assert latency.place(problem).devices == (0,)
    assert latency.place(replace(problem, home=1)).devices == (1,)


# ------------------------------------------------------------------ problems


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"devices": ()}, "has devices"),
        ({"devices": (Device("d", 0),)}, "has a core"),
        ({"devices": (Device("d", 2),)}, "i0: a time for each number of cores"),
        ({"home": 1}, "no device 1"),
        ({"links": ((Link(), Link()),)}, "a row and a column"),
        ({"items": (Item("a", ((-1.0,),)),)}, "below zero"),
        ({"items": (Item("a", ((math.nan,),)),)}, "below zero"),
        ({"values": (Value("v", 0, (0,)),)}, "v: it is used before"),
        ({"values": (Value("v", 7, ()),)}, "v: no such producer"),
    ],
)
def test_problems_make_sense(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(line([[1.0], [1.0]], [1]), **changes)  # type: ignore[arg-type]
