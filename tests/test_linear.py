"""Products moved towards the inputs: what is linear is passed through, the values stay, and the work gets less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims, dtypes
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.simplify import linear
from stitch.simplify.linear import distribute
from tests import pipeline

FLOAT64 = np.dtype(np.float64)
RNG = np.random.default_rng(7)


def products(graph: Graph, **sizes: int) -> float:
    """Multiply-adds of all contractions."""
    total = 0.0
    for n in graph.nodes:
        if n.prim == "contract":
            labels = dict(zip(n.attrs["a"], n.inputs[0].shape, strict=True))
            labels |= dict(zip(n.attrs["b"], n.inputs[1].shape, strict=True))
            total += float(np.prod([dims.evaluate(d, sizes) for d in labels.values()], dtype=float))
    return total


def enlarged(b: Builder, x: Value, axis: int, factor: int) -> Value:
    """Linear interpolation between neighbours along an axis, by two gathers."""
    n = x.shape[axis]
    assert isinstance(n, int)
    place = np.clip((np.arange(n * factor) + 0.5) / factor - 0.5, 0, n - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, n - 1)
    weight = (place - low).astype(x.dtype)
    perm = [*range(1, axis + 1), 0, *range(axis + 1, x.rank)]
    shape = [n * factor if k == axis else 1 for k in range(x.rank)]
    taken = [b.transpose(b.gather(x, [b.const(i)], axes=[axis]), perm) for i in (low, high)]
    left, right = (b.const(w.reshape(shape)) for w in (1 - weight, weight))
    return b.add(b.mul(taken[0], left), b.mul(taken[1], right))


def head(dtype: np.dtype = dtypes.FLOAT32) -> Graph:
    """A decoder's head: maps of three sizes, brought to one, joined, and multiplied by a matrix."""
    b = Builder("head")
    parts = []
    for k, (size, channels) in enumerate([(16, 24), (8, 40), (4, 64)]):
        x = b.input(f"x{k}", dtype, (size, size, channels))
        w = b.const(RNG.standard_normal((channels, 64)).astype(dtype))
        y = b.contract(x, w, [0, 1, 2], [2, 3], [0, 1, 3])
        y = b.add(y, b.const(RNG.standard_normal(64).astype(dtype)))
        if size < 16:
            y = enlarged(b, enlarged(b, y, 0, 16 // size), 1, 16 // size)
        parts.append(y)
    whole = b.concat(parts, axis=2)
    w = b.const(RNG.standard_normal((64, 192)).astype(dtype))
    y = b.contract(whole, w, [0, 1, 2], [3, 2], [0, 1, 3])
    return b.finish({"y": b.max(y, 0.0)})


def feeds_of(graph: Graph, **sizes: int) -> dict[str, np.ndarray]:
    return {
        v.name: RNG.standard_normal([dims.evaluate(d, sizes) for d in v.shape]).astype(v.dtype) for v in graph.inputs
    }


def agree(graph: Graph, after: Graph, feeds: dict[str, np.ndarray]) -> None:
    (want,), (got,) = (evaluate(g, feeds) for g in (graph, after))
    scale = np.abs(want).max(initial=1.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=(1e-12 if want.dtype == FLOAT64 else 3e-6) * scale)


def test_what_enlarges_comes_after_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST", 0)
    graph = head(FLOAT64)
    after = distribute(graph)
    agree(graph, after, feeds_of(graph))
    before, now = products(graph), products(after)
    # One product for each map, at its own size, straight to the result's channels.
    assert now == 16 * 16 * 24 * 64 + 8 * 8 * 40 * 64 + 4 * 4 * 64 * 64
    assert before > 5 * now
    graph = head()
    feeds = feeds_of(graph)
    (want,), (got,) = evaluate(graph, feeds), pipeline.native(graph, feeds)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())


def test_nothing_changes_where_it_would_be_more_work() -> None:
    b = Builder("low rank")  # through a bottleneck: the product of both matrices is larger than the two
    x = b.input("x", dtypes.FLOAT32, (256, 512))
    y = b.contract(x, b.const(np.ones((512, 8), np.float32)), [0, 1], [1, 2], [0, 2])
    y = b.contract(y, b.const(np.ones((8, 512), np.float32)), [0, 1], [1, 2], [0, 2])
    graph = b.finish({"y": y})
    assert distribute(graph) is graph


def test_two_products_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST", 0)
    b = Builder("two")
    x = b.input("x", FLOAT64, (dims.symbol("n"), 8))
    y = b.contract(x, b.const(RNG.standard_normal((8, 64))), [0, 1], [1, 2], [0, 2])
    y = b.add(y, b.const(RNG.standard_normal(64)))
    y = b.contract(y, b.const(RNG.standard_normal((64, 16))), [0, 1], [1, 2], [0, 2])
    graph = b.finish({"y": y})
    after = distribute(graph)
    assert [n.prim for n in after.nodes].count("contract") == 1
    agree(graph, after, feeds_of(graph, n=5))


def test_two_products_over_two_axes_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST", 0)
    b = Builder("two axes")
    x = b.input("x", FLOAT64, (5, 8))
    y = b.contract(x, b.const(RNG.standard_normal((8, 6, 7))), [0, 1], [1, 2, 3], [3, 0, 2])
    y = b.transpose(y, (2, 1, 0))
    y = b.contract(y, b.const(RNG.standard_normal((7, 4, 6))), [0, 1, 2], [2, 3, 0], [3, 1])
    graph = b.finish({"y": y})
    after = distribute(graph)
    assert [n.prim for n in after.nodes].count("contract") == 1
    agree(graph, after, feeds_of(graph))


@pytest.mark.parametrize("used", ["output", "elsewhere"])
def test_what_is_needed_elsewhere_is_not_counted_as_spared(used: str) -> None:
    """The first product has to be made anyway: from 64 to 96 channels once more would be more work, not less."""
    b = Builder("kept")
    x = b.input("x", dtypes.FLOAT32, (4096, 96))
    y = b.contract(x, b.const(RNG.standard_normal((96, 64)).astype(np.float32)), [0, 1], [1, 2], [0, 2])
    z = b.contract(y, b.const(RNG.standard_normal((64, 64)).astype(np.float32)), [0, 1], [1, 2], [0, 2])
    other = y if used == "output" else b.max(y, 0.0)
    graph = b.finish({"z": z, "y": other})
    assert distribute(graph) is graph


def test_scales_along_what_is_summed_stay() -> None:
    b = Builder("scaled")
    x = b.input("x", dtypes.FLOAT32, (64, 32))
    s = b.input("s", dtypes.FLOAT32, (1, 32))
    y = b.broadcast(b.reshape(b.mul(x, s), (1, 64, 32)), (512, 64, 32))
    y = b.mul(y, b.input("t", dtypes.FLOAT32, (512, 64, 32)))
    y = b.contract(y, b.const(np.ones((32, 64), np.float32)), [0, 1, 2], [2, 3], [0, 1, 3])
    graph = b.finish({"y": y})
    assert distribute(graph) is graph


def test_a_large_table_does_not_grow() -> None:
    """Rows picked from a constant, times a matrix: the table is multiplied only where it is small."""

    def picked(rows: int) -> Graph:
        b = Builder("table")
        i = b.input("i", dtypes.INT64, (4096,))
        x = b.gather(b.const(RNG.standard_normal((rows, 16)).astype(np.float32)), [i], axes=[0])
        y = b.contract(x, b.const(RNG.standard_normal((16, 48)).astype(np.float32)), [0, 1], [1, 2], [0, 2])
        return b.finish({"y": y})

    small, large = picked(100), picked(10000)
    assert distribute(large) is large
    after = distribute(small)
    assert all(n.prim != "contract" for n in after.nodes)
    agree(small, after, {"i": RNG.integers(0, 100, 4096)})


def test_products_that_could_overflow_are_not_multiplied() -> None:
    b = Builder("large")
    x = b.input("x", dtypes.FLOAT32, (512, 8))
    y = b.contract(x, b.const(np.full((8, 256), 1e30, np.float32)), [0, 1], [1, 2], [0, 2])
    y = b.contract(y, b.const(np.full((256, 16), 1e30, np.float32)), [0, 1], [1, 2], [0, 2])
    graph = b.finish({"y": y})
    assert distribute(graph) is graph


@st.composite
def linear_graphs(draw: st.DrawFn) -> tuple[Graph, dict[str, np.ndarray]]:
    """Sums of products of inputs, moved, repeated, scaled and joined, times a matrix over one or two axes."""
    b = Builder("random")
    seed = draw(st.integers(0, 1 << 16))
    rng = np.random.default_rng(seed)
    inputs: list[Value] = []

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def value(shape: tuple[int, ...], depth: int) -> Value:
        rank = len(shape)
        ways = ["input", "const"] if depth == 0 else [
            "input", "sum", "sub", "scale", "div", "neg", "gather", "transpose", "reshape", "broadcast", "concat",
            "slice", "product", "again", "nonlinear",
        ]  # fmt: skip
        way = draw(st.sampled_from(ways))
        axis = number(0, rank - 1)
        match way:
            case "sum" | "sub":
                x, y = value(shape, depth - 1), value(shape, depth - 1)
                return b.add(x, y) if way == "sum" else b.sub(x, y)
            case "scale" | "div":
                keep = [draw(st.booleans()) for _ in shape]
                size = [d if k else 1 for d, k in zip(shape, keep, strict=True)]
                s = b.const(rng.uniform(0.5, 2, size))
                x = value(shape, depth - 1)
                return b.mul(x, s) if way == "scale" else b.div(x, s)
            case "neg":
                return b.unary("neg", value(shape, depth - 1))
            case "gather":
                n = number(1, 4)
                x = value(tuple(n if k == axis else d for k, d in enumerate(shape)), depth - 1)
                y = b.gather(x, [b.const(rng.integers(0, n, shape[axis]))], axes=[axis])
                return b.transpose(y, [*range(1, axis + 1), 0, *range(axis + 1, rank)])
            case "transpose":
                perm = draw(st.permutations(range(rank)))
                before = [0] * rank
                for k, p in enumerate(perm):
                    before[p] = shape[k]
                return b.transpose(value(tuple(before), depth - 1), perm)
            case "reshape":
                other = (*shape[:axis], 1, *shape[axis:])
                if axis + 1 < rank and draw(st.booleans()):
                    other = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
                return b.reshape(value(other, depth - 1), shape)
            case "broadcast":
                keep = [draw(st.booleans()) for _ in shape]
                x = value(tuple(d if k else 1 for d, k in zip(shape, keep, strict=True)), depth - 1)
                return b.broadcast(x, shape)
            case "concat" if shape[axis] > 1:
                cut = number(1, shape[axis] - 1)
                sizes = [tuple(n if k == axis else d for k, d in enumerate(shape)) for n in (cut, shape[axis] - cut)]
                return b.concat([value(s, depth - 1) for s in sizes], axis=axis)
            case "slice":
                x = value(tuple(d + 2 for d in shape), depth - 1)
                return b.slice(x, [1] * rank, shape, [1] * rank)
            case "product":
                n = number(1, 5)
                x = value((*shape[:axis], n, *shape[axis + 1 :]), depth - 1)
                w = b.const(rng.standard_normal((shape[axis], n)))
                labels = list(range(rank))
                out = [rank if k == axis else k for k in labels]
                return b.contract(x, w, labels, [rank, axis], out)
            case "again":
                x = value(shape, depth - 1)
                return b.add(x, b.mul(x, 0.5))
            case "nonlinear":
                return b.max(value(shape, depth - 1), 0.0)
            case "const":
                return b.const(rng.standard_normal(shape))
            case _:
                same = [v for v in inputs if v.shape == shape]
                if same and number(0, 1):
                    return same[0]
                inputs.append(b.input(f"x{len(inputs)}", FLOAT64, shape))
                return inputs[-1]

    shape = tuple(number(1, 6) for _ in range(number(2, 4)))
    rank = len(shape)
    summed = sorted(draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=2)))
    x = value(shape, number(1, 5))
    new = [rank + k for k in range(number(1, 2))]
    extents = {k: shape[k] for k in summed} | {k: number(1, 4) for k in new}
    order = draw(st.permutations([*summed, *new]))
    w = b.const(rng.standard_normal([extents[k] for k in order]))
    out = draw(st.permutations([*(k for k in range(rank) if k not in summed), *new]))
    pairs = [(x, range(rank)), (w, order)]
    (left, first), (right, second) = pairs if draw(st.booleans()) else pairs[::-1]
    graph = b.finish({"y": b.contract(left, right, first, second, out)})
    return graph, feeds_of(graph)


@given(linear_graphs())
@settings(max_examples=200, deadline=None)
def test_values_stay_whatever_is_passed_through(case: tuple[Graph, dict[str, np.ndarray]]) -> None:
    graph, feeds = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LEAST", 0)
        patch.setattr(linear, "GAIN", 1e9)  # every way there is, whether it pays or not
        patch.setattr(linear, "MEMORY", 0.01)
        after = distribute(graph)
    agree(graph, after, feeds)
