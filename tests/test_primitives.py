"""Every field of every row of the table of primitives, and native code against formulas on Python's own numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims, dtypes
from stitch.evaluate import evaluate, numbers
from stitch.graph import Builder, Value
from stitch.ops.primitives import PRIMITIVES, REDUCTIONS, Array
from tests import pipeline

ELEMENTWISE = [name for name, row in PRIMITIVES.items() if row.kind == "elementwise"]
CASTS = ("cast", "bitcast")
HALVES = (dtypes.FLOAT16, dtypes.BFLOAT16)
COUNT = 397  # elements of a test vector: a prime


def meaning(name: str, *arrays: Array, **attrs: Any) -> Array:
    return np.asarray(PRIMITIVES[name].meaning(attrs, *arrays))


def vector(dtype: np.dtype, seed: int) -> Array:
    """Special values of a dtype and random ones, shuffled."""
    rng = np.random.default_rng([seed, dtype.num])
    if dtype == dtypes.BOOL:
        return rng.random(COUNT) < 0.5
    if dtypes.is_integer(dtype):
        info = np.iinfo(dtype)
        special = [info.min, info.min + 1, info.max, info.max - 1, info.max // 2, 0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 65]
        special += [-1, -2, -3, -8] if info.min else []
        ordinary = rng.integers(max(info.min, -100), min(info.max, 100), COUNT - 3 * len(special)).tolist()
        return rng.permutation(np.array([*(3 * special), *ordinary], dtype))
    points: list[float] = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1,
        -1,
        0.5,
        -0.5,
        1.5,
        -1.5,
        2.5,
        2,
        -2,
        3,
        2**-14,
        60000.0,
    ]
    ordinary = rng.standard_normal(COUNT - 6 * len(points) - 60) * 3
    wide = np.exp(rng.uniform(-9, 9, 60)) * rng.choice([-1, 1], 60)
    return rng.permutation(np.array([*(6 * points), *ordinary, *wide]).astype(dtype))


def operands(name: str, dtype: np.dtype) -> list[Array]:
    kinds = [dtypes.BOOL, dtype, dtype] if name == "where" else [dtype] * PRIMITIVES[name].arity
    xs = [vector(d, k) for k, d in enumerate(kinds)]
    if name in ("shl", "shr"):  # by negative numbers is not defined
        xs[1] = np.minimum(np.where(xs[1] < 0, 0, xs[1]), 2 * 8 * dtype.itemsize).astype(dtype)
    return xs


# ------------------------------------------------------------------ the rows themselves


@pytest.mark.parametrize("name", PRIMITIVES)
def test_row(name: str) -> None:
    row = PRIMITIVES[name]
    assert row.name == name
    assert row.arity >= -1
    assert row.cost >= 0
    assert row.ulp >= 0
    assert row.ulp == 0 or row.kind == "elementwise"
    assert row.identity is None or row.commutative
    assert not row.associative or row.arity == 2
    assert not row.commutative or row.arity == 2
    assert set(row.domain) <= set(dtypes.ALL)
    if row.kind == "elementwise" and name != "bitcast":
        assert row.cost > 0, "elementwise work is never free"


def test_the_set_is_closed() -> None:
    """What is listed in the design; a change here is a change of the whole compiler."""
    kinds: dict[str, int] = {}
    for row in PRIMITIVES.values():
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    expected = {"source": 3, "elementwise": 50, "reduction": 6, "movement": 8, "contraction": 1, "opaque": 2}
    assert kinds == expected
    assert {PRIMITIVES[a].kind for a in REDUCTIONS} == {"reduction"}
    assert all(PRIMITIVES[b].associative and PRIMITIVES[b].commutative for b in REDUCTIONS.values())


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_meaning_has_the_dtype_and_shape_of_the_rules(name: str) -> None:
    row = PRIMITIVES[name]
    for dtype in row.domain:
        targets = row.domain if name == "cast" else [d for d in row.domain if d.itemsize == dtype.itemsize]
        for to in targets if name in CASTS else [dtype]:
            attrs = {"dtype": to} if name in CASTS else {}
            for shape in [(COUNT,), (), (0, 3), (1,), (2, 3, 5)]:
                xs = [x[: math.prod(shape)].reshape(shape) for x in operands(name, dtype)]
                got = meaning(name, *xs, **attrs)
                assert got.dtype == row.dtype(attrs, *(x.dtype for x in xs)), f"{dtype} to {to}"
                assert got.shape == tuple(row.shape(attrs, *(x.shape for x in xs))) == shape


# ------------------------------------------------------------------ algebra

BINARY = [name for name in ELEMENTWISE if PRIMITIVES[name].arity == 2]


def grid(dtype: np.dtype) -> Array:
    """A few values in which every law that does not hold has a counterexample."""
    if dtype == dtypes.BOOL:
        return np.array([False, True])
    if dtypes.is_integer(dtype):
        return np.unique(
            np.array([0, 1, 2, 3, 5, np.iinfo(dtype).max, np.iinfo(dtype).max - 1, np.iinfo(dtype).min], dtype)
        )
    return np.array([0, -0.0, 1, 2, 3, -1, 0.5, np.inf, -np.inf, np.nan]).astype(dtype)


def equal(a: Array, b: Array) -> bool:
    return bool(np.all((a == b) | ((a != a) & (b != b))))


@pytest.mark.parametrize("name", BINARY)
def test_commutative(name: str) -> None:
    holds = True
    for dtype in PRIMITIVES[name].domain:
        a, b = np.meshgrid(grid(dtype), grid(dtype))
        holds = holds and equal(meaning(name, a, b), meaning(name, b, a))
    assert holds == PRIMITIVES[name].commutative


@pytest.mark.parametrize("name", [n for n in BINARY if PRIMITIVES[n].dtype({}, *[dtypes.INT32] * 2) == dtypes.INT32])
def test_associative_on_integers(name: str) -> None:
    holds = True
    for dtype in [d for d in PRIMITIVES[name].domain if not dtypes.is_float(d)]:
        a, b, c = np.meshgrid(grid(dtype), grid(dtype), grid(dtype))
        if name in ("shl", "shr"):
            b, c = np.maximum(b, 0) & 7, np.maximum(c, 0) & 7
        holds = holds and equal(meaning(name, meaning(name, a, b), c), meaning(name, a, meaning(name, b, c)))
    assert holds == PRIMITIVES[name].associative


@pytest.mark.parametrize("name", BINARY)
def test_identity(name: str) -> None:
    e = PRIMITIVES[name].identity
    if e is None:
        return
    for dtype in [d for d in PRIMITIVES[name].domain if d != dtypes.BOOL]:
        x = vector(dtype, 0)
        neutral = np.full(x.shape, e, dtype)
        assert equal(meaning(name, neutral, x), x)
        assert equal(meaning(name, x, neutral), x)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_fold_with_their_binary_primitive(name: str) -> None:
    for dtype in PRIMITIVES[name].domain:
        if dtypes.is_float(dtype):
            continue
        x = vector(dtype, 0).reshape(-1)[:396].reshape(4, 99)
        folded = x[0]
        for row in x[1:]:
            folded = meaning(REDUCTIONS[name], folded, row)
        np.testing.assert_array_equal(meaning(name, x, axes=(0,)), folded)
        # Nothing at all is the identity: folding it in changes nothing.
        empty = meaning(name, x[:0], axes=(0,))
        np.testing.assert_array_equal(meaning(REDUCTIONS[name], empty, folded), folded)


# ------------------------------------------------------------------ scalar formulas

Number = Any


def _on_floats(fn: Callable[..., float], **special: float) -> Callable[..., float]:
    """A function of math; `special` values by argument; what it refuses is NaN, what overflows infinite."""
    table = {float(k.replace("m", "-").replace("p", "")): v for k, v in special.items()}

    def apply(*xs: float) -> float:
        if any(map(math.isnan, xs)):
            return math.nan
        if len(xs) == 1 and xs[0] in table:
            return table[xs[0]]
        try:
            return fn(*xs)
        except ValueError:
            return math.nan
        except OverflowError:
            return math.copysign(math.inf, xs[0]) if fn is not math.exp and fn is not math.cosh else math.inf

    return apply


def _whole(fn: Callable[[float], int]) -> Callable[[float], float]:
    return lambda x: math.copysign(float(fn(x)), x) if math.isfinite(x) else x


def _sign(x: Number) -> Number:
    return x if x != x else type(x)((x > 0) - (x < 0))


def _divide(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)
    return a / b


def _float_mod(a: float, b: float) -> float:
    """Python's own %, and like numpy where that raises."""
    if b == 0 or math.isinf(a) or math.isnan(a) or math.isnan(b):
        return math.nan
    return a % b


def _fmod(a: float, b: float) -> float:
    return math.nan if b == 0 or math.isinf(a) else math.fmod(a, b)


def _pow(a: float, b: float) -> float:
    if a == 0 and b < 0:
        odd = math.isfinite(b) and b == int(b) and int(b) % 2 == 1
        return math.copysign(math.inf, a) if odd else math.inf
    try:
        return math.pow(a, b)
    except ValueError:
        return math.nan
    except OverflowError:
        odd = b == int(b) and int(b) % 2 == 1
        return -math.inf if a < 0 and odd else math.inf


def _sigmoid(x: float) -> float:
    return float(1 / (1 + mpmath.exp(-x))) if math.isfinite(x) else math.nan if x != x else float(x > 0)


def _whole_power(a: int, b: int) -> int:
    return pow(a, b, 1 << 64) if b >= 0 else 0


def _extreme(pick: Callable[..., Number]) -> Callable[..., Number]:
    return lambda a, b: a if a != a else b if b != b else pick(a, b)


def _truncate(a: int, b: int) -> int:
    return 0 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


FLOATS: Mapping[str, Callable[..., Number]] = {
    "neg": lambda x: -x, "abs": abs, "floor": _whole(math.floor), "ceil": _whole(math.ceil), "rint": _whole(round),
    "sign": _sign, "sqrt": _on_floats(math.sqrt), "rsqrt": _on_floats(lambda x: _divide(1, math.sqrt(x))),
    "exp": _on_floats(math.exp), "expm1": _on_floats(math.expm1), "log": _on_floats(math.log, p0=-math.inf),
    "log1p": _on_floats(math.log1p, m1=-math.inf), "sin": _on_floats(math.sin), "cos": _on_floats(math.cos),
    "tan": _on_floats(math.tan), "asin": _on_floats(math.asin), "acos": _on_floats(math.acos),
    "atan": _on_floats(math.atan), "sinh": _on_floats(math.sinh), "cosh": _on_floats(math.cosh),
    "asinh": _on_floats(math.asinh), "acosh": _on_floats(math.acosh),
    "atanh": _on_floats(math.atanh, p1=math.inf, m1=-math.inf), "tanh": _on_floats(math.tanh),
    "erf": _on_floats(math.erf), "half_erf": _on_floats(lambda x: math.erf(x * math.sqrt(0.5)) / 2),
    "sigmoid": _sigmoid,
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": _divide,
    "mod": _float_mod, "fmod": _fmod, "pow": _pow, "min": _extreme(min), "max": _extreme(max),
    "fma": lambda a, b, c: a * b + c,
}  # fmt: skip

INTEGERS: Mapping[str, Callable[..., Number]] = {
    "neg": lambda x: -x, "abs": abs, "sign": _sign, "not": lambda x: ~x,
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": _truncate,
    "mod": lambda a, b: a % b if b else 0, "fmod": lambda a, b: a - b * _truncate(a, b) if b else 0,
    "pow": _whole_power,
    "min": min, "max": max, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "shl": lambda a, n: a << n, "shr": lambda a, n: a >> n,
}  # fmt: skip

BOOLEANS: Mapping[str, Callable[..., Number]] = {
    "abs": bool, "not": lambda x: not x, "add": lambda a, b: a or b, "mul": lambda a, b: a and b,
    "min": lambda a, b: a and b, "max": lambda a, b: a or b, "and": lambda a, b: a and b, "or": lambda a, b: a or b,
    "xor": lambda a, b: a != b,
}  # fmt: skip

ANY: Mapping[str, Callable[..., Number]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "where": lambda c, a, b: a if c else b,
}  # fmt: skip


def formula(name: str, dtype: np.dtype) -> Callable[..., Number]:
    if name in ANY:
        return ANY[name]
    return (BOOLEANS if dtype == dtypes.BOOL else FLOATS if dtypes.is_float(dtype) else INTEGERS)[name]


def wrap(x: int, dtype: np.dtype) -> int:
    bits = 8 * dtype.itemsize
    x &= (1 << bits) - 1
    return x - (1 << bits) if dtypes.is_signed(dtype) and x >> (bits - 1) else x


@cache
def truth(name: str, dtype: np.dtype) -> Array:
    """The formula on the operands: float64 for floats, the exact, wrapped result otherwise."""
    fn = formula(name, dtype)
    floats = dtypes.is_float(dtype)
    columns = [(x.astype(np.float64) if dtypes.is_float(x.dtype) else x).tolist() for x in operands(name, dtype)]
    found = [fn(*row) for row in zip(*columns, strict=True)]
    if name in ("eq", "ne", "lt", "le") or dtype == dtypes.BOOL:
        return np.array(found, bool)
    return np.array(found) if floats else np.array([wrap(x, dtype) for x in found], dtype)


def comparable(name: str, dtype: np.dtype) -> Array:
    """Where the result is defined: not the integer powers that overflow or need a fraction, through float64."""
    everywhere = np.ones(COUNT, bool)
    if name in ("mod", "fmod") and dtypes.is_integer(dtype):
        return np.asarray(operands(name, dtype)[1] != 0)
    if name == "pow" and dtypes.is_integer(dtype):
        a, b = (x.astype(object) for x in operands(name, dtype))
        most = min(int(np.iinfo(dtype).max), 2**53)
        return np.array(
            [y >= 0 and (abs(x) <= 1 or y * math.log2(abs(x)) < math.log2(most)) for x, y in zip(a, b, strict=True)]
        )
    return everywhere


def ulps(got: Array, want: Array, dtype: np.dtype) -> Array:
    """Distance in spacings of `dtype` at `want`, beyond half a one (which is rounding `want`); inf for NaN against
    a number. Infinity counts as what would follow the largest number."""
    import ml_dtypes

    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    top = 2.0**info.maxexp if dtype != dtypes.FLOAT64 else math.inf
    x, y = (np.clip(a.astype(np.float64), -top, top) for a in (got, want))
    exponent = np.frexp(np.where(np.isfinite(y), y, 1))[1] - 1
    spacing = np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant)
    with np.errstate(invalid="ignore"):
        off = np.abs(x - y) / spacing
    off = np.where(np.isnan(x) | np.isnan(y), np.inf, off)
    return np.asarray(np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, off))


def assert_right(got: Array, name: str, dtype: np.dtype, bound: float) -> None:
    """`bound` in ulp for what is not exact: the result, rounded to its dtype."""
    want, where = truth(name, dtype), comparable(name, dtype)
    given = [x[where] for x in operands(name, dtype)]
    got, want = got[where], want[where]
    if not dtypes.is_float(got.dtype):
        wrong = got != want
    elif name in ("min", "max", "where", "neg", "abs"):
        wrong = ~((got == want) | (np.isnan(got) & np.isnan(want)))
    else:
        wrong = ulps(got, want, got.dtype) > 0.5 + bound
        if bound and dtype == dtypes.FLOAT64:  # where a result below the smallest normal number may become 0
            wrong &= np.abs(got - want) > np.finfo(np.float64).tiny
    k = np.flatnonzero(wrong)[:4]
    message = f"{name} of {[x[k].tolist() for x in given]} is {got[k].tolist()}, not {want[k].tolist()}"
    assert not len(k), message


@pytest.mark.parametrize("name", [n for n in ELEMENTWISE if n not in CASTS])
def test_meaning(name: str) -> None:
    """Numpy's result is the formula's: rounded once, but for functions in float64, where two libraries differ."""
    for dtype in PRIMITIVES[name].domain:
        both = 3 if dtype == dtypes.FLOAT64 and PRIMITIVES[name].ulp else 0
        assert_right(meaning(name, *operands(name, dtype)), name, dtype, both)


@cache
def native_results(dtype: np.dtype) -> dict[str, Array]:
    """Every elementwise primitive of a dtype, but for casts, compiled into one model."""
    names = [n for n in ELEMENTWISE if n not in CASTS and dtype in PRIMITIVES[n].domain]
    b = Builder("all")
    outputs: dict[str, Value] = {}
    feeds: dict[str, Array] = {}
    for name in names:
        xs = operands(name, dtype)
        values = [b.input(f"{name}.{k}", x.dtype, (dims.symbol("n"),)) for k, x in enumerate(xs)]
        feeds |= {v.name: x for v, x in zip(values, xs, strict=True)}
        outputs[name] = b.apply(name, *values)
    graph = b.finish(outputs)
    artifact = pipeline.build(pipeline.cut(graph, simplified=False))
    return dict(zip(graph.output_names, pipeline.run(artifact, feeds), strict=True))


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
def test_native_results(dtype: np.dtype) -> None:
    """Within the row's ulp of the truth; exact where that is 0, and for integers. Half precisions round once more;
    what the row promises of float32 holds of float64 too."""
    found = native_results(dtype)
    assert found
    for name, got in found.items():
        row = PRIMITIVES[name]
        assert got.dtype == row.dtype({}, dtype)
        bound = row.ulp if dtype not in HALVES else min(row.ulp, 0.01)
        assert_right(got, name, dtype, bound + (1.0 if dtype == dtypes.FLOAT64 and row.ulp else 0))


@pytest.mark.parametrize("dtype", [dtypes.FLOAT32, dtypes.FLOAT64], ids=str)
@pytest.mark.parametrize(
    "name", ["exp", "tanh", "erf", "half_erf", "sigmoid", "log", "sin", "rsqrt", "pow", "expm1", "log1p"]
)
def test_native_functions_over_a_wide_range(name: str, dtype: np.dtype) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-20, 20, 3000), np.exp(rng.uniform(-40, 5, 2000))]).astype(dtype)
    if name in ("log", "rsqrt", "pow"):
        x = np.abs(x)
    y = rng.uniform(-5, 5, x.size).astype(dtype)
    b = Builder()
    given = [b.input(v, dtype, (dims.symbol("n"),)) for v in "xy"[: PRIMITIVES[name].arity]]
    (got,) = pipeline.native(b.finish({"out": b.apply(name, *given)}), {"x": x, "y": y})
    exact = {
        "exp": mpmath.exp, "tanh": mpmath.tanh, "erf": mpmath.erf, "log": mpmath.log, "sin": mpmath.sin,
        "rsqrt": lambda v: 1 / mpmath.sqrt(v), "pow": mpmath.power, "expm1": mpmath.expm1, "log1p": mpmath.log1p,
        "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)), "half_erf": lambda v: mpmath.erf(v / mpmath.sqrt(2)) / 2,
    }[name]  # fmt: skip
    with mpmath.workprec(120), np.errstate(invalid="ignore"):
        rows = zip(x.tolist(), y.tolist(), strict=True)
        some = list(itertools.islice(rows, 0, None, 7))
        outside = [name == "log1p" and v <= -1 for v, _ in some]
        want = np.array(
            [
                math.nan if o else float(exact(v, w) if name == "pow" else exact(v))
                for (v, w), o in zip(some, outside, strict=True)
            ]
        )
    keep = ~np.array(outside)
    off = ulps(got[::7][keep], want[keep], dtype)
    assert off.max() <= PRIMITIVES[name].ulp + 0.5, f"{off.max()} ulp at {x[::7][keep][off.argmax()]!r}"


# ------------------------------------------------------------------ casts


def cast_truth(x: Array, to: np.dtype) -> Array:
    if to == dtypes.BOOL:
        return np.array([v != 0 for v in x.tolist()], bool)
    if not dtypes.is_float(to):
        if not dtypes.is_float(x.dtype):
            return np.array([wrap(int(v), to) for v in x.tolist()], to)
        info = np.iinfo(to)
        saturated = [0 if v != v else info.max if v >= info.max else info.min if v <= info.min else int(v)
                     for v in x.astype(np.float64).tolist()]  # fmt: skip
        return np.array(saturated, to)
    with np.errstate(all="ignore"):
        if to in HALVES and dtypes.is_integer(x.dtype):
            return x.astype(np.float32).astype(to)  # as the machine does it: at most one more rounding
        return x.astype(to)


@pytest.mark.parametrize("source", dtypes.ALL, ids=str)
def test_casts(source: np.dtype) -> None:
    """From one dtype to all others, in numpy and natively."""
    x = vector(source, 5)
    b = Builder()
    value = b.input("x", source, (dims.symbol("n"),))
    graph = b.finish({d.name: b.cast(value, d) for d in dtypes.ALL if d != source})
    for name, got in zip(graph.output_names, pipeline.native(graph, {"x": x}), strict=True):
        to = dtypes.parse(name)
        want = cast_truth(x, to)
        one = 1 if to in HALVES and source.itemsize >= 4 else 0  # double rounding through float32
        for who, array in [("numpy", meaning("cast", x, dtype=to)), ("native", got)]:
            assert array.dtype == to
            if dtypes.is_float(to):
                assert ulps(array, want.astype(np.float64), to).max() <= one, f"{who}: {source} to {to}"
            else:
                np.testing.assert_array_equal(array, want, f"{who}: {source} to {to}")


@pytest.mark.parametrize("source", PRIMITIVES["bitcast"].domain, ids=str)
def test_bitcasts(source: np.dtype) -> None:
    x = vector(source, 6)
    for to in PRIMITIVES["bitcast"].domain:
        if to.itemsize != source.itemsize or to == source or {source, to} & set(HALVES):
            continue
        b = Builder()
        graph = b.finish({"y": b.apply("bitcast", b.input("x", source, (dims.symbol("n"),)), dtype=to)})
        (got,) = pipeline.native(graph, {"x": x})
        assert got.dtype == to
        assert got.tobytes() == x.tobytes()


# ------------------------------------------------------------------ reductions

SHAPES = [
    ((3, 7, 5), (1,)),
    ((4, 33), (1,)),
    ((33, 4), (0,)),
    ((2, 3, 4), (0, 2)),
    ((100,), (0,)),
    ((0, 4), (0,)),
    ((4, 0), (1,)),
    ((2, 0, 3), (0, 2)),
]


def slots(shape: tuple[int, ...], axes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """For each element of a reduction's result the indices that go into it."""
    kept = [i for i in range(len(shape)) if i not in axes]
    for out in itertools.product(*(range(shape[i]) for i in kept)):
        fixed = dict(zip(kept, out, strict=True))
        ranges = [[fixed[i]] if i in fixed else range(shape[i]) for i in range(len(shape))]
        yield out, list(itertools.product(*ranges))


def fold(name: str, xs: list[Number], dtype: np.dtype) -> Number:
    if dtypes.is_float(dtype):
        if name == "reduce_sum":
            return math.fsum(xs) if all(map(math.isfinite, xs)) else sum(xs)
        if name == "reduce_prod":
            return math.prod(xs)
        if any(x != x for x in xs):
            return math.nan
    else:
        match name:
            case "reduce_sum":
                return any(xs) if dtype == dtypes.BOOL else wrap(sum(xs), dtype)
            case "reduce_prod":
                return all(xs) if dtype == dtypes.BOOL else wrap(math.prod(xs), dtype)
    low, high = dtypes.lowest(dtype), dtypes.highest(dtype)
    return max(xs, default=low) if name == "reduce_max" else min(xs, default=high)


def some(dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    size = math.prod(shape)
    x = np.random.default_rng(size).permutation(vector(dtype, size))[:size]
    if dtypes.is_float(dtype):
        x = np.where(np.abs(x) > 4, np.sign(x) / 2, x).astype(dtype)  # no infinities, and products stay small
    return x.reshape(shape)


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
def test_reductions(dtype: np.dtype) -> None:
    for shape, axes in SHAPES:
        x = some(dtype, shape)
        b = Builder()
        value = b.input("x", dtype, shape)
        graph = b.finish({name: b.apply(name, value, axes=axes) for name in REDUCTIONS})
        with np.errstate(all="ignore"):
            natively, by_numpy = pipeline.native(graph, {"x": x}), evaluate(graph, {"x": x})
        n = math.prod(shape[a] for a in axes)
        for name, *results in zip(graph.output_names, natively, by_numpy, strict=True):
            for got in results:
                assert got.dtype == dtype
                for out, points in slots(shape, axes):
                    xs = [float(x[p]) if dtypes.is_float(dtype) else x[p].item() for p in points]
                    want = fold(name, xs, dtype)
                    message = f"{name} of {dtype}{shape} over {axes}: {got[out]!r}, not {want!r}"
                    if not dtypes.is_float(dtype) or want != want or name in ("reduce_max", "reduce_min"):
                        assert got[out] == want or (want != want and got[out] != got[out]), message
                    else:
                        size = math.fsum(map(abs, xs)) if name == "reduce_sum" else abs(want)
                        eps = float(np.finfo(dtypes.compute(dtype)).eps)
                        half = 2.0**-8 * abs(want) + 1e-7 if dtype in HALVES else 0
                        assert abs(float(got[out]) - want) <= n * eps * size + half, message


@pytest.mark.parametrize("dtype", [d for d in dtypes.ALL if d != dtypes.BOOL], ids=str)
@pytest.mark.parametrize("last", [0, 1])
def test_argmax_and_argmin(dtype: np.dtype, last: int) -> None:
    """The first or last of equal ones; NaN is beyond everything."""
    for shape, axis in [((5, 37), 1), ((37, 5), 0), ((3, 11, 2), 1), ((90,), 0), ((1, 4), 0)]:
        x = some(dtype, shape)
        if dtypes.is_float(dtype):
            x = np.where(np.random.default_rng(0).random(shape) < 0.9, np.nan_to_num(x), x).astype(dtype)
        b = Builder()
        value = b.input("x", dtype, shape)
        graph = b.finish({name: b.apply(name, value, axis=axis, last=last) for name in ("argmax", "argmin")})
        for name, *results in zip(
            graph.output_names, pipeline.native(graph, {"x": x}), evaluate(graph, {"x": x}), strict=True
        ):
            for got in results:
                assert got.dtype == np.int64
                for out, points in slots(shape, (axis,)):
                    xs = [x[p].item() if not dtypes.is_float(dtype) else float(x[p]) for p in points]
                    best = fold("reduce_max" if name == "argmax" else "reduce_min", xs, dtype)
                    places = [k for k, v in enumerate(xs) if v == best or (best != best and v != v)]
                    assert got[out] == places[-last], f"{name} of {xs}"


# ------------------------------------------------------------------ movement


def pulled(
    name: str, attrs: Mapping[str, Any], shape: tuple[int, ...], index: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The element of the operand that stands at `index` of the result; None: the padding's value."""
    match name:
        case "transpose":
            out = [0] * len(shape)
            for i, p in zip(index, attrs["perm"], strict=True):
                out[p] = i
            return tuple(out)
        case "broadcast":
            inner = index[len(index) - len(shape) :]
            return tuple(0 if d == 1 else i for i, d in zip(inner, shape, strict=True))
        case "slice":
            return tuple(s + t * i for s, t, i in zip(attrs["starts"], attrs["steps"], index, strict=True))
        case "pad":
            at = tuple(i - lo for i, lo in zip(index, attrs["lo"], strict=True))
            return at if all(0 <= i < d for i, d in zip(at, shape, strict=True)) else None
        case "reshape":
            flat = sum(i * math.prod(attrs["shape"][k + 1 :]) for k, i in enumerate(index))
            out = []
            for d in reversed(shape):
                flat, r = divmod(flat, d)
                out.append(r)
            return tuple(reversed(out))
        case _:
            assert name == "window"
            at_ = list(index[: len(shape)])
            for k, axis in enumerate(attrs["axes"]):
                at_[axis] = at_[axis] * attrs["strides"][k] + index[len(shape) + k] * attrs["dilations"][k]
            return tuple(at_)


@st.composite
def movements(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[str, dict[str, Any], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 6]), max_size=4)))
    name = draw(st.sampled_from(["transpose", "broadcast", "slice", "pad", "reshape", "window"]))

    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    match name:
        case "transpose":
            return name, {"perm": tuple(draw(st.permutations(range(len(shape)))))}, shape
        case "broadcast":
            wide = tuple(pick(0, 1, 4) if d == 1 else d for d in shape)
            return name, {"shape": (*draw(st.lists(st.sampled_from([0, 1, 3]), max_size=2)), *wide)}, shape
        case "slice":
            rows = []
            for d in shape:
                step = pick(1, 2, -1) if d else 1
                start = draw(st.integers(0, max(d - 1, 0)))
                room = 0 if d == 0 else (d - 1 - start) // step + 1 if step > 0 else start + 1
                rows.append((start, step, draw(st.integers(0, room))))
            starts, steps, sizes = zip(*rows, strict=True) if rows else ((), (), ())
            return name, {"starts": starts, "sizes": sizes, "steps": steps}, shape
        case "pad":
            return (
                name,
                {"lo": tuple(pick(0, 1, 3) for _ in shape), "hi": tuple(pick(0, 2) for _ in shape), "value": 9},
                shape,
            )
        case "reshape":
            size = math.prod(shape)
            return (
                name,
                {"shape": pick((size,), (1, *shape), shape[::-1], (*shape, 1), tuple(d for d in shape if d != 1))},
                shape,
            )
        case _:
            axes = [i for i, d in enumerate(shape) if d][:2]
            sizes = tuple(draw(st.integers(1, shape[a])) for a in axes)
            dilations = tuple(pick(1, 2) if (n - 1) * 2 < shape[a] else 1 for a, n in zip(axes, sizes, strict=True))
            attrs = {
                "axes": tuple(axes),
                "sizes": sizes,
                "strides": tuple(pick(1, 2) for _ in axes),
                "dilations": dilations,
            }
            return name, attrs, shape


@settings(max_examples=200)
@given(movements())
def test_movement_reads_the_elements_that_it_should(case: tuple[str, dict[str, Any], tuple[int, ...]]) -> None:
    name, attrs, shape = case
    x = np.arange(math.prod(shape), dtype=np.int64).reshape(shape) + 100
    got = meaning(name, x, **attrs)
    assert got.shape == tuple(PRIMITIVES[name].shape(attrs, shape))
    assert got.dtype == PRIMITIVES[name].dtype(attrs, x.dtype)
    for index in itertools.product(*map(range, got.shape)):
        at = pulled(name, attrs, shape, index)
        assert got[index] == (attrs["value"] if at is None else x[at])


@settings(max_examples=100)
@given(movements(), st.data())
def test_shape_rules_hold_for_symbols(case: tuple[str, dict[str, Any], tuple[int, ...]], data: st.DataObject) -> None:
    """A symbol in place of an extent: the rule's answer, evaluated, is the answer for the number."""
    name, attrs, shape = case
    replaced = {k for k in range(len(shape)) if data.draw(st.booleans())}
    symbols = tuple(dims.symbol(f"d{k}") if k in replaced else d for k, d in enumerate(shape))
    env = {f"d{k}": shape[k] for k in replaced}
    expected = PRIMITIVES[name].shape(attrs, shape)
    assert numbers(tuple(PRIMITIVES[name].shape(attrs, symbols)), env) == tuple(expected)


def test_concat_gather_scatter_iota_and_contract() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (2, 3, 4)), rng.integers(0, 9, (2, 5, 4))
    joined = meaning("concat", x, y, axis=1)
    assert joined.shape == tuple(PRIMITIVES["concat"].shape({"axis": 1}, x.shape, y.shape)) == (2, 8, 4)
    assert joined.tolist() == [a + b for a, b in zip(x.tolist(), y.tolist(), strict=True)]

    i, j = np.array([[0, 1], [9, -4]]), np.array([[3, 0], [2, 1]])  # out of range: the nearest that exists
    picked = meaning("gather", x, i, j, axes=(0, 2))
    assert picked.shape == tuple(PRIMITIVES["gather"].shape({"axes": (0, 2)}, x.shape, i.shape, j.shape)) == (2, 2, 3)
    assert all(picked[p].tolist() == x[min(max(int(i[p]), 0), 1), :, int(j[p])].tolist() for p in np.ndindex(2, 2))
    assert meaning("gather", x[:0], i, axes=(0,)).shape == (2, 2, 3, 4)

    where, updates = np.array([1, 0, 1, 7]), np.array([[5] * 4, [6] * 4, [7] * 4, [8] * 4])
    data = rng.integers(0, 9, (2, 4))
    fold_: dict[str, Callable[..., Any]] = {
        "none": lambda a, b: b,
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "max": max,
        "min": min,
    }
    for op, fn in fold_.items():
        want = data.tolist()
        for row, u in zip(where.tolist(), updates.tolist(), strict=True):
            if row < 2:  # others are left out
                want[row] = [fn(a, b) for a, b in zip(want[row], u, strict=True)]
        assert meaning("scatter", data, updates, where, axes=(0,), op=op).tolist() == want

    assert meaning("iota", shape=(2, 3), axis=1).tolist() == [[0, 1, 2]] * 2
    assert meaning("iota", shape=(2, 0), axis=1).shape == (2, 0)
    assert meaning("shape", dims=(3, 4), shape=(2,)).tolist() == [3, 4]

    a, b = rng.integers(-9, 9, (3, 4)), rng.integers(-9, 9, (5, 4))
    product = meaning("contract", a, b, a=(0, 1), b=(2, 1), out=(2, 0))
    assert product.tolist() == [[sum(p * q for p, q in zip(u, v, strict=True)) for u in a.tolist()] for v in b.tolist()]
    assert meaning("contract", a[:, :0], b[:, :0], a=(0, 1), b=(2, 1), out=(2, 0)).tolist() == [[0] * 3] * 5


def test_identity_of_rank_zero() -> None:
    """Everything that takes any shape takes none: compiled, too."""
    b = Builder()
    x = b.input("x", dtypes.FLOAT32, ())
    made: dict[str, Value] = {"neg": b.unary("neg", x), "shape": b.reshape(x, (1, 1)), "wide": b.broadcast(x, (2, 3))}
    made["sum"] = b.reduce("reduce_sum", made["wide"], [0, 1])
    graph = b.finish(made)
    for got, want in zip(
        pipeline.native(graph, {"x": np.array(3, np.float32)}),
        evaluate(graph, {"x": np.array(3, np.float32)}),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want, strict=True)
