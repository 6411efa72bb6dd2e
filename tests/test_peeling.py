"""Windows over padding, whose guards are peeled off the rows: every extent from less than a window on, any stride,
dilation and padding, with open sizes and fixed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims
from stitch.codegen import kernels
from stitch.codegen.loop_text import render
from stitch.codegen.loops import Gate, Loop, Program, walk
from stitch.codegen.windows import POINTS
from stitch.dtypes import FLOAT32
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph
from stitch.stitching.trace import Flow
from tests import pipeline

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """A depthwise convolution, or a maximum, over [n, rows, columns, channels], and a rectifier behind it;
    `pooled`: and the sum of each channel."""

    size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (1, 1)
    behind: tuple[int, int] = (1, 1)
    channels: int = 20
    largest: bool = False
    pooled: bool = False

    def fits(self, shape: tuple[int, int]) -> bool:
        spans = [(k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True)]
        whole = [lo + n + hi for lo, n, hi in zip(self.before, shape, self.behind, strict=True)]
        return all(span <= n for span, n in zip(spans, whole, strict=True))

    def graph(self, shape: tuple[int, int] | None, n: int | None = None) -> Graph:
        b = Builder("window")
        rows, columns = shape if shape is not None else (dims.symbol("h"), dims.symbol("w"))
        x = b.input("x", FLOAT32, (dims.symbol("n") if n is None else n, rows, columns, self.channels))
        low = (0, *self.before, 0)
        fill = -np.inf if self.largest else 0.0
        y = b.apply("pad", x, lo=low, hi=(0, *self.behind, 0), value=fill)
        y = b.window(y, [1, 2], self.size, self.stride, self.dilation)
        if self.largest:
            y = b.reduce("reduce_max", y, [-1, -2])
        else:
            rng = np.random.default_rng(1)
            w = b.const(rng.standard_normal((self.channels, *self.size)).astype(np.float32))
            y = b.reduce("reduce_sum", b.mul(y, w), [-1, -2])
        y = b.max(y, 0.0)
        return b.finish({"y": y, "total": b.reduce("reduce_sum", y, [1, 2])} if self.pooled else {"y": y})


def check(graph: Graph, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    expected = evaluate(graph, {"x": x})
    for threads in (1, 3):
        for got, want in zip(pipeline.run(pipeline.compile(graph), {"x": x}, threads=threads), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


PAIRS = st.tuples(st.integers(0, 3), st.integers(0, 3))
WINDOWS = st.builds(
    Window,
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    before=PAIRS,
    behind=PAIRS,
    channels=st.sampled_from([1, 4, 16, 40]),
    largest=st.booleans(),
    pooled=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(WINDOWS, st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=3), st.booleans())
def test_windows(window: Window, shapes: list[tuple[int, int]], fixed: bool) -> None:
    """One compilation serves all sizes, of which some are smaller than the window."""
    shapes = [s for s in shapes if window.fits(s)]
    graph = None if fixed else window.graph(None)
    for shape in shapes:
        check(graph or window.graph(shape, 9), (9, *shape, window.channels))


@pytest.mark.parametrize("width", [1, 2, 3, 30])
@pytest.mark.parametrize(
    "window",
    [
        Window(),
        Window((5, 3), stride=(2, 2), before=(2, 1)),
        Window(largest=True),
        Window((5, 5), before=(2, 2), behind=(2, 2), pooled=True),
    ],
    ids=str,
)
def test_some_windows(window: Window, width: int) -> None:
    check(window.graph(None), (2, 9, width, window.channels))


def before_product(window: Window, columns: int) -> Graph:
    """A depthwise convolution and a rectifier, and a product with their channels: a chain, in blocks of rows."""
    b = Builder("separable")
    n, rows, wide = (dims.symbol(s) for s in ("n", "h", "w"))
    x = b.input("x", FLOAT32, (n, rows, wide, window.channels))
    y = b.apply("pad", x, lo=(0, *window.before, 0), hi=(0, *window.behind, 0), value=0.0)
    y = b.window(y, [1, 2], window.size, window.stride, window.dilation)
    rng = np.random.default_rng(1)
    w = b.const(rng.standard_normal((window.channels, *window.size)).astype(np.float32))
    y = b.max(b.add(b.reduce("reduce_sum", b.mul(y, w), [-1, -2]), 0.5), 0.0)
    v = b.const(rng.standard_normal((window.channels, columns)).astype(np.float32))
    return b.finish({"y": b.contract(y, v, (0, 1, 2, 3), (3, 4), (0, 1, 2, 4))})


@pytest.mark.parametrize(
    "window",
    [
        Window(channels=64),
        Window(channels=24),
        Window((5, 3), stride=(2, 2), before=(2, 1), channels=32),
        Window((3, 3), before=(1, 0), behind=(1, 0), channels=32),
        Window((1, 3), dilation=(1, 2), before=(0, 2), behind=(0, 2), channels=32),
    ],
    ids=str,
)
def test_blocks_of_rows_inside_have_no_guards(window: Window) -> None:
    """With open sizes, where nobody knows how far the first and the last block are from each other."""
    graph = before_product(window, 40)
    (kernel,) = (stitched := pipeline.cut(graph)).kernels
    program = kernels.lower(kernel, Flow(stitched.graph), pipeline.host()).program
    gated = [s for s in walk(program.phases[0].body) if isinstance(s, Loop) and isinstance(s.clip, Gate)]
    assert [s.clip.without for s in gated if isinstance(s.clip, Gate)] == [False, True]
    assert " else " not in render(Program("inside", (), (), (replace(program.phases[0], body=(gated[0],)),)))
    for shape in [(5, 1), (4, 9), (6, 31), (13, 60), (3, 11), (7, 22)]:
        if window.fits(shape):
            check(graph, (2, *shape, window.channels))


def low(window: Window) -> Program:
    stitched = pipeline.cut(window.graph((30, 40), 1))
    return kernels.lower(stitched.kernels[0], Flow(stitched.graph), pipeline.host()).program


def test_a_row_inside_has_no_guards() -> None:
    """The middle of the rows that are inside is a loop without one."""
    program = low(Window())
    loops = [s for p in program.phases for s in walk(p.body) if isinstance(s, Loop)]
    gated = [s for s in loops if isinstance(s.clip, Gate)]
    assert [s.clip.without for s in gated if isinstance(s.clip, Gate)] == [False, True]
    assert gated[0].axis.extent == 38
    assert render(program).count(" else 0.0") == 3, "both ends, and the rows at the edges"


@pytest.mark.parametrize("window", [Window(), Window((5, 5), before=(2, 2), behind=(2, 2), pooled=True)], ids=str)
def test_weights_stay_in_registers(window: Window) -> None:
    """Points are inside of lanes, several at a time, with all taps written out; the edges are in the same loop."""
    lanes = [s for s in walk(low(window).phases[0].body) if isinstance(s, Loop) and s.mode == "vector"]
    assert lanes[0].unroll == 1
    inside = [s for s in walk(lanes[0].body) if isinstance(s, Loop)]
    points = [s for s in inside if isinstance(s.clip, Gate)]
    assert [s.unroll for s in points] == [POINTS, POINTS]
    assert all(s.unroll == s.axis.extent for s in inside if s.folds)


def test_a_large_window_is_not_written_out() -> None:
    loops = [s for s in walk(low(Window((7, 7), before=(3, 3), behind=(3, 3))).phases[0].body) if isinstance(s, Loop)]
    assert all(s.unroll == 1 for s in loops if s.mode == "serial")


@pytest.mark.parametrize(("channels", "inside"), [(240, True), (256, False)])
def test_points_that_fall_into_few_sets_of_the_cache_stay_outside(channels: int, inside: bool) -> None:
    gated = [
        s
        for s in walk(low(Window(channels=channels)).phases[0].body)
        if isinstance(s, Loop) and isinstance(s.clip, Gate)
    ]
    assert [s.unroll > 1 for s in gated] == [inside, inside]


@pytest.mark.parametrize("shape", [(3, 0, 3), (3, 1, 0)])
def test_windows_over_images_without_points(shape: tuple[int, int, int]) -> None:
    """Loops over no points are not peeled into nothing."""
    b = Builder("empty")
    x = b.input("x", FLOAT32, (dims.symbol("n"), *shape))
    low, high = (0, 0, 0, 0), (0, 0, 0, 1)
    y = b.apply("pad", x, lo=low, hi=high, value=-np.inf)
    y = b.reduce("reduce_max", b.window(y, [2, 3], (1, 2), (3, 4), (1, 1)), [-1, -2])
    y = b.apply("pad", y, lo=(0, 0, 1, 2), hi=(0, 0, 2, 2), value=0.0)
    w = b.const(np.ones((3, 1, 1, 4, 5), np.float32))
    y = b.reduce("reduce_sum", b.mul(b.window(y, [2, 3], (4, 5), (1, 1), (1, 1)), w), [-1, -2])
    check(b.finish({"y": b.max(y, 0.0)}), (2, *shape))


def test_results_without_points_pass_between_kernels() -> None:
    """What is stored nowhere, as it has no points, would have no place."""
    b = Builder("empty")
    x = b.input("x", FLOAT32, (2, 5, 2, 24))
    y = b.apply("pad", x, lo=(0, 0, 0, 0), hi=(0, 0, 2, 0), value=-np.inf)
    y = b.reduce("reduce_max", b.window(y, [2], (3,), (3,), (2,)), [-1])
    w = b.const(np.ones((24, 1, 3), np.float32))
    for _ in range(2):
        y = b.apply("pad", b.max(y, 0.5), lo=(0, 0, 1, 0), hi=(0, 0, 1, 0), value=0.0)
        y = b.reduce("reduce_sum", b.mul(b.window(y, [1, 2], (1, 3), (1, 1), (1, 1)), w), [-1, -2])
    check(b.finish({"y": y}), (2, 5, 2, 24))
