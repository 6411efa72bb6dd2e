"""Casts, and what a whole number is made from: as few instructions as the range of the operand allows.

Float to integer truncates and saturates, and NaN is 0. A number that was rounded before is not rounded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from stitch import dtypes
from stitch.codegen.emit_values import Operations, Value, literal, number_of
from stitch.dtypes import BOOL, FLOAT32, INT32
from stitch.ranges import Range, range_of

Rule = Callable[..., Value]


def kind_of(dtype: np.dtype) -> str:
    if dtype == BOOL:
        return "bool"
    if dtypes.is_float(dtype):
        return "float"
    return "signed" if dtypes.is_signed(dtype) else "unsigned"


def cast(o: Operations, x: Value, to: np.dtype) -> Value:
    source = x.dtype
    match kind_of(source), kind_of(to):
        case a, b if a == b and source.itemsize == to.itemsize:
            return x
        case "float", "float":
            return o.convert("fpext" if to.itemsize > source.itemsize else "fptrunc", x, to)
        case kind, "bool":
            return o.compare("une" if kind == "float" else "ne", x, literal(0, source))
        case "float", kind:
            return _float_to_integer(o, x, to, kind == "signed")
        case "bool", "float":
            return o.select(x, literal(1, to), literal(0, to))
        case kind, "float":
            return o.convert("sitofp" if kind == "signed" else "uitofp", x, to)
        case kind, _:
            if to.itemsize < source.itemsize:
                return o.convert("trunc", x, to)
            return o.convert("sext" if kind == "signed" else "zext", x, to)


def _float_to_integer(o: Operations, x: Value, to: np.dtype, signed: bool) -> Value:
    """Truncated and saturated; NaN is 0. What the range of x rules out is not asked for."""
    known = range_(o, x)
    low, high = dtypes.lowest(to), dtypes.highest(to)
    if to.itemsize >= 4:
        if known.inside(low, high) and (signed or high < 2**32 or known.high < 2**63):
            whole = o.convert("fptosi" if signed or known.high < 2**31 else "fptoui", x, to)
            return _number_or_zero(o, x, whole) if known.nan else whole
        return _saturated(o, x, to, signed)
    rounded = _rint_operand(o, x, low, high)
    if rounded is not None:
        return o.convert("trunc", _narrow_integer(o, rounded, True, known.nan), to)
    number = x
    if known.low < low:
        number = o.select(o.compare("olt", number, literal(low, x.dtype)), literal(low, x.dtype), number)
    if known.high > high:
        number = o.select(o.compare("ogt", number, literal(high, x.dtype)), literal(high, x.dtype), number)
    return o.convert("trunc", _narrow_integer(o, number, False, known.nan), to)


def _saturated(o: Operations, x: Value, to: np.dtype, signed: bool) -> Value:
    """To 32 or 64 bits. LLVM takes the lanes of a vector one by one."""
    if not x.varying or o.isa == "neon":
        return _saturating(o, "fptosi.sat" if signed else "fptoui.sat", x, to)
    low, high = literal(dtypes.lowest(to), x.dtype), literal(dtypes.highest(to), x.dtype)
    top = np.nextafter(np.asarray(dtypes.highest(to), x.dtype), np.asarray(0, x.dtype))  # of which an integer is made
    exact = int(np.asarray(dtypes.highest(to), x.dtype)) == dtypes.highest(to)
    most = high if exact else literal(float(top), x.dtype)
    number = o.select(o.compare("ogt", x, low), x, low)
    number = o.select(o.compare("olt", number, most), number, most)
    whole = o.convert("fptosi" if signed else "fptoui", number, to)
    whole = whole if exact else o.select(o.compare("oge", x, high), literal(dtypes.highest(to), to), whole)
    return _number_or_zero(o, x, whole)


def _saturating(o: Operations, name: str, x: Value, to: np.dtype) -> Value:
    size = f"v{o.width}" if x.varying else ""
    bits = 8 * x.dtype.itemsize
    return o.intrinsic(name, to, x, mangled=f".{size}i{8 * to.itemsize}.{size}f{bits}")


def _number_or_zero(o: Operations, x: Value, then: Value) -> Value:
    """`then` where x is a number; else 0. Chosen after the conversion: AVX-512 makes one instruction of the two."""
    return o.select(o.compare("ord", x, x), then, literal(0, then.dtype))


X86_TO_INTEGER = {
    16: ("x86.avx512.mask.{}ps2dq", ".512", "<16 x i32> zeroinitializer, i16 -1, i32 4"),
    8: ("x86.avx.{}.ps2dq", ".256", ""),
    4: ("x86.sse2.{}ps2dq", "", ""),
}
"""The instruction for so many lanes. It makes -2^31 of NaN, whose low bits are 0."""


def _narrow_integer(o: Operations, x: Value, nearest: bool, nan: bool) -> Value:
    """An int32, of which the low 16 bits count: x, of 24 bits, truncated or rounded half to even; and 0 for NaN."""
    known = x.varying and x.dtype == FLOAT32 and o.isa.startswith("avx") and o.width in X86_TO_INTEGER
    if known and (o.width < 16 or o.isa == "avx512") and (nan or nearest):
        name, size, rest = X86_TO_INTEGER[o.width]
        prefix, _, last = name.format("cvt" if nearest else "cvtt").rpartition(".")
        return o.intrinsic(prefix, INT32, x, mangled=f".{last}{size}", extra=rest)
    if nearest:
        x = o.intrinsic("rint", x.dtype, x)
    if nan and o.isa == "neon" and x.dtype == FLOAT32:
        return _saturating(o, "fptosi.sat", x, INT32)
    whole = o.convert("fptosi", x, INT32)
    return _number_or_zero(o, x, whole) if nan else whole


def _rint_operand(o: Operations, x: Value, low: float, high: float) -> Value | None:
    """y with x = rint(y), if x is a rounded value within these bounds: it is clamped before it is rounded, which one
    instruction then does together with the conversion."""
    clamps = []
    inner = x
    while (made := o.made.get(inner)) is not None and made[0] in ("max", "min"):
        bound = number_of(made[1][1])
        if bound is None or bound % 1 != 0:
            return None
        clamps.append((made[0], made[1][1]))
        inner = made[1][0]
    if made is not None and made[0] == "add" and number_of(made[1][1]) == 0:
        made = o.made.get(made[1][0])
    if made is None or made[0] != "rint" or x.dtype != FLOAT32 or not range_(o, x).inside(low, high):
        return None
    y = made[1][0]
    for prim, limit in reversed(clamps):
        y = (maximum if prim == "max" else minimum)(o, y, limit)
    return y


def range_(o: Operations, x: Value) -> Range:
    """What numbers a value can hold."""

    def look(v: Value) -> Any:
        n = number_of(v)
        return o.made.get(v) if n is None else n

    found = range_of(x, look)
    return replace(found, high=min(found.high, o.most.get(x, found.high)))


def bitcast(o: Operations, x: Value, to: np.dtype) -> Value:
    if x.dtype.itemsize != to.itemsize or BOOL in (x.dtype, to):
        raise NotImplementedError(f"bitcast of {x.dtype} to {to}")
    return o.convert("bitcast", x, to)


def is_literal(v: Value) -> bool:
    return not v.varying and v.parts[0][0] != "%"


def beyond(o: Operations, op: str, a: Value, b: Value) -> Value:
    """b if it is larger, or smaller, than a; else a: max or min of numbers. NaN in b is passed over."""
    return o.select(o.compare("ogt" if op == "max" else "olt", b, a), b, a)


def _extreme(predicate: str) -> Rule:
    """b if it is beyond a, or NaN; else a. x86's own instruction gives a if one is NaN."""

    def extreme(o: Operations, a: Value, b: Value) -> Value:
        if is_literal(a) and number_of(a) == number_of(a):
            return o.select(o.compare(predicate.replace("o", "u", 1), b, a), b, a)
        value = o.select(o.compare(predicate, b, a), b, a)
        if is_literal(b) and number_of(b) == number_of(b):
            return value
        return o.select(o.compare("uno", b, b), b, value)

    return extreme


maximum, minimum = _extreme("ogt"), _extreme("olt")
