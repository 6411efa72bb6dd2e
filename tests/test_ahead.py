"""What is asked of memory ahead: where, how far, where not, and that it never changes a result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims
from stitch.codegen import kernels
from stitch.codegen.loops import Apply, Loop, Phase, Prefetch, Program, Stmt, children, expressions, walk
from stitch.dims import Dim
from stitch.dtypes import FLOAT32
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph
from stitch.stitching.trace import Flow
from stitch.target import Target
from tests import pipeline

Array = npt.NDArray[np.float32]


def small(l2: int = 4096) -> Target:
    """Caches so small that little is near."""
    return replace(pipeline.host(), l1_bytes=2048, l2_bytes=l2, l3_bytes=1 << 20)


def softmax(shape: tuple[Dim, ...], axis: int) -> Graph:
    b = Builder("softmax")
    x = b.input("x", FLOAT32, shape)
    e = b.elementwise("exp", b.sub(x, b.reduce("reduce_max", x, [axis], keepdims=True)))
    return b.finish({"y": b.div(e, b.reduce("reduce_sum", e, [axis], keepdims=True))})


def lowered(graph: Graph, target: Target) -> Program:
    stitched = pipeline.cut(graph)
    (kernel,) = stitched.kernels
    return kernels.lower(kernel, Flow(stitched.graph), target).program


def asking(phase: Phase) -> list[tuple[int, Prefetch]]:
    """What is asked for, and in which of the phase's statements."""
    return [(k, s) for k, top in enumerate(phase.body) for s in walk((top,)) if isinstance(s, Prefetch)]


def primitives(s: Stmt) -> set[str]:
    found: set[str] = set()
    stack = [e for t in walk((s,)) for e in expressions(t)]
    while stack:
        e = stack.pop()
        stack += children(e)
        found |= {e.prim} if isinstance(e, Apply) else set()
    return found


def test_rows_are_asked_for_while_the_one_before_is_computed() -> None:
    (phase,) = lowered(softmax((64, 1024), 1), small(1 << 16)).phases
    ((place, found),) = asking(phase)
    (row,) = phase.axes
    assert found.index.coefficient(row) == 1024
    assert found.index.offset == 1024
    assert {k for k, s in enumerate(phase.body) if "exp" in primitives(s)} == {place}


def test_columns_are_asked_for_block_after_block() -> None:
    (phase,) = lowered(softmax((2, 40, 640), 1), small(1 << 16)).phases
    ((_, found),) = asking(phase)
    lanes = phase.axes[-1]
    assert found.index.coefficient(lanes) == found.index.offset == 64


@pytest.mark.parametrize(
    ("shape", "l2"),
    [((64, 1024), 1 << 20), ((64, 128), 4096), ((1, 1024), 1 << 10)],
    ids=["near", "short rows", "one task"],
)
def test_nothing_is_asked_for(shape: tuple[int, int], l2: int) -> None:
    """What is in a cache already, what the processor asks for itself, and where no task is next."""
    assert not [f for p in lowered(softmax(shape, 1), small(l2)).phases for f in asking(p)]


def test_rows_that_go_through_much_again() -> None:
    """A sum over the first axis whose totals take the first cache: each row asks for the next."""
    b = Builder("sums")
    x = b.input("x", FLOAT32, (4096, 1024))
    graph = b.finish({"y": b.reduce("reduce_sum", b.elementwise("exp", x), [0])})
    first = lowered(graph, small()).phases[0]
    ((_, found),) = asking(first)
    assert found.index.offset == 2048
    assert not asking(lowered(graph, replace(small(), l1_bytes=1 << 15)).phases[0])


def test_blocks_to_be_transposed() -> None:
    """Every column's line of the next block is asked for, once each."""
    b = Builder("turn")
    x = b.input("x", FLOAT32, (1024, 160))
    bias = b.input("bias", FLOAT32, (160,))
    target = small()
    (phase,) = lowered(b.finish({"y": b.transpose(b.add(x, bias), (1, 0))}), target).phases
    assert [a.extent for a in phase.axes] == [8, 10], "the next block is behind this one"
    ((place, found),) = asking(phase)
    assert found.index.offset == found.index.coefficient(phase.axes[-1]) == 16
    outer = phase.body[place]
    assert isinstance(outer, Loop)
    (inner,) = (s for s in outer.body if isinstance(s, Loop))
    lanes = target.lanes(FLOAT32)
    asked = {
        i * found.index.coefficient(outer.axis) + j * found.index.coefficient(inner.axis)
        for i in range(0, 128, lanes)
        for j in range(16)
    }
    assert set(range(0, 128 * 160, 160)) <= asked


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 90), st.integers(1, 700)), st.sampled_from([0, 1, 2]), st.booleans())
def test_results(shape: tuple[int, int, int], axis: int, fixed: bool) -> None:
    """The same with any caches, on any number of threads, of sizes known before or not."""
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    graph = softmax(shape if fixed else tuple(dims.symbol(s) for s in "abc"), axis)
    (want,) = evaluate(graph, {"x": x})
    for threads in (1, 3):
        (got,) = pipeline.run(pipeline.compile(graph, target=small()), {"x": x}, threads=threads)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(5000, 40), (3001, 130)])
def test_long_columns_with_totals_behind_them(shape: tuple[int, int]) -> None:
    """The sum is cut into parts, though its reciprocal is taken in the same phase."""
    graph = softmax(shape, 0)
    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    (want,) = evaluate(graph, {"x": x})
    artifact = pipeline.compile(graph, budget=1 << 14, target=small())
    got = [pipeline.run(artifact, {"x": x}, threads=threads) for threads in (1, 3)]
    np.testing.assert_allclose(got[0][0], want, rtol=2e-5, atol=1e-7)
    assert pipeline.same_bits(*got)
