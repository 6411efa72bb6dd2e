"""Symbolic dimensions: the extents of tensors whose shapes hold symbols rather than numbers.

A `Dim` is an int, or an `Expr`: a polynomial with integer coefficients over *atoms*. An atom is a `Symbol`
(an unknown non-negative integer: tensors of extent zero are legal, so nothing here may take a symbol to be
positive) or a `Func` of other dims that polynomials cannot express. Constants are always ints.

Every expression is canonical and interned, so that equality is identity and hashing is free. Equal polynomials are
the same object; beyond polynomials, `prove_equal` and `prove_le` answer yes, no, or unknown.

Division. `//` and `%` round as in Python, and anything divided by zero is 0, in `evaluate` as in generated
code. Simplification takes divisors to be non-zero: (a*d + r) // d becomes a + r // d, whatever it would have
been at d = 0. Reshape wants that: the -1 in reshaping (n, 768) to (n, -1) is 768 for an empty batch too.

Like tract's symbolic dims this is a small algebra of its own: the simplification of a general system is too
slow to run on every shape.
"""

from stitch.dims.equality import Segment, factor_segments, prove_equal
from stitch.dims.evaluation import evaluate, lone, substitute, symbols
from stitch.dims.expressions import Atom, Dim, Expr, Func, Monomial, Symbol, Term, product, symbol
from stitch.dims.factors import quotient
from stitch.dims.functions import ceil_div, dim_max, dim_min
from stitch.dims.intervals import Interval, bounds, prove_le
from stitch.dims.parsing import parse

__all__ = [
    "Atom",
    "Dim",
    "Expr",
    "Func",
    "Interval",
    "Monomial",
    "Segment",
    "Symbol",
    "Term",
    "bounds",
    "ceil_div",
    "dim_max",
    "dim_min",
    "evaluate",
    "factor_segments",
    "lone",
    "parse",
    "product",
    "prove_equal",
    "prove_le",
    "quotient",
    "substitute",
    "symbol",
    "symbols",
]
