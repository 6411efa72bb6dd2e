"""How numbers lie in memory: half precisions as 16 bits, a bool as a byte."""

from __future__ import annotations

import numpy as np

from stitch.codegen.emit_values import Operations, Value, literal
from stitch.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, INT32, UINT8, UINT16


def in_memory(dtype: np.dtype, has_half: bool) -> np.dtype:
    """The type as which elements of a buffer are loaded and stored."""
    if dtype == BOOL:
        return UINT8
    return UINT16 if dtype == BFLOAT16 or (dtype == FLOAT16 and not has_half) else dtype


def from_memory(o: Operations, x: Value, dtype: np.dtype) -> Value:
    """A loaded value, of type `in_memory(dtype)`, in the type of computation."""
    if dtype == BOOL:
        return o.compare("ne", x, literal(0, UINT8))
    if dtype not in (BFLOAT16, FLOAT16):
        return x
    value = _widened(o, x, dtype)
    o.stored[value] = dtype, x
    return value


def _widened(o: Operations, x: Value, dtype: np.dtype) -> Value:
    if dtype == BFLOAT16:
        wide = o.binary("shl", o.convert("zext", x, INT32), literal(16, INT32))
        return o.convert("bitcast", wide, FLOAT32)
    return o.convert("fpext", x, FLOAT32) if x.dtype == FLOAT16 else _from_half(o, x)


def to_memory(o: Operations, x: Value, dtype: np.dtype, has_half: bool) -> Value:
    """A computed value rounded to `dtype`, as it is stored. What was loaded, or rounded before, is stored as it is."""
    if dtype == BOOL:
        return o.convert("zext", x, UINT8)
    known, bits = o.stored.get(x, (None, x))
    if known == dtype:
        return bits
    if dtype == BFLOAT16:
        quick = x.varying and o.width == 16 and o.isa == "avx512" and o.has_bfloat
        return _quickly_to_bfloat(o, x) if quick else _to_bfloat(o, x)
    if dtype == FLOAT16:
        return o.convert("fptrunc", x, FLOAT16) if has_half else _to_half(o, x)
    return x


def _quickly_to_bfloat(o: Operations, x: Value) -> Value:
    """By the instruction for it, which takes subnormals for zero: where there is one among the lanes, which is seldom,
    all is done again without."""
    pure, wide = o.w.pure, "<16 x float>"
    tests = [pure(f"call <16 x i1> @llvm.x86.avx512.fpclass.ps.512({wide} {p}, i32 {SUBNORMAL})", p) for p in x.parts]
    some = tests[0]
    for t in tests[1:]:
        some = pure(f"or <16 x i1> {some}, {t}", some, t)
    bits = pure(f"bitcast <16 x i1> {some} to i16", some)
    there = pure(f"icmp ne i16 {bits}, 0", bits)
    times = pure(f"zext i1 {there} to i64", there)
    first = [*((wide, p) for p in x.parts), *(("<16 x i16>", p) for p in _rounded(o, x))]

    def again(_: str | int, names: list[str]) -> list[str]:
        now = names[: len(x.parts)]
        return [*now, *_to_bfloat(o, Value(FLOAT32, tuple(now), True)).parts]

    found = o.w.repeat(0, times, 1, first, again, once=True)
    return Value(UINT16, tuple(found[len(x.parts) :]), True)


SUBNORMAL = 0x20  # of the classes that `fpclass` tells apart


def _rounded(o: Operations, x: Value) -> list[str]:
    """Normal numbers, zeros, infinities and NaN as bfloat16: two vectors become one of twice as many lanes."""
    pure, out = o.w.pure, []
    for low, high in zip(x.parts[::2], x.parts[1::2], strict=False):
        name = "@llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        both = pure(f"call <32 x bfloat> {name}(<16 x float> {high}, <16 x float> {low})", high, low)
        whole = pure(f"bitcast <32 x bfloat> {both} to <32 x i16>", both)
        for start in (0, 16):
            order = ", ".join(f"i32 {k}" for k in range(start, start + 16))
            text = f"shufflevector <32 x i16> {whole}, <32 x i16> poison, <16 x i32> <{order}>"
            out.append(pure(text, whole))
    if len(x.parts) % 2:
        last = x.parts[-1]
        half = pure(f"call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> {last})", last)
        out.append(pure(f"bitcast <16 x bfloat> {half} to <16 x i16>", half))
    return out


def _to_bfloat(o: Operations, x: Value) -> Value:
    """Round to nearest even: half of the last place, less one where it is even. NaN keeps its head, and is quiet."""
    bits = o.convert("bitcast", x, INT32)
    if o.isa == "avx512":  # which tests a bit, and chooses, in one instruction each
        odd = o.compare("ne", o.binary("and", bits, _i(0x10000)), _i(0))
        near = o.binary("add", bits, o.select(odd, _i(0x8000), _i(0x7FFF)))
    else:
        last = o.binary("and", o.binary("lshr", bits, _i(16)), _i(1))
        near = o.binary("add", bits, o.binary("add", last, _i(0x7FFF)))
    kept = o.select(o.compare("uno", x, x), o.binary("or", bits, _i(0x400000)), near)
    return o.convert("trunc", o.binary("lshr", kept, _i(16)), UINT16)


def _from_half(o: Operations, x: Value) -> Value:
    """By integer arithmetic: the exponent is moved by a multiplication, which makes subnormals right too."""
    wide = o.convert("zext", x, INT32)
    sign = o.binary("shl", o.binary("and", wide, _i(0x8000)), _i(16))
    shifted = o.binary("shl", o.binary("and", wide, _i(0x7FFF)), _i(13))
    number = o.binary("fmul", o.convert("bitcast", shifted, FLOAT32), literal(2.0**112, FLOAT32))
    special = o.compare("eq", o.binary("and", wide, _i(0x7C00)), _i(0x7C00))
    bits = o.select(special, o.binary("or", shifted, _i(0x7F800000)), o.convert("bitcast", number, INT32))
    return o.convert("bitcast", o.binary("or", bits, sign), FLOAT32)


def _to_half(o: Operations, x: Value) -> Value:
    """Round to nearest even by integer arithmetic; subnormals by adding a number whose last place is theirs."""
    bits = o.convert("bitcast", x, INT32)
    size = o.binary("and", bits, _i(0x7FFFFFFF))
    sign = o.binary("lshr", o.binary("xor", bits, size), _i(16))
    odd = o.binary("and", o.binary("lshr", size, _i(13)), _i(1))
    normal = o.binary("lshr", o.binary("add", o.binary("add", size, _i(0xFFF - (112 << 23))), odd), _i(13))
    small = o.binary("fadd", o.convert("bitcast", size, FLOAT32), literal(0.5, FLOAT32))
    subnormal = o.binary("sub", o.convert("bitcast", small, INT32), _i(126 << 23))
    special = o.select(o.compare("ugt", size, _i(0x7F800000)), _i(0x7E00), _i(0x7C00))
    value = o.select(o.compare("ult", size, _i(113 << 23)), subnormal, normal)
    value = o.select(o.compare("uge", size, _i(143 << 23)), special, value)
    return o.convert("trunc", o.binary("or", value, sign), UINT16)


def _i(n: int) -> Value:
    return literal(n, INT32)
