"""Convolutions, written channels last: windows over positions, contracted with the kernel over (channel, taps).

    x (N, C, *S) -> transpose (N, *S, C) -> pad -> window (N, *O, C, *K) -> contract with w (M, C, *K) -> (N, *O, M)

The transposes of one convolution cancel with those of the next. A kernel of one element needs no window; where each
output channel reads one input channel nothing is reused, and it is a product and a sum over the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stitch.dims import Dim, ceil_div, dim_max
from stitch.graph import Builder, Shape, Value
from stitch.ops.contractions import centered, product_sum, requantized, sum_of_product
from stitch.ops.movement import pad_or_crop
from stitch.ops.registry import Call, operator


@dataclass(frozen=True)
class Taps:
    """Kernel sizes, strides, dilations and pads of the spatial axes, as a convolution or a pooling has them."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    lo: Shape
    hi: Shape

    @property
    def spans(self) -> tuple[int, ...]:
        """From the first to the last tap, both included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.sizes, self.dilations, strict=True))


def taps_of(call: Call, spatial: Shape, sizes: Sequence[int]) -> Taps:
    """The attributes kernel_shape (`sizes`), strides, dilations, pads and auto_pad, for an input of this extent."""
    r = len(spatial)
    if len(sizes) != r:
        raise call.invalid(f"a kernel of rank {len(sizes)} does not fit {r} spatial axes")
    strides = tuple(call.attr("strides", None) or (1,) * r)
    dilations = tuple(call.attr("dilations", None) or (1,) * r)
    pads = tuple(call.attr("pads", None) or (0,) * (2 * r))
    taps = Taps(tuple(sizes), strides, dilations, pads[:r], pads[r:])
    mode = call.attr("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return taps
    if mode == "VALID":
        return Taps(taps.sizes, strides, dilations, (0,) * r, (0,) * r)
    totals = [
        dim_max((ceil_div(d, s) - 1) * s + span - d, 0) if s > 1 else span - 1
        for d, s, span in zip(spatial, strides, taps.spans, strict=True)
    ]
    less = tuple(t // 2 for t in totals)
    more = tuple(t - p for t, p in zip(totals, less, strict=True))
    lo, hi = (less, more) if mode == "SAME_UPPER" else (more, less)
    return Taps(taps.sizes, strides, dilations, lo, hi)


def channels_last(b: Builder, x: Value) -> Value:
    return b.transpose(x, [0, *range(2, x.rank), 1])


def channels_first(b: Builder, x: Value) -> Value:
    return b.transpose(x, [0, x.rank - 1, *range(1, x.rank - 1)])


def kernel_sizes(call: Call, w: Value) -> tuple[int, ...]:
    out = []
    for d in w.shape[2:]:
        if not isinstance(d, int):
            raise call.unsupported("its kernel's extents must be numbers")
        out.append(d)
    return tuple(out)


def convolve(b: Builder, x: Value, w: Value, taps: Taps, groups: int) -> Value:
    """Channels-last x (N, *S, C), not yet padded, with w (M, C/groups, *K): (N, *O, M)."""
    r = len(taps.sizes)
    x = pad_or_crop(b, x, [0, *taps.lo, 0], [0, *taps.hi, 0])
    depthwise = w.shape[:2] == (groups, 1)  # one input and one output channel in a group
    parts = 1 if depthwise else groups
    offsets = range(r + 4, 2 * r + 4) if any(k > 1 for k in taps.sizes) else range(0)
    if offsets:
        x = b.window(grouped(b, x, r + 1, parts), range(1, r + 1), taps.sizes, taps.strides, taps.dilations)
    else:  # a single tap
        sizes = [(d - 1) // s + 1 for d, s in zip(x.shape[1:-1], taps.strides, strict=True)]
        x = b.slice(x, [0] * x.rank, [x.shape[0], *sizes, x.shape[-1]], [1, *taps.strides, 1])
        x, w = grouped(b, x, r + 1, parts), b.reshape(w, w.shape[:2])
    positions, group, m, k = range(r + 1), [r + 1] * (parts > 1), r + 2, r + 3
    if depthwise:
        w = b.reshape(w, [groups, *w.shape[2:]])
        return sum_of_product(b, x, w, [*positions, m, *offsets], [m, *offsets], [*positions, m])
    ws = [*group, m, k, *offsets]
    y = product_sum(b, x, grouped(b, w, 0, parts), [*positions, *group, k, *offsets], ws, [*positions, *group, m])
    return b.reshape(y, [*y.shape[: r + 1], groups * y.shape[-1]]) if group else y


def grouped(b: Builder, x: Value, axis: int, groups: int) -> Value:
    """Channels split into (groups, channels of a group)."""
    if groups == 1:
        return x
    return b.reshape(x, [*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :]])


def biased(b: Builder, y: Value, bias: Value | None) -> Value:
    return y if bias is None else b.add(y, bias)


@operator("Conv")
def conv(b: Builder, call: Call, x: Value, w: Value, bias: Value | None = None) -> Value:
    taps = taps_of(call, x.shape[2:], kernel_sizes(call, w))
    groups = _groups(b, call, x.shape[1], w.shape[1])
    return channels_first(b, biased(b, convolve(b, channels_last(b, x), w, taps, groups), bias))


def _groups(b: Builder, call: Call, channels: Dim, per: Dim) -> int:
    groups: int = call.attr("group", 1)
    b.unify(channels, per * groups)
    return groups


# ------------------------------------------------------------------ quantised


@operator("ConvInteger", since=10)
def conv_integer(
    b: Builder, call: Call, x: Value, w: Value, x_zero: Value | None = None, w_zero: Value | None = None
) -> Value:
    return channels_first(b, _convolved(b, call, x, w, x_zero, w_zero))


def _convolved(b: Builder, call: Call, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None) -> Value:
    """int32, channels last. Padding comes after the zero point is subtracted, so that it is with zero points."""
    taps = taps_of(call, x.shape[2:], kernel_sizes(call, w))
    groups = _groups(b, call, x.shape[1], w.shape[1])
    x, w = centered(b, x, x_zero), centered(b, w, w_zero, [-1] + [1] * (w.rank - 1))
    return convolve(b, channels_last(b, x), w, taps, groups)


@operator("QLinearConv", since=10)
def qlinear_conv(
    b: Builder, call: Call, x: Value, x_scale: Value, x_zero: Value, w: Value, w_scale: Value, w_zero: Value,
    y_scale: Value, y_zero: Value, bias: Value | None = None,
) -> Value:  # fmt: skip
    acc = biased(b, _convolved(b, call, x, w, x_zero, w_zero), bias)
    scales = [b.reshape(s, ()) if s.size == 1 else s for s in (x_scale, w_scale, y_scale)]
    factor = b.div(b.mul(scales[0], scales[1]), scales[2])
    return channels_first(b, requantized(b, acc, factor, b.reshape(y_zero, ())))


# ------------------------------------------------------------------ deformable


@operator("DeformConv", since=19)
def deform_conv(
    b: Builder, call: Call, x: Value, w: Value, offset: Value, bias: Value | None = None, mask: Value | None = None
) -> Value:
    if x.rank != 4:
        raise call.unsupported("only two spatial axes are")
    taps = taps_of(call, x.shape[2:], kernel_sizes(call, w))
    groups, offset_groups = call.attr("group", 1), call.attr("offset_group", 1)
    spatial = offset.shape[2:]
    if bias is None:
        bias = b.broadcast(b.const(0, x.dtype), [w.shape[0]])
    if mask is None:
        mask = b.broadcast(b.const(1, x.dtype), [x.shape[0], offset_groups * taps.sizes[0] * taps.sizes[1], *spatial])
    return b.host(
        "deformconv", [x, w, offset, bias, mask], [(x.dtype, (x.shape[0], w.shape[0], *spatial))],
        strides=taps.strides, dilations=taps.dilations, pads=taps.lo, groups=groups, offset_groups=offset_groups,
    )[0]  # fmt: skip
