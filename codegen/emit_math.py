"""The math library's operations that some machines have an instruction for: `scale`, `lookup`, `split`, `log_edges`.

The instruction and the steps that stand for it elsewhere have the same bits.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from stitch.codegen import polynomials
from stitch.codegen.emit_values import MathBuilder, Operations, Value, literal_text
from stitch.dtypes import FLOAT32
from stitch.target import ARM, Target


def vector_isa(target: Target) -> str:
    """The set of vector instructions that this module knows of a target: avx512, avx2, neon, or none."""
    if target.arch in ARM:
        return "neon"
    if target.is_x86 and target.has("avx512f") and target.has("avx512vl"):
        return "avx512"
    return "avx2" if target.is_x86 and target.has("avx2") else ""


class MachineMath(MathBuilder):
    """The math library's whole `Builder` on values."""

    def __init__(self, o: Operations) -> None:
        super().__init__(o)
        self.wide = 32 * o.width in (128, 256, 512) and o.isa == "avx512"

    def scale(self, p: Value, n: Value) -> Value:
        o = self.o
        if not (self.wide and (p.varying or n.varying)):
            return polynomials.scale_in_steps(self, p, n)
        last = "i16 -1, i32 4" if o.width == 16 else "i8 -1"
        return o.intrinsic("x86.avx512.mask.scalef.ps", FLOAT32, p, n, p, mangled=f".{32 * o.width}", extra=last)

    def split(self, x: Value) -> tuple[Value, Value]:
        """The fraction's interval and its sign's meaning are the instruction's 11 in binary, 10 in binary."""
        o = self.o
        if not (self.wide and x.varying):
            return polynomials.split_in_steps(self, x)
        kind, size = o.type(FLOAT32, True), 32 * o.width
        last = "i16 -1, i32 4" if o.width == 16 else "i8 -1"

        def exponent(v: Value) -> Value:
            return o.intrinsic("x86.avx512.mask.getexp.ps", FLOAT32, v, v, mangled=f".{size}", extra=last)

        fractions = (
            o.w.pure(f"call {kind} @llvm.x86.avx512.mask.getmant.ps.{size}({kind} {p}, i32 11, {kind} {p}, {last})", p)
            for p in x.parts
        )
        m = Value(FLOAT32, tuple(fractions), True)
        return self.sub(exponent(x), exponent(m)), m

    def lookup(self, table: Sequence[float], i: Value) -> Value:
        assert len(table) == 16
        o = self.o
        if not i.varying:
            return Value(FLOAT32, (self._from_memory(table, i.parts[0]),))
        take = LOOKUPS.get((o.isa, o.width), MachineMath._lane_by_lane)
        return Value(FLOAT32, tuple(take(self, table, x) for x in i.parts), True)

    def _permuted(self, table: Sequence[float], i: str) -> str:
        given = f"<16 x float> {_vector(table)}, <16 x i32> {i}"
        return self.o.w.pure(f"call <16 x float> @llvm.x86.avx512.permvar.sf.512({given})", i)

    def _from_two(self, table: Sequence[float], i: str) -> str:
        given = f"<8 x float> {_vector(table[:8])}, <8 x i32> {i}, <8 x float> {_vector(table[8:])}"
        return self.o.w.pure(f"call <8 x float> @llvm.x86.avx512.vpermi2var.ps.256({given})", i)

    def _blended(self, table: Sequence[float], i: str) -> str:
        pure = self.o.w.pure
        low, high = (
            pure(f"call <8 x float> @llvm.x86.avx2.permps(<8 x float> {_vector(half)}, <8 x i32> {i})", i)
            for half in (table[:8], table[8:])
        )
        bit = pure(f"shl <8 x i32> {i}, splat (i32 28)", i)
        upper = pure(f"icmp slt <8 x i32> {bit}, zeroinitializer", bit)
        return pure(f"select <8 x i1> {upper}, <8 x float> {high}, <8 x float> {low}", upper, high, low)

    def _padded(self, table: Sequence[float], i: str) -> str:
        pure, n = self.o.w.pure, self.o.width
        lanes = ", ".join(f"i32 {k if k < n else 'poison'}" for k in range(8))
        text = f"shufflevector <{n} x i32> {i}, <{n} x i32> poison, <8 x i32> <{lanes}>"
        found = LOOKUPS[self.o.isa, 8](self, table, pure(text, i))
        lanes = ", ".join(f"i32 {k}" for k in range(n))
        return pure(f"shufflevector <8 x float> {found}, <8 x float> poison, <{n} x i32> <{lanes}>", found)

    def _bytes(self, table: Sequence[float], i: str) -> str:
        """Four registers of bytes; index i becomes 4 i, 4 i + 1, ... in the bytes of a lane."""
        pure = self.o.w.pure
        low = pure(f"and <4 x i32> {i}, splat (i32 15)", i)
        four = pure(f"mul <4 x i32> {low}, splat (i32 {0x04040404})", low)
        each = pure(f"add <4 x i32> {four}, splat (i32 {0x03020100})", four)
        where = pure(f"bitcast <4 x i32> {each} to <16 x i8>", each)
        data = struct.pack("<16f", *table)
        parts = (f"<16 x i8> <{', '.join(f'i8 {b}' for b in data[k : k + 16])}>" for k in range(0, 64, 16))
        found = pure(f"call <16 x i8> @llvm.aarch64.neon.tbl4.v16i8({', '.join(parts)}, <16 x i8> {where})", where)
        return pure(f"bitcast <16 x i8> {found} to <4 x float>", found)

    def _lane_by_lane(self, table: Sequence[float], i: str) -> str:
        pure, n = self.o.w.pure, self.o.width
        total = "poison"
        for lane in range(n):
            value = self._from_memory(table, pure(f"extractelement <{n} x i32> {i}, i64 {lane}", i))
            total = pure(f"insertelement <{n} x float> {total}, float {value}, i64 {lane}", total, value)
        return total

    def _from_memory(self, table: Sequence[float], i: str) -> str:
        pure = self.o.w.pure
        text = _vector(table).replace("<", "[").replace(">", "]")
        name = f"@table.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.o.declared[name] = f"{name} = private unnamed_addr constant [16 x float] {text}, align 64"
        low = pure(f"and i32 {i}, 15", i)
        at = pure(f"getelementptr float, ptr {name}, i32 {low}", low)
        return pure(f"load float, ptr {at}", at)


def looked_up(o: Operations, table: Sequence[int], x: Value, dtype: np.dtype) -> Value:
    """An element of a table of 256 bytes for each byte of x: two lookups by seven bits, of which the eighth chooses."""
    if not x.varying:
        return Value(dtype, (_byte_from_memory(o, table, x.parts[0]),))
    pure, n = o.w.pure, o.width
    quarters = [f"<64 x i8> <{', '.join(f'i8 {b}' for b in table[k : k + 64])}>" for k in range(0, 256, 64)]
    parts = []
    for p in x.parts:
        if n < 64:
            lanes = ", ".join(f"i32 {k if k < n else 'poison'}" for k in range(64))
            p = pure(f"shufflevector <{n} x i8> {p}, <{n} x i8> poison, <64 x i32> <{lanes}>", p)
        low, high = (
            pure(f"call <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512({a}, <64 x i8> {p}, {b})", p)
            for a, b in (quarters[:2], quarters[2:])
        )
        upper = pure(f"icmp slt <64 x i8> {p}, zeroinitializer", p)
        found = pure(f"select <64 x i1> {upper}, <64 x i8> {high}, <64 x i8> {low}", upper, high, low)
        if n < 64:
            lanes = ", ".join(f"i32 {k}" for k in range(n))
            found = pure(f"shufflevector <64 x i8> {found}, <64 x i8> poison, <{n} x i32> <{lanes}>", found)
        parts.append(found)
    return Value(dtype, tuple(parts), True)


def _byte_from_memory(o: Operations, table: Sequence[int], i: str) -> str:
    pure = o.w.pure
    text = f"[{', '.join(f'i8 {b}' for b in table)}]"
    name = f"@table.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    o.declared[name] = f"{name} = private unnamed_addr constant [256 x i8] {text}, align 64"
    wide = pure(f"zext i8 {i} to i64", i)
    at = pure(f"getelementptr i8, ptr {name}, i64 {wide}", wide)
    return pure(f"load i8, ptr {at}", at)


def _vector(table: Sequence[float]) -> str:
    return _text_of(struct.pack(f"{len(table)}d", *table))


@lru_cache(256)
def _text_of(table: bytes) -> str:
    """Tables are few, and written out for each vector that looks something up. By their bits: 0 is not -0."""
    numbers = struct.unpack(f"{len(table) // 8}d", table)
    return f"<{', '.join(f'float {literal_text(x, FLOAT32)}' for x in numbers)}>"


LOOKUPS: dict[tuple[str, int], Callable[[MachineMath, Sequence[float], str], str]] = {
    ("avx512", 16): MachineMath._permuted,
    ("avx512", 8): MachineMath._from_two,
    ("avx512", 4): MachineMath._padded,
    ("avx2", 8): MachineMath._blended,
    ("avx2", 4): MachineMath._padded,
    ("neon", 4): MachineMath._bytes,
}
