"""Values in emitted code, and the operations on them.

A value is *uniform* (one scalar) or *varying*: `copies` vectors of `width` lanes, one for each of the steps that an
unrolled vector loop takes side by side. Operations on uniform values stay scalar; where the two meet, the uniform one
is splat. Operations on varying values are written copy by copy, so that independent work is always next to each other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from stitch import dtypes
from stitch.codegen.emit_code import Writer
from stitch.dtypes import BOOL, FLOAT16, FLOAT32, FLOAT64, INT32, INT64

LLVM = {d: f"i{8 * d.itemsize}" for d in dtypes.INTEGERS}
LLVM |= {BOOL: "i1", FLOAT16: "half", FLOAT32: "float", FLOAT64: "double"}
SHORT = LLVM | {FLOAT16: "f16", FLOAT32: "f32", FLOAT64: "f64"}  # in names of intrinsics


@dataclass(frozen=True, slots=True)
class Value:
    dtype: np.dtype
    parts: tuple[str, ...]
    varying: bool = False


def literal(x: float | int | bool, dtype: np.dtype) -> Value:
    return Value(dtype, (literal_text(x, dtype),))


def literal_text(x: float | int | bool, dtype: np.dtype) -> str:
    if dtype == BOOL:
        return "true" if x else "false"
    if dtypes.is_float(dtype):
        with np.errstate(all="ignore"):
            number = float(np.asarray(x).astype(dtype))
        return "0x7FF8000000000000" if number != number else f"0x{struct.pack('>d', number).hex().upper()}"
    bits = 8 * dtype.itemsize
    whole = int(x) & ((1 << bits) - 1)
    return str(whole - (1 << bits) if whole >> (bits - 1) else whole)


def number_of(v: Value) -> float | int | None:
    """The number that a literal stands for; None for what is computed."""
    text = v.parts[0]
    if v.varying or text[0] == "%" or text.startswith("splat"):
        return None
    if dtypes.is_float(v.dtype):
        number: float = struct.unpack(">d", bytes.fromhex(text[2:]))[0]
        return number
    return int(text) if v.dtype != BOOL else text == "true"


class Operations:
    """Writes instructions on values. `declared` collects the functions of the C library that they call."""

    def __init__(self, writer: Writer, has_fma: bool, isa: str = "", has_bfloat: bool = False) -> None:
        self.w = writer
        self.has_fma = has_fma
        self.has_bfloat = has_bfloat  # instructions of AVX-512 that round to bfloat16
        self.isa = isa  # what `emit_math.vector_isa` says
        self.width = 1
        self.copies = 1
        self.declared: dict[str, str] = {}
        self.made: dict[Value, tuple[str, tuple[Value, ...]]] = {}  # by which primitive, of what
        self.most: dict[Value, float] = {}  # what a value is known not to be above
        self.stored: dict[Value, tuple[np.dtype, Value]] = {}  # of floats: the halves that they were widened from

    # types and parts

    def type(self, dtype: np.dtype, varying: bool) -> str:
        return f"<{self.width} x {LLVM[dtype]}>" if varying else LLVM[dtype]

    def splat(self, name: str, kind: str) -> str:
        """A vector of `width` equal lanes, from a scalar of LLVM type `kind`."""
        if name[0] != "%":
            return f"splat ({kind} {name})"
        vector = f"<{self.width} x {kind}>"
        one = self.w.pure(f"insertelement {vector} poison, {kind} {name}, i64 0", name)
        text = f"shufflevector {vector} {one}, {vector} poison, <{self.width} x i32> zeroinitializer"
        return self.w.pure(text, one)

    def parts(self, v: Value) -> tuple[str, ...]:
        """The names of the vectors of a value; `copies` of them."""
        return v.parts if v.varying else (self.splat(v.parts[0], LLVM[v.dtype]),) * self.copies

    def widen(self, v: Value) -> Value:
        return v if v.varying else Value(v.dtype, self.parts(v), True)

    # instructions

    def unary(self, op: str, a: Value) -> Value:
        kind = self.type(a.dtype, a.varying)
        return Value(a.dtype, tuple(self.w.pure(f"{op} {kind} {x}", x) for x in a.parts), a.varying)

    def binary(self, op: str, a: Value, b: Value) -> Value:
        return self._pair(op, a, b, a.dtype)

    def compare(self, op: str, a: Value, b: Value) -> Value:
        """`op` is a predicate of fcmp ("olt") or icmp ("slt")."""
        return self._pair(f"{'fcmp' if dtypes.is_float(a.dtype) else 'icmp'} {op}", a, b, BOOL)

    def _pair(self, op: str, a: Value, b: Value, out: np.dtype) -> Value:
        pure = self.w.pure
        if not (a.varying or b.varying):
            x, y = a.parts[0], b.parts[0]
            return Value(out, (pure(f"{op} {LLVM[a.dtype]} {x}, {y}", x, y),))
        kind = self.type(a.dtype, True)
        pairs = zip(self.parts(a), self.parts(b), strict=True)
        return Value(out, tuple(pure(f"{op} {kind} {x}, {y}", x, y) for x, y in pairs), True)

    def select(self, c: Value, a: Value, b: Value) -> Value:
        """Lanes of a where c, else of b. A uniform condition of varying values is splat: a blend, not a branch."""
        pure = self.w.pure
        varying = c.varying or a.varying or b.varying
        test, kind = self.type(BOOL, varying), self.type(a.dtype, varying)
        rows = zip(*(self.parts(v) if varying else v.parts for v in (c, a, b)), strict=True)
        names = (pure(f"select {test} {t}, {kind} {x}, {kind} {y}", t, x, y) for t, x, y in rows)
        return Value(a.dtype, tuple(names), varying)

    def convert(self, op: str, a: Value, to: np.dtype) -> Value:
        """`op` is an instruction of the form `op type value to type`."""
        if LLVM[a.dtype] == LLVM[to]:
            return Value(to, a.parts, a.varying)
        kind, other = self.type(a.dtype, a.varying), self.type(to, a.varying)
        return Value(to, tuple(self.w.pure(f"{op} {kind} {x} to {other}", x) for x in a.parts), a.varying)

    def intrinsic(self, name: str, out: np.dtype, *args: Value, mangled: str = "", extra: str = "") -> Value:
        """A call of @llvm.`name`, overloaded by its arguments' type; `extra`: constant arguments at the end."""
        varying = any(a.varying for a in args)
        tail = f".v{self.width}" if varying else "."
        function = f"@llvm.{name}" + (mangled or f"{tail}{SHORT[args[0].dtype]}")
        kinds = [self.type(a.dtype, varying) for a in args]
        result = self.type(out, varying)
        names = []
        for row in zip(*(self.parts(a) if varying else a.parts for a in args), strict=True):
            given = ", ".join([*(f"{k} {x}" for k, x in zip(kinds, row, strict=True)), *([extra] if extra else [])])
            names.append(self.w.pure(f"call {result} {function}({given})", *row))
        return Value(out, tuple(names), varying)

    def libm(self, name: str, *args: Value) -> Value:
        """A function of the C library on float64, lane by lane: right everywhere, and slow."""
        dtype = args[0].dtype
        kind = LLVM[dtype]
        kinds = ", ".join([kind] * len(args))
        self.declared[f"@{name}"] = f"declare {kind} @{name}({kinds}) nounwind memory(none)"
        pure = self.w.pure

        def call(names: tuple[str, ...]) -> str:
            given = ", ".join(f"{kind} {x}" for x in names)
            return pure(f"call {kind} @{name}({given}) nounwind memory(none)", *names)

        if not any(a.varying for a in args):
            return Value(dtype, (call(tuple(a.parts[0] for a in args)),))
        vector = self.type(dtype, True)
        names = []
        for row in zip(*(self.parts(a) for a in args), strict=True):
            total = "poison"
            for lane in range(self.width):
                picked = tuple(pure(f"extractelement {vector} {x}, i64 {lane}", x) for x in row)
                value = call(picked)
                text = f"insertelement {vector} {total}, {kind} {value}, i64 {lane}"
                total = pure(text, total, value)
            names.append(total)
        return Value(dtype, tuple(names), True)

    # arithmetic with more than one instruction

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c rounded once, on every target."""
        if self.has_fma or a.dtype == FLOAT64:
            return self.intrinsic("fma", a.dtype, a, b, c)
        return self._fma_in_double(a, b, c)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c rounded once where that is one instruction, else twice."""
        return self.fma(a, b, c) if self.has_fma else self.binary("fadd", self.binary("fmul", a, b), c)

    def _fma_in_double(self, a: Value, b: Value, c: Value) -> Value:
        """The product is exact in float64; the sum is rounded to odd there, then to float32 (Boldo, Melquiond 2008)."""
        x, y, z = (self.convert("fpext", v, FLOAT64) for v in (a, b, c))
        p = self.binary("fmul", x, y)
        s = self.binary("fadd", p, z)
        t = self.binary("fsub", s, p)
        error = self.binary("fadd", self.binary("fsub", p, self.binary("fsub", s, t)), self.binary("fsub", z, t))
        zero, zero_bits, one = literal(0.0, FLOAT64), literal(0, INT64), literal(1, INT64)
        bits = self.convert("bitcast", s, INT64)
        even = self.compare("eq", self.binary("and", bits, one), zero_bits)
        inexact = self.binary("and", even, self.compare("one", error, zero))  # ordered: inf - inf is no error
        away = self.binary("xor", self.compare("ogt", error, zero), self.compare("ogt", s, zero))
        step = self.select(away, literal(-1, INT64), one)
        moved = self.binary("add", bits, self.select(inexact, step, zero_bits))
        return self.convert("fptrunc", self.convert("bitcast", moved, FLOAT64), FLOAT32)


class MathBuilder:
    """The math library's `Builder` on values, but for what `emit_math` adds."""

    def __init__(self, o: Operations) -> None:
        self.o = o
        self.fma = o.fma
        self.select = self.iselect = o.select

    def const(self, x: float) -> Value:
        return literal(x, FLOAT32)

    def iconst(self, n: int) -> Value:
        return literal(n, INT32)

    def add(self, a: Value, b: Value) -> Value:
        return self.o.binary("fadd", a, b)

    def sub(self, a: Value, b: Value) -> Value:
        return self.o.binary("fsub", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self.o.binary("fmul", a, b)

    def div(self, a: Value, b: Value) -> Value:
        return self.o.binary("fdiv", a, b)

    def neg(self, a: Value) -> Value:
        return self.o.unary("fneg", a)

    def abs(self, a: Value) -> Value:
        return self.o.intrinsic("fabs", FLOAT32, a)

    def sqrt(self, a: Value) -> Value:
        return self.o.intrinsic("sqrt", FLOAT32, a)

    def floor(self, a: Value) -> Value:
        return self.o.intrinsic("floor", FLOAT32, a)

    def rint(self, a: Value) -> Value:
        return self.o.intrinsic("rint", FLOAT32, a)

    def fmin(self, a: Value, b: Value) -> Value:
        return self.o.select(self.o.compare("olt", a, b), a, b)

    def fmax(self, a: Value, b: Value) -> Value:
        return self.o.select(self.o.compare("olt", b, a), a, b)

    def lt(self, a: Value, b: Value) -> Value:
        return self.o.compare("olt", a, b)

    def le(self, a: Value, b: Value) -> Value:
        return self.o.compare("ole", a, b)

    def eq(self, a: Value, b: Value) -> Value:
        return self.o.compare("oeq", a, b)

    def ne(self, a: Value, b: Value) -> Value:
        return self.o.compare("une", a, b)

    def land(self, a: Value, b: Value) -> Value:
        return self.o.binary("and", a, b)

    def lor(self, a: Value, b: Value) -> Value:
        return self.o.binary("or", a, b)

    def lnot(self, a: Value) -> Value:
        return self.o.binary("xor", a, literal(True, BOOL))

    def bits(self, x: Value) -> Value:
        return self.o.convert("bitcast", x, INT32)

    def unbits(self, i: Value) -> Value:
        return self.o.convert("bitcast", i, FLOAT32)

    def iadd(self, a: Value, b: Value) -> Value:
        return self.o.binary("add", a, b)

    def isub(self, a: Value, b: Value) -> Value:
        return self.o.binary("sub", a, b)

    def imul(self, a: Value, b: Value) -> Value:
        return self.o.binary("mul", a, b)

    def iand(self, a: Value, b: Value) -> Value:
        return self.o.binary("and", a, b)

    def ior(self, a: Value, b: Value) -> Value:
        return self.o.binary("or", a, b)

    def ixor(self, a: Value, b: Value) -> Value:
        return self.o.binary("xor", a, b)

    def shl(self, a: Value, n: int) -> Value:
        return self.o.binary("shl", a, literal(n, INT32))

    def lshr(self, a: Value, n: int) -> Value:
        return self.o.binary("lshr", a, literal(n, INT32))

    def ashr(self, a: Value, n: int) -> Value:
        return self.o.binary("ashr", a, literal(n, INT32))

    def ilt(self, a: Value, b: Value) -> Value:
        return self.o.compare("slt", a, b)

    def ieq(self, a: Value, b: Value) -> Value:
        return self.o.compare("eq", a, b)

    def toint(self, x: Value) -> Value:
        return self.o.convert("fptosi", x, INT32)

    def tofloat(self, i: Value) -> Value:
        return self.o.convert("sitofp", i, FLOAT32)
