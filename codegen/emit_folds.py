"""Folds: what one more element makes of an accumulator, and what all accumulators of a vector loop come to.

The order of all this is stated in `stitch.codegen.loops` and `stitch.codegen.emit_rules`.
"""

from __future__ import annotations

import math

from stitch import dtypes
from stitch.codegen import emit_primitives as primitives
from stitch.codegen.emit_casts import beyond
from stitch.codegen.emit_expressions import Expressions
from stitch.codegen.emit_memory import Memory
from stitch.codegen.emit_rules import identity, multiply_add
from stitch.codegen.emit_values import Operations, Value, literal
from stitch.codegen.loops import Fold, Literal, Loop


class Folds:
    """The folds of a phase's loops, at the point where the emitter stands."""

    def __init__(self, o: Operations, m: Memory, values: Expressions) -> None:
        self.o, self.w, self.m, self.values = o, o.w, m, values

    def identity(self, fold: Fold) -> Value:
        """Where an accumulator starts."""
        return literal(identity(fold.op, fold.local.dtype), fold.local.dtype)

    # ------------------------------------------------------------------ one more element

    def folded(self, fold: Fold, accumulator: Value, chained: bool, masked: bool, marked: bool = False) -> Value:
        """The accumulator with the fold's value at this place: copy by copy, or, `chained`, of all copies one after the
        other; `masked`, in the lanes that exist."""
        product = multiply_add(fold.op, (Literal(0, fold.local.dtype), fold.value))
        terms = [self.values.value(e) for e in (product[:2] if product else (fold.value,))]
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

    # ------------------------------------------------------------------ marks beside extremes

    def marked(self, loop: Loop) -> list[Fold]:
        """The folds of a vector loop that take the larger or smaller of numbers alone, and mark beside it the lanes
        that had nothing else: with registers for marks this is half of the instructions, and NaN wins once, in the
        end."""
        if self.o.isa != "avx512":
            return []
        return [f for f in loop.folds if f.op in ("max", "min") and dtypes.is_float(f.local.dtype)]

    def numbers(self, x: Value, marks: Value) -> Value:
        """The marks, but of lanes in which x is NaN: one comparison for two vectors."""
        o, parts = self.o, self.o.parts(x)
        if self.m.tail is not None:
            number = o.compare("ord", x, x)
            absent = o.binary("xor", Value(dtypes.BOOL, self.m.tail, True), literal(True, dtypes.BOOL))
            found = list(o.binary("or", number, absent).parts)
        else:
            pairs = [(parts[k], parts[min(k + 1, len(parts) - 1)]) for k in range(0, len(parts), 2)]
            kind = o.type(x.dtype, True)
            found = [self.w.pure(f"fcmp ord {kind} {a}, {b}", a, b) for a, b in pairs]
        test, names = o.type(dtypes.BOOL, True), list(marks.parts)
        for k, name in enumerate(found):  # chained, there is one for all
            old = names[k % len(names)]
            names[k % len(names)] = self.w.pure(f"and {test} {old}, {name}", old, name)
        return Value(dtypes.BOOL, tuple(names), True)

    # ------------------------------------------------------------------ all accumulators of a vector loop

    def across(self, fold: Fold, accumulators: list[str], marks: list[str] | None = None) -> Value:
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
