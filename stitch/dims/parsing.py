"""Dims from texts: what `str` prints, and what ONNX files hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from stitch.dims.expressions import FUNCTIONS, NAME, Dim, product, symbol
from stitch.dims.factors import quotient
from stitch.dims.functions import ceil_div, floordiv, mod

_QUOTED_OR_NAME = re.compile(rf"`((?:[^`]|``)*)`|{NAME.pattern}")
_ARITHMETIC = re.compile(r"[\w\s+\-*/%(),]*", re.ASCII)


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
                    return floordiv(a * d, b * c), 1
                case ast.Mod():
                    return mod(_whole((a, b)), _whole((c, d))), 1
        case ast.Call(ast.Name(function), args, []):
            values = [_fraction(arg, names) for arg in args]
            match names[int(function[1:])].lower(), values:
                case "floor", [(a, b)]:
                    return floordiv(a, b), 1
                case "ceil" | "ceiling", [(a, b)]:
                    return ceil_div(a, b), 1
                case "floordiv" | "mod" | "max" | "min" as kind, _:
                    return FUNCTIONS[kind](*map(_whole, values)), 1
    raise ValueError("not an expression over dims")


def _whole(fraction: tuple[Dim, Dim]) -> Dim:
    if (value := quotient(*fraction)) is None:
        raise ValueError("not a whole number")
    return value
