"""Normalisations. All are centred in two passes: the mean, then the mean square of the differences from it.

Half precisions are computed as float32 (`stash_type`, where an operator has one, may ask for float64).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stitch import dtypes
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, axes_of, axis_of, operator

STASH_TYPES: Mapping[int, np.dtype] = {1: dtypes.FLOAT32, 10: dtypes.FLOAT16, 11: dtypes.FLOAT64, 16: dtypes.BFLOAT16}


def _stash(call: Call) -> np.dtype:
    stash = call.attr("stash_type", 1)
    if stash not in STASH_TYPES:
        raise call.invalid(f"stash_type {stash} is no floating-point type")
    return STASH_TYPES[stash]


def _wide(x: Value, *others: np.dtype) -> np.dtype:
    """The type to compute in: float64 if x or another type asks for it, else float32."""
    return dtypes.FLOAT64 if dtypes.FLOAT64 in (x.dtype, *others) else dtypes.FLOAT32


def _centred(b: Builder, x: Value, axes: Sequence[int]) -> tuple[Value, Value, Value]:
    """x's mean, its difference from that, and its population variance, with the reduced axes kept."""
    mean = b.mean(x, axes, keepdims=True)
    difference = b.sub(x, mean)
    return mean, difference, b.mean(b.mul(difference, difference), axes, keepdims=True)


def _inverse_root(b: Builder, variance: Value, epsilon: float) -> Value:
    return b.unary("rsqrt", b.add(variance, epsilon))


def _by_channel(b: Builder, v: Value, x: Value) -> Value:
    """A vector over axis 1 of x, shaped to broadcast; a value of x's own shape but for the batch stays so."""
    return b.reshape(v, (*v.shape, *(1,) * (x.rank - 1 - v.rank))) if v.rank == 1 and x.rank > 2 else v


# ------------------------------------------------------------------ over a batch


@operator("BatchNormalization")
def batch_normalization(
    b: Builder, call: Call, x: Value, scale: Value, bias: Value, mean: Value, variance: Value
) -> Value | tuple[Value, ...]:
    """Per channel; before opset 9, `spatial = 0` has statistics of their own for every element of a sample."""
    epsilon, momentum = call.attr("epsilon", 1e-5), call.attr("momentum", 0.9)
    wide = _wide(x)
    training = bool(call.attr("training_mode", 0))
    if call.opset < 14 and any(call.outputs[1:]):
        raise call.unsupported("export the model for inference: the statistics of a batch are not computed")
    if call.opset < 9 and not call.attr("spatial", 1):
        scale, bias, mean, variance = (b.reshape(v, x.shape[1:]) for v in (scale, bias, mean, variance))
    scale, bias, old_mean, old_variance = (b.cast(_by_channel(b, v, x), wide) for v in (scale, bias, mean, variance))
    y = b.cast(x, wide)
    if not training:
        factor = b.div(scale, b.unary("sqrt", b.add(old_variance, epsilon)))
        return b.cast(b.add(b.mul(b.sub(y, old_mean), factor), bias), x.dtype)
    axes = [a for a in range(x.rank) if a != 1]
    new_mean, difference, new_variance = _centred(b, y, axes)
    factor = b.mul(b.reshape(scale, new_mean.shape[1:]), _inverse_root(b, new_variance, epsilon))
    y = b.cast(b.add(b.mul(difference, factor), bias), x.dtype)

    def running(old: Value, new: Value) -> Value:
        new = b.reshape(new, old.shape)
        blend = b.add(b.mul(b.cast(old, wide), momentum), b.mul(new, 1 - momentum))
        return b.cast(blend, old.dtype)

    return y, running(mean, new_mean), running(variance, new_variance)


# ------------------------------------------------------------------ within a sample


@operator("InstanceNormalization")
def instance_normalization(b: Builder, call: Call, x: Value, scale: Value, bias: Value) -> Value:
    wide = _wide(x)
    _, difference, variance = _centred(b, b.cast(x, wide), range(2, x.rank))
    scale, bias = (b.cast(_by_channel(b, v, x), wide) for v in (scale, bias))
    factor = b.mul(_inverse_root(b, variance, call.attr("epsilon", 1e-5)), scale)
    return b.cast(b.add(b.mul(difference, factor), bias), x.dtype)


@operator("GroupNormalization", since=18)
def group_normalization(b: Builder, call: Call, x: Value, scale: Value, bias: Value) -> Value:
    """scale and bias have one element per group in opset 18, one per channel since opset 21."""
    groups = call.attr("num_groups")
    if x.rank < 2 or not isinstance(groups, int) or groups < 1:
        raise call.invalid("it needs an operand of rank 2 or more and num_groups of 1 or more")
    batch, channels, *rest = x.shape
    width = channels // groups
    wide = _wide(x, _stash(call))
    grouped = b.reshape(b.cast(x, wide), (batch, groups, width, *rest))
    _, difference, variance = _centred(b, grouped, range(2, grouped.rank))
    normal = b.mul(difference, _inverse_root(b, variance, call.attr("epsilon", 1e-5)))
    per_group = (groups, 1, *(1 for _ in rest))
    per_channel = (groups, width, *(1 for _ in rest))
    scale, bias = (b.cast(b.reshape(v, per_group if call.opset < 21 else per_channel), wide) for v in (scale, bias))
    return b.cast(b.reshape(b.add(b.mul(normal, scale), bias), x.shape), x.dtype)


@operator("LayerNormalization", since=17)
def layer_normalization(b: Builder, call: Call, x: Value, scale: Value, bias: Value | None = None) -> tuple[Value, ...]:
    """Over all axes from `axis` on. Second and third output: the mean, and one over the standard deviation."""
    axes = range(axis_of(call.attr("axis", -1), x.rank), x.rank)
    stash = _stash(call)
    wide = _wide(x, stash)
    mean, difference, variance = _centred(b, b.cast(x, wide), axes)
    inverse = _inverse_root(b, variance, call.attr("epsilon", 1e-5))
    y = b.mul(b.mul(difference, inverse), b.cast(scale, wide))
    y = y if bias is None else b.add(y, b.cast(bias, wide))
    return b.cast(y, x.dtype), b.cast(mean, stash), b.cast(inverse, stash)


@operator("RMSNormalization", since=23)
def rms_normalization(b: Builder, call: Call, x: Value, scale: Value) -> Value:
    """Over all axes from `axis` on, not centred; the result has the scale's dtype."""
    axes = range(axis_of(call.attr("axis", -1), x.rank), x.rank)
    wide = _wide(x, _stash(call))
    y = b.cast(x, wide)
    inverse = _inverse_root(b, b.mean(b.mul(y, y), axes, keepdims=True), call.attr("epsilon", 1e-5))
    return b.cast(b.mul(b.mul(y, inverse), b.cast(scale, wide)), scale.dtype)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(b: Builder, call: Call, x: Value) -> Value:
    axes = axes_of(call.attr("axes", (0, 2, 3)), x.rank)
    _, difference, variance = _centred(b, b.cast(x, _wide(x)), axes)
    return b.cast(b.div(difference, b.add(b.unary("sqrt", variance), 1e-9)), x.dtype)


# ------------------------------------------------------------------ by a norm, by neighbours


@operator("LpNormalization")
def lp_normalization(b: Builder, call: Call, x: Value) -> Value:
    """x over its norm along an axis, 0 where that is 0."""
    axis, p = axis_of(call.attr("axis", -1), x.rank), call.attr("p", 2)
    y = b.cast(x, _wide(x))
    match p:
        case 1:
            norm = b.reduce("reduce_sum", b.unary("abs", y), [axis], keepdims=True)
        case 2:
            norm = b.unary("sqrt", b.reduce("reduce_sum", b.mul(y, y), [axis], keepdims=True))
        case _:
            raise call.invalid(f"p is {p}, neither 1 nor 2")
    return b.cast(b.div(y, b.where(b.eq(norm, 0), 1, norm)), x.dtype)


@operator("LRN")
def lrn(b: Builder, call: Call, x: Value) -> Value:
    """x over a power of the squares of its neighbours in the channels."""
    size = call.attr("size")
    alpha, beta, bias = call.attr("alpha", 1e-4), call.attr("beta", 0.75), call.attr("bias", 1.0)
    if x.rank < 2 or not isinstance(size, int) or size < 1:
        raise call.invalid("it needs an operand of rank 2 or more and a size of 1 or more")
    y = b.cast(x, _wide(x))
    before, after = (size - 1) // 2, size // 2
    lo, hi = ([n if axis == 1 else 0 for axis in range(x.rank)] for n in (before, after))
    squares = b.window(b.pad(b.mul(y, y), lo, hi), [1], [size], [1], [1])
    base = b.add(b.mul(b.reduce("reduce_sum", squares, [x.rank]), alpha / size), bias)
    return b.cast(b.div(y, _root(b, base, beta)), x.dtype)


def _root(b: Builder, x: Value, exponent: float) -> Value:
    """x ** exponent, by square roots for LRN's usual 3/4 and 1/2."""
    if exponent == 1:
        return x
    root = b.unary("sqrt", x) if exponent in (0.5, 0.75) else b.pow(x, exponent)
    return b.mul(root, b.unary("sqrt", root)) if exponent == 0.75 else root
