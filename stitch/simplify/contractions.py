"""Rules on contractions, and what is plainer without one: a product that reuses nothing, argmax."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from stitch import dtypes
from stitch.graph import Value
from stitch.rewrite import Rewriter, Rules, Step, for_each
from stitch.simplify.permutations import inverse

Labels: TypeAlias = tuple[int, ...]

_LARGE = 4096  # elements from which on a constant operand makes a vector-matrix product worth the name


def _labels(s: Step) -> tuple[Labels, Labels, Labels] | None:
    """The labels of a, b and the result; None if an operand has one twice (a diagonal), which is left alone."""
    a, b, out = s.attrs["a"], s.attrs["b"], s.attrs["out"]
    return (tuple(a), tuple(b), tuple(out)) if len(set(a)) == len(a) and len(set(b)) == len(b) else None


def _relabelled(r: Rewriter, s: Step) -> Value | None:
    """contract(transpose(x), y) -> contract(x, y), the labels of x permuted."""
    made = [r.maker(v, "transpose") for v in s.inputs]
    if not any(made):
        return None
    operands, labels = list(s.inputs), [list(s.attrs["a"]), list(s.attrs["b"])]
    for k, node in enumerate(made):
        if node is not None:
            operands[k] = node.inputs[0]
            labels[k] = [s.attrs["ab"[k]][i] for i in inverse(node.attrs["perm"])]
    return r.emit("contract", *operands, a=tuple(labels[0]), b=tuple(labels[1]), out=s.attrs["out"])


def _without_ones(r: Rewriter, s: Step) -> Value | None:
    """contract(a [n, 1, k], b [k, m]) -> reshape(contract(a [n, k], b [k, m])).

    Not of a window, which it would part from its contraction, unless that reuses nothing then.
    """
    if (labels := _labels(s)) is None:
        return None
    a, b, out = labels
    ones = {lab for v, ls in zip(s.inputs, (a, b), strict=True) for lab, d in zip(ls, v.shape, strict=True) if d == 1}
    if not ones:
        return None
    reused = [set(out) & set(x) - set(y) - ones for x, y in ((a, b), (b, a))]
    if all(reused) and any(r.maker(v, "window") for v in s.inputs):
        return None
    operands = [
        r.reshape(v, [d for lab, d in zip(ls, v.shape, strict=True) if lab not in ones])
        for v, ls in zip(s.inputs, (a, b), strict=True)
    ]
    rest = [tuple(lab for lab in ls if lab not in ones) for ls in (a, b, out)]
    return r.reshape(r.emit("contract", *operands, a=rest[0], b=rest[1], out=rest[2]), s.shape)


def _unrepeated(r: Rewriter, s: Step) -> Value | None:
    """contract(broadcast(a [k]) [n, k], b [n, k, m]) over k -> contract(a [k], b): b alone has the label n.

    For labels of the result; one that no other operand has is broadcast in the result instead.
    """
    if (labels := _labels(s)) is None:
        return None
    for k, v in enumerate(s.inputs):
        node = r.maker(v, "broadcast")
        if node is None:
            continue
        x, mine, other = node.inputs[0], labels[k], labels[1 - k]
        full = [*[1] * (v.rank - x.rank), *x.shape]
        drop = {lab for lab, d, e in zip(mine, full, v.shape, strict=True) if d == 1 and e != 1 and lab in labels[2]}
        if not drop:
            continue
        kept = [i for i, lab in enumerate(mine) if lab not in drop]
        operand = r.broadcast(r.reshape(x, [full[i] for i in kept]), [v.shape[i] for i in kept])
        pair, names = list(s.inputs), [*labels]
        pair[k], names[k] = operand, tuple(mine[i] for i in kept)
        lost = drop - set(other)
        out = tuple(lab for lab in labels[2] if lab not in lost)
        y = r.emit("contract", *pair, a=names[0], b=names[1], out=out)
        shape = [1 if lab in lost else d for lab, d in zip(labels[2], s.shape, strict=True)]
        return r.broadcast(r.reshape(y, shape), s.shape)
    return None


def _presummed(r: Rewriter, s: Step) -> Value | None:
    """contract(a [n, j, k], b [k, m]) -> contract(reduce_sum(a, axis j), b), for a label that only a has."""
    if (labels := _labels(s)) is None or s.dtype == dtypes.BOOL:
        return None
    a, b, out = labels
    lonely = [[i for i, lab in enumerate(ls) if lab not in other and lab not in out] for ls, other in ((a, b), (b, a))]
    if not any(lonely):
        return None
    pair = [r.emit("reduce_sum", v, axes=tuple(w)) if w else v for v, w in zip(s.inputs, lonely, strict=True)]
    names = [tuple(lab for i, lab in enumerate(ls) if i not in w) for ls, w in zip((a, b), lonely, strict=True)]
    return r.emit("contract", *pair, a=names[0], b=names[1], out=out)


def _without_reuse(r: Rewriter, s: Step) -> Value | None:
    """contract(a [n, k], b [k]) over k -> reduce_sum(mul(a, broadcast(b)), axis k): nothing is read twice.

    If no label is in the result and a alone, or none in it and b alone, or nothing is summed. A vector times a large
    constant matrix stays: that is packed once, and read as fast as memory goes.
    """
    if (labels := _labels(s)) is None or s.dtype == dtypes.BOOL or s.x.dtype != s.inputs[1].dtype:
        return None
    a, b, out = labels
    rows, columns = [lab in out and lab not in b for lab in a], [lab in out and lab not in a for lab in b]
    summed = {lab for lab in (*a, *b) if lab not in out}
    if any(rows) and any(columns) and summed:
        return None
    if any(rows) != any(columns) and summed:
        array = r.array(s.inputs[0] if any(rows) else s.inputs[1])
        if array is not None and array.size >= _LARGE:
            return None
    first, second = (a, b) if len(a) >= len(b) else (b, a)
    order = (*first, *(lab for lab in second if lab not in first))
    extent = dict(zip(b, s.inputs[1].shape, strict=True)) | dict(zip(a, s.x.shape, strict=True))
    shape = [extent[lab] for lab in order]
    wide = []
    for v, ls in zip(s.inputs, (a, b), strict=True):
        places = [order.index(lab) for lab in ls]
        v = r.transpose(v, np.argsort(places).tolist())
        v = r.reshape(v, [extent[lab] if lab in ls else 1 for lab in order])
        wide.append(_converted(r, r.broadcast(v, shape), dtypes.compute(s.dtype)))
    y = r.emit("mul", *wide)
    if axes := tuple(i for i, lab in enumerate(order) if lab in summed):
        y = r.emit("reduce_sum", y, axes=axes)
    left = [lab for lab in order if lab not in summed]
    return r.transpose(_converted(r, y, s.dtype), [left.index(lab) for lab in out])


def _converted(r: Rewriter, x: Value, dtype: np.dtype) -> Value:
    return x if x.dtype == dtype else r.emit("cast", x, dtype=dtype)


def _extremum_place(r: Rewriter, s: Step) -> Value | None:
    """argmax(x) -> reduce_min(where(x == m or x != x, iota, n)), with m = reduce_max(x): the first place.

    With `last`: reduce_max(where(..., iota, -1)). m is NaN if one is there, and the NaN is then the place.
    """
    axis, x, n = s.attrs["axis"], s.x, s.x.shape[s.attrs["axis"]]
    best = r.emit("reduce_max" if s.prim == "argmax" else "reduce_min", x, axes=(axis,))
    best = r.broadcast(r.reshape(best, [1 if i == axis else d for i, d in enumerate(x.shape)]), x.shape)
    here = r.emit("eq", x, best)
    if dtypes.is_float(x.dtype):
        here = r.emit("or", here, r.emit("ne", x, x))
    nowhere = r.dims(np.array(-1 if s.attrs["last"] else n, object))
    places = r.emit("where", here, r.emit("iota", shape=x.shape, axis=axis), r.broadcast(nowhere, x.shape))
    return r.emit("reduce_max" if s.attrs["last"] else "reduce_min", places, axes=(axis,))


CONTRACTION: Rules = {"contract": (_relabelled, _without_ones, _unrepeated)}
DECOMPOSITION: Rules = {
    **for_each(("argmax", "argmin"), _extremum_place),
    "contract": (_presummed, _without_reuse),
}
