"""Rules that decide a program's bits, and that the emitter and the interpreter therefore share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from stitch import dtypes
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Contract,
    Expr,
    Loop,
    Read,
    Stmt,
    Store,
    Transpose,
    children,
    expressions,
    walk,
)
from stitch.target import Target


def nodes(e: Expr) -> Iterator[Expr]:
    """An expression and all parts of it, each object once."""
    seen: set[Expr] = set()
    stack = [e]
    while stack:
        x = stack.pop()
        if x not in seen:
            seen.add(x)
            yield x
            stack += children(x)


def lane_dtype(loop: Loop) -> np.dtype:
    """The dtype whose vectors fill a register in a vector loop; narrower and wider values ride along.

    Floats decide: float64 if more of the loop's nodes are float64 than float32. Without floats it is the widest
    integer that is read, computed or stored; a loop over booleans alone has lanes of one byte.
    """
    count: Counter[np.dtype] = Counter()
    for s in (loop, *walk(loop.body)):
        if isinstance(s, Store):
            count[dtypes.compute(s.buffer.dtype)] += 1
        for e in expressions(s):
            count.update(x.dtype for x in nodes(e) if isinstance(x, Read | Apply))
    if count[dtypes.FLOAT64] > count[dtypes.FLOAT32]:
        return dtypes.FLOAT64
    if count[dtypes.FLOAT32]:
        return dtypes.FLOAT32
    return max(count, key=lambda d: d.itemsize, default=dtypes.FLOAT32)


def lanes_of(loop: Loop, target: Target) -> int:
    """The number W of lanes in a vector loop: what a register holds of its `lane_dtype`."""
    return target.lanes(lane_dtype(loop))


def multiply_add(prim: str, args: tuple[Expr, ...]) -> tuple[Expr, Expr, Expr] | None:
    """(a, b, c) if the primitive is the float sum a · b + c with the product written inside it: the first if both are.

    Such a sum is rounded once on targets with fused multiply-add. Looking at the expression alone, rather than at
    how often the product is used, gives two copies of it the same bits. A difference is never contracted: in
    x − max(x) the two x must be the same number, which is as large as a mask makes it.
    """
    if prim != "add" or not dtypes.is_float(args[-1].dtype):
        return None
    for product, other in (args, args[::-1]):
        match product:
            case Apply("mul", (a, b)):
                return a, b, other
    return None


def identity(op: str, dtype: np.dtype) -> float | int | bool:
    """What a fold with this operator starts from."""
    match op:
        case "add":
            return 0
        case "mul" | "and":
            return -1 if op == "and" and dtype != dtypes.BOOL else 1
        case "or":
            return 0
        case "max":
            return dtypes.lowest(dtype)
        case _:
            return dtypes.highest(dtype)


def stored_in(body: tuple[Stmt, ...]) -> frozenset[Buffer]:
    """The buffers that these statements store to."""
    found: set[Buffer] = set()
    for s in walk(body):
        match s:
            case Store(buffer) | Contract(buffer) | Transpose(buffer):
                found.add(buffer)
    return frozenset(found)


def unrolls(loop: Loop) -> bool:
    """Whether a serial loop is written out: if it says so, or has few iterations, as over a window, without a vector
    loop inside."""
    if loop.clip is not None or not isinstance(loop.axis.extent, int):
        return False
    if loop.unroll >= loop.axis.extent:
        return True
    inner = [s for s in walk(loop.body) if isinstance(s, Loop)]
    return loop.axis.extent <= 4 and all(s.mode == "serial" for s in inner)
