"""Division by a constant without a division."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np


@functools.cache
def reciprocal(c: float) -> tuple[float, float] | None:
    """(h, l) with fma(x, h, x * l) = x / c, rounded to float32, for NaN, infinity, zero, and wherever |x / c| > 2^-40.

    h is 1 / c rounded towards zero, l the rest of it (Brisebarre, Muller, Raina 2004, who round h to nearest; here l
    has the sign of h, so that an infinite x does not meet infinity of the other sign). The sum before its rounding is
    x / c within 2^-46, so that it goes wrong only next to the middle of two floats, where few x can be: they are
    tried here. None: one of them fails, or c is a power of two, or very large or small.
    """
    if not 2.0**-60 < abs(c) < 2.0**60 or float(np.float32(c)) != c or abs(math.frexp(c)[0]) == 0.5:
        return None
    mantissa, exponent = math.frexp(abs(c))
    n = int(mantissa * 2**24)
    head, left = divmod(2**47, n)
    first = np.float32(left / n)
    unit = math.copysign(2.0 ** (-23 - exponent), c)
    suspects = _suspects(n)
    choices = [(0, v) for v in (first, np.nextafter(first, np.float32(0)), np.nextafter(first, np.float32(1)))]
    for less, rest in (*choices, (1, np.float32(left / n + 1))):
        if rest > 0 and all(_right(x, n, head - less, Fraction(float(rest))) for x in suspects):
            return (head - less) * unit, float(rest) * unit
    return None


def _right(x: int, n: int, head: int, rest: Fraction) -> bool:
    return _nearest(x * head + _nearest(x * rest)) == _nearest(Fraction(x << 47, n))


def _suspects(n: int) -> list[int]:
    """The 24-bit x for which x / n is next to the middle m / 2 of two floats: x 2^k = m n + r, m odd and r small."""
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    found = []
    for k in (24, 25):  # x >= n and x < n
        step = 1 << (k - twos)
        inverse = pow(odd, -1, step)
        for r in range(-8, 9):
            if r % (1 << twos) or not r:
                continue
            first = -(r >> twos) * inverse % step
            for m in range(first + (-(first - (1 << 24)) // step) * step, 1 << 25, step):
                x, over = divmod(m * n + r, 1 << k)
                if m & 1 and not over and 1 << 23 <= x < 1 << 24:
                    found.append(x)
    return found


def _nearest(x: Fraction) -> Fraction:
    """A positive number rounded to 24 bits, half to even."""
    unit = Fraction(2) ** (math.floor(math.log2(x)) - 24)
    while x / unit >= 1 << 24:
        unit *= 2
    return round(x / unit) * unit
