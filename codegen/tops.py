"""What is never above zero: x - max(x), of which a softmax takes the exponential, and which then needs no bound above.

    before:  exp(sub(x, max))                clamped to [-104, 90] where it is computed
    after:   exp(sub.at_most_0(x, max))      to -104 and more

The difference of a float and one that is no smaller is rounded to a number that is not positive; or it is NaN. So what
is subtracted has to be, at each place, the largest of some elements among which that of x is, or something above that.
No bit changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from stitch import dtypes
from stitch.graph import Node, Value


def most(node: Node, makers: Mapping[Value, Node]) -> float | None:
    """0.0 if all elements that a node makes are at most that, or NaN, whatever the graph's inputs are; else None."""
    if node.prim != "sub" or not dtypes.is_float(node.output.dtype):
        return None
    x, top = node.inputs
    shown = makers.get(top)
    if shown is None or shown.prim != "broadcast" or top.shape != x.shape:
        return None
    row = maxima = shown.inputs[0]
    made = makers.get(row)
    if made is not None and made.prim == "reshape":
        maxima = made.inputs[0]
    axes = _largest_over(maxima, x, makers)
    if axes is None:
        return None
    kept = tuple(1 if k in axes else d for k, d in enumerate(x.shape))
    rest = tuple(d for k, d in enumerate(x.shape) if k not in axes)
    beside = (*(1,) * (x.rank - row.rank), *row.shape) == kept
    return 0.0 if beside and maxima.shape == rest else None


def _largest_over(v: Value, x: Value, makers: Mapping[Value, Node]) -> tuple[int, ...] | None:
    """The axes of x over which v holds its maxima, or numbers above them; None if that is not what v is."""
    n = makers.get(v)
    if n is not None and n.prim == "max":
        return next((a for i in n.inputs if (a := _largest_over(i, x, makers)) is not None), None)
    if n is None or n.prim != "reduce_max":
        return None
    if n.inputs[0] is x:
        return tuple(n.attrs["axes"])
    part = makers.get(n.inputs[0])  # of an axis in parts: of each part's rows, then of the parts
    if part is None or part.prim != "reduce_max" or len(n.attrs["axes"]) != 1:
        return None
    (axis,), rows = n.attrs["axes"], makers.get(part.inputs[0])
    if rows is None or rows.prim != "reshape" or rows.inputs[0] is not x or part.attrs["axes"] != (axis + 1,):
        return None
    cut = rows.output.shape
    whole = cut[:axis] == x.shape[:axis] and cut[axis + 2 :] == x.shape[axis + 1 :]
    return (axis,) if whole else None
