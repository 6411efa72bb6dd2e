"""Expressions, canonical and interned: polynomials with integer coefficients over atoms, and their arithmetic.

An expression is kept expanded, its like terms collected and sorted, and there is one object per value, so that
equality is identity and hashing is free. Sums, differences and products keep it so by themselves. Simplifying a
quotient, a remainder or an extreme takes proofs, which are made of these: `FUNCTIONS` is where they are found.
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, TypeAlias, cast
from weakref import WeakValueDictionary

CACHE = 1 << 14
"""Entries per memo table: bounded, so that a long process does not leak."""

NAME = re.compile(r"[^\W\d](?:[\w.:]*\w)?")
"""Names that are printed as they are; others go between backticks."""

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
        return self.name if NAME.fullmatch(self.name) else "`" + self.name.replace("`", "``") + "`"


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

FUNCTIONS: dict[str, Callable[..., Dim]] = {}
"""What makes a dim of each kind of `Func` and its arguments; `stitch.dims.functions` fills it in."""


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
        return times(-1, self)

    def __add__(self, other: Dim) -> Dim:
        return _apply(plus, self, other)

    def __radd__(self, other: Dim) -> Dim:
        return _apply(plus, other, self)

    def __sub__(self, other: Dim) -> Dim:
        return _apply(minus, self, other)

    def __rsub__(self, other: Dim) -> Dim:
        return _apply(minus, other, self)

    def __mul__(self, other: Dim) -> Dim:
        return _apply(times, self, other)

    def __rmul__(self, other: Dim) -> Dim:
        return _apply(times, other, self)

    def __floordiv__(self, other: Dim) -> Dim:
        return _apply(FUNCTIONS["floordiv"], self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return _apply(FUNCTIONS["floordiv"], other, self)

    def __mod__(self, other: Dim) -> Dim:
        return _apply(FUNCTIONS["mod"], self, other)

    def __rmod__(self, other: Dim) -> Dim:
        return _apply(FUNCTIONS["mod"], other, self)


Dim: TypeAlias = int | Expr


def _apply(operation: Callable[[Dim, Dim], Dim], a: Dim, b: Dim) -> Dim:
    """An operator's result for anything integral, numpy's scalars too; arrays of dims get their own turn."""
    try:
        a, b = integral(a), integral(b)
    except TypeError:
        return cast(Dim, NotImplemented)
    return operation(a, b)


def integral(value: Dim) -> Dim:
    """The dim that any integral number is; TypeError for what is none."""
    return value if isinstance(value, Expr) else int(operator.index(value))


def symbol(name: str) -> Expr:
    """The dim of that name: any integer from 0 on."""
    expr: Expr = Expr(((1, (Symbol(name),)),))
    return expr


# -- Arithmetic ------------------------------------------------------------------------------------


def terms_of(dim: Dim) -> tuple[Term, ...]:
    """The terms of a dim, a constant's too: none of 0."""
    match dim:
        case Expr(terms):
            return terms
        case _:
            return ((dim, ()),) if dim else ()


@lru_cache(CACHE)
def atom_order(atom: Atom) -> tuple[bool, str]:
    return isinstance(atom, Func), repr(atom)


@lru_cache(CACHE)
def order(monomial: Monomial) -> tuple[int, tuple[tuple[bool, str], ...]]:
    """Degree first, then alphabetical: an order that products preserve, which `divide` needs."""
    return -len(monomial), tuple(map(atom_order, monomial))


@lru_cache(CACHE)
def join(a: Monomial, b: Monomial) -> Monomial:
    """The product of two monomials."""
    return tuple(sorted(a + b, key=atom_order))


def sum_of(terms: Iterable[Term]) -> Dim:
    """The canonical dim with these terms: the only place where an `Expr` is made."""
    total: dict[Monomial, int] = {}
    for coefficient, monomial in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    kept = [(total[m], m) for m in (sorted(total, key=order) if len(total) > 1 else total) if total[m]]
    if not kept or not kept[0][1]:  # the constant term sorts last: if it is first it is alone
        return kept[0][0] if kept else 0
    expr: Expr = Expr(tuple(kept))
    return expr


@lru_cache(CACHE)
def plus(a: Dim, b: Dim) -> Dim:
    return sum_of(chain(terms_of(a), terms_of(b)))


@lru_cache(CACHE)
def times(a: Dim, b: Dim) -> Dim:
    return sum_of((c * k, join(m, n)) for c, m in terms_of(a) for k, n in terms_of(b))


@lru_cache(CACHE)
def minus(a: Dim, b: Dim) -> Dim:
    return sum_of(chain(terms_of(a), ((-c, m) for c, m in terms_of(b))))


def dim_of(atom: Atom) -> Dim:
    """The dim that is this atom and nothing more."""
    return sum_of([(1, (atom,))])


def product(dims: Iterable[Dim]) -> Dim:
    """The product of the dims: the number of elements of a tensor of that shape. 1 for none."""
    result: Dim = 1
    for dim in dims:
        result = times(result, integral(dim))
    return result


# -- Text ------------------------------------------------------------------------------------------


@lru_cache(CACHE)
def _text(expr: Expr) -> str:
    if len(expr.terms) == 1 and expr.terms[0][0] == 1 and len(expr.terms[0][1]) == 1:
        return repr(expr.terms[0][1][0])
    parts = []
    for c, monomial in expr.terms:
        factors = [_operand(dim_of(atom)) for atom in monomial]
        digits = [str(abs(c))] if abs(c) != 1 or not monomial else []
        parts += ["-" if c < 0 else "+", "*".join(digits + factors)]
    return ("-" if parts[0] == "-" else "") + " ".join(parts[1:])


def _operand(dim: Dim) -> str:
    """The text of a dim as a part of a larger text: in parentheses unless it is one word."""
    match terms_of(dim):
        case () | ((_, ()),) if isinstance(dim, int) and dim >= 0:
            return str(dim)
        case ((1, (Symbol() | Func("max" | "min"),)),):
            return str(dim)
    return f"({dim})"
