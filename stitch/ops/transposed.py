"""Transposed convolutions: each input element adds a scaled kernel to the output.

What falls on output element q s + p, for a stride s and a phase p < s, are the taps k = p + s j, from the input
elements q - j. So one window over J = ceil(K / s) input elements serves all phases, and the phases are as good as
channels of the output:

    x (N, *S, C) -> pad -> window (N, *Q, C, *J) -> contract with w (C, M, *J, *P) -> (N, Q, P, Q, P, .., M)

which is the output but for what is cut off at the ends. Nothing is multiplied that is not needed: where s does not
divide K, the phases p < K mod s have one tap more than the others, and each kind has a contraction of its own. Nor
would it do to give the others a weight of zero, since that times infinity is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from stitch.dims import Dim
from stitch.graph import Builder, Shape, Value
from stitch.ops.contractions import product_sum, sum_of_product
from stitch.ops.convolution import Taps, biased, channels_first, channels_last, grouped, kernel_sizes
from stitch.ops.movement import pad_or_crop
from stitch.ops.registry import Call, operator

Ints: TypeAlias = Sequence[int]


@dataclass(frozen=True)
class Phases:
    """Neighbouring phases of an axis that have the same number of taps."""

    first: int
    count: int
    taps: int


@operator("ConvTranspose")
def conv_transpose(b: Builder, call: Call, x: Value, w: Value, bias: Value | None = None) -> Value:
    sizes = kernel_sizes(call, w)
    r, groups = len(sizes), call.attr("group", 1)
    strides = tuple(call.attr("strides", None) or (1,) * r)
    dilations = tuple(call.attr("dilations", None) or (1,) * r)
    extra = tuple(call.attr("output_padding", None) or (0,) * r)
    taps = Taps(sizes, strides, dilations, (0,) * r, (0,) * r)
    lo, hi = _trimmed(call, x.shape[2:], taps, extra)
    b.unify(x.shape[1], w.shape[0])
    full = [(d - 1) * s + span for d, s, span in zip(x.shape[2:], strides, taps.spans, strict=True)]
    y = _scattered(b, channels_last(b, x), w, taps, groups)
    after = [f + e - p - d for f, e, p, d in zip(full, extra, hi, y.shape[1:-1], strict=True)]
    y = pad_or_crop(b, y, [0, *(-p for p in lo), 0], [0, *after, 0])
    return channels_first(b, biased(b, y, bias))


def _scattered(b: Builder, x: Value, w: Value, taps: Taps, groups: int) -> Value:
    """Channels-last x (N, *S, C) with w (C, M/groups, *K): (N, *O, M), whose extents are multiples of the strides and
    not below those of the full result."""
    steps = [d if s == 1 else 1 for s, d in zip(taps.strides, taps.dilations, strict=True)]
    w = _spread(b, w, [d // step for d, step in zip(taps.dilations, steps, strict=True)])
    kinds = [_kinds(k, s) for k, s in zip(_numbers(w.shape[2:]), taps.strides, strict=True)]
    y = _phases(b, x, w, taps.strides, steps, kinds, [], groups)
    spatial = [d + (kind[0].taps - 1) * step for d, kind, step in zip(x.shape[1:-1], kinds, steps, strict=True)]
    woven = [d * s for d, s in zip(spatial, taps.strides, strict=True)]
    return b.reshape(y, [x.shape[0], *woven, groups * w.shape[1]])


def _numbers(shape: Shape) -> list[int]:
    return [d for d in shape if isinstance(d, int)]


def _kinds(size: int, stride: int) -> list[Phases]:
    """The phases by number of taps, those with more first."""
    fewer, rest = divmod(size, stride)
    return [Phases(0, rest, fewer + 1)] * (rest > 0) + [Phases(rest, stride - rest, fewer)]


def _spread(b: Builder, w: Value, dilations: Ints) -> Value:
    """A kernel with dilation - 1 zeros behind each tap but the last."""
    for axis, d in enumerate(dilations, 2):
        if d > 1:
            size = w.shape[axis]
            split = [*w.shape[: axis + 1], 1, *w.shape[axis + 1 :]]
            hi = [d - 1 if i == axis + 1 else 0 for i in range(w.rank + 1)]
            wide = b.pad(b.reshape(w, split), [0] * len(hi), hi)
            w = b.reshape(wide, [*w.shape[:axis], size * d, *w.shape[axis + 1 :]])
            w = b.slice(w, [0] * w.rank, [n - (d - 1) * (i == axis) for i, n in enumerate(w.shape)])
    return w


def _phases(
    b: Builder,
    x: Value,
    w: Value,
    strides: Ints,
    steps: Ints,
    kinds: Sequence[Sequence[Phases]],
    chosen: list[Phases],
    groups: int,
) -> Value:
    """(N, Q, P, Q, P, .., groups, M/groups), an axis P for each stride above 1: those phases of the first axes that
    are `chosen`, and all of the others."""
    axis = len(chosen)
    if axis == len(strides):
        return _contracted(b, x, w, strides, steps, [kind[0].taps for kind in kinds], chosen, groups)
    parts = [_phases(b, x, w, strides, steps, kinds, [*chosen, kind], groups) for kind in kinds[axis]]
    at = axis + 2 + sum(s > 1 for s in strides[:axis])
    return b.concat(parts, at) if len(parts) > 1 else parts[0]


def _contracted(
    b: Builder, x: Value, w: Value, strides: Ints, steps: Ints, most: Ints, chosen: Sequence[Phases], groups: int
) -> Value:
    """The same for one kind of phases along each axis; `most` taps are those of the kind that has more."""
    r, taps = len(strides), [p.taps for p in chosen]
    positions, phases, offsets = range(1, r + 1), range(r + 1, 2 * r + 1), range(2 * r + 1, 3 * r + 1)
    m, k, group = 3 * r + 1, 3 * r + 2, [3 * r + 3] * (groups > 1)
    there = [[p] * (s > 1) for p, s in zip(phases, strides, strict=True)]
    woven = [label for q, p in zip(positions, there, strict=True) for label in (q, *p)]
    if 0 in taps:
        q = [d + n - 1 for d, n in zip(x.shape[1:-1], most, strict=True)]
        extent = dict(zip(phases, [p.count for p in chosen], strict=True)) | dict(zip(positions, q, strict=True))
        shape = [x.shape[0], *(extent[label] for label in woven), *[groups] * (groups > 1), w.shape[1]]
        return b.broadcast(b.const(0, x.dtype), shape)
    depthwise = w.shape[1] == 1 and x.shape[-1] == groups
    lo, hi = ([(n - 1) * step for n, step in zip(counts, steps, strict=True)] for counts in (taps, most))
    x = grouped(b, pad_or_crop(b, x, [0, *lo, 0], [0, *hi, 0]), r + 1, groups)
    x = b.window(x, positions, taps, [1] * r, steps) if set(taps) != {1} else b.reshape(x, [*x.shape, *taps])
    w = grouped(b, _taken(b, w, strides, chosen), 0, groups)
    summed = [label for j, p in zip(offsets, there, strict=True) for label in (j, *p)]
    labels = [0, *positions, *group, k, *offsets], [*group, k, m, *summed], [0, *woven, *group, m]
    return (sum_of_product if depthwise else product_sum)(b, x, w, *labels)


def _taken(b: Builder, w: Value, strides: Ints, chosen: Sequence[Phases]) -> Value:
    """w (C, M, *K) as (C, M, J, P, J, P, ..): taps of the chosen phases, the last first; no P for a stride of 1."""
    shape: list[Dim] = [*w.shape[:2]]
    hi, starts, sizes, turns = [0, 0], [0, 0], list(w.shape[:2]), [1, 1]
    for size, s, p in zip(_numbers(w.shape[2:]), strides, chosen, strict=True):
        count = -(-size // s)
        hi.append(count * s - size)
        shape += [count, s] if s > 1 else [count]
        starts += [p.taps - 1, p.first] if s > 1 else [p.taps - 1]
        sizes += [p.taps, p.count] if s > 1 else [p.taps]
        turns += [-1, 1] if s > 1 else [-1]
    return b.slice(b.reshape(b.pad(w, [0] * w.rank, hi), shape), starts, sizes, turns)


def _trimmed(call: Call, spatial: Shape, taps: Taps, extra: Ints) -> tuple[list[Dim], list[Dim]]:
    """How much is cut off the full result at both ends: the pads, or what they follow from."""
    r = len(spatial)
    full = [(d - 1) * s + span for d, s, span in zip(spatial, taps.strides, taps.spans, strict=True)]
    wanted, mode = call.attr("output_shape"), call.attr("auto_pad", "NOTSET")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [d * s for d, s in zip(spatial, taps.strides, strict=True)]
    if not wanted:
        pads = list(call.attr("pads", None) or (0,) * (2 * r)) if mode in ("NOTSET", "") else [0] * (2 * r)
        return pads[:r], pads[r:]
    totals = [f + e - d for f, e, d in zip(full, extra, list(wanted)[-r:], strict=True)]
    half = [t // 2 for t in totals]
    rest = [t - p for t, p in zip(totals, half, strict=True)]
    return (half, rest) if mode == "SAME_UPPER" else (rest, half)
