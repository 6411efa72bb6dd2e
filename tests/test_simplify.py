"""Simplification: it keeps the meaning, it ends, and each rule does what its docstring shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from stitch import dims, dtypes
from stitch.dims import Dim
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.rewrite import Rule, Rules
from stitch.simplify import moving, passes, simplify
from stitch.simplify.algebra import ALGEBRA
from stitch.simplify.contractions import CONTRACTION, DECOMPOSITION
from stitch.simplify.folding import FOLDING
from stitch.simplify.movement import MOVEMENT
from stitch.simplify.sinking import SINKING
from tests.graphs import Case, graphs

SLOW = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
TABLES = {
    "ALGEBRA": ALGEBRA, "CONTRACTION": CONTRACTION, "DECOMPOSITION": DECOMPOSITION, "FOLDING": FOLDING,
    "MOVEMENT": MOVEMENT, "SINKING": SINKING,
}  # fmt: skip
N = dims.symbol("n")


def agree(case: Case) -> None:
    after = simplify(case.graph)
    after.check()
    assert after.inputs == case.graph.inputs
    with np.errstate(all="ignore"):
        expected, found = evaluate(case.graph, case.feeds), evaluate(after, case.feeds)
    for x, y in zip(expected, found, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if case.exact:
            np.testing.assert_array_equal(x, y)
        else:
            scale = float(np.max(np.abs(x[np.isfinite(x)]), initial=1)) if x.dtype.kind == "f" else 1
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale)
    assert len(simplify(after).nodes) == len(after.nodes)


@SLOW
@given(graphs(exact=True))
def test_exact_graphs_keep_every_number(case: Case) -> None:
    agree(case)


@SLOW
@given(graphs(exact=False))
def test_sums_stay_close(case: Case) -> None:
    agree(case)


# ------------------------------------------------------------------ one example for each rule


class Sample(Builder):
    """A builder with inputs made as they are needed."""

    def x(self, *shape: Dim, dtype: np.dtype = dtypes.FLOAT32) -> Value:
        return self.input(f"x{len(self.inputs)}", dtype, shape)

    def contracted(self, a: Value, b: Value, labels: str) -> Value:
        left, out = labels.split("->")
        first, second = ([ord(c) - ord("a") for c in part] for part in left.split(","))
        return self.contract(a, b, first, second, [ord(c) - ord("a") for c in out])


def graph_of(make: Callable[[Sample], Value]) -> Graph:
    b = Sample()
    return b.finish({"y": make(b)})


def prims(graph: Graph) -> str:
    """The primitives in order, without constants."""
    return " ".join(n.prim for n in graph.nodes if n.prim != "const")


def sliced(b: Sample, x: Value, start: int, size: int) -> Value:
    return b.slice(x, [0, start], [x.shape[0], size])


def steps(b: Sample) -> Value:
    """Integers in floats."""
    return b.cast(b.x(N, dtype=I8), F32)


I8, I64, BOOL, F32, F64 = dtypes.INT8, dtypes.INT64, dtypes.BOOL, dtypes.FLOAT32, dtypes.FLOAT64
ROWS = np.arange(4, dtype=np.float32)

# rule -> (a graph, what is left of it)
EXAMPLES: dict[str, tuple[Callable[[Sample], Value], str]] = {
    "_uniform": (lambda b: b.mul(b.x(4), b.const(np.ones(4, np.float32))), ""),
    "_known": (lambda b: b._emit("neg", [b.dims([N, 2 * N])], {}, I64, (2,), None), "shape"),
    "_folded": (lambda b: b.add(b.x(2, 2), b.transpose(b.const(ROWS.reshape(2, 2)), [1, 0])), "add"),
    "_units": (lambda b: b.sub(b.mul(b.add(b.x(N), -0.0), 1), 0.0), ""),
    "_absorbed": (lambda b: b.mul(b.x(N, dtype=I64), 0), "broadcast"),
    "_idempotent": (lambda b: b.max(x := b.x(N), x), ""),
    "_inverse_pair": (lambda b: b.unary("neg", b.unary("neg", b.x(N))), ""),
    "_sign_dropped": (lambda b: b.unary("abs", b.unary("abs", b.unary("neg", b.x(N)))), "abs"),
    "_reciprocal": (lambda b: b.div(b.x(N), 8), "broadcast mul"),
    "_power": (lambda b: b.pow(b.pow(b.x(N), 2), 0.5), "mul sqrt"),
    "_of_itself": (lambda b: b.le(x := b.x(N, dtype=I64), x), "broadcast"),
    "_decided": (lambda b: b.where(b.unary("not", b.x(N, dtype=BOOL)), b.x(N), b.x(N)), "where"),
    "_cast": (lambda b: b.cast(b.cast(b.x(N), F64), dtypes.FLOAT16), "cast"),
    "_clamped": (lambda b: b.max(b.min(b.x(N, dtype=I8), 5), -128), "broadcast min"),
    "_whole": (lambda b: b.unary("rint", b.unary("floor", b.x(N))), "floor"),
    "_requantised": (lambda b: b.unary("rint", b.div(b.max(b.mul(steps(b), 0.3), 0.0), 0.3)), "cast broadcast max"),
    "_moved_back": (lambda b: b.add(b.sub(steps(b), 3.0), 3.0), "cast"),
    "_through_integer": (lambda b: b.cast(b.cast(b.min(steps(b), 5.0), I8), F32), "cast broadcast min"),
    "_narrowed": (lambda b: b.unary("exp", b.broadcast(b.x(N), [4, N])), "exp broadcast"),
    "_of_ones": (lambda b: b.reduce("reduce_sum", b.x(N, 1), [1]), "reshape"),
    "_twice": (lambda b: b.reduce("reduce_sum", b.reduce("reduce_sum", b.x(N, 4, 5), [1]), [1]), "reduce_sum"),
    "_of_repeated": (lambda b: b.reduce("reduce_max", b.broadcast(b.x(N), [4, N]), [0]), ""),
    "_unmoved": (lambda b: b.apply("pad", b.x(N), lo=(0,), hi=(0,), value=0), ""),
    "_reshaped_twice": (lambda b: b.reshape(b.reshape(b.x(N, 6), [N, 2, 3]), [N, 3, 2]), "reshape"),
    "_reshaped_broadcast": (lambda b: b.reshape(b.broadcast(b.x(N), [4, N]), [4, 1, N]), "broadcast"),
    "_broadcast_source": (lambda b: b.broadcast(b.broadcast(b.x(N), [4, N]), [3, 4, N]), "broadcast"),
    "_transposed": (lambda b: b.transpose(b.transpose(b.x(N, 4), [1, 0]), [1, 0]), ""),
    "_sliced": (lambda b: sliced(b, b.concat([b.x(N, 4), b.x(N, 5)], 1), 5, 3), "slice"),
    "_padded_twice": (lambda b: b.pad(b.pad(b.x(N), [1], [0]), [0], [2]), "pad"),
    "_concatenated": (lambda b: b.concat([sliced(b, x := b.x(N, 5), 0, 2), sliced(b, x, 2, 3)], 1), ""),
    "_gathered": (lambda b: b.gather(b.x(8, N), [b.const([2, 4, 6])], [0]), "slice"),
    "_single_taps": (lambda b: b.window(b.x(N, 8), [1], [1], [2], [1]), "slice reshape"),
    "_relabelled": (lambda b: b.contracted(b.transpose(b.x(N, 3), [1, 0]), b.x(N, 5), "ak,kb->ab"), "contract"),
    "_without_ones": (lambda b: b.contracted(b.x(N, 1, 4), b.x(4, 5), "ajk,kb->ajb"), "reshape contract reshape"),
    "_unrepeated": (
        lambda b: b.contracted(b.broadcast(b.x(3, 4), [N, 3, 4]), b.x(N, 4, 5), "hak,hkb->hab"),
        "contract",
    ),
    "_presummed": (lambda b: b.contracted(b.x(N, 3, 4), b.x(4, 5), "ajk,kb->ab"), "reduce_sum contract"),
    "_without_reuse": (lambda b: b.contracted(b.x(N, 4), b.x(4), "ak,k->a"), "broadcast mul reduce_sum"),
    "_extremum_place": (
        lambda b: b.apply("argmax", b.x(N, 4), axis=1, last=0),
        "reduce_max reshape broadcast eq ne or iota broadcast where reduce_min",
    ),
    "_sunk_elementwise": (
        lambda b: b.add(b.transpose(b.x(N, 3), [1, 0]), b.transpose(b.x(N, 3), [1, 0])),
        "add transpose",
    ),
    "_sunk_concat": (
        lambda b: b.concat([b.transpose(b.x(N, 3), [1, 0]), b.transpose(b.x(N, 3), [1, 0])], 0),
        "concat transpose",
    ),
    "_sunk_per_axis": (lambda b: sliced(b, b.transpose(b.x(8, N), [1, 0]), 2, 3), "slice transpose"),
    "_sunk_reduction": (lambda b: b.reduce("reduce_max", b.transpose(b.x(N, 3, 4), [0, 2, 1]), [1, 2]), "reduce_max"),
    "_sunk_gather": (
        lambda b: b.gather(b.transpose(b.x(N, 3, 8), [2, 0, 1]), [b.x(5, dtype=I64)], [0]),
        "gather",
    ),
    "_sunk_reshape": (
        lambda b: b.mul(
            b.transpose(y := b.reshape(b.transpose(b.x(N, 3, 4, 5), [0, 3, 1, 2]), [N, 5, 12]), [0, 2, 1]),
            b.reduce("reduce_max", y, [1, 2], keepdims=True),
        ),
        "reshape reduce_max reshape broadcast mul",
    ),
}


def rule_names() -> list[str]:
    return sorted({rule.__name__ for table in TABLES.values() for rules in table.values() for rule in rules})


@contextmanager
def without(name: str) -> Iterator[None]:
    def filtered(table: Rules) -> dict[str, list[Rule]]:
        return {prim: [rule for rule in rules if rule.__name__ != name] for prim, rules in table.items()}

    with pytest.MonkeyPatch.context() as patch:
        for key, table in TABLES.items():
            patch.setattr(passes, key, filtered(table))
        yield


@pytest.mark.parametrize("name", rule_names())
def test_rules(name: str) -> None:
    make, left = EXAMPLES[name]
    graph = graph_of(make)
    after = simplify(graph)
    after.check()
    assert prims(after) == left
    with without(name):
        assert prims(simplify(graph)) != left or name == "_unmoved"


# ------------------------------------------------------------------ what must not change


@pytest.mark.parametrize(
    "make",
    [
        lambda b: b.add(b.x(N), 0.0),
        lambda b: b.mul(b.x(N), 0.0),
        lambda b: b.sub(b.x(N), -0.0),
        lambda b: b.div(b.x(N), 3.0),
        lambda b: b.pow(b.x(N), 0.5),
        lambda b: b.cast(b.cast(b.x(N), I8), F32),
        lambda b: b.cast(b.cast(b.min(b.max(b.x(N), -128.0), 127.0), I8), F32),
        lambda b: b.add(b.sub(b.x(), 3.0), 3.0),
        lambda b: b.unary("rint", b.div(b.mul(b.x(), 0.3), 0.3)),
        lambda b: b.max(b.x(N, dtype=I8), -127),
        lambda b: b.eq(x := b.x(N), x),
        lambda b: b.sub(x := b.x(N), x),
        lambda b: b.cast(b.cast(b.x(N), dtypes.FLOAT16), dtypes.FLOAT32),
        lambda b: b.reduce("reduce_max", b.broadcast(b.x(3), [N, 3]), [0]),  # n may be 0
        lambda b: b.gather(b.x(N, 3), [b.const(0)], [0]),  # n may be 0
        lambda b: b.pad(b.pad(b.x(N), [1], [1], 0.0), [1], [1], -0.0),
    ],
)
def test_left_alone(make: Callable[[Sample], Value]) -> None:
    graph = graph_of(make)
    assert prims(simplify(graph)) == prims(graph)


def test_signs_of_zero_and_nan_are_kept() -> None:
    x = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.0, -2.5], np.float32)
    b = Sample()
    v = b.x(8)
    made = [b.add(v, -0.0), b.sub(v, 0.0), b.mul(v, 1), b.div(v, 4), b.pow(v, 2), b.pow(v, -1), b.pow(v, 1)]
    graph = b.finish({str(i): y for i, y in enumerate(made)})
    for before, after in zip(evaluate(graph, {"x0": x}), evaluate(simplify(graph), {"x0": x}), strict=True):
        np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(np.signbit(before[before == 0]), np.signbit(after[after == 0]))


@pytest.mark.parametrize("prim", ["argmax", "argmin"])
@pytest.mark.parametrize("last", [0, 1])
def test_places_of_extrema(prim: str, last: int) -> None:
    x = np.array([[1, 3, 3, 2], [np.nan, 5, np.nan, 1], [np.inf, np.inf, 0, 0], [-np.inf] * 4], np.float32)
    graph = graph_of(lambda b: b.apply(prim, b.x(N, 4), axis=1, last=last))
    np.testing.assert_array_equal(evaluate(simplify(graph), {"x0": x})[0], evaluate(graph, {"x0": x})[0])


# ------------------------------------------------------------------ machinery


def test_equal_nodes_are_one_and_dead_ones_none() -> None:
    def make(b: Sample) -> Value:
        x = b.x(N)
        b.unary("tan", x)
        return b.add(b.unary("exp", x), b.unary("exp", x))

    assert prims(simplify(graph_of(make))) == "exp add"


def test_constants_are_shared_and_not_copied() -> None:
    big = np.random.default_rng(0).random((64, 64), np.float32)
    other = big.copy()
    other[3, 5] += 1

    def make(b: Sample) -> Value:
        total = b.add(b.mul(b.x(64, 64), b.const(big)), b.mul(b.x(64, 64), b.const(big.copy())))
        return b.add(total, b.mul(b.x(64, 64), b.transpose(b.const(other), [1, 0])))

    arrays = [n.attrs["array"] for n in simplify(graph_of(make)).nodes if n.prim == "const"]
    assert len(arrays) == 2
    assert all(np.shares_memory(a, big) or np.shares_memory(a, other) for a in arrays)


def test_broadcasts_of_constants_are_not_spelt_out() -> None:
    graph = simplify(graph_of(lambda b: b.unary("exp", b.broadcast(b.const(ROWS), [1000, 4]))))
    assert prims(graph) == "broadcast"


@pytest.mark.parametrize(("n", "left"), [(4, ""), (128, ""), (1024, "contract")])
def test_small_products_of_constants_are_computed(n: int, left: str) -> None:
    square = np.arange(n * n, dtype=np.float32).reshape(n, n)
    graph = simplify(graph_of(lambda b: b.contract(b.const(square), b.const(square + 1), [0, 1], [1, 2], [0, 2])))
    assert prims(graph) == left


def test_a_host_operator_is_kept_for_the_symbols_it_binds() -> None:
    def make(b: Sample) -> Value:
        k = b.fresh("k")
        b.host("nonzero", [b.x(N)], [(I64, (1, k))])
        return b.dims([k])

    assert prims(simplify(graph_of(make))) == "host shape"


def test_nothing_changes_twice() -> None:
    graph = simplify(graph_of(EXAMPLES["_extremum_place"][0]))
    assert simplify(graph) is graph


# ------------------------------------------------------------------ layout


def conv(b: Sample, x: Value, channels: int, size: int = 3) -> Value:
    """A convolution as the importer writes it."""
    side = size // 2
    last = b.transpose(x, [0, 2, 3, 1])
    windows = b.window(b.pad(last, [0, side, side, 0], [0, side, side, 0]), [1, 2], [size, size], [1, 1], [1, 1])
    taps = (channels, dims.evaluate(x.shape[1], {}), size, size)
    kernel = b.const(np.random.default_rng(len(b.nodes)).random(taps, np.float32))
    y = b.contracted(windows, kernel, "nhwcij,ocij->nhwo")
    return b.transpose(b.add(y, b.const(np.arange(channels, dtype=np.float32))), [0, 3, 1, 2])


def relu(b: Sample, x: Value) -> Value:
    return b.max(x, 0)


def test_a_residual_network_stays_channels_last() -> None:
    def make(b: Sample) -> Value:
        x = relu(b, conv(b, b.x(N, 3, 8, 8), 16))
        for _ in range(3):
            x = relu(b, b.add(x, conv(b, relu(b, conv(b, x, 16)), 16)))
        pooled = b.mean(x, [2, 3], keepdims=True)
        x = b.mul(x, b.unary("sigmoid", conv(b, pooled, 16, size=1)))  # squeeze and excitation
        return b.reshape(b.mean(b.concat([x, x], 1), [2, 3], keepdims=True), [N, 32])

    graph = graph_of(make)
    after = simplify(graph)
    assert [n.inputs[0] for n in moving(after)] == [after.inputs[0]]
    x = np.random.default_rng(1).random((2, 3, 8, 8), np.float32)
    np.testing.assert_allclose(evaluate(after, {"x0": x})[0], evaluate(graph, {"x0": x})[0], rtol=1e-5)


def gelu(b: Sample, order: str, root: float, dtype: np.dtype = dtypes.FLOAT32) -> Value:
    """GELU in the ways in which exporters write it."""
    x = b.x(N, dtype=dtype)
    curve = b.unary("erf", b.div(x, root) if root > 1 else b.mul(x, root))
    match order:
        case "x/2 (1 + e)":
            return b.mul(b.mul(x, 0.5), b.add(curve, 1))
        case "x (e + 1) / 2":
            return b.mul(b.mul(x, b.add(1, curve)), 0.5)
        case _:
            return b.mul(b.mul(b.add(curve, 1), 0.5), x)


ORDERS = ("x/2 (1 + e)", "x (e + 1) / 2", "(e + 1) / 2 x")


@pytest.mark.parametrize("root", [2**0.5, 0.5**0.5, float(np.nextafter(np.float32(0.5**0.5), np.float32(0)))])
@pytest.mark.parametrize("order", ORDERS)
def test_gelu_in_halves(order: str, root: float) -> None:
    graph = graph_of(lambda b: gelu(b, order, root))
    after = simplify(graph)
    assert prims(after).replace("broadcast ", "") == "half_erf add mul"
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30, -1e-38, 3e38, -3e38]
    x = np.concatenate([np.linspace(-7, 7, 4001), edges]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        got, want = (evaluate(g, {"x0": x})[0] for g in (after, graph))
    exact = [v * (0.5 + math.erf(v * math.sqrt(0.5)) / 2) for v in x.tolist()]
    np.testing.assert_allclose(got, exact, rtol=3e-7, atol=1e-7)
    assert np.array_equal(np.signbit(got[-9:]), np.signbit(want[-9:]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("root", "dtype"), [(0.7, dtypes.FLOAT32), (0.70711, dtypes.FLOAT32), (1.5, dtypes.FLOAT32),
                                             (2**0.5, dtypes.FLOAT16)])  # fmt: skip
def test_another_erf_stays(order: str, root: float, dtype: np.dtype) -> None:
    after = simplify(graph_of(lambda b: gelu(b, order, root, dtype)))
    assert "erf" in prims(after).split()


def test_only_a_factor_of_two_and_a_half_cancel() -> None:
    def make(b: Sample) -> Value:
        x, y = b.x(N), b.x(N)
        return b.add(b.mul(b.mul(x, 0.5), b.mul(y, 4)), b.mul(b.mul(x, b.mul(y, 2)), 0.25))

    assert prims(simplify(graph_of(make))).replace("broadcast ", "") == "mul mul mul mul mul mul add"


def test_a_transpose_is_hoisted_where_it_moves_less() -> None:
    def make(b: Sample) -> Value:
        x, y = b.x(N, 4), b.x(4, N)
        return b.transpose(b.mul(relu(b, b.transpose(y, [1, 0])), relu(b, b.unary("exp", x))), [1, 0])

    assert len(moving(simplify(graph_of(make)))) == 1


def test_channels_last_norm_needs_no_transpose() -> None:
    def make(b: Sample) -> Value:
        x = conv(b, b.x(N, 3, 8, 8), 16)
        last = b.transpose(x, [0, 2, 3, 1])
        centred = b.sub(last, b.mean(last, [3], keepdims=True))
        return b.reshape(conv(b, b.transpose(centred, [0, 3, 1, 2]), 1), [N, 64])

    assert len(moving(simplify(graph_of(make)))) == 1


def test_no_pass_looks_twice_at_a_graph_that_it_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    left: set[tuple[str, int]] = set()
    graphs_: list[Graph] = []  # kept, so that an id is one graph's only
    for run in (passes.decompose, passes.tidy, passes.fold, passes.sink):

        def watched(graph: Graph, run: Callable[[Graph], Graph] = run) -> Graph:
            name = run.__name__
            assert (name, id(graph)) not in left, f"{name} again"
            after = run(graph)
            graphs_.append(graph)
            if after is graph:
                left.add((name, id(graph)))
            return after

        monkeypatch.setattr(passes, run.__name__, watched)

    def make(b: Sample) -> Value:
        x = b.transpose(b.x(N, 4), [1, 0])
        return b.transpose(b.add(relu(b, x), relu(b, b.unary("exp", x))), [1, 0])

    simplify(graph_of(make))
    assert {name for name, _ in left} == {"decompose", "tidy", "fold", "sink"}


@pytest.mark.parametrize(
    ("rows", "dtype", "kept"), [(200, F32, False), (200, dtypes.INT32, True), (1 << 15, F32, True)], ids=str
)
def test_products_of_constants_are_computed_now_unless_they_are_dear(rows: int, dtype: Any, kept: bool) -> None:
    """As of embedded positions with the weights of keys. Integers have no fast product here."""
    x, w = (np.arange(n * 96, dtype=np.int64).reshape(n, 96) % 7 for n in (rows, 96 if rows < 1000 else 128))

    def make(b: Sample) -> Value:
        y = b.contracted(b.const(x.astype(dtype)), b.const(w.astype(dtype)), "ak,bk->ab")
        return b.add(b.x(*y.shape, dtype=dtype), y)

    left = simplify(graph_of(make))
    assert ("contract" in {n.prim for n in left.nodes}) == kept
    if not kept:
        (found,) = evaluate(left, {left.inputs[0].name: np.zeros((rows, 96), dtype)})
        np.testing.assert_array_equal(found, x @ w.T)
