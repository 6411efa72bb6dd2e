"""A graph made smaller and plainer without changing what it computes.

`simplify` is the ordered list of passes below, repeated until nothing changes; a pass is a table of rules for
`stitch.rewrite`, and a rule's docstring shows a before, an after, and the condition under which it is safe. Values are
kept to the last bit, NaN, infinities and the sign of zero included. Only where a sum or a product over an axis is
involved may the order of additions, or where they are rounded, change.

Transposes are what the passes spend most effort on. The importer surrounds convolutions and poolings with transposes
to channels-last and back. `sink` pushes transposes towards the outputs, through everything that does not care about
the order of axes, until one meets its inverse; `hoist` then pulls up what is left wherever that saves bytes.

A constant of the result may be a strided view of the model's memory: whoever needs it contiguous copies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from stitch import contents, dims, dtypes, evaluate
from stitch.dims import Dim, prove_le
from stitch.graph import Graph, Node, Shape, Value
from stitch.ops.primitives import PRIMITIVES, REDUCTIONS, Array
from stitch.rewrite import Rewriter, Rule, Rules, Step, rewrite

_ROUNDS = 8  # a bound on repetition; real models settle in two to four
_GROWTH, _FREE = 4, 1 << 20  # a folded result may be 4 times as large as what it is made of, or 1 MiB
_WORK = 1 << 22  # elements that folding may compute, not merely view
_LARGE = 4096  # elements from which on a constant operand makes a vector-matrix product worth the name
_GUESS = 64  # what a symbol is taken for where only a cost depends on it

Perm: TypeAlias = tuple[int, ...]
Plan: TypeAlias = tuple[float, Callable[[Rewriter], Value]]


def simplify(graph: Graph) -> Graph:
    """The graph, simplified; its inputs, outputs' names and guards stay as they are.

    A change of layout is kept if fewer bytes are moved after it, or as many in fewer nodes.
    """
    graph = _settled(graph, decompose, tidy, fold)
    for _ in range(_ROUNDS):
        after = _settled(hoist(_settled(graph, sink, tidy, fold)), decompose, tidy, fold)
        if _burden(after) >= _burden(graph):
            break
        graph = after
    return graph


def _settled(graph: Graph, *passes: Callable[[Graph], Graph]) -> Graph:
    """The graph after these passes, in this order, until none changes it."""
    for _ in range(_ROUNDS):
        before = graph
        for step in passes:
            graph = step(graph)
        if graph is before:
            break
    return graph


def _burden(graph: Graph) -> tuple[float, int]:
    return sum(_weight(n.output) for n in moving(graph)), len(graph.nodes)


def decompose(graph: Graph) -> Graph:
    """argmax, and contractions that reuse nothing, in plainer primitives (see the rules)."""
    return rewrite(graph, _merged(MOVEMENT, DECOMPOSITION, ALGEBRA))


def tidy(graph: Graph) -> Graph:
    """Algebra and movement."""
    return rewrite(graph, _merged(ALGEBRA, MOVEMENT))


def fold(graph: Graph) -> Graph:
    """What follows from constants or from shapes alone is computed now."""
    return rewrite(graph, _merged(FOLDING, ALGEBRA))


def sink(graph: Graph) -> Graph:
    """relu(transpose(x)) -> transpose(relu(x)) and so on (see the rules); inverse pairs vanish on meeting."""
    return rewrite(graph, _merged(MOVEMENT, SINKING))


def hoist(graph: Graph) -> Graph:
    """transpose(add(x, transpose(y))) -> add(transpose(x), y): transposes pulled up where fewer bytes are then moved.

    Never through a value that something else reads too: that would compute it twice.
    """
    plans = _Plans(graph)
    chosen: dict[Node, Callable[[Rewriter], Value]] = {}
    for node in graph.nodes:
        if node.prim == "transpose" and not _stays(node.attrs["perm"], node.inputs[0].shape):
            cost, make = plans.plan(node.inputs[0], node.attrs["perm"], 32, root=True)
            if cost < _weight(node.output):
                chosen[node] = make
    return rewrite(graph, _merged(MOVEMENT), chosen) if chosen else graph


def moving(graph: Graph) -> list[Node]:
    """The transposes that really move data: not merely axes of extent 1."""
    return [n for n in graph.nodes if n.prim == "transpose" and not _stays(n.attrs["perm"], n.inputs[0].shape)]


# ------------------------------------------------------------------ constants


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
    return np.broadcast_to(source, evaluate.numbers(v.shape, {})), source.nbytes


def _folded(r: Rewriter, s: Step) -> Value | None:
    """add(const a, const b) -> const a + b; transposes and slices become views.

    Only if the result is not much larger than what it is made of, nor dear to compute.
    """
    if s.prim == "broadcast" or not _static(s.shape) or not all(_static(v) for v in s.attrs.values()):
        return None
    given = [g for g in (_literal(r, v) for v in s.inputs) if g is not None]
    if not given or len(given) < len(s.inputs):
        return None
    size = int(np.prod(evaluate.numbers(s.shape, {}), dtype=np.int64))
    if size * s.dtype.itemsize > max(_FREE, _GROWTH * sum(n for _, n in given)):
        return None
    work = max(size, *(a.size for a, _ in given))
    if (s.prim not in _VIEWS and work > _WORK) or (s.prim in ("contract", "scatter") and work > _LARGE):
        return None
    node = Node(s.prim, s.inputs, (Value("", s.dtype, s.shape),), s.attrs)
    return r.const(evaluate.apply(node, [a for a, _ in given], {})[0])


_VIEWS = ("transpose", "reshape", "slice")


# ------------------------------------------------------------------ algebra


def _units(r: Rewriter, s: Step) -> Value | None:
    """x * 1 -> x; x / 1; x - 0; x + -0.0; and(x, true); or(x, false); xor(x, 0). For integers x + 0, too.

    x + 0.0 stays: it turns -0.0 into 0.0.
    """
    x, y = s.inputs
    for value, other in ((x, y), (y, x)) if PRIMITIVES[s.prim].commutative else ((x, y),):
        n = r.number(other)
        if n is not None and _is_unit(s.prim, n):
            return value
    return None


def _is_unit(prim: str, n: Any) -> bool:
    real = dtypes.is_float(n.dtype)
    match prim:
        case "mul" | "div":
            return bool(n == 1)
        case "add" | "sub":
            return bool(n == 0) and (not real or bool(np.signbit(n)) == (prim == "add"))
        case "or" | "xor":
            return bool(n == 0)
        case "and":
            return bool(np.invert(n) == 0)
    return False


def _absorbed(r: Rewriter, s: Step) -> Value | None:
    """and(x, false) -> false; or(x, true) -> true; x * 0 -> 0 for integers."""
    for v in s.inputs:
        n = r.number(v)
        if n is None:
            continue
        zero = bool(n == 0)
        if (s.prim == "and" and zero) or (s.prim == "mul" and zero and not dtypes.is_float(s.dtype)):
            return v
        if s.prim == "or" and bool(np.invert(n) == 0):
            return v
    return None


def _idempotent(r: Rewriter, s: Step) -> Value | None:
    """max(x, x) -> x; min, and, or."""
    return s.x if s.inputs[1] is s.x else None


def _inverse_pair(r: Rewriter, s: Step) -> Value | None:
    """neg(neg(x)) -> x; not(not(x)) -> x."""
    inner = r.maker(s.x, s.prim)
    return inner.inputs[0] if inner is not None else None


def _sign_dropped(r: Rewriter, s: Step) -> Value | None:
    """abs(neg(x)) -> abs(x); abs(abs(x)) -> abs(x)."""
    inner = r.maker(s.x)
    if inner is None or inner.prim not in ("neg", "abs"):
        return None
    return s.x if inner.prim == "abs" else r.emit("abs", inner.inputs[0])


def _reciprocal(r: Rewriter, s: Step) -> Value | None:
    """x / 8 -> x * 0.125, for a power of two: both are the same real number, rounded once."""
    n = r.number(s.inputs[1])
    if n is None or not dtypes.is_float(s.dtype):
        return None
    wide = float(n)
    if not np.isfinite(wide) or abs(np.frexp(wide)[0]) != 0.5:
        return None
    inverse = np.asarray(1 / wide).astype(s.dtype)
    if not np.isfinite(inverse) or abs(float(inverse)) < _smallest_normal(s.dtype) or 1 / float(inverse) != wide:
        return None
    return r.emit("mul", s.x, r.uniform(inverse, s.dtype, s.x.shape))


def _smallest_normal(dtype: np.dtype) -> float:
    return 2.0**-14 if dtype == dtypes.FLOAT16 else 2.0**-1022 if dtype == dtypes.FLOAT64 else 2.0**-126


def _power(r: Rewriter, s: Step) -> Value | None:
    """pow(x, 1) -> x; pow(x, 2) -> x * x; pow(x, -1) -> 1 / x; pow(x, 0.5) -> sqrt(x), if x is neither negative nor
    -0.0, where they differ: pow(-0.0, 0.5) is 0.0, pow(-inf, 0.5) is inf."""
    n = r.number(s.inputs[1])
    if n is None or not dtypes.is_float(s.dtype):
        return None
    match float(n):
        case 1.0:
            return s.x
        case 2.0:
            return r.emit("mul", s.x, s.x)
        case -1.0:
            return r.emit("div", r.uniform(1, s.dtype, s.x.shape), s.x)
        case 0.5 if _positive(r, s.x, 8):
            return r.emit("sqrt", s.x)
    return None


def _positive(r: Rewriter, v: Value, depth: int) -> bool:
    """Whether no element is negative or -0.0; NaN may be."""
    n = r.number(v)
    if n is not None:
        return bool(n == n and not np.signbit(n))
    node = r.maker(v)
    if node is None or depth == 0:
        return False
    match node.prim:
        case "abs" | "exp" | "sigmoid" | "sqrt":
            return node.prim != "sqrt" or _positive(r, node.inputs[0], depth - 1)
        case "mul" if node.inputs[0] is node.inputs[1]:
            return True
        case "mul" | "add" | "div" | "reduce_sum" | "reduce_max" | "reduce_min" | "reshape" | "broadcast" | "transpose":
            return node.prim != "reduce_max" and all(_positive(r, i, depth - 1) for i in node.inputs)
    return False


def _of_itself(r: Rewriter, s: Step) -> Value | None:
    """x == x -> true; x < x -> false. For all but floats: there is NaN."""
    if s.inputs[1] is not s.x or dtypes.is_float(s.x.dtype):
        return None
    return r.uniform(s.prim in ("eq", "le"), dtypes.BOOL, s.shape)


def _decided(r: Rewriter, s: Step) -> Value | None:
    """where(true, x, y) -> x; where(c, x, x) -> x; where(not(c), x, y) -> where(c, y, x)."""
    c, x, y = s.inputs
    if x is y:
        return x
    n = r.number(c)
    if n is not None:
        return x if n else y
    inner = r.maker(c, "not")
    return r.emit("where", inner.inputs[0], y, x) if inner is not None else None


def _cast(r: Rewriter, s: Step) -> Value | None:
    """cast(x) to the dtype of x -> x; cast(cast(x)) -> cast(x), if the inner one loses nothing."""
    if s.x.dtype == s.dtype:
        return s.x
    inner = r.maker(s.x, "cast")
    if inner is not None and _lossless(inner.inputs[0].dtype, s.x.dtype):
        y = inner.inputs[0]
        return y if y.dtype == s.dtype else r.emit("cast", y, dtype=s.dtype)
    return None


_MANTISSA = {dtypes.FLOAT16: 11, dtypes.BFLOAT16: 8, dtypes.FLOAT32: 24, dtypes.FLOAT64: 53}
_EXPONENT = {dtypes.FLOAT16: 5, dtypes.BFLOAT16: 8, dtypes.FLOAT32: 8, dtypes.FLOAT64: 11}


def _lossless(a: np.dtype, b: np.dtype) -> bool:
    """Whether `b` has every value of `a`."""
    if a == dtypes.BOOL or a == b:
        return True
    if b == dtypes.BOOL:
        return False
    if dtypes.is_float(a):
        return dtypes.is_float(b) and _MANTISSA[a] <= _MANTISSA[b] and _EXPONENT[a] <= _EXPONENT[b]
    bits = a.itemsize * 8 - (a.kind == "i")
    if dtypes.is_float(b):
        return bits <= _MANTISSA[b] and bits < 2 ** (_EXPONENT[b] - 1)
    return bits <= b.itemsize * 8 - (b.kind == "i") and not (a.kind == "i" and b.kind == "u")


def _narrowed(r: Rewriter, s: Step) -> Value | None:
    """exp(broadcast(x)) -> broadcast(exp(x)); add(broadcast(x), const 2) -> broadcast(add(x, const 2)).

    If every operand repeats its elements along an axis, so does the result.
    """
    sources: list[Value] = []
    for v in s.inputs:
        node = r.maker(v, "broadcast")
        if node is None or v.shape != s.shape:
            return None
        sources.append(node.inputs[0])
    rank = max(v.rank for v in sources)
    joint: list[Dim] = [1] * rank
    for v in sources:
        for i, d in enumerate(v.shape, rank - v.rank):
            joint[i] = d if joint[i] == 1 else joint[i]
    if tuple(joint) == s.shape:
        return None
    inner = r.emit(s.prim, *[r.broadcast(v, joint) for v in sources], **s.attrs)
    return r.broadcast(inner, s.shape)


# ------------------------------------------------------------------ reductions


def _of_ones(r: Rewriter, s: Step) -> Value | None:
    """reduce(x [n, 1], axis 1) -> reshape(x, [n]). Axes of extent 1 among others are dropped first."""
    axes = s.attrs["axes"]
    ones = [a for a in axes if s.x.shape[a] == 1]
    if not ones:
        return None
    rest = [i for i in range(s.x.rank) if i not in ones]
    x = r.reshape(s.x, [s.x.shape[i] for i in rest])
    left = tuple(rest.index(a) for a in axes if a not in ones)
    return r.emit(s.prim, x, axes=left) if left else x


def _twice(r: Rewriter, s: Step) -> Value | None:
    """reduce(reduce(x, axis 2), axis 2) -> reduce(x, axes 2 and 3), of the same kind."""
    inner = r.maker(s.x, s.prim)
    if inner is None or s.dtype in (dtypes.FLOAT16, dtypes.BFLOAT16):
        return None
    kept = [i for i in range(inner.inputs[0].rank) if i not in inner.attrs["axes"]]
    axes = sorted({*inner.attrs["axes"], *(kept[a] for a in s.attrs["axes"])})
    return r.emit(s.prim, inner.inputs[0], axes=tuple(axes))


def _of_repeated(r: Rewriter, s: Step) -> Value | None:
    """reduce_max(broadcast(x), axis 0) -> broadcast(x) without axis 0, if x is repeated there, and at least once."""
    node = r.maker(s.x, "broadcast")
    if node is None:
        return None
    x, axes = node.inputs[0], s.attrs["axes"]
    missing = s.x.rank - x.rank
    repeated = [a < missing or (x.shape[a - missing] == 1) for a in axes]
    if not all(repeated) or not all(prove_le(1, s.x.shape[a]) for a in axes):
        return None
    full = [*[1] * missing, *x.shape]
    return r.broadcast(r.reshape(x, [d for i, d in enumerate(full) if i not in axes]), s.shape)


# ------------------------------------------------------------------ movement


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


def _stays(perm: Sequence[int], shape: Shape) -> bool:
    """Whether a transpose moves only axes of extent 1."""
    order = [p for p in perm if shape[p] != 1]
    return order == sorted(order)


def _transposed(r: Rewriter, s: Step) -> Value | None:
    """transpose(transpose(x)) -> transpose(x); transpose(x [n, 1, k], 1 0 2) -> reshape(x, [1, n, k]);
    transpose(broadcast(x)) -> broadcast(transpose(x)); transpose(iota) -> iota."""
    perm: Perm = s.attrs["perm"]
    if _stays(perm, s.x.shape):
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
            return _slice(
                r, inner.inputs[0], [a + t * b for a, t, b in zip(was, by, starts, strict=True)], sizes,
                [t * u for t, u in zip(by, steps, strict=True)],
            )  # fmt: skip
        case "concat":
            axis = inner.attrs["axis"]
            offset: Dim = 0
            last = starts[axis] + steps[axis] * (sizes[axis] - 1)
            for part in inner.inputs:
                end = offset + part.shape[axis]
                ends = (starts[axis], last) if steps[axis] > 0 else (last, starts[axis])
                if prove_le(offset, ends[0]) and prove_le(ends[1] + 1, end):
                    moved = [a - offset if i == axis else a for i, a in enumerate(starts)]
                    return _slice(r, part, moved, sizes, steps)
                offset = end
        case "broadcast":
            x = inner.inputs[0]
            missing = s.x.rank - x.rank
            real = [i - missing for i in range(missing, s.x.rank) if x.shape[i - missing] == s.x.shape[i]]
            sliced = _slice(
                r, x, [starts[i + missing] if i in real else 0 for i in range(x.rank)],
                [sizes[i + missing] if i in real else 1 for i in range(x.rank)],
                [steps[i + missing] if i in real else 1 for i in range(x.rank)],
            )  # fmt: skip
            return r.broadcast(sliced, s.shape)
    return None


def _slice(r: Rewriter, x: Value, starts: Sequence[Dim], sizes: Sequence[Dim], steps: Sequence[int]) -> Value:
    return r.emit("slice", x, starts=tuple(starts), sizes=tuple(sizes), steps=tuple(steps))


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
    return _slice(r, a.inputs[0], a.attrs["starts"], sizes, a.attrs["steps"])


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
    y = _slice(r, x, starts, sizes, steps)
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
    x = _slice(r, s.x, [0] * s.x.rank, sizes, steps)
    if wide:
        axes, sizes_, strides, dilations = zip(*wide, strict=True)
        x = r.emit("window", x, axes=axes, sizes=sizes_, strides=strides, dilations=dilations)
    return r.reshape(x, s.shape)


# ------------------------------------------------------------------ contractions


def _labels(s: Step) -> tuple[Perm, Perm, Perm] | None:
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
            labels[k] = [s.attrs["ab"[k]][i] for i in _inverse(node.attrs["perm"])]
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


# ------------------------------------------------------------------ decompositions


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


# ------------------------------------------------------------------ layout: sinking


def _inverse(perm: Sequence[int]) -> Perm:
    out = [0] * len(perm)
    for i, p in enumerate(perm):
        out[p] = i
    return tuple(out)


class _Guess(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return _GUESS


def _weight(v: Value) -> float:
    """Bytes, symbols being guessed."""
    return float(dims.evaluate(v.bytes, _Guess()))


def _relaying(r: Rewriter, v: Value, perm: Perm) -> float:
    """The bytes that it takes to transpose `v`: none for constants, or if that is done already; little for what is
    broadcast. What is done already counts in one direction only, lest a node goes back and forth."""
    node = r.maker(v)
    if perm < _inverse(perm) and r.seen("transpose", v, perm=perm):
        return 0.0
    if node is None or node.prim not in ("const", "iota", "broadcast"):
        return _weight(v)
    if node.prim == "broadcast" and r.maker(node.inputs[0], "const") is None:
        return min(_weight(node.inputs[0]), _weight(v) / 2)
    return 0.0


def _undone(r: Rewriter, v: Value, perm: Perm) -> bool:
    """Whether `v` is a transpose that `perm` undoes, but for axes of extent 1."""
    node = r.maker(v, "transpose")
    return node is not None and _stays([node.attrs["perm"][p] for p in perm], node.inputs[0].shape)


def _shared_perm(r: Rewriter, inputs: Sequence[Value]) -> Perm | None:
    """The permutation that operands are transposes by, if undoing it on all of them moves fewer bytes than it saves."""
    perms = {node.attrs["perm"]: None for v in inputs if (node := r.maker(v, "transpose")) is not None}
    best, most = None, 0.0
    for perm in perms:
        back = _inverse(perm)
        saved = sum(_weight(v) if _undone(r, v, back) else -_relaying(r, v, back) for v in inputs)
        if saved > most:
            best, most = perm, saved
    return best


def _sunk_elementwise(r: Rewriter, s: Step) -> Value | None:
    """add(transpose(x), transpose(y)) -> transpose(add(x, y)); add(transpose(x), broadcast(b)) likewise.

    Operands that are not transposes get the inverse one, if that is less than what is saved.
    """
    perm = _shared_perm(r, s.inputs)
    if perm is None:
        return None
    back = _inverse(perm)
    return r.transpose(r.emit(s.prim, *[r.transpose(v, back) for v in s.inputs], **s.attrs), perm)


def _sunk_concat(r: Rewriter, s: Step) -> Value | None:
    """concat(transpose(x), transpose(y), axis i) -> transpose(concat(x, y, axis perm[i]))."""
    perm = _shared_perm(r, s.inputs)
    if perm is None:
        return None
    back = _inverse(perm)
    y = r.emit("concat", *[r.transpose(v, back) for v in s.inputs], axis=perm[s.attrs["axis"]])
    return r.transpose(y, perm)


def _sunk_per_axis(r: Rewriter, s: Step) -> Value | None:
    """pad(transpose(x)) -> transpose(pad(x)); slice."""
    node = r.maker(s.x, "transpose")
    if node is None:
        return None
    perm = node.attrs["perm"]
    return r.transpose(r.emit(s.prim, node.inputs[0], **_permuted(s.attrs, _inverse(perm))), perm)


def _permuted(attrs: Mapping[str, Any], perm: Sequence[int]) -> dict[str, Any]:
    return {k: tuple(v[p] for p in perm) if isinstance(v, tuple) else v for k, v in attrs.items()}


def _sunk_reduction(r: Rewriter, s: Step) -> Value | None:
    """reduce(transpose(x), axis i) -> transpose(reduce(x, axis perm[i])), over the axes that are left."""
    node = r.maker(s.x, "transpose")
    if node is None:
        return None
    perm, axes = node.attrs["perm"], s.attrs["axes"]
    kept = [p for i, p in enumerate(perm) if i not in axes]
    y = r.emit(s.prim, node.inputs[0], axes=tuple(sorted(perm[a] for a in axes)))
    return r.transpose(y, [sorted(kept).index(p) for p in kept])


def _sunk_gather(r: Rewriter, s: Step) -> Value | None:
    """gather(transpose(x), i, axis k) -> transpose(gather(x, i, axis perm[k])), over the axes that are left."""
    node = r.maker(s.x, "transpose")
    if node is None:
        return None
    perm, axes, leading = node.attrs["perm"], s.attrs["axes"], s.inputs[1].rank
    kept = [p for i, p in enumerate(perm) if i not in axes]
    y = r.emit("gather", node.inputs[0], *s.inputs[1:], axes=tuple(perm[a] for a in axes))
    return r.transpose(y, [*range(leading), *(leading + sorted(kept).index(p) for p in kept)])


def _sunk_reshape(r: Rewriter, s: Step) -> Value | None:
    """reshape(transpose(x [n, h, w, c] to n c h w), [n, c, h*w]) -> transpose(reshape(x, [n, h*w, c])).

    If the axes that are merged or split lie together, in the same order, before the transpose.
    """
    node = r.maker(s.x, "transpose")
    if node is None:
        return None
    x, perm = node.inputs[0], node.attrs["perm"]
    blocks = _blocks(s.x.shape, s.shape)
    if blocks is None:
        return None
    cut = _reordered(blocks, perm, x.shape)
    if cut is None:
        return None
    order = [j for _, theirs in cut for j in theirs]
    return r.transpose(r.reshape(x, [s.shape[j] for j in order]), _inverse(order))


Block: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def _blocks(a: Shape, b: Shape) -> list[Block] | None:
    """Axes of `a` and of `b` that a reshape merges and splits among themselves; those of extent 1 that come or go
    belong to the block before, or to the first."""
    segments = dims.factor_segments(a, b)
    if segments is None:
        return None
    out: list[Block] = []
    pending: Block = ((), ())
    for mine, theirs in segments:
        if mine and theirs:
            out.append((pending[0] + mine, pending[1] + theirs))
            pending = ((), ())
        elif out:
            out[-1] = (out[-1][0] + mine, out[-1][1] + theirs)
        else:
            pending = (pending[0] + mine, pending[1] + theirs)
    return out or None


def _reordered(blocks: Sequence[Block], perm: Perm, shape: Shape) -> list[Block] | None:
    """The blocks in the order of the axes before a transpose by `perm` (of a value of this shape), if each is whole
    there and in order. Axes of extent 1 do not count."""
    keyed: list[tuple[int, Block]] = []
    last_seen: dict[int, int] = {}
    for k, (mine, _) in enumerate(blocks):
        for i in mine:
            if shape[perm[i]] != 1:
                last_seen[perm[i]] = k
    runs: list[int] = []
    for axis in sorted(last_seen):
        if not runs or runs[-1] != last_seen[axis]:
            runs.append(last_seen[axis])
    if len(runs) != len(set(runs)):
        return None
    for k, block in enumerate(blocks):
        axes = [perm[i] for i in block[0] if shape[perm[i]] != 1]
        if axes != sorted(axes):
            return None
        keyed.append((runs.index(k) if k in runs else -1, block))
    return [block for _, block in sorted(keyed, key=lambda e: e[0])]


# ------------------------------------------------------------------ layout: hoisting


class _Plans:
    """What it would cost, in bytes, to have a value transposed, and how to make it so."""

    def __init__(self, graph: Graph) -> None:
        self._makers = graph.producers()
        self._users = graph.users()
        self._outputs = set(graph.outputs)
        self._there = {(n.inputs[0], n.attrs["perm"]) for n in graph.nodes if n.prim == "transpose"}

    def _only(self, v: Value) -> bool:
        return len(self._users[v]) == 1 and v not in self._outputs

    def plan(self, v: Value, perm: Perm, depth: int, root: bool = False) -> Plan:
        whole = _weight(v)
        plain: Plan = (whole, lambda r: r.transpose(r.new(v), perm))
        node = self._makers.get(v)
        if _stays(perm, v.shape) or ((v, perm) in self._there and not root):
            return 0.0, plain[1]
        if node is None or depth == 0:
            return plain
        match node.prim:
            case "const" | "iota":
                return 0.0, plain[1]
            case "transpose":
                both = [node.attrs["perm"][p] for p in perm]
                left = 0.0 if _stays(both, node.inputs[0].shape) else whole
                return left - (whole if self._only(v) else 0.0), plain[1]
            case "broadcast":
                x = node.inputs[0]
                if x in self._makers and self._makers[x].prim == "const":
                    return 0.0, plain[1]
                if x.rank < v.rank or not self._only(v):
                    return min(_weight(x), whole / 2), plain[1]
                cost, make = self.plan(x, perm, depth - 1)
                shape = [v.shape[p] for p in perm]
                return min(cost, whole), lambda r: r.broadcast(make(r), shape)
        deeper = self._through(node, perm, depth - 1) if self._only(v) else None
        return plain if deeper is None or deeper[0] >= whole else deeper

    def _through(self, node: Node, perm: Perm, depth: int) -> Plan | None:
        """By way of the operands of a node that has no other user."""
        attrs = node.attrs
        inner: Perm = perm
        match node.prim:
            case "pad" | "slice":
                attrs = _permuted(attrs, perm)
            case "concat":
                attrs = {"axis": perm.index(attrs["axis"])}
            case prim if prim in REDUCTIONS:
                axes = attrs["axes"]
                order = [i for i in range(node.inputs[0].rank) if i not in axes]
                places = iter([order[p] for p in perm])
                inner = tuple(i if i in axes else next(places) for i in range(node.inputs[0].rank))
            case "reshape":
                x, shape = node.inputs[0], node.output.shape
                blocks = _blocks(shape, x.shape)
                cut = _reordered(blocks, _inverse(perm), tuple(shape[p] for p in perm)) if blocks else None
                if cut is None:
                    return None
                inner = tuple(j for _, theirs in cut for j in theirs)
                attrs = {"shape": tuple(shape[p] for p in perm)}
            case prim if PRIMITIVES[prim].kind != "elementwise":
                return None
        plans = [self.plan(v, inner, depth) for v in node.inputs]

        def make(r: Rewriter) -> Value:
            return r.emit(node.prim, *[build(r) for _, build in plans], **attrs)

        return sum(cost for cost, _ in plans), make


# ------------------------------------------------------------------ the tables


def _merged(*tables: Rules) -> dict[str, list[Rule]]:
    out: dict[str, list[Rule]] = {}
    for table in tables:
        for prim, rules in table.items():
            out.setdefault(prim, []).extend(rules)
    return out


def _for(prims: Iterable[str], *rules: Rule) -> dict[str, Sequence[Rule]]:
    return dict.fromkeys(prims, rules)


_ELEMENTWISE = [p.name for p in PRIMITIVES.values() if p.kind == "elementwise"]

FOLDING: Rules = {
    **_for((p.name for p in PRIMITIVES.values() if p.kind not in ("source", "opaque")), _known, _folded),
    "scatter": (_known, _folded),
    "const": (_uniform,),
}
ALGEBRA: Rules = _merged(
    _for(("add", "sub", "mul", "div", "and", "or", "xor"), _units),
    _for(("and", "or", "mul"), _absorbed),
    _for(("and", "or", "min", "max"), _idempotent),
    _for(("neg", "not"), _inverse_pair),
    _for(("eq", "ne", "lt", "le"), _of_itself),
    {"abs": [_sign_dropped], "div": [_reciprocal], "pow": [_power], "where": [_decided], "cast": [_cast]},
    _for(_ELEMENTWISE, _narrowed),
    _for(REDUCTIONS, _of_ones, _twice),
    _for(("reduce_max", "reduce_min"), _of_repeated),
)
MOVEMENT: Rules = _merged(
    _for(("reshape", "broadcast", "transpose", "slice", "pad"), _unmoved),
    {
        "reshape": [_reshaped_twice, _reshaped_broadcast],
        "broadcast": [_broadcast_source],
        "transpose": [_transposed],
        "slice": [_sliced],
        "pad": [_padded_twice],
        "concat": [_concatenated],
        "gather": [_gathered],
        "window": [_single_taps],
        "contract": [_relabelled, _without_ones, _unrepeated],
    },
)
DECOMPOSITION: Rules = {
    **_for(("argmax", "argmin"), _extremum_place),
    "contract": (_presummed, _without_reuse),
}
SINKING: Rules = _merged(
    _for(_ELEMENTWISE, _sunk_elementwise),
    _for(REDUCTIONS, _sunk_reduction),
    _for(("pad", "slice"), _sunk_per_axis),
    {"concat": [_sunk_concat], "gather": [_sunk_gather], "reshape": [_sunk_reshape]},
)
