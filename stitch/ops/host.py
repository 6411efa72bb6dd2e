"""Numpy functions for what cannot be compiled: results whose size depends on data, and rare operators.

`FUNCTIONS[name](attrs, *arrays)` returns a tuple of arrays. Only numpy is imported here: the runtime calls these too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Attrs = Mapping[str, Any]


def flatnonzero(attrs: Attrs, x: Array) -> tuple[Array, ...]:
    return (np.flatnonzero(x).astype(np.int64),)


def nonzero(attrs: Attrs, x: Array) -> tuple[Array, ...]:
    """Positions in as many rows as x has axes: none for a scalar."""
    if x.ndim == 0:
        return (np.zeros((0, np.count_nonzero(x)), np.int64),)
    return (np.array(np.nonzero(x), np.int64).reshape(x.ndim, -1),)


def unique(attrs: Attrs, x: Array) -> tuple[Array, ...]:
    """Values, first positions, inverse, counts; unless sorted, in order of first appearance."""
    axis = attrs["axis"]
    data = x.reshape(-1) if axis is None else x
    values, first, inverse, counts = np.unique(
        data, return_index=True, return_inverse=True, return_counts=True, axis=0 if axis is None else axis
    )
    inverse = inverse.reshape(-1)
    if not attrs["sorted"]:
        order = np.argsort(first, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        values = np.take(values, order, axis=0 if axis is None else axis)
        first, inverse, counts = first[order], rank[inverse], counts[order]
    return values, first.astype(np.int64), inverse.astype(np.int64), counts.astype(np.int64)


LONG, FEW = 512, 4
"""Rows from this length on, of which no more than one in so many elements is wanted, are not sorted whole."""


def topk(attrs: Attrs, x: Array, k: Array) -> tuple[Array, ...]:
    """The k largest (or smallest), in order; of equal elements the first. NaN counts as the largest."""
    axis, count, largest = attrs["axis"], int(np.asarray(k).reshape(-1)[0]), bool(attrs["largest"])
    n = x.shape[axis]
    rows = np.moveaxis(x, axis, -1)
    if n >= LONG and 0 < count * FEW <= n and x.dtype.kind in "iuf":
        order = np.moveaxis(_selected(rows, count, largest), -1, axis)
    else:
        order = np.moveaxis(_sorted(rows, largest)[..., : min(count, n)], -1, axis)
    return np.take_along_axis(x, order, axis), order.astype(np.int64)


def _sorted(rows: Array, largest: bool) -> Array:
    """Places of the elements in order, along the last axis."""
    if not largest:
        return np.argsort(rows, axis=-1, kind="stable")
    # A stable ascending sort of the reversed axis, read backwards.
    backwards: Array = np.flip(np.argsort(np.flip(rows, -1), axis=-1, kind="stable"), -1)
    places: Array = rows.shape[-1] - 1 - backwards
    return places


def _selected(rows: Array, count: int, largest: bool) -> Array:
    """The first `count` of them: of the elements that are not beyond the last of these, which are few. Elements that
    equal the worst one, as most of a map of peaks do, are left out before, since they make the selection slow."""
    out = np.empty((*rows.shape[:-1], count), np.int64)
    for place in np.ndindex(rows.shape[:-1]):
        row = rows[place]
        found = np.flatnonzero(row > row.min() if largest else row < row.max())  # none beside a NaN
        if len(found) < count:
            out[place] = _sorted(row, largest)[:count]
            continue
        some = row[found]
        at = len(some) - count if largest else count - 1
        last = np.partition(some, at)[at]
        found = found[some >= last if largest else some <= last]
        out[place] = found[_sorted(row[found], largest)[:count]]
    return out


def range_of(attrs: Attrs, start: Array, limit: Array, delta: Array) -> tuple[Array, ...]:
    first, last, step = (np.asarray(v).reshape(()).item() for v in (start, limit, delta))
    count = max(math.ceil((last - first) / step), 0) if step else 0
    return ((first + np.arange(count) * step).astype(start.dtype),)


def _directed(x: Array, axis: int, exclusive: bool, reverse: bool, fold: np.ufunc, identity: int) -> Array:
    y = np.flip(x, axis) if reverse else x
    y = fold.accumulate(y, axis=axis, dtype=x.dtype)
    if exclusive and x.shape[axis]:
        head = np.full_like(np.take(y, [0], axis), identity)
        y = np.concatenate([head, np.take(y, np.arange(x.shape[axis] - 1), axis)], axis)
    return np.ascontiguousarray(np.flip(y, axis) if reverse else y)


def cumsum(attrs: Attrs, x: Array, axis: Array) -> tuple[Array, ...]:
    where = int(np.asarray(axis).reshape(-1)[0]) % x.ndim
    return (_directed(x, where, bool(attrs["exclusive"]), bool(attrs["reverse"]), np.add, 0),)


def cumprod(attrs: Attrs, x: Array, axis: Array) -> tuple[Array, ...]:
    where = int(np.asarray(axis).reshape(-1)[0]) % x.ndim
    return (_directed(x, where, bool(attrs["exclusive"]), bool(attrs["reverse"]), np.multiply, 1),)


# ------------------------------------------------------------------ boxes


def nonmaxsuppression(
    attrs: Attrs, boxes: Array, scores: Array, most: Array, overlap: Array, least: Array
) -> tuple[Array, ...]:
    """Per batch and class, greedily the best boxes that overlap none chosen before by more than `overlap`."""
    limit, threshold, floor = (np.asarray(v).reshape(-1)[0] for v in (most, overlap, least))
    chosen: list[tuple[int, int, int]] = []
    for n in range(boxes.shape[0]):
        low, high = _corners(boxes[n].astype(np.float32), attrs["center"])
        area = np.prod(high - low, axis=1)
        for c in range(scores.shape[1]):
            order = np.argsort(-scores[n, c], kind="stable")
            order = order[scores[n, c][order] > floor]
            kept = 0
            while order.size and kept < limit:
                best, order = order[0], order[1:]
                chosen.append((n, c, int(best)))
                kept += 1
                sides = np.minimum(high[best], high[order]) - np.maximum(low[best], low[order])
                shared = np.prod(np.clip(sides, 0, None), axis=1)
                union = area[best] + area[order] - shared
                order = order[~(shared > threshold * union) | (union <= 0)]
    return (np.array(chosen, np.int64).reshape(-1, 3),)


def _corners(boxes: Array, center: bool) -> tuple[Array, Array]:
    """Lowest and highest corner of boxes given by two opposite corners, or by centre and size."""
    if center:
        return boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    return np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])


def roialign(attrs: Attrs, x: Array, rois: Array, batch: Array) -> tuple[Array, ...]:
    """Means (or maxima) of bilinear samples on a grid in each cell of each region."""
    oh, ow = attrs["size"]
    height, width = x.shape[2:]
    out = np.zeros((rois.shape[0], x.shape[1], oh, ow), x.dtype)
    half = 0.5 if attrs["half_pixel"] else 0.0
    for r in range(rois.shape[0]):
        x1, y1, x2, y2 = (float(v) * attrs["scale"] - half for v in rois[r])
        w, h = x2 - x1, y2 - y1
        if not attrs["half_pixel"]:
            w, h = max(w, 1.0), max(h, 1.0)
        ratio = attrs["ratio"]
        ny, nx = (ratio, ratio) if ratio > 0 else (math.ceil(h / oh), math.ceil(w / ow))
        ys = y1 + (np.arange(oh * ny) + 0.5) * (h / (oh * ny)) if ny > 0 else np.zeros(0)
        xs = x1 + (np.arange(ow * nx) + 0.5) * (w / (ow * nx)) if nx > 0 else np.zeros(0)
        (ya, yb, wya, wyb), (xa, xb, wxa, wxb) = _linear_taps(ys, height), _linear_taps(xs, width)
        plane = x[int(batch[r])].astype(np.float64)
        corners = [
            plane[:, i][:, :, j] * (u[:, None] * v[None, :])
            for i, u in ((ya, wya), (yb, wyb)) for j, v in ((xa, wxa), (xb, wxb))
        ]  # fmt: skip
        samples = np.max(corners, axis=0) if attrs["mode"] == "max" else np.sum(corners, axis=0)
        cells = samples.reshape(x.shape[1], oh, ny, ow, nx)
        if ny and nx:
            out[r] = cells.max(axis=(2, 4)) if attrs["mode"] == "max" else cells.mean(axis=(2, 4))
    return (out,)


def _linear_taps(at: Array, extent: int) -> tuple[Array, Array, Array, Array]:
    """Two neighbours and their weights; no weight for what is more than one element outside."""
    inside = (at >= -1) & (at <= extent)
    at = np.clip(at, 0, extent - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, extent - 1)
    part = at - low
    return low, high, (1 - part) * inside, part * inside


def maxroipool(attrs: Attrs, x: Array, rois: Array) -> tuple[Array, ...]:
    """The maximum of each cell of each region (batch, x1, y1, x2, y2), in whole elements."""
    oh, ow = attrs["size"]
    out = np.zeros((rois.shape[0], x.shape[1], oh, ow), x.dtype)
    for r, roi in enumerate(rois):
        n = int(roi[0])
        x1, y1, x2, y2 = (math.floor(float(v) * attrs["scale"] + 0.5) for v in roi[1:])
        h, w = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        for i in range(oh):
            top, bottom = (min(max(v + y1, 0), x.shape[2]) for v in (i * h // oh, -(-(i + 1) * h // oh)))
            for j in range(ow):
                left, right = (min(max(v + x1, 0), x.shape[3]) for v in (j * w // ow, -(-(j + 1) * w // ow)))
                if bottom > top and right > left:
                    out[r, :, i, j] = x[n, :, top:bottom, left:right].max(axis=(1, 2))
    return (out,)


def deformconv(attrs: Attrs, x: Array, weight: Array, offset: Array, bias: Array, mask: Array) -> tuple[Array, ...]:
    """Convolution (any number of groups) whose taps are displaced by `offset` and sampled bilinearly, in two dims."""
    (kh, kw), (sh, sw), (dh, dw) = weight.shape[2:], attrs["strides"], attrs["dilations"]
    n, c, height, width = x.shape
    oh, ow = offset.shape[2:]
    shifts = offset.reshape(n, attrs["offset_groups"], kh * kw, 2, oh, ow).astype(np.float64)
    gains = mask.reshape(n, attrs["offset_groups"], kh * kw, oh, ow).astype(np.float64)
    gy, gx = np.mgrid[0:oh, 0:ow]
    per = c // attrs["offset_groups"]
    columns = np.zeros((n, c, kh * kw, oh, ow))
    for k in range(kh * kw):
        y = gy * sh - attrs["pads"][0] + (k // kw) * dh + shifts[:, :, k, 0]
        z = gx * sw - attrs["pads"][1] + (k % kw) * dw + shifts[:, :, k, 1]
        y0, z0 = np.floor(y).astype(np.int64), np.floor(z).astype(np.int64)
        for di in (0, 1):
            for dj in (0, 1):
                yi, zj = y0 + di, z0 + dj
                part = np.abs(1 - di - (y - y0)) * np.abs(1 - dj - (z - z0)) * gains[:, :, k]
                inside = (yi >= 0) & (yi < height) & (zj >= 0) & (zj < width)
                yi, zj = np.clip(yi, 0, height - 1), np.clip(zj, 0, width - 1)
                for ch in range(c):
                    g = ch // per
                    for i in range(n):
                        columns[i, ch, k] += part[i, g] * np.where(inside[i, g], x[i, ch][yi[i, g], zj[i, g]], 0)
    groups, m = attrs["groups"], weight.shape[0]
    taps = columns.reshape(n, groups, c // groups, kh * kw, oh, ow)
    kernel = weight.reshape(groups, m // groups, c // groups, kh * kw).astype(np.float64)
    out = np.einsum("ngckyx,gmck->ngmyx", taps, kernel, optimize=True).reshape(n, m, oh, ow)
    return ((out + bias.reshape(1, m, 1, 1)).astype(x.dtype),)


FUNCTIONS: dict[str, Callable[..., tuple[Array, ...]]] = {
    "flatnonzero": flatnonzero,
    "nonzero": nonzero,
    "unique": unique,
    "topk": topk,
    "range": range_of,
    "cumsum": cumsum,
    "cumprod": cumprod,
    "nonmaxsuppression": nonmaxsuppression,
    "roialign": roialign,
    "maxroipool": maxroipool,
    "deformconv": deformconv,
}
