"""Dims and symbols in emitted code, evaluated once at the entry of a function."""

from __future__ import annotations

from collections.abc import Mapping

from stitch import dims
from stitch.codegen.emit_code import Writer
from stitch.dims import Dim, Expr, Func, Symbol


class Dims:
    """Emits the values of dims; `symbols` are the names under which the symbols' values are known."""

    def __init__(self, writer: Writer, symbols: Mapping[str, str]) -> None:
        self.w = writer
        self.symbols = symbols

    def value(self, dim: Dim) -> str:
        """An i64, literal if the dim is a number."""
        return self._sum(dim) if isinstance(dim, Expr) else str(dim)

    def _sum(self, dim: Expr) -> str:
        total = ""
        for coefficient, atoms in dim.terms:
            product = "" if coefficient == 1 and atoms else str(coefficient)
            for atom in atoms:
                product = self.mul(product, self._atom(atom)) if product else self._atom(atom)
            total = self.add(total, product) if total else product
        return total

    def add(self, a: str, b: str) -> str:
        if a == "0" or b == "0":
            return b if a == "0" else a
        return self.w.pure(f"add nsw i64 {a}, {b}", a, b)

    def mul(self, a: str, b: str) -> str:
        if a == "1" or b == "1":
            return b if a == "1" else a
        return self.w.pure(f"mul nsw i64 {a}, {b}", a, b)

    def _atom(self, atom: dims.Atom) -> str:
        match atom:
            case Symbol(name):
                return self.symbols[name]
            case Func("floordiv", (a, d)):
                return self._quotient(a, d)
            case Func("mod", (a, d)):
                return self._remainder(a, d)
            case Func(kind, args):
                first, *rest = (self.value(a) for a in args)
                for other in rest:
                    c = self.w.pure(f"icmp {'sgt' if kind == 'max' else 'slt'} i64 {first}, {other}", first, other)
                    first = self.select(c, first, other)
                return first

    def select(self, c: str, a: str, b: str) -> str:
        return self.w.pure(f"select i1 {c}, i64 {a}, i64 {b}", c, a, b)

    # Quotients are rounded down, and both are 0 where the divisor is, as `dims.evaluate` has them. A machine divides
    # otherwise, so what is known of the signs saves most of the instructions.

    def _quotient(self, a: Dim, d: Dim) -> str:
        low, high = dims.bounds(a)
        if isinstance(d, int) and _is_power(d):
            x = self.value(a)
            return self.w.pure(f"ashr i64 {x}, {d.bit_length() - 1}", x)
        if _is_positive(d) and low is not None and low >= 0:
            return self._unsigned("udiv", a, d)
        if _is_positive(d) and high is not None and high <= 0:  # minus the quotient of -a, rounded up
            q = self._unsigned("udiv", d - a - 1, d)
            return self.w.pure(f"sub nsw i64 0, {q}", q)
        return self._divided(self.value(a), self.value(d))[0]

    def _remainder(self, a: Dim, d: Dim) -> str:
        low, _ = dims.bounds(a)
        if isinstance(d, int) and _is_power(d):
            x = self.value(a)
            return self.w.pure(f"and i64 {x}, {d - 1}", x)
        if _is_positive(d) and low is not None and low >= 0:
            return self._unsigned("urem", a, d)
        return self._divided(self.value(a), self.value(d))[1]

    def _unsigned(self, op: str, a: Dim, d: Dim) -> str:
        x, y = self.value(a), self.value(d)
        return self.w.pure(f"{op} i64 {x}, {y}", x, y)

    def _divided(self, a: str, d: str) -> tuple[str, str]:
        """Quotient and remainder whatever the signs."""
        pure = self.w.pure
        none = pure(f"icmp eq i64 {d}, 0", d)
        safe = self.select(none, "1", d)
        q = pure(f"sdiv i64 {a}, {safe}", a, safe)
        r = pure(f"srem i64 {a}, {safe}", a, safe)
        signs = pure(f"xor i64 {r}, {safe}", r, safe)
        differ = pure(f"icmp slt i64 {signs}, 0", signs)
        some = pure(f"icmp ne i64 {r}, 0", r)
        down = pure(f"and i1 {differ}, {some}", differ, some)
        q = self.select(down, self.add(q, "-1"), q)
        r = self.select(down, self.add(r, safe), r)
        return self.select(none, "0", q), self.select(none, "0", r)


def _is_power(number: int) -> bool:
    """Of two."""
    return number > 0 and not number & (number - 1)


def _is_positive(dim: Dim) -> bool:
    low = dims.bounds(dim)[0]
    return low is not None and low > 0


def constant_part(dim: Dim) -> tuple[Dim, int]:
    """The dim as something without a constant term, plus a number."""
    if not isinstance(dim, Expr):
        return 0, dim
    coefficient, monomial = dim.terms[-1]
    return (dim, 0) if monomial else (dim - coefficient, coefficient)
