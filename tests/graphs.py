"""Random graphs over the primitives, with inputs to run them on: a strategy for hypothesis.

    @given(graphs())
    def test_it(case: Case) -> None:
        expected = evaluate(case.graph, case.feeds)

`exact=True` leaves out what sums or multiplies over an axis, so that any order of computation gives equal numbers, and
puts NaN and infinities into the inputs; nothing in these graphs tells -0.0 from 0.0. `exact=False` has sums and
contractions over moderate numbers, and nothing that jumps: results are close whatever the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from stitch import dims, dtypes, evaluate
from stitch.dims import Dim
from stitch.graph import Builder, Graph, Value
from stitch.ops.primitives import Array

Draw = Callable[[st.SearchStrategy[Any]], Any]

EXTENTS: list[Dim] = [1, 1, 2, 3, 4, 5, 0, dims.symbol("n"), dims.symbol("m")]
ENVIRONMENTS = [{"n": n, "m": m} for n, m in [(2, 3), (1, 1), (5, 1), (1, 4), (0, 2), (3, 0), (7, 2)]]
MOST = 3000  # elements of a value


@dataclass(frozen=True)
class Case:
    graph: Graph
    feeds: dict[str, Array]
    exact: bool

    def __repr__(self) -> str:
        from stitch.text import render

        shapes = {k: v.shape for k, v in self.feeds.items()}
        return f"{render(self.graph)}feeds {shapes}"


@st.composite
def graphs(draw: Draw, exact: bool = True, nodes: int = 12) -> Case:
    """A graph of about that many nodes, most of them used by its outputs, and feeds for its inputs."""
    env = draw(st.sampled_from(ENVIRONMENTS))
    maker = _Maker(draw, Builder("random"), env, exact)
    # Inputs that show every symbol, then some of any shape.
    maker.pool.append(maker.b.input("s", dtypes.FLOAT32, (dims.symbol("n"), dims.symbol("m"))))
    for i in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([dtypes.FLOAT32, dtypes.FLOAT32, dtypes.INT64, dtypes.BOOL]))
        maker.pool.append(maker.b.input(f"x{i}", kind, maker.shape()))
    for _ in range(draw(st.integers(1, nodes))):
        v = maker.step()
        if v is not None:
            maker.pool.append(v)
    used = {v for n in maker.b.nodes for v in n.inputs}
    ends = [v for v in maker.pool if v not in used][-3:] or maker.pool[-1:]
    graph = maker.b.finish({f"y{i}": v for i, v in enumerate(ends)})
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    special = exact and draw(st.booleans())
    feeds = {v.name: _feed(rng, v.dtype, evaluate.numbers(v.shape, env), exact, special) for v in graph.inputs}
    return Case(graph, feeds, exact)


def _feed(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...], exact: bool, special: bool) -> Array:
    if dtype == dtypes.BOOL:
        return rng.random(shape) < 0.5
    if dtype == dtypes.INT64:
        return rng.integers(-4, 5, shape)
    x = (rng.integers(-8, 9, shape) / 2 if exact else rng.uniform(-1.5, 1.5, shape)).astype(np.float32)
    if special:
        x = np.where(rng.random(shape) < 0.2, rng.choice([np.nan, np.inf, -np.inf], shape), x)
    return np.asarray(x, np.float32)


class _Maker:
    """Draws one step at a time: an operation, and operands for it from the pool."""

    def __init__(self, draw: Draw, b: Builder, env: dict[str, int], exact: bool) -> None:
        self.draw, self.b, self.env, self.exact = draw, b, env, exact
        self.pool: list[Value] = []

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def shape(self, most: int = 4) -> tuple[Dim, ...]:
        shape: tuple[Dim, ...] = tuple(self.draw(st.lists(st.sampled_from(EXTENTS), max_size=most)))
        return shape if self.fits(shape) else shape[:1]

    def fits(self, shape: Sequence[Dim]) -> bool:
        return dims.evaluate(dims.product(shape), self.env) <= MOST and len(shape) <= 6

    def value(self, *kinds: np.dtype, least: int = 0) -> Value | None:
        options = [v for v in self.pool if (not kinds or v.dtype in kinds) and v.rank >= least]
        return self.pick(options) if options else None

    def step(self) -> Value | None:
        operations = [self.elementwise, self.unary, self.movement, self.movement, self.reduction, self.indexed]
        if not self.exact:
            operations += [self.contraction, self.contraction, self.reduction]
        made: Value | None = self.pick(operations)()
        return made

    # -------------------------------------------------- elementwise

    def unary(self) -> Value | None:
        x = self.value()
        if x is None:
            return None
        if dtypes.is_float(x.dtype):
            smooth = ["neg", "abs", "sigmoid", "tanh", "sin"]
            prim = self.pick([*smooth, "floor", "rint", "exp", "cast"] if self.exact else [*smooth, "cast"])
            to = self.pick([dtypes.FLOAT64, dtypes.FLOAT16] if self.exact else [dtypes.FLOAT64])
            back = dtypes.FLOAT32
            return self.b.cast(self.b.cast(x, to), back) if prim == "cast" else self.b.unary(prim, x)
        if x.dtype == dtypes.BOOL:
            if self.draw(st.booleans()):
                return self.b.unary("not", x)
            return self.b.cast(x, self.pick([dtypes.FLOAT32, dtypes.INT64]))
        return self.b.unary(self.pick(["neg", "abs"]), x)

    def elementwise(self) -> Value | None:
        x = self.value()
        if x is None:
            return None
        partners = [v for v in self.pool if v.dtype == x.dtype and self.agree(x.shape, v.shape)]
        y = self.pick([*partners, *self.constants(x)])
        if x.dtype == dtypes.BOOL:
            others = [v for v in self.pool if v.dtype != dtypes.BOOL and self.agree(x.shape, v.shape)]
            if others and self.draw(st.booleans()):
                z = self.pick(others)
                return self.b.where(x, z, self.pick([z, self.b.const(2, z.dtype)]))
            return self.b.elementwise(self.pick(["and", "or", "xor"]), x, y)
        prims = ["add", "sub", "mul", "max", "min"]
        if self.exact:
            prims += ["eq", "lt", "le"]
        if isinstance(y, float | int) and y != 0:
            prims += ["div", "pow"] if y == 2 and dtypes.is_float(x.dtype) else ["div"]
        prim = self.pick(prims)
        return self.b.elementwise(prim, *((x, y) if prim in ("div", "pow") or self.draw(st.booleans()) else (y, x)))

    def constants(self, x: Value) -> list[Any]:
        if x.dtype == dtypes.BOOL:
            return [True, False]
        numbers: list[Any] = [0.0, 1.0, 2.0, 0.5, -3.0] if dtypes.is_float(x.dtype) else [0, 1, 2, -3]
        last = x.shape[-1] if x.rank else 1
        if isinstance(last, int):
            numbers.append(self.b.const(np.arange(last) % 3 - 1, x.dtype))
        return numbers

    def agree(self, a: Sequence[Dim], b: Sequence[Dim]) -> bool:
        """Whether two shapes broadcast, without a guard."""
        pairs = list(zip(reversed(a), reversed(b), strict=False))
        if not all(d == e or d == 1 or e == 1 for d, e in pairs):
            return False
        wide = [e if d == 1 else d for d, e in pairs]
        return self.fits([*wide, *a[: max(len(a) - len(b), 0)], *b[: max(len(b) - len(a), 0)]])

    # -------------------------------------------------- movement

    def movement(self) -> Value | None:
        x = self.value()
        if x is None:
            return None
        moves = [self.transpose, self.reshape, self.broadcast, self.slice, self.pad, self.concat, self.window]
        y: Value | None = self.pick([self.transpose, *moves])(x)
        return y

    def transpose(self, x: Value) -> Value:
        return self.b.transpose(x, self.draw(st.permutations(range(x.rank))))

    def reshape(self, x: Value) -> Value:
        """Axes are merged, split, removed and inserted."""
        shape = list(x.shape)
        for _ in range(self.draw(st.integers(1, 3))):
            i = self.draw(st.integers(0, len(shape)))
            match self.pick(["merge", "insert", "remove", "split"]):
                case "merge" if i + 1 < len(shape):
                    shape[i : i + 2] = [shape[i] * shape[i + 1]]
                case "insert" if len(shape) < 5:
                    shape.insert(i, 1)
                case "remove" if 1 in shape:
                    shape.remove(1)
                case "split" if i < len(shape) and shape[i] in (4, 6, 10, 12, 15, 20):
                    d = shape[i]
                    factor = 2 if d in (4, 6, 10) else 3 if d == 15 else 4
                    shape[i : i + 1] = [factor, dims.quotient(d, factor) or 0]
        return self.b.reshape(x, shape)

    def broadcast(self, x: Value) -> Value | None:
        shape = [self.pick(EXTENTS) if d == 1 else d for d in x.shape]
        shape = [*self.shape(1), *shape]
        return self.b.broadcast(x, shape) if self.fits(shape) else None

    def slice(self, x: Value) -> Value:
        starts: list[Dim] = []
        sizes: list[Dim] = []
        steps: list[int] = []
        for d in x.shape:
            if isinstance(d, int) and d > 1 and self.draw(st.booleans()):
                step = self.pick([1, 1, 2, -1])
                start = self.draw(st.integers(0, d - 1))
                most = (d - 1 - start) // step + 1 if step > 0 else start + 1
                starts.append(start)
                sizes.append(self.draw(st.integers(0, most)))
                steps.append(step)
            else:
                starts.append(0)
                sizes.append(d)
                steps.append(1)
        return self.b.slice(x, starts, sizes, steps)

    def pad(self, x: Value) -> Value | None:
        lo = [self.pick([0, 0, 1, 2]) for _ in x.shape]
        hi = [self.pick([0, 0, 1]) for _ in x.shape]
        y = self.b.pad(x, lo, hi, False if x.dtype == dtypes.BOOL else self.pick([0, 1]))
        return y if self.fits(y.shape) else None

    def concat(self, x: Value) -> Value | None:
        if not x.rank:
            return None
        axis = self.draw(st.integers(0, x.rank - 1))
        rest = [d for i, d in enumerate(x.shape) if i != axis]
        alike = [
            v
            for v in self.pool
            if v.dtype == x.dtype and v.rank == x.rank and [d for i, d in enumerate(v.shape) if i != axis] == rest
        ]
        parts = [self.pick(alike) for _ in range(self.draw(st.integers(0, 2)))]
        d = x.shape[axis]
        if isinstance(d, int) and d > 1:  # in pieces: what was cut is joined again
            cut = self.draw(st.integers(1, d - 1))
            starts = [[0] * x.rank, [cut if i == axis else 0 for i in range(x.rank)]]
            sizes = [[n if i == axis else e for i, e in enumerate(x.shape)] for n in (cut, d - cut)]
            parts += [self.b.slice(x, a, n) for a, n in zip(starts, sizes, strict=True)]
        y = self.b.concat([x, *parts] if self.draw(st.booleans()) or not parts else parts, axis)
        return y if self.fits(y.shape) else None

    def window(self, x: Value) -> Value | None:
        axes = [i for i, d in enumerate(x.shape) if isinstance(d, int) and d >= 1][:2]
        if not axes or x.rank + len(axes) > 6:
            return None
        sizes = [self.draw(st.integers(1, min(3, dims.evaluate(x.shape[a], {})))) for a in axes]
        strides = [self.pick([1, 1, 2]) for _ in axes]
        y = self.b.window(x, axes, sizes, strides, [1] * len(axes))
        return y if self.fits(y.shape) else None

    # -------------------------------------------------- the rest

    def reduction(self) -> Value | None:
        x = self.value(dtypes.FLOAT32, dtypes.INT64, least=1)
        if x is None:
            return None
        axes = self.draw(st.sets(st.integers(0, x.rank - 1), min_size=1))
        prim = self.pick(["reduce_max", "reduce_min"])
        if not self.exact or x.dtype == dtypes.INT64:
            prim = self.pick([prim, "reduce_sum", "reduce_sum"])
        return self.b.reduce(prim, x, axes, self.draw(st.booleans()))

    def indexed(self) -> Value | None:
        x = self.value(least=1)
        if x is None:
            return None
        axis = self.draw(st.integers(0, x.rank - 1))
        n = x.shape[axis]
        if not isinstance(n, int) or n == 0:
            return self.b.cast(self.b.iota(x.shape, axis), dtypes.FLOAT32)
        if self.exact and x.dtype == dtypes.FLOAT32 and self.draw(st.booleans()):
            prim = self.pick(["argmax", "argmin"])
            return self.b.apply(prim, x, axis=axis, last=self.draw(st.integers(0, 1)))
        index = self.pick([0, n - 1, list(range(n)), [n - 1], [0, 0], list(range(n))[::-1], [[0, n - 1]]])
        y = self.b.gather(x, [self.b.const(index, dtypes.INT64)], [axis])
        return y if self.fits(y.shape) else None

    def contraction(self) -> Value | None:
        """Two operands, some of whose equal axes get the same label, summed or not."""
        x, y = self.value(dtypes.FLOAT32), self.value(dtypes.FLOAT32)
        if x is None or y is None:
            return None
        a, b = list(range(x.rank)), list(range(10, 10 + y.rank))
        for j, d in enumerate(y.shape):
            equal = [i for i, e in enumerate(x.shape) if e == d and i not in b]
            if equal and self.draw(st.booleans()):
                b[j] = self.pick(equal)
        extent = dict(zip([*a, *b], [*x.shape, *y.shape], strict=True))
        kept = [lab for lab in extent if self.draw(st.booleans()) or not (lab in a and lab in b)]
        out = self.draw(st.permutations(kept))
        if not self.fits(list(extent.values())) or len(extent) > 8:
            return None
        return self.b.contract(x, y, a, b, out)
