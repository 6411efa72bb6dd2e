"""The math library: its bounds and special values on the numpy builder, and compiled code, which has the same bits."""

import math
import re
from dataclasses import replace

import mpmath
import numpy as np
import pytest

from benchmarks.ulp import MEASURED, compiled, emitted, main, measure, near_edges
from stitch import target
from stitch.codegen import machine
from stitch.codegen.bits import NumpyBuilder, evaluate
from stitch.codegen.emit_code import Writer
from stitch.codegen.emit_math import MachineMath, vector_isa
from stitch.codegen.emit_values import Operations, Value
from stitch.codegen.mathlib import FUNCTIONS, CountingBuilder
from stitch.dtypes import FLOAT32
from stitch.target import Target

INF, NAN = math.inf, math.nan
MAX, LEAST, LEAST_NORMAL = 3.4028234663852886e38, 2.0**-149, 2.0**-126
UNARY = [name for name, function in FUNCTIONS.items() if function.arity == 1]
ODD = ["expm1", "log1p", "tanh", "erf", "half_erf", "sin", "tan", "asin", "atan", "sinh", "asinh", "atanh"]


def call(name: str, *arguments: float) -> float:
    return float(evaluate(name, *(np.array([a], np.float32) for a in arguments))[0])


def same(got: float, want: float) -> bool:
    """Equal as floats with sign of zero, any NaN being as good as another."""
    return (math.isnan(got) and math.isnan(want)) or (got == want and math.copysign(1, got) == math.copysign(1, want))


@pytest.mark.parametrize("name", MEASURED)
def test_bound(name: str) -> None:
    # A prime stride, and every neighbourhood where ranges end.
    worst = measure(name, 60013 if MEASURED[name].arity == 1 else 3001)
    assert worst.ulp <= MEASURED[name].ulp, worst


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sqrt", "tanh", "--stride", "1000003", "--jobs", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit):
        main(["nothing"])


@pytest.mark.parametrize("name", UNARY)
def test_nan_goes_through(name: str) -> None:
    patterns = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF], np.uint32)
    assert np.isnan(evaluate(name, patterns.view(np.float32))).all()


@pytest.mark.parametrize("name", ODD)
def test_tiny_arguments_are_kept(name: str) -> None:
    x = np.array([0.0, -0.0, LEAST, -LEAST, 3 * LEAST, -5 * LEAST, LEAST_NORMAL], np.float32)
    got = evaluate(name, x)
    assert np.array_equal(np.signbit(got), np.signbit(x))
    slope = {"erf": 2 / math.sqrt(math.pi), "half_erf": 1 / math.sqrt(2 * math.pi)}.get(name, 1.0)
    assert np.abs(got - slope * x.astype(np.float64)).max() <= LEAST
    if slope == 1:
        assert np.array_equal(got[:2], x[:2])


SPECIAL = [
    ("exp", [(-INF, 0.0), (INF, INF), (0.0, 1.0), (-0.0, 1.0), (MAX, INF), (-MAX, 0.0), (88.73, INF), (-104.0, 0.0)]),
    ("exp2", [(-INF, 0.0), (INF, INF), (0.0, 1.0), (128.0, INF), (127.0, 2.0**127), (-149.0, LEAST), (-151.0, 0.0)]),
    ("expm1", [(-INF, -1.0), (INF, INF), (MAX, INF), (-MAX, -1.0), (88.73, INF)]),
    ("log", [(0.0, -INF), (-0.0, -INF), (1.0, 0.0), (INF, INF), (-INF, NAN), (-1.0, NAN), (-LEAST, NAN)]),
    ("log2", [(0.0, -INF), (1.0, 0.0), (INF, INF), (-1.0, NAN), (LEAST, -149.0), (8.0, 3.0), (0.5, -1.0)]),
    ("log1p", [(-1.0, -INF), (-1.5, NAN), (-INF, NAN), (INF, INF)]),
    ("tanh", [(INF, 1.0), (-INF, -1.0), (9.5, 1.0), (-9.5, -1.0), (MAX, 1.0), (-MAX, -1.0)]),
    ("sigmoid", [(INF, 1.0), (-INF, 0.0), (0.0, 0.5), (-0.0, 0.5), (MAX, 1.0), (-MAX, 0.0), (40.0, 1.0)]),
    ("softplus", [(INF, INF), (-INF, 0.0), (MAX, MAX), (-MAX, 0.0)]),
    ("erf", [(INF, 1.0), (-INF, -1.0), (MAX, 1.0), (-MAX, -1.0), (3.95, 1.0), (-3.95, -1.0)]),
    ("half_erf", [(INF, 0.5), (-INF, -0.5), (MAX, 0.5), (-MAX, -0.5), (5.6, 0.5), (-5.6, -0.5)]),
    ("sin", [(INF, NAN), (-INF, NAN)]),
    ("cos", [(INF, NAN), (-INF, NAN), (0.0, 1.0), (-0.0, 1.0), (LEAST, 1.0)]),
    ("tan", [(INF, NAN), (-INF, NAN)]),
    ("asin", [(1.0, math.pi / 2), (-1.0, -math.pi / 2), (1.0000001, NAN), (-2.0, NAN), (INF, NAN), (-INF, NAN)]),
    ("acos", [(1.0, 0.0), (-1.0, math.pi), (0.0, math.pi / 2), (1.0000001, NAN), (-2.0, NAN), (INF, NAN), (-INF, NAN)]),
    ("atan", [(INF, math.pi / 2), (-INF, -math.pi / 2), (MAX, math.pi / 2)]),
    ("sinh", [(INF, INF), (-INF, -INF), (MAX, INF), (89.42, INF), (-89.42, -INF)]),
    ("cosh", [(INF, INF), (-INF, INF), (0.0, 1.0), (-0.0, 1.0), (MAX, INF), (89.42, INF)]),
    ("asinh", [(INF, INF), (-INF, -INF)]),
    ("acosh", [(INF, INF), (1.0, 0.0), (0.5, NAN), (-1.0, NAN), (-3.0, NAN), (-INF, NAN)]),
    ("atanh", [(1.0, INF), (-1.0, -INF), (1.0000001, NAN), (-2.0, NAN), (INF, NAN), (-INF, NAN)]),
    ("sqrt", [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-1.0, NAN), (-INF, NAN), (4.0, 2.0)]),
    ("rsqrt", [(0.0, INF), (-0.0, -INF), (INF, 0.0), (-1.0, NAN), (4.0, 0.5)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "cases"), SPECIAL, ids=[name for name, _ in SPECIAL])
def test_special_values(name: str, cases: list[tuple[float, float]]) -> None:
    for x, want in cases:
        got = call(name, x)
        assert same(got, float(np.float32(want))), (x, got, want)


# C's Annex F, and one case of each sign and size.
POW = [
    (2.0, 3.0, 8.0), (2.0, -149.0, LEAST), (2.0, 127.0, 2.0**127), (2.0, 128.0, INF), (-2.0, 3.0, -8.0),
    (-2.0, 2.0, 4.0), (-2.0, 0.5, NAN), (-1.0, INF, 1.0), (-1.0, -INF, 1.0), (-1.0, 3.0, -1.0),
    (-1.0, NAN, NAN), (1.0, NAN, 1.0),
    (1.0, INF, 1.0), (NAN, 0.0, 1.0), (NAN, -0.0, 1.0), (NAN, 1.0, NAN), (2.0, NAN, NAN), (INF, 0.0, 1.0),
    (0.0, 0.0, 1.0), (0.0, 3.0, 0.0), (-0.0, 3.0, -0.0), (-0.0, 2.0, 0.0), (0.0, -3.0, INF), (-0.0, -3.0, -INF),
    (-0.0, -2.0, INF), (0.0, 1e-30, 0.0), (0.0, -1e-30, INF), (0.0, INF, 0.0), (0.0, -INF, INF), (-0.0, 0.5, 0.0),
    (-0.0, -0.5, INF), (INF, 2.0, INF), (INF, -2.0, 0.0), (INF, 1e-30, INF), (-INF, 3.0, -INF), (-INF, 2.0, INF),
    (-INF, 0.5, INF), (-INF, -3.0, -0.0), (-INF, -2.0, 0.0), (0.5, INF, 0.0), (0.5, -INF, INF), (2.0, INF, INF),
    (2.0, -INF, 0.0), (-0.5, INF, 0.0), (-0.5, -INF, INF), (-2.0, INF, INF), (-2.0, -INF, 0.0), (INF, INF, INF),
    (INF, -INF, 0.0), (-INF, INF, INF), (-INF, -INF, 0.0), (-1.0, 16777215.0, -1.0), (-1.0, 16777216.0, 1.0),
    (MAX, 1.0, MAX), (LEAST, 1.0, LEAST), (MAX, 2.0, INF), (LEAST, 2.0, 0.0), (-MAX, 3.0, -INF), (-LEAST, 3.0, -0.0),
    (1.0000001, MAX, INF), (0.99999994, MAX, 0.0), (3.0, 2.0, 9.0), (5.0, -1e-40, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("x", "y", "want"), POW)
def test_pow_special_values(x: float, y: float, want: float) -> None:
    assert same(call("pow", x, y), want)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("tanh", -1, 1), ("erf", -1, 1), ("half_erf", -0.5, 0.5), ("sigmoid", 0, 1)]
)
def test_saturates_without_overshoot(name: str, low: float, high: float) -> None:
    x = np.arange(0, 0x7F800000, 997, dtype=np.uint32).view(np.float32)
    for argument in (x, -x):
        y = evaluate(name, argument)
        assert y.min() >= low
        assert y.max() <= high
    beyond = x[x > 20]
    assert (evaluate(name, beyond) == high).all()


def test_huge_angles() -> None:
    # float32 values nearest to multiples of pi/2, and mpmath as a reference of its own
    for x in (16367173 * 2.0**72, 2.0**127, MAX, 8388608.0, 1e22, 262143.98, 5e5):
        x = float(np.float32(x))
        with mpmath.workprec(400):
            for name in ("sin", "cos", "tan"):
                want = getattr(mpmath, name)(mpmath.mpf(x))
                assert abs(call(name, x) / want - 1) < FUNCTIONS[name].ulp * 2.0**-23, (name, x)


def test_fma_rounds_once() -> None:
    b = NumpyBuilder()
    x = np.concatenate([near_edges(8), np.random.default_rng(2).uniform(-2, 2, 3000).astype(np.float32)])
    x = x[np.isfinite(x)]
    with np.errstate(all="ignore"):
        for shift in (1, 7, 1000):
            y, z = np.roll(x, shift), np.roll(x, 3 * shift + 1) * np.float32(2.0**-20)
            got = b.fma(x, y, z)
            for i in range(0, len(x), 29):
                with mpmath.workprec(800):
                    exact = mpmath.mpf(float(x[i])) * mpmath.mpf(float(y[i])) + mpmath.mpf(float(z[i]))
                    near = [got[i], np.nextafter(got[i], np.float32(INF)), np.nextafter(got[i], np.float32(-INF))]
                    errors = [abs(mpmath.mpf(float(v)) - exact) for v in near]
                    assert np.isinf(got[i]) or errors[0] == min(errors)


def test_fma_on_a_double_rounding_tie() -> None:
    # (1 + 2^-23) * 1 + 2^-24 - 2^-60: float64 rounds the sum to a tie, which would go up to even.
    b = NumpyBuilder()
    a, c = np.array([2.0**-30], np.float32), np.array([1 + 2.0**-23], np.float32)
    product = (2.0**-24 - 2.0**-47) / 2.0**-30
    got = b.fma(a, np.array([product], np.float32), c)
    assert got[0] == np.float32(1 + 2.0**-23)
    tie = b.fma(np.array([2.0**-12 + 2.0**-35], np.float32), np.array([2.0**-12 - 2.0**-35], np.float32), c)
    assert tie[0] == np.float32(1 + 2.0**-23)  # 2^-24 - 2^-70: just below the tie


def test_min_and_max_return_the_second_at_nan() -> None:
    b = NumpyBuilder()
    one, nan = np.array([1.0], np.float32), np.array([NAN], np.float32)
    for operation in (b.fmin, b.fmax):
        assert np.isnan(operation(one, nan)[0])
        assert operation(nan, one)[0] == 1.0


def test_constants_are_float32() -> None:
    with pytest.raises(ValueError, match=re.escape("0.1 is not a float32")):
        NumpyBuilder().const(0.1)


def test_results_do_not_depend_on_the_shape() -> None:
    x = np.linspace(-3, 3, 24, dtype=np.float32)
    for name in UNARY:
        whole = evaluate(name, x)
        assert whole.shape == x.shape
        assert np.array_equal(evaluate(name, x.reshape(2, 3, 4)).ravel(), whole, equal_nan=True)
        assert evaluate(name, x[:0]).shape == (0,)


def test_costs_are_counted() -> None:
    counter = CountingBuilder()
    FUNCTIONS["exp"].build(counter, 0)
    assert FUNCTIONS["exp"].cost == counter.count <= 12
    assert FUNCTIONS["rsqrt"].cost == 2
    assert all(FUNCTIONS[name].cost <= 20 for name in ("tanh", "sigmoid", "erf", "half_erf", "log"))


# ------------------------------------------------------------------ compiled code

HOST = machine.host()
MACHINES = [HOST]
if HOST.is_x86:
    MACHINES += [target.parse(name) for name in ("avx2", "sse2") if name == "sse2" or HOST.has("avx2")]
    MACHINES += [replace(HOST, vector_bits=bits) for bits in (128, 256) if bits < HOST.vector_bits]


@pytest.mark.parametrize("on", MACHINES, ids=lambda t: f"{vector_isa(t) or 'plain'}-{t.vector_bits}")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_code_has_the_bits_of_numpy(name: str, on: Target) -> None:
    edges = near_edges(2, borders=True)
    bits = np.random.default_rng(3).integers(0, 2**32, 4001, np.uint32).view(np.float32)
    x = np.concatenate([edges, bits])
    arguments = [x, np.roll(x, 1001)][: FUNCTIONS[name].arity]
    got, want = compiled(name, on)(*arguments), evaluate(name, *arguments)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(got.view(np.int32)[~np.isnan(got)], want.view(np.int32)[~np.isnan(got)])


@pytest.mark.parametrize(
    ("on", "words"),
    [("avx512", ["vperm", "vscalefps", "vgetexpps"]), ("avx2", ["vperm"]), ("neon", ["tbl"]), ("sse2", [])],
)
def test_machines_use_the_instructions_that_they_have(on: str, words: list[str]) -> None:
    there = target.parse(on)
    text = "".join(machine.assembly(emitted(FUNCTIONS[f].build, 1, there), there) for f in ("exp", "tanh", "log"))
    assert all(word in text for word in words)
    assert ("@table" in emitted(FUNCTIONS["tanh"].build, 1, there)) == (on == "sse2")


def test_uniform_values_look_up_in_memory() -> None:
    o = Operations(Writer(), True, "avx512")
    o.width = 16
    value = FUNCTIONS["tanh"].build(MachineMath(o), Value(FLOAT32, ("%x",)))
    assert not value.varying
    assert all(text.startswith(f"{name} = private") for name, text in o.declared.items())
    assert len(o.declared) == 7


def test_split() -> None:
    b = NumpyBuilder()
    x = np.array([0.75, 1.0, 1.4999999, 1.5, LEAST, LEAST_NORMAL, MAX, 0.0, -0.0, INF, -1.0, -INF, NAN], np.float32)
    with np.errstate(all="ignore"):
        k, m = b.split(x)
    assert k[:10].tolist() == [0, 0, 0, 1, -149, -126, 128, -INF, -INF, INF]
    finite = slice(0, 7)
    assert np.array_equal(np.ldexp(m[finite].astype(np.float64), k[finite].astype(np.int32)), x[finite])
    assert ((m[finite] >= 0.75) & (m[finite] < 1.5)).all()
    assert np.isfinite(m[:10]).all()
    assert np.isnan(m[10:]).all()


def test_scale_rounds_once() -> None:
    b = NumpyBuilder()
    p, n = np.array([1.4142135, 0.70710677, 1.0000001, 0.5, 2.0], np.float32), np.arange(-250, 251, dtype=np.float32)
    with np.errstate(all="ignore"):
        got = b.scale(p[:, None] + np.zeros_like(n), n + np.zeros_like(p)[:, None])
        assert np.array_equal(got, np.ldexp(p[:, None].astype(np.float64), n.astype(np.int32)).astype(np.float32))


def test_tables_join() -> None:
    """Neighbouring floats on two sides of a border differ by a few ulp at most, and tanh and erf never fall."""
    for name in ("tanh", "erf", "half_erf", "log", "sigmoid", "exp"):
        x = np.sort(np.abs(near_edges(3, borders=True)))
        y = evaluate(name, x[np.isfinite(x)])
        y = y[np.isfinite(y)].astype(np.float64)
        assert (np.diff(y) >= -3 * np.spacing(np.abs(y[1:]).astype(np.float32))).all(), name


@pytest.mark.parametrize("x", [1.623525327812912e23, 8.11762663906456e22, 2.4709243886954244e20])
def test_arguments_next_to_multiples_of_a_quarter_turn(x: float) -> None:
    """Where a reduction that keeps too few bits of 2/pi shows first; found by measuring all floats."""
    argument = np.array([x], np.float32)
    for name, reference in (("sin", np.sin), ("cos", np.cos)):
        got, want = np.asarray(evaluate(name, argument)), reference(argument.astype(np.float64))
        assert abs(got[0] - want[0]) <= 2 * np.spacing(np.abs(want.astype(np.float32)))[0]
