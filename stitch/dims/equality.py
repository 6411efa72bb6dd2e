"""Dims that are equal at all values of the symbols, and shapes whose parts have equally many elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

from stitch.dims.expressions import CACHE, Dim, Func, dim_of, integral, minus, product, terms_of
from stitch.dims.functions import floordiv
from stitch.dims.intervals import at_least, bounds


@lru_cache(CACHE)
def prove_equal(a: Dim, b: Dim) -> bool | None:
    """True: equal at all values of the symbols. False: different at all. None: depends, or unknown."""
    for difference in (minus(a, b), _without_mod(minus(a, b))):
        if isinstance(difference, int):
            return difference == 0
        low, high = bounds(difference)
        if (low is not None and low > 0) or (high is not None and high < 0):
            return False
        *others, (constant, monomial) = difference.terms
        if not monomial and constant % math.gcd(*(c for c, _ in others)):  # 2*n + 1 is never 0
            return False
    return None


def _without_mod(dim: Dim) -> Dim:
    """x % d written x - d*(x // d), where d is never 0: two ways to say the same meet in one."""
    total: Dim = 0
    for c, monomial in terms_of(dim):
        term: Dim = c
        for atom in monomial:
            match atom:
                case Func("mod", (x, d)) if at_least(d, 1):
                    term = term * (x - d * floordiv(x, d))
                case _:
                    term = term * dim_of(atom)
        total = total + term
    return total


Segment: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def factor_segments(a: Sequence[Dim], b: Sequence[Dim]) -> list[Segment] | None:
    """Cut two shapes into the most segments (axes of a, axes of b), in order, of provably equal products.

    A reshape from a to b then only splits and merges axes within segments: (batch, seq, 768) to
    (batch, seq, 12, 64) gives [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]. Each axis is in one segment.
    An axis of extent 1 inside a larger segment belongs to it; elsewhere it is a segment whose other side is
    empty, even beside a 1 of the other shape (that of a comes first). No other segment has an empty side.
    None if the whole shapes are not proved to have the same number of elements.
    """
    found = _segments(tuple(map(integral, a)), tuple(map(integral, b)))
    return None if found is None else list(found)


@lru_cache(CACHE)
def _segments(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Segment, ...] | None:
    # Were it not for extents of 0, behind which all products are 0, any equal prefixes would do for a cut. So
    # take the best of all ways to cut: at the ranks there are, that is as cheap.
    best: dict[tuple[int, int], tuple[Segment, ...]] = {(len(a), len(b)): ()}
    for i in reversed(range(len(a) + 1)):
        for j in reversed(range(len(b) + 1)):
            options = [
                ((tuple(range(i, k)), tuple(range(j, m))), *rest)
                for (k, m), rest in best.items()
                if k >= i and m >= j and (k, m) != (i, j) and prove_equal(product(a[i:k]), product(b[j:m]))
            ]
            if options:  # of equally good ones the first, which takes what a has before what b has
                best[i, j] = max(options, key=len)
    return best.get((0, 0))
