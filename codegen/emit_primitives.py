"""Elementwise primitives as instructions: one table, by name and kind of number.

The meaning is numpy's, as `stitch.ops.primitives` states it: integer division by zero is 0 and nothing traps, shifts
by the width or more give 0 or the sign, min and max pass NaN on, float to integer saturates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stitch import dtypes
from stitch.codegen import mathlib
from stitch.codegen.emit_casts import Rule, bitcast, cast, kind_of, maximum, minimum, range_
from stitch.codegen.emit_math import MachineMath
from stitch.codegen.emit_values import Operations, Value, literal, number_of
from stitch.codegen.quotients import reciprocal
from stitch.dtypes import BOOL, FLOAT32, FLOAT64
from stitch.ranges import Range


def apply(o: Operations, prim: str, args: Sequence[Value], dtype: np.dtype) -> Value:
    """The value of a primitive. `dtype` is the result's, which only casts need."""
    value = _applied(o, prim, args, dtype)
    if value not in args:
        o.made.setdefault(value, (prim, tuple(args)))
    return value


def _applied(o: Operations, prim: str, args: Sequence[Value], dtype: np.dtype) -> Value:
    match prim:
        case "cast":
            return cast(o, args[0], dtype)
        case "bitcast":
            return bitcast(o, args[0], dtype)
        case "where":
            return o.select(*args)
    kind = kind_of(args[-1].dtype)
    rule = TABLE.get((prim, kind))
    if rule is None:
        raise NotImplementedError(f"{prim} of {args[-1].dtype}")
    value: Value = rule(o, *args)
    return value


# ------------------------------------------------------------------ integers


def _nonzero(o: Operations, b: Value, signed: bool) -> tuple[Value, Value, Value]:
    """A divisor that cannot trap (1 for 0, and for -1, by which the smallest number overflows), and where it was."""
    n = number_of(b)
    if n is not None:  # left to be folded, it would be computed outside the loop, and the divisor not known inside
        trap = n == 0 or (signed and n == -1)
        return (literal(1, b.dtype) if trap else b), literal(n == 0, BOOL), literal(signed and n == -1, BOOL)
    zero = o.compare("eq", b, literal(0, b.dtype))
    minus = o.compare("eq", b, literal(-1, b.dtype)) if signed else literal(False, BOOL)
    trap_ = o.binary("or", zero, minus) if signed else zero
    return o.select(trap_, literal(1, b.dtype), b), zero, minus


def _divided(o: Operations, a: Value, b: Value, signed: bool) -> Value:
    """a / b, truncated, for b that cannot trap. Vectors are divided as floats: no quotient of n bits is within a part
    in 2^n of an integer that it does not reach. Only a few machines divide vectors of integers."""
    size = a.dtype.itemsize
    if number_of(b) is not None or size == 8 or not (a.varying or b.varying):
        return o.binary("sdiv" if signed else "udiv", a, b)
    real = FLOAT64 if size == 4 else FLOAT32
    to, back = ("sitofp", "fptosi") if signed else ("uitofp", "fptoui")
    return o.convert(back, o.binary("fdiv", o.convert(to, a, real), o.convert(to, b, real)), a.dtype)


def _float_div(o: Operations, a: Value, b: Value) -> Value:
    divisor = number_of(b)
    parts = reciprocal(divisor) if divisor is not None and b.dtype == FLOAT32 and o.has_fma else None
    if parts is None:
        return o.binary("fdiv", a, b)
    head, rest = (literal(p, FLOAT32) for p in parts)
    return o.fma(a, head, o.binary("fmul", a, rest))


def _remainder(o: Operations, a: Value, b: Value, signed: bool) -> Value:
    safe = _nonzero(o, b, signed)[0]
    if number_of(b) is not None or a.dtype.itemsize == 8 or not (a.varying or b.varying):
        return o.binary("srem" if signed else "urem", a, safe)
    return o.binary("sub", a, o.binary("mul", _divided(o, a, safe, signed), safe))


def _chosen(o: Operations, c: Value, a: Value, b: Value) -> Value:
    n = number_of(c)
    return o.select(c, a, b) if n is None else a if n else b


def _signed_div(o: Operations, a: Value, b: Value) -> Value:
    safe, zero, minus = _nonzero(o, b, True)
    q = _chosen(o, minus, _negate(o, a), _divided(o, a, safe, True))
    return _chosen(o, zero, literal(0, a.dtype), q)


def _unsigned_div(o: Operations, a: Value, b: Value) -> Value:
    safe, zero, _ = _nonzero(o, b, False)
    return _chosen(o, zero, literal(0, a.dtype), _divided(o, a, safe, False))


def _signed_rem(o: Operations, a: Value, b: Value) -> Value:
    return _remainder(o, a, b, True)


def _unsigned_rem(o: Operations, a: Value, b: Value) -> Value:
    return _remainder(o, a, b, False)


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


def _float_sign(o: Operations, x: Value) -> Value:
    """0 for -0; NaN stays."""
    zero = literal(0, x.dtype)
    one = o.intrinsic("copysign", x.dtype, literal(1, x.dtype), x)
    return o.select(o.compare("one", x, zero), one, o.binary("fadd", x, zero))


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


def _rint(o: Operations, x: Value) -> Value:
    return o.intrinsic("rint", x.dtype, x)


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
        inside = INSIDE.get(name)
        if inside is not None and inside[0](range_(o, args[0])):
            result: Value = inside[1](MachineMath(o), args[0])
            return result
        result = build(MachineMath(o), *args)
        return result

    return rule


INSIDE: dict[str, tuple[Callable[[Range], bool], Callable[..., Any]]] = {
    "exp": (lambda r: r.high <= 90, mathlib.exp_to_90),
    "log1p": (lambda r: r.low > -1 and r.high < math.inf and not r.minus, mathlib.log1p_inside),
}
"""Functions of one argument that are less work, with the same bits, where it is known to be in some range."""


def _double_sigmoid(o: Operations, x: Value) -> Value:
    one = literal(1, x.dtype)
    return o.binary("fdiv", one, o.binary("fadd", one, o.libm("exp", o.unary("fneg", x))))


def _double_rsqrt(o: Operations, x: Value) -> Value:
    return o.binary("fdiv", literal(1, x.dtype), o.intrinsic("sqrt", x.dtype, x))


def _double_half_erf(o: Operations, x: Value) -> Value:
    half, scale = literal(0.5, x.dtype), literal(math.sqrt(0.5), x.dtype)
    return o.binary("fmul", half, o.libm("erf", o.binary("fmul", x, scale)))


DOUBLES: dict[str, Rule] = {
    "half_erf": _double_half_erf,
    "sigmoid": _double_sigmoid,
    "rsqrt": _double_rsqrt,
    "sqrt": lambda o, x: o.intrinsic("sqrt", x.dtype, x),
}
FROM_LIBRARY = (
    "sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh",
    "asinh", "acosh", "atanh", "tanh", "erf", "half_erf", "sigmoid", "pow",
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
    "rint": {"float": _rint, "signed": _same, "unsigned": _same, "bool": _same},
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
    "div": {"float": _float_div, "signed": _signed_div, "unsigned": _unsigned_div},
    "fma": {"float": lambda o, a, b, c: o.fma(a, b, c)},
    "mod": {"float": _float_mod, "signed": _signed_mod, "unsigned": _unsigned_rem},
    "fmod": {"float": _fmod, "signed": _signed_rem, "unsigned": _unsigned_rem},
    "pow": {"signed": _integer_pow, "unsigned": _integer_pow},
    "min": {
        "float": minimum,
        "signed": _pair("smin"),
        "unsigned": _pair("umin"),
        "bool": _instruction("and"),
    },
    "max": {"float": maximum, "signed": _pair("smax"), "unsigned": _pair("umax"), "bool": _instruction("or")},
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
