"""Contractions as loops: register tiles over rows and columns, panels of the second operand, and the epilogue.

    parallel (batch, other columns, column panel, other rows, row tile)
      [ panel[k, lane] := b              packed here, unless b is constant (packed once) or readable in place ]
      tile[rows, lanes] := a . panel     the micro-kernel, over at most three loops of k
      for row, lane of the tile: epilogue, stores

A panel holds, for NR neighbouring columns, all of k: NR contiguous elements for each k. With b packed at run time, the
row tiles of a panel are a loop inside its task instead of tasks of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stitch import access, dims, dtypes
from stitch.access import Axis, Bound, Index
from stitch.codegen.constants import Panels
from stitch.codegen.contract import ALIAS, WAYS, efficiency, main_tiles
from stitch.codegen.loops import Buffer, Clip, Contract, ContractLoop, Expr, Guarded, Loop, Phase, Read, Stmt, Store
from stitch.codegen.lower import Names, Nest, Rewriter, indices, literal, nests
from stitch.codegen.mapping import CHUNK, joinable, loops
from stitch.dims import Dim
from stitch.graph import Value
from stitch.stitching import schedule
from stitch.stitching.schemes import estimate
from stitch.target import Target


@dataclass
class _Roles:
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    summed: tuple[Axis, ...]
    a: Index
    b: Index
    nest: Nest


def phase(names: Names, part: schedule.Phase, target: Target) -> tuple[Phase, tuple[Buffer, ...], dict[Buffer, Panels]]:
    """The loops of a contraction's phase, its tiles, and the packed constants that it reads."""
    heavy = part.contraction
    assert heavy is not None
    dtype = heavy.node.output.dtype
    result = Buffer("acc", dtype, 1, "tile")
    names.results[heavy.node.output] = lambda at: Read(result, Index())
    (nest,) = nests(names, part)
    roles = _merge(_Roles(heavy.batch, heavy.rows, heavy.columns, heavy.summed, heavy.a.offset, heavy.b.offset, nest))
    column = _contiguous(roles) or Axis("n", 1)
    row = max(reversed(roles.rows), key=lambda x: _height(x, roles.a.coefficient(x)), default=Axis("m", 1))
    height, vectors = choose(row.extent, column.extent, roles.a.coefficient(row), target, dtype)
    width = vectors * target.lanes(dtype)
    panel, tile = Axis("no", dims.ceil_div(column.extent, width)), Axis("mo", dims.ceil_div(row.extent, height))
    i, j = Axis("i", height if tile.extent != 1 else row.extent), Axis("j", width)
    place = {column: access.index(0, (panel, width), (j, 1)), row: access.index(0, (tile, height), (i, 1))}
    if panel.extent == 1:
        place[column] = access.of(j)
    if tile.extent == 1:
        place[row] = access.of(i)
    corner = {
        column: access.index(0, (panel, width)) if panel.extent != 1 else access.ZERO,
        row: access.index(0, (tile, height)) if tile.extent != 1 else access.ZERO,
    }
    acc = Buffer("acc", dtype, height * width, "tile")
    tiles, packed = [acc], {}
    others = tuple(x for x in roles.columns if x is not column)
    summed = _ordered(roles)
    before: tuple[Stmt, ...] = ()
    inside = False
    panels = _constant_panels(names, heavy.b.value, roles, column, others, summed, width)
    if panels is not None:
        source = Buffer("w", dtype, panels.size)
        packed[source] = panels
        b_index, b_strides = _panel_index(roles, others, panel, summed, width)
    elif roles.b.coefficient(column) == 1 and isinstance(column.extent, int) and column.extent % width == 0:
        source = names.buffer(heavy.b.value)
        b_index, b_strides = roles.b.substitute(corner), tuple(roles.b.coefficient(k) for k in summed)
        b_index = Index(b_index.offset, tuple(t for t in b_index.terms if t[0] not in summed))
    else:
        source = Buffer("p", dtype, dims.product(k.extent for k in summed) * width, "tile")
        tiles.append(source)
        b_strides = tuple(s * width for s in access.strides([k.extent for k in summed]))
        taken = names.buffer(heavy.b.value)
        before = _pack(taken, source, roles.b.substitute(place), summed, b_strides, j, column, place)
        b_index, inside = Index(), True
    a_index = roles.a.substitute(corner)
    a_index = Index(a_index.offset, tuple(t for t in a_index.terms if t[0] not in summed))
    rows_clip = _clip(height, tile, row.extent)
    contract = Contract(
        acc, height if tile.extent != 1 else int(estimate(row.extent)), vectors, names.buffer(heavy.a.value), a_index,
        roles.a.coefficient(row), source, b_index,
        tuple(ContractLoop(k.extent, roles.a.coefficient(k), s) for k, s in zip(summed, b_strides, strict=True))
        or (ContractLoop(1, 0, 0),),
        rows_clip,
    )  # fmt: skip
    epilogue = _epilogue(roles.nest, result, acc, place, i, j, width)
    clips = {x: c for x, c in ((i, rows_clip), (j, _clip(width, panel, column.extent))) if c is not None}
    j_extent = column.extent if panel.extent == 1 else width
    if j_extent != width:
        short = Axis("j", j_extent)
        epilogue = Rewriter(lambda _, x: x.substitute({j: access.of(short)})).nest(epilogue, {j: short})
        j = short
    body: tuple[Stmt, ...] = (contract, *loops(epilogue, j, clips, times=vectors))
    high = [x for x in roles.rows if x is not row]
    depth = dims.product(k.extent for k in summed)
    weights = estimate(depth * column.extent) * dtype.itemsize
    if inside:
        body = (*before, Loop(tile, body)) if tile.extent != 1 else (*before, *body)
        parallel = [*roles.batch, *others, panel, *high]
    elif weights <= target.l2_bytes // 2:
        parallel = [*roles.batch, *others, *high, tile, panel]  # all panels stay in L2 while a passes once
    else:
        lines = estimate(dims.product(x.extent for x in high))
        a_bytes = lines * estimate(row.extent * depth) * dtype.itemsize
        again = a_bytes * estimate(panel.extent) if a_bytes > target.l2_bytes else 0
        first = [panel, *high] if again <= weights * lines else [*high, panel]  # what is read again costs least
        parallel = [*roles.batch, *others, *first, tile]
    flops = depth * (height * vectors)
    work = flops * (tile.extent if inside else 1) // 2 + 64
    tasks = tuple(x for x in parallel if x.extent != 1)
    return Phase(tasks, body, dims.ceil_div(CHUNK, work)), tuple(tiles), packed


def choose(rows: Dim, columns: Dim, row_stride: Dim, target: Target, dtype: np.dtype) -> tuple[int, int]:
    """The register tile (rows, vectors) of least cost for these extents; symbols count as estimates.

    `row_stride`: elements between rows of a; tiles higher than L1 is associative suffer where that is a multiple of
    4 KB."""
    m, n = max(estimate(rows), 1), max(estimate(columns), 1)
    lanes = target.lanes(dtype)
    aliased = isinstance(row_stride, int) and row_stride and row_stride * dtype.itemsize % ALIAS == 0

    def price(shape: tuple[int, int]) -> tuple[float, int]:
        height, vectors = shape
        panels = -(-n // (vectors * lanes)) * vectors
        full, rest = divmod(m, height)
        total = full * height / efficiency(target, dtype, height, vectors)
        while rest:
            height = height // 2
            total += rest // height * height / efficiency(target, dtype, height, vectors)
            rest %= height
        return total * panels * (4 / 3 if aliased and shape[0] > WAYS else 1), panels

    shapes = {(h, v) for t in main_tiles(target, dtype) for h in range(1, t[0] + 1) for v in range(1, t[1] + 1)}
    known = isinstance(rows, int)
    usual = [s for s in sorted(shapes, reverse=True) if not known or s[0] <= m]
    return min(usual, key=price) if usual else (1, 1)


# ------------------------------------------------------------------ axes


def _merge(r: _Roles) -> _Roles:
    """Joins axes of one role where every index allows it."""
    while True:
        inner = [i for _, i, _ in indices(r.nest)]
        sides: list[tuple[str, list[Index]]] = [
            ("batch", [r.a, r.b, *inner]), ("rows", [r.a, *inner]), ("columns", [r.b, *inner]), ("summed", [r.a, r.b]),
        ]  # fmt: skip
        for name, found in sides:
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


def _height(row: Axis, stride: Dim) -> tuple[bool, int]:
    """Order of preference for the rows of a tile: a number that fills one, before a symbol, which may be 1; then rows
    that lie close to each other."""
    return isinstance(row.extent, int) and row.extent >= 4, -estimate(stride)


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
    source: Buffer, target: Buffer, at: Index, summed: Sequence[Axis], strides: Sequence[Dim], lane: Axis,
    column: Axis, place: dict[Axis, Index],
) -> tuple[Stmt, ...]:  # fmt: skip
    """panel[k, lane] := b[k, column], zero beyond the last column."""
    fresh = {k: Axis(k.name, k.extent) for k in summed}
    j = Axis("j", lane.extent)
    rename = {**{k: access.of(v) for k, v in fresh.items()}, lane: access.of(j)}
    value: Any = Read(source, at.substitute(rename))
    if not isinstance(column.extent, int) or column.extent % int(estimate(lane.extent)) != 0:
        bound = Bound(place[column].substitute(rename), column.extent)
        value = Guarded((bound,), value, literal(0, dtypes.compute(source.dtype)))
    index = access.index(0, *((fresh[k], s) for k, s in zip(summed, strides, strict=True) if k.extent != 1), (j, 1))
    nest = Nest((*fresh.values(), j), (), (Store(target, index, value),))
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
