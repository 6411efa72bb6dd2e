"""The loop IR: what a stitched kernel does, as nested loops over named axes.

Grammar
-------
    Program  = program NAME (Buffer*) { Phase* }           a kernel; phases run in order, with a barrier between
    Phase    = parallel (Axis*) { Stmt* }                  every point of the axes' product is a task, in any order
    Stmt     = Loop(axis, body, folds, mode, clip)         for axis in [0, extent)
             | Define(local, value)                        names a value for what follows in the same body
             | Store(buffer, index, value)
             | Contract(...)                               a register tile of a contraction, into a tile buffer
             | Transpose(...)                              a block of one buffer, with its axes swapped, into another
             | Prefetch(buffer, index)                      says what will soon be read
    Fold     = local := op(local, value)                   after each iteration of a Loop's body; `local` afterwards
    Expr     = Literal | Read(buffer, index) | Use(local) | Position(index) | Apply(prim, args) | Guarded(...)
             | Lookup(table, value)                        an element of 256, by the bits of a value of 8
    Index    = offset + Σ coefficient · (axis | local)     in elements; coefficients and offsets are Dims
    Clip     = the loop runs over min(block, limit − block · outer) iterations instead of its axis' extent
    Gate     = the loop runs only where 0 <= index < limit for all bounds, or (`without`) only where not

Semantics
---------
* Scalars: every expression denotes one number at one point of the enclosing axes. `Apply` is the primitive of that
  name on scalars (`stitch.ops.primitives`); `Read` gives the element in its computation type (float16 and bfloat16
  read as float32) and `Store` rounds to the buffer's type. A bool occupies one byte in memory.
* `Guarded(bounds, value, otherwise)` is `value` where 0 <= index < limit for every bound, and otherwise `otherwise`;
  `value` is not evaluated elsewhere (its reads may be out of range there).
* A Loop of mode `vector` means the same as a serial one, and asserts that its iterations may run side by side: no
  iteration reads what another stores, and inside it only `folds` carry values from one to the next. Its folds are
  reassociated in an order fixed by its extent, the target's lanes W and `unroll` U: element i of the first
  U·W·(n // (U·W)) goes to accumulator (i mod U·W); later elements to accumulator (i mod W); accumulators are combined
  as a binary tree over U, then by halves over the W lanes. A vector loop may hold serial loops (whose folds are then
  one accumulator per lane), never another vector loop.
* A float sum in a loop, serial or one accumulator of the U·W, is made of blocks of as many terms as `sums.block_of`
  says, which are added one after the other; the elements after the first U·W·(n // (U·W)) go on from there. So is that
  of a `Contract`, in the blocks of `sums.runs`.
* `tile` buffers belong to the worker: they are undefined at the start of a task and must be stored before being read.
  `global` buffers are shared: a phase stores each element at most once, and reads none that it stores at other points.
* `Contract` sets tile[tile_index + i·tile_row + j] for i < rows, j < width to Σ over its loops of a[i, k] · b[k, j];
  `clip` limits the rows that exist. Rows beyond it are left undefined. (width = vectors · W, W being the lanes of the
  tile's dtype on the target; tile_row is the width if it is not given.)
* `Transpose` is a store of to[to_index + i·to_step + j] for each i < rows and j < columns, of the bits that are in
  source[index + j·step + i]. `rows` and `columns` are only numbers here: their axes are in scope nowhere.
* `Prefetch` changes nothing, and its index may be outside of the buffer. In a vector loop the elements of neighbouring
  iterations are adjacent, or the same.

Names are objects, not strings: two axes called `i` are different axes.

`loop_rules` checks what can be seen of all this without running a program, `loop_text` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal as Choice

import numpy as np

from stitch import dims, dtypes
from stitch.access import ZERO, Axis, Bound, Index, Variable, index
from stitch.dims import Dim

__all__ = ["Axis", "Bound", "Index", "index"]  # of stitch.access, and part of the grammar

# ------------------------------------------------------------------ names


@dataclass(frozen=True, eq=False)
class Local(Variable):
    """A value defined once per iteration (`Define`) or by a loop (`Fold`); `dtype` is a computation type."""

    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class Buffer:
    """Linear memory of `size` elements. `global`: a parameter of the kernel; `tile`: the worker's scratch; `block`: as
    `tile`, where several nests rely on the order of its elements."""

    name: str
    dtype: np.dtype
    size: Dim
    space: Choice["global", "tile", "block"] = "global"


# ------------------------------------------------------------------ expressions


@dataclass(frozen=True, eq=False)
class Literal:
    value: float | int | bool
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class Read:
    buffer: Buffer
    index: Index

    @property
    def dtype(self) -> np.dtype:
        return dtypes.compute(self.buffer.dtype)


@dataclass(frozen=True, eq=False)
class Use:
    local: Local

    @property
    def dtype(self) -> np.dtype:
        return self.local.dtype


@dataclass(frozen=True, eq=False)
class Position:
    """The value of an index as an int64: iota, and anything affine in the axes."""

    index: Index

    @property
    def dtype(self) -> np.dtype:
        return dtypes.INT64


@dataclass(frozen=True, eq=False)
class Apply:
    """An elementwise primitive; `dtype` is the result's computation type. A shared object is computed once.

    `rounded` names the storage type whose precision a `cast` rounds to (float32 -> float16 -> float32), if any. `most`:
    what the result is known not to be above, unless it is NaN."""

    prim: str
    args: tuple[Expr, ...]
    dtype: np.dtype
    rounded: np.dtype | None = None
    most: float | None = None


@dataclass(frozen=True, eq=False)
class Guarded:
    bounds: tuple[Bound, ...]
    value: Expr
    otherwise: Literal

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype


@dataclass(frozen=True, eq=False)
class Lookup:
    """The number of 8 bits, of type `dtype`, whose bits are in `table` at the bits of `at`, which has 8 too."""

    table: tuple[int, ...]
    at: Expr
    dtype: np.dtype


Expr = Literal | Read | Use | Position | Apply | Guarded | Lookup

# ------------------------------------------------------------------ statements

Mode = Choice["serial", "vector"]


@dataclass(frozen=True)
class Clip:
    """min(block, limit − block · outer) iterations."""

    block: int
    outer: Axis
    limit: Dim


@dataclass(frozen=True)
class Gate:
    """All iterations or none. The bounds' axes are around the loop."""

    bounds: tuple[Bound, ...]
    without: bool = False


@dataclass(frozen=True)
class Fold:
    """`local` starts at the operator's identity: 0 for add, 1 for mul, the lowest or highest value for max and min
    (NaN wins both, as in the primitives), all or none for and, or."""

    local: Local
    op: Choice["add", "mul", "max", "min", "and", "or"]
    value: Expr


@dataclass(frozen=True)
class Loop:
    axis: Axis
    body: tuple[Stmt, ...]
    folds: tuple[Fold, ...] = ()
    mode: Mode = "serial"
    clip: Clip | Gate | None = None
    unroll: int = 1  # vector: vectors per step; serial: iterations per step (only a hint)


@dataclass(frozen=True)
class Define:
    local: Local
    value: Expr


@dataclass(frozen=True)
class Store:
    buffer: Buffer
    index: Index
    value: Expr


@dataclass(frozen=True)
class ContractLoop:
    """One summed axis: its extent and the strides, in elements, by which it moves in a and b."""

    extent: Dim
    a_stride: Dim
    b_stride: Dim


@dataclass(frozen=True)
class Contract:
    """tile[rows, vectors · W] (+)= a · b; see Semantics. `loops` is outermost first and has one to three entries."""

    tile: Buffer
    rows: int
    vectors: int
    a: Buffer
    a_index: Index  # of row 0 at k = 0
    a_row: Dim  # elements from one row to the next
    b: Buffer
    b_index: Index  # of lane 0 at k = 0; lanes are adjacent
    loops: tuple[ContractLoop, ...]
    clip: Clip | None = None  # the rows that exist: min(clip.block, clip.limit − clip.block · outer); block == rows
    tile_index: Index = ZERO  # of row 0 and lane 0 in the tile
    tile_row: Dim | None = None  # elements from one row of the tile to the next, if not the width
    ahead: bool = False  # a hint: the rows of `a` behind these will soon be read


@dataclass(frozen=True)
class Transpose:
    """to[to_index + i·to_step + j] := source[index + j·step + i] for i < rows, j < columns: elements adjacent in the
    source along i become adjacent along j. Both buffers have one dtype; elements are copied as they are stored."""

    to: Buffer
    to_index: Index
    to_step: Dim  # elements from one i to the next in `to`
    source: Buffer
    index: Index
    step: Dim  # elements from one j to the next in `source`
    rows: Axis
    columns: Axis
    row_clip: Clip | None = None
    column_clip: Clip | None = None


@dataclass(frozen=True)
class Prefetch:
    """A hint that buffer[index] will soon be read: so soon that it may be in the first cache until then, if `near`."""

    buffer: Buffer
    index: Index
    near: bool = False


Stmt = Loop | Define | Store | Contract | Transpose | Prefetch

# ------------------------------------------------------------------ programs


@dataclass(frozen=True)
class Phase:
    """Tasks: the row-major product of the axes' extents. `grain`: tasks below which more workers do not pay."""

    axes: tuple[Axis, ...]
    body: tuple[Stmt, ...]
    grain: Dim = 1

    @property
    def tasks(self) -> Dim:
        return dims.product(a.extent for a in self.axes)


@dataclass(frozen=True)
class Program:
    """`symbols` are the symbols that extents and indices use, in the order in which the kernel receives them."""

    name: str
    buffers: tuple[Buffer, ...]  # global ones, in the order of the kernel's parameters
    tiles: tuple[Buffer, ...]
    phases: tuple[Phase, ...]
    symbols: tuple[str, ...] = field(default=())


# ------------------------------------------------------------------ walks


def walk(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """All statements, outer before inner."""
    for s in body:
        yield s
        if isinstance(s, Loop):
            yield from walk(s.body)


def children(e: Expr) -> tuple[Expr, ...]:
    match e:
        case Apply():
            return e.args
        case Guarded():
            return (e.value, e.otherwise)
        case Lookup():
            return (e.at,)
        case _:
            return ()


def expressions(s: Stmt) -> tuple[Expr, ...]:
    """The expressions that a statement evaluates itself."""
    match s:
        case Loop():
            return tuple(f.value for f in s.folds)
        case Define() | Store():
            return (s.value,)
        case Contract() | Transpose() | Prefetch():
            return ()
