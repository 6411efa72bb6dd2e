"""Rules on movement: two in a row become one, one that moves nothing goes, a gather of a range is a slice."""

from __future__ import annotations

from stitch import contents
from stitch.dims import Dim, prove_le
from stitch.graph import Value
from stitch.rewrite import Rewriter, Rules, Step, for_each, merged
from stitch.simplify.permutations import Perm, stays


def _unmoved(r: Rewriter, s: Step) -> Value | None:
    """reshape, broadcast, transpose, slice, pad that leave all as it is -> their operand."""
    match s.prim:
        case "reshape" | "broadcast":
            same = s.x.shape == s.shape
        case "transpose":
            same = s.attrs["perm"] == tuple(range(s.x.rank))
        case "slice":
            rows = zip(s.attrs["starts"], s.attrs["steps"], strict=True)
            same = s.x.shape == s.shape and all(start == 0 and step == 1 for start, step in rows)
        case _:
            same = all(d == 0 for d in (*s.attrs["lo"], *s.attrs["hi"]))
    return s.x if same else None


def _reshaped_twice(r: Rewriter, s: Step) -> Value | None:
    """reshape(reshape(x)) -> reshape(x)."""
    inner = r.maker(s.x, "reshape")
    return r.reshape(inner.inputs[0], s.shape) if inner is not None else None


def _reshaped_broadcast(r: Rewriter, s: Step) -> Value | None:
    """reshape(broadcast(x)) -> broadcast(reshape(x)), if only axes of extent 1 come and go, or x has one element."""
    inner = r.maker(s.x, "broadcast")
    if inner is None:
        return None
    x = inner.inputs[0]
    if all(d == 1 for d in x.shape):
        return r.broadcast(r.reshape(x, ()), s.shape)
    if [d for d in s.x.shape if d != 1] != [d for d in s.shape if d != 1]:
        return None
    full = [*[1] * (s.x.rank - x.rank), *x.shape]
    kept = iter([d for d, wide in zip(full, s.x.shape, strict=True) if wide != 1])
    return r.broadcast(r.reshape(x, [1 if d == 1 else next(kept) for d in s.shape]), s.shape)


def _broadcast_source(r: Rewriter, s: Step) -> Value | None:
    """broadcast(broadcast(x)) -> broadcast(x); broadcast(reshape(x, [1, 1, n])) -> broadcast(x), for x of shape [n]."""
    inner = r.maker(s.x)
    if inner is not None and inner.prim == "broadcast":
        return r.broadcast(inner.inputs[0], s.shape)
    lead = next((i for i, d in enumerate(s.x.shape) if d != 1), s.x.rank)
    return r.broadcast(r.reshape(s.x, s.x.shape[lead:]), s.shape) if lead else None


def _transposed(r: Rewriter, s: Step) -> Value | None:
    """transpose(transpose(x)) -> transpose(x); transpose(x [n, 1, k], 1 0 2) -> reshape(x, [1, n, k]);
    transpose(broadcast(x)) -> broadcast(transpose(x)); transpose(iota) -> iota."""
    perm: Perm = s.attrs["perm"]
    if stays(perm, s.x.shape):
        return r.reshape(s.x, s.shape)
    inner = r.maker(s.x)
    if inner is None:
        return None
    match inner.prim:
        case "transpose":
            return r.transpose(inner.inputs[0], [inner.attrs["perm"][p] for p in perm])
        case "broadcast":
            x = inner.inputs[0]
            x = r.reshape(x, [*[1] * (s.x.rank - x.rank), *x.shape])
            return r.broadcast(r.transpose(x, perm), s.shape)
        case "iota":
            return r.emit("iota", shape=s.shape, axis=perm.index(inner.attrs["axis"]))
    return None


def _sliced(r: Rewriter, s: Step) -> Value | None:
    """slice(slice(x)) -> slice(x); slice(concat(x, y)) -> slice(x), if all of it lies in x;
    slice(broadcast(x)) -> broadcast(slice(x))."""
    inner = r.maker(s.x)
    if inner is None:
        return None
    starts, sizes, steps = s.attrs["starts"], s.attrs["sizes"], s.attrs["steps"]
    match inner.prim:
        case "slice":
            was, by = inner.attrs["starts"], inner.attrs["steps"]
            first = [a + t * b for a, t, b in zip(was, by, starts, strict=True)]
            return r.slice(inner.inputs[0], first, sizes, [t * u for t, u in zip(by, steps, strict=True)])
        case "concat":
            axis = inner.attrs["axis"]
            offset: Dim = 0
            last = starts[axis] + steps[axis] * (sizes[axis] - 1)
            for part in inner.inputs:
                end = offset + part.shape[axis]
                ends = (starts[axis], last) if steps[axis] > 0 else (last, starts[axis])
                if prove_le(offset, ends[0]) and prove_le(ends[1] + 1, end):
                    moved = [a - offset if i == axis else a for i, a in enumerate(starts)]
                    return r.slice(part, moved, sizes, steps)
                offset = end
        case "broadcast":
            x = inner.inputs[0]
            missing = s.x.rank - x.rank
            real = [i - missing for i in range(missing, s.x.rank) if x.shape[i - missing] == s.x.shape[i]]
            pick = [i + missing if i in real else None for i in range(x.rank)]
            sliced = r.slice(
                x,
                [0 if i is None else starts[i] for i in pick],
                [1 if i is None else sizes[i] for i in pick],
                [1 if i is None else steps[i] for i in pick],
            )
            return r.broadcast(sliced, s.shape)
    return None


def _padded_twice(r: Rewriter, s: Step) -> Value | None:
    """pad(pad(x)) -> pad(x), with the same value."""
    inner = r.maker(s.x, "pad")
    if inner is None or repr(inner.attrs["value"]) != repr(s.attrs["value"]):
        return None
    lo = [a + b for a, b in zip(inner.attrs["lo"], s.attrs["lo"], strict=True)]
    hi = [a + b for a, b in zip(inner.attrs["hi"], s.attrs["hi"], strict=True)]
    return r.emit("pad", inner.inputs[0], lo=tuple(lo), hi=tuple(hi), value=s.attrs["value"])


def _concatenated(r: Rewriter, s: Step) -> Value | None:
    """concat(x) -> x; concat(x, empty) -> x; concat(x[0:2], x[2:5]) -> x[0:5]."""
    axis = s.attrs["axis"]
    parts: list[Value] = []
    for v in s.inputs:
        if v.shape[axis] != 0:
            whole = _adjacent(r, parts[-1], v, axis) if parts else None
            parts[len(parts) - (whole is not None) :] = [v if whole is None else whole]
    parts = parts or [s.x]
    if len(parts) == len(s.inputs):
        return s.x if len(parts) == 1 else None
    return parts[0] if len(parts) == 1 else r.emit("concat", *parts, axis=axis)


def _adjacent(r: Rewriter, left: Value, right: Value, axis: int) -> Value | None:
    """One slice for two that follow each other along an axis, with a step of 1."""
    a, b = r.maker(left, "slice"), r.maker(right, "slice")
    if a is None or b is None or a.inputs != b.inputs or a.attrs["steps"] != b.attrs["steps"]:
        return None
    if a.attrs["steps"][axis] != 1 or a.attrs["starts"][axis] + left.shape[axis] != b.attrs["starts"][axis]:
        return None
    starts, others = list(a.attrs["starts"]), list(b.attrs["starts"])
    starts[axis] = others[axis] = 0
    beside = [d for i, d in enumerate(left.shape) if i != axis] == [d for i, d in enumerate(right.shape) if i != axis]
    if starts != others or not beside:
        return None
    sizes = [d + right.shape[axis] if i == axis else d for i, d in enumerate(left.shape)]
    return r.slice(a.inputs[0], a.attrs["starts"], sizes, a.attrs["steps"])


def _gathered(r: Rewriter, s: Step) -> Value | None:
    """gather(x, const 3) -> reshape(slice(x, 3:4)); gather(x, 2 4 6) -> slice(x, 2:8:2).

    For one axis, and indices in range: gather clamps them, a slice must not.
    """
    if len(s.inputs) != 2:
        return None
    x, index = s.inputs
    axis, extent = s.attrs["axes"][0], s.x.shape[s.attrs["axes"][0]]
    first: Dim
    if index.rank == 1 and r.maker(index, "iota") is not None:
        first, step, count = 0, 1, index.shape[0]
    else:
        known = index.contents
        if known is None and (array := r.array(index)) is not None and array.size <= contents.LIMIT:
            known = contents.of_array(array)
        if known is None or known.size == 0 or index.rank > 1:
            return None
        flat = known.reshape(-1).tolist()
        first, count = flat[0], len(flat)
        step = flat[1] - first if count > 1 else 1
        if not isinstance(step, int) or step == 0 or any(d != first + i * step for i, d in enumerate(flat)):
            return None
    last = first + step * (count - 1)
    low, high = (first, last) if step > 0 else (last, first)
    if not prove_le(0, low) or not prove_le(high + 1, extent):
        return None
    starts: list[Dim] = [0] * x.rank
    sizes, steps = list(x.shape), [1] * x.rank
    starts[axis], sizes[axis], steps[axis] = first, count, step
    y = r.slice(x, starts, sizes, steps)
    if index.rank == 0:
        return r.reshape(y, s.shape)
    return r.transpose(y, [axis, *(i for i in range(x.rank) if i != axis)])


def _single_taps(r: Rewriter, s: Step) -> Value | None:
    """window(x [n, 8, c], size 1, stride 2) -> reshape(slice(x, ::2), [n, 4, c, 1]); other axes keep their windows."""
    a = s.attrs
    rows = list(zip(a["axes"], a["sizes"], a["strides"], a["dilations"], strict=True))
    wide = [row for row in rows if row[1] != 1]
    if len(wide) == len(rows):
        return None
    steps = [1] * s.x.rank
    sizes = list(s.x.shape)
    for axis, size, stride, _ in rows:
        if size == 1:
            steps[axis], sizes[axis] = stride, s.shape[axis]
    x = r.slice(s.x, [0] * s.x.rank, sizes, steps)
    if wide:
        axes, sizes_, strides, dilations = zip(*wide, strict=True)
        x = r.emit("window", x, axes=axes, sizes=sizes_, strides=strides, dilations=dilations)
    return r.reshape(x, s.shape)


MOVEMENT: Rules = merged(
    for_each(("reshape", "broadcast", "transpose", "slice", "pad"), _unmoved),
    {
        "reshape": [_reshaped_twice, _reshaped_broadcast],
        "broadcast": [_broadcast_source],
        "transpose": [_transposed],
        "slice": [_sliced],
        "pad": [_padded_twice],
        "concat": [_concatenated],
        "gather": [_gathered],
        "window": [_single_taps],
    },
)
