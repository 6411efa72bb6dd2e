"""The math library's builder in numpy: the same bits as the emitted code, without a compiler.

Values are arrays of float32, int32 or bool; constants have shape (1,) and broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stitch.codegen.mathlib import FUNCTIONS
from stitch.codegen.polynomials import scale_in_steps, split_in_steps

Lanes = npt.NDArray[Any]

# float64 keeps 29 bits more than float32. A sum can only be rounded twice if it sits on a tie between two float32
# values, and then its last bits are zero.
_TIE = np.int64(2**28 - 1)


def evaluate(name: str, *arguments: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The library's function of that name, on float32 arrays, as every machine computes it."""
    function = FUNCTIONS[name]
    if len(arguments) != function.arity:
        raise TypeError(f"{name} takes {function.arity} arguments, not {len(arguments)}")
    with np.errstate(all="ignore"):
        result: npt.NDArray[np.float32] = function.build(NumpyBuilder(), *arguments)
    return result


class NumpyBuilder:
    """`Builder` over numpy arrays. Call it within `np.errstate(all="ignore")`, as `evaluate` does."""

    def const(self, x: float) -> Lanes:
        value = np.full(1, x, np.float32)
        if float(value[0]) != x and x == x:
            raise ValueError(f"{x!r} is not a float32: write float(np.float32({x!r}))")
        return value

    def iconst(self, n: int) -> Lanes:
        return np.full(1, n, np.int32)

    def add(self, a: Lanes, b: Lanes) -> Lanes:
        return a + b

    def sub(self, a: Lanes, b: Lanes) -> Lanes:
        return a - b

    def mul(self, a: Lanes, b: Lanes) -> Lanes:
        return a * b

    def div(self, a: Lanes, b: Lanes) -> Lanes:
        return a / b

    def fma(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
        """a * b + c, rounded once.

        The product of two float32 is exact in float64; the sum is not, and rounding it again to float32 goes wrong
        if the first rounding made a tie. Those lanes are rounded to odd instead (Boldo and Melquiond 2008).
        """
        p = a.astype(np.float64) * b
        s = p + c
        result = s.astype(np.float32)
        suspects = np.flatnonzero((s.view(np.int64) & _TIE) == 0)
        if suspects.size:
            result.ravel()[suspects] = _sum_to_odd(
                np.broadcast_to(p, s.shape).ravel()[suspects], np.broadcast_to(c, s.shape).ravel()[suspects]
            )
        return result

    def neg(self, a: Lanes) -> Lanes:
        return -a

    def abs(self, a: Lanes) -> Lanes:
        return np.abs(a)

    def sqrt(self, a: Lanes) -> Lanes:
        return np.sqrt(a)

    def floor(self, a: Lanes) -> Lanes:
        return np.floor(a)

    def rint(self, a: Lanes) -> Lanes:
        return np.rint(a)

    def fmin(self, a: Lanes, b: Lanes) -> Lanes:
        return np.where(a < b, a, b)

    def fmax(self, a: Lanes, b: Lanes) -> Lanes:
        return np.where(b < a, a, b)

    def lt(self, a: Lanes, b: Lanes) -> Lanes:
        return np.less(a, b)

    def le(self, a: Lanes, b: Lanes) -> Lanes:
        return np.less_equal(a, b)

    def eq(self, a: Lanes, b: Lanes) -> Lanes:
        return np.equal(a, b)

    def ne(self, a: Lanes, b: Lanes) -> Lanes:
        return np.not_equal(a, b)

    def select(self, c: Lanes, a: Lanes, b: Lanes) -> Lanes:
        return np.where(c, a, b)

    def land(self, a: Lanes, b: Lanes) -> Lanes:
        return np.logical_and(a, b)

    def lor(self, a: Lanes, b: Lanes) -> Lanes:
        return np.logical_or(a, b)

    def lnot(self, a: Lanes) -> Lanes:
        return np.logical_not(a)

    def bits(self, x: Lanes) -> Lanes:
        return x.view(np.int32)

    def unbits(self, i: Lanes) -> Lanes:
        return i.view(np.float32)

    def iadd(self, a: Lanes, b: Lanes) -> Lanes:
        return a + b

    def isub(self, a: Lanes, b: Lanes) -> Lanes:
        return a - b

    def imul(self, a: Lanes, b: Lanes) -> Lanes:
        return a * b

    def iand(self, a: Lanes, b: Lanes) -> Lanes:
        return np.bitwise_and(a, b)

    def ior(self, a: Lanes, b: Lanes) -> Lanes:
        return np.bitwise_or(a, b)

    def ixor(self, a: Lanes, b: Lanes) -> Lanes:
        return np.bitwise_xor(a, b)

    def shl(self, a: Lanes, n: int) -> Lanes:
        return np.left_shift(a, np.int32(n))

    def lshr(self, a: Lanes, n: int) -> Lanes:
        return np.right_shift(a.view(np.uint32), np.uint32(n)).view(np.int32)

    def ashr(self, a: Lanes, n: int) -> Lanes:
        return np.right_shift(a, np.int32(n))

    def ilt(self, a: Lanes, b: Lanes) -> Lanes:
        return np.less(a, b)

    def ieq(self, a: Lanes, b: Lanes) -> Lanes:
        return np.equal(a, b)

    def iselect(self, c: Lanes, a: Lanes, b: Lanes) -> Lanes:
        return np.where(c, a, b)

    def toint(self, x: Lanes) -> Lanes:
        return x.astype(np.int32)

    def tofloat(self, i: Lanes) -> Lanes:
        return i.astype(np.float32)

    def scale(self, p: Lanes, n: Lanes) -> Lanes:
        return scale_in_steps(self, p, n)

    def lookup(self, table: Sequence[float], i: Lanes) -> Lanes:
        found: Lanes = np.array(table, np.float32)[i & 15]
        return found

    def split(self, x: Lanes) -> tuple[Lanes, Lanes]:
        return split_in_steps(self, x)


def _sum_to_odd(p: Lanes, c: Lanes) -> Lanes:
    """p + c in float64 rounded to odd, then to float32: the pair rounds as one rounding of the exact sum does."""
    x, y = p, c.astype(np.float64)
    s = x + y
    t = s - x
    error = (x - (s - t)) + (y - t)
    # A float64 nearer to zero or farther from it is one step of its bits. Only an even last bit needs the step.
    step = np.where((error > 0) == (s > 0), 1, -1).astype(np.int64)
    inexact = (error != 0) & np.isfinite(s)
    return np.where(inexact, s.view(np.int64) + step, s.view(np.int64)).view(np.float64).astype(np.float32)
