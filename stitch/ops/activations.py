"""Activation functions and the softmax family.

The constants that a formula holds take the dtype of the values. NaN goes through, but where the specification says
"otherwise 0".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stitch import dtypes
from stitch.dims import product
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, axis_of, operator

# ------------------------------------------------------------------ piecewise linear


@operator("Relu")
def relu(b: Builder, call: Call, x: Value) -> Value:
    return b.max(x, 0)


@operator("LeakyRelu")
def leaky_relu(b: Builder, call: Call, x: Value) -> Value:
    return b.where(b.lt(x, 0), b.mul(x, call.attr("alpha", 0.01)), x)


@operator("PRelu")
def prelu(b: Builder, call: Call, x: Value, slope: Value) -> Value:
    """Before opset 7 a slope of rank 1 is one number, or one per channel; later it broadcasts."""
    if call.opset < 7 and slope.rank == 1 and slope.shape != (1,) and x.rank > 2:
        slope = b.reshape(slope, (*slope.shape, *(1,) * (x.rank - 2)))
    return b.where(b.lt(x, 0), b.mul(x, slope), x)


@operator("ThresholdedRelu")
def thresholded_relu(b: Builder, call: Call, x: Value) -> Value:
    return b.where(b.lt(call.attr("alpha", 1.0), x), x, 0)


@operator("Shrink", since=9)
def shrink(b: Builder, call: Call, x: Value) -> Value:
    """Integers are compared as floats: `lambd` and `bias` are, and the result is truncated."""
    lambd, bias = call.attr("lambd", 0.5), call.attr("bias", 0.0)
    wide = x if dtypes.is_float(x.dtype) else b.cast(x, dtypes.FLOAT64 if x.dtype.itemsize > 2 else dtypes.FLOAT32)
    above = b.where(b.lt(lambd, wide), b.sub(wide, bias), 0)
    return b.cast(b.where(b.lt(wide, -lambd), b.add(wide, bias), above), x.dtype)


@operator("HardSigmoid")
def hard_sigmoid(b: Builder, call: Call, x: Value) -> Value:
    return _hard_sigmoid(b, x, call.attr("alpha", 0.2), call.attr("beta", 0.5))


@operator("HardSwish", since=14)
def hard_swish(b: Builder, call: Call, x: Value) -> Value:
    return b.mul(x, _hard_sigmoid(b, x, 1 / 6, 0.5))


def _hard_sigmoid(b: Builder, x: Value, alpha: float, beta: float) -> Value:
    return b.max(b.min(b.add(b.mul(x, alpha), beta), 1), 0)


# ------------------------------------------------------------------ smooth


@operator("Sigmoid")
def sigmoid(b: Builder, call: Call, x: Value) -> Value:
    return b.unary("sigmoid", x)


@operator("Tanh")
def tanh(b: Builder, call: Call, x: Value) -> Value:
    return b.unary("tanh", x)


@operator("Elu")
def elu(b: Builder, call: Call, x: Value) -> Value:
    return b.where(b.lt(x, 0), b.mul(b.unary("expm1", x), call.attr("alpha", 1.0)), x)


@operator("Celu", since=12)
def celu(b: Builder, call: Call, x: Value) -> Value:
    alpha = call.attr("alpha", 1.0)
    scaled = x if alpha == 1 else b.div(x, alpha)
    return b.where(b.lt(x, 0), b.mul(b.unary("expm1", scaled), alpha), x)


@operator("Selu")
def selu(b: Builder, call: Call, x: Value) -> Value:
    old = call.opset < 6
    alpha = call.attr("alpha", 1.6732 if old else 1.67326319217681884765625)
    gamma = call.attr("gamma", 1.0507 if old else 1.05070102214813232421875)
    return b.where(b.lt(x, 0), b.mul(b.unary("expm1", x), alpha * gamma), b.mul(x, gamma))


@operator("Softplus")
def softplus(b: Builder, call: Call, x: Value) -> Value:
    return _softplus(b, x)


@operator("Softsign")
def softsign(b: Builder, call: Call, x: Value) -> Value:
    return b.div(x, b.add(b.unary("abs", x), 1))


@operator("Mish", since=18)
def mish(b: Builder, call: Call, x: Value) -> Value:
    return b.mul(x, b.unary("tanh", _softplus(b, x)))


@operator("Swish", since=24)
def swish(b: Builder, call: Call, x: Value) -> Value:
    alpha = call.attr("alpha", 1.0)
    return b.mul(x, b.unary("sigmoid", x if alpha == 1 else b.mul(x, alpha)))


@operator("Gelu", since=20)
def gelu(b: Builder, call: Call, x: Value) -> Value:
    match call.attr("approximate", "none"):
        case "none":
            return b.mul(x, b.add(b.unary("half_erf", x), 0.5))
        case "tanh":
            # (1 + tanh(u)) / 2 is sigmoid(2u), which does not cancel where the result is near 0
            cubic = b.mul(b.mul(b.mul(x, x), x), 0.044715)
            return b.mul(x, b.unary("sigmoid", b.mul(b.add(x, cubic), math.sqrt(8 / math.pi))))
        case other:
            raise call.invalid(f"approximate is {other!r}, neither 'none' nor 'tanh'")


def _softplus(b: Builder, x: Value) -> Value:
    """log(1 + e**x) without overflow."""
    decay = b.unary("exp", b.unary("neg", b.unary("abs", x)))
    return b.add(b.max(x, 0), b.unary("log1p", decay))


# ------------------------------------------------------------------ softmax


@operator("Softmax")
def softmax(b: Builder, call: Call, x: Value) -> Value:
    axes = _softmax_axes(call, x)
    shifted = _shifted(b, x, axes)
    weights = b.unary("exp", shifted)
    return b.cast(shares(b, weights, b.reduce("reduce_sum", weights, axes, keepdims=True)), x.dtype)


def shares(b: Builder, weights: Value, total: Value) -> Value:
    """Each weight's part of the total, which is at least 1: one division for each total, and as many more roundings of
    half an ulp as there are weights."""
    return b.mul(weights, b.div(1, total))


@operator("LogSoftmax")
def log_softmax(b: Builder, call: Call, x: Value) -> Value:
    axes = _softmax_axes(call, x)
    shifted = _shifted(b, x, axes)
    total = b.reduce("reduce_sum", b.unary("exp", shifted), axes, keepdims=True)
    return b.cast(b.sub(shifted, b.unary("log", total)), x.dtype)


@operator("Hardmax")
def hardmax(b: Builder, call: Call, x: Value) -> Value:
    """1 at the first of the largest elements, 0 elsewhere."""
    axes = _softmax_axes(call, x)
    first = axes[0] if axes else x.rank
    last = x.rank - len(axes) - first  # axes behind those that count: none before opset 13
    size = product(x.shape[first : x.rank - last])
    flat = b.reshape(x, (*x.shape[:first], size, *x.shape[x.rank - last :]))
    where = b.apply("argmax", flat, axis=first, last=0)
    where = b.reshape(where, (*flat.shape[:first], 1, *flat.shape[first + 1 :]))
    hot = b.eq(b.iota(flat.shape, first), where)
    return b.reshape(b.cast(hot, x.dtype), x.shape)


def _softmax_axes(call: Call, x: Value) -> Sequence[int]:
    """Before opset 13 the operand is a matrix, cut at `axis`: all axes from there on count, perhaps none."""
    if x.rank == 0:
        return ()
    if call.opset >= 13:
        return (axis_of(call.attr("axis", -1), x.rank),)
    axis = call.attr("axis", 1)
    return range(x.rank if axis == x.rank else axis_of(axis, x.rank), x.rank)


def _shifted(b: Builder, x: Value, axes: Sequence[int]) -> Value:
    """x minus its largest elements, as the type of computation."""
    wide = b.cast(x, dtypes.compute(x.dtype))
    return b.sub(wide, b.reduce("reduce_max", wide, axes, keepdims=True))
