"""Whole numbers of 64 bits computed in 32, where none of them can be larger.

    before:  vector i < 128 { first min= where(eq(x[i], max), <i>, 128) }          <i>: the position, an int64
    after:   vector i < 128 { first' min= where(eq(x[i], max), cast.int32(<i>), 128) }    first: cast.int64(first')

ONNX counts in 64 bits: positions, and what is found by comparing with them, as an ArgMax or a one-hot code. Beside
float32 such a vector takes two registers, and twice the instructions. What a number can be follows from the extents of
loops, as far as they are known; what comes from memory stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from stitch.access import Axis, Index
from stitch.codegen.loops import (
    Apply,
    Define,
    Expr,
    Fold,
    Gate,
    Guarded,
    Literal,
    Local,
    Loop,
    Phase,
    Position,
    Stmt,
    Store,
    Use,
    walk,
)
from stitch.dtypes import INT32, INT64, highest, lowest

Bounds = tuple[int, int]  # the least and the largest


def narrowed(phase: Phase) -> Phase:
    """The phase, its whole numbers no wider than they need to be."""
    count = Counter(f.local for s in walk(phase.body) if isinstance(s, Loop) for f in s.folds)
    return replace(phase, body=_Narrowing({x for x, n in count.items() if n == 1}).body(phase.body))


class _Narrowing:
    def __init__(self, once: Collection[Local]) -> None:
        self.once = once  # the locals of one fold: what stands for them is known wherever they are used
        self.folded: dict[Local, tuple[Local, Bounds]] = {}  # by the local of 64 bits: the other, and its bounds
        self.memo: dict[int, Expr] = {}
        self.thin: dict[int, tuple[Expr, Bounds] | None] = {}
        self.held: list[Expr] = []  # keeps the ids alive

    def body(self, body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
        return tuple(self.statement(s) for s in body)

    def statement(self, s: Stmt) -> Stmt:
        match s:
            case Loop():
                inner = self.body(s.body)
                return replace(s, body=inner, folds=tuple(self.fold(f, s) for f in s.folds))
            case Define() | Store():
                return replace(s, value=self.expr(s.value))
            case _:
                return s

    def fold(self, f: Fold, loop: Loop) -> Fold:
        some = isinstance(loop.axis.extent, int) and loop.axis.extent > 0 and not isinstance(loop.clip, Gate)
        chosen = f.op in ("min", "max") and f.local.dtype == INT64 and f.local in self.once
        thin = self.narrow(f.value) if chosen and some and isinstance(f.value, Apply) else None
        if thin is None:
            return replace(f, value=self.expr(f.value))
        local = Local(f.local.name, INT32)
        self.folded[f.local] = local, thin[1]
        return Fold(local, f.op, thin[0])

    def expr(self, e: Expr) -> Expr:
        """The same value, of the same type."""
        if id(e) not in self.memo:
            self.held.append(e)
            self.memo[id(e)] = self._expr(e)
        return self.memo[id(e)]

    def _expr(self, e: Expr) -> Expr:
        match e:
            case Use() if e.local in self.folded:
                return Apply("cast", (Use(self.folded[e.local][0]),), INT64)
            case Guarded():
                return replace(e, value=self.expr(e.value))
            case Apply():
                if e.dtype == INT64 and (thin := self.narrow(e)) is not None:
                    return Apply("cast", (thin[0],), INT64)
                if e.prim in ("eq", "ne", "lt", "le") and e.args[0].dtype == INT64:
                    left, right = (self.narrow(a) for a in e.args)
                    if left is not None and right is not None:
                        return replace(e, args=(left[0], right[0]))
                args = tuple(self.expr(a) for a in e.args)
                return e if all(a is b for a, b in zip(args, e.args, strict=True)) else replace(e, args=args)
            case _:
                return e

    def narrow(self, e: Expr) -> tuple[Expr, Bounds] | None:
        """The same number as an int32, and its bounds, if it is known to be one."""
        if id(e) not in self.thin:
            self.held.append(e)
            found = self._narrow(e)
            self.thin[id(e)] = found if found is not None and _fits(found[1]) else None
        return self.thin[id(e)]

    def _narrow(self, e: Expr) -> tuple[Expr, Bounds] | None:
        match e:
            case Literal():
                return Literal(e.value, INT32), (int(e.value), int(e.value))
            case Position():
                at = _places(e.index)
                return None if at is None else (Apply("cast", (e,), INT32), at)
            case Use():
                known = self.folded.get(e.local)
                return None if known is None else (Use(known[0]), known[1])
            case Apply():
                return self._applied(e)
            case _:
                return None

    def _applied(self, e: Apply) -> tuple[Expr, Bounds] | None:
        if e.prim not in ("add", "sub", "min", "max", "where"):
            return None
        left, right = (self.narrow(a) for a in e.args[-2:])
        if left is None or right is None:
            return None
        (x, (a, b)), (y, (c, d)) = left, right
        match e.prim:
            case "add":
                return Apply("add", (x, y), INT32), (a + c, b + d)
            case "sub":
                return Apply("sub", (x, y), INT32), (a - d, b - c)
            case "where":
                return Apply("where", (self.expr(e.args[0]), x, y), INT32), (min(a, c), max(b, d))
            case _:
                pick = min if e.prim == "min" else max
                return Apply(e.prim, (x, y), INT32), (pick(a, c), pick(b, d))


def _fits(bounds: Bounds) -> bool:
    return bool(lowest(INT32) <= bounds[0] and bounds[1] <= highest(INT32))


def _places(index: Index) -> Bounds | None:
    """The least and the largest value of an index, where that is known."""
    low, high = index.offset, index.offset
    for v, c in index.terms:
        if not (isinstance(v, Axis) and isinstance(v.extent, int) and isinstance(c, int) and v.extent > 0):
            return None
        low, high = low + min(c * (v.extent - 1), 0), high + max(c * (v.extent - 1), 0)
    return (low, high) if isinstance(low, int) and isinstance(high, int) else None
