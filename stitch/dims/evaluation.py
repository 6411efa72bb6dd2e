"""The symbols of a dim, and dims or numbers in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain

from stitch.dims.expressions import CACHE, FUNCTIONS, Atom, Dim, Expr, Func, Symbol, dim_of, product, terms_of


@lru_cache(CACHE)
def symbols(dim: Dim) -> frozenset[str]:
    """The names of all symbols in the dim."""
    names: set[str] = set()
    for atom in chain.from_iterable(m for _, m in terms_of(dim)):
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
    for c, monomial in terms_of(dim):
        total = total + product([c, *(_substitute_atom(atom, mapping) for atom in monomial)])
    return total


def _substitute_atom(atom: Atom, mapping: Mapping[str, Dim]) -> Dim:
    match atom:
        case Symbol(name):
            return mapping.get(name, dim_of(atom))
        case Func(kind, args):
            return FUNCTIONS[kind](*(substitute(arg, mapping) for arg in args))


def evaluate(dim: Dim, env: Mapping[str, int]) -> int:
    """The value of the dim with the symbols' values in `env`; a KeyError names a symbol that is missing."""
    return _compiled(dim)(env) if isinstance(dim, Expr) else dim


@lru_cache(CACHE)
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

    return " + ".join("*".join([str(c), *map(factor, m)]) for c, m in terms_of(dim)) or "0"
