"""Random graphs, compiled under every set of schemes and run at several sizes, against numpy on the primitives.

`pytest --hypothesis-profile=fuzz tests/test_random_graphs.py`, or `make fuzz`, tries fifty times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stitch import dims, dtypes
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.knobs import Scheme
from stitch.ops.primitives import Array
from stitch.text import render
from tests import pipeline, random_graphs
from tests.graphs import Case, graphs

TINY = 64
"""A budget of tiles, in bytes, that nearly every tile exceeds, so that it becomes a buffer."""

schemes_and_budgets = st.tuples(st.sampled_from(pipeline.SCHEMES), st.sampled_from([pipeline.BUDGET, TINY]))
more_sizes = st.lists(st.sampled_from(random_graphs.SIZES), max_size=2, unique_by=lambda s: (s["n"], s["m"]))


def examples(usual: int) -> int:
    """`usual` examples, or as many times more as the profile of hypothesis has more than its hundred."""
    return max(1, usual * settings().max_examples // 100)


def runs(
    graph: Graph, first: Mapping[str, Array], sizes: Sequence[dict[str, int]], integral: bool
) -> list[Mapping[str, Array]]:
    more = [random_graphs.feeds(graph, s, k, integral) for k, s in enumerate(sizes) if random_graphs.fits(graph, s)]
    return [first, *more]


def shapes(feeds: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in feeds.items()}


@settings(max_examples=examples(150))
@given(graphs(exact=True), schemes_and_budgets, more_sizes)
def test_graphs_without_rounding_agree_bit_for_bit(
    case: Case, how: tuple[tuple[Scheme, ...], int], sizes: list[dict[str, int]]
) -> None:
    graph = random_graphs.exact(case.graph)
    assume(random_graphs.has_one_answer(graph))
    artifact = pipeline.compile(graph, *how)
    for feeds in runs(graph, case.feeds, sizes, True):
        results = [pipeline.run(artifact, feeds, threads) for threads in (1, 2, 3)]
        for got, want in zip(results[0], evaluate(graph, feeds), strict=True):
            np.testing.assert_array_equal(got, want, f"{how} {shapes(feeds)}\n{render(graph)}", strict=True)
        assert pipeline.same_bits(results[0], results[1]), "2 threads, other bits"
        assert pipeline.same_bits(results[0], results[2]), "3 threads, other bits"


@settings(max_examples=examples(150))
@given(graphs(exact=False), schemes_and_budgets, more_sizes)
def test_graphs_with_sums_agree_up_to_rounding(
    case: Case, how: tuple[tuple[Scheme, ...], int], sizes: list[dict[str, int]]
) -> None:
    graph = case.graph
    artifact = pipeline.compile(graph, *how)
    for feeds in runs(graph, case.feeds, sizes, False):
        results = [pipeline.run(artifact, feeds, threads) for threads in (1, 2, 3)]
        largest = random_graphs.magnitude(graph, dict(feeds))
        for got, want in zip(results[0], evaluate(graph, feeds), strict=True):
            # Some ten roundings, each relative to the largest number on the way.
            scale = 64 * 2.0**-23 * largest if want.dtype.kind == "f" else 0.0
            message = f"{how} {shapes(feeds)}\n{render(graph)}"
            np.testing.assert_allclose(got, want, 1e-5 if scale else 0, scale, True, message, strict=True)
        assert pipeline.same_bits(results[0], results[1]), "2 threads, other bits"
        assert pipeline.same_bits(results[0], results[2]), "3 threads, other bits"


@settings(max_examples=examples(20))
@given(graphs(exact=True, nodes=8))
def test_all_schemes_give_the_same_bits(case: Case) -> None:
    graph = random_graphs.exact(case.graph)
    assume(random_graphs.has_one_answer(graph))
    results = [
        pipeline.native(graph, case.feeds, schemes=s, budget=b) for s in pipeline.SCHEMES[::2] for b in (TINY, 1 << 19)
    ]
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y, strict=True)


# ------------------------------------------------------------------ rows


@st.composite
def row_wise(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Graph:
    """A graph in which row i of every value depends on row i of the input alone."""
    b = Builder("rows")
    n = dims.symbol("n")
    inner = draw(st.sampled_from([(), (3,), (16,)]))
    width = draw(st.sampled_from([1, 5, 16, 37, 130]))
    x = b.input("x", dtypes.FLOAT32, (n, *inner, width))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    value = x
    for _ in range(draw(st.integers(1, 5))):
        value = _step(draw, b, value, rng)
    return b.finish({"y": value})


def _step(draw: Callable[[st.SearchStrategy[Any]], Any], b: Builder, x: Value, rng: np.random.Generator) -> Value:
    last = x.shape[-1]
    assert isinstance(last, int)
    axes = draw(st.sampled_from([[-1], [*range(1, x.rank)]]))
    match draw(st.sampled_from(["softmax", "normalise", "function", "matmul", "residual", "turn"])):
        case "softmax":
            e = b.unary("exp", b.sub(x, b.reduce("reduce_max", x, axes, True)))
            return b.div(e, b.reduce("reduce_sum", e, axes, True))
        case "normalise":
            centred = b.sub(x, b.mean(x, axes, True))
            variance = b.mean(b.mul(centred, centred), axes, True)
            return b.mul(centred, b.unary("rsqrt", b.add(variance, 1e-5)))
        case "function":
            return b.unary(draw(st.sampled_from(["tanh", "erf", "sigmoid", "sin"])), x)
        case "matmul":
            columns = draw(st.sampled_from([1, 7, 32, 65]))
            w = b.const(rng.standard_normal((last, columns)).astype(np.float32) / np.float32(np.sqrt(last)))
            a = list(range(x.rank))
            y = b.contract(x, w, a, [x.rank - 1, 9], [*a[:-1], 9])
            return b.add(y, b.const(rng.standard_normal(columns).astype(np.float32)))
        case "residual":
            return b.add(x, b.mul(x, b.const(rng.standard_normal(last).astype(np.float32))))
        case _:
            return b.transpose(x, [0, *range(x.rank - 1, 0, -1)])


@settings(max_examples=examples(60))
@given(row_wise(), st.sampled_from(pipeline.SCHEMES), st.integers(2, 40), st.data())
def test_a_row_alone_is_the_row_of_a_batch(
    graph: Graph, schemes: tuple[Scheme, ...], n: int, data: st.DataObject
) -> None:
    artifact = pipeline.compile(graph, schemes)
    feeds = random_graphs.feeds(graph, {"n": n}, n, False)
    (batch,) = pipeline.run(artifact, feeds, 2)
    first = data.draw(st.integers(0, n - 1))
    last = data.draw(st.integers(first + 1, n))
    (some,) = pipeline.run(artifact, {"x": feeds["x"][first:last]})
    (one,) = pipeline.run(artifact, {"x": feeds["x"][first : first + 1]}, 3)
    assert some.tobytes() == batch[first:last].tobytes(), f"rows {first} to {last} of {n}\n{render(graph)}"
    assert one.tobytes() == batch[first : first + 1].tobytes(), f"row {first} of {n}\n{render(graph)}"


# ------------------------------------------------------------------ what the random graphs have found


def test_pieces_of_a_concat_may_be_kernels_of_their_own() -> None:
    b = Builder("pieces")
    x = b.input("x", dtypes.FLOAT32, (dims.symbol("n"), dims.symbol("m")))
    joined = b.concat([x, b.unary("neg", x), x], 0)
    graph = b.finish({"y": joined, "z": b.mul(joined, joined)})
    feeds = random_graphs.feeds(graph, {"n": 3, "m": 5}, 0, True)
    for schemes in pipeline.SCHEMES:
        for got, want in zip(pipeline.native(graph, feeds, schemes=schemes), evaluate(graph, feeds), strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_piece_may_not_be_written_after_the_value_was_read() -> None:
    b = Builder("pieces")
    x = b.input("x", dtypes.FLOAT32, (dims.symbol("n"),))
    joined = b.concat([x, x], 0)
    graph = b.finish({"z": b.reduce("reduce_sum", b.mul(joined, joined), [0])})
    stitched = pipeline.cut(graph, pipeline.SCHEMES[0])
    writers = [k for k in stitched.kernels if any(r.is_piece for g in k.groups for r in g.roots)]
    assert len(writers) == 2
    late = tuple(k for k in stitched.kernels if k is not writers[1])
    with pytest.raises(AssertionError, match="again"):
        replace(stitched, kernels=(*late, writers[1])).check()
