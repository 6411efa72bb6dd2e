"""Sine, cosine, tangent and their inverses on float32 vectors. How they are written is said in `mathlib`."""

from __future__ import annotations

from stitch.codegen.polynomials import MAGIC, SIGN, Builder, V, fast_two_sum, horner, two_sum, with_sign

HALF_PI_HI, HALF_PI_MID, HALF_PI_LO = 1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15
PI_HI, PI_LO = 3.1415927410125732, -8.742277657347586e-08
TWO_OVER_PI = 0.6366197466850281

# (sin(r) / r - 1) / r^2 and (cos(r) - 1 + r^2 / 2) / r^4 in r^2, |r| <= pi/4; (asin(x) / x - 1) / x^2 in x^2 <= 1/4;
# (atan(x) / x - 1) / x^2 in x^2 <= 1
SIN = (-0.16666655242443085, 0.008332191035151482, -0.00019518598855938762)
COS = (0.04166664555668831, -0.0013887310633435845, 2.4432552891084924e-05)
ASIN = (0.16666753590106964, 0.07495252043008804, 0.0454760417342186, 0.02415209263563156, 0.04221179708838463)
ATAN = (-0.33333301544189453, 0.1999862790107727, -0.1426512748003006, 0.10956954210996628, -0.08417637646198273,
        0.058203283697366714, -0.03142440319061279, 0.011047528125345707, -0.0018234018934890628)  # fmt: skip
# Payne-Hanek: for 2^e <= |x| < 2^(e+22) the scale 2^(23-e), and 2^(e-23) * 2/pi modulo 4, in [4, 8), as four floats
TURNS = (
    (2.0**18, 2.0**5, (4.019894599914551, -2.3202805721211917e-07, -6.652159698734492e-15, -2.54527864335732e-23)),
    (2.0**40, 2.0**-17, (7.026803970336914, -2.0671511435921275e-07, -1.067567239494818e-16, 3.2389711717572425e-24)),
    (2.0**62, 2.0**-39, (7.132974147796631, -1.7926170414739317e-07, -3.1948169005367006e-16, 1.230569606261495e-23)),
    (2.0**84, 2.0**-61, (5.248121738433838, 1.7747393599165662e-07, -4.944389658172264e-15, -1.2215551507025715e-22)),
    (2.0**106, 2.0**-83, (6.74437952041626, 9.847101267723701e-08, 3.0403563662588203e-15, -4.476432858532427e-23)),
)


def _reduce_huge(b: Builder[V], a: V) -> tuple[V, V]:
    """Quarter turns (as integer bits) and rest in radians of a >= 2^18 (Payne and Hanek 1983, in floats).

    y = a times a power of two is an integer below 2^46, and c1 + c2 + c3 + c4 = 2/pi over that power, modulo 4. c1 is
    at least 4, so that the rounded y c1 is a multiple of 4 and drops out; the rest is summed without error.
    """
    edge, scale, parts = TURNS[0]
    row = [b.const(v) for v in (scale, *parts)]
    for edge, scale, parts in TURNS[1:]:
        above = b.le(b.const(edge), a)
        row = [b.select(above, b.const(v), old) for v, old in zip((scale, *parts), row, strict=True)]
    factor, c1, c2, c3, c4 = row
    y = b.mul(a, factor)
    e1 = b.fma(y, c1, b.neg(b.mul(y, c1)))
    p2 = b.mul(y, c2)
    e2 = b.fma(y, c2, b.neg(p2))
    p3 = b.mul(y, c3)
    tail = b.fma(y, c4, b.fma(y, c3, b.neg(p3)))
    total, low = two_sum(b, e1, p2)
    total = b.fma(b.rint(b.mul(total, b.const(0.25))), b.const(-4.0), total)
    errors = b.const(0.0)
    for term in (low, e2, p3):
        total, error = two_sum(b, total, term)
        errors = b.add(errors, error)  # exact: few bits, at one height
    t = b.add(total, b.const(MAGIC))
    rest = b.sub(total, b.sub(t, b.const(MAGIC)))
    high, low = fast_two_sum(b, rest, errors)
    high, lower = fast_two_sum(b, high, tail)
    low = b.add(low, lower)
    hi, mid = b.const(HALF_PI_HI), b.const(HALF_PI_MID)
    return b.bits(t), b.fma(high, hi, b.fma(high, mid, b.mul(low, hi)))


def _sin_cos(b: Builder[V], x: V) -> tuple[V, V, V]:
    """The quarter turns of |x| in the low bits of an integer, and the sine and the cosine of the rest."""
    a = b.abs(x)
    t = b.fma(a, b.const(TWO_OVER_PI), b.const(MAGIC))
    n = b.sub(t, b.const(MAGIC))
    r = b.fma(n, b.const(-HALF_PI_MID), b.fma(n, b.const(-HALF_PI_HI), a))
    r = b.fma(n, b.const(-HALF_PI_LO), r)
    huge = b.le(b.const(TURNS[0][0]), a)
    turns, rest = _reduce_huge(b, a)
    turns, r = b.iselect(huge, turns, b.bits(t)), b.select(huge, rest, r)
    s = b.mul(r, r)
    sine = b.fma(b.mul(r, s), horner(b, s, SIN), r)
    return turns, sine, horner(b, s, (1.0, -0.5, *COS))


def _quarter(b: Builder[V], turns: V, even: V, odd: V) -> V:
    """`even` or `odd` by the last bit of `turns`, negated by the bit above it."""
    last = b.ieq(b.iand(turns, b.iconst(1)), b.iconst(0))
    flip = b.shl(b.iand(turns, b.iconst(2)), 30)
    return b.unbits(b.ixor(b.bits(b.select(last, even, odd)), flip))


def sin(b: Builder[V], x: V) -> V:
    """Sine: quarter turns taken off by Cody-Waite below 2^18 and Payne-Hanek above, both computed."""
    turns, sine, cosine = _sin_cos(b, x)
    value = _quarter(b, turns, sine, cosine)
    return b.unbits(b.ixor(b.bits(value), b.iand(b.bits(x), b.iconst(SIGN))))


def cos(b: Builder[V], x: V) -> V:
    """Cosine, as `sin` one quarter turn on."""
    turns, sine, cosine = _sin_cos(b, x)
    return _quarter(b, b.iadd(turns, b.iconst(1)), sine, cosine)


def tan(b: Builder[V], x: V) -> V:
    """Tangent: sine over cosine, or minus cosine over sine in odd quarters."""
    turns, sine, cosine = _sin_cos(b, x)
    odd = b.ieq(b.iand(turns, b.iconst(1)), b.iconst(1))
    value = b.div(b.select(odd, b.neg(cosine), sine), b.select(odd, sine, cosine))
    return b.unbits(b.ixor(b.bits(value), b.iand(b.bits(x), b.iconst(SIGN))))


def _asin_parts(b: Builder[V], a: V) -> tuple[V, V]:
    """Whether a = |x| is above a half, and asin(a), or asin(sqrt((1 - a) / 2)) if it is (Cephes)."""
    above = b.lt(b.const(0.5), a)
    half = b.fma(a, b.const(-0.5), b.const(0.5))
    s = b.select(above, half, b.mul(a, a))
    z = b.select(above, b.sqrt(half), a)
    return above, b.fma(b.mul(z, s), horner(b, s, ASIN), z)


def asin(b: Builder[V], x: V) -> V:
    """Arc sine."""
    above, v = _asin_parts(b, b.abs(x))
    value = b.select(above, b.fma(v, b.const(-2.0), b.const(HALF_PI_HI)), v)
    return with_sign(b, value, x)


def acos(b: Builder[V], x: V) -> V:
    """Arc cosine: 2 v, pi - 2 v, or pi/2 - asin(x)."""
    above, v = _asin_parts(b, b.abs(x))
    signed = b.unbits(b.ixor(b.bits(v), b.iand(b.bits(x), b.iconst(SIGN))))
    middle = b.add(b.sub(b.const(HALF_PI_MID), signed), b.const(HALF_PI_HI))
    double = b.add(signed, signed)
    outer = b.select(b.lt(x, b.const(0.0)), b.add(b.add(double, b.const(PI_LO)), b.const(PI_HI)), double)
    return b.select(above, outer, middle)


def atan(b: Builder[V], x: V) -> V:
    """Arc tangent: odd polynomial on [0, 1], pi/2 - atan(1 / x) beyond."""
    a = b.abs(x)
    above = b.lt(b.const(1.0), a)
    z = b.select(above, b.div(b.const(1.0), a), a)
    s = b.mul(z, z)
    v = b.fma(b.mul(z, s), horner(b, s, ATAN), z)
    return with_sign(b, b.select(above, b.sub(b.const(HALF_PI_HI), v), v), x)
