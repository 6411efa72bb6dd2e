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
from stitch.codegen import across, rows
from stitch.codegen.across import UNROLL
from stitch.codegen.constants import Constant, Relaid, inside
from stitch.codegen.loops import Buffer, Clip, Define, Expr, Fold, Local, Loop, Phase, Read, Stmt, Use
from stitch.codegen.lower import Nest, Rewriter, cost, indices, tiles_of
from stitch.codegen.splitting import Work
from stitch.dims import Dim
from stitch.graph import Value
from stitch.stitching.schemes import estimate
from stitch.target import Target

BLOCK = 2048
"""Elements of a task where a parallel axis is vectorised and nothing else is looped over."""

CHUNK = 8_000
"""Instructions that a chunk of tasks should hold, so that handing it out does not show (about 2 us). Half a microsecond
is what it takes if workers are awake; `stitch.runtime.team` knows if they are not."""

GATHER, SCATTER = 32.0, 40.0
"""Cost of a strided vector load or store, in contiguous ones."""

OPEN = 512
"""What an extent with symbols is taken to be at least, where lanes along it are weighed: loops over short rows are
slow either way, but long ones had better be read as they lie."""

DOUBT = 1.5
"""Factor for lanes along a dim that an input leaves open, and that may well be 1, as batches often are, where there are
other axes that lanes could run along."""

TURNED = 6.0
"""Cost of one that is transposed in registers."""


def phase(
    given: Work, target: Target, constants: Mapping[Buffer, Value] | None = None, adaptive: bool = True
) -> tuple[Phase, tuple[Buffer, ...], dict[Buffer, Constant]]:
    """The phase's loops, its tiles, and the constants that it reads in an order of its own. Without `adaptive`
    (for ablation) lanes run along the axis with the fewest strided accesses, however short, and nothing is staged."""
    fixed, clips = constants or {}, given.clips
    axes, work = merge(given)
    own = [_own_vector(n, target, fixed, adaptive) for n in work]
    long = sum(weight(n, axes) * price for n, (_, price) in zip(work, own, strict=True))
    fixed_axes = {c.outer for c in clips.values()}

    def beside_price(n: Nest, a: Axis) -> float:
        turned = partial(across.turns, work, axes, a, n) if adaptive else None
        return _price(n, a, target, fixed, adaptive, turned) * (
            DOUBT if adaptive and len(axes) > 1 and _is_open(a) else 1
        )

    beside = {a: sum(weight(n, axes) * beside_price(n, a) for n in work) for a in axes if a not in fixed_axes}
    best = min(beside, key=beside.__getitem__, default=None)
    relaid: dict[Buffer, Constant] = {}
    if best is not None and (beside[best] <= long or not any(a for a, _ in own)):
        work = tuple(_relay(n, best, fixed, relaid) for n in work)
        block = across.cut(axes, best, work, clips, BLOCK, target.l2_bytes, adaptive)
        return *_across(block), relaid
    body, tiles, relaid = _by_row(work, [a for a, _ in own], fixed, clips, target.l1_bytes if adaptive else None)
    return Phase(axes, body, grain(work)), (*tiles_of(work), *tiles), relaid


def _is_open(a: Axis) -> bool:
    """Whether an axis goes over a dim that an input leaves open, and that may well be 1."""
    return isinstance(a.extent, dims.Expr) and str(a.extent) in dims.symbols(a.extent)


def by_row(
    work: Sequence[Nest], target: Target, constants: Mapping[Buffer, Value]
) -> tuple[tuple[Stmt, ...], dict[Buffer, Constant]]:
    """The loops of one parallel point, lanes along axes of the nests' own, and the constants in an order of their
    own."""
    body, _, relaid = _by_row(work, [_own_vector(n, target, constants)[0] for n in work], constants, {}, None)
    return body, relaid


def _by_row(
    work: Sequence[Nest],
    own: Sequence[Axis | None],
    constants: Mapping[Buffer, Value],
    clips: Mapping[Axis, Clip],
    large: int | None,
) -> tuple[tuple[Stmt, ...], tuple[Buffer, ...], dict[Buffer, Constant]]:
    """`large`: bytes from which nests over the same rows become one loop; never, if None. Its tiles come second."""
    relaid: dict[Buffer, Constant] = {}
    body: list[Stmt] = []
    tiles: list[Buffer] = []
    work = [_relay(n, a, constants, relaid) for n, a in zip(work, own, strict=True)]
    k = 0
    while k < len(work):
        same = () if large is None else rows.together(work[k:], own[k:], clips, large)
        if same:
            stop = k + len(same)
            vectors = [a for a in own[k:stop] if a is not None]
            stmts, totals = rows.by_row(work[k:stop], same, vectors, lambda n, a: loops(n, a, clips))
            tiles += totals
        else:
            n, a, stop = work[k], own[k], k + 1
            stmts = (*n.body, *n.after) if a is None else loops(n, a, clips)
        body += stmts
        k = stop
    return tuple(body), tuple(tiles), relaid


def _own_vector(
    n: Nest, target: Target, constants: Mapping[Buffer, Value], adaptive: bool = True
) -> tuple[Axis | None, float]:
    """The axis of the nest itself that lanes had best run along, and the price of a point."""
    prices = {a: _price(n, a, target, constants, adaptive) for a in (*n.kept, *n.reduced)}
    best = min(prices, key=prices.__getitem__, default=None)
    return (best, prices[best]) if best is not None else (None, _scalar(n))


def _price(
    n: Nest,
    a: Axis,
    target: Target,
    constants: Mapping[Buffer, Value],
    adaptive: bool,
    turned: Callable[[Index], bool] | None = None,
) -> float:
    if not adaptive:
        return float(_strided(n, a))
    return _axis_cost(n, a, target.vector_bits // 32, constants, turned)


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
    """Points of a nest."""
    points = float(estimate(dims.product(a.extent for a in parallel)))
    for a in (*n.kept, *n.reduced):
        points *= _likely(a)
    return points


def _likely(axis: Axis) -> int:
    """The extent of a loop inside a task, where the order of loops is weighed."""
    if isinstance(axis.extent, int):
        return max(axis.extent, 1)
    return max(estimate(axis.extent), OPEN)


# ------------------------------------------------------------------ merging axes


def merge(work: Work) -> tuple[tuple[Axis, ...], tuple[Nest, ...]]:
    """Joins axes as long as any two of one kind (parallel; kept or reduced of one nest) can be. Axes that end early
    stay as they are."""
    parallel, nests = work.parallel, work.nests
    fixed = {c.outer for c in work.clips.values()}
    while (pair := _pair([a for a in parallel if a not in fixed], _all_indices(nests))) is not None:
        joined, rewriter, rename = _joining(*pair)
        parallel = tuple(joined if a is pair[1] else a for a in parallel if a is not pair[0])
        nests = tuple(rewriter.nest(n, rename) for n in nests)
    out = []
    for n in nests:
        while True:
            own = [i for _, i, _ in indices(n)]
            pair = _pair(n.kept, own) or _pair([a for a in n.reduced if a not in work.clips], own)
            if pair is None:
                break
            _, rewriter, rename = _joining(*pair)
            n = rewriter.nest(n, rename)
        out.append(n)
    return parallel, tuple(out)


def _all_indices(nests: Sequence[Nest]) -> list[Index]:
    return [i for n in nests for _, i, _ in indices(n)]


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


def _axis_cost(
    n: Nest,
    axis: Axis,
    lanes: int,
    constants: Container[Buffer] = (),
    turns: Callable[[Index], bool] | None = None,
) -> float:
    """Cost per element of a nest whose vector axis is `axis`. `turns`: whether an access can be a transposed block."""
    total = cost(n)
    extent = _likely(axis)
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
        elif turns is not None and turns(i):
            total += TURNED
        else:
            total += SCATTER if is_store else GATHER
    if axis in n.reduced:
        total += 20.0 * lanes / extent
    return total * (-(-extent // lanes) * lanes) / extent


def _strided(n: Nest, axis: Axis) -> int:
    """How many accesses of memory are neither contiguous along the axis nor the same."""
    return sum(b is not None and b.space == "global" and i.coefficient(axis) not in (0, 1) for b, i, _ in indices(n))


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


# ------------------------------------------------------------------ loops


def loops(
    n: Nest, vector: Axis | None, clips: Mapping[Axis, Clip] | None = None, times: int | None = None
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
        times_here = (times or UNROLL) if a is vector else 1
        body = (Loop(a, body, named, "vector" if a is vector else "serial", clips.get(a), times_here),)
        folds = tuple(Fold(f.local, f.op, Use(g.local)) for f, g in zip(n.folds, named, strict=True))
    body = (*body, *n.after)
    for a in reversed(kept):
        times_here = (times or UNROLL) if a is vector else 1
        body = (Loop(a, body, (), "vector" if a is vector else "serial", clips.get(a), times_here),)
    return body


def _across(block: across.Block) -> tuple[Phase, tuple[Buffer, ...]]:
    """A block's nests, each in a vector loop over the lanes, or around one."""
    body: list[Stmt] = list(block.before)
    tiles = block.tiles
    for n in block.nests:
        if block.by_row:
            stmts, totals = across.streamed(n, block)
            body += stmts
            tiles += totals
        else:
            body.append(Loop(block.lanes, loops(n, None, block.clips), (), "vector", block.clip, UNROLL))
    return Phase(block.axes, (*body, *block.after), grain(block.nests, block.points)), tiles


class Reader(Rewriter):
    """Exchanges reads for others of the same elements."""

    def __init__(self, read: Callable[[Read], Read]) -> None:
        super().__init__(lambda _, i: i)
        self.read = read

    def _expr(self, e: Expr) -> Expr:
        out = super()._expr(e)
        return self.read(out) if isinstance(out, Read) else out
