"""What a dim is at least and at most, at all values of its symbols: interval arithmetic over terms and atoms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

from stitch.dims.expressions import CACHE, Atom, Dim, Func, Monomial, Symbol, minus, sum_of, terms_of

Interval: TypeAlias = tuple[int | None, int | None]
_RELAXATIONS = 2  # how many atoms `_lower` gives up in a row: max(n, m) - min(n, k) takes two


@lru_cache(CACHE)
def bounds(dim: Dim) -> Interval:
    """(low, high) with low <= dim <= high at all values of the symbols; None where no bound was found."""
    if isinstance(dim, int):
        return dim, dim
    high = _lower(-dim, _RELAXATIONS)
    return _lower(dim, _RELAXATIONS), None if high is None else -high


def at_least(dim: Dim, least: int) -> bool:
    """Whether it is proved that the dim never lies below `least`."""
    if isinstance(dim, int):
        return dim >= least
    low = _lower(dim, _RELAXATIONS)
    return low is not None and low >= least


@lru_cache(CACHE)
def _lower(dim: Dim, depth: int) -> int | None:
    """A lower bound: the sum of the terms' own; failing that, one where an argument stands for a function.

    n - n // 2 has no bound term by term, but n // 2 is at most n / 2, so twice the whole is at least n.
    """
    ends = [c * end if (end := _span(m)[c < 0]) is not None else None for c, m in terms_of(dim)]
    if None not in ends:
        return sum(end for end in ends if end is not None)
    found: list[int] = []
    for c, m in terms_of(dim) if depth else ():
        for i, atom in enumerate(m):
            others = m[:i] + m[i + 1 :]
            if isinstance(atom, Func) and (sign := _span(others)[0]) is not None and sign >= 0:
                for value, divisor in _relaxed(atom, "below" if c > 0 else "above"):
                    rest = divisor * (dim - sum_of([(c, m)])) + sum_of([(c, others)]) * value
                    if (low := _lower(rest, depth - 1)) is not None:
                        found.append(-(-low // divisor))
    return max(found, default=None)


def _relaxed(atom: Func, side: Literal["below", "above"]) -> Sequence[tuple[Dim, int]]:
    """Plainer fractions (value, divisor) that the atom never lies below, or above."""
    match side, atom:
        case "below", Func("max", args):
            return [(arg, 1) for arg in args]
        case "above", Func("min", args):
            return [(arg, 1) for arg in args]
        case "below", Func("floordiv", (x, int(d))):
            return [(x - d + 1, d)]
        case "above", Func("floordiv", (x, int(d))):
            return [(x, d)]
        case "above", Func("floordiv", (x, d)) if at_least(d, 0) and at_least(x, 0):
            return [(x, 1)]
        case "above", Func("mod", (x, d)) if at_least(d, 0):
            return [(d - 1 if at_least(d, 1) else d, 1), *([(x, 1)] if at_least(x, 0) else [])]
    return ()


@lru_cache(CACHE)
def _span(monomial: Monomial) -> Interval:
    """Bounds of a product of atoms, by interval arithmetic."""
    if not monomial:
        return 1, 1
    (low, high), (lo, hi) = _atom_span(monomial[0]), _span(monomial[1:])
    if (lo, hi) == (1, 1):
        return low, high
    if low is None or lo is None:
        return None, None
    if min(low, lo) >= 0:
        return low * lo, None if high is None or hi is None else high * hi
    if high is None or hi is None:
        return None, None
    corners: list[int] = [low * lo, low * hi, high * lo, high * hi]
    return min(corners), max(corners)


def _atom_span(atom: Atom) -> Interval:
    match atom:
        case Symbol():
            return 0, None
        case Func("max" | "min", args):
            lows, highs = [bounds(arg)[0] for arg in args], [bounds(arg)[1] for arg in args]
            some_lows, some_highs = [v for v in lows if v is not None], [v for v in highs if v is not None]
            if atom.kind == "max":
                return max(some_lows, default=None), None if None in highs else max(some_highs)
            return None if None in lows else min(some_lows), min(some_highs, default=None)
        case Func("floordiv", (x, int(d))):
            low, high = bounds(x)
            return None if low is None else low // d, None if high is None else high // d
        case Func("floordiv", (x, d)) if at_least(d, 0):  # between x and 0, both included
            low, high = bounds(x)
            return None if low is None else min(low, 0), None if high is None else max(high, 0)
        case Func("mod", (x, d)) if at_least(d, 0):
            (low, high), (_, limit) = bounds(x), bounds(d)
            tops = [] if limit is None else [max(limit - 1, 0)]
            if high is not None and low is not None and low >= 0:
                tops.append(high)
            return 0, min(tops, default=None)
    return None, None


def prove_le(a: Dim, b: Dim) -> bool | None:
    """True: a <= b at all values of the symbols. False: a > b at all. None: depends, or unknown."""
    low, high = bounds(minus(b, a))
    if low is not None and low >= 0:
        return True
    return False if high is not None and high < 0 else None
