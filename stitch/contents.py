"""Known contents of small integer values: how shape arithmetic is carried out at compile time, with symbols.

ONNX computes shapes with ordinary nodes (Shape -> Gather -> Concat -> Reshape). A value of at most `LIMIT` elements
whose elements are all known as Dims carries them as an object array, its *contents*. Primitives are then evaluated
on the contents instead of at run time. `evaluate` returns None where the result cannot be known as Dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stitch import dims, dtypes
from stitch.dims import Dim
from stitch.ops.primitives import PRIMITIVES, Array, Attrs

LIMIT = 256


def fits(shape: Sequence[Dim]) -> bool:
    """Has a value of this shape few enough elements to carry its contents?"""
    size = dims.product(shape)
    return isinstance(size, int) and size <= LIMIT


class Unknown(Exception):
    """Raised inside an element function when its result is not a Dim."""


def of_array(array: Array) -> Array | None:
    """Contents of a constant: integers and booleans, and floats that hold whole numbers, as Python numbers."""
    if array.size > LIMIT or array.dtype.kind not in "iubf" or array.dtype == dtypes.BFLOAT16:
        return None
    if array.dtype.kind == "f":
        wide = array.astype(np.float64)
        if not np.all(np.isfinite(wide)) or not np.all(wide == np.floor(wide)) or np.any(np.abs(wide) > 2**31):
            return None
        array = wide.astype(np.int64)
    return _objects(array.tolist(), array.shape)


def to_array(contents: Array, dtype: np.dtype) -> Array | None:
    """The constant array of contents that hold no symbol, else None."""
    flat = contents.reshape(-1).tolist()
    if not all(isinstance(d, int) for d in flat):
        return None
    return np.array(flat, dtype=dtype).reshape(contents.shape)


def evaluate(prim: str, attrs: Attrs, inputs: list[Array], dtype: np.dtype) -> Array | None:
    """Contents of `prim(*inputs)`, or None. `inputs` are contents; `dtype` is the result's."""
    out = _evaluate(prim, attrs, inputs, dtype)
    if out is None or not all(_holds(dtype, d) for d in out.reshape(-1)):
        return None
    return out


def _holds(dtype: np.dtype, d: Any) -> bool:
    """Is a number one of the dtype's, so that the primitive at run time would neither wrap nor round? Symbols count
    as small enough."""
    if not isinstance(d, int):
        return True
    if dtypes.is_integer(dtype):
        return int(np.iinfo(dtype).min) <= d <= int(np.iinfo(dtype).max)
    digits = {dtypes.BFLOAT16: 8, dtypes.FLOAT16: 11, dtypes.FLOAT32: 24, dtypes.FLOAT64: 53}
    return dtype == dtypes.BOOL or abs(d) <= 2 ** digits[dtype]


def _evaluate(prim: str, attrs: Attrs, inputs: list[Array], dtype: np.dtype) -> Array | None:
    try:
        if prim == "cast" and dtype == dtypes.BOOL:
            return None
        if prim in _ELEMENTS:
            out = np.frompyfunc(_ELEMENTS[prim], len(inputs), 1)(*inputs)
            return _objects(out, np.shape(out)) if not isinstance(out, np.ndarray) else out
        if prim == "div" and dtypes.is_integer(dtype):
            out = np.frompyfunc(_divide, 2, 1)(*inputs)
            return _objects(out, np.shape(out)) if not isinstance(out, np.ndarray) else out
        if prim in _FOLDS:
            return _fold(_FOLDS[prim], attrs["axes"], inputs[0])
        if prim in ("reshape", "broadcast", "transpose", "slice", "concat", "gather"):
            return _move(prim, attrs, inputs)
    except Unknown:
        pass
    return None


def _objects(values: Any, shape: tuple[int, ...]) -> Array:
    out = np.empty(shape, object)
    out[...] = np.array(values, dtype=object).reshape(shape) if shape else values
    return out


def _move(prim: str, attrs: Attrs, inputs: list[Array]) -> Array | None:
    """Movement acts on object arrays as on any other, provided that its own attributes are numbers."""
    flat = [d for v in attrs.values() if isinstance(v, tuple) for d in v]
    if not all(isinstance(d, int) for d in flat):
        return None
    if prim == "gather":
        inputs = [inputs[0], *(to_array(i, dtypes.INT64) for i in inputs[1:])]  # type: ignore[list-item]
        if any(i is None for i in inputs):
            return None
    out = PRIMITIVES[prim].meaning(attrs, *inputs)
    return _objects(out, ()) if not isinstance(out, np.ndarray) else out


def _fold(fn: Callable[[Any, Any], Any], axes: tuple[int, ...], x: Array) -> Array | None:
    if x.ndim != 1 or tuple(axes) != (0,) or x.size == 0:
        return None
    total = x[0]
    for d in x[1:]:
        total = fn(total, d)
    return _objects(total, ())


def _divide(a: Dim, b: Dim) -> Dim:
    """Truncated division is floor division where neither side can be negative."""
    if isinstance(a, int) and isinstance(b, int):
        return 0 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)
    if any(least is None or least < 0 for least in (dims.bounds(a)[0], dims.bounds(b)[0])):
        raise Unknown
    return a // b


def _modulo(a: Dim, b: Dim) -> Dim:
    if b == 0:
        raise Unknown
    return a % b


def _decided(answer: bool | None) -> bool:
    if answer is None:
        raise Unknown
    return answer


def _select(c: Any, a: Any, b: Any) -> Any:
    return a if bool(c) else b


def _sign(a: Dim) -> int:
    if isinstance(a, int):
        return (a > 0) - (a < 0)
    if (dims.bounds(a)[0] or 0) > 0:
        return 1
    raise Unknown


def _logic(fn: Callable[[int, int], int]) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return fn(a, b)
        raise Unknown

    return apply


def _not(a: Any) -> Any:
    if isinstance(a, bool):
        return not a
    if isinstance(a, int):
        return ~a
    raise Unknown


_ELEMENTS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "mod": _modulo,
    "min": dims.dim_min,
    "max": dims.dim_max,
    "abs": lambda a: abs(a) if isinstance(a, int) else dims.dim_max(a, -a),
    "sign": _sign,
    "floor": lambda a: a,
    "ceil": lambda a: a,
    "rint": lambda a: a,
    "eq": lambda a, b: _decided(dims.prove_equal(a, b)),
    "ne": lambda a, b: not _decided(dims.prove_equal(a, b)),
    "le": lambda a, b: _decided(dims.prove_le(a, b)),
    "lt": lambda a, b: not _decided(dims.prove_le(b, a)),
    "and": _logic(lambda a, b: a & b),
    "or": _logic(lambda a, b: a | b),
    "xor": _logic(lambda a, b: a ^ b),
    "not": _not,
    "where": _select,
    "cast": lambda a: int(a) if isinstance(a, int) else a,
}

_FOLDS: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": lambda a, b: a + b,
    "reduce_prod": lambda a, b: a * b,
    "reduce_max": dims.dim_max,
    "reduce_min": dims.dim_min,
}
