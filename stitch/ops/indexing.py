"""Operators that pick or place elements at computed indices, and selections whose size depends on data."""

from __future__ import annotations

import numpy as np

from stitch import dtypes
from stitch.dims import Dim, product, prove_le
from stitch.graph import Builder, Shape, Value
from stitch.ops import host
from stitch.ops.movement import slice_axis, take
from stitch.ops.registry import Call, axis_of, operator

# ------------------------------------------------------------------ gather


def in_range(b: Builder, call: Call, indices: Value, extent: Dim) -> Value:
    """Indices of which negative ones count from the end, as indices from the front."""
    array = call.known(indices)
    if array is not None and not (array < 0).any():
        return indices
    if array is not None and isinstance(extent, int):
        return b.const(np.where(array < 0, array + extent, array).astype(indices.dtype))
    return b.where(b.lt(indices, 0), b.add(indices, b.cast(b.dims(extent), indices.dtype)), indices)


@operator("Gather")
def gather(b: Builder, call: Call, x: Value, indices: Value) -> Value:
    axis = axis_of(call.attr("axis", 0), x.rank)
    span = _progression(call, indices, x.shape[axis])
    if span is not None:  # the indices are known and evenly spaced: no more than a slice
        y = slice_axis(b, x, axis, *span)
        return b.reshape(y, [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
    return take(b, x, in_range(b, call, indices, x.shape[axis]), axis)


def _progression(call: Call, indices: Value, extent: Dim) -> tuple[Dim, Dim, int] | None:
    """(start, size, step) of indices that are a slice."""
    if indices.contents is not None and indices.rank == 0:
        (start,) = indices.contents.reshape(-1).tolist()
        if prove_le(0, start) or prove_le(start, -1):
            return (start if prove_le(0, start) else start + extent), 1, 1
    array = call.known(indices)
    if array is None or array.ndim != 1 or array.size == 0:
        return None
    steps = np.unique(np.diff(array))
    step = int(steps[0]) if steps.size else 1
    if steps.size > 1 or step == 0 or (array.min() < 0 <= array.max()):
        return None
    first = int(array[0])
    return (first if first >= 0 else first + extent), array.size, step


@operator("GatherElements", since=11)
def gather_elements(b: Builder, call: Call, x: Value, indices: Value) -> Value:
    axis = axis_of(call.attr("axis", 0), x.rank)
    return b.gather(x, _everywhere(b, call, indices, x, axis), range(x.rank))


def _everywhere(b: Builder, call: Call, indices: Value, x: Value, axis: int) -> list[Value]:
    """Indices for every axis: the given ones on `axis`, an element's own position on the others."""
    given = in_range(b, call, b.cast(indices, dtypes.INT64), x.shape[axis])
    return [given if a == axis else b.iota(indices.shape, a) for a in range(x.rank)]


@operator("GatherND", since=11)
def gather_nd(b: Builder, call: Call, x: Value, indices: Value) -> Value:
    batch = call.attr("batch_dims", 0)
    tuples = _components(b, call, indices, x.shape[batch:])
    shape = indices.shape[:-1]
    for i in range(batch):
        b.unify(x.shape[i], shape[i])
    own = [b.iota(shape, i) for i in range(batch)]
    picks = [*own, *(b.cast(t, dtypes.INT64) for t in tuples)]
    return b.gather(x, picks, range(len(picks))) if picks else b.broadcast(x, (*shape, *x.shape))


def _components(b: Builder, call: Call, indices: Value, shape: Shape) -> list[Value]:
    """The index tuples on the last axis, one value per component, each in the range of its axis."""
    count = indices.shape[-1]
    if not isinstance(count, int):
        raise call.unsupported("the last dim of its indices must be a number")
    if count > len(shape):
        raise call.invalid(f"its index tuples of {count} do not fit rank {len(shape)}")
    outer = indices.shape[:-1]
    parts = [b.reshape(slice_axis(b, indices, indices.rank - 1, i, 1), outer) for i in range(count)]
    return [in_range(b, call, part, shape[i]) for i, part in enumerate(parts)]


# ------------------------------------------------------------------ scatter


@operator("ScatterElements", since=11)
def scatter_elements(b: Builder, call: Call, x: Value, indices: Value, updates: Value) -> Value:
    axis = axis_of(call.attr("axis", 0), x.rank)
    where = _everywhere(b, call, indices, x, axis)
    return b.apply("scatter", x, updates, *where, axes=tuple(range(x.rank)), op=call.attr("reduction", "none"))


operator("Scatter", since=9)(scatter_elements)


@operator("ScatterND", since=11)
def scatter_nd(b: Builder, call: Call, x: Value, indices: Value, updates: Value) -> Value:
    where = _components(b, call, indices, x.shape)
    return b.apply("scatter", x, updates, *where, axes=tuple(range(len(where))), op=call.attr("reduction", "none"))


@operator("TensorScatter", since=24)
def tensor_scatter(b: Builder, call: Call, past: Value, update: Value, write: Value | None = None) -> Value:
    """Writes `update` into a cache from a position of its own in each batch."""
    axis = axis_of(call.attr("axis", -2), past.rank)
    shape = (update.shape[0], update.shape[axis])
    position = b.iota(shape, 1)
    if write is not None:
        position = b.add(position, b.reshape(b.cast(write, dtypes.INT64), [shape[0], 1]))
    if call.attr("mode", "linear") == "circular":
        position = b.elementwise("mod", position, b.dims(past.shape[axis]))
    rows = b.transpose(update, [0, axis, *(i for i in range(1, update.rank) if i != axis)])
    return b.apply("scatter", past, rows, b.iota(shape, 0), position, axes=(0, axis), op="none")


# ------------------------------------------------------------------ made from indices


@operator("OneHot", since=9)
def one_hot(b: Builder, call: Call, indices: Value, depth: Value, values: Value) -> Value:
    (n,) = call.dims(depth, "depth")
    axis = axis_of(call.attr("axis", -1), indices.rank + 1)
    hot = in_range(b, call, b.cast(indices, dtypes.INT64), n)
    shape = [*indices.shape[:axis], n, *indices.shape[axis:]]
    hot = b.reshape(hot, [1 if i == axis else d for i, d in enumerate(shape)])
    off, on = (b.reshape(slice_axis(b, values, 0, i, 1), ()) for i in range(2))
    return b.where(b.eq(hot, b.iota(shape, axis)), on, off)


# ------------------------------------------------------------------ sizes that depend on data


@operator("Compress", since=9)
def compress(b: Builder, call: Call, x: Value, condition: Value) -> Value:
    axis = call.attr("axis")
    if axis is None:
        x, axis = b.reshape(x, [x.size]), 0
    axis = axis_of(axis, x.rank)
    mask = call.known(condition)
    if mask is not None:
        return take(b, x, b.const(np.flatnonzero(mask)), axis)
    (picks,) = b.host("flatnonzero", [condition], [(dtypes.INT64, (b.fresh("selected"),))])
    return take(b, x, picks, axis)


@operator("NonZero", since=9)
def nonzero(b: Builder, call: Call, x: Value) -> Value:
    array = call.known(x)
    if array is not None:
        return b.const(host.nonzero({}, array)[0])
    return b.host("nonzero", [x], [(dtypes.INT64, (x.rank, b.fresh("nonzero")))])[0]


@operator("Unique", since=11)
def unique(b: Builder, call: Call, x: Value) -> tuple[Value, ...]:
    axis = call.attr("axis")
    n = b.fresh("unique")
    shape: Shape = (n,)
    extent = product(x.shape)
    if axis is not None:
        axis = axis_of(axis, x.rank)
        shape, extent = (*x.shape[:axis], n, *x.shape[axis + 1 :]), x.shape[axis]
    outputs: list[tuple[np.dtype, Shape]] = [(x.dtype, shape), *((dtypes.INT64, (d,)) for d in (n, extent, n))]
    return b.host("unique", [x], outputs, axis=axis, sorted=bool(call.attr("sorted", 1)))


@operator("TopK")
def top_k(b: Builder, call: Call, x: Value, count: Value | None = None) -> tuple[Value, ...]:
    axis = axis_of(call.attr("axis", -1), x.rank)
    k: Dim
    if count is None:
        k = call.attr("k")
        count = b.dims(k)
    elif count.contents is not None or count in call.constants:
        (k,) = call.dims(count, "k")
    else:
        k = b.fresh("k")
    shape = (*x.shape[:axis], k, *x.shape[axis + 1 :])
    largest = bool(call.attr("largest", 1))
    if k == 1 and largest and x.shape[axis] != 0:
        place = b.reshape(b.apply("argmax", x, axis=axis, last=0), shape)
        return b.reduce("reduce_max", x, [axis], keepdims=True), place
    return b.host("topk", [x, count], [(x.dtype, shape), (dtypes.INT64, shape)], axis=axis, largest=largest)


@operator("NonMaxSuppression", since=10)
def non_max_suppression(
    b: Builder, call: Call, boxes: Value, scores: Value, most: Value | None = None,
    overlap: Value | None = None, least: Value | None = None,
) -> Value:  # fmt: skip
    inputs = [
        boxes,
        scores,
        b.const(np.array([0], np.int64)) if most is None else most,
        b.const(np.array([0], np.float32)) if overlap is None else overlap,
        b.const(np.array([-np.inf], np.float32)) if least is None else least,
    ]
    center = bool(call.attr("center_point_box", 0))
    return b.host("nonmaxsuppression", inputs, [(dtypes.INT64, (b.fresh("selected"), 3))], center=center)[0]
