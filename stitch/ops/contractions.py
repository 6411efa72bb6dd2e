"""Matrix products and Einstein sums, over the primitive `contract`."""

from __future__ import annotations

from collections.abc import Sequence

from stitch import dtypes
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, operator

Labels = tuple[int, ...]


def product_sum(b: Builder, x: Value, y: Value, xs: Sequence[int], ys: Sequence[int], out: Sequence[int]) -> Value:
    """The Einstein sum of two values. Equal labels may have an extent of 1 on one side, which is broadcast.

    It is a contraction where an operand is reused: where the result has an axis (longer than 1) that one of them
    lacks. Otherwise every element is read once, which is a product and a sum, memory-bound.
    """
    x, xs = _without_broadcast(b, x, xs, y, ys)
    y, ys = _without_broadcast(b, y, ys, x, xs)
    x, xs = _without_private_sums(b, x, xs, {*ys, *out})
    y, ys = _without_private_sums(b, y, ys, {*xs, *out})
    extent = dict(zip(ys, y.shape, strict=True)) | dict(zip(xs, x.shape, strict=True))
    if set(xs) <= set(out) or all(extent[s] == 1 for s in {*xs, *ys} - ({*xs} & {*ys})):
        return sum_of_product(b, x, y, xs, ys, out)
    number = {label: i for i, label in enumerate(dict.fromkeys([*xs, *ys]))}  # the same numbers for the same sum
    return b.contract(x, y, *([number[label] for label in labels] for labels in (xs, ys, out)))


def sum_of_product(b: Builder, x: Value, y: Value, xs: Sequence[int], ys: Sequence[int], out: Sequence[int]) -> Value:
    """The same, as a product with broadcasting and a sum. Half precisions are summed in float32."""
    summed = [label for label in dict.fromkeys([*xs, *ys]) if label not in out]
    order = [*out, *summed]
    wide = dtypes.compute(x.dtype) if summed else x.dtype
    product = b.mul(*(_aligned(b, b.cast(v, wide), labels, order) for v, labels in ((x, xs), (y, ys))))
    return b.cast(b.reduce("reduce_sum", product, range(len(out), len(order))), x.dtype)


def _without_broadcast(b: Builder, x: Value, xs: Sequence[int], y: Value, ys: Sequence[int]) -> tuple[Value, Labels]:
    """Drops the axes of extent 1 that the other operand has, too."""
    other = dict(zip(ys, y.shape, strict=True))
    keep = [i for i, (label, d) in enumerate(zip(xs, x.shape, strict=True)) if d != 1 or label not in other]
    return b.reshape(x, [x.shape[i] for i in keep]), tuple(xs[i] for i in keep)


def _without_private_sums(b: Builder, x: Value, xs: Sequence[int], used: set[int]) -> tuple[Value, Labels]:
    """Sums over the axes that nobody else has."""
    axes = [i for i, label in enumerate(xs) if label not in used]
    return b.reduce("reduce_sum", x, axes), tuple(label for label in xs if label in used)


def _aligned(b: Builder, x: Value, labels: Sequence[int], order: Sequence[int]) -> Value:
    """Transposed to the order of the labels, with axes of extent 1 for those that it lacks."""
    x = b.transpose(x, [labels.index(label) for label in order if label in labels])
    rest = iter(x.shape)
    return b.reshape(x, [next(rest) if label in labels else 1 for label in order])


# ------------------------------------------------------------------ matrices


def matmul(b: Builder, x: Value, y: Value) -> Value:
    """numpy.matmul; batch axes of extent 1 are left out of the operand that has them."""
    if not x.rank or not y.rank:
        raise ValueError("a matrix product needs operands of rank 1 at least")
    m, k, n = range(3)
    batch = list(range(3, 1 + max(x.rank, y.rank, 2)))
    rows, columns = [m] * (x.rank > 1), [n] * (y.rank > 1)
    xs = [*batch[len(batch) - max(x.rank - 2, 0) :], *rows, k]
    ys = [*batch[len(batch) - max(y.rank - 2, 0) :], k, *columns]
    if x.rank < 3 and y.rank < 3:
        batch = []
    return product_sum(b, x, y, xs, ys, [*batch, *rows, *columns])


@operator("MatMul")
def matmul_of(b: Builder, call: Call, x: Value, y: Value) -> Value:
    return matmul(b, x, y)


@operator("Gemm")
def gemm(b: Builder, call: Call, x: Value, y: Value, z: Value | None = None) -> Value:
    m, k, n = range(3)
    xs = (k, m) if call.attr("transA", 0) else (m, k)
    ys = (n, k) if call.attr("transB", 0) else (k, n)
    out = _scaled(b, b.contract(x, y, xs, ys, (m, n)), call.attr("alpha", 1.0))
    beta = call.attr("beta", 1.0)
    if z is None or beta == 0:
        return out
    return b.add(out, b.broadcast(_scaled(b, z, beta), out.shape))


def _scaled(b: Builder, x: Value, factor: float) -> Value:
    return x if factor == 1 else b.mul(x, factor)


# ------------------------------------------------------------------ Einstein sums


@operator("Einsum", since=12)
def einsum(b: Builder, call: Call, *operands: Value) -> Value:
    terms, out = _parsed(call, call.attr("equation"), [x.rank for x in operands])
    pairs = [_diagonal(b, x, labels) for x, labels in zip(operands, terms, strict=True)]
    value, labels = pairs[0]
    for i, (other, others) in enumerate(pairs[1:], 1):
        later = {*out, *(label for _, rest in pairs[i + 1 :] for label in rest)}
        both = list(dict.fromkeys([*labels, *others]))
        kept = [label for label in (out if later == set(out) else both) if label in both and label in later]
        value = product_sum(b, value, other, labels, others, kept)
        labels = tuple(kept)
    value, labels = _without_private_sums(b, value, labels, set(out))
    return b.transpose(value, [labels.index(label) for label in out])


def _parsed(call: Call, equation: str, ranks: Sequence[int]) -> tuple[list[Labels], Labels]:
    """Numbered labels per operand and for the result; axes under an ellipsis are negative, aligned at the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise call.invalid(f"its equation has {len(terms)} operands instead of {len(ranks)}")
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if any(n < 0 or (n and "..." not in term) for n, term in zip(hidden, terms, strict=True)):
        raise call.invalid(f"its equation {equation!r} does not fit the ranks {list(ranks)}")
    widest = max((n for n, term in zip(hidden, terms, strict=True) if "..." in term), default=0)
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in letters if letters.count(c) == 1))

    def labels(term: str, n: int) -> Labels:
        head, dots, tail = term.partition("...")
        return (*map(ord, head), *(range(-n, 0) if dots else ()), *map(ord, tail))

    out = labels(right, widest)
    inputs = [labels(term, n) for term, n in zip(terms, hidden, strict=True)]
    if not set(out) <= {label for term in inputs for label in term} or len(set(out)) < len(out):
        raise call.invalid(f"the result of its equation {equation!r} repeats a label or has one of its own")
    return inputs, out


def _diagonal(b: Builder, x: Value, labels: Labels) -> tuple[Value, Labels]:
    """Repeated labels become one, by reading the diagonal."""
    for label in dict.fromkeys(labels):
        axes = [i for i, other in enumerate(labels) if other == label]
        if len(axes) > 1:
            for a in axes[1:]:
                b.unify(x.shape[axes[0]], x.shape[a])
            along = b.iota([x.shape[axes[0]]], 0)
            x = b.gather(x, [along] * len(axes), axes)
            labels = (label, *(other for other in labels if other != label))
    return x, labels


# ------------------------------------------------------------------ quantised


def centered(b: Builder, x: Value, zero: Value | None, shape: Sequence[int] | None = None) -> Value:
    """x - zero point in int32; `shape` is that of a zero point per row or channel, with one -1."""
    wide = b.cast(x, dtypes.INT32)
    if zero is None or (zero.contents is not None and all(d == 0 for d in zero.contents.reshape(-1).tolist())):
        return wide
    if zero.size == 1:
        zero = b.reshape(zero, ())
    elif zero.rank == 1 and shape is not None:
        zero = b.reshape(zero, [zero.shape[0] if d == -1 else d for d in shape])
    return b.sub(wide, b.cast(zero, dtypes.INT32))


def requantized(b: Builder, x: Value, factor: Value, zero: Value) -> Value:
    """int32 accumulators times `factor`, rounded to even, moved by the zero point, saturated."""
    y = b.elementwise("rint", b.mul(b.cast(x, dtypes.FLOAT32), b.cast(factor, dtypes.FLOAT32)))
    return b.cast(b.add(y, b.cast(zero, dtypes.FLOAT32)), zero.dtype)


@operator("MatMulInteger", since=10)
def matmul_integer(
    b: Builder, call: Call, x: Value, y: Value, x_zero: Value | None = None, y_zero: Value | None = None
) -> Value:
    return matmul(b, centered(b, x, x_zero, (-1, 1)), centered(b, y, y_zero))


@operator("QLinearMatMul", since=10)
def qlinear_matmul(
    b: Builder, call: Call, x: Value, x_scale: Value, x_zero: Value, y: Value, y_scale: Value, y_zero: Value,
    out_scale: Value, out_zero: Value,
) -> Value:  # fmt: skip
    acc = matmul(b, centered(b, x, x_zero, (-1, 1)), centered(b, y, y_zero))
    rows, columns = _per_row(b, x_scale), _scalar(b, y_scale)
    factor = b.div(b.mul(rows, columns), _per_row(b, out_scale))
    return requantized(b, acc, factor, _per_row(b, out_zero))


def _scalar(b: Builder, x: Value) -> Value:
    return b.reshape(x, ()) if x.size == 1 else x


def _per_row(b: Builder, x: Value) -> Value:
    return b.reshape(x, [x.shape[0], 1]) if x.rank == 1 and x.size != 1 else _scalar(b, x)
