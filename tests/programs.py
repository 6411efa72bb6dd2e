"""Small random loop programs, valid by construction, with data to run them on.

A *dimension* is an index together with an extent below which it stays: an axis, or a block and what is inside it.
Buffers are made to measure: a read draws an index first, then the buffer gets the size that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from stitch import dims, dtypes
from stitch.access import Axis, Bound, Index, index
from stitch.codegen.loop_rules import check
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
    Phase,
    Position,
    Program,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
)
from stitch.dims import Dim
from stitch.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, INT8, INT32, INT64, UINT8, UINT16

COMPUTED = (FLOAT32, FLOAT64, INT64, INT32, INT8, UINT8, UINT16, BOOL)
WEIGHTED = (FLOAT32, FLOAT32, FLOAT32, FLOAT32, INT64, FLOAT64, INT32, UINT8, BOOL, INT8, UINT16)
EXTENTS = (0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 32, 33, 64, 67)
UNARY = {
    "f": ("neg", "abs", "floor", "ceil", "rint", "sign", "sqrt"),
    "f32": ("exp", "tanh", "erf", "sigmoid", "rsqrt"),
    "i": ("neg", "abs", "sign", "not"),
    "b": ("not",),
}
BINARY = {
    "f": ("add", "sub", "mul", "div", "max", "min", "fmod", "mod"),
    "i": ("add", "sub", "mul", "div", "mod", "fmod", "max", "min", "and", "or", "xor"),
    "b": ("and", "or", "xor", "max", "min"),
}
FOLDS = {"f": ("add", "mul", "max", "min"), "i": ("add", "mul", "max", "min"), "b": ("and", "or")}

Array = npt.NDArray[Any]


@dataclass(repr=False)
class Case:
    program: Program
    env: dict[str, int]
    arrays: dict[Buffer, Array]


@dataclass(frozen=True)
class Dimension:
    extent: Dim
    at: Index


@dataclass
class Scope:
    """What expressions may use at a point."""

    dimensions: list[Dimension]
    locals: list[Local] = field(default_factory=list)
    tiles: list[tuple[Buffer, Index]] = field(default_factory=list)
    pool: list[Expr] = field(default_factory=list)


def family(dtype: np.dtype) -> str:
    return "b" if dtype == BOOL else "f" if dtypes.is_float(dtype) else "i"


class Builder:
    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw
        self.inputs: list[Buffer] = []
        self.outputs: list[Buffer] = []
        self.tiles: list[Buffer] = []
        self.env = {"m": self.pick(0, 1, 2, 3), "n": self.pick(*EXTENTS)}
        self.count = 0

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def chance(self, percent: int) -> bool:
        return bool(self.draw(st.integers(0, 99)) < percent)

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def extent(self, small: bool = False) -> Dim:
        if small:
            chosen: Dim = self.pick(1, 2, 3, 5, dims.symbol("m"))
        else:
            chosen = dims.symbol("n") if self.chance(40) else self.pick(*EXTENTS)
        return chosen

    # ------------------------------------------------------------------ expressions

    def stored_dtype(self, dtype: np.dtype) -> np.dtype:
        stored: np.dtype = self.pick(FLOAT32, FLOAT32, FLOAT16, BFLOAT16) if dtype == FLOAT32 else dtype
        return stored

    def input(self, dtype: np.dtype, size: Dim) -> Buffer:
        self.inputs.append(Buffer(self.name("x"), dtype, size))
        return self.inputs[-1]

    def free_index(self, scope: Scope) -> tuple[Index, Dim]:
        """Any affine index, and a size that it stays below."""
        at, size = Index(), 1
        total: Dim = size
        for d in scope.dimensions:
            c = self.pick(0, 1, 1, 1, -1, 2, 3, dims.symbol("m"))
            if c == -1:
                at = _plus(at, d.at.times(-1)).plus(d.extent)
                total = total + d.extent
            else:
                at = _plus(at, d.at.times(c))
                total = total + c * d.extent
        extra = self.pick(0, 0, 1, 5)
        return at.plus(extra), total + extra

    def read(self, scope: Scope, dtype: np.dtype) -> Expr:
        gathered = [v for v in scope.locals if v.name.startswith("at")]
        at, size = self.free_index(scope)
        if gathered and self.chance(60):
            at, size = _plus(at, index(0, (self.pick(*gathered), 1))), size + 11
        return Read(self.input(self.stored_dtype(dtype), size), at)

    def guarded(self, scope: Scope, dtype: np.dtype) -> Expr:
        at = Index(self.pick(-4, -1, 0, 1, 3))
        for d in scope.dimensions:
            at = _plus(at, d.at.times(self.pick(0, 1, 1, -1, 2)))
        limit = self.pick(1, 4, 9, 20, dims.symbol("n") + 1)
        value: Expr = Read(self.input(self.stored_dtype(dtype), limit), at)
        if self.chance(40):
            value = self.combine(scope, dtype, [value, self.leaf(scope, dtype)])
        other = Literal(self.pick(0, 1), dtype)
        return Guarded((Bound(at, limit),), value, other)

    def leaf(self, scope: Scope, dtype: np.dtype) -> Expr:
        options: list[Expr] = [e for e in scope.pool if e.dtype == dtype]
        options += [Use(v) for v in scope.locals if v.dtype == dtype]
        options += [Read(b, i) for b, i in scope.tiles if dtypes.compute(b.dtype) == dtype]
        if options and self.chance(50):
            chosen: Expr = self.pick(*options)
            return chosen
        if dtype == INT64 and scope.dimensions and self.chance(30):
            return Position(self.free_index(scope)[0])
        if self.chance(15):
            return Literal(self.pick(0, 1, 2, 3), dtype)
        return self.read(scope, dtype)

    def combine(self, scope: Scope, dtype: np.dtype, args: list[Expr]) -> Expr:
        names = BINARY[family(dtype)] + (("shl", "shr") if dtype in dtypes.UNSIGNED else ())
        return Apply(self.pick(*names), (args[0], args[1]), dtype)

    def expr(self, scope: Scope, dtype: np.dtype, depth: int) -> Expr:
        if depth == 0 or self.chance(15):
            return self.leaf(scope, dtype)
        kind = family(dtype)
        choice = self.pick("binary", "binary", "unary", "where", "cast", "guarded", "compare", "multiply_add")
        result: Expr
        match choice:
            case "unary" if kind in UNARY:
                names = UNARY[kind] + (UNARY["f32"] if dtype == FLOAT32 else ())
                names = tuple(n for n in names if not (dtype in dtypes.UNSIGNED and n in ("neg", "abs")))
                result = Apply(self.pick(*names), (self.expr(scope, dtype, depth - 1),), dtype)
            case "where":
                c = self.expr(scope, BOOL, depth - 1)
                result = Apply("where", (c, *(self.expr(scope, dtype, depth - 1) for _ in "ab")), dtype)
            case "cast":
                other = self.pick(*COMPUTED)
                rounded = self.pick(None, FLOAT16, BFLOAT16) if dtype == FLOAT32 and other == FLOAT32 else None
                result = Apply("cast", (self.expr(scope, other, depth - 1),), dtype, rounded)
            case "guarded":
                result = self.guarded(scope, dtype)
            case "compare" if dtype == BOOL:
                other = self.pick(*WEIGHTED)
                args = tuple(self.expr(scope, other, depth - 1) for _ in "ab")
                result = Apply(self.pick("eq", "ne", "lt", "le"), args, BOOL)
            case "multiply_add" if kind == "f":
                product = Apply("mul", tuple(self.expr(scope, dtype, depth - 1) for _ in "ab"), dtype)
                args = (product, self.leaf(scope, dtype))
                result = Apply(self.pick("add", "sub"), args[:: self.pick(1, -1)], dtype)
            case _:
                result = self.combine(scope, dtype, [self.expr(scope, dtype, depth - 1) for _ in "ab"])
        scope.pool.append(result)
        return result

    # ------------------------------------------------------------------ statements

    def output(self, scope: Scope) -> Stmt:
        """A store to a new buffer, at an index that is different at every point."""
        at, stride = Index(), 1
        total: Dim = stride
        order = self.draw(st.permutations(scope.dimensions)) if self.chance(30) else scope.dimensions[::-1]
        for d in order:
            here = d.at
            if self.chance(15):
                here = here.times(-1).plus(d.extent - 1)
            at, total = _plus(at, here.times(total)), total * d.extent
        dtype = self.pick(*WEIGHTED)
        out = Buffer(self.name("y"), self.stored_dtype(dtype), total)
        self.outputs.append(out)
        return Store(out, at, self.expr(scope, dtype, 3))

    def gather_local(self, scope: Scope) -> Stmt:
        dtype = self.pick(INT64, INT64, INT32)
        local = Local(self.name("at"), dtype)
        value = Apply("mod", (self.read(scope, dtype), Literal(11, dtype)), dtype)
        scope.locals.append(local)
        return Define(local, value)

    def folds(self, scope: Scope) -> tuple[Fold, ...]:
        made = []
        for _ in range(self.pick(0, 1, 1, 2)):
            dtype = self.pick(*WEIGHTED)
            op = self.pick(*FOLDS[family(dtype)])
            value = self.expr(scope, dtype, 2)
            if dtype == FLOAT32 and op == "add" and self.chance(50):
                value = Apply("mul", (value, self.leaf(scope, dtype)), dtype)
            made.append(Fold(Local(self.name("f"), dtype), op, value))
        return tuple(made)

    def inner(self, scope: Scope) -> list[Stmt]:
        """The body of a vector loop."""
        body: list[Stmt] = []
        if self.chance(30):
            body.append(self.gather_local(scope))
        if self.chance(25):  # a serial loop inside, one accumulator for each lane
            axis = Axis(self.name("s"), self.pick(0, 1, 3, 4, 6, dims.symbol("m")))
            deeper = Scope([*scope.dimensions, Dimension(axis.extent, index(0, (axis, 1)))], [*scope.locals])
            folds = self.folds(deeper)
            body.append(Loop(axis, (), folds, unroll=self.pick(1, 1, 4, 6)))
            scope.locals += [f.local for f in folds]
        if self.chance(40):
            dtype = self.pick(*WEIGHTED)
            local = Local(self.name("d"), dtype)
            body.append(Define(local, self.expr(scope, dtype, 2)))
            scope.locals.append(local)
        return body

    def vector_loop(self, scope: Scope, extent: Dim, tiles: list[tuple[Buffer, Dim]], clip: Clip | None) -> Loop:
        """`tiles` are those of this extent that have been filled; new ones are added."""
        axis = Axis(self.name("v"), extent)
        at = index(0, (axis, 1))
        if clip is None:
            own = Dimension(extent, at)
            outer = scope.dimensions
        else:
            own = Dimension(clip.limit, index(0, (clip.outer, clip.block), (axis, 1)))
            outer = [d for d in scope.dimensions if d.at.coefficient(clip.outer) == 0]
        inside = Scope([*outer, own], [*scope.locals], [(b, at) for b, e in tiles if e is extent])
        body = self.inner(inside)
        if self.chance(50):
            dtype = self.pick(*WEIGHTED)
            tile = Buffer(self.name("t"), self.stored_dtype(dtype), extent, "tile")
            body.append(Store(tile, at, self.expr(inside, dtype, 2)))
            self.tiles.append(tile)
            tiles.append((tile, extent))
            inside.pool.clear()
        else:
            body.append(self.output(inside))
        folds = self.folds(inside)
        scope.locals += [f.local for f in folds]
        return Loop(axis, tuple(body), folds, "vector", clip, self.pick(1, 1, 2, 3, 4))

    def transpose(self, scope: Scope, clip: Clip | None) -> Stmt:
        """Of a part of a new buffer, into a part of another. A clip limits the rows."""
        dtype = self.pick(FLOAT32, FLOAT32, FLOAT16, UINT8, INT64, BOOL)
        rows, columns = Axis(self.name("r"), self.extent()), Axis(self.name("c"), self.extent())
        first, limit, outer = Index(), rows.extent, scope.dimensions
        if clip is not None:
            rows, first, limit = Axis(rows.name, clip.block), index(0, (clip.outer, clip.block)), clip.limit
            outer = [d for d in outer if d.at.coefficient(clip.outer) == 0]
        to_step, step = columns.extent + self.pick(0, 0, 3), limit + self.pick(0, 0, 5)
        to_index, at = first.times(to_step), first
        size, stored = step * columns.extent, to_step * limit
        for d in outer:
            to_index, stored = _plus(to_index, d.at.times(stored)), stored * d.extent
            if self.chance(70):
                at, size = _plus(at, d.at.times(size)), size * d.extent
        source = self.input(dtype, size)
        to = Buffer(self.name("y"), dtype, stored)
        self.outputs.append(to)
        return Transpose(to, to_index, to_step, source, at, step, rows, columns, clip)

    def phase(self) -> Phase:
        axes = [Axis(self.name("p"), self.extent(small=True)) for _ in range(self.pick(0, 1, 1, 2))]
        scope = Scope([Dimension(a.extent, index(0, (a, 1))) for a in axes])
        clip, extent = None, self.extent()
        if self.chance(30):
            block = self.pick(4, 16, 48)
            outer = Axis(self.name("o"), dims.ceil_div(extent, block))
            axes.append(outer)
            scope.dimensions.append(Dimension(outer.extent, index(0, (outer, 1))))
            clip, extent = Clip(block, outer, extent), block
        body: list[Stmt] = []
        around: Axis | None = None
        if self.chance(25):
            around = Axis(self.name("q"), self.pick(0, 1, 2, 5, 9, dims.symbol("m")))
            scope.dimensions.append(Dimension(around.extent, index(0, (around, 1))))
        tiles: list[tuple[Buffer, Dim]] = []
        for _ in range(self.pick(1, 2, 3)):
            body.append(self.vector_loop(scope, extent, tiles, clip))
        if self.chance(25):
            body.insert(self.pick(0, len(body)), self.transpose(scope, clip))
        if self.chance(50):
            body.append(self.output(scope))
        if around is not None:
            body = [Loop(around, tuple(body), unroll=self.pick(1, 2, 4))]
        return Phase(tuple(axes), tuple(body))


def _plus(a: Index, b: Index) -> Index:
    return index(a.offset + b.offset, *a.terms, *b.terms)


def data(dtype: np.dtype, size: int, rng: np.random.Generator) -> Array:
    """Numbers of all kinds, with a few special ones among them."""
    if dtype == BOOL:
        return rng.integers(0, 2, size).astype(bool)
    if not dtypes.is_float(dtype):
        info = np.iinfo(dtype)
        small = rng.integers(max(-9, info.min), 9, size).astype(dtype)
        wild = np.array([info.min, info.max, 0, 1], dtype)[rng.integers(0, 4, size)]
        return np.where(rng.random(size) < 0.1, wild, small)
    usual = (rng.standard_normal(size) * 3).astype(np.float64)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-41, 3e38, 0.5])[rng.integers(0, 8, size)]
    with np.errstate(all="ignore"):
        return np.where(rng.random(size) < 0.04, special, usual).astype(dtype)


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    b = Builder(draw)
    phases = []
    for _ in range(b.pick(1, 1, 2)):
        phases.append(b.phase())
    buffers = (*b.inputs, *b.outputs)
    program = Program("random", buffers, tuple(b.tiles), tuple(phases), ("m", "n"))
    check(program)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    arrays = {x: data(x.dtype, dims.evaluate(x.size, b.env), rng) for x in b.inputs}
    arrays |= {x: np.zeros(dims.evaluate(x.size, b.env), x.dtype) for x in b.outputs}
    return Case(program, b.env, arrays)
