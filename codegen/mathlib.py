"""Transcendental functions on float32 vectors: one definition each, for every machine.

A function is a Python function over a `Builder`, a small set of operations on opaque vector values. Run with the
emitter's builder it emits code; run with `bits.NumpyBuilder` it computes, bit for bit, what that code computes. No
operation below is approximate (fma rounds once, division and square root correctly), so every machine agrees.

Three habits keep the code short:

* *Rounding by a magic number.* Adding `MAGIC` = 1.5 * 2**23 leaves the nearest integer in the low bits of the sum.
  With an exponent bias added to it, those bits shifted by 23 are a power of two. NaN and Inf cannot trap in it.
* *NaN passes through clamps.* `fmin(c, x)` and `fmax(c, x)` return x when it is NaN: the constant comes first.
* *Odd functions work on abs(x)* and get the sign back at the end, which also keeps -0.

Coefficients are weighted minimax fits (Lawson's algorithm on Chebyshev nodes, targets from mpmath), rounded to
float32 one by one from the lowest power, the remaining ones fitted again each time. `benchmarks/ulp.py` measures the
bounds stated in `FUNCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stitch.codegen.polynomials import (
    INF,
    MAGIC,
    NAN,
    SIGN,
    Builder,
    V,
    fast_two_sum,
    horner,
    keep_tiny,
    with_sign,
)
from stitch.codegen.tables import (
    ERF,
    ERF_PER_STEP,
    ERF_STEP,
    HALF_ERF,
    HALF_ERF_PER_STEP,
    HALF_ERF_STEP,
    LOG,
    LOG2,
    LOG2_CENTRES,
    LOG_CENTRES,
    LOG_INVERSES,
    TANH,
    TANH_CENTRES,
    TANH_SCALE,
    piecewise,
)
from stitch.codegen.trigonometry import acos, asin, atan, cos, sin, tan

LN2_HI, LN2_LO = 0.693145751953125, 1.428606765330187e-06  # 16 bits, so that n * LN2_HI is exact
LN2 = 0.6931471824645996
LOG2E = 1.4426950216293335
TWO_LOG2E_HI, TWO_LOG2E_LO = 2.885390043258667, 3.851926067000022e-08

# (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, to 2^-26 of e^r - 1; e^r there, to 1.07 ulp; (2^r - 1) / r on |r| <= 1
EXPM1 = (0.4999999701976776, 0.1666654646396637, 0.04166743531823158, 0.00836626160889864, 0.0013870657421648502)
EXP = (1.0, 0.999999463558197, 0.49999141693115234, 0.16668188571929932, 0.04189879074692726, 0.008261259645223618)
EXP2 = (0.6931472420692444, 0.24022668600082397, 0.055503666400909424, 0.00961683876812458, 0.0013341534649953246,
        0.00015645918028894812, 1.492835144745186e-05)  # fmt: skip
# (log(1 + f) - f + f^2 / 2) / f^3 on |f| <= 1/3; (atanh(s) / s - 1) / s^2 in s^2 <= 0.03 for pow
LOG1P = (0.3333321511745453, -0.2499980330467224, 0.2001044899225235, -0.16680246591567993, 0.1400521695613861,
         -0.12187445908784866, 0.13987509906291962, -0.12878386676311493)  # fmt: skip
ATANH = (0.3333333432674408, 0.19999447464942932, 0.14329659938812256, 0.10454989224672318)
SQRT2 = 1.4142135381698608

# --- pieces ---------------------------------------------------------------------------------------------------------


def _exp_parts(b: Builder[V], x: V, bias: float) -> tuple[V, V]:
    """p in [0.7, 1.42] and an integer m, with e^x = 2^n p and n + bias in the low bits of m."""
    magic = b.const(MAGIC + bias)
    t = b.fma(x, b.const(LOG2E), magic)
    n = b.sub(t, magic)
    r = b.fma(n, b.const(-LN2_LO), b.fma(n, b.const(-LN2_HI), x))
    return b.add(b.fma(b.mul(r, r), horner(b, r, EXPM1), r), b.const(1.0)), b.bits(t)


def _exp_minus_abs(b: Builder[V], x: V) -> V:
    """e^-|x|. As n <= 0, scaling by 2^(n + 64) and by 2^-64 reaches subnormals with one rounding."""
    p, m = _exp_parts(b, b.neg(b.fmin(b.const(104.0), b.abs(x))), 127.0 + 64.0)
    return b.mul(b.mul(p, b.unbits(b.shl(m, 23))), b.const(2.0**-64))


def _quarter_expm1(b: Builder[V], x: V) -> V:
    """(e^x - 1) / 4, for -20 <= x <= 89.5. The quarter keeps 2^n finite up to where sinh overflows."""
    magic = b.const(MAGIC + 125.0)
    t = b.fma(x, b.const(LOG2E), magic)
    n = b.sub(t, magic)
    r = b.fma(n, b.const(-LN2_LO), b.fma(n, b.const(-LN2_HI), x))
    p = b.fma(b.mul(r, r), horner(b, r, EXPM1), r)
    s = b.unbits(b.shl(b.bits(t), 23))
    return b.fma(s, p, b.sub(s, b.const(0.25)))


def _log_sum(b: Builder[V], k: V, f: V) -> V:
    """k ln2 + log(1 + f), for |f| <= 1/3."""
    tail = b.mul(b.mul(f, f), b.fma(f, horner(b, f, LOG1P), b.const(-0.5)))
    return b.fma(k, b.const(LN2_HI), b.add(f, b.fma(k, b.const(LN2_LO), tail)))


def _nan_of(b: Builder[V], x: V) -> V:
    """NaN: x's own if it is one."""
    return b.select(b.eq(x, x), b.const(NAN), x)


TWO_THIRDS = 0x3F2AAAAB


def _log1p(b: Builder[V], x: V) -> V:
    """log(1 + x) for finite x > -1; +0 for -0.

    k comes from 1 + x rounded, but f = (1 + x) / 2^k - 1 from x itself: nothing is lost to that rounding. 2^-k is
    formed times four, as k reaches 128.
    """
    i = b.isub(b.bits(b.add(x, b.const(1.0))), b.iconst(TWO_THIRDS))
    exponent = b.shl(b.ashr(i, 23), 23)
    four_over_2k = b.unbits(b.isub(b.iconst(0x40800000), exponent))
    scaled = b.unbits(b.isub(b.bits(x), exponent))
    f = b.add(scaled, b.fma(four_over_2k, b.const(0.25), b.const(-1.0)))
    return _log_sum(b, b.tofloat(b.ashr(i, 23)), f)


# --- exponentials ---------------------------------------------------------------------------------------------------


def exp(b: Builder[V], x: V) -> V:
    """e^x: Cody-Waite reduction and a polynomial of degree 5 (Muller, Elementary Functions, 11.2)."""
    return exp_to_90(b, b.fmin(b.const(90.0), x))


def exp_to_90(b: Builder[V], x: V) -> V:
    """The same for x <= 90."""
    x = b.fmax(b.const(-104.0), x)
    magic = b.const(MAGIC)
    n = b.sub(b.fma(x, b.const(LOG2E), magic), magic)
    r = b.fma(n, b.const(-LN2_LO), b.fma(n, b.const(-LN2_HI), x))
    return b.scale(horner(b, r, EXP), n)


def exp2(b: Builder[V], x: V) -> V:
    """2^x, reduced by an even integer as in exp; the reduction is exact."""
    return _exp2_sum(b, b.fmin(b.const(130.0), b.fmax(b.const(-152.0), x)), b.const(0.0))


def _exp2_sum(b: Builder[V], x: V, low: V) -> V:
    magic = b.const(MAGIC + 127.0)
    t = b.fma(x, b.const(0.5), magic)
    r = b.add(b.fma(b.sub(t, magic), b.const(-2.0), x), low)
    s = b.unbits(b.shl(b.bits(t), 23))
    return b.mul(b.mul(horner(b, r, (1.0, *EXP2)), s), s)


def expm1(b: Builder[V], x: V) -> V:
    """e^x - 1 = 2^n (e^r - 1) + (2^n - 1), whose second term is exact where it matters."""
    value = _quarter_expm1(b, b.fmin(b.const(89.5), b.fmax(b.const(-20.0), x)))
    return b.select(b.lt(b.abs(x), b.const(2.0**-25)), x, b.mul(value, b.const(4.0)))


def sigmoid(b: Builder[V], x: V) -> V:
    """1 / (1 + e^-x), both sides of the fraction times 2^-64: so the sum is finite where the result is subnormal.

    The sum of 2^-64, s = 2^(n - 64) and s (e^r - 1) is taken with the power s last. Beside that many multiply-adds
    the division takes the time of two: a quotient without it took seven.
    """
    x = b.fmin(b.const(40.0), b.fmax(b.const(-105.0), x))
    magic = b.const(MAGIC + 127.0 - 64.0)
    t = b.fma(x, b.const(-LOG2E), magic)
    n = b.sub(t, magic)
    r = b.fma(n, b.const(-LN2_LO), b.fma(n, b.const(-LN2_HI), b.neg(x)))
    s = b.unbits(b.shl(b.bits(t), 23))
    one = b.const(2.0**-64)
    p = b.mul(horner(b, r, (1.0, *EXPM1)), r)
    return b.div(one, b.add(s, b.fma(p, s, one)))


def tanh(b: Builder[V], x: V) -> V:
    """Piecewise polynomials of degree 5, odd in the first interval. From |x| = 9.1 the result is one."""
    a = b.fmin(b.const(9.125), b.abs(x))
    i = b.lshr(b.bits(b.fma(a, b.const(TANH_SCALE), b.const(0.5))), 21)
    return with_sign(b, piecewise(b, TANH, i, b.sub(a, b.lookup(TANH_CENTRES, i))), x)


def softplus(b: Builder[V], x: V) -> V:
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|)."""
    t = _exp_minus_abs(b, x)
    return b.add(b.fmax(b.const(0.0), x), _log1p(b, t))


def sinh(b: Builder[V], x: V) -> V:
    """h + h / (2 h + 1), with h = (e^|x| - 1) / 2; the quotient from h / 2, which never overflows."""
    a = b.abs(x)
    q = _quarter_expm1(b, b.fmin(b.const(89.5), a))
    h = b.add(q, q)
    value = b.add(h, b.div(q, b.add(h, b.const(0.5))))
    return with_sign(b, keep_tiny(b, a, a, value), x)


def cosh(b: Builder[V], x: V) -> V:
    """h + 1 / (4 h), with h = e^|x| / 2; half of h is still finite where the result is not."""
    p, m = _exp_parts(b, b.fmin(b.const(89.5), b.abs(x)), 127.0 - 2.0)
    quarter = b.mul(p, b.unbits(b.shl(m, 23)))
    return b.add(b.add(quarter, quarter), b.div(b.const(0.125), quarter))


# --- logarithms -----------------------------------------------------------------------------------------------------


def log(b: Builder[V], x: V) -> V:
    """Natural logarithm: k ln2 + log(c) + log(1 + f), with x = 2^k m and f = m / c - 1 (Tang 1990).

    ln2 as one float is right to 0.05 ulp. Zero, infinity and NaN come out of `split`.
    """
    k, m = b.split(x)
    i = b.lshr(b.bits(m), 19)
    f = b.fma(m, b.lookup(LOG_INVERSES, i), b.const(-1.0))
    return b.fma(k, b.const(LN2), b.fma(f, horner(b, f, LOG), b.lookup(LOG_CENTRES, i)))


def log2(b: Builder[V], x: V) -> V:
    """Base-two logarithm, as `log`; exact at powers of two."""
    k, m = b.split(x)
    i = b.lshr(b.bits(m), 19)
    f = b.fma(m, b.lookup(LOG_INVERSES, i), b.const(-1.0))
    return b.add(k, b.fma(f, horner(b, f, LOG2), b.lookup(LOG2_CENTRES, i)))


def log1p(b: Builder[V], x: V) -> V:
    """log(1 + x)."""
    value = b.select(b.lt(x, b.const(INF)), _log1p(b, x), x)
    value = b.select(b.lt(b.const(-1.0), x), value, b.select(b.eq(x, b.const(-1.0)), b.const(-INF), _nan_of(b, x)))
    return b.select(b.eq(x, b.const(0.0)), x, value)


def log1p_inside(b: Builder[V], x: V) -> V:
    """The same for x > -1 that is finite, or NaN, and not -0."""
    return b.select(b.eq(x, x), _log1p(b, x), x)


def asinh(b: Builder[V], x: V) -> V:
    """log1p(a + a^2 / (1 + sqrt(1 + a^2))), a = |x|; log(a) + ln2 where the square would overflow."""
    a = b.abs(x)
    big = b.lt(b.const(2.0**30), a)
    square = b.mul(a, a)
    inner = b.add(a, b.div(square, b.add(b.sqrt(b.add(square, b.const(1.0))), b.const(1.0))))
    value = _log1p(b, b.select(big, a, inner))
    value = b.add(value, b.select(big, b.const(LN2), b.const(0.0)))
    value = b.select(b.lt(a, b.const(INF)), value, a)
    return with_sign(b, keep_tiny(b, a, a, value), x)


def acosh(b: Builder[V], x: V) -> V:
    """log1p(t + sqrt(t (t + 2))), t = x - 1; log(x) + ln2 where the square would overflow."""
    big = b.lt(b.const(2.0**30), x)
    t = b.sub(x, b.const(1.0))
    inner = b.add(t, b.sqrt(b.fma(t, t, b.add(t, t))))
    value = _log1p(b, b.select(big, x, inner))
    value = b.add(value, b.select(big, b.const(LN2), b.const(0.0)))
    value = b.select(b.lt(x, b.const(INF)), value, x)
    return b.select(b.lt(x, b.const(1.0)), b.const(NAN), value)


def atanh(b: Builder[V], x: V) -> V:
    """log1p(2 a / (1 - a)) / 2, a = |x|."""
    a = b.abs(x)
    u = b.div(b.add(a, a), b.sub(b.const(1.0), a))
    value = b.mul(b.const(0.5), _log1p(b, u))
    value = b.select(b.eq(a, b.const(1.0)), b.const(INF), b.select(b.lt(a, b.const(1.0)), value, _nan_of(b, a)))
    return with_sign(b, keep_tiny(b, a, a, value), x)


# --- erf ------------------------------------------------------------------------------------------------------------


def erf(b: Builder[V], x: V) -> V:
    """The error function from piecewise polynomials of degree 5; one where they end, at |x| = 4.

    In the first interval it is x + x P(x^2): as P(x^2) x alone its slope's rounding would be seen.
    """
    a = b.fmin(b.const(4.0), b.abs(x))
    magic = b.const(MAGIC)
    t = b.fma(a, b.const(ERF_PER_STEP), magic)
    d = b.fma(b.sub(t, magic), b.const(-ERF_STEP), a)
    i = b.bits(t)
    base = b.select(b.ieq(i, b.bits(magic)), a, b.lookup(ERF[0], i))
    return with_sign(b, b.fma(piecewise(b, ERF[1:], i, d), d, base), x)


def half_erf(b: Builder[V], x: V) -> V:
    """erf(x / sqrt(2)) / 2: the normal distribution's integral from 0 to x, of which GELU is x (half_erf(x) + 1/2).

    As erf, but without a case of its own for the first interval, whose slope no scaling of x has rounded before.
    """
    a = b.fmin(b.const(5.599999904632568), b.abs(x))
    magic = b.const(MAGIC)
    t = b.fma(a, b.const(HALF_ERF_PER_STEP), magic)
    d = b.fma(b.sub(t, magic), b.const(-HALF_ERF_STEP), a)
    return with_sign(b, piecewise(b, HALF_ERF, b.bits(t), d), x)


# --- powers ---------------------------------------------------------------------------------------------------------


def sqrt(b: Builder[V], x: V) -> V:
    """Square root, correctly rounded."""
    return b.sqrt(x)


def rsqrt(b: Builder[V], x: V) -> V:
    """1 / sqrt(x)."""
    return b.div(b.const(1.0), b.sqrt(x))


def _log2_pair(b: Builder[V], a: V) -> tuple[V, V]:
    """log2(a) as a sum of two floats, to about 2^-31, for finite a > 0; an infinite first one at zero and infinity.

    log(m) = 2 atanh(f / (m + 1)): the quotient is a pair, and its cube, a hundredth of it, a float.
    """
    k, m = b.split(a)
    one = b.const(1.0)
    above = b.lt(b.const(SQRT2), m)  # m in [3/4, sqrt(2)] leaves |s| <= 0.172
    k, m = b.select(above, b.add(k, one), k), b.select(above, b.mul(m, b.const(0.5)), m)
    f = b.sub(m, one)
    d = b.add(m, one)
    d_low = b.sub(m, b.sub(d, one))
    reciprocal = b.div(one, d)
    s = b.mul(f, reciprocal)
    minus = b.neg(s)
    s_low = b.mul(b.fma(minus, d_low, b.fma(minus, d, f)), reciprocal)
    u = b.mul(s, s)
    s_low = b.fma(s_low, u, s_low)  # atanh has slope 1 + u + ...
    s, s_low = fast_two_sum(b, s, b.fma(b.mul(s, u), horner(b, u, ATANH), s_low))
    scale = b.const(TWO_LOG2E_HI)
    p = b.mul(s, scale)
    p_low = b.fma(s, scale, b.neg(p))
    p_low = b.fma(s_low, scale, b.fma(s, b.const(TWO_LOG2E_LO), p_low))
    high, low = fast_two_sum(b, k, p)
    return high, b.add(low, p_low)


def pow(b: Builder[V], x: V, y: V) -> V:
    """x^y = 2^(y log2|x|), the product a pair of floats; signs and edges as in C (Annex F)."""
    a = b.abs(x)
    zero, one, inf = b.const(0.0), b.const(1.0), b.const(INF)
    high, low = _log2_pair(b, a)
    # An infinite y becomes a huge one, so that log2(1) = 0 gives 1; the product is past every clamp or zero.
    y_finite = b.fmin(b.const(2.0**100), b.fmax(b.const(-(2.0**100)), y))
    z = b.mul(y_finite, high)
    z_low = b.fma(y_finite, low, b.fma(y_finite, high, b.neg(z)))
    z_low = b.select(b.lt(b.abs(z), b.const(256.0)), z_low, zero)  # inf - inf where it is not
    value = _exp2_sum(b, b.fmin(b.const(130.0), b.fmax(b.const(-152.0), z)), z_low)

    half = b.mul(y, b.const(0.5))
    whole = b.eq(b.rint(y), y)
    odd = b.land(whole, b.ne(b.rint(half), half))
    flip = b.iselect(odd, b.iand(b.bits(x), b.iconst(SIGN)), b.iconst(0))
    value = b.unbits(b.ixor(b.bits(value), flip))
    undefined = b.land(b.land(b.lt(x, zero), b.lt(a, inf)), b.lnot(whole))
    value = b.select(undefined, b.const(NAN), value)
    return b.select(b.lor(b.eq(y, zero), b.eq(x, one)), one, value)


# --- the table ------------------------------------------------------------------------------------------------------


class CountingBuilder:
    """A `Builder[int]` that only counts: constants and reinterpretations are free, the rest cost one."""

    def __init__(self) -> None:
        self.count = 0

    def _free(self, a: float) -> int:
        return 0

    def _one(self, a: int) -> int:
        self.count += 1
        return 0

    def _two(self, a: int, b: int) -> int:
        self.count += 1
        return 0

    def _three(self, a: int, b: int, c: int) -> int:
        self.count += 1
        return 0

    def shl(self, a: int, n: int) -> int:
        return self._one(a)

    def lookup(self, table: Sequence[float], i: int) -> int:
        return self._one(i)

    def split(self, x: int) -> tuple[int, int]:
        self.count += 4
        return 0, 0

    lshr = ashr = shl
    const = iconst = bits = unbits = _free
    neg = abs = sqrt = floor = rint = lnot = toint = tofloat = _one
    add = sub = mul = div = fmin = fmax = lt = le = eq = ne = land = lor = _two
    iadd = isub = imul = iand = ior = ixor = ilt = ieq = scale = _two
    fma = select = iselect = _three


def count(build: Callable[..., Any], arity: int) -> int:
    """The builder operations of a function."""
    counter = CountingBuilder()
    build(counter, *[0] * arity)
    return counter.count


@dataclass(frozen=True)
class Function:
    """A function of the library: `build(builder, *arguments)`, its bound in ulp, its cost in builder operations."""

    name: str
    arity: int
    build: Callable[..., Any]
    ulp: float
    cost: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cost", count(self.build, self.arity))


FUNCTIONS: dict[str, Function] = {
    build.__name__: Function(build.__name__, arity, build, ulp)
    for build, arity, ulp in (
        (exp, 1, 2.0),
        (exp2, 1, 2.0),
        (expm1, 1, 4.0),
        (log, 1, 2.0),
        (log2, 1, 4.0),
        (log1p, 1, 4.0),
        (tanh, 1, 2.0),
        (sigmoid, 1, 2.0),
        (softplus, 1, 4.0),
        (erf, 1, 2.0),
        (half_erf, 1, 2.0),
        (sin, 1, 2.0),
        (cos, 1, 2.0),
        (tan, 1, 4.0),
        (asin, 1, 4.0),
        (acos, 1, 4.0),
        (atan, 1, 4.0),
        (sinh, 1, 4.0),
        (cosh, 1, 4.0),
        (asinh, 1, 4.0),
        (acosh, 1, 4.0),
        (atanh, 1, 4.0),
        (sqrt, 1, 0.5),
        (rsqrt, 1, 2.0),
        (pow, 2, 4.0),
    )
}
