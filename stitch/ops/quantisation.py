"""Quantised integers to and from floats: per tensor, per axis, or in blocks along an axis.

The arithmetic is float32's, half precisions included: it holds every 16-bit integer, so that a zero point is added,
and the result clamped, before the one conversion to an integer.
"""

from __future__ import annotations

import numpy as np

from stitch import dtypes
from stitch.dims import ceil_div
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, axis_of, operator

QUANTISED = {2: dtypes.UINT8, 3: dtypes.INT8, 4: dtypes.UINT16, 5: dtypes.INT16}
REAL = {1: dtypes.FLOAT32, 10: dtypes.FLOAT16, 16: dtypes.BFLOAT16}
"""The types that an attribute may name."""


@operator("QuantizeLinear", since=10)
def quantize(b: Builder, call: Call, x: Value, scale: Value, zero: Value | None = None) -> Value:
    named = call.attr("output_dtype", 0)
    dtype = zero.dtype if zero is not None else QUANTISED.get(named) if named else dtypes.UINT8
    if dtype is None or dtype not in QUANTISED.values() or not dtypes.is_float(scale.dtype):
        raise call.unsupported("it quantises by a float to 8-bit and 16-bit integers", dtype)
    wide = _wide(x, scale)
    ratio = b.div(b.cast(x, wide), b.cast(_spread(b, call, x, scale), wide))
    return _saturated(b, ratio, None if zero is None else _spread(b, call, x, zero), dtype)


@operator("DequantizeLinear", since=10)
def dequantize(b: Builder, call: Call, x: Value, scale: Value, zero: Value | None = None) -> Value:
    if x.dtype not in (*QUANTISED.values(), dtypes.INT32) or not dtypes.is_float(scale.dtype):
        raise call.unsupported("it takes 8-bit and 16-bit integers, and int32, times a float", x.dtype)
    named = call.attr("output_dtype", 0)
    dtype = REAL.get(named) if named else scale.dtype
    if dtype is None:
        raise call.unsupported(f"output_dtype {named} is not float32, float16 or bfloat16")
    wide = _wide(x, scale)
    if zero is not None:
        zero = _spread(b, call, x, zero)
    if x.dtype == dtypes.INT32:  # has digits that float32 has not
        difference = b.cast(x if zero is None else b.sub(x, zero), wide)
    else:
        difference = b.cast(x, wide) if zero is None else b.sub(b.cast(x, wide), b.cast(zero, wide))
    return b.cast(b.mul(difference, b.cast(_spread(b, call, x, scale), wide)), dtype)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize(b: Builder, call: Call, x: Value) -> tuple[Value, ...]:
    """To uint8, over the range from the smallest to the largest element, 0 included."""
    axes = range(x.rank)
    low = b.min(b.reduce("reduce_min", x, axes), 0)
    high = b.max(b.reduce("reduce_max", x, axes), 0)
    scale = b.div(b.sub(high, low), 255)
    zero = _saturated(b, b.div(b.unary("neg", low), scale), None, dtypes.UINT8)
    return _saturated(b, b.div(x, scale), zero, dtypes.UINT8), scale, zero


def _wide(x: Value, scale: Value) -> np.dtype:
    return dtypes.FLOAT64 if dtypes.FLOAT64 in (x.dtype, scale.dtype) else dtypes.FLOAT32


def _saturated(b: Builder, ratio: Value, zero: Value | None, dtype: np.dtype) -> Value:
    """Rounded half to even, moved by the zero point, clamped to the type's range."""
    info = np.iinfo(dtype)
    steps = b.unary("rint", ratio)
    steps = steps if zero is None else b.add(steps, b.cast(zero, ratio.dtype))
    return b.cast(b.min(b.max(steps, int(info.min)), int(info.max)), dtype)


def _spread(b: Builder, call: Call, x: Value, v: Value) -> Value:
    """A scale or zero point shaped to broadcast with x."""
    if v.rank == 0 or v.shape == (1,):
        return b.reshape(v, ())
    axis = axis_of(min(call.attr("axis", 1), max(x.rank - 1, 0)), x.rank)
    size = call.attr("block_size", 0)
    if not size:
        if v.rank != 1:
            raise call.invalid(f"scales of rank {v.rank} need a block_size")
        b.unify(v.shape[0], x.shape[axis])
        return b.reshape(v, (*v.shape, *(1,) * (x.rank - axis - 1)))
    if v.rank != x.rank:
        raise call.invalid(f"scales in blocks have rank {v.rank}, but the operand has rank {x.rank}")
    b.unify(v.shape[axis], ceil_div(x.shape[axis], size))
    before, blocks, behind = v.shape[:axis], v.shape[axis], v.shape[axis + 1 :]
    copies = b.broadcast(b.reshape(v, (*before, blocks, 1, *behind)), (*before, blocks, size, *behind))
    whole = b.reshape(copies, (*before, blocks * size, *behind))
    return b.slice(whole, [0] * x.rank, (*before, x.shape[axis], *behind))
