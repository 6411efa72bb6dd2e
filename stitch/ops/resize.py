"""Resampling: Resize and Upsample axis by axis, GridSample at computed coordinates.

An axis is resampled as a weighted sum of a few *taps*: gathers at computed indices. Indices and weights are vectors
along the axis; where all that they depend on is known they are constants. Nearest neighbours at whole factors need
neither: they are a broadcast on a new axis, or a slice with a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from stitch import dims, dtypes
from stitch.dims import Dim, prove_equal
from stitch.evaluate import evaluate
from stitch.graph import Builder, Value
from stitch.ops.movement import slice_axis, take
from stitch.ops.registry import Call, axis_of, operator

Tap = tuple[Value, Value]  # indices and weights


@dataclass(frozen=True)
class Sampling:
    """How one axis is resampled. Its scale is `numerator` / `denominator`: out / length, unless given as a number."""

    length: Dim
    out: Dim
    numerator: Dim
    denominator: Dim
    mode: str = "nearest"
    rounding: str = "round_prefer_floor"
    coordinates: str = "half_pixel"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    roi: tuple[float, float] | tuple[Value, Value] | None = None

    @property
    def is_static(self) -> bool:
        extents = (self.length, self.out, self.numerator, self.denominator)
        return all(isinstance(d, int) for d in extents) and (self.roi is None or isinstance(self.roi[0], float))


# ------------------------------------------------------------------ the operators


@operator("Upsample", since=7, until=8)
def upsample_by_attribute(b: Builder, call: Call, x: Value) -> Value:
    return _resized(b, call, x, None, call.attr("scales"), None)


@operator("Upsample", since=9, until=9)
def upsample(b: Builder, call: Call, x: Value, scales: Value) -> Value:
    return _resized(b, call, x, None, _scales(call, scales), None)


@operator("Resize", since=10, until=10)
def resize_by_scales(b: Builder, call: Call, x: Value, scales: Value) -> Value:
    return _resized(b, call, x, None, _scales(call, scales), None)


@operator("Resize", since=11)
def resize(
    b: Builder, call: Call, x: Value, roi: Value | None = None, scales: Value | None = None, sizes: Value | None = None
) -> Value:
    if sizes is not None and sizes.shape != (0,):
        return _resized(b, call, x, roi, None, call.dims(sizes, "sizes"))
    if scales is None:
        raise call.invalid("it has neither scales nor sizes")
    return _resized(b, call, x, roi, _scales(call, scales), None)


def _scales(call: Call, scales: Value) -> Sequence[float]:
    numbers: list[float] = call.constant(scales, "scales").tolist()
    return numbers


def _resized(
    b: Builder, call: Call, x: Value, roi: Value | None, scales: Sequence[float] | None, sizes: Sequence[Dim] | None
) -> Value:
    axes = [axis_of(a, x.rank) for a in call.attr("axes", None) or range(x.rank)]
    for given in (scales, sizes):
        if given is not None and len(given) != len(axes):
            raise call.invalid(f"{len(given)} scales or sizes do not fit {len(axes)} axes")
    plans = dict(zip(axes, _plans(call, [x.shape[a] for a in axes], scales, sizes), strict=True))
    before = call.opset < 11  # versions before 11 had one way only
    mode = call.attr("mode", "nearest")
    coordinates = "asymmetric" if before else call.attr("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if before else call.attr("nearest_mode", "round_prefer_floor")
    wide = x if mode == "nearest" and coordinates != "tf_crop_and_resize" else b.cast(x, _wide(x))
    for i, (axis, plan) in enumerate(plans.items()):
        crop = coordinates == "tf_crop_and_resize"
        if plan.numerator == plan.denominator and prove_equal(plan.length, plan.out) and not crop:
            continue
        plan = replace(
            plan, mode={"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode), rounding=rounding,
            coordinates=coordinates, cubic=call.attr("cubic_coeff_a", -0.75),
            exclude_outside=bool(call.attr("exclude_outside", 0)), antialias=bool(call.attr("antialias", 0)),
            roi=_region(b, call, roi, i, len(axes)) if crop else None,
        )  # fmt: skip
        wide = _resampled(b, call, wide, axis, plan)
    if wide.dtype != x.dtype and dtypes.is_integer(x.dtype):
        wide = b.unary("rint", wide)
    return b.cast(wide, x.dtype)


def _wide(x: Value) -> np.dtype:
    """The type to compute in, which holds every element of x but the largest 64-bit integers."""
    if dtypes.is_float(x.dtype):
        return dtypes.compute(x.dtype)
    return dtypes.FLOAT32 if x.dtype.itemsize <= 2 else dtypes.FLOAT64


def _plans(
    call: Call, extents: Sequence[Dim], scales: Sequence[float] | None, sizes: Sequence[Dim] | None
) -> list[Sampling]:
    if scales is not None:
        return [_scaled(d, s) for d, s in zip(extents, scales, strict=True)]
    policy = call.attr("keep_aspect_ratio_policy", "stretch")
    wanted = list(sizes or ())
    if policy == "stretch":
        return [Sampling(d, n, n, d) for d, n in zip(extents, wanted, strict=True)]
    pairs = list(zip(extents, wanted, strict=True))
    ratios = [Fraction(n, d) for d, n in pairs if isinstance(d, int) and isinstance(n, int) and d]
    if len(ratios) < len(pairs):
        raise call.unsupported(f"keep_aspect_ratio_policy {policy!r} needs sizes that are numbers; scale instead")
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    doubled = [2 * ratio * d for d in extents if isinstance(d, int)]
    outs = [(r.numerator + r.denominator) // (2 * r.denominator) for r in doubled]  # to the nearest, halves up
    return [Sampling(d, n, ratio.numerator, ratio.denominator) for d, n in zip(extents, outs, strict=True)]


def _scaled(extent: Dim, scale: float) -> Sampling:
    """floor(extent * scale), where a float32 that is almost a simple fraction is taken for that fraction."""
    exact = Fraction(float(np.float32(scale)))
    simple = exact.limit_denominator(1024)
    ratio = simple if abs(simple - exact) <= exact / 2**23 else exact
    return Sampling(extent, extent * ratio.numerator // ratio.denominator, ratio.numerator, ratio.denominator)


def _region(b: Builder, call: Call, roi: Value | None, i: int, count: int) -> tuple[float, float] | tuple[Value, Value]:
    """Start and end of the region of axis i."""
    if roi is None:
        raise call.invalid("tf_crop_and_resize needs a region")
    array = call.known(roi)
    if array is not None:
        return float(array[i]), float(array[i + count])
    low, high = (b.reshape(slice_axis(b, roi, 0, k, 1), ()) for k in (i, i + count))
    return low, high


# ------------------------------------------------------------------ one axis


def _resampled(b: Builder, call: Call, x: Value, axis: int, plan: Sampling) -> Value:
    if plan.mode == "nearest":
        whole = _whole_factor(b, x, axis, plan)
        if whole is not None:
            return whole
    known = isinstance(plan.numerator, int) and isinstance(plan.denominator, int)
    if plan.antialias and plan.mode != "nearest" and not known:
        raise call.unsupported("antialiasing needs scales that are constant")
    taps, outside = _vectors(b, plan, x.dtype)
    column = [1 if i != axis else plan.out for i in range(x.rank)]
    total: Value | None = None
    for indices, weights in taps:
        y = take(b, x, indices, axis)
        if plan.mode != "nearest":
            y = b.mul(y, b.reshape(weights, column))
        total = y if total is None else b.add(total, y)
    assert total is not None
    if outside is not None:
        total = b.where(b.reshape(outside, column), float(call.attr("extrapolation_value", 0.0)), total)
    return total


def _whole_factor(b: Builder, x: Value, axis: int, plan: Sampling) -> Value | None:
    """Nearest neighbours at a whole factor, if each element is simply repeated, or every so many-th is kept."""
    up, down = dims.quotient(plan.numerator, plan.denominator), dims.quotient(plan.denominator, plan.numerator)
    corner = plan.coordinates == "asymmetric" and plan.rounding == "floor"
    centre = plan.coordinates in ("half_pixel", "half_pixel_symmetric") and plan.rounding.startswith("round")
    if isinstance(up, int) and up > 0 and (corner or centre) and prove_equal(plan.out, plan.length * up):
        head, tail = x.shape[: axis + 1], x.shape[axis + 1 :]
        y = b.broadcast(b.reshape(x, [*head, 1, *tail]), [*head, up, *tail])
        return b.reshape(y, [*x.shape[:axis], plan.out, *tail])
    if isinstance(down, int) and down > 0 and corner:
        return slice_axis(b, x, axis, 0, plan.out, down)
    return None


def _vectors(b: Builder, plan: Sampling, dtype: np.dtype) -> tuple[list[Tap], Value | None]:
    """The taps along an axis, and which results lie outside of the region, if that matters."""
    weight = dtype if dtypes.is_float(dtype) else dtypes.FLOAT32
    if not plan.is_static:
        taps, outside = _computed(b, plan, dtypes.compute(weight))
        return [(i, b.cast(w, weight)) for i, w in taps], outside
    scratch = Builder("taps")
    taps, outside = _computed(scratch, plan, dtypes.FLOAT64)
    results = {f"{i}": v for i, v in enumerate(itertools.chain.from_iterable(taps))}
    if outside is not None:
        results["outside"] = outside
    arrays = evaluate(scratch.finish(results), {})
    pairs = zip(arrays[: 2 * len(taps) : 2], arrays[1 : 2 * len(taps) : 2], strict=True)
    fixed = [(b.const(i), b.const(w.astype(weight))) for i, w in pairs]
    return fixed, None if outside is None else b.const(arrays[-1])


def _computed(b: Builder, plan: Sampling, dtype: np.dtype) -> tuple[list[Tap], Value | None]:
    x = _positions(b, plan, dtype)
    last = _number(b, plan.length - 1, dtype)
    outside = None
    if plan.coordinates == "tf_crop_and_resize":
        outside = b.elementwise("or", b.lt(x, 0.0), b.lt(last, x))

    def index(i: Value) -> Value:
        return b.cast(b.max(b.min(i, last), 0.0), dtypes.INT64)

    if plan.mode == "nearest":
        return [(index(_rounded(b, x, plan.rounding)), b.broadcast(b.const(1, dtype), x.shape))], outside
    base = b.unary("floor", x)
    offsets, weights = _weights(b, plan, b.sub(x, base))
    places = [b.add(base, float(k)) for k in offsets]
    if plan.exclude_outside:
        inside = [b.elementwise("and", b.le(0.0, p), b.le(p, last)) for p in places]
        weights = _normalised(b, [b.where(i, w, 0.0) for i, w in zip(inside, weights, strict=True)])
    return [(index(p), w) for p, w in zip(places, weights, strict=True)], outside


def _number(b: Builder, d: Dim, dtype: np.dtype) -> Value:
    return b.cast(b.dims(d), dtype)


def _positions(b: Builder, plan: Sampling, dtype: np.dtype) -> Value:
    """Where in the input, in elements, each element of the output lies."""
    i = b.cast(b.iota([plan.out], 0), dtype)
    length = _number(b, plan.length, dtype)
    up, down = _number(b, plan.numerator, dtype), _number(b, plan.denominator, dtype)
    ideal = b.div(b.mul(length, up), down)  # the output's extent before it was rounded

    def middle() -> Value:
        return b.sub(b.div(b.mul(b.add(i, 0.5), down), up), 0.5)

    match plan.coordinates:
        case "asymmetric":
            return b.div(b.mul(i, down), up)
        case "half_pixel":
            return middle()
        case "tf_half_pixel_for_nn":
            return b.add(middle(), 0.5)
        case "pytorch_half_pixel":
            return b.where(b.eq(_number(b, plan.out, dtype), 1.0), 0.0, middle())
        case "half_pixel_symmetric":
            lost = b.sub(1.0, b.div(_number(b, plan.out, dtype), ideal))
            return b.add(middle(), b.mul(b.div(length, 2.0), lost))
    single = b.eq(ideal, 1.0)
    gaps = b.where(single, 1.0, b.sub(ideal, 1.0))
    reach = b.sub(length, 1.0)
    if plan.coordinates == "align_corners":
        return b.div(b.mul(i, reach), gaps)
    if plan.coordinates == "tf_crop_and_resize" and plan.roi is not None:
        low, high = (b.cast(b.const(r) if isinstance(r, float) else r, dtype) for r in plan.roi)
        span = b.mul(b.sub(high, low), reach)
        return b.add(b.where(single, b.div(span, 2.0), b.div(b.mul(i, span), gaps)), b.mul(low, reach))
    raise ValueError(f"coordinate_transformation_mode {plan.coordinates!r} does not exist")


def _rounded(b: Builder, x: Value, rounding: str) -> Value:
    match rounding:
        case "round_prefer_floor":
            return b.unary("ceil", b.sub(x, 0.5))
        case "round_prefer_ceil":
            return b.unary("floor", b.add(x, 0.5))
        case "floor" | "ceil":
            return b.unary(rounding, x)
    raise ValueError(f"nearest_mode {rounding!r} does not exist")


# ------------------------------------------------------------------ weights


def _weights(b: Builder, plan: Sampling, part: Value) -> tuple[list[int], list[Value]]:
    """Taps around floor(x) and their weights, for the fractional part of x."""
    if plan.mode not in ("linear", "cubic"):
        raise ValueError(f"mode {plan.mode!r} does not exist")
    if plan.antialias and isinstance(plan.numerator, int) and isinstance(plan.denominator, int):
        return _antialiased(b, plan, part, min(Fraction(plan.numerator, plan.denominator), Fraction(1)))
    if plan.mode == "linear":
        return [0, 1], [b.sub(1.0, part), part]
    return [-1, 0, 1, 2], _cubic_weights(b, part, plan.cubic)


def _cubic_weights(b: Builder, part: Value, a: float) -> list[Value]:
    distances = [b.add(part, 1.0), part, b.sub(1.0, part), b.sub(2.0, part)]
    return [_far(b, distances[0], a), _near(b, distances[1], a), _near(b, distances[2], a), _far(b, distances[3], a)]


def _near(b: Builder, t: Value, a: float) -> Value:
    """The cubic kernel at distances up to 1."""
    return b.add(b.mul(b.mul(b.sub(b.mul(t, a + 2), a + 3), t), t), 1.0)


def _far(b: Builder, t: Value, a: float) -> Value:
    """The cubic kernel at distances from 1 to 2."""
    return b.sub(b.mul(b.add(b.mul(b.sub(b.mul(t, a), 5 * a), t), 8 * a), t), 4 * a)


def _antialiased(b: Builder, plan: Sampling, part: Value, scale: Fraction) -> tuple[list[int], list[Value]]:
    """The kernel stretched by 1 / scale."""
    radius = 1 if plan.mode == "linear" else 2
    start = -radius * scale.denominator // scale.numerator + 1
    offsets = list(range(start, 2 - start))
    distances = [b.unary("abs", b.mul(b.sub(float(k), part), float(scale))) for k in offsets]
    if plan.mode == "linear":
        return offsets, _normalised(b, [b.max(b.sub(1.0, t), 0.0) for t in distances])
    a = plan.cubic
    outer = [b.where(b.lt(t, 2.0), _far(b, t, a), 0.0) for t in distances]
    return offsets, _normalised(
        b, [b.where(b.le(t, 1.0), _near(b, t, a), o) for t, o in zip(distances, outer, strict=True)]
    )


def _normalised(b: Builder, weights: Sequence[Value]) -> list[Value]:
    total = weights[0]
    for w in weights[1:]:
        total = b.add(total, w)
    return [b.div(w, total) for w in weights]


# ------------------------------------------------------------------ grids


@operator("GridSample", since=16)
def grid_sample(b: Builder, call: Call, x: Value, grid: Value) -> Value:
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(call.attr("mode", "linear"), call.attr("mode", "linear"))
    r, dtype = x.rank - 2, dtypes.compute(grid.dtype)
    b.unify(grid.shape[-1], r)
    b.unify(grid.shape[0], x.shape[0])
    taps: list[list[tuple[Value, Value | None, Value | None]]] = []
    for axis in range(r):
        at = b.reshape(slice_axis(b, grid, grid.rank - 1, r - 1 - axis, 1), grid.shape[:-1])
        taps.append(_grid_taps(b, call, b.cast(at, dtype), x.shape[axis + 2], mode))
    wide = x if mode == "nearest" else b.cast(x, _wide(x))
    total: Value | None = None
    for combination in itertools.product(*taps):
        places = [b.iota(grid.shape[:-1], 0), *(i for i, _, _ in combination)]
        y = b.gather(wide, places, [0, *range(2, x.rank)])
        for _, _, inside in combination:
            if inside is not None:
                y = b.where(b.reshape(inside, [*inside.shape, 1]), y, 0)
        for _, weight, _ in combination:
            if weight is not None:
                y = b.mul(y, b.reshape(b.cast(weight, y.dtype), [*weight.shape, 1]))
        total = y if total is None else b.add(total, y)
    assert total is not None
    return b.transpose(b.cast(total, x.dtype), [0, total.rank - 1, *range(1, total.rank - 1)])


def _grid_taps(
    b: Builder, call: Call, at: Value, extent: Dim, mode: str
) -> list[tuple[Value, Value | None, Value | None]]:
    """Indices and weights along one axis, for normalised coordinates in [-1, 1]; and where what is there counts, rather
    than zero. A weight of zero would not do: the element that is read instead may be infinite."""
    n = _number(b, extent, at.dtype)
    last = b.sub(n, 1.0)
    corners, padding = bool(call.attr("align_corners", 0)), call.attr("padding_mode", "zeros")
    x = b.div(b.mul(b.add(at, 1.0), last) if corners else b.sub(b.mul(b.add(at, 1.0), n), 1.0), 2.0)

    low, span = (0.0, b.max(last, 1.0)) if corners else (-0.5, n)

    def clamped(v: Value) -> Value:
        return b.max(b.min(v, last), 0.0)

    def reflected(v: Value) -> Value:
        away = b.unary("abs", b.sub(v, low))
        times = b.unary("floor", b.div(away, span))
        rest = b.sub(away, b.mul(times, span))
        odd = b.eq(b.elementwise("fmod", times, 2.0), 1.0)
        return b.add(b.where(odd, b.sub(span, rest), rest), low)

    def tap(place: Value, weight: Value | None) -> tuple[Value, Value | None, Value | None]:
        inside = b.elementwise("and", b.le(0.0, place), b.le(place, last)) if padding == "zeros" else None
        index = clamped(reflected(place) if padding == "reflection" else place)
        return b.cast(index, dtypes.INT64), weight, inside

    if mode == "nearest":
        return [tap(b.unary("rint", x), None)]
    if mode not in ("linear", "cubic"):
        raise call.invalid(f"its mode {mode!r} does not exist")
    if padding == "border":  # as ONNX has it, not between the edge of the outermost element and its centre
        outside = b.elementwise("or", b.lt(x, low), b.lt(b.add(span, low), x))
        x = b.where(outside, clamped(x), x)
    elif padding == "reflection":
        x = reflected(x)
    base = b.unary("floor", x)
    part = b.sub(x, base)
    offsets = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
    weights = [b.sub(1.0, part), part] if mode == "linear" else _cubic_weights(b, part, -0.75)
    return [tap(b.add(base, float(k)), w) for k, w in zip(offsets, weights, strict=True)]


@operator("AffineGrid", since=20)
def affine_grid(b: Builder, call: Call, theta: Value, size: Value) -> Value:
    n, _, *spatial = call.dims(size, "size")
    r = len(spatial)
    row = [n, *[1] * r, r]

    def column(i: int) -> Value:
        return b.reshape(slice_axis(b, theta, 2, i, 1), row)

    total = column(r)
    for i, d in enumerate(reversed(spatial)):  # x, the last axis, comes first
        axis = r - 1 - i
        at = b.cast(b.iota([d], 0), theta.dtype)
        extent = _number(b, d, theta.dtype)
        if call.attr("align_corners", 0):
            at = b.div(b.mul(at, 2.0), b.max(b.sub(extent, 1.0), 1.0))
        else:
            at = b.div(b.add(b.mul(at, 2.0), 1.0), extent)
        at = b.reshape(b.sub(at, 1.0), [d if k == axis + 1 else 1 for k in range(r + 2)])
        total = b.add(b.mul(at, column(i)), total)
    return b.broadcast(total, [n, *spatial, r])
