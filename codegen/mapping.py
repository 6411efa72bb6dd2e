"""Mapping: the loop nests of a phase as loops: which axes are one, which is the vector, how tasks are cut.

    merge      two axes that every index uses as outer · extent + inner are one axis: longer inner loops
    vector     either a parallel axis, whose lanes run through all groups side by side (short rows, reductions over
               leading or middle axes, plain elementwise work), or for each group one of its own axes (long rows)
    block      a vectorised parallel axis is cut into blocks, one task each

The choice is by the cost of each access: 1 if the axis is contiguous in it, little if it does not occur, a gather
otherwise, weighted by how often the group runs, and by how many lanes of the last vector are used.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial

from stitch import access, dims
from stitch.access import Axis, Index
from stitch.codegen.constants import Constant, Relaid, inside
from stitch.codegen.loops import Buffer, Clip, Define, Expr, Fold, Local, Loop, Phase, Read, Stmt, Store, Use
from stitch.codegen.lower import Nest, Rewriter, cost, indices
from stitch.dims import Dim
from stitch.graph import Value
from stitch.stitching.schemes import estimate
from stitch.target import Target

BLOCK = 2048
"""Elements of a task where a parallel axis is vectorised and nothing else is looped over."""

CHUNK = 20_000
"""Instructions that a chunk of tasks should hold, so that handing it out does not show (about 5 us)."""

GATHER, SCATTER = 32.0, 40.0
"""Cost of a strided vector load or store, in contiguous ones."""

TURN = 64
"""Length of the serial side of a block where the vector axis is strided in what is read."""


def phase(
    parallel: Sequence[Axis], nests: Sequence[Nest], target: Target, constants: Mapping[Buffer, Value] | None = None
) -> tuple[Phase, tuple[Buffer, ...], dict[Buffer, Constant]]:
    """The phase's loops, its tiles, and the constants that it reads in an order of its own."""
    fixed = constants or {}
    axes, work = merge(tuple(parallel), tuple(nests))
    lanes = target.vector_bits // 32

    def price(n: Nest, a: Axis) -> float:
        return _axis_cost(n, a, lanes, fixed)

    own = [min((*n.kept, *n.reduced), key=partial(price, n), default=None) for n in work]
    rows = sum(weight(n, axes) * (price(n, a) if a is not None else _scalar(n)) for n, a in zip(work, own, strict=True))
    across = {a: sum(weight(n, axes) * price(n, a) for n in work) for a in axes}
    best = min(axes, key=across.__getitem__, default=None)
    relaid: dict[Buffer, Constant] = {}
    if best is not None and (across[best] <= rows or not any(own)):
        work = tuple(_relay(n, best, fixed, relaid) for n in work)
        loops_, tiles = _across(axes, best, work, lanes)
        return loops_, tiles, relaid
    work = tuple(_relay(n, a, fixed, relaid) for n, a in zip(work, own, strict=True))
    body = tuple(s for n, a in zip(work, own, strict=True) for s in ((*n.body, *n.after) if a is None else loops(n, a)))
    return Phase(axes, body, grain(work)), tiles_of(work), relaid


def _relay(n: Nest, vector: Axis | None, constants: Mapping[Buffer, Value], found: dict[Buffer, Constant]) -> Nest:
    """The nest reading constants along `vector` from copies in which that axis is contiguous."""

    def relaid(e: Read) -> Read:
        c = e.index.coefficient(vector) if vector is not None else 0
        offset = e.index.offset
        fixed = [
            (v, v.extent, k)
            for v, k in e.index.terms
            if isinstance(v, Axis) and isinstance(v.extent, int) and isinstance(k, int)
        ]
        if e.buffer not in constants or c in (0, 1) or len(fixed) < len(e.index.terms) or not isinstance(offset, int):
            return e
        fixed.sort(key=lambda t: (t[0] is vector, -t[2]))
        order = [v for v, _, _ in fixed]
        layout = tuple((extent, k) for _, extent, k in fixed)
        size = constants[e.buffer].size
        if not isinstance(size, int) or not inside(size, offset, layout):  # a guarded read may point anywhere
            return e
        constant = Relaid(constants[e.buffer], offset, layout)
        buffer = next((b for b, k in found.items() if k == constant), None)
        if buffer is None:
            buffer = Buffer("c", e.buffer.dtype, constant.size)
            found[buffer] = constant
        steps = access.strides([v.extent for v in order])
        return Read(buffer, access.index(0, *zip(order, steps, strict=True)))

    return Reader(relaid).nest(n, {})


def grain(nests: Sequence[Nest], points: Dim = 1) -> Dim:
    """Tasks that make up a chunk; `points`: further iterations per task."""
    total: Dim = 8
    for n in nests:
        extent = dims.product(a.extent for a in (*n.kept, *n.reduced))
        total = total + extent * points * max(1, round(cost(n)))
    return dims.ceil_div(CHUNK * 16, total)


def weight(n: Nest, parallel: Sequence[Axis]) -> float:
    return float(estimate(dims.product(a.extent for a in (*parallel, *n.kept, *n.reduced))))


# ------------------------------------------------------------------ merging axes


def merge(parallel: tuple[Axis, ...], nests: tuple[Nest, ...]) -> tuple[tuple[Axis, ...], tuple[Nest, ...]]:
    """Joins axes as long as any two of one kind (parallel; kept or reduced of one nest) can be."""
    while (pair := _pair(parallel, [i for n in nests for _, i, _ in indices(n)])) is not None:
        joined, rewriter, rename = _joining(*pair)
        parallel = tuple(joined if a is pair[1] else a for a in parallel if a is not pair[0])
        nests = tuple(rewriter.nest(n, rename) for n in nests)
    out = []
    for n in nests:
        while (pair := _pair(n.kept, own := [i for _, i, _ in indices(n)]) or _pair(n.reduced, own)) is not None:
            _, rewriter, rename = _joining(*pair)
            n = rewriter.nest(n, rename)
        out.append(n)
    return parallel, tuple(out)


def _pair(axes: Sequence[Axis], found: Sequence[Index]) -> tuple[Axis, Axis] | None:
    for inner in axes:
        for outer in axes:
            if outer is not inner and joinable(outer, inner, found):
                return outer, inner
    return None


def joinable(outer: Axis, inner: Axis, found: Sequence[Index]) -> bool:
    """True if every index moves by a whole inner extent per step of outer."""
    return all(i.coefficient(outer) == i.coefficient(inner) * inner.extent for i in found)


def _joining(outer: Axis, inner: Axis) -> tuple[Axis, Rewriter, dict[Axis, Axis | None]]:
    joined = Axis(inner.name, outer.extent * inner.extent)

    def change(_: Buffer | None, i: Index) -> Index:
        terms = ((joined if v is inner else v, c) for v, c in i.terms if v is not outer)
        return Index(i.offset, tuple(terms))

    return joined, Rewriter(change), {outer: None, inner: joined}


# ------------------------------------------------------------------ choosing the vector axis


def _axis_cost(n: Nest, axis: Axis, lanes: int, constants: Container[Buffer] = ()) -> float:
    """Cost per element of a nest whose vector axis is `axis`."""
    total = cost(n)
    moving = moving_locals(n, axis)
    for buffer, i, is_store in indices(n):
        c = i.coefficient(axis)
        if buffer is None:
            total += 0.5 if c != 0 else 0.0
        elif buffer.space == "tile":
            total += 1.0
        elif any(v in moving for v, _ in i.terms):
            total += SCATTER if is_store else GATHER
        elif c == 1 or (c != 0 and buffer in constants):
            total += 2.0
        elif c == 0:
            total += SCATTER if is_store and axis not in n.reduced else 0.3
        else:
            total += SCATTER if is_store else GATHER
    if axis in n.reduced:
        total += 20.0 * lanes / max(estimate(axis.extent), 1)
    extent = max(estimate(axis.extent), 1)
    return total * (-(-extent // lanes) * lanes) / extent


def moving_locals(n: Nest, axis: Axis) -> set[Local]:
    """The locals of a nest (loaded indices) that change along an axis."""
    moving: set[Local] = set()
    for s in n.body:
        if isinstance(s, Define):
            inside = indices(Nest((), (), (s,)))
            if any(i.coefficient(axis) != 0 or any(v in moving for v, _ in i.terms) for _, i, _ in inside):
                moving.add(s.local)
    return moving


def _scalar(n: Nest) -> float:
    return 16.0 * cost(n)


def unroll(n: Nest, reduces: bool) -> int:
    """Vectors per step: enough independent work to hide latency, without running out of registers."""
    c = cost(n)
    if reduces and c <= 16:
        return 4
    return 4 if c <= 12 else 2 if c <= 60 else 1


# ------------------------------------------------------------------ loops


def loops(
    n: Nest, vector: Axis | None, clips: dict[Axis, Clip] | None = None, times: int | None = None
) -> tuple[Stmt, ...]:
    """A nest as statements; `vector` becomes the innermost of its kind and a vector loop."""
    clips = clips or {}
    kept = sorted(n.kept, key=lambda a: a is vector)
    reduced = sorted(n.reduced, key=lambda a: a is vector)
    body: tuple[Stmt, ...] = n.body
    folds = n.folds
    for depth, a in enumerate(reversed(reduced)):
        last = depth == len(reduced) - 1
        named = tuple(f if last else replace(f, local=Local(f.local.name, f.local.dtype)) for f in folds)
        times_here = (times or unroll(n, True)) if a is vector else 1
        body = (Loop(a, body, named, "vector" if a is vector else "serial", clips.get(a), times_here),)
        folds = tuple(Fold(f.local, f.op, Use(g.local)) for f, g in zip(n.folds, named, strict=True))
    body = (*body, *n.after)
    for a in reversed(kept):
        times_here = (times or unroll(n, False)) if a is vector else 1
        body = (Loop(a, body, (), "vector" if a is vector else "serial", clips.get(a), times_here),)
    return body


def _across(
    axes: tuple[Axis, ...], axis: Axis, nests: tuple[Nest, ...], lanes: int
) -> tuple[Phase, tuple[Buffer, ...]]:
    """All nests inside one vector loop over a block of a parallel axis."""
    axes, nests, clips = _turn(axes, axis, nests)
    inner_loops = any(n.kept or n.reduced for n in nests)
    times = 4 if not inner_loops else min((unroll(n, True) for n in nests), default=1)
    if not inner_loops and sum(cost(n) for n in nests) > 24:
        times = 2
    block = lanes * times if inner_loops else BLOCK
    whole = isinstance(axis.extent, int) and axis.extent <= block
    if whole:
        assert isinstance(axis.extent, int)
        lane, outer, clip = axis, None, None
        block = axis.extent
        position = access.of(axis)
    else:
        outer = Axis(axis.name + "b", dims.ceil_div(axis.extent, block))
        lane = Axis(axis.name, block)
        clip = Clip(block, outer, axis.extent)
        position = access.index(0, (outer, block), (lane, 1))
    wide: dict[Buffer, Buffer] = {}

    def change(buffer: Buffer | None, i: Index) -> Index:
        i = i.substitute({axis: position})
        if buffer is None or buffer.space == "global":
            return i
        return access.add(i.times(block), access.index(0, (lane, 1)))

    rewriter = Rewriter(change)
    moved = [rewriter.nest(n, {}) for n in nests]
    for t in tiles_of(moved):
        wide[t] = Buffer(t.name, t.dtype, t.size * block, "tile")
    moved = [Retiler(wide).nest(n, {}) for n in moved]
    inside = tuple(s for n in moved for s in loops(n, None, clips))
    body = (Loop(lane, inside, (), "vector", clip, times),)
    rest = tuple(outer if a is axis else a for a in axes if a is not axis or outer is not None)
    return Phase(tuple(a for a in rest if a is not None), body, grain(moved, block)), tuple(wide.values())


def _turn(
    axes: tuple[Axis, ...], vector: Axis, nests: tuple[Nest, ...]
) -> tuple[tuple[Axis, ...], tuple[Nest, ...], dict[Axis, Clip]]:
    """Where plain elementwise work reads across the vector axis, the axis along which it would read contiguously
    becomes a serial loop inside the task: what a cache line holds is then used while it is there.

    Before: parallel (q, ...) { vector v: y[q, v] := x[v, q] }
    after:  parallel (q / 64, ...) { vector v { for q % 64 } }
    """
    found = [i for n in nests for b, i, is_store in indices(n) if b is not None and not is_store]
    strided = [i for i in found if i.coefficient(vector) not in (0, 1)]
    along = next((a for i in strided for a in axes if a is not vector and i.coefficient(a) == 1), None)
    if along is None or any(n.kept or n.reduced for n in nests):
        return axes, nests, {}
    if isinstance(along.extent, int) and along.extent <= 2 * TURN:
        inner, outer, position, clips = along, None, access.of(along), {}
    else:
        inner, outer = Axis(along.name, TURN), Axis(along.name + "b", dims.ceil_div(along.extent, TURN))
        position, clips = access.index(0, (outer, TURN), (inner, 1)), {inner: Clip(TURN, outer, along.extent)}
    rewriter = Rewriter(lambda _, i: i.substitute({along: position}))
    moved = tuple(replace(rewriter.nest(n, {}), kept=(inner,)) for n in nests)
    rest = tuple(x for a in axes if (x := outer if a is along else a) is not None)
    return rest, moved, clips


class Reader(Rewriter):
    """Exchanges reads for others of the same elements."""

    def __init__(self, read: Callable[[Read], Read]) -> None:
        super().__init__(lambda _, i: i)
        self.read = read

    def _expr(self, e: Expr) -> Expr:
        out = super()._expr(e)
        return self.read(out) if isinstance(out, Read) else out


class Retiler(Rewriter):
    """Exchanges tile buffers for others of the same contents."""

    def __init__(self, buffers: dict[Buffer, Buffer]) -> None:
        super().__init__(lambda _, i: i)
        self.buffers = buffers

    def _expr(self, e: Expr) -> Expr:
        out = super()._expr(e)
        return replace(out, buffer=self.buffers.get(out.buffer, out.buffer)) if isinstance(out, Read) else out

    def stmt(self, s: Stmt) -> Stmt:
        out = super().stmt(s)
        return replace(out, buffer=self.buffers.get(out.buffer, out.buffer)) if isinstance(out, Store) else out


def tiles_of(nests: Sequence[Nest]) -> tuple[Buffer, ...]:
    found = dict.fromkeys(b for n in nests for b, _, _ in indices(n) if b is not None and b.space == "tile")
    return tuple(found)
