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
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal as Choice

import numpy as np

from stitch import dims, dtypes
from stitch.access import ZERO, Axis, Bound, Index, Variable, index
from stitch.dims import Dim
from stitch.ops.primitives import PRIMITIVES

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

    def check(self) -> None:
        """Raises AssertionError if the program breaks a rule above that can be seen without running it."""
        for phase in self.phases:
            _check_body(phase.body, set(phase.axes), set(), set(self.buffers) | set(self.tiles), vector=False)


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


def _check_clip(clip: Clip | Gate | None, axes: set[Axis]) -> None:
    match clip:
        case Clip():
            assert clip.outer in axes, "a clip by an axis that is not around it"
        case Gate():
            used = {v for b in clip.bounds for v, _ in b.index.terms}
            assert used <= axes, "a gate by what is not an axis around it"


def _check_body(body: tuple[Stmt, ...], axes: set[Axis], known: set[Local], buffers: set[Buffer], vector: bool) -> None:
    known = set(known)
    seen: set[int] = set()
    for s in body:
        match s:
            case Loop():
                assert s.axis not in axes, f"axis {s.axis.name} is looped over twice"
                assert not (vector and s.mode == "vector"), "a vector loop inside a vector loop"
                _check_clip(s.clip, axes)
                inner = axes | {s.axis}
                _check_body(s.body, inner, known, buffers, vector or s.mode == "vector")
                there = known | {d.local for d in s.body if isinstance(d, Define)}
                there |= {f.local for d in s.body if isinstance(d, Loop) for f in d.folds}
                for f in s.folds:
                    _check_expr(f.value, inner, there, buffers, set())
                    assert f.local.dtype == f.value.dtype, f"fold {f.local.name}: {f.local.dtype} of {f.value.dtype}"
                known |= {f.local for f in s.folds}
            case Define():
                _check_expr(s.value, axes, known, buffers, seen)
                assert s.local.dtype == s.value.dtype, f"{s.local.name}: {s.local.dtype} of {s.value.dtype}"
                known.add(s.local)
            case Store():
                assert s.buffer in buffers, f"{s.buffer.name} is not the program's"
                _check_index(s.index, axes, known)
                _check_expr(s.value, axes, known, buffers, seen)
                assert s.value.dtype == dtypes.compute(s.buffer.dtype), f"{s.buffer.name}: store of {s.value.dtype}"
            case Contract():
                assert not vector, "a contraction inside a vector loop"
                assert s.tile.space in ("tile", "block")
                assert 1 <= len(s.loops) <= 3
                assert {s.a, s.b, s.tile} <= set(buffers)
                _check_index(s.a_index, axes, known)
                _check_index(s.tile_index, axes, known)
                _check_index(s.b_index, axes, known)
            case Transpose():
                assert not vector, "a transpose inside a vector loop"
                assert {s.to, s.source} <= set(buffers)
                assert s.to is not s.source, f"{s.to.name} is transposed into itself"
                assert s.to.dtype == s.source.dtype, f"{s.to.name}: transpose of {s.source.dtype}"
                assert all(c is None or c.outer in axes for c in (s.row_clip, s.column_clip)), "a clip by another axis"
                _check_index(s.to_index, axes, known)
                _check_index(s.index, axes, known)
            case Prefetch():
                assert s.buffer in buffers, f"{s.buffer.name} is not the program's"
                _check_index(s.index, axes, known)


def _check_index(i: Index, axes: set[Axis], known: set[Local]) -> None:
    for v, _ in i.terms:
        assert v in axes or v in known, f"index uses {v.name}, which is not in scope"
        assert isinstance(v, Axis) or (isinstance(v, Local) and dtypes.is_integer(v.dtype)), f"index by {v.name}"


def _check_expr(e: Expr, axes: set[Axis], known: set[Local], buffers: set[Buffer], seen: set[int]) -> None:
    """Expressions shared within a body are looked at once."""
    if id(e) in seen:
        return
    seen.add(id(e))
    match e:
        case Read():
            assert e.buffer in buffers, f"{e.buffer.name} is not the program's"
            _check_index(e.index, axes, known)
        case Use():
            assert e.local in known, f"{e.local.name} is used before it is defined"
        case Position():
            _check_index(e.index, axes, known)
        case Guarded():
            for b in e.bounds:
                _check_index(b.index, axes, known)
            assert e.otherwise.dtype == e.value.dtype
        case Apply():
            assert PRIMITIVES[e.prim].kind == "elementwise", e.prim
        case Lookup():
            assert len(e.table) == 256
            assert e.dtype.itemsize == e.at.dtype.itemsize == 1, f"a table of {e.dtype} by {e.at.dtype}"
    for c in children(e):
        _check_expr(c, axes, known, buffers, seen)


# ------------------------------------------------------------------ text


def render(program: Program) -> str:
    """The stable text form. Names are made unique in order of appearance."""
    printer = _Printer(_shared(program))
    head = ", ".join(f"{printer.name(b)}: {b.dtype.name}[{b.size}]" for b in program.buffers)
    lines = [f"program {program.name}({head})"]
    lines += [f"  tile {printer.name(b)}: {b.dtype.name}[{b.size}]" for b in program.tiles]
    for phase in program.phases:
        axes = ", ".join(f"{printer.name(a)} < {a.extent}" for a in phase.axes)
        lines.append(f"  parallel ({axes}) grain {phase.grain}")
        lines += printer.body(phase.body, 2)
    return "\n".join(lines) + "\n"


LONG = 160
"""Characters from which an expression is not written out a second time: shared ones would grow without end."""


def _shared(program: Program) -> set[int]:
    seen: set[int] = set()
    again: set[int] = set()
    stack = [e for p in program.phases for s in walk(p.body) for e in expressions(s)]
    while stack:
        e = stack.pop()
        if id(e) in seen:
            again.add(id(e))
        else:
            seen.add(id(e))
            stack.extend(children(e))
    return again


class _Printer:
    def __init__(self, shared: set[int]) -> None:
        self.names: dict[object, str] = {}
        self.used: dict[str, int] = {}
        self.written: dict[int, str] = {}
        self.shared = shared  # ids of expressions that occur more than once

    def name(self, x: Variable | Buffer) -> str:
        if x not in self.names:
            n = self.used.get(x.name, 0)
            self.used[x.name] = n + 1
            self.names[x] = x.name if n == 0 else f"{x.name}'{n}"
        return self.names[x]

    def body(self, body: tuple[Stmt, ...], depth: int) -> list[str]:
        lines: list[str] = []
        pad = "  " * depth
        for s in body:
            match s:
                case Loop():
                    word = "vector" if s.mode == "vector" else "for"
                    times = f" x{s.unroll}" if s.unroll > 1 else ""
                    lines.append(f"{pad}{word}{times} {self.name(s.axis)} < {self.extent(s.axis, s.clip)}")
                    lines += self.body(s.body, depth + 1)
                    for f in s.folds:
                        lines.append(f"{pad}  {self.name(f.local)} {f.op}= {self.expr(f.value)}")
                case Define():
                    lines.append(f"{pad}{self.name(s.local)} = {self.expr(s.value)}")
                case Store():
                    lines.append(f"{pad}{self.name(s.buffer)}[{self.index(s.index)}] := {self.expr(s.value)}")
                case Contract():
                    loops = ", ".join(f"{k.extent}:{k.a_stride}:{k.b_stride}" for k in s.loops)
                    lines.append(
                        f"{pad}{self.name(s.tile)}[{self.corner(s)}{s.rows}, {s.vectors}*W] := "
                        f"{self.name(s.a)}[{self.index(s.a_index)} + {s.a_row}*row] . "
                        f"{self.name(s.b)}[{self.index(s.b_index)} + lane] over {loops}"
                    )
                case Transpose():
                    sizes = f"{self.extent(s.rows, s.row_clip)}, {self.extent(s.columns, s.column_clip)}"
                    lines.append(
                        f"{pad}{self.name(s.to)}[{self.index(s.to_index)} + {s.to_step}*row + column] := "
                        f"{self.name(s.source)}[{self.index(s.index)} + {s.step}*column + row] over {sizes}"
                    )
                case Prefetch():
                    lines.append(f"{pad}prefetch {self.name(s.buffer)}[{self.index(s.index)}]")
        return lines

    def corner(self, s: Contract) -> str:
        return "" if s.tile_row is None else f"{self.index(s.tile_index)} + {s.tile_row}*row; "

    def extent(self, axis: Axis, clip: Clip | Gate | None) -> str:
        match clip:
            case Clip():
                return f"min({clip.block}, {clip.limit} - {clip.block}*{self.name(clip.outer)})"
            case Gate():
                tests = ", ".join(f"0 <= {self.index(b.index)} < {b.limit}" for b in clip.bounds)
                return f"{axis.extent} {'unless' if clip.without else 'if'} {tests}"
            case _:
                return f"{axis.extent}"

    def index(self, i: Index) -> str:
        parts = [f"{self.name(v)}" if c == 1 else f"({c})*{self.name(v)}" for v, c in i.terms]
        if i.offset != 0 or not parts:
            parts.append(str(i.offset))
        return " + ".join(parts)

    def expr(self, e: Expr) -> str:
        """A long expression that comes again is written once, with a number by which it goes from then on."""
        if id(e) in self.written:
            return self.written[id(e)]
        text = self._expr(e)
        if id(e) in self.shared and len(text) > LONG:
            self.written[id(e)] = f"#{len(self.written)}"
            return f"{text} as #{len(self.written) - 1}"
        return text

    def _expr(self, e: Expr) -> str:
        match e:
            case Literal():
                return f"{e.value}"
            case Read():
                return f"{self.name(e.buffer)}[{self.index(e.index)}]"
            case Use():
                return self.name(e.local)
            case Position():
                return f"<{self.index(e.index)}>"
            case Apply():
                kind = f".{(e.rounded or e.dtype).name}" if e.prim in ("cast", "bitcast") else ""
                kind += "" if e.most is None else f".at_most_{e.most:g}"
                return f"{e.prim}{kind}({', '.join(self.expr(a) for a in e.args)})"
            case Lookup():
                return f"{e.dtype.name}[{bytes(e.table).hex()}][{self.expr(e.at)}]"
            case Guarded():
                bounds = ", ".join(f"0 <= {self.index(b.index)} < {b.limit}" for b in e.bounds)
                return f"({self.expr(e.value)} if {bounds} else {e.otherwise.value})"
