"""Reductions in parts: what the rewritten graph means, which are rewritten, and the one loop over rows in the code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch.codegen import kernels
from stitch.codegen.loops import Buffer, Loop, Program, Read, Stmt, Store, children, expressions, walk
from stitch.dims import Dim
from stitch.dtypes import FLOAT16, FLOAT32, FLOAT64
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.stitching.parts import in_parts
from stitch.stitching.trace import Flow
from stitch.target import Target
from tests import pipeline

Array = npt.NDArray[np.float32]
BUDGET = 4096  # so small that a few kilobytes are far


def small() -> Target:
    return replace(pipeline.host(), l1_bytes=256, l2_bytes=2 * BUDGET, l3_bytes=1 << 20)


def exponentials(b: Builder, x: Value, axis: int) -> Value:
    e = b.elementwise("exp", b.sub(x, b.reduce("reduce_max", x, [axis], keepdims=True)))
    return b.div(e, b.reduce("reduce_sum", e, [axis], keepdims=True))


def softmax(shape: tuple[Dim, ...], axis: int, dtype: np.dtype = FLOAT32) -> Graph:
    b = Builder("softmax")
    x = b.input("x", dtype, shape)
    return b.finish({"y": exponentials(b, x, axis)})


def two_axes(
    shape: tuple[Dim, ...], axis: int, first: str = "reduce_sum", second: str = "reduce_sum", totals: bool = True
) -> Graph:
    """Divided by a total along the rows, then by one along the columns; both `totals` are results too."""
    b = Builder("two")
    x = b.input("x", FLOAT32, shape)
    rows = b.reduce(first, x, list(range(axis + 1, len(shape))), keepdims=True)
    scaled = b.div(x, rows)
    columns = b.reduce(second, scaled, [axis], keepdims=True)
    y = b.div(scaled, columns)
    return b.finish({"y": y, "rows": rows, "columns": columns} if totals else {"y": y})


def lowered(graph: Graph) -> Program:
    stitched = pipeline.cut(graph, budget=BUDGET)
    (kernel,) = stitched.kernels
    return kernels.lower(kernel, Flow(stitched.graph), small()).program


def assert_same(graph: Graph, feed: dict[str, Array], rtol: float) -> None:
    """Rewritten and compiled, a graph gives what it did before, NaN and infinities at the same places, and the same
    bits on three threads."""
    changed = in_parts(graph, BUDGET)
    assert changed is not graph
    with np.errstate(all="ignore"):
        want = evaluate(graph, feed)
        rewritten = evaluate(changed, feed)
    artifact = pipeline.compile(graph, budget=BUDGET, target=small())
    got = pipeline.run(artifact, feed)
    assert pipeline.same_bits(got, pipeline.run(artifact, feed, threads=3))
    for found in (rewritten, got):
        for y, z in zip(found, want, strict=True):
            np.testing.assert_allclose(y, z, rtol, 1e-30)


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 90), st.integers(20, 70), st.integers(0, 1), st.data())
def test_softmax_of_columns(rows: int, columns: int, batch: int, data: st.DataObject) -> None:
    shape = (2, 16 * rows, columns) if batch else (16 * rows, columns)
    graph = softmax(shape, batch)
    if in_parts(graph, BUDGET) is graph:
        assert rows * 16 * columns * 4 * (1 + batch) <= 32 * BUDGET or rows % 8
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.normal(0, 30, shape).astype(np.float32)
    special = data.draw(st.sampled_from([None, -np.inf, np.inf, np.nan, 3e38, -3e38]))
    if special is not None:
        x[rng.random(shape) < data.draw(st.sampled_from([0.01, 0.5, 1.0]))] = special
    assert_same(graph, {"x": x}, 4e-5)


@pytest.mark.parametrize("other", [-np.inf, -1e30, 0.0, np.inf, np.nan])
def test_parts_of_nothing_but_minus_infinity(other: float) -> None:
    """They add nothing where another part has numbers; and a column of nothing else is NaN."""
    x = np.full((1024, 40), -np.inf, np.float32)
    x[601, ::2] = other
    assert_same(softmax(x.shape, 0), {"x": x}, 1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(4, 24), st.integers(8, 40), st.integers(1, 70), st.integers(0, 1), st.data(),
    st.sampled_from(["reduce_sum", "reduce_max", "reduce_min"]),
    st.sampled_from(["reduce_sum", "reduce_max", "reduce_min"]),
)  # fmt: skip
def test_totals_over_two_axes(
    parts: int, rows: int, columns: int, batch: int, data: st.DataObject, first: str, second: str
) -> None:
    shape = (2, parts * rows, columns) if batch else (parts * rows, columns)
    graph = two_axes(shape, batch, first, second)
    if in_parts(graph, BUDGET) is graph:
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.uniform(0.1, 1, shape).astype(np.float32)
    special = data.draw(st.sampled_from([None, -np.inf, np.inf, np.nan, 0.0]))
    if special is not None:
        x[rng.random(shape) < 0.01] = special
    assert_same(graph, {"x": x}, 1e-5)


def test_a_row_is_read_once_for_both_totals() -> None:
    """One loop over the rows of a part holds the loop that adds them up and the one that adds to the columns."""
    program = lowered(two_axes((512, 64), 0, totals=False))
    (rows,) = [s for s in program.phases[0].body if isinstance(s, Loop) and s.mode == "serial"]
    inside = [s for s in rows.body if isinstance(s, Loop)]
    assert [bool(s.folds) for s in inside] == [True, False]
    assert any(isinstance(s, Store) and s.buffer.space == "tile" for s in walk(inside[1].body))


def test_exponentials_are_summed_in_the_phase_of_the_maximum() -> None:
    """And rows are walked through as they lie, twice in a row: the second time from a cache."""
    program = lowered(softmax((2048, 64), 0))
    readers = [sum(program.buffers[0] in _read(s) for s in walk(p.body)) for p in program.phases]
    assert (readers[0], readers[-1], sum(readers)) == (2, 1, 3)


def _read(s: Stmt) -> set[Buffer]:
    """The buffers that the expressions of a statement read."""
    found: set[Buffer] = set()
    stack = list(expressions(s))
    while stack:
        e = stack.pop()
        found |= {e.buffer} if isinstance(e, Read) else set()
        stack += children(e)
    return found


@pytest.mark.parametrize(
    "graph",
    [
        softmax((64, 8), 0),  # near
        softmax((4096, 64), 1),  # rows
        softmax((4099, 64), 0),  # a prime number of rows
        softmax((4096, 64), 0, FLOAT16),  # a part's sum would be rounded
        softmax((2, 3, 4096), 1),  # few rows
        two_axes((24, 4096), 0),  # few, long rows
    ],
    ids=["near", "rows", "prime", "half", "three", "few"],
)
def test_what_stays_whole(graph: Graph) -> None:
    assert in_parts(graph, BUDGET) is graph


def test_another_maximum_is_no_centre() -> None:
    """What is subtracted has to be the maximum of the same elements, at the same column."""
    b = Builder("other")
    x = b.input("x", FLOAT32, (4096, 64))
    z = b.input("z", FLOAT32, (4096, 64))
    e = b.elementwise("exp", b.sub(x, b.reduce("reduce_max", z, [0], keepdims=True)))
    graph = b.finish({"y": b.reduce("reduce_sum", e, [0])})
    assert in_parts(graph, BUDGET) is graph


def test_maxima_laid_along_the_other_axis() -> None:
    b = Builder("turned")
    x = b.input("x", FLOAT64, (512, 512))
    top = b.reduce("reduce_max", x, [0])
    e = b.elementwise("exp", b.sub(x, b.reshape(top, (512, 1))))
    graph = b.finish({"y": b.reduce("reduce_sum", e, [0])})
    assert in_parts(graph, BUDGET) is graph
