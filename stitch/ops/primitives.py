"""The closed set of primitives: one table row each.

Every ONNX operator is written in these (see `stitch.ops.registry`), every later stage knows only these, and numpy on
them is the meaning of a graph. A row says what the primitive computes on numpy arrays, how its dtype and shape follow
from its inputs, its algebra, and what it costs.

Conventions
-----------
* Inputs of elementwise primitives have equal shapes (the builder inserts `broadcast`) and, but for `where`'s
  condition and comparisons' results, equal dtypes.
* Attributes are ints, strings, dtypes, Dims, tuples of Dims, or (for `const`) an array. `meaning` receives them with
  every Dim already an int.
* Reductions and `argmax`/`argmin` drop the reduced axes; the operators put them back by `reshape`.
* Half precisions are rounded after each primitive here; the compiler may keep them in float32 within a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stitch import dtypes
from stitch.dims import Dim, product

Array = np.ndarray[Any, Any]
Attrs = Mapping[str, Any]
Shape = tuple[Dim, ...]
Kind = Literal["source", "elementwise", "reduction", "movement", "contraction", "opaque"]


@dataclass(frozen=True)
class Primitive:
    """One row. `cost` is in vector instructions per vector of results (elementwise, reductions: per operand)."""

    name: str
    kind: Kind
    arity: int  # -1: any number
    meaning: Callable[..., Any]  # (attrs, *arrays) -> array
    dtype: Callable[..., Any]  # (attrs, *dtypes) -> dtype
    shape: Callable[..., Any]  # (attrs, *shapes) -> shape
    cost: float = 0.0
    commutative: bool = False
    associative: bool = False
    identity: float | int | None = None  # e with op(e, x) = x
    ulp: float = 0.0  # bound of the native float32 result against the exact one; 0: correctly rounded
    domain: tuple[np.dtype, ...] = dtypes.ALL  # of the last operand


PRIMITIVES: dict[str, Primitive] = {}


def _row(name: str, kind: Kind, arity: int, meaning: Callable[..., Any], **fields: Any) -> None:
    fields.setdefault("dtype", _same_dtype)
    fields.setdefault("shape", _same_shape)
    PRIMITIVES[name] = Primitive(name, kind, arity, meaning, **fields)


# ------------------------------------------------------------------ rules


def _same_dtype(attrs: Attrs, *inputs: np.dtype) -> np.dtype:
    return inputs[-1]


def _attr_dtype(attrs: Attrs, *inputs: np.dtype) -> np.dtype:
    return np.dtype(attrs["dtype"])


def _bool(attrs: Attrs, *inputs: np.dtype) -> np.dtype:
    return dtypes.BOOL


def _int64(attrs: Attrs, *inputs: np.dtype) -> np.dtype:
    return dtypes.INT64


def _first_dtype(attrs: Attrs, *inputs: np.dtype) -> np.dtype:
    return inputs[0]


def _same_shape(attrs: Attrs, *shapes: Shape) -> Shape:
    return shapes[0]


def _attr_shape(attrs: Attrs, *shapes: Shape) -> Shape:
    return tuple(attrs["shape"])


def _drop_axes(attrs: Attrs, shape: Shape) -> Shape:
    axes = attrs["axes"]
    return tuple(d for i, d in enumerate(shape) if i not in axes)


def _drop_axis(attrs: Attrs, shape: Shape) -> Shape:
    return tuple(d for i, d in enumerate(shape) if i != attrs["axis"])


def _permuted(attrs: Attrs, shape: Shape) -> Shape:
    return tuple(shape[p] for p in attrs["perm"])


def _padded(attrs: Attrs, shape: Shape) -> Shape:
    return tuple(lo + d + hi for lo, d, hi in zip(attrs["lo"], shape, attrs["hi"], strict=True))


def _sliced(attrs: Attrs, shape: Shape) -> Shape:
    return tuple(attrs["sizes"])


def _concatenated(attrs: Attrs, *shapes: Shape) -> Shape:
    axis = attrs["axis"]
    total: Dim = 0
    for s in shapes:
        total = total + s[axis]
    return (*shapes[0][:axis], total, *shapes[0][axis + 1 :])


def _gathered(attrs: Attrs, data: Shape, *indices: Shape) -> Shape:
    axes = attrs["axes"]
    return (*indices[0], *(d for i, d in enumerate(data) if i not in axes))


def _windowed(attrs: Attrs, shape: Shape) -> Shape:
    out = list(shape)
    rows = zip(attrs["axes"], attrs["sizes"], attrs["strides"], attrs["dilations"], strict=True)
    for axis, size, stride, dilation in rows:
        out[axis] = (shape[axis] - (size - 1) * dilation - 1) // stride + 1
    return (*out, *attrs["sizes"])


def _contracted(attrs: Attrs, a: Shape, b: Shape) -> Shape:
    extent = dict(zip(attrs["b"], b, strict=True)) | dict(zip(attrs["a"], a, strict=True))
    return tuple(extent[label] for label in attrs["out"])


# ------------------------------------------------------------------ meanings


def _truncated_division(a: Array, b: Array) -> Array:
    """ONNX Div: IEEE for floats, C's truncation for integers (x/0 is unspecified there: 0 here)."""
    if a.dtype.kind not in "iu":
        return np.divide(a, b)
    safe = np.where(b == 0, np.ones_like(b), b)
    q = a // safe
    q = q + ((q * safe != a) & ((a < 0) != (safe < 0)))
    return np.asarray(np.where(b == 0, np.zeros_like(q), q).astype(a.dtype))


def _shift(fn: Callable[..., Array]) -> Callable[..., Array]:
    """Shifts by the width or more leave what infinitely many single ones would: 0, or -1 of a negative number."""

    def shifted(attrs: Attrs, a: Array, n: Array) -> Array:
        bits = a.dtype.itemsize * 8
        emptied = np.where((a < 0) & (fn is np.right_shift), -1, 0).astype(a.dtype)
        return np.where(n < bits, fn(a, np.minimum(n, bits - 1)), emptied).astype(a.dtype)

    return shifted


def _erf(x: Array) -> Array:
    import math

    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x.astype(np.float64)).astype(x.dtype))


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))  # never overflows
    return np.asarray(np.where(x < 0, small, 1) / (1 + small))


def _wide(fn: Callable[..., Any]) -> Callable[..., Array]:
    """`fn` evaluated in float64 and rounded once, so that the oracle is better than what it judges."""

    def apply(attrs: Attrs, *xs: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(fn(*(x.astype(np.float64) for x in xs))).astype(xs[0].dtype)

    return apply


def _plain(fn: Callable[..., Any]) -> Callable[..., Array]:
    def apply(attrs: Attrs, *xs: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(fn(*xs))

    return apply


def _cast(attrs: Attrs, x: Array) -> Array:
    """As numpy, but float to integer is defined everywhere: truncated, saturated, NaN to 0."""
    to = np.dtype(attrs["dtype"])
    if dtypes.is_float(x.dtype) and dtypes.is_integer(to):
        info: Any = np.iinfo(to)
        wide = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
        inside = np.clip(wide, float(info.min), np.nextafter(float(info.max) + 1, 0)).astype(to)
        return np.asarray(np.where(wide >= float(info.max), info.max, inside).astype(to))
    with np.errstate(all="ignore"):
        return x.astype(to)


def _reduce(fn: Callable[..., Any], empty: Callable[[np.dtype], Any]) -> Callable[..., Array]:
    def apply(attrs: Attrs, x: Array) -> Array:
        axes = tuple(attrs["axes"])
        wide = x.astype(np.float64) if dtypes.is_float(x.dtype) else x
        with np.errstate(all="ignore"):
            if any(x.shape[a] == 0 for a in axes):
                kept = tuple(d for i, d in enumerate(x.shape) if i not in axes)
                return np.full(kept, empty(x.dtype), x.dtype)
            return np.asarray(fn(wide, axis=axes)).astype(x.dtype)

    return apply


def _arg(fn: Callable[..., Any]) -> Callable[..., Array]:
    def apply(attrs: Attrs, x: Array) -> Array:
        axis = attrs["axis"]
        if x.shape[axis] == 0:
            return np.zeros((*x.shape[:axis], *x.shape[axis + 1 :]), np.int64)
        if not attrs["last"]:
            return np.asarray(fn(x, axis=axis), np.int64)
        return np.asarray(x.shape[axis] - 1 - fn(np.flip(x, axis), axis=axis), np.int64)

    return apply


def _iota(attrs: Attrs) -> Array:
    shape, axis = tuple(attrs["shape"]), attrs["axis"]
    column = np.arange(shape[axis], dtype=np.int64).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.broadcast_to(column, shape)


def _slice(attrs: Attrs, x: Array) -> Array:
    picks = [s + t * np.arange(n) for s, t, n in zip(attrs["starts"], attrs["steps"], attrs["sizes"], strict=True)]
    return x[np.ix_(*picks)] if picks else x


def _pad(attrs: Attrs, x: Array) -> Array:
    return np.pad(x, list(zip(attrs["lo"], attrs["hi"], strict=True)), constant_values=attrs["value"]) if x.ndim else x


def _gather(attrs: Attrs, data: Array, *indices: Array) -> Array:
    """Indices outside [0, n) are clamped here; the operators bring negative ones into range first."""
    axes = attrs["axes"]
    rest = [i for i in range(data.ndim) if i not in axes]
    clipped = tuple(np.clip(i, 0, max(data.shape[a] - 1, 0)) for i, a in zip(indices, axes, strict=True))
    moved = data.transpose([*axes, *rest])
    if any(data.shape[a] == 0 for a in axes):
        return np.zeros((*indices[0].shape, *moved.shape[len(axes) :]), data.dtype)
    return np.asarray(moved[clipped])


def _scatter(attrs: Attrs, data: Array, updates: Array, *indices: Array) -> Array:
    """data with updates at indices (over leading `axes`, rest whole), in row-major order of the updates."""
    axes = attrs["axes"]
    rest = [i for i in range(data.ndim) if i not in axes]
    perm = [*axes, *rest]
    out = data.transpose(perm).copy()
    flat = [i.reshape(-1) for i in indices]
    rows = updates.reshape(flat[0].shape[0], *out.shape[len(axes) :])
    op = attrs["op"]
    for k in range(flat[0].shape[0]):
        at = tuple(int(i[k]) for i in flat)
        if not all(0 <= p < n for p, n in zip(at, out.shape, strict=False)):
            continue
        match op:
            case "none":
                out[at] = rows[k]
            case "add":
                out[at] = out[at] + rows[k]
            case "mul":
                out[at] = out[at] * rows[k]
            case "max":
                out[at] = np.maximum(out[at], rows[k])
            case "min":
                out[at] = np.minimum(out[at], rows[k])
    return np.ascontiguousarray(out.transpose(np.argsort(perm)))


def _window(attrs: Attrs, x: Array) -> Array:
    shape: list[Any] = list(_windowed(attrs, x.shape))
    strides = list(x.strides)
    for axis, stride, dilation in zip(attrs["axes"], attrs["strides"], attrs["dilations"], strict=True):
        strides.append(x.strides[axis] * dilation)
        strides[axis] = x.strides[axis] * stride
    return np.lib.stride_tricks.as_strided(x, [max(n, 0) for n in shape], strides, writeable=False)


def _contract(attrs: Attrs, a: Array, b: Array) -> Array:
    wide = np.float64 if dtypes.is_float(a.dtype) else a.dtype
    small = {label: k for k, label in enumerate(dict.fromkeys((*attrs["a"], *attrs["b"])))}  # einsum knows 52 labels
    labels = [[small[label] for label in attrs[name]] for name in ("a", "b", "out")]
    with np.errstate(all="ignore"):
        out = np.einsum(a.astype(wide), labels[0], b.astype(wide), labels[1], labels[2], optimize=True)
        return np.asarray(out).astype(a.dtype)


def _shape_array(attrs: Attrs) -> Array:
    return np.array(attrs["dims"], np.int64).reshape(attrs["shape"])


def _opaque(attrs: Attrs, *arrays: Array) -> Any:
    """Host operators carry their numpy function's name; `stitch.ops.host` holds the functions."""
    from stitch.ops.host import FUNCTIONS

    return FUNCTIONS[attrs["function"]](attrs, *arrays)


# ------------------------------------------------------------------ the table

_row("const", "source", 0, lambda attrs: attrs["array"], dtype=lambda attrs: attrs["array"].dtype,
     shape=lambda attrs: tuple(attrs["array"].shape))  # fmt: skip
_row("shape", "source", 0, _shape_array, dtype=_int64, shape=_attr_shape)
_row("iota", "source", 0, _iota, dtype=_int64, shape=_attr_shape, cost=1)

NUMBERS = (*dtypes.INTEGERS, *dtypes.FLOATS)
BITS = (dtypes.BOOL, *dtypes.INTEGERS)

_fn: Any
_domain: tuple[np.dtype, ...]
for _name, _fn, _cost, _domain in [
    ("neg", np.negative, 1, NUMBERS), ("abs", np.abs, 1, dtypes.ALL), ("floor", np.floor, 1, dtypes.FLOATS),
    ("ceil", np.ceil, 1, dtypes.FLOATS), ("rint", np.rint, 1, dtypes.FLOATS), ("sign", np.sign, 3, NUMBERS),
    ("not", np.invert, 1, BITS),
]:  # fmt: skip
    _row(_name, "elementwise", 1, _plain(_fn), cost=_cost, domain=_domain)
for _name, _fn, _cost, _ulp in [
    ("sqrt", np.sqrt, 6, 0.0), ("rsqrt", lambda x: 1 / np.sqrt(x), 12, 2.0), ("exp", np.exp, 14, 2.0),
    ("expm1", np.expm1, 20, 4.0), ("log", np.log, 18, 2.0), ("log1p", np.log1p, 24, 4.0), ("sin", np.sin, 30, 2.0),
    ("cos", np.cos, 30, 2.0), ("tan", np.tan, 40, 4.0), ("asin", np.arcsin, 24, 4.0), ("acos", np.arccos, 24, 4.0),
    ("atan", np.arctan, 24, 4.0), ("sinh", np.sinh, 30, 4.0), ("cosh", np.cosh, 30, 4.0),
    ("asinh", np.arcsinh, 30, 4.0), ("acosh", np.arccosh, 30, 4.0), ("atanh", np.arctanh, 30, 4.0),
    ("tanh", np.tanh, 20, 2.0), ("erf", _erf, 22, 2.0),
    ("half_erf", lambda x: _erf(x * np.sqrt(0.5)) / 2, 20, 2.0), ("sigmoid", _sigmoid, 20, 2.0),
]:  # fmt: skip
    _row(_name, "elementwise", 1, _wide(_fn), cost=_cost, ulp=_ulp, domain=dtypes.FLOATS)

_row("add", "elementwise", 2, _plain(np.add), cost=1, commutative=True, associative=True, identity=0)
_row("sub", "elementwise", 2, _plain(np.subtract), cost=1, domain=NUMBERS)
_row("mul", "elementwise", 2, _plain(np.multiply), cost=1, commutative=True, associative=True, identity=1)
_row("div", "elementwise", 2, _plain(_truncated_division), cost=6, domain=NUMBERS)
_row("mod", "elementwise", 2, _plain(np.mod), cost=10, domain=NUMBERS)
_row("fmod", "elementwise", 2, _plain(np.fmod), cost=10, domain=NUMBERS)
_row("pow", "elementwise", 2, _wide(np.power), cost=60, ulp=4.0, domain=NUMBERS)
_row("min", "elementwise", 2, _plain(np.minimum), cost=2, commutative=True, associative=True)
_row("max", "elementwise", 2, _plain(np.maximum), cost=2, commutative=True, associative=True)
_row("and", "elementwise", 2, _plain(np.bitwise_and), cost=1, commutative=True, associative=True, domain=BITS)
_row("or", "elementwise", 2, _plain(np.bitwise_or), cost=1, commutative=True, associative=True, domain=BITS)
_row("xor", "elementwise", 2, _plain(np.bitwise_xor), cost=1, commutative=True, associative=True, domain=BITS)
_row("shl", "elementwise", 2, _shift(np.left_shift), cost=1, domain=dtypes.INTEGERS)
_row("shr", "elementwise", 2, _shift(np.right_shift), cost=1, domain=dtypes.INTEGERS)
for _name, _fn in [("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal)]:
    _row(_name, "elementwise", 2, _plain(_fn), dtype=_bool, cost=1, commutative=_name in ("eq", "ne"))
_row("fma", "elementwise", 3, _wide(lambda a, b, c: a * b + c), cost=1, domain=(dtypes.FLOAT32,))
_row("where", "elementwise", 3, _plain(np.where), cost=1)
_row("cast", "elementwise", 1, _cast, dtype=_attr_dtype, cost=1)
_row("bitcast", "elementwise", 1, lambda attrs, x: x.view(attrs["dtype"]), dtype=_attr_dtype, domain=NUMBERS)

_row("reduce_sum", "reduction", 1, _reduce(np.sum, lambda d: 0), shape=_drop_axes, cost=1)
_row("reduce_prod", "reduction", 1, _reduce(np.prod, lambda d: 1), shape=_drop_axes, cost=1)
_row("reduce_max", "reduction", 1, _reduce(np.max, dtypes.lowest), shape=_drop_axes, cost=2)
_row("reduce_min", "reduction", 1, _reduce(np.min, dtypes.highest), shape=_drop_axes, cost=2)
_row("argmax", "reduction", 1, _arg(np.argmax), dtype=_int64, shape=_drop_axis, cost=3)
_row("argmin", "reduction", 1, _arg(np.argmin), dtype=_int64, shape=_drop_axis, cost=3)

_row("reshape", "movement", 1, lambda attrs, x: x.reshape(attrs["shape"]), shape=_attr_shape)
_row("broadcast", "movement", 1, lambda attrs, x: np.broadcast_to(x, attrs["shape"]), shape=_attr_shape)
_row("transpose", "movement", 1, lambda attrs, x: x.transpose(attrs["perm"]), shape=_permuted)
_row("slice", "movement", 1, _slice, shape=_sliced)
_row("pad", "movement", 1, _pad, shape=_padded, cost=1)
_row("concat", "movement", -1, lambda attrs, *xs: np.concatenate(xs, attrs["axis"]), shape=_concatenated, cost=1)
_row("gather", "movement", -1, _gather, dtype=_first_dtype, shape=_gathered, cost=4)
_row("window", "movement", 1, _window, shape=_windowed)

_row("contract", "contraction", 2, _contract, shape=_contracted, cost=1)
_row("scatter", "opaque", -1, _scatter, dtype=_first_dtype, shape=_same_shape, cost=4)
_row("host", "opaque", -1, _opaque, dtype=lambda attrs, *d: attrs["dtypes"], shape=lambda attrs, *s: attrs["shapes"])

ELEMENTWISE = tuple(p.name for p in PRIMITIVES.values() if p.kind == "elementwise")

REDUCTIONS: Mapping[str, str] = {
    "reduce_sum": "add", "reduce_prod": "mul", "reduce_max": "max", "reduce_min": "min",
}  # fmt: skip
"""The binary primitive that each reduction folds with."""


def elements(shape: Sequence[Dim]) -> Dim:
    """Number of elements of a value of this shape."""
    return product(shape)
