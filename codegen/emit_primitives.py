"""Elementwise primitives as instructions: one table, by name and kind of number.

The meaning is numpy's, as `stitch.ops.primitives` states it: integer division by zero is 0 and nothing traps, shifts
by the width or more give 0 or the sign, min and max pass NaN on, float to integer saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stitch import dtypes
from stitch.codegen import mathlib
from stitch.codegen.emit_values import MathBuilder, Operations, Value, literal
from stitch.dtypes import BOOL, FLOAT64, INT32

Rule = Callable[..., Value]


def apply(o: Operations, prim: str, args: Sequence[Value], dtype: np.dtype) -> Value:
    """The value of a primitive. `dtype` is the result's, which only casts need."""
    match prim:
        case "cast":
            return cast(o, args[0], dtype)
        case "bitcast":
            return _bitcast(o, args[0], dtype)
        case "where":
            return o.select(*args)
    kind = _kind(args[-1].dtype)
    rule = TABLE.get((prim, kind))
    if rule is None:
        raise NotImplementedError(f"{prim} of {args[-1].dtype}")
    value: Value = rule(o, *args)
    return value


def _kind(dtype: np.dtype) -> str:
    if dtype == BOOL:
        return "bool"
    if dtypes.is_float(dtype):
        return "float"
    return "signed" if dtypes.is_signed(dtype) else "unsigned"


# ------------------------------------------------------------------ casts


def cast(o: Operations, x: Value, to: np.dtype) -> Value:
    source = x.dtype
    match _kind(source), _kind(to):
        case a, b if a == b and source.itemsize == to.itemsize:
            return x
        case "float", "float":
            return o.convert("fpext" if to.itemsize > source.itemsize else "fptrunc", x, to)
        case kind, "bool":
            return o.compare("une" if kind == "float" else "ne", x, literal(0, source))
        case "float", kind:
            return _float_to_integer(o, x, to, kind == "signed")
        case kind, "float":
            return o.convert("sitofp" if kind == "signed" else "uitofp", x, to)
        case kind, _:
            if to.itemsize < source.itemsize:
                return o.convert("trunc", x, to)
            return o.convert("sext" if kind == "signed" else "zext", x, to)


def _float_to_integer(o: Operations, x: Value, to: np.dtype, signed: bool) -> Value:
    if to.itemsize >= 4:
        name = "fptosi.sat" if signed else "fptoui.sat"
        size = f"v{o.width}" if x.varying else ""
        bits = 8 * x.dtype.itemsize
        return o.intrinsic(name, to, x, mangled=f".{size}i{8 * to.itemsize}.{size}f{bits}")
    low, high = literal(dtypes.lowest(to), x.dtype), literal(dtypes.highest(to), x.dtype)
    number = o.select(o.compare("ord", x, x), x, literal(0, x.dtype))
    number = o.select(o.compare("olt", number, low), low, number)
    number = o.select(o.compare("ogt", number, high), high, number)
    return o.convert("trunc", o.convert("fptosi", number, INT32), to)


def _bitcast(o: Operations, x: Value, to: np.dtype) -> Value:
    if x.dtype.itemsize != to.itemsize or BOOL in (x.dtype, to):
        raise NotImplementedError(f"bitcast of {x.dtype} to {to}")
    return o.convert("bitcast", x, to)


# ------------------------------------------------------------------ integers


def _nonzero(o: Operations, b: Value, signed: bool) -> tuple[Value, Value, Value]:
    """A divisor that cannot trap (1 for 0, and for -1, by which the smallest number overflows), and where it was."""
    zero = o.compare("eq", b, literal(0, b.dtype))
    minus = o.compare("eq", b, literal(-1, b.dtype)) if signed else literal(False, BOOL)
    trap = o.binary("or", zero, minus) if signed else zero
    return o.select(trap, literal(1, b.dtype), b), zero, minus


def _signed_div(o: Operations, a: Value, b: Value) -> Value:
    safe, zero, minus = _nonzero(o, b, True)
    q = o.select(minus, _negate(o, a), o.binary("sdiv", a, safe))
    return o.select(zero, literal(0, a.dtype), q)


def _unsigned_div(o: Operations, a: Value, b: Value) -> Value:
    safe, zero, _ = _nonzero(o, b, False)
    return o.select(zero, literal(0, a.dtype), o.binary("udiv", a, safe))


def _signed_rem(o: Operations, a: Value, b: Value) -> Value:
    return o.binary("srem", a, _nonzero(o, b, True)[0])


def _unsigned_rem(o: Operations, a: Value, b: Value) -> Value:
    return o.binary("urem", a, _nonzero(o, b, False)[0])


def _signed_mod(o: Operations, a: Value, b: Value) -> Value:
    r = _signed_rem(o, a, b)
    zero = literal(0, a.dtype)
    other_sign = o.compare("slt", o.binary("xor", r, b), zero)
    return o.select(o.binary("and", other_sign, o.compare("ne", r, zero)), o.binary("add", r, b), r)


def _negate(o: Operations, a: Value) -> Value:
    return o.binary("sub", literal(0, a.dtype), a)


def _integer_sign(o: Operations, a: Value) -> Value:
    zero = literal(0, a.dtype)
    up = o.convert("zext", o.compare("sgt" if dtypes.is_signed(a.dtype) else "ugt", a, zero), a.dtype)
    if not dtypes.is_signed(a.dtype):
        return up
    return o.binary("sub", up, o.convert("zext", o.compare("slt", a, zero), a.dtype))


def _shift(op: str) -> Rule:
    def shift(o: Operations, a: Value, n: Value) -> Value:
        bits, zero = literal(8 * a.dtype.itemsize, a.dtype), literal(0, a.dtype)
        inside = o.compare("ult", n, bits)
        if op == "ashr":  # of which the sign remains
            return o.binary(op, a, o.select(inside, n, literal(8 * a.dtype.itemsize - 1, a.dtype)))
        return o.select(inside, o.binary(op, a, o.select(inside, n, zero)), zero)

    return shift


def _integer_pow(o: Operations, a: Value, b: Value) -> Value:
    return cast(o, o.libm("pow", cast(o, a, FLOAT64), cast(o, b, FLOAT64)), a.dtype)


# ------------------------------------------------------------------ floats


def is_literal(v: Value) -> bool:
    return not v.varying and v.parts[0][0] != "%"


def _extreme(predicate: str) -> Rule:
    """b if it is beyond a, or NaN; else a. x86's own instruction gives a if one is NaN."""

    def extreme(o: Operations, a: Value, b: Value) -> Value:
        value = o.select(o.compare(predicate, b, a), b, a)
        return value if is_literal(b) else o.select(o.compare("uno", b, b), b, value)

    return extreme


def _float_sign(o: Operations, x: Value) -> Value:
    zero = literal(0, x.dtype)
    same = o.select(o.compare("oeq", x, zero), zero, x)  # 0 for -0; NaN stays
    down = o.select(o.compare("olt", x, zero), literal(-1, x.dtype), same)
    return o.select(o.compare("ogt", x, zero), literal(1, x.dtype), down)


def _fmod(o: Operations, a: Value, b: Value) -> Value:
    """Through float64, where the remainder of two float32 is exact."""
    if a.dtype == FLOAT64:
        return o.libm("fmod", a, b)
    return o.convert("fptrunc", o.libm("fmod", cast(o, a, FLOAT64), cast(o, b, FLOAT64)), a.dtype)


def _float_mod(o: Operations, a: Value, b: Value) -> Value:
    r = _fmod(o, a, b)
    zero = literal(0, a.dtype)
    other = o.binary("xor", o.compare("olt", b, zero), o.compare("olt", r, zero))
    shifted = o.select(other, o.binary("fadd", r, b), r)
    none = o.intrinsic("copysign", a.dtype, zero, b)
    value = o.select(o.compare("oeq", r, zero), none, shifted)
    return o.select(o.compare("oeq", b, zero), r, value)


def _instruction(op: str) -> Rule:
    return lambda o, a, b: o.binary(op, a, b)


def _comparison(op: str) -> Rule:
    return lambda o, a, b: o.compare(op, a, b)


def _rounding(name: str) -> Rule:
    return lambda o, x: o.intrinsic(name, x.dtype, x)


def _pair(name: str) -> Rule:
    return lambda o, a, b: o.intrinsic(name, a.dtype, a, b)


def _same(o: Operations, x: Value) -> Value:
    return x


def _not(o: Operations, x: Value) -> Value:
    return o.binary("xor", x, literal(True if x.dtype == BOOL else -1, x.dtype))


# ------------------------------------------------------------------ transcendental functions


def _from_library(name: str) -> Rule:
    build = mathlib.FUNCTIONS[name].build

    def rule(o: Operations, *args: Value) -> Value:
        if args[0].dtype == FLOAT64:
            return DOUBLES[name](o, *args) if name in DOUBLES else o.libm(name, *args)
        result: Value = build(MathBuilder(o), *args)
        return result

    return rule


def _double_sigmoid(o: Operations, x: Value) -> Value:
    one = literal(1, x.dtype)
    return o.binary("fdiv", one, o.binary("fadd", one, o.libm("exp", o.unary("fneg", x))))


def _double_rsqrt(o: Operations, x: Value) -> Value:
    return o.binary("fdiv", literal(1, x.dtype), o.intrinsic("sqrt", x.dtype, x))


DOUBLES: dict[str, Rule] = {
    "sigmoid": _double_sigmoid,
    "rsqrt": _double_rsqrt,
    "sqrt": lambda o, x: o.intrinsic("sqrt", x.dtype, x),
}
FROM_LIBRARY = (
    "sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh",
    "asinh", "acosh", "atanh", "tanh", "erf", "sigmoid", "pow",
)  # fmt: skip

# ------------------------------------------------------------------ the table

ROWS: dict[str, dict[str, Rule]] = {
    "neg": {"float": lambda o, x: o.unary("fneg", x), "signed": _negate, "unsigned": _negate},
    "abs": {
        "float": _rounding("fabs"),
        "signed": lambda o, x: o.intrinsic("abs", x.dtype, x, extra="i1 false"),
        "unsigned": _same,
        "bool": _same,
    },
    "floor": {"float": _rounding("floor"), "signed": _same, "unsigned": _same, "bool": _same},
    "ceil": {"float": _rounding("ceil"), "signed": _same, "unsigned": _same, "bool": _same},
    "rint": {"float": _rounding("rint"), "signed": _same, "unsigned": _same, "bool": _same},
    "sign": {"float": _float_sign, "signed": _integer_sign, "unsigned": _integer_sign},
    "not": {"signed": _not, "unsigned": _not, "bool": _not},
    "add": {
        "float": _instruction("fadd"),
        "signed": _instruction("add"),
        "unsigned": _instruction("add"),
        "bool": _instruction("or"),
    },
    "sub": {"float": _instruction("fsub"), "signed": _instruction("sub"), "unsigned": _instruction("sub")},
    "mul": {
        "float": _instruction("fmul"),
        "signed": _instruction("mul"),
        "unsigned": _instruction("mul"),
        "bool": _instruction("and"),
    },
    "div": {"float": _instruction("fdiv"), "signed": _signed_div, "unsigned": _unsigned_div},
    "mod": {"float": _float_mod, "signed": _signed_mod, "unsigned": _unsigned_rem},
    "fmod": {"float": _fmod, "signed": _signed_rem, "unsigned": _unsigned_rem},
    "pow": {"signed": _integer_pow, "unsigned": _integer_pow},
    "min": {
        "float": _extreme("olt"),
        "signed": _pair("smin"),
        "unsigned": _pair("umin"),
        "bool": _instruction("and"),
    },
    "max": {"float": _extreme("ogt"), "signed": _pair("smax"), "unsigned": _pair("umax"), "bool": _instruction("or")},
    "and": dict.fromkeys(("signed", "unsigned", "bool"), _instruction("and")),
    "or": dict.fromkeys(("signed", "unsigned", "bool"), _instruction("or")),
    "xor": dict.fromkeys(("signed", "unsigned", "bool"), _instruction("xor")),
    "shl": dict.fromkeys(("signed", "unsigned"), _shift("shl")),
    "shr": {"signed": _shift("ashr"), "unsigned": _shift("lshr")},
    "eq": {"float": _comparison("oeq"), **dict.fromkeys(("signed", "unsigned", "bool"), _comparison("eq"))},
    "ne": {"float": _comparison("une"), **dict.fromkeys(("signed", "unsigned", "bool"), _comparison("ne"))},
    "lt": {
        "float": _comparison("olt"),
        "signed": _comparison("slt"),
        "unsigned": _comparison("ult"),
        "bool": _comparison("ult"),
    },
    "le": {
        "float": _comparison("ole"),
        "signed": _comparison("sle"),
        "unsigned": _comparison("ule"),
        "bool": _comparison("ule"),
    },
}
TABLE: dict[tuple[str, str], Any] = {(prim, kind): rule for prim, row in ROWS.items() for kind, rule in row.items()}
TABLE |= {(name, "float"): _from_library(name) for name in FROM_LIBRARY}
