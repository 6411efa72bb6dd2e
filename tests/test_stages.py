"""One contraction with rows before it or behind it as one kernel: depthwise convolutions, norms and softmax with any
bias, residual, activation, padding and stride. Results are numpy's, with and without open dims, on several threads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims
from stitch.codegen.kernels import lower
from stitch.dims import Dim
from stitch.dtypes import FLOAT32
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.stitching.schedule import Kernel
from stitch.stitching.trace import Flow
from tests import pipeline

Feeds = dict[str, np.ndarray]


def over(b: Builder, prim: str, x: Value) -> Value:
    return b.broadcast(b.reduce(prim, x, [-1], keepdims=True), x.shape)


def rows(b: Builder, kind: str, x: Value) -> Value:
    """Work on whole rows."""
    n = x.shape[-1]
    assert isinstance(n, int)
    match kind:
        case "layer norm":
            d = b.sub(x, b.mul(over(b, "reduce_sum", x), 1 / n))
            v = b.mul(over(b, "reduce_sum", b.mul(d, d)), 1 / n)
            return b.mul(d, b.unary("rsqrt", b.add(v, 1e-3)))
        case "rms norm":
            return b.mul(x, b.unary("rsqrt", b.add(b.mul(over(b, "reduce_sum", b.mul(x, x)), 1 / n), 1e-3)))
        case "softmax":
            e = b.unary("exp", b.sub(x, over(b, "reduce_max", x)))
            return b.div(e, over(b, "reduce_sum", e))
        case _:
            return x


@dataclass(frozen=True)
class Case:
    n: int = 1
    height: int = 18
    width: int = 20
    channels: int = 24
    out: int = 40
    kernel: int = 3
    stride: int = 1
    depthwise: bool = True
    before: str = "none"  # work on rows between the depthwise convolution and the product
    behind: str = "none"  # and behind the product
    activation: str = "relu"
    residual: bool = False
    both: bool = False  # what the product gives is an output, too
    open: bool = False
    flat: bool = False  # [n, h · w, c] in the product
    turned: bool = False  # the weights' axes are exchanged

    def graph(self) -> tuple[Graph, Feeds]:
        b = Builder("stages")
        rng = np.random.default_rng(3)
        feeds: Feeds = {}

        def given(name: str, shape: tuple[Dim, ...]) -> Value:
            sizes = {"n": self.n}
            feeds[name] = rng.standard_normal([dims.evaluate(d, sizes) for d in shape]).astype(np.float32)
            return b.input(name, FLOAT32, shape)

        def const(*shape: int) -> Value:
            return b.const((rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

        n: Dim = dims.symbol("n") if self.open else self.n
        x = given("x", (n, self.height, self.width, self.channels))
        if self.depthwise:
            k = self.kernel
            wide = b.pad(x, [0, k // 2, k // 2, 0], [0, k // 2, k // 2, 0], 0.0)
            window = b.window(wide, (1, 2), (k, k), (self.stride, self.stride), (1, 1))
            w = b.broadcast(const(self.channels, k, k), window.shape)
            x = b.add(b.reduce("reduce_sum", b.mul(window, w), [4, 5]), const(self.channels))
            x = self._activated(b, x)
        if self.before != "none":
            x = b.add(b.mul(rows(b, self.before, x), const(self.channels)), const(self.channels))
        if self.flat:
            _, h, w_, _ = x.shape
            x = b.reshape(x, (n, h * w_, self.channels))
        r = x.rank
        w = const(self.out, self.channels) if self.turned else const(self.channels, self.out)
        labels = [r, r - 1] if self.turned else [r - 1, r]
        y = b.add(b.contract(x, w, range(r), labels, [*range(r - 1), r]), const(self.out))
        if self.residual:
            y = b.add(y, given("r", y.shape))
        out = {"y": y}
        if self.behind != "none":
            z = b.mul(rows(b, self.behind, y), const(self.out))
            out = {"z": z, "y": y} if self.both else {"z": z}
        return b.finish(out), feeds

    def _activated(self, b: Builder, x: Value) -> Value:
        match self.activation:
            case "relu":
                return b.max(x, 0.0)
            case "gelu":
                return b.mul(b.mul(x, 0.5), b.add(b.unary("erf", b.mul(x, 0.7071067690849304)), 1.0))
            case _:
                return x


def heavy(graph: Graph, budget: int = pipeline.BUDGET) -> Kernel:
    """The kernel with the contraction."""
    (found,) = [k for k in pipeline.cut(graph, budget=budget).kernels if any(n.prim == "contract" for n in k.nodes)]
    return found


def check(case: Case) -> None:
    graph, feeds = case.graph()
    artifact = pipeline.compile(graph)
    want, got = evaluate(graph, feeds), pipeline.run(artifact, feeds)
    for w, g in zip(want, got, strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5 * float(np.abs(w).max()))
    for threads in (2, 3):
        assert pipeline.same_bits(got, pipeline.run(artifact, feeds, threads))


CASES = st.builds(
    Case,
    n=st.integers(1, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 40),
    channels=st.integers(1, 40),
    out=st.integers(2, 70),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    depthwise=st.booleans(),
    before=st.sampled_from(["none", "layer norm", "softmax"]),
    behind=st.sampled_from(["none", "layer norm", "rms norm", "softmax"]),
    activation=st.sampled_from(["none", "relu", "gelu"]),
    residual=st.booleans(),
    both=st.booleans(),
    open=st.booleans(),
    flat=st.booleans(),
    turned=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_variants(case: Case) -> None:
    check(case)


ONE = [
    Case(),
    Case(open=True, stride=2, height=34),
    Case(kernel=5, activation="gelu", width=33),
    Case(behind="layer norm", residual=True, open=True),
    Case(behind="layer norm", residual=True, both=True),
    Case(before="layer norm", behind="softmax"),
    Case(depthwise=False, before="layer norm", turned=True),
    Case(depthwise=False, behind="layer norm", residual=True, both=True),
    Case(depthwise=False, behind="rms norm", flat=True, open=True),
    Case(depthwise=False, before="softmax", flat=True, height=40),
    Case(n=18, height=1, width=60, behind="softmax"),
    Case(n=3, height=16, width=16, channels=3, out=4, activation="none"),  # lanes along columns, edges above them
]


@pytest.mark.parametrize("case", ONE, ids=str)
def test_these_are_one_kernel(case: Case) -> None:
    graph, _ = case.graph()
    kernel = heavy(graph)
    assert kernel.chain is not None
    made = {n.prim for n in kernel.nodes}
    assert "reduce_sum" in made
    assert len(pipeline.cut(graph).kernels) == 1
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(height=2, width=4),  # too few rows for several workers
        Case(width=3),  # rows too short for a register tile
        Case(depthwise=False, activation="none"),  # no row has to be whole
    ],
    ids=str,
)
def test_these_are_better_apart(case: Case) -> None:
    assert heavy(case.graph()[0]).chain is None
    check(case)


def test_panels_that_no_cache_would_hold_stay_apart() -> None:
    graph, _ = Case(channels=64, out=64).graph()
    assert heavy(graph).chain is not None
    assert heavy(graph, budget=64 * 64 * 4 - 1).chain is None


def test_what_something_else_reads_is_not_made_for_a_product() -> None:
    b = Builder()
    x = b.input("x", FLOAT32, (32, 32, 24))
    y = rows(b, "layer norm", x)
    w = b.const(np.random.default_rng(1).standard_normal((24, 16)).astype(np.float32))
    z = b.contract(y, w, [0, 1, 2], [2, 3], [0, 1, 3])
    assert heavy(b.finish({"z": z, "y": y})).chain is None


def test_a_mean_over_all_rows_is_not_in_a_chain() -> None:
    """What needs other rows than those of a block (squeeze and excitation) waits for all of them."""
    b = Builder()
    x = b.input("x", FLOAT32, (2, 20, 20, 24))
    mean = b.reduce("reduce_sum", x, [1, 2], keepdims=True)
    y = b.mul(x, b.broadcast(b.unary("tanh", mean), x.shape))
    w = b.const(np.random.default_rng(1).standard_normal((24, 16)).astype(np.float32))
    graph = b.finish({"z": b.contract(y, w, [0, 1, 2, 3], [3, 4], [0, 1, 2, 4])})
    assert heavy(graph).chain is None
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 20, 20, 24)).astype(np.float32)}
    (got,) = pipeline.native(graph, feeds)
    np.testing.assert_allclose(got, evaluate(graph, feeds)[0], rtol=1e-4, atol=1e-4)


def test_large_weights_behind_rows_are_cut_along_their_columns() -> None:
    """A pair is no chain where its panels would be read from memory for each block of rows."""

    def pair(width: int) -> bool:
        b = Builder()
        rng = np.random.default_rng(1)
        x = b.input("x", FLOAT32, (64, 32))
        w, v = (b.const(rng.standard_normal(shape).astype(np.float32)) for shape in ((32, 48), (48, width)))
        y = rows(b, "rms norm", b.contract(x, w, [0, 1], [1, 2], [0, 2]))
        graph = b.finish({"z": b.contract(y, v, [0, 1], [1, 2], [0, 2])})
        return any(k.chain is not None for k in pipeline.cut(graph, budget=1 << 16).kernels)

    assert pair(64)
    assert not pair(2048)


def test_what_a_chain_makes_may_be_its_second_operand_too() -> None:
    """Then it has to be in memory as a whole."""
    b = Builder()
    x, y = (b.input(n, FLOAT32, (24, 24)) for n in "xy")
    p = b.unary("abs", b.contract(x, y, [0, 1], [1, 2], [0, 2]))
    graph = b.finish({"z": b.contract(b.sub(p, over(b, "reduce_max", p)), p, [0, 1], [1, 2], [0, 2])})
    feeds = {n: np.random.default_rng(k).standard_normal((24, 24)).astype(np.float32) for k, n in enumerate("xy")}
    (want,), (got,) = evaluate(graph, feeds), pipeline.native(graph, feeds)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * float(np.abs(want).max()))


def agrees(graph: Graph, feeds: Feeds) -> None:
    artifact = pipeline.compile(graph)
    want = evaluate(graph, feeds)
    for threads in (1, 2):
        for w, g in zip(want, pipeline.run(artifact, feeds, threads), strict=True):
            np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5 * float(np.abs(w).max()))


@pytest.mark.parametrize("shape", [(2, 14, 16), tuple(map(dims.symbol, "nhw"))])
def test_a_window_over_what_a_chain_makes_waits_for_all_of_it(shape: tuple[Dim, ...]) -> None:
    """A pool behind a norm needs rows that other tasks make."""
    b = Builder()
    rng = np.random.default_rng(1)
    x = b.input("x", FLOAT32, (*shape, 24))
    y = b.contract(x, b.const(rng.standard_normal((24, 4)).astype(np.float32)), [0, 1, 2, 3], [3, 4], [0, 1, 2, 4])
    z = b.pad(rows(b, "layer norm", y), [0, 1, 1, 0], [0, 1, 1, 0], 0.0)
    pool = b.reduce("reduce_sum", b.window(z, (1, 2), (2, 2), (2, 2), (1, 1)), [4, 5])
    agrees(b.finish({"z": pool}), {"x": rng.standard_normal((2, 14, 16, 24)).astype(np.float32)})


@pytest.mark.parametrize("kind", ["softmax", "layer norm", "rms norm"])
def test_rows_over_all_groups_of_a_grouped_product(kind: str) -> None:
    """They are no rows of one group."""
    b = Builder()
    rng = np.random.default_rng(1)
    x = b.input("x", FLOAT32, (14, 16, 7, 6))
    w = b.const(rng.standard_normal((7, 6, 2)).astype(np.float32))
    y = b.contract(x, w, [0, 1, 2, 3], [2, 3, 4], [0, 1, 2, 4])
    z = rows(b, kind, b.reshape(y, (14, 16, 14)))
    agrees(b.finish({"z": z}), {"x": rng.standard_normal((14, 16, 7, 6)).astype(np.float32)})


@pytest.mark.parametrize("n", [40, dims.symbol("n")])
def test_what_are_rows_of_one_product_and_points_of_the_batch_of_the_next(n: Dim) -> None:
    """A block of rows would have another second operand in each."""
    b = Builder()
    rng = np.random.default_rng(1)
    x, k = b.input("x", FLOAT32, (n, 3, 32)), b.input("k", FLOAT32, (n, 5, 16))
    y = b.contract(x, b.const(rng.standard_normal((32, 16)).astype(np.float32)), [0, 1, 2], [2, 3], [0, 1, 3])
    z = b.contract(rows(b, "softmax", y), k, [0, 1, 2], [0, 3, 2], [0, 1, 3])
    feeds = {"x": rng.standard_normal((40, 3, 32)), "k": rng.standard_normal((40, 5, 16))}
    agrees(b.finish({"z": z}), {name: a.astype(np.float32) for name, a in feeds.items()})


@pytest.mark.parametrize("width", [23, dims.symbol("w")])
def test_work_on_pixels_in_one_row_behind_a_product_of_maps(width: Dim) -> None:
    """Nobody knows of a place in a block of an open number of rows that it is in the map's row."""
    b = Builder()
    rng = np.random.default_rng(1)
    x = b.input("x", FLOAT32, (dims.symbol("n"), 18, width, 8))
    y = b.contract(x, b.const(rng.standard_normal((8, 12)).astype(np.float32)), [0, 1, 2, 3], [3, 4], [0, 1, 2, 4])
    z = b.unary("abs", b.reshape(b.unary("tanh", y), (dims.symbol("n"), 18 * width, 12)))
    agrees(b.finish({"z": rows(b, "layer norm", z)}), {"x": rng.standard_normal((3, 18, 23, 8)).astype(np.float32)})


def test_a_row_in_two_parts_is_cut_along_the_inner_one() -> None:
    """Always: which of them a set would name first changes from run to run."""
    case = Case(flat=True, height=32, width=16, behind="layer norm")
    found = {str(heavy(case.graph()[0]).chain) for _ in range(8)}
    assert len(found) == 1
    chain = heavy(case.graph()[0]).chain
    assert chain is not None
    assert chain.row is None
    assert [a.extent for a in chain.batch] == [1, 32] or [a.extent for a in chain.batch] == [32]


@pytest.mark.parametrize("groups", [4, 40])
@pytest.mark.parametrize("apart", [False, True])
def test_grouped_products_are_cut_as_their_operand_lies(groups: int, apart: bool) -> None:
    """Along rows, where those of all groups are neighbours: a team then has the parts that it had before. Along groups,
    where each is in one piece, or their panels do not stay in the cache together."""
    b = Builder()
    rng = np.random.default_rng(1)
    x = b.input("x", FLOAT32, (groups, 196, 64) if apart else (196, groups, 64))
    w = b.const(rng.standard_normal((groups, 64, 48)).astype(np.float32))
    graph = b.finish({"z": b.contract(x, w, [0, 1, 2] if apart else [1, 0, 2], [0, 2, 3], [0, 1, 3])})
    (kernel,) = pipeline.cut(graph).kernels
    target = replace(pipeline.host(), l2_bytes=1 << 18)
    phase = lower(kernel, Flow(graph), target).program.phases[0]
    extents = [a.extent for a in phase.axes]
    assert (extents[0] == groups) == (apart or groups == 40), extents
    agrees(graph, {"x": rng.standard_normal([d for d in x.shape if isinstance(d, int)]).astype(np.float32)})
