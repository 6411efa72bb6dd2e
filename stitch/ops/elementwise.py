"""Arithmetic, comparison, functions of one value, casts: whatever works element by element and broadcasts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stitch import dtypes
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, axis_of, operator

# ------------------------------------------------------------------ one operand

UNARY = {
    "Abs": ("abs", 1), "Neg": ("neg", 1), "Sign": ("sign", 9), "Floor": ("floor", 1), "Ceil": ("ceil", 1),
    "Round": ("rint", 11), "Sqrt": ("sqrt", 1), "Exp": ("exp", 1), "Log": ("log", 1), "Erf": ("erf", 9),
    "Sin": ("sin", 7), "Cos": ("cos", 7), "Tan": ("tan", 7), "Asin": ("asin", 7), "Acos": ("acos", 7),
    "Atan": ("atan", 7), "Sinh": ("sinh", 9), "Cosh": ("cosh", 9), "Asinh": ("asinh", 9), "Acosh": ("acosh", 9),
    "Atanh": ("atanh", 9),
}  # fmt: skip
"""Operator: its primitive, and the opset that brought it."""


def _unary(primitive: str) -> Callable[[Builder, Call, Value], Value]:
    def apply(b: Builder, call: Call, x: Value) -> Value:
        return b.unary(primitive, x)

    return apply


for _name, (_primitive, _since) in UNARY.items():
    operator(_name, since=_since)(_unary(_primitive))


@operator("Identity")
def identity(b: Builder, call: Call, x: Value) -> Value:
    return x


@operator("Reciprocal")
def reciprocal(b: Builder, call: Call, x: Value) -> Value:
    return b.div(1, x)


@operator("Clip", until=10)
def clip_by_attributes(b: Builder, call: Call, x: Value) -> Value:
    """From opset 6 on, bounds that are not given are float32's largest numbers: infinity becomes finite."""
    far = float(np.finfo(np.float32).max) if call.opset >= 6 and x.dtype.itemsize >= 4 else None
    low, high = call.attr("min", None if far is None else -far), call.attr("max", far)
    x = x if low is None else b.max(x, low)
    return x if high is None else b.min(x, high)


@operator("Clip", since=11)
def clip(b: Builder, call: Call, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    """The upper bound wins where the bounds cross."""
    x = x if low is None else b.max(x, b.reshape(low, ()))
    return x if high is None else b.min(x, b.reshape(high, ()))


@operator("Dropout")
def dropout(
    b: Builder, call: Call, x: Value, ratio: Value | None = None, training: Value | None = None
) -> tuple[Value, ...]:
    """Inference: nothing is dropped. Before opset 7 the attribute is_test said so; exporters left it unset."""
    if training is not None and bool(call.constant(training, "training_mode").any()):
        share = 0.5 if ratio is None else float(call.constant(ratio, "ratio").reshape(()))
        if share != 0:
            raise call.unsupported("export the model for inference: training_mode drops at random")
    mask = dtypes.BOOL if call.opset >= 10 else x.dtype
    return x, b.broadcast(b.const(True, mask), x.shape)


# ------------------------------------------------------------------ two operands

BINARY = {
    "Add": ("add", 1), "Sub": ("sub", 1), "Mul": ("mul", 1), "Div": ("div", 1), "And": ("and", 1), "Or": ("or", 1),
    "Xor": ("xor", 1), "BitwiseAnd": ("and", 18), "BitwiseOr": ("or", 18), "BitwiseXor": ("xor", 18),
    "Equal": ("eq", 1), "Less": ("lt", 1), "LessOrEqual": ("le", 12),
}  # fmt: skip
REVERSED = {"Greater": ("lt", 1), "GreaterOrEqual": ("le", 12)}


def aligned(call: Call, b: Builder, x: Value, y: Value) -> Value:
    """`y` shaped to broadcast with `x`: before opset 7, the attribute `axis` said where its axes stand in x."""
    axis = call.attr("axis")
    if call.opset >= 7 or not call.attr("broadcast", 0) or axis is None:
        return y
    behind = x.rank - axis_of(axis, x.rank) - y.rank
    return b.reshape(y, (*y.shape, *(1,) * behind)) if axis >= 0 and behind > 0 else y


def _binary(primitive: str, swap: bool) -> Callable[[Builder, Call, Value, Value], Value]:
    def apply(b: Builder, call: Call, x: Value, y: Value) -> Value:
        y = aligned(call, b, x, y)
        return b.elementwise(primitive, y, x) if swap else b.elementwise(primitive, x, y)

    return apply


for _name, (_primitive, _since) in (BINARY | REVERSED).items():
    operator(_name, since=_since)(_binary(_primitive, _name in REVERSED))


@operator("Mod", since=10)
def mod(b: Builder, call: Call, x: Value, y: Value) -> Value:
    """fmod=0: the sign of the divisor, as in Python. fmod=1: the sign of the dividend, as in C."""
    return b.elementwise("fmod" if call.attr("fmod", 0) else "mod", x, y)


@operator("Pow")
def power(b: Builder, call: Call, x: Value, y: Value) -> Value:
    """The result has the base's dtype. Constant exponents become products where that is at least as exact."""
    y = aligned(call, b, x, y)
    shape = b.broadcast_shape(x.shape, y.shape)
    exponent = _uniform(call, y)
    if exponent is not None and (product := _expanded(b, x, exponent)) is not None:
        return b.broadcast(product, shape)
    if dtypes.is_float(x.dtype):
        wide = dtypes.FLOAT64 if dtypes.FLOAT64 in (x.dtype, y.dtype) else dtypes.FLOAT32
        wide = x.dtype if x.dtype == y.dtype else wide
        return b.cast(b.pow(b.cast(x, wide), b.cast(y, wide)), x.dtype)
    result = b.pow(b.cast(x, dtypes.FLOAT64), b.cast(y, dtypes.FLOAT64))
    return b.cast(result if dtypes.is_float(y.dtype) else b.unary("rint", result), x.dtype)


def _uniform(call: Call, y: Value) -> float | None:
    """The number that all elements of a constant are, if they are one."""
    array = call.constants.get(y)
    if array is None and y.contents is not None and all(isinstance(d, int) for d in y.contents.reshape(-1)):
        array = y.contents.astype(np.float64)
    if array is None or array.size == 0 or not bool((array == array.reshape(-1)[0]).all()):
        return None
    return float(array.reshape(-1)[0])


def _expanded(b: Builder, x: Value, exponent: float) -> Value | None:
    """x ** exponent without `pow`, whose bound is 4 ulp: a product of up to 5 floats is no worse.

    The square root differs from IEEE's pow at -0 and -inf alone.
    """
    exact = not dtypes.is_float(x.dtype)
    if exponent in (0.5, 1):
        return x if exponent == 1 else None if exact else b.unary("sqrt", x)
    if not (0 if exact else -2) <= exponent <= (64 if exact else 5) or exponent != int(exponent):
        return None
    if exponent == 0:
        return b.broadcast(b.const(1, x.dtype), x.shape)
    base, n = b.cast(x, dtypes.compute(x.dtype)), abs(int(exponent))
    base = base if exponent > 0 else b.div(1, base)
    result: Value | None = None
    while n:
        if n & 1:
            result = base if result is None else b.mul(result, base)
        n >>= 1
        base = b.mul(base, base) if n else base
    return None if result is None else b.cast(result, x.dtype)


# ------------------------------------------------------------------ any number of operands


def _fold(primitive: str) -> Callable[..., Value]:
    def apply(b: Builder, call: Call, x: Value, *more: Value) -> Value:
        for y in more:
            x = b.elementwise(primitive, x, y)
        return x

    return apply


for _name, _primitive in {"Sum": "add", "Max": "max", "Min": "min"}.items():
    operator(_name)(_fold(_primitive))


@operator("Mean")
def mean(b: Builder, call: Call, x: Value, *more: Value) -> Value:
    wide = dtypes.compute(x.dtype)
    total = b.cast(x, wide)
    for y in more:
        total = b.add(total, b.cast(y, wide))
    return b.cast(b.div(total, 1 + len(more)), x.dtype)


# ------------------------------------------------------------------ casts


@operator("Cast")
def cast(b: Builder, call: Call, x: Value) -> Value:
    return b.cast(x, call.element_type("to"))


@operator("BitCast", since=26)
def bitcast(b: Builder, call: Call, x: Value) -> Value:
    """The same bits as another type of the same width."""
    dtype = call.element_type("to")
    if dtype.itemsize != x.dtype.itemsize:
        raise call.invalid(f"{x.dtype.name} and {dtype.name} differ in width")
    if dtypes.BOOL in (dtype, x.dtype) and dtype != x.dtype:  # a bool is stored as 0 or 1, but has no bits of its own
        byte = b.cast(x, dtypes.UINT8) if x.dtype == dtypes.BOOL else b.apply("bitcast", x, dtype=dtypes.UINT8)
        return b.cast(byte, dtype) if dtype in (dtypes.BOOL, dtypes.UINT8) else b.apply("bitcast", byte, dtype=dtype)
    return x if dtype == x.dtype else b.apply("bitcast", x, dtype=dtype)


@operator("CastLike", since=15)
def cast_like(b: Builder, call: Call, x: Value, like: Value) -> Value:
    return b.cast(x, like.dtype)


# ------------------------------------------------------------------ running sums


def _running(function: str) -> Callable[[Builder, Call, Value, Value], Value]:
    def apply(b: Builder, call: Call, x: Value, axis: Value) -> Value:
        if axis.contents is not None and isinstance(position := axis.contents.reshape(-1)[0], int):
            axis_of(position, x.rank)
        exclusive, reverse = call.attr("exclusive", 0), call.attr("reverse", 0)
        return b.host(function, [x, axis], [(x.dtype, x.shape)], exclusive=exclusive, reverse=reverse)[0]

    return apply


operator("CumSum", since=11)(_running("cumsum"))
operator("CumProd", since=26)(_running("cumprod"))
