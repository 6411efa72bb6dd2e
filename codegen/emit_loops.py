"""Loops, serial ones and vectors: how many iterations there are, side by side, one at a time, and under a mask."""

from __future__ import annotations

from collections.abc import Callable

from stitch import dtypes
from stitch.codegen.emit_expressions import Expressions
from stitch.codegen.emit_folds import Folds
from stitch.codegen.emit_memory import Memory
from stitch.codegen.emit_rules import lanes_of, nodes, stored_in, unrolls
from stitch.codegen.emit_sums import in_blocks
from stitch.codegen.emit_values import LLVM, Operations, Value
from stitch.codegen.loops import Axis, Buffer, Clip, Gate, Loop, Read, Stmt, expressions, walk
from stitch.target import Target


def trips_of(m: Memory, axis: Axis, clip: Clip | Gate | None) -> int | str:
    """How many iterations a loop has that is clipped so: a number, or the name of one."""
    if clip is None:
        return axis.extent if isinstance(axis.extent, int) else m.d.value(axis.extent)
    if isinstance(clip, Gate):
        open_ = m.within(clip.bounds).parts[0]
        some, none = m.d.value(axis.extent), "0"
        return m.d.select(open_, *((none, some) if clip.without else (some, none)))
    name, number = m.places[clip.outer]
    before = m.d.mul(str(-clip.block), name) if name else "0"
    left = m.d.add(before, m.d.value(clip.limit - clip.block * number))
    short = m.w.pure(f"icmp slt i64 {left}, {clip.block}", left)
    return m.d.select(short, left, str(clip.block))


class Loops:
    """The loops of a phase. `body` emits what is in them."""

    def __init__(
        self, target: Target, o: Operations, m: Memory, values: Expressions, body: Callable[[tuple[Stmt, ...]], None]
    ) -> None:
        self.target, self.o, self.w, self.d, self.m, self.values, self.body = target, o, o.w, m.d, m, values, body
        self.folds = Folds(o, m, values)

    def _inside(self, loop: Loop, place: tuple[str, int], accumulators: list[Value], chained: bool) -> list[Value]:
        """One iteration of a loop at this place: its body, then its folds' new accumulators, and then, if they were
        given too, the new marks of the folds that have some."""
        self.m.places[loop.axis] = place
        with self.values.inside():
            self.body(loop.body)
            masked = loop.mode == "vector" and self.m.tail is not None
            marked = self.folds.marked(loop) if len(accumulators) > len(loop.folds) else []
            folded = [
                self.folds.folded(f, a, chained, masked, f in marked)
                for f, a in zip(loop.folds, accumulators, strict=False)
            ]
            marks = accumulators[len(loop.folds) :]
            folded += [self.folds.numbers(self.values.value(f.value), m) for f, m in zip(marked, marks, strict=True)]
        return folded

    # ------------------------------------------------------------------ serial loops

    def serial(self, s: Loop) -> None:
        """Folds inside a vector loop have an accumulator for each lane."""
        trips = trips_of(self.m, s.axis, s.clip)
        stored = stored_in(s.body)
        self.values.forget(stored)
        varying = self.m.lane_axis is not None
        totals = [self.o.widen(i) if varying else i for i in map(self.folds.identity, s.folds)]
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
        self.values.forget(stored)
        return stop

    # ------------------------------------------------------------------ vector loops

    def vector(self, s: Loop) -> None:
        width, unroll = lanes_of(s, self.target), s.unroll
        n = trips_of(self.m, s.axis, s.clip)
        self.values.forget(stored_in(s.body))
        self.o.width, self.m.lane_axis = width, s.axis
        first = [self.o.splat(i.parts[0], LLVM[i.dtype]) for i in map(self.folds.identity, s.folds)]
        wide = [[name] * unroll for name in first]  # accumulators, by fold and copy; then marks
        marked = self.folds.marked(s)
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
            self.m.locals[fold.local] = self.folds.across(fold, [*head[k], *wide[k][1:combine]], marks)
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
        marked = self.folds.marked(s)
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


def _regrouped(like: list[Value], names: list[str]) -> list[Value]:
    """Values like those, with these parts."""
    rest = iter(names)
    return [Value(v.dtype, tuple(next(rest) for _ in v.parts), v.varying) for v in like]


def _in_step(clip: Clip | Gate | None, block: int) -> bool:
    """Whether a loop so clipped runs over whole blocks of vectors only."""
    return isinstance(clip, Clip) and clip.block % block == 0 and clip.limit % block == 0


def _power(n: int) -> bool:
    return n & (n - 1) == 0
