"""Division by what stays the same in a loop: by its reciprocal, made before the loop.

    before:  loop i { … x / d … }
    after:   s = power of two that brings d near 1;  h + l = 1 / (d · s), in two floats
             loop i { … t = x · s;  fma(t, h, t · l) … }

The sum before its rounding is x / d within 2^-46, so that the result is x / d rounded correctly, but for the few whose
quotient is that close to the middle of two floats, such as 1 / (1 - 2^-24); a quotient that is a float is exact
(Brisebarre, Muller and Raina 2004, "Accelerating correctly rounded floating-point division when the divisor is known in
advance"). Results below 2^-100 may be off by a unit in the last place. A division takes the time of six products.

Where `d` was read only under a guard, or does not stay the same, or too few share it, nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from stitch.access import Axis, Index
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Clip,
    Contract,
    Define,
    Expr,
    Guarded,
    Literal,
    Local,
    Lookup,
    Loop,
    Phase,
    Position,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
    children,
    walk,
)
from stitch.dtypes import BOOL, FLOAT32

SHARE = 16
"""Iterations from which the reciprocal pays: it is a division itself, and a dozen of dependent instructions."""

SAFE, SCALE = 2.0**100, 2.0**64
"""Up to where a divisor, and its reciprocal, are left as they are, and by how much the others are brought nearer."""

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def shared(phase: Phase, lanes: int) -> Phase:
    """The phase without divisions by what stays the same in a loop. `lanes`: iterations of a vector loop at a time."""
    return replace(phase, body=_body(phase.body, lanes))


def _body(body: tuple[Stmt, ...], lanes: int) -> tuple[Stmt, ...]:
    out: list[Stmt] = []
    for s in body:
        if isinstance(s, Loop):
            s = replace(s, body=_body(s.body, lanes))
            extent = s.clip.block if isinstance(s.clip, Clip) else s.axis.extent
            if not isinstance(extent, int) or extent >= SHARE * (lanes if s.mode == "vector" else 1):
                before, s = _Divisors(s).taken_out()
                out += before
        out.append(s)
    return tuple(out)


class _Divisors:
    """One loop. Its own statements are changed, not those of the loops in it, which were before."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._before: list[Stmt] = []
        self._parts: dict[object, tuple[Expr, Expr, Expr]] = {}
        self._memo: dict[tuple[int, bool], Expr] = {}
        self._known: dict[tuple[int, bool], bool] = {}
        inside = list(walk(loop.body))
        self._axes = {loop.axis} | {s.axis for s in inside if isinstance(s, Loop)}
        self._locals = {s.local for s in inside if isinstance(s, Define)}
        self._locals |= {f.local for s in inside if isinstance(s, Loop) for f in s.folds}
        self._stored = set(_stored(inside))

    def taken_out(self) -> tuple[list[Stmt], Loop]:
        """What is done before the loop, and the loop."""
        body = tuple(self._stmt(s) for s in self._loop.body)
        folds = tuple(replace(f, value=self._expr(f.value)) for f in self._loop.folds)
        return self._before, replace(self._loop, body=body, folds=folds)

    def _stmt(self, s: Stmt) -> Stmt:
        return replace(s, value=self._expr(s.value)) if isinstance(s, Define | Store) else s

    def _expr(self, e: Expr, guarded: bool = False) -> Expr:
        key = id(e), guarded  # the loop keeps them alive
        if key not in self._memo:
            self._memo[key] = self._changed(e, guarded)
        return self._memo[key]

    def _changed(self, e: Expr, guarded: bool) -> Expr:
        match e:
            case Apply():
                args = tuple(self._expr(a, guarded) for a in e.args)
                if e.prim == "div" and e.dtype == FLOAT32:
                    x, d = e.args
                    if not isinstance(d, Literal) and self._stays(d, guarded) and not self._stays(x, False):
                        return self._product(args[0], d)
                return e if all(a is b for a, b in zip(args, e.args, strict=True)) else replace(e, args=args)
            case Guarded():
                return replace(e, value=self._expr(e.value, True))
            case _:
                return e

    def _stays(self, e: Expr, guarded: bool) -> bool:
        """Whether an expression has the same value in every iteration, and, if it is evaluated under a guard, one that
        can be had without."""
        key = id(e), guarded
        if key not in self._known:
            self._known[key] = self._stays_the_same(e, guarded)
        return self._known[key]

    def _stays_the_same(self, e: Expr, guarded: bool) -> bool:
        match e:
            case Literal():
                return True
            case Use():
                return e.local not in self._locals
            case Read():
                return not guarded and e.buffer not in self._stored and self._fixed(e.index)
            case Position():
                return self._fixed(e.index)
            case Guarded():
                return self._stays(e.value, False) and all(self._fixed(b.index) for b in e.bounds)
            case Apply() | Lookup():
                return all(self._stays(a, guarded) for a in children(e))

    def _fixed(self, index: Index) -> bool:
        return not any(v in (self._axes if isinstance(v, Axis) else self._locals) for v, _ in index.terms)

    def _product(self, x: Expr, d: Expr) -> Expr:
        key = d.local if isinstance(d, Use) else (d.buffer, d.index) if isinstance(d, Read) else id(d)
        if key not in self._parts:
            self._parts[key] = self._reciprocal(d)
        scale, head, rest = self._parts[key]
        t = _float("mul", x, scale)
        return _float("fma", t, head, _float("mul", t, rest))

    def _reciprocal(self, d: Expr) -> tuple[Expr, Expr, Expr]:
        """s, h and l. h is nearer to zero than 1 / (d · s) and l has its sign: an infinite x does not meet infinity of
        the other sign. Of zero and infinity nothing is left after h: l is infinite, or zero, as h is."""
        d = self._define("divisor", d)
        size, one = _float("abs", d), _number(1.0)
        small = _float("where", _less(size, _number(1 / SAFE)), _number(SCALE), one)
        scale = self._define("scale", _float("where", _less(_number(SAFE), size), _number(1 / SCALE), small))
        near = self._define("near", _float("mul", d, scale))
        head = self._define("head", _float("mul", _float("div", one, near), _number(BELOW_ONE)))
        left = _float("fma", _float("neg", head), near, one)
        rest = self._define("rest", _float("where", _less(left, one), _float("mul", left, head), head))
        return scale, head, rest

    def _define(self, name: str, value: Expr) -> Use:
        local = Local(name, FLOAT32)
        self._before.append(Define(local, value))
        return Use(local)


def _stored(inside: Iterable[Stmt]) -> Iterable[Buffer]:
    for s in inside:
        match s:
            case Store():
                yield s.buffer
            case Transpose():
                yield s.to
            case Contract():
                yield s.tile


def _float(prim: str, *args: Expr) -> Apply:
    return Apply(prim, args, FLOAT32)


def _less(a: Expr, b: Expr) -> Apply:
    return Apply("lt", (a, b), BOOL)


def _number(x: float) -> Literal:
    return Literal(x, FLOAT32)
