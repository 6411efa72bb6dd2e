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

from collections.abc import Callable
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
from stitch.codegen.trigonometry import acos, asin, atan, cos, sin, tan

LN2_HI, LN2_LO = 0.693145751953125, 1.428606765330187e-06  # 16 bits, so that n * LN2_HI is exact
LN2 = 0.6931471824645996
LOG2E = 1.4426950216293335
TWO_LOG2E_HI, TWO_LOG2E_LO = 2.885390043258667, 3.851926067000022e-08

# (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, to 2^-26 and 2^-31 of e^r - 1; (2^r - 1) / r on |r| <= 1
EXPM1 = (0.4999999701976776, 0.1666654646396637, 0.04166743531823158, 0.00836626160889864, 0.0013870657421648502)
EXPM1_FINE = (0.5, 0.1666666567325592, 0.04166649281978607, 0.008333546109497547, 0.0013932326110079885,
              0.00019761674047913402)  # fmt: skip
EXP2 = (0.6931472420692444, 0.24022668600082397, 0.055503666400909424, 0.00961683876812458, 0.0013341534649953246,
        0.00015645918028894812, 1.492835144745186e-05)  # fmt: skip
# (log(1 + f) - f + f^2 / 2) / f^3 and log2(1 + f) / f on |f| <= 1/3; (atanh(s) / s - 1) / s^2 in s^2 for pow
LOG = (0.3333321511745453, -0.2499980330467224, 0.2001044899225235, -0.16680246591567993, 0.1400521695613861,
       -0.12187445908784866, 0.13987509906291962, -0.12878386676311493)  # fmt: skip
LOG2 = (1.4426950216293335, -0.7213468551635742, 0.4808981120586395, -0.3607727587223053, 0.28865307569503784,
        -0.23704415559768677, 0.20242366194725037, -0.22102580964565277, 0.2004798948764801)  # fmt: skip
ATANH = (0.3333333432674408, 0.19999447464942932, 0.14329659938812256, 0.10454989224672318)
# 1 / d on [1, 2], to one per cent
RECIPROCAL = (2.1212005615234375, -1.4545296430587769, 0.323227196931839)
# erf(x) / x - 1 in x^2 <= 1; erf(x) in z = ERF_SCALE * x + ERF_SHIFT, which is -1 at one and 1 at ERF_EDGE
ERF_SMALL = (0.12837916612625122, -0.3761262893676758, 0.11283618211746216, -0.02685512602329254,
             0.005190733820199966, -0.0008030761382542551, 7.920368079794571e-05)  # fmt: skip
ERF_EDGE, ERF_SCALE, ERF_SHIFT = 3.9375, 0.6808510422706604, -1.6808511018753052
ERF = (0.999519407749176, 0.0037367723416537046, -0.013550041243433952, 0.030067648738622665,
       -0.044760704040527344, 0.045445606112480164, -0.029232094064354897, 0.007066906895488501,
       0.007291287183761597, -0.009221736341714859, 0.0035302205942571163, 0.0015002706786617637,
       -0.0016629912424832582, 5.411484744399786e-05, 0.0002153166860807687)  # fmt: skip
# --- pieces ---------------------------------------------------------------------------------------------------------


def quotient(b: Builder[V], a: V, w: V, top: float) -> V:
    """a / (1 + w) for 1 + w in [top / 2, top], top a power of two, to 0.51 ulp; a / (1 + w) in [a / 2, 2 a].

    A quadratic gives 1 / (1 + w) to 1e-2, a Newton step to 1e-4, and a correction by the quotient's residual squares
    that (Markstein 1990). The residual is (a - q) - q w: exact, so that rounding 1 + w costs nothing. The sum before
    the last rounding never exceeds the true quotient. A division by the rounded 1 + w would cost tanh and sigmoid their
    bound; in a loop of nothing else it is somewhat faster on Zen 4, where the divider works beside the multipliers.
    """
    k = 2.0 / top
    d = b.add(b.const(1.0), w)
    minus = horner(b, d, [-c * k ** (i + 1) for i, c in enumerate(RECIPROCAL)])
    minus = b.fma(minus, b.fma(d, minus, b.const(1.0)), minus)
    q = b.mul(a, minus)
    return b.neg(b.fma(b.fma(q, w, b.add(a, q)), minus, q))


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


def _decode(b: Builder[V], x: V, low: int) -> tuple[V, V]:
    """k (float) and m with x = 2^k m, and m in [low, 2 low) where `low` is the bits of a float; x > 0, finite."""
    small = b.lt(x, b.const(2.0**-126))
    i = b.bits(b.select(small, b.mul(x, b.const(2.0**23)), x))
    k = b.ashr(b.isub(i, b.iconst(low)), 23)
    m = b.unbits(b.isub(i, b.shl(k, 23)))
    return b.add(b.tofloat(k), b.select(small, b.const(-23.0), b.const(0.0))), m


def _log_sum(b: Builder[V], k: V, f: V) -> V:
    """k ln2 + log(1 + f), for |f| <= 1/3."""
    tail = b.mul(b.mul(f, f), b.fma(f, horner(b, f, LOG), b.const(-0.5)))
    return b.fma(k, b.const(LN2_HI), b.add(f, b.fma(k, b.const(LN2_LO), tail)))


def _log_edges(b: Builder[V], x: V, value: V) -> V:
    """`value`, but -inf at zero, NaN below it, and inf or NaN as they came."""
    value = b.select(b.lt(x, b.const(INF)), value, x)
    return b.select(b.lt(b.const(0.0), x), value, b.select(b.eq(x, b.const(0.0)), b.const(-INF), _nan_of(b, x)))


def _nan_of(b: Builder[V], x: V) -> V:
    """NaN: x's own if it is one."""
    return b.select(b.eq(x, x), b.const(NAN), x)


TWO_THIRDS = 0x3F2AAAAB
SQRT_HALF = 0x3F3504F3


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
    """e^x: Cody-Waite reduction and a polynomial of degree 6 (Muller, Elementary Functions, 11.2).

    2^n is applied as two factors, as n reaches from -150 to 128: the bias of 254 is shared between their exponents.
    Only the second product can round, to a subnormal or to infinity.
    """
    p, m = _exp_parts(b, b.fmin(b.const(90.0), b.fmax(b.const(-104.0), x)), 254.0)
    half = b.ashr(m, 1)
    return b.mul(b.mul(p, b.unbits(b.shl(half, 23))), b.unbits(b.shl(b.isub(m, half), 23)))


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
    """1 / (1 + e^-x), as (1 or t) / (1 + t) with t = e^-|x|: right down to subnormal results."""
    t = _exp_minus_abs(b, x)
    top = b.select(b.lt(x, b.const(0.0)), t, b.const(1.0))
    return quotient(b, top, t, 2.0)


def tanh(b: Builder[V], x: V) -> V:
    """g / (1 - g) with g = (1 - e^-2|x|) / 2, which needs no division: see `quotient`.

    g = s p + (1 - s) / 2, where e^-2|x| = s (1 - 2 p). The factor of -2 is folded into the coefficients. From
    |x| = 10 the result is one.
    """
    a = b.fmin(b.const(10.0), b.abs(x))
    magic = b.const(MAGIC + 127.0)
    t = b.fma(a, b.const(-2.0 * LOG2E), magic)
    n = b.sub(t, magic)
    r = b.fma(n, b.const(0.5 * LN2_LO), b.fma(n, b.const(0.5 * LN2_HI), a))
    p = b.fma(b.mul(r, r), horner(b, r, [-2.0 * c * (-2.0) ** i for i, c in enumerate(EXPM1_FINE)]), r)
    s = b.unbits(b.shl(b.bits(t), 23))
    g = b.fma(s, p, b.fma(s, b.const(-0.5), b.const(0.5)))
    return with_sign(b, quotient(b, g, b.neg(g), 1.0), x)


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
    """Natural logarithm: k ln2 + log(1 + f) with |f| <= 1/3 (Cephes's split of the exponent, with our own fit)."""
    k, m = _decode(b, x, TWO_THIRDS)
    return _log_edges(b, x, _log_sum(b, k, b.sub(m, b.const(1.0))))


def log2(b: Builder[V], x: V) -> V:
    """Base-two logarithm, exact at powers of two."""
    k, m = _decode(b, x, TWO_THIRDS)
    f = b.sub(m, b.const(1.0))
    return _log_edges(b, x, b.fma(f, horner(b, f, LOG2), k))


def log1p(b: Builder[V], x: V) -> V:
    """log(1 + x)."""
    value = b.select(b.lt(x, b.const(INF)), _log1p(b, x), x)
    value = b.select(b.lt(b.const(-1.0), x), value, b.select(b.eq(x, b.const(-1.0)), b.const(-INF), _nan_of(b, x)))
    return b.select(b.eq(x, b.const(0.0)), x, value)


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
    """The error function from two polynomials: neither division nor exponential.

    Below one, x + x P(x^2). Above, erf itself in the variable centred on [1, edge], where its coefficients are small,
    Horner's rule is stable, and the last sum rounds to one exactly where erf does.
    """
    a = b.fmin(b.const(ERF_EDGE), b.abs(x))
    small = b.fma(a, horner(b, b.mul(a, a), ERF_SMALL), a)
    large = horner(b, b.fma(a, b.const(ERF_SCALE), b.const(ERF_SHIFT)), ERF)
    return with_sign(b, b.select(b.lt(a, b.const(1.0)), small, large), x)


# --- powers ---------------------------------------------------------------------------------------------------------


def sqrt(b: Builder[V], x: V) -> V:
    """Square root, correctly rounded."""
    return b.sqrt(x)


def rsqrt(b: Builder[V], x: V) -> V:
    """1 / sqrt(x)."""
    return b.div(b.const(1.0), b.sqrt(x))


def _log2_pair(b: Builder[V], a: V) -> tuple[V, V]:
    """log2(a) as a sum of two floats, to about 2^-31, for finite a > 0.

    log(m) = 2 atanh(f / (m + 1)): the quotient is a pair, and its cube, a hundredth of it, a float.
    """
    k, m = _decode(b, a, SQRT_HALF)
    one = b.const(1.0)
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
    high = b.select(b.eq(a, zero), b.const(-INF), b.select(b.lt(a, inf), high, a))
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

    lshr = ashr = shl
    const = iconst = bits = unbits = _free
    neg = abs = sqrt = floor = rint = lnot = toint = tofloat = _one
    add = sub = mul = div = fmin = fmax = lt = le = eq = ne = land = lor = _two
    iadd = isub = imul = iand = ior = ixor = ilt = ieq = _two
    fma = select = iselect = _three


def _count(build: Callable[..., Any], arity: int) -> int:
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
        object.__setattr__(self, "cost", _count(self.build, self.arity))


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
