"""A chain as one phase: each task takes a block of rows through contractions and what is beside them.

    parallel (batch, block of rows)
      for panel: tile[rows, lanes] := a . panel;  block[rows, columns] := epilogue      the first contraction
      for row of the block: memory-bound work on the row, in tiles and registers        what is between
      for panel: tile[rows, lanes] := block . panel;  stores                            the second contraction

A block has as many rows as a register tile of all contractions, so that each panel is read once for each block. With
14 rows two blocks of float32 stay in an L2 of 1 MB up to some 9,000 columns; longer ones go through the next cache. A
chain without an axis to cut takes all rows of a point at once, in several register tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from stitch import access, dims
from stitch.access import Axis
from stitch.codegen import mapping, tiling
from stitch.codegen.constants import Constant
from stitch.codegen.contract import main_tiles
from stitch.codegen.loops import Buffer, Clip, Loop, Phase, Stmt
from stitch.codegen.lower import Names, nests
from stitch.codegen.lower import tiles_of as tiles_in
from stitch.codegen.peeling import inside, peeled
from stitch.codegen.splitting import Work
from stitch.dims import Dim
from stitch.graph import Value
from stitch.stitching import schedule
from stitch.stitching.schemes import estimate
from stitch.target import Target

MANY = 1024
"""Rows that an open number of rows is taken to be: what matters is the time of many."""


@dataclass
class Made:
    """The phases of a chain, its tiles, the constants that it reads in an order of its own, and the panels that some
    phases pack for the last."""

    phases: list[Phase] = field(default_factory=list)
    tiles: list[Buffer] = field(default_factory=list)
    packed: dict[Buffer, Constant] = field(default_factory=dict)
    panels: dict[Buffer, Value] = field(default_factory=dict)

    def take(self, part: tiling.Inside) -> tuple[Stmt, ...]:
        """The statements of a contraction; the rest of it is put where it belongs."""
        self.tiles += part.tiles
        self.packed |= part.packed
        for buffer, value, packing in part.before:
            self.panels[buffer] = value
            self.phases.append(packing)
        return part.body


def phases(names: Names, target: Target) -> Made:
    """The loops of a chain: one phase, after those that pack panels for it."""
    chain = names.kernel.chain
    assert chain is not None
    made = Made()
    made.phases.append(_all_rows(names, target, made) if chain.row is None else _some_rows(names, target, made))
    made.tiles = list(dict.fromkeys([*made.tiles, *(t.buffer for t in names.tiles.values())]))
    return made


def _some_rows(names: Names, target: Target, made: Made) -> Phase:
    """A register tile of rows at a time."""
    kernel, chain = names.kernel, names.kernel.chain
    assert chain is not None
    assert chain.row is not None
    extent = chain.row.extent
    rows = height(kernel, extent, target)
    outer, inner = Axis("qo", dims.ceil_div(extent, rows)), Axis("q", rows)
    moved = {chain.row: access.add(access.of(outer).times(rows), access.of(inner))}
    exact = outer.extent == 1 or (isinstance(extent, int) and extent % rows == 0)
    clip = None if exact else Clip(rows, outer, extent)
    axes = (*chain.batch, outer) if outer.extent != 1 else chain.batch
    names.block = axes
    body: list[Stmt] = []
    for given in kernel.phases:
        part = given.substitute(moved)
        if part.contraction is not None:
            here = schedule.Phase(axes, part.groups, _in_block(part.contraction, axes, inner))
            body += made.take(tiling.block(names, here, target, (rows, clip), extent))
        else:
            work = nests(names, part)
            stmts, relaid = mapping.by_row(work, target, names.constants())
            made.packed |= relaid
            made.tiles += tiles_in(work)
            body += stmts if inner.extent == 1 else inside(Loop(inner, stmts, (), "serial", clip), axes)
    return Phase(axes, tuple(body), _grain(kernel, rows))


def _all_rows(names: Names, target: Target, made: Made) -> Phase:
    """All rows at a point of the batch axes: the phases as they would be mapped by themselves, their tasks as loops."""
    kernel, chain = names.kernel, names.kernel.chain
    assert chain is not None
    names.block = chain.batch
    body: list[Stmt] = []
    rows: Dim = 1
    for part in kernel.phases:
        if part.contraction is not None:
            rows = dims.product(x.extent for x in part.contraction.rows)
            body += made.take(tiling.block(names, part, target, None))
        else:
            inner = tuple(a for a in part.parallel if a not in chain.batch)
            loops, own, relaid = mapping.phase(Work(inner, tuple(nests(names, part))), target, names.constants())
            made.packed |= relaid
            made.tiles += own
            loops = peeled(replace(loops, axes=(*chain.batch, *loops.axes)), loops.axes)
            stmts = loops.body
            for a in reversed(loops.axes[len(chain.batch) :]):
                stmts = (Loop(a, stmts),)
            body += stmts
    return Phase(chain.batch, tuple(body), _grain(kernel, rows))


def _in_block(heavy: schedule.Contraction, axes: tuple[Axis, ...], inner: Axis) -> schedule.Contraction:
    return replace(heavy, batch=axes, rows=(inner,) if inner.extent != 1 else ())


def height(kernel: schedule.Kernel, extent: Dim, target: Target) -> int:
    """Rows of a block: the height of a register tile that serves all contractions of the chain best."""
    heavy = [p.contraction for p in kernel.phases if p.contraction is not None]
    dtype = heavy[0].node.output.dtype
    tiles = main_tiles(target, dtype)
    most = max(h for h, _ in tiles)
    if isinstance(extent, int):
        most = min(most, max(extent, 1))

    def cost(rows: int) -> float:
        columns = [dims.product(x.extent for x in c.columns) for c in heavy]
        shapes = [(rows, v) for h, w in tiles if h >= rows for v in range(1, w + 1)]
        return sum(
            estimate(dims.product(x.extent for x in c.summed))
            * min(tiling.price(s, extent, n, 0, target, dtype)[0] for s in shapes)
            for c, n in zip(heavy, columns, strict=True)
        )

    return min(range(most, 0, -1), key=cost)


def _grain(kernel: schedule.Kernel, rows: Dim) -> Dim:
    """Tasks that make up a chunk."""
    total: Dim = 64
    for p in kernel.phases:
        if p.contraction is not None:
            total = total + dims.product(x.extent for x in (*p.contraction.columns, *p.contraction.summed)) * rows
    return dims.ceil_div(mapping.CHUNK * 32, total)
