"""Operators that move elements without computing with them: reshape, transpose, slice, pad, concat, split."""

from __future__ import annotations

from collections.abc import Sequence

from stitch import dims
from stitch.dims import Dim, dim_max, dim_min, product, prove_equal, prove_le
from stitch.graph import Builder, Shape, Value
from stitch.ops.registry import Call, axes_of, axis_of, operator

FAR = 10**9  # exporters write "to the end" as a number of at least this

# ------------------------------------------------------------------ shapes


@operator("Reshape")
def reshape(b: Builder, call: Call, x: Value, shape: Value | None = None) -> Value:
    wanted = call.dims(shape, "shape") if shape is not None else tuple(call.attr("shape", ()))
    copies = not call.attr("allowzero", 0)
    out: list[Dim] = []
    unknown = None
    have: list[Dim] = list(x.shape)  # extents that the copied axes do not account for
    rest: Dim = 1
    for i, d in enumerate(wanted):
        if isinstance(d, int) and d == 0 and copies:
            if i >= x.rank:
                raise call.invalid(f"its shape copies axis {i}, which its input does not have")
            d = x.shape[i]
            have[i] = 1
        elif isinstance(d, int) and d == -1:
            if unknown is not None:
                raise call.invalid("its shape holds -1 twice")
            unknown, d = i, 1
        else:
            rest = rest * d
        out.append(d)
    if unknown is not None:
        total = product(have)
        exact = dims.quotient(total, rest)
        out[unknown] = total // rest if exact is None else exact
    return b.reshape(x, out)


@operator("Transpose")
def transpose(b: Builder, call: Call, x: Value) -> Value:
    perm = call.attr("perm", tuple(reversed(range(x.rank))))
    if sorted(perm) != list(range(x.rank)):
        raise call.invalid(f"perm {tuple(perm)} does not fit rank {x.rank}")
    return b.transpose(x, perm)


@operator("Squeeze")
def squeeze(b: Builder, call: Call, x: Value, axes: Value | None = None) -> Value:
    given = call.attr("axes") if axes is None else call.ints(axes, "axes")
    if given is None:
        if any(prove_equal(d, 1) is None for d in x.shape):
            raise call.unsupported("name the axes to squeeze: its input has symbolic dims, any of which may be 1")
        given = [i for i, d in enumerate(x.shape) if d == 1]
    drop = axes_of(given, x.rank)
    for a in drop:
        b.unify(x.shape[a], 1)
    return b.reshape(x, [d for i, d in enumerate(x.shape) if i not in drop])


@operator("Unsqueeze")
def unsqueeze(b: Builder, call: Call, x: Value, axes: Value | None = None) -> Value:
    given = call.attr("axes", ()) if axes is None else call.ints(axes, "axes")
    rank = x.rank + len(given)
    new = axes_of(given, rank)
    if len(new) != len(given):
        raise call.invalid(f"axes {tuple(given)} repeat an axis")
    rest = iter(x.shape)
    return b.reshape(x, [1 if i in new else next(rest) for i in range(rank)])


@operator("Flatten")
def flatten(b: Builder, call: Call, x: Value) -> Value:
    axis = call.attr("axis", 1)
    if not -x.rank <= axis <= x.rank:
        raise call.invalid(f"axis {axis} is out of range for rank {x.rank}")
    axis += x.rank if axis < 0 else 0
    return b.reshape(x, [product(x.shape[:axis]), product(x.shape[axis:])])


@operator("Expand", since=8)
def expand(b: Builder, call: Call, x: Value, shape: Value) -> Value:
    return b.broadcast(x, b.broadcast_shape(x.shape, call.dims(shape, "shape")))


@operator("Tile", since=1, until=5)
def tile_axis(b: Builder, call: Call, x: Value, tiles: Value, axis: Value) -> Value:
    (count,), (where,) = call.dims(tiles, "tiles"), call.ints(axis, "axes")
    repeats: list[Dim] = [1] * x.rank
    repeats[axis_of(where, x.rank)] = count
    return tiled(b, x, repeats)


@operator("Tile", since=6)
def tile(b: Builder, call: Call, x: Value, repeats: Value) -> Value:
    counts = call.dims(repeats, "repeats")
    if len(counts) != x.rank:
        raise call.invalid(f"{len(counts)} repeats do not fit rank {x.rank}")
    return tiled(b, x, counts)


def tiled(b: Builder, x: Value, repeats: Sequence[Dim]) -> Value:
    """Each axis repeated as a whole, by a broadcast on a new axis before it."""
    narrow: list[Dim] = []
    wide: list[Dim] = []
    for r, d in zip(repeats, x.shape, strict=True):
        if r == 1 or d == 1:
            narrow.append(d)
            wide.append(r * d)
        else:
            narrow += [1, d]
            wide += [r, d]
    out = [r * d for r, d in zip(repeats, x.shape, strict=True)]
    return b.reshape(b.broadcast(b.reshape(x, narrow), wide), out)


# ------------------------------------------------------------------ joining and cutting


@operator("Concat")
def concat(b: Builder, call: Call, *xs: Value) -> Value:
    axis = call.attr("axis", 1 if call.opset < 4 else None)
    if axis is None:
        raise call.invalid("it has no axis")
    return b.concat(xs, axis_of(axis, xs[0].rank))


@operator("Split")
def split(b: Builder, call: Call, x: Value, sizes: Value | None = None) -> tuple[Value, ...]:
    axis = axis_of(call.attr("axis", 0), x.rank)
    extent = x.shape[axis]
    given = call.attr("split") if sizes is None else call.dims(sizes, "sizes")
    parts: list[Dim]
    if given is not None:
        parts = list(given)
        b.unify(sum(parts, start=0), extent)
    else:
        parts = _equal_parts(b, call, extent, call.attr("num_outputs", len(call.outputs)))
    starts = [sum(parts[:i], start=0) for i in range(len(parts))]
    return tuple(slice_axis(b, x, axis, s, n) for s, n in zip(starts, parts, strict=True))


def _equal_parts(b: Builder, call: Call, extent: Dim, count: int) -> list[Dim]:
    """Before opset 18 the parts are equal; from then on the last is what remains."""
    exact = dims.quotient(extent, count)
    if exact is not None:
        return [exact] * count
    if call.opset < 18:
        part = extent // count
        b.unify(part * count, extent)
        return [part] * count
    part = dims.ceil_div(extent, count)
    return [dim_max(dim_min(part, extent - part * i), 0) for i in range(count)]


def slice_axis(b: Builder, x: Value, axis: int, start: Dim, size: Dim, step: int = 1) -> Value:
    """x[start + step * i] for i < size on one axis."""
    starts: list[Dim] = [0] * x.rank
    sizes, steps = list(x.shape), [1] * x.rank
    starts[axis], sizes[axis], steps[axis] = start, size, step
    return b.slice(x, starts, sizes, steps)


@operator("Slice", since=1, until=9)
def slice_by_attributes(b: Builder, call: Call, x: Value) -> Value:
    starts, ends = call.attr("starts", ()), call.attr("ends", ())
    return _sliced(b, call, x, starts, ends, call.attr("axes", range(len(starts))), [1] * len(starts))


@operator("Slice", since=10)
def slice_by_inputs(
    b: Builder, call: Call, x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None
) -> Value:
    first, last = call.dims(starts, "starts"), call.dims(ends, "ends")
    where = range(len(first)) if axes is None else call.ints(axes, "axes")
    strides = [1] * len(first) if steps is None else call.ints(steps, "steps")
    return _sliced(b, call, x, first, last, where, strides)


def _sliced(
    b: Builder, call: Call, x: Value, starts: Sequence[Dim], ends: Sequence[Dim], axes: Sequence[int],
    steps: Sequence[int],
) -> Value:  # fmt: skip
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise call.invalid("its starts, ends, axes and steps differ in length")
    at: list[Dim] = [0] * x.rank
    sizes, strides = list(x.shape), [1] * x.rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 0:
            raise call.invalid("a step is 0")
        a = axis_of(axis, x.rank)
        at[a], sizes[a] = _bounded(b, start, end, step, x.shape[a])
        strides[a] = step
    return b.slice(x, at, sizes, strides)


def _bounded(b: Builder, start: Dim, end: Dim, step: int, extent: Dim) -> tuple[Dim, Dim]:
    """First element and number of elements of ONNX's [start:end:step]: numpy's, but that with a negative step a start
    before the first element is the first.

    Where nothing is left the first element may lie outside: it is never read. Not clamping it keeps the sizes of
    x[1:] and x[:-1] the same expression, max(n - 1, 0).
    """
    start, end = _from_front(b, start, extent, step), _from_front(b, end, extent, step)
    if step > 0:
        start, end = dim_max(start, 0), _within(b, end, extent)
        return start, dim_max(dims.ceil_div(end - start, step), 0)
    start = start if start == extent - 1 else dim_min(dim_max(start, 0), extent - 1)
    end = dim_max(end, -1)
    return start, dim_max(dims.ceil_div(start - end, -step), 0)


def _within(b: Builder, end: Dim, extent: Dim) -> Dim:
    """min(end, extent); but that a symbolic end fits an extent that is a number is assumed, by a guard.

    Such a slice takes the head of a table, of positions or of a mask, and what follows needs all of it.
    """
    inside = dim_min(end, extent)
    if isinstance(extent, int) and not isinstance(end, int) and prove_equal(inside, end) is None:
        b.unify(inside, end)
        return end
    return inside


def _from_front(b: Builder, position: Dim, extent: Dim, step: int) -> Dim:
    """A position that counts from the end if it is negative, as one that counts from the front."""
    if isinstance(position, int) and abs(position) >= FAR:
        return extent if position > 0 else 0 if step > 0 else -1
    if prove_le(0, position):
        return position
    if prove_le(position, -1):
        return position + extent
    if prove_le(position, 0):  # x[-n:] is all but impossible with n = 0, where it would mean all of x
        b.unify(dim_min(-position, 1), 1)
        return position + extent
    return position + extent * dim_min(dim_max(-position, 0), 1)


# ------------------------------------------------------------------ padding


@operator("Pad", since=1, until=10)
def pad_by_attributes(b: Builder, call: Call, x: Value) -> Value:
    pads = call.attr("pads", call.attr("paddings", ()))
    return _padded(b, call, x, pads, range(x.rank), b.const(call.attr("value", 0.0), x.dtype))


@operator("Pad", since=11)
def pad_by_inputs(
    b: Builder, call: Call, x: Value, pads: Value, value: Value | None = None, axes: Value | None = None
) -> Value:
    where = range(x.rank) if axes is None else [axis_of(a, x.rank) for a in call.ints(axes, "axes")]
    fill = b.const(0, x.dtype) if value is None else b.reshape(value, ())
    return _padded(b, call, x, call.dims(pads, "pads"), where, fill)


def _padded(b: Builder, call: Call, x: Value, pads: Sequence[Dim], axes: Sequence[int], fill: Value) -> Value:
    if len(pads) != 2 * len(axes):
        raise call.invalid(f"{len(pads)} pads do not fit {len(axes)} axes")
    lo: list[Dim] = [0] * x.rank
    hi: list[Dim] = [0] * x.rank
    for i, a in enumerate(axes):
        lo[a], hi[a] = pads[i], pads[i + len(axes)]
    mode = call.attr("mode", "constant")
    if mode == "constant":
        number = _number(call, fill)
        if number is not None:
            return pad_or_crop(b, x, lo, hi, number)
        inside = pad_or_crop(b, b.broadcast(b.const(True), x.shape), lo, hi, False)
        return b.where(inside, pad_or_crop(b, x, lo, hi, 0), fill)
    x = pad_or_crop(b, x, [dim_min(d, 0) for d in lo], [dim_min(d, 0) for d in hi], 0)
    for a in range(x.rank):
        before, after = dim_max(lo[a], 0), dim_max(hi[a], 0)
        if before != 0 or after != 0:
            x = _extended(b, call, x, a, before, after, mode)
    return x


def _number(call: Call, value: Value) -> float | int | bool | None:
    array = call.known(value)
    if array is None:
        return None
    number: float | int | bool = array.reshape(-1)[0].item()
    return number


def pad_or_crop(b: Builder, x: Value, lo: Sequence[Dim], hi: Sequence[Dim], value: float | int | bool = 0) -> Value:
    """Constant padding where lo and hi may be negative, which crops."""
    x = b.pad(x, [dim_max(d, 0) for d in lo], [dim_max(d, 0) for d in hi], value)
    cut_lo, cut_hi = [dim_max(-d, 0) for d in lo], [dim_max(-d, 0) for d in hi]
    return b.slice(x, cut_lo, [d - p - q for d, p, q in zip(x.shape, cut_lo, cut_hi, strict=True)])


def _extended(b: Builder, call: Call, x: Value, axis: int, before: Dim, after: Dim, mode: str) -> Value:
    """One axis extended by reflection, by its edges, or periodically: slices where they are enough, else a gather."""
    n = x.shape[axis]

    def piece(start: Dim, size: Dim, step: int = 1) -> list[Value]:
        return [slice_axis(b, x, axis, start, size, step)] if size != 0 else []

    def edge(start: Dim, size: Dim) -> list[Value]:
        shape = [size if i == axis else d for i, d in enumerate(x.shape)]
        return [b.broadcast(p, shape) for _ in range(size != 0) for p in piece(start, 1)]

    match mode:
        case "edge":
            return b.concat([*edge(0, before), x, *edge(n - 1, after)], axis)
        case "reflect" if prove_le(before, n - 1) and prove_le(after, n - 1):
            return b.concat([*piece(before, before, -1), x, *piece(n - 2, after, -1)], axis)
        case "wrap" if prove_le(before, n) and prove_le(after, n):
            return b.concat([*piece(n - before, before), x, *piece(0, after)], axis)
        case "reflect":
            period = dim_max(2 * (n - 1), 1)
            i = b.elementwise("mod", _count(b, before, n, after), b.dims(period))
            return take(b, x, b.min(i, b.sub(b.dims(2 * (n - 1)), i)), axis)
        case "wrap":
            return take(b, x, b.elementwise("mod", _count(b, before, n, after), b.dims(dim_max(n, 1))), axis)
    raise call.invalid(f"its mode {mode!r} does not exist")


def _count(b: Builder, before: Dim, n: Dim, after: Dim) -> Value:
    return b.sub(b.iota([before + n + after], 0), b.dims(before))


def take(b: Builder, x: Value, indices: Value, axis: int) -> Value:
    """numpy.take with indices in range: the axis is replaced by the axes of the indices."""
    picked = b.gather(x, [indices], [axis])
    k = indices.rank
    return b.transpose(picked, [*range(k, k + axis), *range(k), *range(k + axis, picked.rank)])


@operator("CenterCropPad", since=18)
def center_crop_pad(b: Builder, call: Call, x: Value, shape: Value) -> Value:
    wanted = call.dims(shape, "shape")
    axes = [axis_of(a, x.rank) for a in call.attr("axes", range(x.rank))]
    for a, size in zip(axes, wanted, strict=True):
        kept = dim_min(x.shape[a], size)
        x = slice_axis(b, x, a, (x.shape[a] - kept) // 2, kept)
        before = (size - kept) // 2
        lo, hi = ([n if i == a else 0 for i in range(x.rank)] for n in (before, size - kept - before))
        x = b.pad(x, lo, hi)
    return x


# ------------------------------------------------------------------ blocks and bands


@operator("DepthToSpace")
def depth_to_space(b: Builder, call: Call, x: Value) -> Value:
    n, c, h, w = x.shape
    k = call.attr("blocksize")
    depth = dims.quotient(c, k * k)
    depth = c // (k * k) if depth is None else depth
    if call.attr("mode", "DCR") == "DCR":
        y = b.transpose(b.reshape(x, [n, k, k, depth, h, w]), [0, 3, 4, 1, 5, 2])
    else:
        y = b.transpose(b.reshape(x, [n, depth, k, k, h, w]), [0, 1, 4, 2, 5, 3])
    return b.reshape(y, [n, depth, h * k, w * k])


@operator("SpaceToDepth")
def space_to_depth(b: Builder, call: Call, x: Value) -> Value:
    n, c, h, w = x.shape
    k = call.attr("blocksize")
    y = b.reshape(x, [n, c, h // k, k, w // k, k])
    perm = [0, 3, 5, 1, 2, 4] if call.attr("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    return b.reshape(b.transpose(y, perm), [n, c * (k * k), h // k, w // k])


@operator("ReverseSequence", since=10)
def reverse_sequence(b: Builder, call: Call, x: Value, lengths: Value) -> Value:
    batch, time = axis_of(call.attr("batch_axis", 1), x.rank), axis_of(call.attr("time_axis", 0), x.rank)
    if {batch, time} != {0, 1}:
        raise call.invalid("its batch and time axes must be the first two")
    shape = [x.shape[batch], x.shape[time]]
    rows, columns = b.iota(shape, 0), b.iota(shape, 1)
    ends = b.reshape(lengths, [shape[0], 1])
    flipped = b.where(b.lt(columns, ends), b.sub(b.sub(ends, 1), columns), columns)
    y = b.gather(x, [rows, flipped], [batch, time])
    return y if batch == 0 else b.transpose(y, [1, 0, *range(2, x.rank)])


@operator("Trilu", since=14)
def trilu(b: Builder, call: Call, x: Value, k: Value | None = None) -> Value:
    shape = x.shape[-2:]
    diagonal = b.sub(b.iota(shape, 1), b.iota(shape, 0))
    offset = b.const(0, diagonal.dtype) if k is None else b.reshape(k, ())
    keep = b.le(offset, diagonal) if call.attr("upper", 1) else b.le(diagonal, offset)
    return b.where(keep, x, 0)


@operator("Col2Im", since=18)
def col2im(b: Builder, call: Call, x: Value, image_shape: Value, block_shape: Value) -> Value:
    """Overlapping blocks added up: a scatter over the flattened, padded image."""
    image, block = call.dims(image_shape, "image shape"), call.ints(block_shape, "block shape")
    r = len(block)
    dilations, strides = call.attr("dilations", (1,) * r), call.attr("strides", (1,) * r)
    pads = call.attr("pads", (0,) * (2 * r))
    padded = [d + lo + hi for d, lo, hi in zip(image, pads[:r], pads[r:], strict=True)]
    places = [
        (p - (k - 1) * t - 1) // s + 1 for p, k, t, s in zip(padded, block, dilations, strides, strict=True)
    ]  # fmt: skip
    index: Value = b.dims(0)
    for i in range(r):
        grid: Shape = (*block, *places)
        here = b.add(b.mul(b.iota(grid, i), dilations[i]), b.mul(b.iota(grid, r + i), strides[i]))
        index = b.add(b.mul(index, b.dims(padded[i])), here)
    n, taps = x.shape[0], product(block)
    channels = x.shape[1] // taps
    updates = b.transpose(b.reshape(x, [n, channels, taps * x.shape[2]]), [2, 0, 1])
    zeros = b.broadcast(b.const(0, x.dtype), [n, channels, product(padded)])
    flat = b.reshape(index, [taps * x.shape[2]])
    y = b.reshape(b.apply("scatter", zeros, updates, flat, axes=(2,), op="add"), [n, channels, *padded])
    return pad_or_crop(b, y, [0, 0, *(-p for p in pads[:r])], [0, 0, *(-p for p in pads[r:])])
