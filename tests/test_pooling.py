"""Windows over the sums of windows: what is pulled up gives what it gave, and what must not be pulled up is not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims
from stitch.dtypes import FLOAT32
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph
from stitch.simplify.pooling import gather_windows
from tests import pipeline


@dataclass(frozen=True)
class Pooled:
    """A depthwise convolution of [n, rows, columns, channels], a rectifier, and the extreme, or sum, of each window of
    its results. `kept`: the results are an output, too."""

    size: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    pad: int = 1
    pool: tuple[int, int] = (2, 2)
    step: tuple[int, int] = (2, 2)
    channels: int = 20
    how: str = "reduce_max"
    kept: bool = False

    def graph(self, is_open: bool, shape: tuple[int, ...]) -> Graph:
        b = Builder("pooled")
        sizes = [dims.symbol(s) for s in "nhw"] if is_open else list(shape)
        x = b.input("x", FLOAT32, (*sizes, self.channels))
        rng = np.random.default_rng(1)
        y = b.apply("pad", x, lo=(0, self.pad, self.pad, 0), hi=(0, self.pad, self.pad, 0), value=0.0)
        y = b.window(y, [1, 2], self.size, [self.stride] * 2, [self.dilation] * 2)
        w = b.const(rng.standard_normal((self.channels, *self.size)).astype(np.float32))
        y = b.reduce("reduce_sum", b.mul(y, w), [-1, -2])
        y = b.max(b.add(y, b.const(rng.standard_normal(self.channels).astype(np.float32))), 0.0)
        z = b.reduce(self.how, b.window(y, [1, 2], self.pool, self.step, [1, 1]), [-1, -2])
        return b.finish({"y": z, "all": y} if self.kept else {"y": z})

    def fits(self, rows: int, columns: int) -> bool:
        for n, k, pool in zip((rows, columns), self.size, self.pool, strict=True):
            sums = (n + 2 * self.pad - (k - 1) * self.dilation - 1) // self.stride + 1
            if n + 2 * self.pad < (k - 1) * self.dilation + 1 or sums < pool:
                return False
        return True


SMALL = st.tuples(st.integers(1, 3), st.integers(1, 3))
CASES = st.builds(
    Pooled,
    size=SMALL,
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pad=st.integers(0, 2),
    pool=SMALL,
    step=SMALL,
    channels=st.sampled_from([1, 4, 16, 40]),
    how=st.sampled_from(["reduce_max", "reduce_min", "reduce_sum"]),
    kept=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(CASES, st.booleans(), st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)))
def test_pooled_sums(case: Pooled, is_open: bool, shape: tuple[int, int, int]) -> None:
    if not case.fits(*shape[1:]):
        return
    graph = case.graph(is_open, shape)
    x = np.random.default_rng(2).standard_normal((*shape, case.channels)).astype(np.float32)
    expected = evaluate(graph, {"x": x})
    for a, b in zip(evaluate(gather_windows(graph), {"x": x}), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, strict=True)
    for a, b in zip(pipeline.native(graph, {"x": x}), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4, strict=True)


def is_pulled(case: Pooled) -> bool:
    graph = case.graph(True, ())
    return gather_windows(graph) is not graph


def test_what_is_pulled_up() -> None:
    assert is_pulled(Pooled())
    assert is_pulled(Pooled(dilation=2, pool=(3, 2), step=(3, 4)))


@pytest.mark.parametrize(
    "case", [Pooled(step=(1, 1)), Pooled(pool=(3, 3)), Pooled(kept=True), Pooled(stride=2)], ids=str
)
def test_what_would_be_done_again_or_has_another_reader_stays(case: Pooled) -> None:
    assert not is_pulled(case)


def test_one_place_of_the_image_is_a_task() -> None:
    """Before, a tile held the results of the whole image."""
    (kernel,) = pipeline.cut(Pooled(channels=64).graph(True, ())).kernels
    (phase,) = kernel.phases
    assert len(phase.parallel) == 4
