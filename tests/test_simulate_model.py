"""What kernels are counted to do, and a model as a placement problem."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import published
from stitch import boardfile, devices, dtypes
from stitch.dims import symbol
from stitch.graph import Builder, Graph
from stitch.placement import throughput
from stitch.placement.problem import INPUT
from stitch.simulate.model import links_of, problem_of
from stitch.simulate.work import Work, rates_of, seconds, work_of
from stitch.stitching.schedule import Stitched
from stitch.stitching.stitch import stitch
from stitch.topology import Cluster, Rates

KIRIN = boardfile.load("kirin970")


def works(stitched: Stitched, **sizes: int) -> list[Work]:
    constants = [n.output for n in stitched.graph.nodes if n.prim == "const"]
    return [work_of(k, sizes, constants) for k in stitched.kernels]


def matmul() -> Graph:
    """relu(x @ w) of n rows; then the exponential of its rows' sums."""
    b = Builder("matmul")
    x = b.input("x", dtypes.FLOAT32, (symbol("n"), 32))
    w = b.const(np.arange(32 * 48, dtype=np.float32).reshape(32, 48))
    y = b.max(b.contract(x, w, (0, 2), (2, 1), (0, 1)), 0)
    return b.finish({"y": b.unary("exp", b.reduce("reduce_sum", y, [1]))})


def test_a_matmul() -> None:
    total = sum(works(stitch(matmul(), 1 << 18), n=7), Work(kernels=0))
    assert total.contraction == 2 * 7 * 32 * 48
    assert total.weights == 4 * 32 * 48
    assert total.read >= 4 * 7 * 32
    assert total.written >= 4 * 7
    # two for each maximum, one for each sum, and fourteen for each exponential
    assert total.elementwise == 2 * 7 * 48 + 7 * 48 + 14 * 7


def test_nothing_of_an_empty_model() -> None:
    total = sum(works(stitch(matmul(), 1 << 18), n=0), Work(kernels=0))
    assert (total.contraction, total.elementwise, total.read, total.written) == (0, 0, 0, 0)


def test_a_problem_has_the_kernels_and_what_is_between_them() -> None:
    stitched = stitch(matmul(), 1 << 18)
    problem = problem_of(stitched, KIRIN, {"n": 7}).problem
    assert [item.name for item in problem.items] == [k.name for k in stitched.kernels]
    assert [device.name for device in problem.devices] == ["a73", "a53"]
    assert [v.name for v in problem.values if v.output] == [v.name for v in stitched.graph.outputs]
    given_values = [v for v in problem.values if v.producer == INPUT]
    assert [(v.name, v.bytes, v.consumers) for v in given_values] == [("x", 4 * 7 * 32, (0,))]
    assert all(v.consumers or v.output for v in problem.values)


def test_sets_of_cores_as_a_user_names_them() -> None:
    stitched = stitch(matmul(), 1 << 18)
    found = devices.parse_all(["cpu:4-5", "cpu:6", "cpu:0"], KIRIN)
    problem = problem_of(stitched, KIRIN, {"n": 7}, sets=[c for d in found for c in d.clusters]).problem
    whole = problem_of(stitched, KIRIN, {"n": 7}).problem
    assert [d.cores for d in problem.devices] == [2, 1, 1]
    for item, all_cores in zip(problem.items, whole.items, strict=True):
        (a73, a53), sets = all_cores.seconds, item.seconds
        assert sets == (a73[:2], a73[:1], a53[:1])
    assert problem.link(0, 1).bandwidth == 8e9  # within a cluster
    assert problem.link(0, 2).bandwidth == 4e9


def test_mobilenet_as_written_down() -> None:
    """1.1 Gflop in all but depthwise convolutions, and 4.2 million weights, as published."""
    from stitch import importer
    from stitch.simplify import simplify

    total = sum(works(stitch(simplify(importer.load(published.mobilenet())), 1 << 20)), Work(kernels=0))
    assert total.contraction == pytest.approx(1.10e9, rel=0.01)
    assert total.weights == pytest.approx(4 * 4.23e6, rel=0.01)


works_strategy = st.builds(
    Work, st.floats(0, 1e10), st.floats(0, 1e9), st.integers(0, 10**8), st.integers(0, 10**8), st.integers(0, 10**8)
)


@given(works_strategy, st.floats(0, 1))
def test_more_cores_are_never_slower(work: Work, parallel: float) -> None:
    rates = replace(rates_of(KIRIN.clusters[1]), parallel=parallel)
    times = [seconds(work, rates, k) for k in range(1, 5)]
    assert times == sorted(times, reverse=True)
    assert times[0] <= 4 * times[3] * (1 + 1e-12)


@given(works_strategy, works_strategy)
def test_work_adds_up(a: Work, b: Work) -> None:
    rates = rates_of(KIRIN.clusters[0])
    assert seconds(a + b, rates, 2) == pytest.approx(seconds(a, rates, 2) + seconds(b, rates, 2))


def test_by_hand() -> None:
    rates = Rates(contraction=8.0, elementwise=4.0, bandwidth=2.0, kernel=1.0, cores=4)
    work = Work(contraction=16.0, elementwise=4.0, read=2, written=1, weights=1)
    assert seconds(work, rates, 4) == 2 + 1 + 2 + 1
    assert seconds(work, rates, 1) == 4 * (2 + 1 + 2 + 1)
    assert seconds(work, replace(rates, contraction=math.inf), 4) == 1 + 2 + 1


def test_boards_without_rates_go_by_their_peak() -> None:
    pi = boardfile.load("raspberry_pi5")
    assert rates_of(pi.clusters[0]).contraction == pytest.approx(0.6 * 4 * 38.4e9)
    with pytest.raises(ValueError, match="neither rates nor peak numbers are known of the cluster 'cpu'"):
        rates_of(Cluster("cpu", ((0,),)))


def test_links_are_the_boards() -> None:
    links = links_of(KIRIN, KIRIN.clusters)
    assert links[0][1] == links[1][0]
    assert links[0][1].bandwidth == 4e9
    assert links[0][0].bandwidth == 8e9


# Totals of the five networks, as `python -m benchmarks.placement --fit` prints them.
TOTALS = {
    "AlexNet": Work(1309120768.0, 18173350.0, 4225952, 4747584, 243860896, 14),
    "GoogLeNet": Work(2793185792.0, 57383538.0, 27885712, 22795632, 27599968, 87),
    "MobileNet": Work(1102708736.0, 50110580.0, 13963824, 13365712, 16872352, 19),
    "ResNet50": Work(8178368512.0, 64176914.0, 77763408, 54686448, 102229920, 74),
    "SqueezeNet": Work(698303872.0, 15563918.0, 18319520, 17000160, 4941984, 43),
}


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_the_board_gives_what_was_published(name: str) -> None:
    for images, cluster in zip(published.PUBLISHED[name], reversed(KIRIN.clusters), strict=True):
        assert 1 / seconds(TOTALS[name], rates_of(cluster), 4) == pytest.approx(images, rel=0.1)


def test_where_all_kernels_like_both_clusters_alike_the_sum_is_a_bound() -> None:
    """Otherwise it is not: each cluster may get what it is better at."""
    rates = Rates(contraction=8e9, elementwise=1e9, bandwidth=1e9, kernel=1e-4, cores=4)
    half = Rates(contraction=4e9, elementwise=0.5e9, bandwidth=0.5e9, kernel=2e-4, cores=4)
    clusters = tuple(replace(c, rates=r) for c, r in zip(KIRIN.clusters, (rates, half), strict=True))
    stitched = stitch(matmul(), 1 << 18)
    problem = problem_of(stitched, replace(KIRIN, clusters=clusters), {"n": 1000}).problem
    together = sum(1 / sum(item.seconds[d][-1] for item in problem.items) for d in range(2))
    assert 1 / throughput.place(problem).bottleneck <= together * (1 + 1e-12)
