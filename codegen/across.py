"""Lanes along a parallel axis: every group of a phase for a block of neighbouring points, side by side.

    before: parallel (i, ...) { nest; nest }
    after:  parallel (i / 64, ...) { [transposes in] vector i % 64 { nest } vector i % 64 { nest } [transposes out] }

Each nest has a vector loop of its own, so that each keeps as many vectors in flight as its registers allow; what one
point's number was in a register becomes a tile with a number for each lane.

    stage      where a nest reads or stores elements that are adjacent along another axis than the vector's, the block
               goes through a tile, transposed in registers, instead of being gathered or scattered
    turn       plain elementwise work has no other axis: a parallel one becomes a loop in the task first
    stream     a phase that only folds rows of a large buffer does so row by row over wide blocks, with folds in tiles,
               rather than by a register's width from row to row: memory is read in the order in which it lies
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stitch import access, dims
from stitch.access import Axis, Index
from stitch.codegen.emit_rules import identity
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Clip,
    Define,
    Expr,
    Fold,
    Guarded,
    Literal,
    Local,
    Loop,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
    children,
)
from stitch.codegen.lower import Nest, Retiler, Rewriter, expressions, indices, tiles_of
from stitch.codegen.splitting import ENOUGH, WIDE, joined
from stitch.codegen.sums import BLOCK_BITS, is_blocked
from stitch.stitching.schemes import estimate

UNROLL = 4
"""Vectors per step: enough independent work to hide the latency of long chains of operations. That constants no longer
fit the registers then costs less: they are operands in memory."""

TURN, TURNED, FLAT = 16, 128, 512
"""Sides of a block of plain work that is transposed: along what is read, a cache line, for lines of rows far apart come
one at a time; along what is stored, as many rows as may wait in a cache until it is their turn, and more where what is
read is short."""

ROWS = 64
"""Lanes of a block in which nests have loops of their own: 256 bytes of each row of float32, or four cache lines."""

BLOCK = 1 << BLOCK_BITS
"""Rows after which a sum by rows goes to another tile."""

WINDOW = 64
"""Rows up to which a fold is kept in registers if it is one of a window, of which the next point reads most again."""

LARGEST = 4096
"""Elements for each lane from which a block is not staged: it would not stay in a cache."""


def along(index: Index, vector: Axis, axes: Sequence[Axis]) -> Axis | None:
    """The axis along which the elements of a strided access are adjacent, if a block over it and `vector` can be
    transposed: all other axes that the access moves along stand still meanwhile."""
    if index.coefficient(vector) in (0, 1, -1):
        return None
    found = [a for a in axes if a is not vector and index.coefficient(a) == 1]
    if len(found) != 1 or any(not isinstance(v, Axis) for v, _ in index.terms):
        return None
    return found[0] if estimate(found[0].extent) <= LARGEST else None


def turns(nests: Sequence[Nest], parallel: Sequence[Axis], vector: Axis, n: Nest, index: Index) -> bool:
    """Whether an access of a nest will be a transposed block."""
    if _side(index, vector, n) is not None:
        return True
    plain = not any(m.kept or m.reduced for m in nests)
    return plain and along(index, vector, parallel) is not None


def _side(index: Index, vector: Axis, n: Nest) -> Axis | None:
    """The axis of the nest itself along which a strided access is adjacent, if it is the only one that moves it."""
    own = (*n.kept, *n.reduced)
    inner = along(index, vector, own)
    return None if any(a is not inner and index.coefficient(a) != 0 for a in own) else inner


@dataclass
class _Tiles:
    """The tiles of a block; sizes are for one lane until the end."""

    vector: Axis
    start: Mapping[Axis, Index]  # the vector axis at the block's first lane
    lanes: Axis
    clip: Clip | None
    clips: Mapping[Axis, Clip]
    block: int
    before: list[Transpose] = field(default_factory=list)
    after: list[Transpose] = field(default_factory=list)
    staged: dict[tuple[object, ...], Buffer] = field(default_factory=dict)

    def read(self, e: Read, inner: Axis) -> Read:
        """A read from a block that is transposed into a tile before."""
        key = (e.buffer, e.index.substitute({inner: access.ZERO}), inner.extent)
        if key not in self.staged:
            tile = self.staged[key] = Buffer("s", e.buffer.dtype, inner.extent, "tile")
            first = e.index.substitute({**self.start, inner: access.ZERO})
            self.before.append(
                Transpose(
                    tile, access.ZERO, self.block, e.buffer, first, e.index.coefficient(self.vector),
                    Axis("rows", inner.extent), self.lanes, self.clips.get(inner), self.clip,
                )
            )  # fmt: skip
        return Read(self.staged[key], access.of(inner))

    def store(self, s: Store, inner: Axis) -> Store:
        """A store to a tile that is transposed into its place afterwards."""
        tile = Buffer("o", s.buffer.dtype, inner.extent, "tile")
        first = s.index.substitute({**self.start, inner: access.ZERO})
        self.after.append(
            Transpose(
                s.buffer, first, s.index.coefficient(self.vector), tile, access.ZERO, self.block,
                self.lanes, Axis("columns", inner.extent), self.clip, self.clips.get(inner),
            )
        )  # fmt: skip
        return Store(tile, access.of(inner), s.value)


class _Stage(Rewriter):
    """One nest, its strided accesses staged where they can be."""

    def __init__(self, tiles: _Tiles, nest: Nest, stored: frozenset[Buffer], read: frozenset[Buffer]) -> None:
        super().__init__(lambda _, i: i)
        self.tiles, self.subject, self.stored, self.seen = tiles, nest, stored, read
        self.guarded = _guarded(nest)

    def _expr(self, e: Expr) -> Expr:
        if isinstance(e, Read) and e.buffer.space != "tile" and e.buffer not in self.stored:
            inner = _side(e.index, self.tiles.vector, self.subject)
            if inner is not None and id(e) not in self.guarded:
                return self.tiles.read(e, inner)
        return super()._expr(e)

    def stmt(self, s: Stmt) -> Stmt:
        out = super().stmt(s)
        if isinstance(out, Store) and out.buffer.space != "tile" and out.buffer not in self.seen:
            inner = _side(out.index, self.tiles.vector, self.subject)
            if inner is not None:
                return self.tiles.store(out, inner)
        return out


def _guarded(n: Nest) -> set[int]:
    """The reads under a guard: elsewhere they may be out of range."""
    found: set[int] = set()
    seen: set[tuple[int, bool]] = set()
    values = [s.value for s in (*n.body, *n.after) if isinstance(s, Define | Store)] + [f.value for f in n.folds]
    stack = [(e, False) for e in values]
    while stack:
        e, inside = stack.pop()
        if (id(e), inside) in seen:
            continue
        seen.add((id(e), inside))
        if inside and isinstance(e, Read):
            found.add(id(e))
        stack += [(c, inside or isinstance(e, Guarded)) for c in children(e)]
    return found


class _Spread(Rewriter):
    """Puts what other nests know as a local into tiles with a number for each lane."""

    def __init__(self, tiles: Mapping[Local, Buffer], at: Index = access.ZERO) -> None:
        super().__init__(lambda _, i: i)
        self.tiles, self.at = tiles, at
        self.own: set[Local] = set()

    def _expr(self, e: Expr) -> Expr:
        if isinstance(e, Use) and e.local in self.tiles and e.local not in self.own:
            return Read(self.tiles[e.local], self.at)
        return super()._expr(e)

    def whole(self, n: Nest) -> Nest:
        self.own = _locals(n)
        self.memo.clear()
        out = self.nest(n, {})
        spilled = tuple(t for f in out.folds for t in self._kept(f.local))
        return replace(out, body=self._keeping(out.body), after=(*spilled, *self._keeping(out.after)))

    def _keeping(self, body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
        return tuple(t for s in body for t in (s, *self._kept(s.local if isinstance(s, Define) else None)))

    def _kept(self, local: Local | None) -> tuple[Store, ...]:
        if local not in self.tiles or local is None:
            return ()
        return (Store(self.tiles[local], self.at, Use(local)),)


def _locals(n: Nest) -> set[Local]:
    return {s.local for s in (*n.body, *n.after) if isinstance(s, Define)} | {f.local for f in n.folds}


def spread(nests: Sequence[Nest]) -> tuple[Nest, ...]:
    """Nests that share no locals."""
    nests = joined(nests)
    tiles = {x: Buffer(x.name, x.dtype, 1, "tile") for x in _shared(nests)}
    writer = _Spread(tiles)
    return tuple(writer.whole(n) for n in nests)


def _shared(nests: Sequence[Nest]) -> list[Local]:
    """The locals of a nest that another one uses, in the order in which they are made."""
    made = {x: k for k, n in enumerate(nests) for x in _locals(n)}
    used = [{e.local for e in expressions(n) if isinstance(e, Use)} for n in nests]
    elsewhere = {x for k, found in enumerate(used) for x in found if made[x] != k}
    return [x for x in made if x in elsewhere]


def streams(n: Nest, vector: Axis, large: int) -> bool:
    """Whether a nest reads or stores rows, one per iteration, of a buffer of more than `large` bytes."""
    own = (*n.kept, *n.reduced)
    if not own or (n.kept and n.reduced):
        return False
    few = dims.prove_le(dims.product(a.extent for a in own), WINDOW)
    return any(
        b is not None
        and b.space == "global"
        and i.coefficient(vector) == 1
        and any(estimate(i.coefficient(a)) > 2 * ROWS for a in own)
        and estimate(b.size) * b.dtype.itemsize > large
        and not (few and _recurs(i, own))
        for b, i, _ in indices(n)
    )


def _recurs(index: Index, own: Sequence[Axis]) -> bool:
    """Whether an axis around a nest moves an access by less than the nest's own axes do."""
    steps = [(estimate(index.coefficient(a)), estimate(a.extent)) for a in own]
    others = [estimate(c) for v, c in index.terms if v not in own]
    return len(own) > 1 or any(step <= other < step * extent for step, extent in steps for other in others)


def streamed(n: Nest, block: Block) -> tuple[tuple[Stmt, ...], tuple[Buffer, ...]]:
    """The nest with its own loops around that over the lanes, and its folds in tiles.

    before: vector v { for r { t op= f(r, v) }; after(t) }
    after:  vector v { tile[v] := identity }; for r { vector v { tile[v] := op(tile[v], f(r, v)) } }; vector v { ... }

    Long sums go into another tile, block by block.
    """
    at = access.of(block.lanes)
    totals = {f.local: Buffer(f.local.name, f.local.dtype, block.points, "tile") for f in n.folds}

    def lanes(body: Sequence[Stmt]) -> tuple[Stmt, ...]:
        return (Loop(block.lanes, tuple(body), (), "vector", block.clip, UNROLL),) if body else ()

    def empty(tiles: Mapping[Local, Buffer]) -> tuple[Stmt, ...]:
        kinds = [(f, tiles[f.local]) for f in n.folds]
        return lanes([Store(t, at, Literal(identity(f.op, t.dtype), t.dtype)) for f, t in kinds])

    def folded(into: Mapping[Local, Buffer], what: Callable[[Fold], Expr]) -> list[Stmt]:
        kinds = [(f, into[f.local]) for f in n.folds]
        return [Store(t, at, Apply(f.op, (Read(t, at), what(f)), t.dtype)) for f, t in kinds]

    cut, finer, clips, where = _in_blocks(n, block.clips)
    inside = totals if cut is None else {x: Buffer(t.name, t.dtype, t.size, "tile") for x, t in totals.items()}
    fine = n if cut is None else Rewriter(lambda _, i: i.substitute(where)).nest(n, {})
    values = {f.local: g.value for f, g in zip(n.folds, fine.folds, strict=True)}
    loop = lanes((*fine.body, *folded(inside, lambda f: values[f.local])))
    for a in reversed(finer):
        loop = (Loop(a, loop, (), "serial", clips.get(a)),)
        if a is cut:
            flush = lanes(folded(totals, lambda f: Read(inside[f.local], at)))
            loop = (*empty(inside), *loop, *flush)
    after = _Spread(totals, at)
    tiles = tuple(dict.fromkeys((*totals.values(), *inside.values())))
    return (*empty(totals), *loop, *lanes([after.stmt(s) for s in n.after])), tiles


def _in_blocks(
    n: Nest, clips: Mapping[Axis, Clip]
) -> tuple[Axis | None, tuple[Axis, ...], Mapping[Axis, Clip], Mapping[Axis, Index]]:
    """The reduced axes with one of them cut into blocks, where a float sum over them is longer than one: the axis over
    blocks, or None; all axes; their clips; and what stands for the axis that was cut."""
    inside = 1
    for k in reversed(range(len(n.reduced) if any(map(is_blocked, n.folds)) else 0)):
        a = n.reduced[k]
        if isinstance(a.extent, int) and (a in clips or inside * a.extent <= BLOCK):  # clips: it is a part already
            inside *= a.extent
            continue
        size = max(BLOCK // inside, 1)
        outer, inner = Axis(a.name + "b", dims.ceil_div(a.extent, size)), Axis(a.name, size)
        axes = (*n.reduced[:k], outer, inner, *n.reduced[k + 1 :])
        where = {a: access.index(0, (outer, size), (inner, 1))}
        return outer, axes, {**clips, inner: Clip(size, outer, a.extent)}, where
    return None, n.reduced, clips, {}


def _turn(
    axes: tuple[Axis, ...], vector: Axis, nests: tuple[Nest, ...]
) -> tuple[tuple[Axis, ...], tuple[Nest, ...], dict[Axis, Clip]]:
    """Where plain elementwise work has elements adjacent along another parallel axis, that becomes a loop in the task.

    before: parallel (q, ...) { vector v: y[q, v] := x[v, q] }
    after:  parallel (q / 16, ...) { for q % 16 { vector v } }
    """
    found = [i for n in nests for b, i, _ in indices(n) if b is not None]
    side = next((a for i in found if (a := along(i, vector, axes)) is not None), None)
    if side is None or any(n.kept or n.reduced for n in nests):
        return axes, nests, {}
    if _shared(nests):  # a loop around each would leave the others its last number only
        nests = (Nest((), (), tuple(s for n in nests for s in (*n.body, *n.after))),)
    if isinstance(side.extent, int) and side.extent <= 2 * TURN:
        inner, outer, position, clips = side, None, access.of(side), {}
    else:
        inner, outer = Axis(side.name, TURN), Axis(side.name + "b", dims.ceil_div(side.extent, TURN))
        position, clips = access.index(0, (outer, TURN), (inner, 1)), {inner: Clip(TURN, outer, side.extent)}
    rewriter = Rewriter(lambda _, i: i.substitute({side: position}))
    moved = tuple(replace(rewriter.nest(n, {}), kept=(inner,)) for n in nests)
    rest = tuple(x for a in axes if (x := outer if a is side else a) is not None)
    return rest, moved, clips


@dataclass(frozen=True, eq=False)
class Block:
    """A phase whose tasks are blocks of lanes: transposes, the nests with their lanes' loop around each, transposes."""

    axes: tuple[Axis, ...]
    before: tuple[Transpose, ...]
    nests: tuple[Nest, ...]
    after: tuple[Transpose, ...]
    tiles: tuple[Buffer, ...]
    lanes: Axis
    clip: Clip | None
    clips: Mapping[Axis, Clip]
    points: int
    by_row: bool  # whether nests go through rows with all lanes of a block, rather than with lane after lane


def cut(
    axes: tuple[Axis, ...], vector: Axis, nests: tuple[Nest, ...], clips: Mapping[Axis, Clip], plain: int, large: int,
    staged: bool = True,
) -> Block:  # fmt: skip
    """All nests for blocks of `vector`. `plain`: lanes of a block in which nothing else is looped over; `large`: bytes
    from which a buffer is not read twice in an order that is not its own. Without `staged` (for ablation) nests read
    and store elements where they are."""
    whole = axes
    axes, nests, turned = _turn(axes, vector, nests) if staged else (axes, nests, {})
    blockwise = axes is not whole
    clips = {**clips, **turned}
    turned_any = any(_side(i, vector, n) is not None for n in nests for b, i, _ in indices(n) if b is not None)
    by_row = staged and not turned_any and all(n.folds for n in nests) and any(streams(n, vector, large) for n in nests)
    block = (TURNED if turned else FLAT) if blockwise else ROWS if any(n.kept or n.reduced for n in nests) else plain
    if by_row:
        block = _width(axes, vector, nests, large)
    lanes, outer, clip, start = Axis(vector.name, block), None, None, access.ZERO
    if isinstance(vector.extent, int) and vector.extent <= block:
        lanes, block = vector, vector.extent
    else:
        outer = Axis(vector.name + "b", dims.ceil_div(vector.extent, block))
        if not isinstance(vector.extent, int) or vector.extent % block:
            clip = Clip(block, outer, vector.extent)
        start = access.index(0, (outer, block))
    nests = spread(nests)
    tiles = _Tiles(vector, {vector: start}, lanes, clip, clips, block)
    stored = frozenset(b for n in nests for b, _, is_store in indices(n) if is_store and b is not None)
    read = frozenset(b for n in nests for b, _, is_store in indices(n) if not is_store and b is not None)
    if staged:
        nests = tuple(_Stage(tiles, n, stored, read).nest(n, {}) for n in nests)
    position = access.add(start, access.of(lanes))

    def change(buffer: Buffer | None, i: Index) -> Index:
        if buffer is None or buffer.space != "tile":
            return i.substitute({vector: position})
        return access.add(i.times(block), access.of(lanes))

    rewriter = Rewriter(change)
    nests = tuple(rewriter.nest(n, {}) for n in nests)
    wide = {t: Buffer(t.name, t.dtype, t.size * block, "tile") for t in tiles_of(nests)}
    retiler = Retiler(wide)
    before = tuple(replace(t, to=wide[t.to]) for t in tiles.before)
    after = tuple(replace(t, source=wide[t.source]) for t in tiles.after)
    rest = tuple(x for a in axes if (x := outer if a is vector else a) is not None)
    sides = [c.outer for c in turned.values()]  # the next task's lines are then those behind this one's
    rest = (*(a for a in rest if a not in sides), *sides)
    return Block(
        rest, before, tuple(retiler.nest(n, {}) for n in nests), after, tuple(wide.values()), lanes, clip, clips, block,
        by_row,
    )  # fmt: skip


def _width(axes: Sequence[Axis], vector: Axis, nests: Sequence[Nest], large: int) -> int:
    """Lanes of a block whose rows are streamed: as many as leave the tiles in half the cache, and tasks for all."""
    points = estimate(dims.product(a.extent for a in axes))
    per_lane = sum(estimate(t.size) * t.dtype.itemsize for t in tiles_of(nests)) + 1
    width = ROWS
    while 2 * width <= min(WIDE, estimate(vector.extent), points // ENOUGH) and 2 * width * per_lane <= 2 * large:
        width *= 2
    return width
