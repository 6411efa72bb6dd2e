"""Indices, loads and stores: where lanes lie in memory, and what may be touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stitch import dims
from stitch.access import Bound, Index, Variable
from stitch.codegen import emit_storage as storage
from stitch.codegen.emit_casts import cast
from stitch.codegen.emit_dims import Dims, constant_part
from stitch.codegen.emit_values import LLVM, SHORT, Operations, Value, literal
from stitch.codegen.loops import Axis, Buffer, Local
from stitch.dims import Dim
from stitch.dtypes import BOOL, INT64

Place = tuple[str, int]  # where an axis stands: an SSA name ("" for none) plus a number
LINE = 64  # bytes of a cache line
ZEROS = "@stitch.zeros"  # what a load reads instead where a guard forbids it


@dataclass(frozen=True)
class Guard:
    """Where a guarded value is wanted: if `cond` (None: always), and in the lanes of `masks` (None: in all)."""

    cond: str | None = None
    masks: tuple[str, ...] | None = None


@dataclass
class Affine:
    """An index taken apart: uniform summands by level, a symbolic constant, a number; then what varies by lane."""

    terms: list[str]
    constant: Dim
    number: int
    lane: Dim  # by which the index grows from lane to lane
    vector: Value | None  # further summand that varies, as i64


class Memory:
    """Loads and stores of the kernel's buffers, at the point where the emitter stands.

    The emitter keeps the context: where each axis stands, what each local is; in a vector loop its axis and the mask
    of the lanes that exist; in a guarded expression, the guard.
    """

    def __init__(self, o: Operations, d: Dims, base: Callable[[Buffer], str], has_half: bool) -> None:
        self.o, self.w, self.d = o, o.w, d
        self.base = base
        self.has_half = has_half
        self.places: dict[Axis, Place] = {}
        self.locals: dict[Local, Value] = {}
        self.lane_axis: Axis | None = None
        self.tail: tuple[str, ...] | None = None
        self.streamed: Mapping[Buffer, Dim] = {}  # stored past the caches, if that is positive
        self.guard = Guard()

    # ------------------------------------------------------------------ indices

    def affine(self, index: Index) -> Affine:
        terms: list[str] = []
        offset, vector = index.offset, None
        lane: Dim = 0
        for v, c in index.terms:
            name, number = self._place(v)
            offset = offset + c * number
            if v is self.lane_axis:
                lane = c
            if isinstance(name, Value):
                scaled = self.o.binary("mul", name, self._dim(c)) if c != 1 else name
                vector = scaled if vector is None else self.o.binary("add", vector, scaled)
            elif name:
                terms.append(self.d.mul(self.d.value(c), name))
        constant, number = constant_part(offset)
        return Affine(terms, constant, number, lane, vector)

    def _place(self, v: Variable) -> tuple[str | Value, int]:
        if isinstance(v, Axis):
            return self.places[v]
        assert isinstance(v, Local)
        value = cast(self.o, self.locals[v], INT64)
        if value.varying:
            return value, 0
        name = value.parts[0]
        return (name, 0) if name[0] == "%" else ("", int(name))

    def _dim(self, dim: Dim) -> Value:
        return Value(INT64, (self.d.value(dim),))

    def _levels(self, a: Affine) -> list[str]:
        """The uniform summands, those of one level added up, outermost first."""
        by_level: dict[int, str] = {}
        for t in ([] if a.constant == 0 else [self.d.value(a.constant)]) + a.terms:
            level = self.w.level_of([t])
            by_level[level] = self.d.add(by_level[level], t) if level in by_level else t
        return [by_level[level] for level in sorted(by_level)]

    def _step(self, a: Affine, copy: int) -> tuple[str, int]:
        """The distance of a copy's first lane: a name or "", and a number."""
        if isinstance(a.lane, int):
            return "", a.number + a.lane * copy * self.o.width
        return (self.d.value(a.lane * (copy * self.o.width)) if copy else ""), a.number

    def _scalar(self, a: Affine, copy: int = 0) -> str:
        """The index of lane 0, without the part that varies."""
        total = "0"
        for t in self._levels(a):
            total = self.d.add(total, t)
        name, number = self._step(a, copy)
        return self.d.add(self.d.add(total, name) if name else total, str(number))

    def _pointer(self, buffer: Buffer, a: Affine, copy: int = 0, back: int = 0) -> str:
        """The address of lane 0 less `back` elements. Each level's share is added on that level; numbers come last."""
        kind = LLVM[storage.in_memory(buffer.dtype, self.has_half)]
        p = self.base(buffer)
        name, number = self._step(a, copy)
        for t in (*self._levels(a), name, str(number - back)):
            if t and t != "0":
                p = self.w.pure(f"getelementptr {kind}, ptr {p}, i64 {t}", p, t)
        return p

    def pointer(self, buffer: Buffer, index: Index) -> str:
        """The address of an element."""
        return self._pointer(buffer, self.affine(index))

    def _lanes(self, a: Affine) -> Value | None:
        """What is to be added for each lane to lane 0's index; None if nothing."""
        total = a.vector
        if a.lane != 0:
            steps = Value(INT64, (self.iota("i64"),) * self.o.copies, True)
            if a.lane != 1:
                steps = self.o.binary("mul", steps, self._dim(a.lane))
            if isinstance(a.lane, int):
                lanes = ", ".join(f"i64 {a.lane * k}" for k in range(self.o.width))
                steps = Value(INT64, (f"<{lanes}>",) * self.o.copies, True)
            total = steps if total is None else self.o.binary("add", total, steps)
        return total

    def iota(self, kind: str) -> str:
        return f"<{', '.join(f'{kind} {k}' for k in range(self.o.width))}>"

    def position(self, index: Index, dtype: np.dtype = INT64) -> Value:
        """The index itself, as an int64, or as an int32 that it fits."""
        a = self.affine(index)
        lanes = self._lanes(a)
        if lanes is None:
            return cast(self.o, Value(INT64, (self._scalar(a),)), dtype)
        if dtype != INT64 and a.vector is None and isinstance(a.lane, int):
            steps = ", ".join(f"{LLVM[dtype]} {a.lane * k}" for k in range(self.o.width))
            lanes = Value(dtype, (f"<{steps}>",) * self.o.copies, True)
        else:
            lanes = cast(self.o, lanes, dtype)
        starts = (cast(self.o, Value(INT64, (self._scalar(a, u),)), dtype) for u in range(self.o.copies))
        first = tuple(self.o.splat(s.parts[0], LLVM[dtype]) for s in starts)
        return self.o.binary("add", Value(dtype, first, True), lanes)

    # ------------------------------------------------------------------ guards

    def within(self, bounds: tuple[Bound, ...]) -> Value:
        """Whether all bounds hold."""
        all_hold = literal(True, BOOL)
        for b in bounds:
            sure = self._known(b)
            if sure is False:
                return literal(False, BOOL)
            if sure:
                continue
            known = self._known_lanes(b)
            if known is not None:
                if any("false" in m for m in known):
                    held = Value(BOOL, known, True)
                    all_hold = held if all_hold.parts == ("true",) else self.o.binary("and", all_hold, held)
                continue
            v, limit = self.position(b.index), self._dim(b.limit)
            low, _ = dims.bounds(b.limit)
            if low is not None and low >= 0:
                holds = self.o.compare("ult", v, limit)
            else:
                up = self.o.compare("sge", v, literal(0, INT64))
                holds = self.o.binary("and", up, self.o.compare("slt", v, limit))
            all_hold = holds if all_hold.parts == ("true",) else self.o.binary("and", all_hold, holds)
        return all_hold

    def _known(self, b: Bound) -> bool | None:
        """Whether a bound holds, where it is known; None: that depends."""
        a = self.affine(b.index)
        if a.vector is not None or a.terms or a.lane != 0:
            return None
        at = a.constant + a.number
        if dims.prove_le(b.limit, at) or dims.prove_le(at, -1):
            return False
        return True if dims.prove_le(0, at) and dims.prove_le(at + 1, b.limit) else None

    def _known_lanes(self, b: Bound) -> tuple[str, ...] | None:
        """The masks of a bound in a vector that stands at a known place, as literals."""
        a = self.affine(b.index)
        if a.vector is not None or a.terms or a.constant != 0 or a.lane == 0:
            return None
        if not isinstance(a.lane, int) or not isinstance(b.limit, int):
            return None
        starts = [a.number + a.lane * u * self.o.width for u in range(self.o.copies)]
        held = [[0 <= s + a.lane * k < b.limit for k in range(self.o.width)] for s in starts]
        return tuple(f"<{', '.join('i1 true' if h else 'i1 false' for h in lanes)}>" for lanes in held)

    def narrowed(self, condition: Value) -> Guard:
        """The present guard, and the condition."""
        cond, masks = self.guard.cond, self.guard.masks
        if condition.varying:
            if masks is not None:
                condition = self.o.binary("and", condition, Value(BOOL, masks, True))
            return Guard(cond, condition.parts)
        if cond is not None:
            condition = self.o.binary("and", condition, Value(BOOL, (cond,)))
        return Guard(condition.parts[0], masks)

    def _masks(self) -> tuple[str, ...] | None:
        """The lanes to load: those that exist and are wanted; None for all."""
        if self.tail is None or self.guard.masks is None:
            return self.guard.masks if self.tail is None else self.tail
        return tuple(self._both(a, b) for a, b in zip(self.tail, self.guard.masks, strict=True))

    def _both(self, a: str, b: str) -> str:
        """Both masks. LLVM gets no masks that it could know: it fails on some ("Getting value from an unknown
        LocationSize", LLVM 22)."""
        if a[0] == b[0] == "<":
            lanes = zip(a.strip("<>").split(", "), b.strip("<>").split(", "), strict=True)
            return f"<{', '.join('i1 true' if x == y == 'i1 true' else 'i1 false' for x, y in lanes)}>"
        return self.w.pure(f"and <{self.o.width} x i1> {a}, {b}", a, b)

    def _allowed(self, pointer: str) -> str:
        """The pointer, or one to zeros if the guard's uniform condition fails."""
        c = self.guard.cond
        return pointer if c is None else self.w.pure(f"select i1 {c}, ptr {pointer}, ptr {ZEROS}", c, pointer)

    def _any(self, masks: tuple[str, ...]) -> str:
        """Whether any lane of any copy is set."""
        total = masks[0]
        for m in masks[1:]:
            total = self.w.pure(f"or <{self.o.width} x i1> {total}, {m}", total, m)
        kind = f"i{self.o.width}"
        bits = self.w.pure(f"bitcast <{self.o.width} x i1> {total} to {kind}", total)
        return self.w.pure(f"icmp ne {kind} {bits}, 0", bits)

    # ------------------------------------------------------------------ loads

    def load(self, buffer: Buffer, index: Index) -> Value:
        """The elements at an index, in the type of computation."""
        a = self.affine(index)
        if a.vector is None and a.lane == 0:
            raw = self._load_uniform(buffer, a)
        elif a.vector is None and isinstance(a.lane, int) and abs(a.lane) == 1:
            raw = self._load_contiguous(buffer, a)
        else:
            raw = self._gather(buffer, a)
        return storage.from_memory(self.o, raw, buffer.dtype)

    def _kind(self, buffer: Buffer) -> np.dtype:
        return storage.in_memory(buffer.dtype, self.has_half)

    def _load_uniform(self, buffer: Buffer, a: Affine) -> Value:
        dtype = self._kind(buffer)
        saved = self.guard
        if self.guard.masks is not None:
            self.guard = Guard(self.narrowed(Value(BOOL, (self._any(self.guard.masks),))).cond, None)
        p = self._allowed(self._pointer(buffer, a))
        self.guard = saved
        return Value(dtype, (self.w.load(buffer, f"load {LLVM[dtype]}, ptr {p}, align {dtype.itemsize}", p),))

    def _load_contiguous(self, buffer: Buffer, a: Affine) -> Value:
        dtype = self._kind(buffer)
        backwards = a.lane == -1
        kind, size = f"<{self.o.width} x {LLVM[dtype]}>", dtype.itemsize
        masks = self._masks()
        names = []
        for u in range(self.o.copies):
            p = self._allowed(self._pointer(buffer, a, u, self.o.width - 1 if backwards else 0))
            if masks is None or _first_lanes(masks[u]) == self.o.width:
                name = self.w.load(buffer, f"load {kind}, ptr {p}, align {size}", p)
            elif masks[u][0] == "<" and "true" not in masks[u]:
                name = "zeroinitializer"
            else:
                m = self._reversed(masks[u], "i1") if backwards else masks[u]
                function = f"@llvm.masked.load.v{self.o.width}{SHORT[dtype]}.p0"
                test = f"<{self.o.width} x i1>"
                text = f"call {kind} {function}(ptr align {size} {p}, {test} {m}, {kind} zeroinitializer)"
                name = self.w.load(buffer, text, p, m)
            names.append(self._reversed(name, LLVM[dtype]) if backwards else name)
        return Value(dtype, tuple(names), True)

    def _reversed(self, name: str, kind: str) -> str:
        order = ", ".join(f"i32 {k}" for k in reversed(range(self.o.width)))
        vector = f"<{self.o.width} x {kind}>"
        return self.w.pure(f"shufflevector {vector} {name}, {vector} poison, <{self.o.width} x i32> <{order}>", name)

    def _addresses(self, buffer: Buffer, a: Affine) -> list[str]:
        """A vector of pointers for each copy."""
        kind = LLVM[self._kind(buffer)]
        n = self.o.width
        lanes = self._lanes(a)
        out = []
        for u in range(self.o.copies):
            p = self._pointer(buffer, a, u)
            if lanes is None:
                out.append(self.o.splat(p, "ptr"))
            else:
                k = self.o.parts(lanes)[u]
                out.append(self.w.pure(f"getelementptr {kind}, ptr {p}, <{n} x i64> {k}", p, k))
        return out

    def _gather(self, buffer: Buffer, a: Affine) -> Value:
        dtype = self._kind(buffer)
        n = self.o.width
        kind, test = f"<{n} x {LLVM[dtype]}>", f"<{n} x i1>"
        masks = self._masks() or ("splat (i1 true)",) * self.o.copies
        if self.guard.cond is not None:
            masks = self.o.binary("and", Value(BOOL, masks, True), Value(BOOL, (self.guard.cond,))).parts
        function = f"@llvm.masked.gather.v{n}{SHORT[dtype]}.v{n}p0"
        names = []
        for p, m in zip(self._addresses(buffer, a), masks, strict=True):
            text = f"call {kind} {function}(<{n} x ptr> align {dtype.itemsize} {p}, {test} {m}, {kind} zeroinitializer)"
            names.append(self.w.load(buffer, text, p, m))
        return Value(dtype, tuple(names), True)

    def prefetch(self, buffer: Buffer, index: Index, near: bool) -> None:
        """Asks for lines, one for as many vectors as it holds."""
        a, hint = self.affine(index), 3 if near else 2
        copies = self.o.copies if self.lane_axis is not None and a.lane != 0 else 1
        for u in range(copies):
            if u * self.o.width * buffer.dtype.itemsize % LINE == 0:
                p = self._pointer(buffer, a, u)
                self.w.effect(f"call void @llvm.prefetch.p0(ptr {p}, i32 0, i32 {hint}, i32 1)")

    # ------------------------------------------------------------------ stores

    def store(self, buffer: Buffer, index: Index, value: Value) -> None:
        a = self.affine(index)
        v = storage.to_memory(self.o, value, buffer.dtype, self.has_half)
        size = v.dtype.itemsize
        if self.lane_axis is None:
            p = self._pointer(buffer, a)
            self.w.effect(f"store {LLVM[v.dtype]} {v.parts[0]}, ptr {p}, align {size}", buffer)
            return
        n, names = self.o.width, self.o.parts(v)
        kind, test = f"<{n} x {LLVM[v.dtype]}>", f"<{n} x i1>"
        short = f"v{n}{SHORT[v.dtype]}"
        if a.vector is not None or a.lane not in (1, -1):
            function = f"@llvm.masked.scatter.{short}.v{n}p0"
            masks = self.tail or ("splat (i1 true)",) * self.o.copies
            for x, p, m in zip(names, self._addresses(buffer, a), masks, strict=True):
                self.w.effect(f"call void {function}({kind} {x}, <{n} x ptr> align {size} {p}, {test} {m})", buffer)
            return
        backwards = a.lane == -1
        if buffer in self.streamed and self.tail is None and self._in_step(index, v):
            self._stream(buffer, a, v)
            return
        for u, x in enumerate(names):
            lanes = 0 if self.tail is None else _first_lanes(self.tail[u])
            # LLVM 22 turns a masked store of one lane of a truncated vector into a store of the wide element
            # (llvm/llvm-project#179489), so it does not get to see one.
            if lanes == 1 or (lanes and not backwards and self.o.isa != "avx512"):
                self._store_first(buffer, self._pointer(buffer, a, u), x, v.dtype, lanes)
                continue
            p = self._pointer(buffer, a, u, n - 1 if backwards else 0)
            x = self._reversed(x, LLVM[v.dtype]) if backwards else x
            if self.tail is None:
                self.w.effect(f"store {kind} {x}, ptr {p}, align {size}", buffer)
            else:
                m = self._reversed(self.tail[u], "i1") if backwards else self.tail[u]
                function = f"@llvm.masked.store.{short}.p0"
                self.w.effect(f"call void {function}({kind} {x}, ptr align {size} {p}, {test} {m})", buffer)

    def _store_first(self, buffer: Buffer, p: str, x: str, dtype: np.dtype, lanes: int) -> None:
        """The first lanes of a vector by stores of 8, 4, 2 and 1: without registers for masks, one with a mask takes
        longer (and LLVM 22 fails on some of those that AVX2 has, "Getting value from an unknown LocationSize")."""
        n, kind, at = self.o.width, LLVM[dtype], 0
        while at < lanes:
            count = 1 << ((lanes - at).bit_length() - 1)
            picked = ", ".join(f"i32 {k}" for k in range(at, at + count))
            there = self.w.pure(f"getelementptr {kind}, ptr {p}, i64 {at}", p)
            part = self.w.pure(
                f"shufflevector <{n} x {kind}> {x}, <{n} x {kind}> poison, <{count} x i32> <{picked}>", x
            )
            self.w.effect(f"store <{count} x {kind}> {part}, ptr {there}, align {dtype.itemsize}", buffer)
            at += count

    def _in_step(self, index: Index, v: Value) -> bool:
        """Whether vectors are aligned if the buffer is."""
        n = self.o.width
        lanes = [c for x, c in index.terms if x is self.lane_axis]
        steps = [c for x, c in index.terms if x is not self.lane_axis]
        whole = all(c % n == 0 for c in (index.offset, *steps))
        return whole and lanes == [1] and n * v.dtype.itemsize >= 16

    def _stream(self, buffer: Buffer, a: Affine, v: Value) -> None:
        """Stores past the caches, if there is enough of it, and if the buffer begins where vectors do: a misaligned
        one would trap."""
        n, size = self.o.width, self.o.width * v.dtype.itemsize
        base = self.base(buffer)
        address = self.w.pure(f"ptrtoint ptr {base} to i64", base)
        rest = self.w.pure(f"and i64 {address}, {size - 1}", address)
        ordinary = self.w.pure(f"icmp ne i64 {rest}, 0", rest)
        enough = self.streamed[buffer]
        if not isinstance(enough, int):
            excess = self.d.value(enough)
            few = self.w.pure(f"icmp slt i64 {excess}, 1", excess)
            ordinary = self.w.pure(f"or i1 {ordinary}, {few}", ordinary, few)
        there = [self._pointer(buffer, a, u) for u in range(self.o.copies)]
        for wanted, how in (("0", f"align {size}, !nontemporal !0"), ("1", f"align {v.dtype.itemsize}")):
            test = self.w.pure(f"icmp eq i1 {ordinary}, {wanted}", ordinary)
            count = self.w.pure(f"zext i1 {test} to i64", test)

            def body(_: str | int, __: list[str], how: str = how) -> list[str]:
                for x, p in zip(self.o.parts(v), there, strict=True):
                    self.w.effect(f"store <{n} x {LLVM[v.dtype]}> {x}, ptr {p}, {how}", buffer)
                return []

            self.w.repeat(0, count, 1, [], body, (), once=True)


def _first_lanes(mask: str) -> int:
    """How many lanes a mask has that is a literal of which only the first ones are set; else 0."""
    lanes = mask.strip("<>").split(", ")
    count = lanes.count("i1 true")
    return count if mask.startswith("<") and lanes[:count] == ["i1 true"] * count else 0
