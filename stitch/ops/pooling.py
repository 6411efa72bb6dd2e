"""Pooling: reductions over windows (channels last, as convolutions are), over regions, and the way back."""

from __future__ import annotations

from dataclasses import replace

from stitch import dims, dtypes
from stitch.dims import Dim, dim_min, product
from stitch.graph import Builder, Shape, Value
from stitch.ops.convolution import Taps, channels_first, channels_last, taps_of
from stitch.ops.movement import pad_or_crop, slice_axis
from stitch.ops.registry import Call, operator


def _taps(call: Call, x: Value) -> Taps:
    return taps_of(call, x.shape[2:], call.attr("kernel_shape", ()))


def _rounded_up(call: Call, taps: Taps, spatial: Shape) -> tuple[Taps, Shape | None]:
    """With ceil_mode: pads with which no window is cut short, and the number of windows (None: all there are).

    A window must start inside the input or the padding before it.
    """
    if not call.attr("ceil_mode", 0):
        return taps, None
    rows = list(zip(spatial, taps.lo, taps.hi, taps.spans, taps.strides, strict=True))
    counts = tuple(
        dim_min(dims.ceil_div(d + lo + hi - span, s) + 1, (d + lo - 1) // s + 1) for d, lo, hi, span, s in rows
    )
    # The one window that is larger than its input (EfficientNet's last pool is 1280 x 1280 over 7 x 7) is cut to it.
    within = [d + lo + hi if count == 1 else None for (d, lo, hi, _, _), count in zip(rows, counts, strict=True)]
    cut = [isinstance(n, int) and span >= n for n, span in zip(within, taps.spans, strict=True)]
    sizes = tuple(
        (n - 1) // dilation + 1 if small and isinstance(n, int) else size
        for n, small, size, dilation in zip(within, cut, taps.sizes, taps.dilations, strict=True)
    )
    hi = tuple(hi if small else hi + s - 1 for small, (_, _, hi, _, s) in zip(cut, rows, strict=True))
    return replace(taps, sizes=sizes, hi=hi), counts


def _windows(b: Builder, x: Value, taps: Taps, counts: Shape | None, fill: float | int | bool) -> Value:
    """Channels-last windows (N, *O, C, *K) of a channels-last x."""
    r = len(taps.sizes)
    x = pad_or_crop(b, x, [0, *taps.lo, 0], [0, *taps.hi, 0], fill)
    y = b.window(x, range(1, r + 1), taps.sizes, taps.strides, taps.dilations)
    return y if counts is None else b.slice(y, [0] * y.rank, [x.shape[0], *counts, *y.shape[r + 1 :]])


def _window_axes(x: Value) -> range:
    """The window's axes among those of (N, *O, C, *K)."""
    r = (x.rank - 2) // 2
    return range(r + 2, 2 * r + 2)


# ------------------------------------------------------------------ over windows


@operator("MaxPool")
def max_pool(b: Builder, call: Call, x: Value) -> tuple[Value | None, ...]:
    taps, counts = _rounded_up(call, _taps(call, x), x.shape[2:])
    windows = _windows(b, channels_last(b, x), taps, counts, dtypes.lowest(x.dtype))
    y = channels_first(b, b.reduce("reduce_max", windows, _window_axes(windows)))
    wanted = len(call.outputs) > 1 and call.outputs[1]
    return y, channels_first(b, _places(b, call, windows, x.shape, taps)) if wanted else None


def _places(b: Builder, call: Call, windows: Value, shape: Shape, taps: Taps) -> Value:
    """Where in the flattened input each window has its maximum, channels last."""
    r = len(taps.sizes)
    outer = windows.shape[: r + 2]
    tap = b.apply("argmax", b.reshape(windows, [*outer, product(taps.sizes)]), axis=r + 2, last=0)
    order = range(r) if not call.attr("storage_order", 0) else range(r - 1, -1, -1)
    index = b.add(b.mul(b.iota(outer, 0), b.dims(shape[1])), b.iota(outer, r + 1))
    for i in order:
        inner = product(taps.sizes[i + 1 :])
        mine = b.elementwise("mod", b.div(tap, b.dims(inner)), taps.sizes[i])
        start = b.sub(b.mul(b.iota(outer, i + 1), taps.strides[i]), b.dims(taps.lo[i]))
        at = b.add(start, b.mul(mine, taps.dilations[i]))
        at = b.min(b.max(at, 0), b.dims(shape[i + 2] - 1))  # a window of nothing but the lowest value: not its pad
        index = b.add(b.mul(index, b.dims(shape[i + 2])), at)
    return index


@operator("AveragePool")
def average_pool(b: Builder, call: Call, x: Value) -> Value:
    declared = _taps(call, x)
    taps, counts = _rounded_up(call, declared, x.shape[2:])
    wide = b.cast(channels_last(b, x), dtypes.compute(x.dtype))
    windows = _windows(b, wide, taps, counts, 0)
    total = b.reduce("reduce_sum", windows, _window_axes(windows))
    mean = b.div(total, _population(b, call, declared, taps, counts, total, x.shape[2:]))
    return channels_first(b, b.cast(mean, x.dtype))


def _population(
    b: Builder, call: Call, declared: Taps, taps: Taps, counts: Shape | None, total: Value, spatial: Shape
) -> Value:
    """How many elements of each window count: the whole kernel, or those that are not beyond the edges."""
    include = call.attr("count_include_pad", 0)
    result: Value | None = None
    whole = 1
    for i, size in enumerate(taps.sizes):
        lo, hi = (declared.lo[i], declared.hi[i]) if include else (0, 0)
        before, after = taps.lo[i] - lo, taps.hi[i] - hi
        if before == 0 and after == 0:
            whole *= size
            continue
        ones = b.pad(b.broadcast(b.const(1, total.dtype), [spatial[i] + lo + hi]), [before], [after])
        row = b.window(ones, [0], [size], [taps.strides[i]], [taps.dilations[i]])
        if counts is not None:
            row = slice_axis(b, row, 0, 0, counts[i])
        row = b.reduce("reduce_sum", row, [1])
        row = b.reshape(row, [d if k == i + 1 else 1 for k, d in enumerate(total.shape)])
        result = row if result is None else b.mul(result, row)
    full = b.const(whole, total.dtype)
    return full if result is None else result if whole == 1 else b.mul(result, full)


@operator("LpPool")
def lp_pool(b: Builder, call: Call, x: Value) -> Value:
    taps, counts = _rounded_up(call, _taps(call, x), x.shape[2:])
    windows = _windows(b, channels_last(b, x), taps, counts, 0)
    return channels_first(b, _norm(b, windows, _window_axes(windows), call.attr("p", 2)))


def _norm(b: Builder, x: Value, axes: range, p: float, keepdims: bool = False) -> Value:
    """The p-norm over some axes."""
    wide = b.cast(x, dtypes.compute(x.dtype))
    if p == 2:
        y = b.unary("sqrt", b.reduce("reduce_sum", b.mul(wide, wide), axes, keepdims))
    elif p == 1:
        y = b.reduce("reduce_sum", b.unary("abs", wide), axes, keepdims)
    else:
        y = b.pow(b.reduce("reduce_sum", b.pow(b.unary("abs", wide), float(p)), axes, keepdims), 1.0 / p)
    return b.cast(y, x.dtype)


# ------------------------------------------------------------------ over everything


@operator("GlobalAveragePool")
def global_average_pool(b: Builder, call: Call, x: Value) -> Value:
    wide = b.cast(x, dtypes.compute(x.dtype))
    return b.cast(b.mean(wide, range(2, x.rank), keepdims=True), x.dtype)


@operator("GlobalMaxPool")
def global_max_pool(b: Builder, call: Call, x: Value) -> Value:
    return b.reduce("reduce_max", x, range(2, x.rank), keepdims=True)


@operator("GlobalLpPool")
def global_lp_pool(b: Builder, call: Call, x: Value) -> Value:
    return _norm(b, x, range(2, x.rank), call.attr("p", 2), keepdims=True)


# ------------------------------------------------------------------ the way back


@operator("MaxUnpool", since=9)
def max_unpool(b: Builder, call: Call, x: Value, places: Value, output_shape: Value | None = None) -> Value:
    """Maxima put back where they came from, zeros elsewhere. The places count in the output of the default shape."""
    taps = _taps(call, x)
    rows = zip(x.shape[2:], taps.strides, taps.spans, taps.lo, taps.hi, strict=True)
    inferred: list[Dim] = [*x.shape[:2], *((d - 1) * s + span - lo - hi for d, s, span, lo, hi in rows)]
    flat = b.broadcast(b.const(0, x.dtype), [product(inferred)])
    size = x.size
    picked = b.apply("scatter", flat, b.reshape(x, [size]), b.reshape(places, [size]), axes=(0,), op="none")
    y = b.reshape(picked, inferred)
    if output_shape is None:
        return y
    wanted = call.dims(output_shape, "output shape")
    return pad_or_crop(b, y, [0] * y.rank, [w - d for w, d in zip(wanted, inferred, strict=True)])


# ------------------------------------------------------------------ over regions


@operator("RoiAlign", since=10)
def roi_align(b: Builder, call: Call, x: Value, rois: Value, batch: Value) -> Value:
    size = (call.attr("output_height", 1), call.attr("output_width", 1))
    mode = call.attr("coordinate_transformation_mode", "half_pixel" if call.opset >= 16 else "output_half_pixel")
    return b.host(
        "roialign", [x, rois, batch], [(x.dtype, (rois.shape[0], x.shape[1], *size))],
        size=size, half_pixel=mode == "half_pixel", mode=call.attr("mode", "avg"),
        ratio=call.attr("sampling_ratio", 0), scale=call.attr("spatial_scale", 1.0),
    )[0]  # fmt: skip


@operator("MaxRoiPool")
def max_roi_pool(b: Builder, call: Call, x: Value, rois: Value) -> Value:
    size = tuple(call.attr("pooled_shape"))
    outputs: list[tuple[dtypes.DType, Shape]] = [(x.dtype, (rois.shape[0], x.shape[1], *size))]
    return b.host("maxroipool", [x, rois], outputs, size=size, scale=call.attr("spatial_scale", 1.0))[0]
