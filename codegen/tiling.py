"""Contractions as loops: register tiles over rows and columns, panels of the second operand, and the epilogue.

    parallel (batch, other columns, column panel, other rows, row tile)
      [ panel[k, lane] := b              packed here, unless b is constant (packed once) or readable in place ]
      tile[rows, lanes] := a . panel     the micro-kernel, over at most three loops of k
      for row, lane of the tile: epilogue, stores

A panel holds, for NR neighbouring columns, all of k: NR contiguous elements for each k. With b packed at run time, the
row tiles of a panel are a loop inside its task instead of tasks of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from stitch import access, dims, dtypes
from stitch.access import Axis, Bound, Index
from stitch.codegen.constants import Panels
from stitch.codegen.contract import ALIAS, LINE, WAYS, efficiency, main_tiles
from stitch.codegen.loops import (
    Buffer,
    Clip,
    Contract,
    ContractLoop,
    Expr,
    Guarded,
    Loop,
    Phase,
    Read,
    Stmt,
    Store,
    Transpose,
)
from stitch.codegen.lower import Names, Nest, Rewriter, indices, literal, nests
from stitch.codegen.mapping import CHUNK, joinable, loops
from stitch.dims import Dim
from stitch.graph import Value
from stitch.stitching import schedule
from stitch.stitching.schemes import estimate
from stitch.target import Target

OFTEN, MOST = 96, 512
"""Rows from which a second operand that could be read where it is may be packed: a copy takes as long as some 4 rows,
and reading in order saves a twentieth. An open number of rows can be one; so there are at most so many elements for
each."""


TALL = 6
"""Rows of a tile from which its multiply-adds take so long that asking for the next rows costs nothing."""


@dataclass
class _Roles:
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    summed: tuple[Axis, ...]
    a: Index
    b: Index
    nest: Nest


@dataclass(frozen=True)
class Inside:
    """A contraction inside a task: its statements, the tiles and packed constants that these use, and panels that have
    to be there before, with what is to be done for them."""

    body: tuple[Stmt, ...]
    tiles: tuple[Buffer, ...]
    packed: Mapping[Buffer, Panels]
    before: tuple[tuple[Buffer, Value, Phase], ...] = ()


@dataclass(frozen=True)
class _Panel:
    """The second operand of a tile: where its panel is, its strides along what is summed, and what puts it there."""

    source: Buffer
    at: Index
    strides: tuple[Dim, ...]
    before: tuple[Stmt, ...] = ()


class Tiling:
    """One contraction cut into register tiles: what its loops are made of.

    `inside` a task, axes that other phases go over too stay as they are. `rows`: for the rows of a block, which are one
    tile: how many, and how many of them exist."""

    def __init__(
        self,
        names: Names,
        part: schedule.Phase,
        target: Target,
        inside: bool = False,
        rows: tuple[int, Clip | None] | None = None,
    ) -> None:
        heavy = part.contraction
        assert heavy is not None
        self.names, self.value, self.dtype = names, heavy.b.value, heavy.node.output.dtype
        self.result = Buffer("acc", self.dtype, 1, "tile")
        names.results[heavy.node.output] = lambda at: Read(self.result, Index())
        (nest,) = nests(names, part)
        del names.results[heavy.node.output]  # the tile is there for this phase only
        self.a, a = names.operand(heavy.a)
        roles = _Roles(heavy.batch, heavy.rows, heavy.columns, heavy.summed, a, heavy.b.offset, nest)
        self.roles = roles = _merge(roles, SIDES[2:] if inside else SIDES)
        self.column = column = _contiguous(roles) or Axis("n", 1)
        by = partial(_height, roles.a, roles.summed)
        self.row = row = max(reversed(roles.rows), key=by, default=Axis("m", 1))
        step, heights = roles.a.coefficient(row), None if rows is None else (rows[0],)
        self.height, self.vectors = choose(row.extent, column.extent, step, target, self.dtype, heights)
        self.width = self.vectors * target.lanes(self.dtype)
        self.panel = Axis("no", dims.ceil_div(column.extent, self.width))
        self.tile = Axis("mo", dims.ceil_div(row.extent, self.height) if rows is None else 1)
        self.i = Axis("i", self.height if self.tile.extent != 1 else row.extent)
        self.row_clip = _clip(self.height, self.tile, row.extent) if rows is None else rows[1]
        self.others = tuple(x for x in roles.columns if x is not column)
        self.summed = _ordered(roles)
        self.acc = Buffer("acc", self.dtype, self.height * self.width, "tile")
        self.tiles, self.packed = [self.acc], dict[Buffer, Panels]()
        self.before: list[tuple[Buffer, Value, Phase]] = []

    @property
    def first(self) -> Index:
        """The first column of a panel."""
        return access.index(0, (self.panel, self.width)) if self.panel.extent != 1 else access.ZERO

    @property
    def is_contiguous(self) -> bool:
        return self.roles.b.coefficient(self.column) == 1

    # -------------------------------------------------- the second operand

    def constant(self) -> _Panel | None:
        """Packed once, at compile time."""
        r = self.roles
        panels = _constant_panels(self.names, self.value, r, self.column, self.others, self.summed, self.width)
        if panels is None:
            return None
        source = Buffer("w", self.dtype, panels.size)
        self.packed[source] = panels
        return _Panel(source, *_panel_index(r, self.others, self.panel, self.summed, self.width))

    def in_place(self) -> _Panel:
        """Read where it is: all lanes of the panel exist, and are contiguous."""
        at = self._start(self.roles.b.substitute({self.column: self.first}))
        return _Panel(self.names.buffer(self.value), at, tuple(self.roles.b.coefficient(k) for k in self.summed))

    def packed_here(self, first: Index) -> _Panel:
        """The panel from a column on, packed by the task, with zeros beyond the last column."""
        source = Buffer("p", self.dtype, dims.product(k.extent for k in self.summed) * self.width, "tile")
        self.tiles.append(source)
        strides = tuple(s * self.width for s in access.strides([k.extent for k in self.summed]))
        j = Axis("j", self.width)
        place = {self.column: access.add(first, access.of(j))}
        at = self.roles.b.substitute(place)
        taken = self.names.buffer(self.value)
        body = _pack(taken, source, access.ZERO, at, self.summed, strides, j, self.column, place)
        return _Panel(source, Index(), strides, body)

    def packed_before(self) -> _Panel:
        """All panels, packed by a phase before. What is beyond the last column is zero, or anything."""
        r, source = self.roles, self.names.buffer(self.value)
        used = tuple(x for x in (*r.batch, *self.others) if r.b.coefficient(x) != 0)
        panels = Value("panels", self.dtype, (*(x.extent for x in (*used, self.panel, *self.summed)), self.width))
        buffer = Buffer("p", self.dtype, panels.size)
        at, strides = _panel_index(r, self.others, self.panel, self.summed, self.width)
        clip = _clip(self.width, self.panel, self.column.extent)
        lane, along = Axis("j", self.width), next((k for k in self.summed if r.b.coefficient(k) == 1), None)
        place = {self.column: access.add(self.first, access.of(lane))}
        body: tuple[Stmt, ...]
        if along is None or self.is_contiguous or source.dtype != self.dtype:
            body = _pack(source, buffer, at, r.b.substitute(place), self.summed, strides, lane, self.column, place)
        else:
            rest = {k: s for k, s in zip(self.summed, strides, strict=True) if k is not along}
            to, first = access.add(at, access.index(0, *rest.items())), r.b.substitute({self.column: self.first})
            taken = Index(first.offset, tuple(t for t in first.terms if t[0] is not along))
            step = dict(zip(self.summed, strides, strict=True))[along]
            rows = Axis(along.name, along.extent)
            body = (Transpose(buffer, to, step, source, taken, r.b.coefficient(self.column), rows, lane, None, clip),)
            for k in rest:
                body = (Loop(k, body),)
        parallel = tuple(x for x in (*used, self.panel) if x.extent != 1)
        grain = dims.ceil_div(CHUNK, dims.product(k.extent for k in self.summed) * self.width // 8 + 1)
        self.before.append((buffer, panels, Phase(parallel, body, grain)))
        return _Panel(buffer, at, strides)

    def is_far(self, rows: Dim, target: Target) -> bool:
        """Whether the second operand is too large to be read well where it is, and multiplied by so many rows that a
        copy pays, even if an open number of them is 1."""
        size = dims.product(x.extent for x in (*self.roles.columns, *self.summed))
        if not isinstance(rows, int):
            return dims.prove_le(size, rows * MOST) is True
        return rows >= OFTEN and estimate(size) * self.dtype.itemsize > target.l2_bytes // 8

    def _is_next_close(self) -> bool:
        """Whether the rows of the next tile can be asked for during this one: by a line for each step of a run."""
        step, line = self.roles.a.coefficient(self.row), LINE // self.dtype.itemsize
        run = self.summed[-1].extent if self.summed else 1
        return self.tile.extent != 1 and self.height >= TALL and dims.prove_le(step * self.height, run * line) is True

    def _start(self, index: Index) -> Index:
        """An index at the beginning of what is summed."""
        return Index(index.offset, tuple(t for t in index.terms if t[0] not in self.summed))

    # -------------------------------------------------- a tile

    @cached_property
    def block(self) -> Store | None:
        """The only store of the epilogue, if it puts results as they are into rows of a block."""
        match self.roles.nest:
            case Nest(body=(Store(buffer, index, Read(source)) as s,), folds=(), after=()):
                plain = source is self.result and buffer.space == "block" and buffer.dtype == self.dtype
                return s if plain and index.coefficient(self.column) == 1 else None
        return None

    def body(self, panel: _Panel, first: Index, columns: Clip | None) -> tuple[Stmt, ...]:
        """The micro-kernel, and the epilogue. `first`: the panel's first column; `columns`: how many there are."""
        corner = access.index(0, (self.tile, self.height)) if self.tile.extent != 1 else access.ZERO
        a, row = self.roles.a, self.row
        ks = zip(self.summed, panel.strides, strict=True)
        contract = Contract(
            self.acc, self.height if row.extent != 1 else 1, self.vectors,
            self.a, self._start(a.substitute({row: corner})), a.coefficient(row), panel.source, panel.at,
            tuple(ContractLoop(k.extent, a.coefficient(k), s) for k, s in ks) or (ContractLoop(1, 0, 0),),
            self.row_clip, ahead=self._is_next_close(),
        )  # fmt: skip
        if self.block is not None and columns is None and self.panel.extent != 1:
            to, step = self.block.index.substitute({row: corner, self.column: first}), self.block.index.coefficient(row)
            return (replace(contract, tile=self.block.buffer, tile_index=to, tile_row=step),)
        # A single panel is as wide as the matrix: the epilogue may stop there without a clip.
        single = self.panel.extent == 1 and dims.prove_le(self.column.extent, self.width) is True
        j = Axis("j", self.column.extent if single else self.width)
        place = {row: access.add(corner, access.of(self.i)), self.column: access.add(first, access.of(j))}
        epilogue = _epilogue(self.roles.nest, self.result, self.acc, place, self.i, j, self.width)
        clips = {x: c for x, c in ((self.i, self.row_clip), (j, columns)) if c is not None}
        return (contract, *loops(epilogue, j, clips, times=self.vectors))


def phase(names: Names, part: schedule.Phase, target: Target) -> tuple[Phase, tuple[Buffer, ...], dict[Buffer, Panels]]:
    """The loops of a contraction's phase, its tiles, and the packed constants that it reads."""
    t = Tiling(names, part, target)
    roles, column, panel, tile = t.roles, t.column, t.panel, t.tile
    given = t.constant()
    if given is None:
        even = t.is_contiguous and isinstance(column.extent, int) and column.extent % t.width == 0
        given = t.in_place() if even else t.packed_here(t.first)
    body = t.body(given, t.first, _clip(t.width, panel, column.extent))
    high = [x for x in roles.rows if x is not t.row]
    depth = dims.product(k.extent for k in t.summed)
    weights = estimate(depth * column.extent) * t.dtype.itemsize
    every = dims.product(x.extent for x in (*roles.batch, *t.others))
    within = all(estimate(roles.a.coefficient(x)) < estimate(roles.a.coefficient(t.row)) for x in roles.batch)
    if given.before:
        body = (*given.before, *_looped(tile, body))
        parallel = [*roles.batch, *t.others, panel, *high]
    elif t.packed and within and weights * estimate(every) <= target.l2_bytes // 2:
        parallel = [*high, tile, *roles.batch, *t.others, panel]  # a in its own order: the panels of all groups stay
    elif weights <= target.l2_bytes // 2:
        parallel = [*roles.batch, *t.others, *high, tile, panel]  # all panels stay in L2 while a passes once
    else:
        # An open number of rows may be one, as in decoding: then weights read for each of `high` would be all there is
        # to do, while operands of many rows read again are hidden behind their multiplications.
        rows = t.row.extent if isinstance(t.row.extent, int) else 1
        lines = estimate(dims.product(x.extent for x in high))
        a_bytes = lines * estimate(rows * depth) * t.dtype.itemsize
        again = a_bytes * estimate(panel.extent) if a_bytes > target.l2_bytes else 0
        first = [panel, *high] if again <= weights * lines else [*high, panel]  # what is read again costs least
        parallel = [*roles.batch, *t.others, *first, tile]
    work = depth * (t.height * t.vectors) * (tile.extent if given.before else 1) // 2 + 64
    tasks = tuple(x for x in parallel if x.extent != 1)
    return Phase(tasks, body, dims.ceil_div(CHUNK, work)), tuple(t.tiles), t.packed


def block(
    names: Names, part: schedule.Phase, target: Target, rows: tuple[int, Clip | None] | None, among: Dim = 1
) -> Inside:
    """All columns of some rows inside a task: loops over panels and, if these rows are not one tile, over tiles.
    `among`: how many rows all tasks together take at a point of the batch axes."""
    t = Tiling(names, part, target, True, rows)
    extent = t.column.extent

    def tiles(panel: _Panel, first: Index, columns: Clip | None) -> tuple[Stmt, ...]:
        return _looped(t.tile, t.body(panel, first, columns))

    given = t.constant()
    if given is None and (not t.is_contiguous or t.is_far(among, target)):
        given = t.packed_before()
    if (isinstance(extent, int) and extent % t.width == 0) or (given is not None and t.block is None):
        body = _looped(t.panel, tiles(given or t.in_place(), t.first, _clip(t.width, t.panel, extent)))
    else:  # a panel that is not full needs a tile, and is packed here, if the operand is read in place
        full, panel = extent // t.width, t.panel
        short = Axis("ns", dims.ceil_div(extent, t.width) - full)
        first = Index(full * t.width)
        last = t.packed_here(first) if given is None else replace(given, at=given.at.substitute({panel: Index(full)}))
        rest = tiles(last, first, Clip(t.width, short, extent - full * t.width))
        t.panel = Axis("no", full)
        given = t.in_place() if given is None else replace(given, at=given.at.substitute({panel: access.of(t.panel)}))
        body = (*_looped(t.panel, tiles(given, t.first, None)), Loop(short, (*last.before, *rest)))
    for x in reversed(t.others):
        body = _looped(x, body)
    return Inside(body, tuple(t.tiles), t.packed, tuple(t.before))


def _looped(axis: Axis, body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
    return body if axis.extent == 1 else (Loop(axis, body),)


def choose(
    rows: Dim, columns: Dim, row_stride: Dim, target: Target, dtype: np.dtype, heights: Sequence[int] | None = None
) -> tuple[int, int]:
    """The register tile (rows, vectors) of least cost for these extents; symbols count as estimates.

    `row_stride`: elements between rows of a; tiles higher than L1 is associative suffer where that is a multiple of
    4 KB. `heights`: the numbers of rows to choose from, if not all."""
    shapes = {(h, v) for t in main_tiles(target, dtype) for h in range(1, t[0] + 1) for v in range(1, t[1] + 1)}
    usual = [
        s for s in sorted(shapes, reverse=True)
        if (not isinstance(rows, int) or s[0] <= max(rows, 1)) and (not heights or s[0] in heights)
    ]  # fmt: skip
    return min(usual, key=lambda s: price(s, rows, columns, row_stride, target, dtype), default=(1, 1))


def price(
    shape: tuple[int, int], rows: Dim, columns: Dim, row_stride: Dim, target: Target, dtype: np.dtype
) -> tuple[float, int]:
    """What a register tile costs for these extents, in vectors of results at the peak, and the vectors of a row."""
    m, n = max(estimate(rows), 1), max(estimate(columns), 1)
    aliased = isinstance(row_stride, int) and row_stride and row_stride * dtype.itemsize % ALIAS == 0
    height, vectors = shape
    panels = -(-n // (vectors * target.lanes(dtype))) * vectors
    full, rest = divmod(m, height)
    total = full * height / efficiency(target, dtype, height, vectors)
    while rest:
        height = height // 2
        total += rest // height * height / efficiency(target, dtype, height, vectors)
        rest %= height
    return total * panels * (4 / 3 if aliased and shape[0] > WAYS else 1), panels


# ------------------------------------------------------------------ axes


SIDES = ("batch", "rows", "columns", "summed")


def _merge(r: _Roles, merged: Sequence[str]) -> _Roles:
    """Joins axes of one role where every index allows it."""
    while True:
        inner = [i for _, i, _ in indices(r.nest)]
        sides: list[tuple[str, list[Index]]] = [
            ("batch", [r.a, r.b, *inner]), ("rows", [r.a, *inner]), ("columns", [r.b, *inner]), ("summed", [r.a, r.b]),
        ]  # fmt: skip
        for name, found in [side for side in sides if side[0] in merged]:
            axes: tuple[Axis, ...] = getattr(r, name)
            pair = next(((x, y) for y in axes for x in axes if x is not y and joinable(x, y, found)), None)
            if pair is not None:
                break
        else:
            return r
        outer, last = pair
        joined = Axis(last.name, outer.extent * last.extent)

        def change(_: Buffer | None, i: Index, outer: Axis = outer, last: Axis = last, joined: Axis = joined) -> Index:
            return Index(i.offset, tuple((joined if v is last else v, c) for v, c in i.terms if v is not outer))

        nest = Rewriter(change).nest(r.nest, {outer: None, last: joined})
        axes = tuple(joined if x is last else x for x in axes if x is not outer)
        r = replace(r, nest=nest, a=change(None, r.a), b=change(None, r.b), **{name: axes})


def _contiguous(r: _Roles) -> Axis | None:
    """The column axis along which results are stored contiguously; the last one if there is none."""
    for s in r.nest.body:
        if isinstance(s, Store):
            for x in r.columns:
                if s.index.coefficient(x) == 1:
                    return x
    return r.columns[-1] if r.columns else None


def _ordered(r: _Roles) -> tuple[Axis, ...]:
    """Summed axes, the one that is contiguous in a innermost."""
    rest = [k for k in r.summed if r.a.coefficient(k) != 1]
    return (*rest, *(k for k in r.summed if r.a.coefficient(k) == 1))


def _height(a: Index, summed: Sequence[Axis], row: Axis) -> tuple[bool, bool, int]:
    """Order of preference for the rows of a tile: a number that fills one, before a symbol, which may be 1; of symbols
    those whose rows overlap, since a window moves over images or signals, which are long, and not over a batch; then
    rows that lie close to each other."""
    step = a.coefficient(row)
    moves = [(dims.quotient(step, a.coefficient(k)), k.extent) for k in summed if a.coefficient(k) != 0]
    slides = any(isinstance(q, int) and isinstance(n, int) and 1 <= q < n for q, n in moves)
    fills = isinstance(row.extent, int) and row.extent >= 4
    return fills, slides and not fills, -estimate(step)


def _clip(block: int, outer: Axis, limit: Dim) -> Clip | None:
    if outer.extent == 1 or (isinstance(limit, int) and limit % block == 0):
        return None
    return Clip(block, outer, limit)


# ------------------------------------------------------------------ the second operand


def _constant_panels(
    names: Names, value: Value, r: _Roles, column: Axis, others: Sequence[Axis], summed: Sequence[Axis], width: int
) -> Panels | None:
    node = names.flow.producer.get(value)
    if node is None or node.prim != "const":
        return None
    used = [x for x in (*r.batch, *others) if r.b.coefficient(x) != 0]

    def pairs(axes: Sequence[Axis]) -> tuple[tuple[int, int], ...] | None:
        out = [(x.extent, r.b.coefficient(x)) for x in axes]
        fixed = tuple((n, s) for n, s in out if isinstance(n, int) and isinstance(s, int))
        return fixed if len(fixed) == len(out) else None

    lead, ks, lane = pairs(used), pairs(summed), pairs([column])
    if lead is None or ks is None or lane is None or not isinstance(r.b.offset, int):
        return None
    return Panels(value, r.b.offset, lead, ks, lane[0], width)


def _panel_index(
    r: _Roles, others: Sequence[Axis], panel: Axis, summed: Sequence[Axis], width: int
) -> tuple[Index, tuple[Dim, ...]]:
    used = [x for x in (*r.batch, *others) if r.b.coefficient(x) != 0]
    shape = [*(x.extent for x in used), panel.extent, *(k.extent for k in summed), width]
    steps = access.strides(shape)
    at = access.index(0, *((x, s) for x, s in zip((*used, panel), steps, strict=False) if x.extent != 1))
    return at, steps[len(used) + 1 : -1]


def _pack(
    source: Buffer, target: Buffer, to: Index, at: Index, summed: Sequence[Axis], strides: Sequence[Dim], lane: Axis,
    column: Axis, place: dict[Axis, Index],
) -> tuple[Stmt, ...]:  # fmt: skip
    """The panel from `to` on: panel[k, lane] := b[k, column], zero beyond the last column."""
    fresh = {k: Axis(k.name, k.extent) for k in summed}
    j = Axis("j", lane.extent)
    rename = {**{k: access.of(v) for k, v in fresh.items()}, lane: access.of(j)}
    value: Any = Read(source, at.substitute(rename))
    if not isinstance(column.extent, int) or column.extent % int(estimate(lane.extent)) != 0:
        bound = Bound(place[column].substitute(rename), column.extent)
        value = Guarded((bound,), value, literal(0, dtypes.compute(source.dtype)))
    index = access.index(0, *((fresh[k], s) for k, s in zip(summed, strides, strict=True) if k.extent != 1), (j, 1))
    nest = Nest((*fresh.values(), j), (), (Store(target, access.add(to, index), value),))
    return loops(nest, j, times=1)


def _epilogue(nest: Nest, old: Buffer, acc: Buffer, place: dict[Axis, Index], i: Axis, j: Axis, width: int) -> Nest:
    """The epilogue on the register tile: rows and columns become positions in it."""

    def change(buffer: Buffer | None, index: Index) -> Index:
        return access.index(0, (i, width), (j, 1)) if buffer is old else index.substitute(place)

    moved = Rewriter(change).nest(nest, {})

    class Exchange(Rewriter):
        def _expr(self, e: Expr) -> Expr:
            return Read(acc, e.index) if isinstance(e, Read) and e.buffer is old else super()._expr(e)

    return replace(Exchange(lambda _, x: x).nest(moved, {}), kept=(i, j), reduced=())
