"""Reductions over axes, and the positions of extremes.

Half precisions are widened where the fold needs the range or the digits: a mean's sum, squares, exponentials.
"""

from __future__ import annotations

from collections.abc import Callable

from stitch import dtypes
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, axes_of, axis_of, operator

Fold = Callable[[Builder, Value, tuple[int, ...], bool], Value]  # builder, operand, axes, keepdims


def _axes(call: Call, x: Value, axes: Value | None) -> tuple[int, ...]:
    """An attribute first, an input since opset 13 (ReduceSum) or 18. Missing or empty: all axes, or by wish none."""
    given = call.attr("axes", ()) if axes is None else call.constant(axes, "axes").reshape(-1).tolist()
    if not len(given) and not call.attr("noop_with_empty_axes", 0):
        return tuple(range(x.rank))
    return axes_of(given, x.rank) if x.rank else ()


def _reduction(name: str) -> Callable[[Fold], Fold]:
    """Registers a fold as an operator."""

    def register(fold: Fold) -> Fold:
        def apply(b: Builder, call: Call, x: Value, axes: Value | None = None) -> Value:
            return b.cast(fold(b, x, _axes(call, x, axes), bool(call.attr("keepdims", 1))), x.dtype)

        operator(name)(apply)
        return fold

    return register


def _real(b: Builder, x: Value) -> Value:
    """x as a type that has roots and logarithms, and the range for squares."""
    if dtypes.is_float(x.dtype):
        return b.cast(x, dtypes.compute(x.dtype))
    return b.cast(x, dtypes.FLOAT64 if x.dtype.itemsize > 2 else dtypes.FLOAT32)


# ------------------------------------------------------------------ primitives


def _plain(primitive: str) -> Fold:
    def fold(b: Builder, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
        return b.reduce(primitive, x, axes, keepdims)

    return fold


for _name, _primitive in {
    "ReduceSum": "reduce_sum", "ReduceProd": "reduce_prod", "ReduceMax": "reduce_max", "ReduceMin": "reduce_min",
}.items():  # fmt: skip
    _reduction(_name)(_plain(_primitive))


# ------------------------------------------------------------------ compositions


@_reduction("ReduceMean")
def mean(b: Builder, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    return b.mean(b.cast(x, dtypes.compute(x.dtype)), axes, keepdims)


@_reduction("ReduceL1")
def l1(b: Builder, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    size = x if x.dtype in dtypes.UNSIGNED else b.unary("abs", x)
    return b.reduce("reduce_sum", size, axes, keepdims)


@_reduction("ReduceSumSquare")
def sum_square(b: Builder, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    wide = b.cast(x, dtypes.compute(x.dtype))
    return b.reduce("reduce_sum", b.mul(wide, wide), axes, keepdims)


@_reduction("ReduceL2")
def l2(b: Builder, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    return b.unary("sqrt", sum_square(b, _real(b, x), axes, keepdims))


@_reduction("ReduceLogSum")
def log_sum(b: Builder, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    return b.unary("log", b.reduce("reduce_sum", _real(b, x), axes, keepdims))


@_reduction("ReduceLogSumExp")
def log_sum_exp(b: Builder, x: Value, axes: tuple[int, ...], keepdims: bool) -> Value:
    """log(sum(exp(x - m))) + m, where m is the maximum, or 0 where that is infinite."""
    wide = _real(b, x)
    top = b.reduce("reduce_max", wide, axes, keepdims=True)
    top = b.where(b.lt(b.unary("abs", top), float("inf")), top, 0)
    total = b.reduce("reduce_sum", b.unary("exp", b.sub(wide, top)), axes, keepdims=True)
    result = b.add(b.unary("log", total), top)
    return result if keepdims else b.reshape(result, [d for i, d in enumerate(x.shape) if i not in axes])


# ------------------------------------------------------------------ positions


def _position(primitive: str) -> Callable[[Builder, Call, Value], Value]:
    def apply(b: Builder, call: Call, x: Value) -> Value:
        """Of equal extremes the first, or by wish the last."""
        axis = axis_of(call.attr("axis", 0), x.rank)
        if x.rank == 0:
            return b.const(0, dtypes.INT64)
        where = b.apply(primitive, x, axis=axis, last=int(call.attr("select_last_index", 0)))
        if not call.attr("keepdims", 1):
            return where
        return b.reshape(where, (*x.shape[:axis], 1, *x.shape[axis + 1 :]))

    return apply


operator("ArgMax")(_position("argmax"))
operator("ArgMin")(_position("argmin"))
