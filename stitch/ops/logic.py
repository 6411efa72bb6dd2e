"""Selection, tests for special values, and bits. The operators that compare or join are in `elementwise`."""

from __future__ import annotations

from stitch import dtypes
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, operator


@operator("Not")
@operator("BitwiseNot", since=18)
def invert(b: Builder, call: Call, x: Value) -> Value:
    return b.unary("not", x)


@operator("Where", since=9)
def where(b: Builder, call: Call, condition: Value, x: Value, y: Value) -> Value:
    return b.where(condition, x, y)


@operator("IsNaN", since=9)
def isnan(b: Builder, call: Call, x: Value) -> Value:
    return b.ne(x, x) if dtypes.is_float(x.dtype) else b.broadcast(b.const(False), x.shape)


@operator("IsInf", since=10)
def isinf(b: Builder, call: Call, x: Value) -> Value:
    positive, negative = call.attr("detect_positive", 1), call.attr("detect_negative", 1)
    if not dtypes.is_float(x.dtype) or not (positive or negative):
        return b.broadcast(b.const(False), x.shape)
    if positive and negative:
        return b.eq(b.unary("abs", x), float("inf"))
    return b.eq(x, float("inf") if positive else float("-inf"))


@operator("BitShift", since=11)
def bitshift(b: Builder, call: Call, x: Value, amount: Value) -> Value:
    primitive = {"LEFT": "shl", "RIGHT": "shr"}.get(call.attr("direction", ""))
    if primitive is None:
        raise call.invalid(f"direction {call.attr('direction')!r} is neither LEFT nor RIGHT")
    return b.elementwise(primitive, x, amount)
