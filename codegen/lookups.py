"""Functions of one byte as tables: what a chain of operators makes of a number of 8 bits, for all 256 of them.

    before:  y[i] := cast.int8(min(max(rint(mul(sigmoid(mul(cast.float32(x[i]), 0.05)), 25.0)), -128.0), 127.0))
    after:   y[i] := table[x[i]]

Whatever lies between a dequantisation and the next quantisation, if there is no other input, is such a function, and
AVX-512 looks up 64 bytes by four instructions (VBMI). The table is what the interpreter makes of the same expression,
which are the bits that code for it would have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stitch import access
from stitch.access import Axis, Index
from stitch.codegen import interp
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Define,
    Expr,
    Fold,
    Guarded,
    Literal,
    Lookup,
    Loop,
    Phase,
    Program,
    Read,
    Stmt,
    Store,
    children,
    expressions,
    walk,
)
from stitch.dtypes import INT8, UINT8
from stitch.ops.primitives import PRIMITIVES
from stitch.target import Target

LEAST = 8.0
"""Vector instructions of float32 from which a table is worth its place in registers."""


def looked_up(phase: Phase, target: Target) -> Phase:
    """The phase, its functions of one byte as tables."""
    if not (target.is_x86 and target.vector_bits == 512 and target.has("avx512vbmi")):
        return phase
    tables = _Tables(target)
    body = tuple(tables.statement(s) for s in phase.body)
    if not tables.found:
        return phase
    before, after = _cost(phase.body), _cost(body)
    return replace(phase, body=body, grain=phase.grain * max(1, round(before / after)))


def _cost(body: tuple[Stmt, ...]) -> float:
    seen: set[int] = set()
    stack = [e for s in walk(body) for e in expressions(s)]
    total = 1.0
    while stack:
        e = stack.pop()
        if id(e) not in seen:
            seen.add(id(e))
            total += PRIMITIVES[e.prim].cost if isinstance(e, Apply) else 0.25 if isinstance(e, Lookup) else 0
            stack += children(e)
    return total


@dataclass(frozen=True)
class _Function:
    """What an expression is computed from: only literals, or elements of this place too."""

    cost: float
    place: tuple[Buffer, Index] | None = None
    read: Read | None = None


class _Tables:
    def __init__(self, target: Target) -> None:
        self.target = target
        self.found = False
        self.memo: dict[int, Expr] = {}
        self.functions: dict[int, _Function | None] = {}

    def statement(self, s: Stmt) -> Stmt:
        match s:
            case Loop():
                folds = tuple(Fold(f.local, f.op, self.expr(f.value)) for f in s.folds)
                return replace(s, body=tuple(self.statement(x) for x in s.body), folds=folds)
            case Define() | Store():
                return replace(s, value=self.expr(s.value))
            case _:
                return s

    def expr(self, e: Expr) -> Expr:
        if id(e) not in self.memo:  # the phase keeps them alive
            self.memo[id(e)] = self._expr(e)
        return self.memo[id(e)]

    def _expr(self, e: Expr) -> Expr:
        match e:
            case Guarded():
                return replace(e, value=self.expr(e.value))
            case Apply():
                f = self.function(e) if e.dtype in (INT8, UINT8) else None
                if f is not None and f.read is not None and f.cost >= LEAST:
                    self.found = True
                    return Lookup(_table(e, f.read, self.target), f.read, e.dtype)
                args = tuple(self.expr(a) for a in e.args)
                return e if all(a is b for a, b in zip(args, e.args, strict=True)) else replace(e, args=args)
            case _:
                return e

    def function(self, e: Expr) -> _Function | None:
        """What it is computed from, if that is at most one byte."""
        if id(e) not in self.functions:
            self.functions[id(e)] = self._function(e)
        return self.functions[id(e)]

    def _function(self, e: Expr) -> _Function | None:
        match e:
            case Literal():
                return _Function(0.0)
            case Read() if e.buffer.dtype in (INT8, UINT8):
                return _Function(0.0, (e.buffer, e.index), e)
            case Apply():
                parts = [self.function(a) for a in e.args]
                known = [p for p in parts if p is not None]
                places = {p.place: p.read for p in known if p.place is not None}
                if len(known) < len(parts) or len(places) > 1:
                    return None
                cost = PRIMITIVES[e.prim].cost + sum(p.cost for p in known)
                place, read = next(iter(places.items()), (None, None))
                return _Function(cost, place, read)
            case _:
                return None


def _table(e: Expr, read: Read, target: Target) -> tuple[int, ...]:
    """The values of an expression for each byte that `read` may be, in the order of its bits."""
    dtype = read.buffer.dtype
    source, to = Buffer("x", dtype, 256), Buffer("y", e.dtype, 256)
    axis = Axis("i", 256)
    value = _At(read, Read(source, access.of(axis))).expr(e)
    loop = Loop(axis, (Store(to, access.of(axis), value),), (), "vector")
    program = Program("table", (source, to), (), (Phase((), (loop,)),))
    arrays = {source: np.arange(256, dtype=np.uint8).view(dtype), to: np.zeros(256, e.dtype)}
    interp.run(program, arrays, {}, target)
    return tuple(int(b) for b in arrays[to].view(np.uint8))


class _At:
    """Puts another read in place of all those that are of one place."""

    def __init__(self, old: Read, new: Read) -> None:
        self.key, self.new = (old.buffer, old.index), new
        self.memo: dict[int, Expr] = {}

    def expr(self, e: Expr) -> Expr:
        if id(e) not in self.memo:
            match e:
                case Read() if (e.buffer, e.index) == self.key:
                    self.memo[id(e)] = self.new
                case Apply():
                    self.memo[id(e)] = replace(e, args=tuple(self.expr(a) for a in e.args))
                case _:
                    self.memo[id(e)] = e
        return self.memo[id(e)]
