"""Polynomials that divide others: long division, and common factors.

Only `_polynomial_gcd` calls sympy, which takes two sums of degree 2 or more.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from functools import lru_cache, reduce
from itertools import chain

from stitch.dims.expressions import CACHE, Dim, Term, atom_order, join, order, sum_of, terms_of


def divide(a: Dim, d: Dim) -> tuple[Dim, Dim]:
    """Long division: (q, r) with a == q*d + r, where r is 0 iff d divides a.

    Division by one polynomial, in an order that products preserve, needs no computer algebra: if a == q*d,
    the leading term of a is the product of those of q and d, so that each step finds one term of q.
    """
    (lead, shape), *tail = terms_of(d)
    rest = {m: c for c, m in terms_of(a)}
    quotients: list[Term] = []
    remainders: list[Term] = []
    while rest:
        top = min(rest, key=order)
        count, coefficient = Counter(top), rest.pop(top)
        count.subtract(shape)
        divides = min(count.values(), default=0) >= 0
        step, remainder = divmod(coefficient, lead) if divides else (0, coefficient)
        remainders.append((remainder, top))
        if step:
            factor = tuple(count.elements())
            quotients.append((step, factor))
            for c, m in tail:
                lower = join(factor, m)
                rest[lower] = rest.get(lower, 0) - step * c
    return sum_of(quotients), sum_of(remainders)


def quotient(a: Dim, b: Dim) -> Dim | None:
    """The q with a == q*b as polynomials, or None where there is none (or b is 0)."""
    if b == 0:
        return None
    q, remainder = divide(a, b)
    return q if remainder == 0 else None


def _content(dim: Dim) -> int:
    """The greatest number that divides all coefficients, with the sign of the leading one."""
    coefficients = [c for c, _ in terms_of(dim)]
    return math.gcd(*coefficients) * (1 if coefficients[0] > 0 else -1)


@lru_cache(CACHE)
def common_factor(a: Dim, b: Dim) -> Dim:
    """The greatest common divisor of two non-zero polynomials, its leading coefficient positive."""
    powers = reduce(operator.and_, (Counter(m) for _, m in terms_of(a) + terms_of(b)))
    factor = sum_of([(math.gcd(_content(a), _content(b)), join(tuple(powers.elements()), ()))])
    a, b = divide(a, factor)[0], divide(b, factor)[0]
    if len(terms_of(a)) == 1 or len(terms_of(b)) == 1:  # only a monomial divides a monomial
        return factor
    for one, other in ((a, b), (b, a)):
        primitive = divide(one, _content(one))[0]
        if quotient(other, primitive) is not None:
            return factor * primitive
    # What else they may share is a proper factor of both, so both have a degree of 2 at least.
    atoms = [{atom for _, m in terms_of(dim) for atom in m} for dim in (a, b)]
    if min(len(terms_of(a)[0][1]), len(terms_of(b)[0][1])) > 1 and atoms[0] & atoms[1]:
        return factor * _polynomial_gcd(a, b)
    return factor


def _polynomial_gcd(a: Dim, b: Dim) -> Dim:
    import sympy  # costs 0.4 s, and next to no model comes here

    atoms = sorted({atom for dim in (a, b) for _, m in terms_of(dim) for atom in m}, key=atom_order)
    polys = [
        sympy.Poly({tuple(map(m.count, atoms)): c for c, m in terms_of(dim)}, sympy.symbols(f"x:{len(atoms)}"))
        for dim in (a, b)
    ]
    found = sum_of(
        (int(c), tuple(chain.from_iterable([atom] * n for atom, n in zip(atoms, powers, strict=True))))
        for powers, c in sympy.gcd(*polys).terms()
    )
    return found if terms_of(found)[0][0] > 0 else -found
