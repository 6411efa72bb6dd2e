"""Operators whose results come from attributes and shapes: constants, shapes, ranges, identities."""

from __future__ import annotations

import math

import numpy as np

from stitch import dims, dtypes
from stitch.dims import Dim
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, operator

LISTED = 64  # a range of symbolic bounds but known length keeps its elements as Dims up to this length

_FORMS = {
    "value": None,
    "value_int": dtypes.INT64,
    "value_ints": dtypes.INT64,
    "value_float": dtypes.FLOAT32,
    "value_floats": dtypes.FLOAT32,
}


@operator("Constant")
def constant(b: Builder, call: Call) -> Value:
    for form, dtype in _FORMS.items():
        if form in call.attrs:
            array = np.asarray(call.attrs[form], dtype)
            if array.dtype not in dtypes.ALL:
                raise call.unsupported(dtype=array.dtype)
            return b.const(array)
    raise call.unsupported("constants of strings and sparse constants are not supported")


@operator("ConstantOfShape", since=9)
def constant_of_shape(b: Builder, call: Call, shape: Value) -> Value:
    value = np.asarray(call.attr("value", np.zeros(1, np.float32)))
    if value.dtype not in dtypes.ALL:
        raise call.unsupported(dtype=value.dtype)
    return b.broadcast(b.const(value.reshape(())), call.dims(shape, "shape"))


@operator("Shape")
def shape_of(b: Builder, call: Call, x: Value) -> Value:
    return b.dims(x.shape[slice(call.attr("start", 0), call.attr("end"))])


@operator("Size")
def size_of(b: Builder, call: Call, x: Value) -> Value:
    return b.dims(x.size)


@operator("EyeLike", since=9)
def eye_like(b: Builder, call: Call, x: Value) -> Value:
    band = b.sub(b.iota(x.shape, 1), b.iota(x.shape, 0))
    return b.cast(b.eq(band, call.attr("k", 0)), call.element_type("dtype", x.dtype))


@operator("Range", since=11)
def range_of(b: Builder, call: Call, start: Value, limit: Value, delta: Value) -> Value:
    arrays = [call.known(v) for v in (start, limit, delta)]
    first, last, step = (None if a is None else a.reshape(()).item() for a in arrays)
    if first is not None and last is not None and step is not None:
        if step == 0:
            raise call.invalid("its delta is 0")
        count = max(math.ceil((last - first) / step), 0)
        if count <= LISTED or dtypes.is_float(start.dtype):
            return b.const((first + np.arange(count) * step).astype(start.dtype))
        return _ramp(b, start, delta, count)
    if all(v.contents is not None for v in (start, limit, delta)):
        bounds = [call.dims(v, "bounds")[0] for v in (start, limit, delta)]
        length: Dim = dims.dim_max(dims.ceil_div(bounds[1] - bounds[0], bounds[2]), 0)
        if isinstance(length, int) and length <= LISTED:
            return b.cast(b.dims([bounds[0] + i * bounds[2] for i in range(length)]), start.dtype)
        return _ramp(b, start, delta, length)
    return b.host("range", [start, limit, delta], [(start.dtype, (b.fresh("range"),))])[0]


def _ramp(b: Builder, start: Value, delta: Value, count: Dim) -> Value:
    """start + delta * i for i < count."""
    i = b.cast(b.iota([count], 0), start.dtype)
    step, offset = b.reshape(delta, ()), b.reshape(start, ())
    if step.contents is None or step.contents.item() != 1:
        i = b.mul(i, step)
    return i if offset.contents is not None and offset.contents.item() == 0 else b.add(i, offset)
