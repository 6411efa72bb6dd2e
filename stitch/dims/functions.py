"""Quotients, remainders, maxima and minima, simplified.

Each rewrites its arguments and starts again, or makes an atom of arguments that no rewrite applies to: an expression
rebuilt from its own parts (parsed from its text, say) is therefore the same object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal

from stitch.dims.expressions import CACHE, FUNCTIONS, Dim, Func, dim_of, integral, sum_of, terms_of
from stitch.dims.factors import common_factor, divide, quotient
from stitch.dims.intervals import at_least, bounds, prove_le


@lru_cache(CACHE)
def floordiv(a: Dim, d: Dim) -> Dim:
    """a // d, as `//` gives it; 0 where d is 0."""
    if isinstance(a, int) and isinstance(d, int):
        return a // d if d else 0
    if a == 0 or d == 0:
        return 0
    if terms_of(d)[0][0] < 0:
        return floordiv(-a, -d)
    if (factor := common_factor(a, d)) != 1:  # 6*n // 4 -> 3*n // 2
        return floordiv(divide(a, factor)[0], divide(d, factor)[0])
    whole, rest = _split(a, d)
    if whole != 0:  # (a*d + r) // d -> a + r // d
        return whole + floordiv(rest, d)
    if (constant := _constant_quotient(a, d)) is not None:
        return constant
    for c, m in terms_of(a):
        match c, m:  # (x // e + r) // d -> (x + e*r) // (e*d); where e may be 0 only without an r
            case 1, (Func("floordiv", (x, e)) as atom,) if at_least(d, 0):
                rest = a - dim_of(atom)
                if rest == 0 or at_least(e, 1):
                    return floordiv(x + e * rest, e * d)
    return dim_of(Func("floordiv", (a, d)))


@lru_cache(CACHE)
def mod(a: Dim, d: Dim) -> Dim:
    """a % d, as `%` gives it; 0 where d is 0."""
    if isinstance(a, int) and isinstance(d, int):
        return a % d if d else 0
    if a == 0 or d == 0:
        return 0
    if terms_of(d)[0][0] < 0:
        return -mod(-a, -d)
    if (factor := common_factor(a, d)) != 1:  # 6*n % 4 -> 2*(3*n % 2)
        return factor * mod(divide(a, factor)[0], divide(d, factor)[0])
    whole, rest = _split(a, d)
    if whole != 0:
        return mod(rest, d)
    if (constant := _constant_quotient(a, d)) is not None:
        return a - constant * d
    for c, m in terms_of(a):
        for i, atom in enumerate(m):
            match atom:  # x % e is x plus a multiple of e: where d divides e, it may as well be x
                case Func("mod", (x, e)) if e == d or (quotient(e, d) is not None and at_least(e, 1)):
                    return mod(a - sum_of([(c, m)]) + sum_of([(c, m[:i] + m[i + 1 :])]) * x, d)
    return dim_of(Func("mod", (a, d)))


def _split(a: Dim, d: Dim) -> tuple[Dim, Dim]:
    """`divide`, but by a sum only if it leaves fewer terms: n // (n + k) is best left as it is."""
    whole, rest = divide(a, d)
    return (whole, rest) if len(terms_of(d)) == 1 or len(terms_of(rest)) < len(terms_of(a)) else (0, a)


def _constant_quotient(a: Dim, d: Dim) -> int | None:
    """The number k with k*d <= a < (k + 1)*d at all values of the symbols, as far as it can be told."""
    low = bounds(a)[0] if isinstance(d, int) else None
    guesses = (0, -1) if not isinstance(d, int) else () if low is None else (low // d,)
    return next((k for k in guesses if at_least(a - k * d, 0) and at_least((k + 1) * d - a, 1)), None)


def ceil_div(a: Dim, b: Dim) -> Dim:
    """a / b rounded up; 0 where b is 0."""
    return (a + (b - 1)) // b if isinstance(b, int) and b > 0 else -(floordiv(-a, b))


def dim_max(*dims: Dim) -> Dim:
    """The largest of the dims; what another is proved to reach is left out."""
    return _extreme("max", dims)


def dim_min(*dims: Dim) -> Dim:
    """The smallest of the dims; what is proved to reach another is left out."""
    return _extreme("min", dims)


def _extreme(kind: Literal["max", "min"], dims: Iterable[Dim]) -> Dim:
    def beats(a: Dim, b: Dim) -> bool:
        return prove_le(b, a) is True if kind == "max" else prove_le(a, b) is True

    kept: list[Dim] = []
    for dim in _flatten(kind, dims):
        if not any(beats(other, dim) for other in kept):
            kept = [*(other for other in kept if not beats(dim, other)), dim]
    if not kept:
        raise ValueError(f"the {kind} of no dims")
    return kept[0] if len(kept) == 1 else dim_of(Func(kind, tuple(sorted(kept, key=str))))


def _flatten(kind: str, dims: Iterable[Dim]) -> Iterator[Dim]:
    for dim in dims:
        match terms_of(dim):
            case ((1, (Func(inner, args),)),) if inner == kind:
                yield from args
            case _:
                yield integral(dim)


FUNCTIONS.update(floordiv=floordiv, mod=mod, max=dim_max, min=dim_min)
