"""Stitching with some of its steps left out: the answers stay the same, and the steps are really left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.ablation import SETTINGS, count, symbols
from stitch import api, dims, dtypes, knobs
from stitch.codegen import kernels, loop_text
from stitch.errors import InvalidKnob
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph
from stitch.ops.primitives import Array
from stitch.plan import Artifact
from stitch.runtime.cache import Cache
from stitch.simplify import simplify
from stitch.stitching.schedule import Stitched
from stitch.stitching.stitch import stitch
from stitch.stitching.trace import Flow
from tests import hand_graphs, pipeline, random_graphs
from tests.graphs import Case, graphs

LOCAL, SCHEMES, MERGING, MAPPING = SETTINGS
ABLATED = (LOCAL, SCHEMES, MERGING)  # the last setting is what all other tests use


def cut(graph: Graph, setting: str) -> Stitched:
    with knobs.using(**SETTINGS[setting]) as now:
        stitched = stitch(simplify(graph), pipeline.BUDGET, now.schemes, now.merging)
    stitched.check()
    return stitched


def compile(graph: Graph, setting: str) -> Artifact:
    with knobs.using(**SETTINGS[setting]):
        return pipeline.build(cut(graph, setting))


def programs(graph: Graph, setting: str) -> list[str]:
    stitched = cut(graph, setting)
    flow = Flow(stitched.graph, {v for k in stitched.kernels for n in k.nodes for v in n.outputs})
    with knobs.using(**SETTINGS[setting]):
        return [loop_text.render(kernels.lower(k, flow, pipeline.host()).program) for k in stitched.kernels]


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("setting", ABLATED)
@pytest.mark.parametrize("name", hand_graphs.GRAPHS)
def test_hand_graphs(name: str, setting: str) -> None:
    graph = hand_graphs.graph(name)
    artifact = compile(graph, setting)
    for n, s in ((5, 7), (1, 1), (33, 18)):
        feeds = hand_graphs.feeds(name, n, s)
        results = [pipeline.run(artifact, feeds, threads) for threads in (1, 2)]
        for got, want in zip(results[0], evaluate(graph, feeds), strict=True):
            scale = 2e-5 * float(np.abs(want).max(initial=1))
            np.testing.assert_allclose(got, want, 2e-5, scale, strict=True)
        assert pipeline.same_bits(*results)


@settings(max_examples=60)
@given(graphs(exact=True), st.sampled_from(ABLATED), st.sampled_from(random_graphs.SIZES))
def test_random_graphs_agree_bit_for_bit(case: Case, setting: str, sizes: dict[str, int]) -> None:
    graph = random_graphs.exact(case.graph)
    assume(random_graphs.has_one_answer(graph))
    artifact = compile(graph, setting)
    more = [random_graphs.feeds(graph, sizes, 0, True)] if random_graphs.fits(graph, sizes) else []
    for feeds in (case.feeds, *more):
        for got, want in zip(pipeline.run(artifact, feeds, 2), evaluate(graph, feeds), strict=True):
            np.testing.assert_array_equal(got, want, strict=True)


def test_a_kernel_may_pick_elements_for_the_next_one() -> None:
    b = Builder("picked")
    x = b.input("x", dtypes.FLOAT32, (dims.symbol("n"), 30))
    where = [b.input(name, dtypes.INT64, (dims.symbol("n"),)) for name in ("row", "column")]
    picked = b.gather(b.sub(x, b.reduce("reduce_max", x, [1], True)), where, [0, 1])
    graph = b.finish({"y": b.reduce("reduce_sum", b.unary("neg", picked), [0])})
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {"row": np.arange(7), "column": rng.integers(0, 30, 7)}
    feeds["x"] = rng.standard_normal((7, 30)).astype(np.float32)
    assert len(cut(graph, LOCAL).kernels) == 3
    for setting in SETTINGS:
        got, want = pipeline.run(compile(graph, setting), feeds)[0], evaluate(graph, feeds)[0]
        np.testing.assert_allclose(got, want, 1e-6)


# ------------------------------------------------------------------ what is left out


def test_each_step_does_its_part() -> None:
    graph = hand_graphs.graph("softmax")
    feeds = hand_graphs.feeds("softmax", n=100)
    found = {s: count(cut(graph, s), symbols(graph, feeds)) for s in SETTINGS}
    array = 4 * 100 * 64
    # maximum; exponentials, which two others need; their sum; quotient
    assert (found[LOCAL].kernels, found[LOCAL].nests, found[LOCAL].barriers) == (4, 4, 0)
    assert found[LOCAL].stored == array + 2 * 4 * 100
    assert found[LOCAL].walked == 6 * array + 4 * 4 * 100
    assert (found[SCHEMES].kernels, found[SCHEMES].nests, found[SCHEMES].walked) == (1, 4, 2 * array)
    assert (found[MERGING].kernels, found[MERGING].nests, found[MERGING].stored) == (1, 3, 0)
    assert found[MAPPING] == found[MERGING]


def test_barriers_are_counted() -> None:
    graph = hand_graphs.graph("two_axes")
    found = count(cut(graph, SCHEMES), {"n": 40, "s": 30})
    assert (found.kernels, found.barriers) == (1, 1)
    assert found.stored >= 4 * 40 * 30


@pytest.mark.parametrize("name", hand_graphs.GRAPHS)
def test_local_only_has_a_kernel_for_each_loop_nest(name: str) -> None:
    assert all(len(k.groups) <= 1 for k in cut(hand_graphs.graph(name), LOCAL).kernels)


def test_a_fixed_mapping_transposes_nothing() -> None:
    b = Builder("turned")
    x = b.input("x", dtypes.FLOAT32, (dims.symbol("n"), 64, 48))
    graph = b.finish({"y": b.mul(b.transpose(x, (0, 2, 1)), 2.0)})
    assert " over 48, " in programs(graph, MAPPING)[0]
    assert " over " not in programs(graph, MERGING)[0]


def test_a_fixed_mapping_has_lanes_along_short_rows_and_long_folds_in_one() -> None:
    b = Builder("short")
    x = b.input("x", dtypes.FLOAT32, (dims.symbol("n"), 3))
    graph = b.finish({"y": b.reduce("reduce_sum", x, [1])})
    assert re.search(r"vector x\d+ \S+ < 3\n", programs(graph, MERGING)[0])
    assert not re.search(r"vector x\d+ \S+ < 3\n", programs(graph, MAPPING)[0])
    b = Builder("long")
    graph = b.finish({"y": b.reduce("reduce_sum", b.input("x", dtypes.FLOAT32, (1 << 20,)), [0])})
    assert [programs(graph, s)[0].count("parallel") for s in (MERGING, MAPPING)] == [1, 2]


# ------------------------------------------------------------------ knobs


def test_switches_are_read() -> None:
    given = {"STITCH_MERGING": "0", "STITCH_ADAPTIVE_MAPPING": " off "}
    found = knobs.from_environment(given)
    assert (found.merging, found.adaptive_mapping) == (False, False)
    assert knobs.from_environment({"STITCH_MERGING": "True"}).merging
    with pytest.raises(InvalidKnob, match="STITCH_MERGING is 'maybe', but must be 1 or 0"):
        knobs.from_environment({"STITCH_MERGING": "maybe"})
    with pytest.raises(InvalidKnob):
        knobs.Knobs(merging=2)  # type: ignore[arg-type]


def test_every_setting_has_a_key_of_its_own() -> None:
    def key(setting: Mapping[str, Any]) -> str:
        with knobs.using(**setting):
            return api._key(b"model", pipeline.host(), None, Cache(None, 0))

    assert len({key(s) for s in SETTINGS.values()}) == len(SETTINGS)
