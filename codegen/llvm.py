"""From a loop program to LLVM text: one function per phase, written straight down.

    void @NAME.K(ptr %args, i64 %begin, i64 %end, i64 %worker)

runs tasks [begin, end) of phase K. `args` points to words of eight bytes: a pointer for each global buffer, the value
of each symbol, the address of the scratch memory, and its stride from worker to worker. Tiles lie in the worker's
part of it, each at a multiple of 64 bytes.

The text is meant to be good as it stands. Vector loops are vectors: `unroll` of them side by side, then one at a time
under a mask. `emit_code` hoists and shares, `emit_values` and `emit_primitives` do the arithmetic, `emit_memory` the
addresses. What order sums have, and which multiply-adds are fused, is in `emit_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from stitch import dims, dtypes
from stitch.codegen import emit_endings as endings
from stitch.codegen import emit_primitives as primitives
from stitch.codegen import emit_storage as storage
from stitch.codegen.emit_casts import beyond
from stitch.codegen.emit_code import Writer
from stitch.codegen.emit_dims import Dims
from stitch.codegen.emit_kernels import tile_kernel
from stitch.codegen.emit_math import looked_up, vector_isa
from stitch.codegen.emit_memory import ZEROS, Guard, Memory
from stitch.codegen.emit_rules import identity, lanes_of, multiply_add, nodes, stored_in, unrolls
from stitch.codegen.emit_sums import in_blocks
from stitch.codegen.emit_values import LLVM, Operations, Value, literal
from stitch.codegen.loops import (
    Apply,
    Axis,
    Buffer,
    Clip,
    Contract,
    ContractLoop,
    Define,
    Expr,
    Fold,
    Gate,
    Guarded,
    Literal,
    Lookup,
    Loop,
    Phase,
    Position,
    Prefetch,
    Program,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
    expressions,
    walk,
)
from stitch.codegen.sums import block_of
from stitch.codegen.transpose import transpose_kernel
from stitch.dims import Dim
from stitch.stitching.schemes import estimate
from stitch.target import Target

ALIGNMENT = 64

STREAMED = 4 << 20
"""Bytes of a buffer from which stores may go past the caches."""


@dataclass(frozen=True)
class Code:
    """A program as text: its phase functions in order, and what else they need in the module, by name."""

    text: str
    functions: tuple[str, ...]
    kernels: Mapping[str, str]  # declarations, constants and micro-kernels, which programs share
    scratch: Dim  # bytes for each worker


def emit(program: Program, target: Target) -> Code:
    """The code of a program that passes `check`."""
    offsets, scratch = scratch_layout(program)
    kernels: dict[str, str] = {}
    texts, names = [], []
    for k, phase in enumerate(program.phases):
        names.append(f"{program.name}.{k}")
        texts.append(_Phase(program, target, offsets, kernels).emit(names[-1], phase))
    return Code("\n".join(texts), tuple(names), kernels, scratch)


def module(codes: Iterable[Code], triple: str = "") -> str:
    """A module of many programs' code."""
    kernels: dict[str, str] = {}
    texts = []
    for code in codes:
        kernels |= code.kernels
        texts.append(code.text)
    head = [f'target triple = "{triple}"'] if triple else []
    return "\n".join([*head, *(kernels[k] for k in sorted(kernels)), *texts, ""])


def streamed(program: Program, phase: Phase, target: Target) -> dict[Buffer, Dim]:
    """The buffers that a phase stores past the caches: large ones that the kernel does not read, where what it walks is
    more than the last cache holds. Such a store need not read the line first, which is a third of all traffic in a
    chain of one input and one output. x86 only: elsewhere the order of such stores is another matter.

    With each buffer, what must be positive when the kernel runs. Where sizes are open, the buffer alone must be more
    than the cache holds: whoever reads it next does not find it there anyway."""
    sizes = {b: b.size * b.dtype.itemsize for b in program.buffers}
    if not target.is_x86:
        return {}
    fixed = all(isinstance(n, int) for n in sizes.values())
    if fixed and sum(n for n in sizes.values() if isinstance(n, int)) <= target.l3_bytes:
        return {}
    least = STREAMED if fixed else max(STREAMED, target.l3_bytes)
    read = {x.buffer for p in program.phases for t in walk(p.body) for e in expressions(t) for x in nodes(e)
            if isinstance(x, Read)}  # fmt: skip
    read |= {t.source for p in program.phases for t in walk(p.body) if isinstance(t, Transpose)}
    found = stored_in(phase.body) - read
    return {b: n - least + 1 for b, n in sizes.items() if b in found and estimate(n) >= least}


def scratch_layout(program: Program) -> tuple[dict[Buffer, Dim], Dim]:
    """The offset of each tile in a worker's scratch, and the size of all, in bytes."""
    offsets: dict[Buffer, Dim] = {}
    total: Dim = 0
    for tile in program.tiles:
        offsets[tile] = total
        total = total + dims.ceil_div(tile.size * tile.dtype.itemsize, ALIGNMENT) * ALIGNMENT
    return offsets, total


class _Phase:
    """The emission of one phase."""

    def __init__(
        self, program: Program, target: Target, offsets: Mapping[Buffer, Dim], kernels: dict[str, str]
    ) -> None:
        self.program, self.target, self.offsets, self.kernels = program, target, offsets, kernels
        self.w = Writer()
        self.o = Operations(self.w, target.fma, vector_isa(target), target.has("avx512bf16"))
        words = len(program.buffers)
        self.words = {s: words + i for i, s in enumerate(program.symbols)}
        self.scratch = words + len(program.symbols)
        self.d = Dims(self.w, _Lazy(lambda s: self._word(self.words[s], "i64")))
        self.m = Memory(self.o, self.d, self._base, target.f16c)
        self.memo: list[dict[tuple[Expr, Guard], tuple[Value, frozenset[Buffer]]]] = [{}]

    def emit(self, name: str, phase: Phase) -> str:
        stored = stored_in(phase.body)
        self.m.streamed = streamed(self.program, phase, self.target)
        self.readers = endings.readers(phase)
        self.w.repeat("%begin", "%end", 1, [], lambda task, _: self._task(phase, task), stored)
        if self.m.streamed:  # what was stored past the caches is seen by all from here on
            self.w.effect("call void @llvm.x86.sse.sfence()")
            self.kernels["!0"] = "!0 = !{i32 1}"
            self.kernels["sfence"] = "declare void @llvm.x86.sse.sfence()"
        self.kernels |= self.o.declared
        bits = self.target.vector_bits
        attributes = f'nounwind "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
        head = f"define void @{name}(ptr %args, i64 %begin, i64 %end, i64 %worker) {attributes}"
        text = self.w.text()
        if ZEROS in text:
            self.kernels[ZEROS] = f"{ZEROS} = private constant [1024 x i8] zeroinitializer, align 64"
        return f"{head} {{\n{text}\n}}\n"

    # ------------------------------------------------------------------ arguments

    def _word(self, number: int, kind: str) -> str:
        p = self.w.pure(f"getelementptr i64, ptr %args, i64 {number}")
        return self.w.pure(f"load {kind}, ptr {p}", p)

    def _base(self, buffer: Buffer) -> str:
        if buffer.space == "global":
            return self._word(self.program.buffers.index(buffer), "ptr")
        start, stride = self._word(self.scratch, "ptr"), self._word(self.scratch + 1, "i64")
        offset = self.d.add(self.d.mul(stride, "%worker"), self.d.value(self.offsets[buffer]))
        return self.w.pure(f"getelementptr i8, ptr {start}, i64 {offset}", start, offset)

    def _task(self, phase: Phase, task: str | int) -> Sequence[str]:
        """Splits the number of a task into the places of the phase's axes, and does the task."""
        rest = str(task)
        axes = [a for a in phase.axes if a.extent != 1]
        self.m.places |= dict.fromkeys(phase.axes, ("", 0))
        for axis in reversed(axes[1:]):
            extent = self.d.value(axis.extent)
            self.m.places[axis] = (self.w.pure(f"urem i64 {rest}, {extent}", rest, extent), 0)
            rest = self.w.pure(f"udiv i64 {rest}, {extent}", rest, extent)
        if axes:
            self.m.places[axes[0]] = (rest, 0)
        self._body(phase.body)
        return []

    # ------------------------------------------------------------------ statements

    def _body(self, body: tuple[Stmt, ...]) -> None:
        done: Stmt | None = None
        for s, after in zip_longest(body, body[1:]):
            match s:
                case _ if s is done:
                    pass
                case Define():
                    self.m.locals[s.local] = self._value(s.value)
                case Store():
                    self.m.store(s.buffer, s.index, self._value(s.value))
                    self._forget({s.buffer})
                case Loop(mode="vector"):
                    self._vector_loop(s)
                case Loop():
                    self._serial_loop(s)
                case Contract():
                    ending = endings.of(s, after, self.readers, self.target)
                    if ending is not None and not stored_in((ending.lanes,)) & self.m.streamed.keys():
                        self._ended(ending, (s, after))
                        done = after
                    else:
                        self._contract(s)
                        self._forget({s.tile})
                case Transpose():
                    self._transpose(s)
                    self._forget({s.to})
                case Prefetch():
                    self.m.prefetch(s.buffer, s.index, s.near)
                    self.kernels["prefetch"] = "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"

    def _forget(self, buffers: Iterable[Buffer]) -> None:
        """Forgets expressions that read what has been, or will be, stored."""
        gone = set(buffers)
        for frame in self.memo:
            for key in [k for k, (_, read) in frame.items() if read & gone]:
                del frame[key]

    def _trips(self, axis: Axis, clip: Clip | Gate | None) -> int | str:
        if clip is None:
            return axis.extent if isinstance(axis.extent, int) else self.d.value(axis.extent)
        if isinstance(clip, Gate):
            open_ = self.m.within(clip.bounds).parts[0]
            some, none = self.d.value(axis.extent), "0"
            return self.d.select(open_, *((none, some) if clip.without else (some, none)))
        name, number = self.m.places[clip.outer]
        before = self.d.mul(str(-clip.block), name) if name else "0"
        left = self.d.add(before, self.d.value(clip.limit - clip.block * number))
        short = self.w.pure(f"icmp slt i64 {left}, {clip.block}", left)
        return self.d.select(short, left, str(clip.block))

    def _inside(self, loop: Loop, place: tuple[str, int], accumulators: list[Value], chained: bool) -> list[Value]:
        """One iteration of a loop at this place: its body, then its folds' new accumulators, and then, if they were
        given too, the new marks of the folds that have some."""
        self.m.places[loop.axis] = place
        self.memo.append({})
        self._body(loop.body)
        masked = loop.mode == "vector" and self.m.tail is not None
        marked = self._marked(loop) if len(accumulators) > len(loop.folds) else []
        folded = [
            self._folded(f, a, chained, masked, f in marked) for f, a in zip(loop.folds, accumulators, strict=False)
        ]
        marks = accumulators[len(loop.folds) :]
        folded += [self._numbers(self._value(f.value), m) for f, m in zip(marked, marks, strict=True)]
        self.memo.pop()
        return folded

    def _marked(self, loop: Loop) -> list[Fold]:
        """The folds of a vector loop that take the larger or smaller of numbers alone, and mark beside it the lanes
        that had nothing else: with registers for marks this is half of the instructions, and NaN wins once, in the
        end."""
        if self.o.isa != "avx512":
            return []
        return [f for f in loop.folds if f.op in ("max", "min") and dtypes.is_float(f.local.dtype)]

    def _numbers(self, x: Value, marks: Value) -> Value:
        """The marks, but of lanes in which x is NaN: one comparison for two vectors."""
        o, parts = self.o, self.o.parts(x)
        if self.m.tail is not None:
            number = o.compare("ord", x, x)
            beyond = o.binary("xor", Value(dtypes.BOOL, self.m.tail, True), literal(True, dtypes.BOOL))
            found = list(o.binary("or", number, beyond).parts)
        else:
            pairs = [(parts[k], parts[min(k + 1, len(parts) - 1)]) for k in range(0, len(parts), 2)]
            kind = o.type(x.dtype, True)
            found = [self.w.pure(f"fcmp ord {kind} {a}, {b}", a, b) for a, b in pairs]
        test, names = o.type(dtypes.BOOL, True), list(marks.parts)
        for k, name in enumerate(found):  # chained, there is one for all
            old = names[k % len(names)]
            names[k % len(names)] = self.w.pure(f"and {test} {old}, {name}", old, name)
        return Value(dtypes.BOOL, tuple(names), True)

    def _folded(self, fold: Fold, accumulator: Value, chained: bool, masked: bool, marked: bool = False) -> Value:
        product = multiply_add(fold.op, (Literal(0, fold.local.dtype), fold.value))
        terms = [self._value(e) for e in (product[:2] if product else (fold.value,))]
        if not chained:
            new = self._combined(fold, terms, accumulator, marked)
            return self._masked(new, accumulator) if masked else new
        total = accumulator  # one vector, to which the copies are added in turn
        columns = [self.o.parts(t) for t in terms]
        copies, self.o.copies = self.o.copies, 1
        for u in range(copies):
            now = [Value(t.dtype, (c[u],), True) for t, c in zip(terms, columns, strict=True)]
            total = self._combined(fold, now, total, marked)
        self.o.copies = copies
        return total

    def _combined(self, fold: Fold, terms: list[Value], accumulator: Value, marked: bool = False) -> Value:
        if len(terms) == 2:
            return self.o.multiply_add(terms[0], terms[1], accumulator)
        if marked:
            return beyond(self.o, fold.op, accumulator, terms[0])
        return primitives.apply(self.o, fold.op, (accumulator, terms[0]), fold.local.dtype)

    def _masked(self, new: Value, old: Value) -> Value:
        """`new` in the lanes that exist."""
        assert self.m.tail is not None
        return self.o.select(Value(dtypes.BOOL, self.m.tail, True), self.o.widen(new), old)

    def _identity(self, fold: Fold) -> Value:
        return literal(identity(fold.op, fold.local.dtype), fold.local.dtype)

    def _serial_loop(self, s: Loop) -> None:
        """Folds inside a vector loop have an accumulator for each lane."""
        trips = self._trips(s.axis, s.clip)
        stored = stored_in(s.body)
        self._forget(stored)
        varying = self.m.lane_axis is not None
        totals = [self.o.widen(i) if varying else i for i in map(self._identity, s.folds)]
        if isinstance(trips, int) and unrolls(s):
            for k in range(trips):
                totals = self._inside(s, ("", k), totals, False)
        else:
            folds = [f for f, t in zip(s.folds, totals, strict=True) for _ in t.parts]
            kinds = [self.o.type(t.dtype, t.varying) for t in totals for _ in t.parts]
            carried = list(zip(kinds, [p for t in totals for p in t.parts], strict=True))

            def body(at: str | int, names: list[str]) -> list[str]:
                place = (at, 0) if isinstance(at, str) else ("", at)
                now = _regrouped(totals, names)
                return [
                    p for v in self._inside(s, place, now, False) for p in (self.o.parts(v) if varying else v.parts)
                ]

            if s.unroll > 1 and not s.folds:
                self.w.repeat(self._stepped(s, trips, stored), trips, 1, [], body, stored)
            else:
                totals = _regrouped(totals, in_blocks(self.w, self.d, folds, trips, 1, carried, body, stored))
        for fold, total in zip(s.folds, totals, strict=True):
            self.m.locals[fold.local] = total

    def _stepped(self, s: Loop, trips: int | str, stored: frozenset[Buffer]) -> int | str:
        """The iterations of a serial loop that are written out `unroll` at a time; where the rest of them starts."""

        def body(at: str | int, _: list[str]) -> list[str]:
            for k in range(s.unroll):
                self._inside(s, (at, k) if isinstance(at, str) else ("", at + k), [], False)
            return []

        if isinstance(trips, int):
            stop: int | str = trips - trips % s.unroll
        else:
            over = self.w.pure(f"urem i64 {trips}, {s.unroll}", trips)
            stop = self.w.pure(f"sub i64 {trips}, {over}", trips, over)
        self.w.repeat(0, stop, s.unroll, [], body, stored)
        self._forget(stored)
        return stop

    # ------------------------------------------------------------------ vector loops

    def _vector_loop(self, s: Loop) -> None:
        width, unroll = lanes_of(s, self.target), s.unroll
        n = self._trips(s.axis, s.clip)
        self._forget(stored_in(s.body))
        self.o.width, self.m.lane_axis = width, s.axis
        first = [self.o.splat(i.parts[0], LLVM[i.dtype]) for i in map(self._identity, s.folds)]
        wide = [[name] * unroll for name in first]  # accumulators, by fold and copy; then marks
        marked = self._marked(s)
        wide += [["splat (i1 true)"] * -(-unroll // 2) for _ in marked]
        block = unroll * width
        if isinstance(n, int):
            main, rest = n - n % block, n % block
            wide = self._span(s, 0, main, unroll, wide)
            full = rest // width
            head = [row[:1] for row in wide]
            if full:
                head = self._span(s, main, main + full * width, full, head, chained=True)
            if rest % width:
                mask = f"<{', '.join(f'i1 {str(k < rest % width).lower()}' for k in range(width))}>"
                head = self._span(s, n - rest % width, n, 1, head, mask=lambda at: mask)
            combine = 1 if main == 0 else unroll
        else:
            over = self.w.pure(f"urem i64 {n}, {block}", n) if not _power(block) else None
            over = over or self.w.pure(f"and i64 {n}, {block - 1}", n)
            main_end = self.w.pure(f"sub i64 {n}, {over}", n, over)
            wide = self._span(s, 0, main_end, unroll, wide)
            head = [row[:1] for row in wide]
            start = main_end
            cheap = self._masks_are_cheap(s)
            if unroll > 1 and not cheap:
                part = self.w.pure(f"and i64 {n}, {width - 1}", n)
                start = self.w.pure(f"sub i64 {n}, {part}", n, part)
                head = self._span(s, main_end, start, 1, head)
            once = unroll == 1 or not cheap
            if not _in_step(s.clip, block):
                head = self._span(s, start, n, 1, head, mask=lambda at: self._tail_mask(at, n), once=once)
            combine = unroll
        self.o.copies = 1
        for k, fold in enumerate(s.folds):
            row = len(s.folds) + marked.index(fold) if fold in marked else None
            marks = None if row is None else [*head[row], *wide[row][1 : -(-combine // 2)]]
            self.m.locals[fold.local] = self._across(fold, [*head[k], *wide[k][1:combine]], marks)
        self.o.width, self.m.lane_axis = 1, None

    def _masks_are_cheap(self, s: Loop) -> bool:
        """Whether full vectors may as well be done under a mask. AVX2 has masks for 32 and 64 bits only."""
        read = [x.buffer for t in walk((s,)) for e in expressions(t) for x in nodes(e) if isinstance(x, Read)]
        narrow = any(b.dtype.itemsize < 4 for b in (*read, *stored_in((s,))))
        return self.target.masked and (not narrow or self.target.has("avx512bw"))

    def _tail_mask(self, at: str | int, n: str) -> str:
        left = self.w.pure(f"sub i64 {n}, {at}", n, str(at))
        short = self.w.pure(f"trunc i64 {left} to i32", left)
        limit = self.o.splat(short, "i32")
        return self.w.pure(f"icmp slt <{self.o.width} x i32> {self.m.iota('i32')}, {limit}", limit)

    def _span(
        self,
        s: Loop,
        start: str | int,
        stop: str | int,
        copies: int,
        accumulators: list[list[str]],
        chained: bool = False,
        mask: Callable[[str | int], str] | None = None,
        once: bool = False,
    ) -> list[list[str]]:
        """Iterations [start, stop) of a vector loop, `copies` vectors at a time, each with accumulators of its own,
        or, `chained`, all with one."""
        self.o.copies = copies
        marked = self._marked(s)
        dtype = [*(f.local.dtype for f in s.folds), *(dtypes.BOOL for _ in marked)]
        like = [Value(d, tuple(row), True) for d, row in zip(dtype, accumulators, strict=True)]
        carried = [(self.o.type(v.dtype, True), name) for v in like for name in v.parts]

        def body(at: str | int, names: list[str]) -> list[str]:
            rows = _regrouped(like, names)
            self.m.tail = None if mask is None else (mask(at),)
            place = (at, 0) if isinstance(at, str) else ("", at)
            folded = self._inside(s, place, rows, chained)
            self.m.tail = None
            return [name for v in folded for name in v.parts]

        step, stored = copies * self.o.width, stored_in(s.body)
        if start == 0 and mask is None and not chained:
            folds = [f for f, v in zip((*s.folds, *marked), like, strict=True) for _ in v.parts]
            names = in_blocks(self.w, self.d, folds, stop, step, carried, body, stored, opaque=True)
        else:  # what is left are a few
            names = self.w.repeat(start, stop, step, carried, body, stored, once, opaque=True)
        return [list(v.parts) for v in _regrouped(like, names)]

    def _across(self, fold: Fold, accumulators: list[str], marks: list[str] | None = None) -> Value:
        """Neighbouring accumulators are combined until one is left, then halves of it until one lane is. `marks`: of
        the lanes of which numbers alone were taken; if not of all, NaN it is."""
        dtype = fold.local.dtype
        o, width = self.o, self.o.width

        def combined(a: Value, b: Value) -> Value:
            return primitives.apply(o, fold.op, (a, b), dtype) if marks is None else beyond(o, fold.op, a, b)

        while len(accumulators) > 1:
            pairs = [accumulators[i : i + 2] for i in range(0, len(accumulators), 2)]
            accumulators = [
                combined(Value(dtype, (p[0],), True), Value(dtype, (p[1],), True)).parts[0] if len(p) == 2 else p[0]
                for p in pairs
            ]
        name = accumulators[0]
        while o.width > 2:
            kind, half = o.type(dtype, True), o.width // 2
            low, high = (f"<{', '.join(f'i32 {k}' for k in range(start, start + half))}>" for start in (0, half))
            parts = [
                self.w.pure(f"shufflevector {kind} {name}, {kind} poison, <{half} x i32> {order}", name)
                for order in (low, high)
            ]
            o.width = half
            a, b = (Value(dtype, (p,), True) for p in parts)
            name = combined(a, b).parts[0]
        kind = o.type(dtype, True)
        lanes = [self.w.pure(f"extractelement {kind} {name}, i64 {k}", name) for k in range(o.width)]
        a = Value(dtype, (lanes[0],))
        o.width = width
        total = combined(a, Value(dtype, (lanes[1],))) if len(lanes) == 2 else a
        return total if marks is None else o.select(self._all(marks), total, literal(math.nan, dtype))

    def _all(self, marks: list[str]) -> Value:
        """Whether all lanes are marked."""
        n, total = self.o.width, marks[0]
        for m in marks[1:]:
            total = self.w.pure(f"and <{n} x i1> {total}, {m}", total, m)
        bits = self.w.pure(f"bitcast <{n} x i1> {total} to i{n}", total)
        return Value(dtypes.BOOL, (self.w.pure(f"icmp eq i{n} {bits}, -1", bits),))

    # ------------------------------------------------------------------ calls of shared functions

    def _ended(self, e: endings.Epilogue, plain: tuple[Stmt, ...]) -> None:
        """A contraction with its epilogue: on registers where the tile is whole, else as it is written."""
        stored = stored_in(plain)
        self._forget(stored)
        counts = [(self._trips(Axis("rows", e.contract.rows), e.contract.clip), e.contract.rows)]
        counts += [(self._trips(e.lanes.axis, e.lanes.clip), e.width)]
        tests = [self.w.pure(f"icmp eq i64 {n}, {all_}", n) for n, all_ in counts if isinstance(n, str)]
        if not tests:
            return self._call_ended(e, stored)
        whole = tests[0] if len(tests) == 1 else self.w.pure(f"and i1 {tests[0]}, {tests[1]}", *tests)
        for wanted, do in (("1", lambda: self._call_ended(e, stored)), ("0", lambda: self._plain(plain))):
            test = self.w.pure(f"icmp eq i1 {whole}, {wanted}", whole)
            count = self.w.pure(f"zext i1 {test} to i64", test)

            def body(_: str | int, __: list[str], do: Callable[[], None] = do) -> list[str]:
                self.memo.append({})
                do()
                self.memo.pop()
                return []

            self.w.repeat(0, count, 1, [], body, stored, once=True)
        self._forget(stored)
        return None

    def _plain(self, body: tuple[Stmt, ...]) -> None:
        contract, *rest = body
        assert isinstance(contract, Contract)
        self._contract(contract)
        self._forget({contract.tile})
        self._body(tuple(rest))

    def _call_ended(self, e: endings.Epilogue, stored: frozenset[Buffer]) -> None:
        name = endings.kernel(self.kernels, self.target, e)
        given = []
        for p in e.pointers:
            given += [f"ptr {self.m.pointer(p.buffer, p.base)}"]
            given += [] if isinstance(p.step, int) else [f"i64 {self.d.value(p.step)}"]
        a, row, b, table = self._operands(e.contract)
        self.w.effect(f"call void @{name}({', '.join([a, row, b, table, *given])})")
        for buffer in stored:
            self.w.effect("", buffer)
        self._forget(stored)

    def _operands(self, s: Contract) -> tuple[str, str, str, str]:
        """What a micro-kernel gets: a, its row stride, b, and the loops."""
        padded = (*[ContractLoop(1, 0, 0)] * (3 - len(s.loops)), *s.loops)
        words = [*(k.extent for k in padded), *(k.a_stride for k in padded), *(k.b_stride for k in padded)]
        table = self.w.table([self.d.value(x) for x in words])
        a, b = self.m.pointer(s.a, s.a_index), self.m.pointer(s.b, s.b_index)
        return f"ptr {a}", f"i64 {self.d.value(s.a_row)}", f"ptr {b}", f"ptr {table}"

    def _contract(self, s: Contract) -> None:
        dtype = s.tile.dtype
        width = s.vectors * self.target.lanes(dtype)
        unit = s.loops[-1].a_stride == 1
        terms = dims.product(k.extent for k in s.loops)
        short = isinstance(terms, int) and terms <= block_of(terms)
        clipped, ahead = s.clip is not None, s.ahead and unit
        name = tile_kernel(self.kernels, self.target, dtype, s.rows, s.vectors, unit, clipped, short, ahead)
        a, row, b, table = self._operands(s)
        to = self._base(s.tile) if s.tile_row is None else self.m.pointer(s.tile, s.tile_index)
        step = self.d.value(width if s.tile_row is None else s.tile_row)
        given = f"{a}, {row}, {b}, ptr {to}, i64 {step}, {table}"
        rows = f", i64 {self._trips(Axis('rows', s.rows), s.clip)}" if s.clip is not None else ""
        self.w.effect(f"call void @{name}({given}{rows})", s.tile)

    def _transpose(self, s: Transpose) -> None:
        rows, columns = self._trips(s.rows, s.row_clip), self._trips(s.columns, s.column_clip)
        numbers = (s.to_step, s.step, rows, columns)
        fixed = tuple(x if isinstance(x, int) else None for x in numbers)
        name = transpose_kernel(self.kernels, self.target, s.to.dtype.itemsize, *fixed)
        to, source = self.m.pointer(s.to, s.to_index), self.m.pointer(s.source, s.index)
        given = f"ptr {to}, i64 {self.d.value(s.to_step)}, ptr {source}, i64 {self.d.value(s.step)}"
        self.w.effect(f"call void @{name}({given}, i64 {rows}, i64 {columns})", s.to)

    # ------------------------------------------------------------------ expressions

    def _value(self, e: Expr) -> Value:
        """The value of an expression; a shared object is computed once."""
        return self._visit(e)[0]

    def _known(self, e: Expr) -> tuple[Value, frozenset[Buffer]] | None:
        key = (e, self.m.guard)
        for frame in reversed(self.memo):
            if key in frame:
                return frame[key]
        return None

    def _visit(self, e: Expr) -> tuple[Value, frozenset[Buffer]]:
        """The value, and the buffers that were read for it. Without recursion: chains of operators may be long."""
        stack = [e]
        while stack:
            x = stack[-1]
            if self._known(x) is None:
                waiting = [c for c in _operands(x) if self._known(c) is None]
                if waiting:
                    stack += reversed(waiting)
                    continue
                self.memo[-1][x, self.m.guard] = self._computed(x)
            stack.pop()
        found = self._known(e)
        assert found is not None
        return found

    def _computed(self, e: Expr) -> tuple[Value, frozenset[Buffer]]:
        none: frozenset[Buffer] = frozenset()
        match e:
            case Literal():
                return literal(e.value, e.dtype), none
            case Read():
                return self.m.load(e.buffer, e.index), frozenset([e.buffer])
            case Use():
                return self.m.locals[e.local], none
            case Position():
                return self.m.position(e.index), none
            case Guarded():
                return self._guarded(e)
            case Apply():
                return self._applied(e)
            case Lookup():
                at, read = self._visit(e.at)
                return looked_up(self.o, e.table, at, e.dtype), read

    def _applied(self, e: Apply) -> tuple[Value, frozenset[Buffer]]:
        if e.prim == "cast" and e.dtype == dtypes.INT32 and isinstance(e.args[0], Position):
            return self.m.position(e.args[0].index, e.dtype), frozenset()
        operands = _operands(e)
        found = [self._visit(a) for a in operands]
        values = [v for v, _ in found]
        fused = operands is not e.args
        value = self.o.multiply_add(*values) if fused else primitives.apply(self.o, e.prim, values, e.dtype)
        if e.most is not None:
            self.o.most[value] = e.most
        if e.rounded is not None:
            bits = storage.to_memory(self.o, value, e.rounded, self.m.has_half)
            value = storage.from_memory(self.o, bits, e.rounded)
        return value, frozenset().union(*(read for _, read in found))

    def _guarded(self, e: Guarded) -> tuple[Value, frozenset[Buffer]]:
        """The value is computed everywhere, but loads only where the guard allows; then one of the two is chosen. What
        is loaded elsewhere is zeros, so that there is nothing to choose if zero is the other, as for padding."""
        condition = self.m.within(e.bounds)
        if condition.parts == ("false",):
            return literal(e.otherwise.value, e.dtype), frozenset()
        saved, self.m.guard = self.m.guard, self.m.narrowed(condition)
        value, read = self._visit(e.value)
        self.m.guard = saved
        if isinstance(e.value, Read) and _is_zero(e.otherwise) and (value.varying or not condition.varying):
            return value, read
        return self.o.select(condition, value, literal(e.otherwise.value, e.dtype)), read


class _Lazy(dict[str, str]):
    """Symbols are loaded when they are first used."""

    def __init__(self, load: Callable[[str], str]) -> None:
        super().__init__()
        self.load = load

    def __missing__(self, symbol: str) -> str:
        return self.load(symbol)


def _operands(e: Expr) -> tuple[Expr, ...]:
    """What a primitive is computed from: of a contracted sum, the product's factors."""
    if isinstance(e, Lookup):
        return (e.at,)
    return (multiply_add(e.prim, e.args) or e.args) if isinstance(e, Apply) else ()


def _regrouped(like: list[Value], names: list[str]) -> list[Value]:
    """Values like those, with these parts."""
    rest = iter(names)
    return [Value(v.dtype, tuple(next(rest) for _ in v.parts), v.varying) for v in like]


def _in_step(clip: Clip | Gate | None, block: int) -> bool:
    """Whether a loop so clipped runs over whole blocks of vectors only."""
    return isinstance(clip, Clip) and clip.block % block == 0 and clip.limit % block == 0


def _is_zero(e: Literal) -> bool:
    return e.value == 0 and math.copysign(1, e.value) == 1


def _power(n: int) -> bool:
    return n & (n - 1) == 0
