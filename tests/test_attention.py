"""Two contractions and rows between them as one kernel: any mask, scale, bias and row-wise function, heads in groups,
any order of axes. Results are numpy's, fixed and with open dims, on any number of threads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims
from stitch.codegen import kernels
from stitch.codegen.loops import Contract, walk
from stitch.dims import Dim
from stitch.dtypes import BOOL, FLOAT32
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.stitching.schedule import Kernel
from stitch.stitching.trace import Flow
from tests import pipeline

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    lead: tuple[int, ...] = (2, 3)
    queries: int = 37
    keys: int = 29
    depth: int = 8
    width: int = 20
    turned: bool = False  # the second operand comes as [depth, keys]
    interleaved: bool = False  # operands are [.., queries, heads, depth], seen through a transpose
    repeats: int = 1  # of the second and third operand along the last of `lead`
    scale: str = "after"
    mask: str = "none"
    rows: str = "softmax"
    open: bool = False

    def graph(self) -> tuple[Graph, dict[str, np.ndarray]]:
        b = Builder("attention")
        rng = np.random.default_rng(1)
        feeds: dict[str, np.ndarray] = {}
        names = {self.queries: "q", self.keys: "k"} if self.open and self.queries != self.keys else {}

        def dim(n: int) -> Dim:
            return dims.symbol(names[n]) if n in names else n

        def given(name: str, shape: tuple[int, ...]) -> Value:
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
            return b.input(name, FLOAT32, tuple(dim(n) for n in shape))

        def operand(name: str, rows: int, columns: int, repeats: int = 1) -> Value:
            lead = (*self.lead[:-1], self.lead[-1] // repeats) if self.lead else ()
            if self.interleaved and lead:
                x = given(name, (*lead[:-1], rows, lead[-1], columns))
                last = len(lead)
                x = b.transpose(x, (*range(last - 1), last, last - 1, last + 1))
            else:
                x = given(name, (*lead, rows, columns))
            if repeats == 1:
                return x
            shape = x.shape
            x = b.reshape(x, (*shape[:-2], 1, *shape[-2:]))
            x = b.broadcast(x, (*shape[:-2], repeats, *shape[-2:]))
            return b.reshape(x, (*shape[:-3], shape[-3] * repeats, *shape[-2:]))

        n = len(self.lead)
        repeats = self.repeats if self.lead and self.lead[-1] % self.repeats == 0 else 1
        q = operand("q", self.queries, self.depth)
        if self.scale == "before":
            q = b.mul(q, 0.3)
        lead = list(range(n))
        if self.turned:
            k = operand("k", self.depth, self.keys, repeats)
            scores = b.contract(q, k, [*lead, n, n + 1], [*lead, n + 1, n + 2], [*lead, n, n + 2])
        else:
            k = operand("k", self.keys, self.depth, repeats)
            scores = b.contract(q, k, [*lead, n, n + 1], [*lead, n + 2, n + 1], [*lead, n, n + 2])
        if self.scale == "after":
            scores = b.div(scores, 2.8)
        match self.mask:
            case "keys":
                scores = b.add(scores, given("mask", (self.keys,)))
            case "both":
                scores = b.add(scores, given("mask", (self.queries, self.keys)))
            case "batch" if n:
                scores = b.add(scores, given("mask", (self.lead[0], *(1,) * n, self.keys)))
            case "where":
                feeds["mask"] = rng.random((self.queries, self.keys)) < 0.7
                mask = b.input("mask", BOOL, (dim(self.queries), dim(self.keys)))
                scores = b.where(b.broadcast(mask, scores.shape), scores, -1e4)
        weights = self._rows(b, scores)
        v = operand("v", self.keys, self.width, repeats)
        out = b.contract(weights, v, [*lead, n, n + 2], [*lead, n + 2, n + 1], [*lead, n, n + 1])
        return b.finish({"y": out}), feeds

    def _rows(self, b: Builder, x: Value) -> Value:
        def over(prim: str, v: Value) -> Value:
            return b.broadcast(b.reduce(prim, v, [-1], keepdims=True), v.shape)

        match self.rows:
            case "softmax":
                e = b.unary("exp", b.sub(x, over("reduce_max", x)))
                return b.div(e, over("reduce_sum", e))
            case "capped softmax":  # and NaN, where all is masked, as zero
                x = b.mul(b.unary("tanh", b.mul(x, 0.1)), 10.0)
                e = b.unary("exp", b.sub(x, over("reduce_max", x)))
                w = b.div(e, over("reduce_sum", e))
                return b.where(b.eq(w, w), w, 0.0)
            case "norm":
                return b.div(x, b.unary("sqrt", b.add(over("reduce_sum", b.mul(x, x)), 1e-3)))
            case "centred":
                return b.sub(x, b.mul(over("reduce_sum", x), 1 / self.keys))
        raise AssertionError(self.rows)


def chain_of(graph: Graph) -> Kernel:
    """The one chain; no other kernel has a contraction."""
    made = pipeline.cut(graph).kernels
    (found,) = [k for k in made if k.chain is not None]
    assert [n.prim for k in made for n in k.nodes].count("contract") == 2
    assert [n.prim for n in found.nodes].count("contract") == 2
    return found


def check(case: Case) -> None:
    graph, feeds = case.graph()
    assert chain_of(graph).chain is not None
    (want,) = evaluate(graph, feeds)
    (got,) = pipeline.run(pipeline.compile(graph), feeds)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * float(np.abs(want).max()))


CASES = st.builds(
    Case,
    lead=st.sampled_from([(), (5,), (1, 4), (2, 4), (2, 1, 2)]),
    queries=st.integers(2, 45),
    keys=st.integers(2, 70),
    depth=st.integers(2, 20),
    width=st.integers(2, 40),
    turned=st.booleans(),
    interleaved=st.booleans(),
    repeats=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from(["none", "before", "after"]),
    mask=st.sampled_from(["none", "keys", "both", "batch", "where"]),
    rows=st.sampled_from(["softmax", "capped softmax", "norm", "centred"]),
    open=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_variants_are_one_kernel(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(open=True, mask="where", interleaved=True),
        Case(queries=64, keys=64, depth=64, width=64),
        Case(keys=16, width=16, turned=True),
        Case(lead=(1, 8), repeats=4, open=True),
        Case(lead=(), queries=14, keys=200),
        Case(queries=3, keys=1000, open=True),
    ],
    ids=str,
)
def test_some_variants(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("given_dims", [False, True], ids=["fixed", "open"])
def test_keys_of_a_group_of_heads_are_packed_once(given_dims: bool) -> None:
    """Before they are spread over the heads that share them; they are the only operand of this size that is copied."""
    graph, feeds = Case(lead=(2, 8), repeats=4, keys=64, open=given_dims).graph()
    stitched = pipeline.cut(graph)
    assert not any(n.prim == "transpose" for k in stitched.kernels for n in k.nodes)
    low = kernels.lower(chain_of(graph), Flow(stitched.graph), pipeline.host())
    (panels,) = low.own
    assert panels.shape[:2] == feeds["k"].shape[:2] == (2, 2)
    assert dims.evaluate(panels.size, dict.fromkeys(dims.symbols(panels.size), 64)) == feeds["k"].size


@pytest.mark.parametrize(
    ("case", "packed"),
    [
        (Case(lead=(2,), queries=96, keys=1200, depth=16, width=64), 2),  # large, and read for many rows
        (Case(lead=(2,), queries=95, keys=1200, depth=16, width=64), 1),  # for few
        (Case(lead=(2,), queries=96, keys=300, depth=16, width=64), 1),  # small
        (Case(lead=(2,), queries=96, keys=1200, depth=16, width=64, turned=True), 1),
        (Case(lead=(2,), queries=20, keys=300, depth=16, width=64, turned=True), 0),  # both are read as they lie
        (Case(lead=(2,), queries=96, keys=1200, depth=16, width=64, turned=True, open=True), 0),  # perhaps for one row
    ],
    ids=str,
)
def test_operands_are_packed_where_it_pays(case: Case, packed: int) -> None:
    graph, _ = case.graph()
    chain = chain_of(graph)
    low = kernels.lower(chain, Flow(pipeline.cut(graph).graph), pipeline.host())
    assert len(low.own) == packed
    check(case)


@pytest.mark.parametrize("scale", ["none", "after"])
def test_scores_go_straight_into_their_rows(scale: str) -> None:
    """Where nothing is done to them on the way; but for the columns that do not fill a panel."""
    graph, _ = Case(queries=40, keys=203, scale=scale).graph()
    low = kernels.lower(chain_of(graph), Flow(pipeline.cut(graph).graph), pipeline.host())
    found = [s for phase in low.program.phases for s in walk(phase.body) if isinstance(s, Contract)]
    straight = [s.tile_row is not None for s in found]
    assert straight[0] == (scale == "none")
    assert not any(straight[1:])
    check(Case(queries=40, keys=203, scale=scale))
    check(Case(queries=40, keys=203, scale=scale, open=True))


def test_self_attention_of_open_length_packs_both_operands() -> None:
    """However few queries there are, there are as few keys to copy."""
    n = dims.symbol("n")
    b = Builder()
    q, k, v = (b.input(name, FLOAT32, (2, n, 16)) for name in "qkv")
    scores = b.contract(q, k, [0, 1, 2], [0, 3, 2], [0, 1, 3])
    weights = Case()._rows(b, scores)
    graph = b.finish({"y": b.contract(weights, v, [0, 1, 3], [0, 3, 2], [0, 1, 2])})
    low = kernels.lower(chain_of(graph), Flow(pipeline.cut(graph).graph), pipeline.host())
    assert len(low.own) == 2
    code = pipeline.compile(graph)
    rng = np.random.default_rng(0)
    for size in (1, 2, 31, 32, 33, 100):
        feeds = {name: rng.standard_normal((2, size, 16)).astype(np.float32) for name in "qkv"}
        (want,) = evaluate(graph, feeds)
        (got,) = pipeline.run(code, feeds)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_what_is_needed_elsewhere_is_not_in_a_chain() -> None:
    """Weights that are an output, or that something else reads, are in memory anyway."""
    b = Builder()
    q, k, v = (b.input(n, FLOAT32, (4, 30, 8)) for n in "qkv")
    scores = b.contract(q, k, [0, 1, 2], [0, 3, 2], [0, 1, 3])
    weights = Case()._rows(b, scores)
    graph = b.finish({"y": b.contract(weights, v, [0, 1, 3], [0, 3, 2], [0, 1, 2]), "w": weights})
    assert all(kernel.chain is None for kernel in pipeline.cut(graph).kernels)


def test_a_sum_over_queries_is_not_in_a_chain() -> None:
    """Rows that need other rows are not taken a block at a time."""
    b = Builder()
    q, k, v = (b.input(n, FLOAT32, (4, 30, 8)) for n in "qkv")
    scores = b.contract(q, k, [0, 1, 2], [0, 3, 2], [0, 1, 3])
    total = b.broadcast(b.reduce("reduce_sum", scores, [1], keepdims=True), scores.shape)
    graph = b.finish({"y": b.contract(b.div(scores, total), v, [0, 1, 3], [0, 3, 2], [0, 1, 2])})
    assert all(kernel.chain is None for kernel in pipeline.cut(graph).kernels)
    feeds = {n: np.random.default_rng(1).uniform(1, 2, (4, 30, 8)).astype(np.float32) for n in "qkv"}
    (got,) = pipeline.run(pipeline.compile(graph), feeds)
    np.testing.assert_allclose(got, evaluate(graph, feeds)[0], rtol=1e-4)


@pytest.mark.parametrize("n", [8, 32])
def test_a_chain_ends_where_another_begins(n: int) -> None:
    """Three products with a softmax between each two: the middle one is in one chain only."""
    b = Builder()
    x, *others = (b.input(name, FLOAT32, (n, n)) for name in "xkvw")
    for y in others:
        x = b.contract(x, y, [0, 1], [1, 2], [0, 2])
        x = Case()._rows(b, x) if y is not others[-1] else x
    graph = b.finish({"y": x})
    assert [k.chain is not None for k in pipeline.cut(graph).kernels].count(True) == 1
    feeds = {name: np.random.default_rng(k).standard_normal((n, n)).astype(np.float32) for k, name in enumerate("xkvw")}
    (got,) = pipeline.run(pipeline.compile(graph), feeds)
    np.testing.assert_allclose(got, evaluate(graph, feeds)[0], rtol=1e-4, atol=1e-5)


def test_a_row_alone_has_the_same_bits() -> None:
    """Where the number of queries is open, a block with one row and a full one agree."""
    b = Builder()
    n = dims.symbol("n")
    q = b.input("q", FLOAT32, (3, n, 16))
    k, v = (b.input(name, FLOAT32, (3, 50, 16)) for name in "kv")
    scores = b.contract(q, k, [0, 1, 2], [0, 3, 2], [0, 1, 3])
    graph = b.finish({"y": b.contract(Case()._rows(b, scores), v, [0, 1, 3], [0, 3, 2], [0, 1, 2])})
    artifact = pipeline.compile(graph)
    rng = np.random.default_rng(1)
    feeds = {"q": rng.standard_normal((3, 41, 16)), **{x: rng.standard_normal((3, 50, 16)) for x in "kv"}}
    feeds = {x: a.astype(np.float32) for x, a in feeds.items()}
    (together,) = pipeline.run(artifact, feeds)
    for row in (0, 13, 40):
        (alone,) = pipeline.run(artifact, feeds | {"q": np.ascontiguousarray(feeds["q"][:, row : row + 1])})
        assert alone.tobytes() == np.ascontiguousarray(together[:, row : row + 1]).tobytes()
