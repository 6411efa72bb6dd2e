"""What follows from constants, or from shapes alone, is computed now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stitch import contents, dims, dtypes, evaluate
from stitch.graph import Node, Value
from stitch.ops.primitives import PRIMITIVES, Array
from stitch.rewrite import Rewriter, Rules, Step, for_each

_GROWTH, _FREE = 4, 1 << 20  # a folded result may be 4 times as large as what it is made of, or 1 MiB
_WORK = 1 << 22  # elements that folding may compute, not merely view
_DEAR = 4096  # and in a scatter, or a contraction of integers
_PRODUCTS = (1 << 28, 1 << 22)  # multiply-adds of floats: as a matrix product, some 10 ms, and as many of them
_VIEWS = ("transpose", "reshape", "slice")


def _uniform(r: Rewriter, s: Step) -> Value | None:
    """const {1, 1, 1, 1} -> broadcast(const 1), if all elements have the same bits."""
    array: Array = s.attrs["array"]
    if array.size < 2:
        return None
    bits = array.view(f"u{array.dtype.itemsize}")
    first = bits[(0,) * array.ndim]
    if bits[(-1,) * array.ndim] != first or not (bits[-1] == first).all() or not (bits == first).all():
        return None
    return r.broadcast(r.const(array[(0,) * array.ndim]), s.shape)


def _known(r: Rewriter, s: Step) -> Value | None:
    """add(shape [n], const 1) -> shape [n + 1], for integers that are known as dims. A broadcast stays one."""
    known = s.known
    if s.prim in ("const", "shape", "broadcast") or dtypes.is_float(s.dtype):
        return None
    if known is None and s.inputs:
        given = [v.contents for v in s.inputs if v.contents is not None]
        if len(given) == len(s.inputs):
            known = contents.evaluate(s.prim, s.attrs, given, s.dtype)
    if known is None or known.size > contents.LIMIT:
        return None
    try:
        array = contents.to_array(known, s.dtype)
    except OverflowError:
        return None
    if array is not None:
        return r.const(array)
    return r.dims(known) if s.dtype == dtypes.INT64 else None


def _static(v: Any) -> bool:
    return all(map(_static, v)) if isinstance(v, tuple) else not isinstance(v, dims.Expr)


def _literal(r: Rewriter, v: Value) -> tuple[Array, int] | None:
    """The elements of a constant, or of a broadcast of one, and the bytes that they take."""
    node = r.maker(v)
    source = r.array(node.inputs[0]) if node is not None and node.prim == "broadcast" else r.array(v)
    if source is None or not _static(v.shape):
        return None
    shape = evaluate.numbers(v.shape, {})
    if math.prod(max(d, 1) for d in shape) * v.dtype.itemsize > np.iinfo(np.intp).max:
        return None  # numpy has no arrays of so many bytes, not even views
    return np.broadcast_to(source, shape), source.nbytes


def _folded(r: Rewriter, s: Step) -> Value | None:
    """add(const a, const b) -> const a + b; transposes and slices become views.

    Only if the result is not much larger than what it is made of, nor dear to compute.
    """
    if s.prim == "broadcast" or not _static(s.shape) or not all(_static(v) for v in s.attrs.values()):
        return None
    given = [g for g in (_literal(r, v) for v in s.inputs) if g is not None]
    if not given or len(given) < len(s.inputs):
        return None
    size = math.prod(evaluate.numbers(s.shape, {}))
    if size * s.dtype.itemsize > max(_FREE, _GROWTH * sum(n for _, n in given)):
        return None
    work = max(size, *(a.size for a, _ in given))
    if s.prim == "contract" and dtypes.is_float(s.dtype):
        if _products(s, [a.shape for a, _ in given]) > _PRODUCTS[bool(_batch(s))]:
            return None
    elif (s.prim not in _VIEWS and work > _WORK) or (s.prim in ("contract", "scatter") and work > _DEAR):
        return None
    node = Node(s.prim, s.inputs, (Value("", s.dtype, s.shape),), s.attrs)
    return r.const(evaluate.apply(node, [a for a, _ in given], {})[0])


def _batch(s: Step) -> set[int]:
    """The labels by which a contraction is many products beside each other."""
    return {*s.attrs["a"]} & {*s.attrs["b"]} & {*s.attrs["out"]}


def _products(s: Step, shapes: Sequence[tuple[int, ...]]) -> int:
    """The multiply-adds of a contraction."""
    extent: dict[int, int] = {}
    for name, shape in zip("ab", shapes, strict=True):
        extent |= {k: d for k, d in zip(s.attrs[name], shape, strict=True) if extent.get(k, 1) == 1}
    return math.prod(extent.values())


FOLDING: Rules = {
    **for_each((p.name for p in PRIMITIVES.values() if p.kind not in ("source", "opaque")), _known, _folded),
    "scatter": (_known, _folded),
    "const": (_uniform,),
}
