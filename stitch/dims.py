"""Symbolic dimensions: the extents of tensors whose shapes hold symbols rather than numbers.

A `Dim` is an int, or an `Expr`: a polynomial with integer coefficients over *atoms*. An atom is a `Symbol`
(an unknown non-negative integer: tensors of extent zero are legal, so nothing here may take a symbol to be
positive) or a `Func` of other dims that polynomials cannot express. Constants are always ints.

Every expression is canonical and interned: kept expanded, its like terms collected and sorted, and one object
per value, so that equality is identity and hashing is free. Equal polynomials are the same object; beyond
polynomials, `prove_equal` and `prove_le` answer yes, no, or unknown.

Division. `//` and `%` round as in Python, and anything divided by zero is 0, in `evaluate` as in generated
code. Simplification takes divisors to be non-zero: (a*d + r) // d becomes a + r // d, whatever it would have
been at d = 0. Reshape wants that: the -1 in reshaping (n, 768) to (n, -1) is 768 for an empty batch too.

Like tract's symbolic dims this is a small algebra of its own: the simplification of a general system is too
slow to run on every shape. Only `_polynomial_gcd` calls sympy, which takes two sums of degree 2 or more.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain
from typing import Any, Literal, TypeAlias, cast
from weakref import WeakValueDictionary

_CACHE = 1 << 14  # entries per memo table: bounded, so that a long process does not leak

# -- Atoms and expressions -------------------------------------------------------------------------

_interned: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_interning = threading.Lock()


class _Interned(type):
    """Makes a class give the same object for the same fields, for as long as anyone holds that object."""

    def __call__(cls, *fields: Any) -> Any:
        key = (cls, *fields)
        if (found := _interned.get(key)) is None:
            with _interning:  # two threads that miss together must still agree on one object
                if (found := _interned.get(key)) is None:
                    found = _interned[key] = super().__call__(*fields)
        return found


class _Node(metaclass=_Interned):
    __slots__ = ("__weakref__",)
    __match_args__: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:  # copies and unpickled objects are interned like any other
        return type(self), tuple(getattr(self, field) for field in self.__match_args__)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Symbol(_Node):
    """An unknown non-negative integer. `symbol(name)` is the expression made of it."""

    name: str

    def __repr__(self) -> str:
        return self.name if _NAME.fullmatch(self.name) else "`" + self.name.replace("`", "``") + "`"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Func(_Node):
    """A function of dims that could not be simplified. Made by `//`, `%`, `dim_max`, `dim_min` alone."""

    kind: Literal["floordiv", "mod", "max", "min"]
    args: tuple[Dim, ...]

    def __repr__(self) -> str:
        match self.kind:
            case "floordiv" | "mod":
                return f" {'//' if self.kind == 'floordiv' else '%'} ".join(map(_operand, self.args))
            case _:
                return f"{self.kind}({', '.join(map(str, self.args))})"


Atom: TypeAlias = Symbol | Func
Monomial: TypeAlias = tuple[Atom, ...]
Term: TypeAlias = tuple[int, Monomial]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Expr(_Node):
    """A polynomial that is not a constant: the sum of its terms, each a coefficient times a product of atoms.

    A power is an atom repeated; the constant term, if any, has the empty monomial and comes last. Terms are
    ordered by falling degree, then by their atoms. Made by arithmetic alone, which keeps it canonical.
    """

    terms: tuple[Term, ...]

    def __repr__(self) -> str:
        return _text(self)

    def __neg__(self) -> Dim:
        return _times(-1, self)

    def __add__(self, other: Dim) -> Dim:
        return _apply(_plus, self, other)

    def __radd__(self, other: Dim) -> Dim:
        return _apply(_plus, other, self)

    def __sub__(self, other: Dim) -> Dim:
        return _apply(_minus, self, other)

    def __rsub__(self, other: Dim) -> Dim:
        return _apply(_minus, other, self)

    def __mul__(self, other: Dim) -> Dim:
        return _apply(_times, self, other)

    def __rmul__(self, other: Dim) -> Dim:
        return _apply(_times, other, self)

    def __floordiv__(self, other: Dim) -> Dim:
        return _apply(_floordiv, self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return _apply(_floordiv, other, self)

    def __mod__(self, other: Dim) -> Dim:
        return _apply(_mod, self, other)

    def __rmod__(self, other: Dim) -> Dim:
        return _apply(_mod, other, self)


Dim: TypeAlias = int | Expr


def _apply(operation: Callable[[Dim, Dim], Dim], a: Dim, b: Dim) -> Dim:
    """An operator's result for anything integral, numpy's scalars too; arrays of dims get their own turn."""
    try:
        a, b = _integral(a), _integral(b)
    except TypeError:
        return cast(Dim, NotImplemented)
    return operation(a, b)


def _integral(value: Dim) -> Dim:
    return value if isinstance(value, Expr) else int(operator.index(value))


# -- Polynomial arithmetic -------------------------------------------------------------------------


def _terms(dim: Dim) -> tuple[Term, ...]:
    match dim:
        case Expr(terms):
            return terms
        case _:
            return ((dim, ()),) if dim else ()


@lru_cache(_CACHE)
def _atom_order(atom: Atom) -> tuple[bool, str]:
    return isinstance(atom, Func), repr(atom)


@lru_cache(_CACHE)
def _order(monomial: Monomial) -> tuple[int, tuple[tuple[bool, str], ...]]:
    """Degree first, then alphabetical: an order that products preserve, which `_divide` needs."""
    return -len(monomial), tuple(map(_atom_order, monomial))


@lru_cache(_CACHE)
def _join(a: Monomial, b: Monomial) -> Monomial:
    return tuple(sorted(a + b, key=_atom_order))


def _sum(terms: Iterable[Term]) -> Dim:
    """The canonical dim with these terms: the only place where an `Expr` is made."""
    total: dict[Monomial, int] = {}
    for coefficient, monomial in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    kept = [(total[m], m) for m in (sorted(total, key=_order) if len(total) > 1 else total) if total[m]]
    if not kept or not kept[0][1]:  # the constant term sorts last: if it is first it is alone
        return kept[0][0] if kept else 0
    expr: Expr = Expr(tuple(kept))
    return expr


@lru_cache(_CACHE)
def _plus(a: Dim, b: Dim) -> Dim:
    return _sum(chain(_terms(a), _terms(b)))


@lru_cache(_CACHE)
def _times(a: Dim, b: Dim) -> Dim:
    return _sum((c * k, _join(m, n)) for c, m in _terms(a) for k, n in _terms(b))


@lru_cache(_CACHE)
def _minus(a: Dim, b: Dim) -> Dim:
    return _sum(chain(_terms(a), ((-c, m) for c, m in _terms(b))))


def _divide(a: Dim, d: Dim) -> tuple[Dim, Dim]:
    """Long division: (q, r) with a == q*d + r, where r is 0 iff d divides a.

    Division by one polynomial, in an order that products preserve, needs no computer algebra: if a == q*d,
    the leading term of a is the product of those of q and d, so that each step finds one term of q.
    """
    (lead, shape), *tail = _terms(d)
    rest = {m: c for c, m in _terms(a)}
    quotients: list[Term] = []
    remainders: list[Term] = []
    while rest:
        top = min(rest, key=_order)
        count, coefficient = Counter(top), rest.pop(top)
        count.subtract(shape)
        divides = min(count.values(), default=0) >= 0
        step, remainder = divmod(coefficient, lead) if divides else (0, coefficient)
        remainders.append((remainder, top))
        if step:
            factor = tuple(count.elements())
            quotients.append((step, factor))
            for c, m in tail:
                lower = _join(factor, m)
                rest[lower] = rest.get(lower, 0) - step * c
    return _sum(quotients), _sum(remainders)


def quotient(a: Dim, b: Dim) -> Dim | None:
    """The q with a == q*b as polynomials, or None where there is none (or b is 0)."""
    if b == 0:
        return None
    q, remainder = _divide(a, b)
    return q if remainder == 0 else None


def _content(dim: Dim) -> int:
    """The greatest number that divides all coefficients, with the sign of the leading one."""
    coefficients = [c for c, _ in _terms(dim)]
    return math.gcd(*coefficients) * (1 if coefficients[0] > 0 else -1)


@lru_cache(_CACHE)
def _common_factor(a: Dim, b: Dim) -> Dim:
    """The greatest common divisor of two non-zero polynomials, its leading coefficient positive."""
    powers = reduce(operator.and_, (Counter(m) for _, m in _terms(a) + _terms(b)))
    factor = _sum([(math.gcd(_content(a), _content(b)), _join(tuple(powers.elements()), ()))])
    a, b = _divide(a, factor)[0], _divide(b, factor)[0]
    if len(_terms(a)) == 1 or len(_terms(b)) == 1:  # only a monomial divides a monomial
        return factor
    for one, other in ((a, b), (b, a)):
        primitive = _divide(one, _content(one))[0]
        if quotient(other, primitive) is not None:
            return factor * primitive
    # What else they may share is a proper factor of both, so both have a degree of 2 at least.
    atoms = [{atom for _, m in _terms(dim) for atom in m} for dim in (a, b)]
    if min(len(_terms(a)[0][1]), len(_terms(b)[0][1])) > 1 and atoms[0] & atoms[1]:
        return factor * _polynomial_gcd(a, b)
    return factor


def _polynomial_gcd(a: Dim, b: Dim) -> Dim:
    import sympy  # costs 0.4 s, and next to no model comes here

    atoms = sorted({atom for dim in (a, b) for _, m in _terms(dim) for atom in m}, key=_atom_order)
    polys = [
        sympy.Poly({tuple(map(m.count, atoms)): c for c, m in _terms(dim)}, sympy.symbols(f"x:{len(atoms)}"))
        for dim in (a, b)
    ]
    found = _sum(
        (int(c), tuple(chain.from_iterable([atom] * n for atom, n in zip(atoms, powers, strict=True))))
        for powers, c in sympy.gcd(*polys).terms()
    )
    return found if _terms(found)[0][0] > 0 else -found


# -- Division, remainder, maximum, minimum ---------------------------------------------------------
# Each rewrites its arguments and starts again, or makes an atom of arguments that no rewrite applies to: an
# expression rebuilt from its own parts (parsed from its text, say) is therefore the same object.


@lru_cache(_CACHE)
def _floordiv(a: Dim, d: Dim) -> Dim:
    if isinstance(a, int) and isinstance(d, int):
        return a // d if d else 0
    if a == 0 or d == 0:
        return 0
    if _terms(d)[0][0] < 0:
        return _floordiv(-a, -d)
    if (factor := _common_factor(a, d)) != 1:  # 6*n // 4 -> 3*n // 2
        return _floordiv(_divide(a, factor)[0], _divide(d, factor)[0])
    whole, rest = _split(a, d)
    if whole != 0:  # (a*d + r) // d -> a + r // d
        return whole + _floordiv(rest, d)
    if (constant := _constant_quotient(a, d)) is not None:
        return constant
    for c, m in _terms(a):
        match c, m:  # (x // e + r) // d -> (x + e*r) // (e*d); where e may be 0 only without an r
            case 1, (Func("floordiv", (x, e)) as atom,) if _at_least(d, 0):
                rest = a - _lone(atom)
                if rest == 0 or _at_least(e, 1):
                    return _floordiv(x + e * rest, e * d)
    return _lone(Func("floordiv", (a, d)))


@lru_cache(_CACHE)
def _mod(a: Dim, d: Dim) -> Dim:
    if isinstance(a, int) and isinstance(d, int):
        return a % d if d else 0
    if a == 0 or d == 0:
        return 0
    if _terms(d)[0][0] < 0:
        return -_mod(-a, -d)
    if (factor := _common_factor(a, d)) != 1:  # 6*n % 4 -> 2*(3*n % 2)
        return factor * _mod(_divide(a, factor)[0], _divide(d, factor)[0])
    whole, rest = _split(a, d)
    if whole != 0:
        return _mod(rest, d)
    if (constant := _constant_quotient(a, d)) is not None:
        return a - constant * d
    for c, m in _terms(a):
        for i, atom in enumerate(m):
            match atom:  # x % e is x plus a multiple of e: where d divides e, it may as well be x
                case Func("mod", (x, e)) if e == d or (quotient(e, d) is not None and _at_least(e, 1)):
                    return _mod(a - _sum([(c, m)]) + _sum([(c, m[:i] + m[i + 1 :])]) * x, d)
    return _lone(Func("mod", (a, d)))


def _lone(atom: Atom) -> Dim:
    return _sum([(1, (atom,))])


def _split(a: Dim, d: Dim) -> tuple[Dim, Dim]:
    """`_divide`, but by a sum only if it leaves fewer terms: n // (n + k) is best left as it is."""
    whole, rest = _divide(a, d)
    return (whole, rest) if len(_terms(d)) == 1 or len(_terms(rest)) < len(_terms(a)) else (0, a)


def _constant_quotient(a: Dim, d: Dim) -> int | None:
    """The number k with k*d <= a < (k + 1)*d at all values of the symbols, as far as it can be told."""
    low = bounds(a)[0] if isinstance(d, int) else None
    guesses = (0, -1) if not isinstance(d, int) else () if low is None else (low // d,)
    return next((k for k in guesses if _at_least(a - k * d, 0) and _at_least((k + 1) * d - a, 1)), None)


def ceil_div(a: Dim, b: Dim) -> Dim:
    """a / b rounded up; 0 where b is 0."""
    return (a + (b - 1)) // b if isinstance(b, int) and b > 0 else -(_floordiv(-a, b))


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
    return kept[0] if len(kept) == 1 else _lone(Func(kind, tuple(sorted(kept, key=str))))


def _flatten(kind: str, dims: Iterable[Dim]) -> Iterator[Dim]:
    for dim in dims:
        match _terms(dim):
            case ((1, (Func(inner, args),)),) if inner == kind:
                yield from args
            case _:
                yield _integral(dim)


# -- Proofs ----------------------------------------------------------------------------------------

Interval: TypeAlias = tuple[int | None, int | None]
_RELAXATIONS = 2  # how many atoms `_lower` gives up in a row: max(n, m) - min(n, k) takes two


@lru_cache(_CACHE)
def bounds(dim: Dim) -> Interval:
    """(low, high) with low <= dim <= high at all values of the symbols; None where no bound was found."""
    if isinstance(dim, int):
        return dim, dim
    high = _lower(-dim, _RELAXATIONS)
    return _lower(dim, _RELAXATIONS), None if high is None else -high


def _at_least(dim: Dim, least: int) -> bool:
    if isinstance(dim, int):
        return dim >= least
    low = _lower(dim, _RELAXATIONS)
    return low is not None and low >= least


@lru_cache(_CACHE)
def _lower(dim: Dim, depth: int) -> int | None:
    """A lower bound: the sum of the terms' own; failing that, one where an argument stands for a function.

    n - n // 2 has no bound term by term, but n // 2 is at most n / 2, so twice the whole is at least n.
    """
    ends = [c * end if (end := _span(m)[c < 0]) is not None else None for c, m in _terms(dim)]
    if None not in ends:
        return sum(end for end in ends if end is not None)
    found: list[int] = []
    for c, m in _terms(dim) if depth else ():
        for i, atom in enumerate(m):
            others = m[:i] + m[i + 1 :]
            if isinstance(atom, Func) and (sign := _span(others)[0]) is not None and sign >= 0:
                for value, divisor in _relaxed(atom, "below" if c > 0 else "above"):
                    rest = divisor * (dim - _sum([(c, m)])) + _sum([(c, others)]) * value
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
        case "above", Func("floordiv", (x, d)) if _at_least(d, 0) and _at_least(x, 0):
            return [(x, 1)]
        case "above", Func("mod", (x, d)) if _at_least(d, 0):
            return [(d - 1 if _at_least(d, 1) else d, 1), *([(x, 1)] if _at_least(x, 0) else [])]
    return ()


@lru_cache(_CACHE)
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
        case Func("floordiv", (x, d)) if _at_least(d, 0):  # between x and 0, both included
            low, high = bounds(x)
            return None if low is None else min(low, 0), None if high is None else max(high, 0)
        case Func("mod", (x, d)) if _at_least(d, 0):
            (low, high), (_, limit) = bounds(x), bounds(d)
            tops = [] if limit is None else [max(limit - 1, 0)]
            if high is not None and low is not None and low >= 0:
                tops.append(high)
            return 0, min(tops, default=None)
    return None, None


def prove_le(a: Dim, b: Dim) -> bool | None:
    """True: a <= b at all values of the symbols. False: a > b at all. None: depends, or unknown."""
    low, high = bounds(_minus(b, a))
    if low is not None and low >= 0:
        return True
    return False if high is not None and high < 0 else None


@lru_cache(_CACHE)
def prove_equal(a: Dim, b: Dim) -> bool | None:
    """True: equal at all values of the symbols. False: different at all. None: depends, or unknown."""
    for difference in (_minus(a, b), _without_mod(_minus(a, b))):
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
    for c, monomial in _terms(dim):
        term: Dim = c
        for atom in monomial:
            match atom:
                case Func("mod", (x, d)) if _at_least(d, 1):
                    term = term * (x - d * _floordiv(x, d))
                case _:
                    term = term * _lone(atom)
        total = total + term
    return total


# -- Symbols and values ----------------------------------------------------------------------------


def symbol(name: str) -> Expr:
    """The dim of that name: any integer from 0 on."""
    expr: Expr = Expr(((1, (Symbol(name),)),))
    return expr


def product(dims: Iterable[Dim]) -> Dim:
    """The product of the dims: the number of elements of a tensor of that shape. 1 for none."""
    result: Dim = 1
    for dim in dims:
        result = _times(result, _integral(dim))
    return result


@lru_cache(_CACHE)
def symbols(dim: Dim) -> frozenset[str]:
    """The names of all symbols in the dim."""
    names: set[str] = set()
    for atom in chain.from_iterable(m for _, m in _terms(dim)):
        match atom:
            case Symbol(name):
                names.add(name)
            case Func(_, args):
                names.update(*map(symbols, args))
    return frozenset(names)


def lone(dim: Dim) -> str | None:
    """The name of the symbol that the dim is, if it is one and nothing more."""
    match dim:
        case Expr(((1, (Symbol(name),)),)):
            return name
    return None


def substitute(dim: Dim, mapping: Mapping[str, Dim]) -> Dim:
    """The dim with all mapped symbols replaced at once (their replacements are not looked into again)."""
    if symbols(dim).isdisjoint(mapping):
        return dim
    total: Dim = 0
    for c, monomial in _terms(dim):
        total = total + product([c, *(_substitute_atom(atom, mapping) for atom in monomial)])
    return total


def _substitute_atom(atom: Atom, mapping: Mapping[str, Dim]) -> Dim:
    match atom:
        case Symbol(name):
            return mapping.get(name, _lone(atom))
        case Func(kind, args):
            return _FUNCTIONS[kind](*(substitute(arg, mapping) for arg in args))


_FUNCTIONS: dict[str, Callable[..., Dim]] = {
    "floordiv": _floordiv,
    "mod": _mod,
    "max": dim_max,
    "min": dim_min,
}


def evaluate(dim: Dim, env: Mapping[str, int]) -> int:
    """The value of the dim with the symbols' values in `env`; a KeyError names a symbol that is missing."""
    return _compiled(dim)(env) if isinstance(dim, Expr) else dim


@lru_cache(_CACHE)
def _compiled(expr: Expr) -> Callable[[Mapping[str, int]], int]:
    """The dim as Python bytecode: `evaluate` is on the path of every inference, and walking terms is slow."""
    names = {
        "floordiv": lambda x, d: x // d if d else 0,
        "mod": lambda x, d: x % d if d else 0,
        "max": max,
        "min": min,
    }
    function: Callable[[Mapping[str, int]], int] = eval(f"lambda env: {_source(expr)}", names)
    return function


def _source(dim: Dim) -> str:
    def factor(atom: Atom) -> str:
        match atom:
            case Symbol(name):
                return f"env[{name!r}]"
            case Func(kind, args):
                return f"{kind}({', '.join(map(_source, args))})"

    return " + ".join("*".join([str(c), *map(factor, m)]) for c, m in _terms(dim)) or "0"


# -- Text ------------------------------------------------------------------------------------------

_NAME = re.compile(r"[^\W\d](?:[\w.:]*\w)?")  # what is printed as it is: other names go between backticks
_QUOTED_OR_NAME = re.compile(rf"`((?:[^`]|``)*)`|{_NAME.pattern}")
_ARITHMETIC = re.compile(r"[\w\s+\-*/%(),]*", re.ASCII)


@lru_cache(_CACHE)
def _text(expr: Expr) -> str:
    if len(expr.terms) == 1 and expr.terms[0][0] == 1 and len(expr.terms[0][1]) == 1:
        return repr(expr.terms[0][1][0])
    parts = []
    for c, monomial in expr.terms:
        factors = [_operand(_lone(atom)) for atom in monomial]
        digits = [str(abs(c))] if abs(c) != 1 or not monomial else []
        parts += ["-" if c < 0 else "+", "*".join(digits + factors)]
    return ("-" if parts[0] == "-" else "") + " ".join(parts[1:])


def _operand(dim: Dim) -> str:
    """The text of a dim as a part of a larger text: in parentheses unless it is one word."""
    match _terms(dim):
        case () | ((_, ()),) if isinstance(dim, int) and dim >= 0:
            return str(dim)
        case ((1, (Symbol() | Func("max" | "min"),)),):
            return str(dim)
    return f"({dim})"


def parse(text: str) -> Dim:
    """The dim that a text means: what `str` prints, and what ONNX files hold as `dim_param`.

    `batch`, `past+seq`, `2*n + 1`, `n // 2`, `n**2`, `max(a, b)`, and sympy's `floor(n/2 - 1/2)`,
    `ceiling(n/2)`, `Max(a, b)`, `Mod(n, 2)`. Names may hold dots and colons (`p2o.DynamicDimension.0`), and
    any character between backticks (a backtick itself doubled). A text that is no such expression is, as a
    whole, the name of a symbol: all that ONNX says of these strings is that equal ones are equal extents.
    """
    names: list[str] = []

    def placeholder(match: re.Match[str]) -> str:
        quoted: str | None = match[1]
        names.append(match[0] if quoted is None else quoted.replace("``", "`"))
        return f" _{len(names) - 1} "

    # With the names out of the way our grammar is a part of Python's, and the characters say which part.
    plain = _QUOTED_OR_NAME.sub(placeholder, text).strip()
    try:
        if not _ARITHMETIC.fullmatch(plain):
            return symbol(text)
        return _whole(_fraction(ast.parse(plain, mode="eval").body, names))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return symbol(text)


def _fraction(node: ast.expr, names: Sequence[str]) -> tuple[Dim, Dim]:
    """The value of a syntax tree as (numerator, denominator), for sympy's n // 2 is floor(n/2)."""
    match node:
        case ast.Constant(int(value)):
            return value, 1
        case ast.Name(name):
            return symbol(names[int(name[1:])]), 1
        case ast.UnaryOp(ast.USub(), operand):
            a, b = _fraction(operand, names)
            return -a, b
        case ast.BinOp(left, ast.Pow(), ast.Constant(int(exponent))) if exponent <= 16:
            a, b = _fraction(left, names)
            return product([a] * exponent), product([b] * exponent)
        case ast.BinOp(left, op, right):
            (a, b), (c, d) = _fraction(left, names), _fraction(right, names)
            match op:
                case ast.Add():
                    return a * d + c * b, b * d
                case ast.Sub():
                    return a * d - c * b, b * d
                case ast.Mult():
                    return a * c, b * d
                case ast.Div() if c != 0:
                    return a * d, b * c
                case ast.FloorDiv():
                    return _floordiv(a * d, b * c), 1
                case ast.Mod():
                    return _mod(_whole((a, b)), _whole((c, d))), 1
        case ast.Call(ast.Name(function), args, []):
            values = [_fraction(arg, names) for arg in args]
            match names[int(function[1:])].lower(), values:
                case "floor", [(a, b)]:
                    return _floordiv(a, b), 1
                case "ceil" | "ceiling", [(a, b)]:
                    return ceil_div(a, b), 1
                case "floordiv" | "mod" | "max" | "min" as kind, _:
                    return _FUNCTIONS[kind](*map(_whole, values)), 1
    raise ValueError("not an expression over dims")


def _whole(fraction: tuple[Dim, Dim]) -> Dim:
    if (value := quotient(*fraction)) is None:
        raise ValueError("not a whole number")
    return value


# -- Shapes ----------------------------------------------------------------------------------------

Segment: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def factor_segments(a: Sequence[Dim], b: Sequence[Dim]) -> list[Segment] | None:
    """Cut two shapes into the most segments (axes of a, axes of b), in order, of provably equal products.

    A reshape from a to b then only splits and merges axes within segments: (batch, seq, 768) to
    (batch, seq, 12, 64) gives [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]. Each axis is in one segment.
    An axis of extent 1 inside a larger segment belongs to it; elsewhere it is a segment whose other side is
    empty, even beside a 1 of the other shape (that of a comes first). No other segment has an empty side.
    None if the whole shapes are not proved to have the same number of elements.
    """
    found = _segments(tuple(map(_integral, a)), tuple(map(_integral, b)))
    return None if found is None else list(found)


@lru_cache(_CACHE)
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
