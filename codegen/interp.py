"""The loop IR executed by numpy: what a program means, without a compiler.

It follows `loops` to the letter, and is strict where generated code just goes wrong: an index out of range, a tile read
before it is stored, or a global element stored twice in a phase raises `Fault`. A vector loop is done all at once, in
arrays with an element for each of its iterations; its folds have the order that the target's lanes give them. Float32
functions are the library's, so that results are the compiled code's bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from stitch import dims, dtypes
from stitch.access import Bound, Index
from stitch.codegen.bits import NumpyBuilder, evaluate
from stitch.codegen.emit_rules import identity, lanes_of, multiply_add
from stitch.codegen.loops import (
    Apply,
    Axis,
    Buffer,
    Clip,
    Contract,
    Define,
    Expr,
    Fold,
    Gate,
    Guarded,
    Literal,
    Local,
    Lookup,
    Loop,
    Phase,
    Position,
    Prefetch,
    Program,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
)
from stitch.codegen.mathlib import FUNCTIONS
from stitch.codegen.sums import block_of, is_blocked, runs
from stitch.dims import Dim
from stitch.ops.primitives import PRIMITIVES
from stitch.target import Target

Array = npt.NDArray[Any]


class Fault(Exception):
    """The program does something that it must not."""


def run(program: Program, arrays: Mapping[Buffer, Array], env: Mapping[str, int], target: Target) -> None:
    """Runs a program on flat arrays, one for each global buffer, in place."""
    machine = _Machine(program, arrays, env, target)
    with np.errstate(all="ignore"):
        for phase in program.phases:
            machine.run_phase(phase)


class _Machine:
    """Values are arrays of shape (1,), or in a vector loop also of shape (iterations,)."""

    def __init__(
        self, program: Program, arrays: Mapping[Buffer, Array], env: Mapping[str, int], target: Target
    ) -> None:
        self.program, self.env, self.target = program, env, target
        self.memory: dict[Buffer, Array] = dict(arrays)
        self.stored: dict[Buffer, npt.NDArray[np.bool_]] = {}
        self.places: dict[Axis, Array] = {}
        self.locals: dict[Local, Array] = {}
        self.memo: dict[Expr, Array] = {}
        self.active = np.ones(1, bool)  # where a guarded value is wanted
        self.lanes = 1
        for b in program.buffers:
            size = self.dim(b.size)
            if arrays[b].shape != (size,) or arrays[b].dtype != b.dtype:
                raise Fault(f"{b.name} is {b.dtype}[{size}], not {arrays[b].dtype}{list(arrays[b].shape)}")

    def dim(self, d: Dim) -> int:
        return dims.evaluate(d, self.env)

    def run_phase(self, phase: Phase) -> None:
        for b in self.program.buffers:
            self.stored[b] = np.zeros(self.memory[b].shape, bool)
        for point in self.points(phase):
            for tile in self.program.tiles:
                size = self.dim(tile.size)
                self.memory[tile] = np.zeros(size, tile.dtype)
                self.stored[tile] = np.zeros(size, bool)
            self.places = {a: np.array([p]) for a, p in zip(phase.axes, point, strict=True)}
            self.body(phase.body)

    def points(self, phase: Phase) -> Iterable[tuple[int, ...]]:
        """The tasks, in an order that nobody may rely on."""
        return itertools.product(*(range(self.dim(a.extent)) for a in phase.axes))

    # ------------------------------------------------------------------ statements

    def body(self, body: tuple[Stmt, ...]) -> None:
        for s in body:
            match s:
                case Define():
                    self.locals[s.local] = self.value(s.value)
                case Store():
                    self.store(s)
                case Loop(mode="vector"):
                    self.vector_loop(s)
                case Loop():
                    self.serial_loop(s)
                case Contract():
                    self.contract(s)
                case Transpose():
                    self.transpose(s)
                case Prefetch():
                    pass

    def trips(self, axis: Axis, clip: Clip | Gate | None) -> int:
        if clip is None:
            return self.dim(axis.extent)
        if isinstance(clip, Gate):
            return self.dim(axis.extent) if bool(self.within(clip.bounds).all()) != clip.without else 0
        return min(clip.block, self.dim(clip.limit) - clip.block * int(self.places[clip.outer][0]))

    def store(self, s: Store) -> None:
        at = np.broadcast_to(self.index(s.index), (self.lanes,))
        self.put(s.buffer, at, np.broadcast_to(self.value(s.value), (self.lanes,)))

    def put(self, buffer: Buffer, at: Array, value: Array) -> None:
        memory, stored = self.memory[buffer], self.stored[buffer]
        if at.size and (at.min() < 0 or at.max() >= memory.size):
            raise Fault(f"a store to {buffer.name}[{at.min()}..{at.max()}] of {memory.size}")
        if np.unique(at).size != at.size or (buffer.space == "global" and stored[at].any()):
            raise Fault(f"an element of {buffer.name} is stored twice")
        memory[at] = value.astype(buffer.dtype)
        stored[at] = True

    def serial_loop(self, s: Loop) -> None:
        trips = max(0, self.trips(s.axis, s.clip))
        sums = [_Sum(f, self.lanes, trips) for f in s.folds]
        for k in range(trips):
            self.places[s.axis] = np.array([k])
            self.body(s.body)
            terms = [self.terms(f) for f in s.folds]
            for f, total, v in zip(s.folds, sums, terms, strict=True):
                total.put(self.combined(f, total.block, v))
        for f, total in zip(s.folds, sums, strict=True):
            self.locals[f.local] = total.all()

    def vector_loop(self, s: Loop) -> None:
        n = max(0, self.trips(s.axis, s.clip))
        self.places[s.axis] = np.arange(n)
        self.lanes = n
        self.body(s.body)
        terms = [[np.broadcast_to(t, (n,)) for t in self.terms(f)] for f in s.folds]
        self.lanes = 1
        del self.places[s.axis]
        for f, v in zip(s.folds, terms, strict=True):
            self.locals[f.local] = self.reduced(f, v, n, lanes_of(s, self.target), s.unroll)

    def reduced(self, f: Fold, terms: list[Array], n: int, width: int, unroll: int) -> Array:
        block = width * unroll
        main = n - n % block
        wide = _Sum(f, block, main // block)
        for i in range(0, main, block):
            wide.put(self.combined(f, wide.block, [t[i : i + block] for t in terms]))
        rows = list(wide.all().reshape(unroll, width))
        for i in range(main, n, width):
            k = min(width, n - i)
            new = self.combined(f, rows[0][:k], [t[i : i + k] for t in terms])
            rows[0] = np.concatenate([new, rows[0][k:]])
        while len(rows) > 1:
            pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]
            rows = [apply(f.op, (p[0], p[1]), f.local.dtype) if len(p) == 2 else p[0] for p in pairs]
        total = rows[0]
        while total.size > 1:
            half = total.size // 2
            total = apply(f.op, (total[:half], total[half:]), f.local.dtype)
        return total

    def terms(self, f: Fold) -> list[Array]:
        """What is folded: a value, or the factors of a product that is added in one rounding."""
        self.memo.clear()
        product = multiply_add(f.op, (Literal(0, f.local.dtype), f.value))
        return [self.evaluated(e) for e in (product[:2] if product else (f.value,))]

    def combined(self, f: Fold, total: Array, terms: Sequence[Array]) -> Array:
        if len(terms) == 2:
            return self.multiply_add(terms[0], terms[1], total)
        return apply(f.op, (total, terms[0]), f.local.dtype)

    def contract(self, s: Contract) -> None:
        width = s.vectors * self.target.lanes(s.tile.dtype)
        rows = self.trips(Axis("rows", s.rows), s.clip)
        a0, b0 = int(self.index(s.a_index)[0]), int(self.index(s.b_index)[0])
        i, j = np.arange(max(rows, 0))[:, None], np.arange(width)[None, :]
        zero = np.zeros((len(i), width), s.tile.dtype)
        blocks, block = [], zero
        for place, run, full in runs([self.dim(k.extent) for k in s.loops]):
            for last in run:
                point = (*place, last)
                a_at = a0 + sum(p * self.dim(k.a_stride) for p, k in zip(point, s.loops, strict=True))
                b_at = b0 + sum(p * self.dim(k.b_stride) for p, k in zip(point, s.loops, strict=True))
                a = self.fetched(s.a, np.broadcast_to(a_at + i * self.dim(s.a_row), zero.shape))
                b = self.fetched(s.b, np.broadcast_to(b_at + j, zero.shape))
                block = self.multiply_add(a, b, block) if dtypes.is_float(s.tile.dtype) else block + a * b
            if full:
                blocks.append(block)
                block = zero
        if block is not zero or not blocks:
            blocks.append(block)
        total = functools.reduce(operator.add, blocks)
        memory, first = self.memory[s.tile], int(self.index(s.tile_index)[0])
        step = width if s.tile_row is None else self.dim(s.tile_row)
        if step < width or first < 0 or memory.size < first + (s.rows - 1) * step + width:
            raise Fault(f"{s.tile.name} has {memory.size} elements, not {s.rows} x {width} from {first} on")
        to = first + np.arange(s.rows)[:, None] * step + j
        self.stored[s.tile][to] = False
        memory[to[: len(i)]] = total
        self.stored[s.tile][to[: len(i)]] = True

    def transpose(self, s: Transpose) -> None:
        i = np.arange(max(0, self.trips(s.rows, s.row_clip)))[:, None]
        j = np.arange(max(0, self.trips(s.columns, s.column_clip)))[None, :]
        value = self.fetched(s.source, self.index(s.index) + j * self.dim(s.step) + i)
        self.put(s.to, (self.index(s.to_index) + i * self.dim(s.to_step) + j).ravel(), value.ravel())

    # ------------------------------------------------------------------ expressions

    def index(self, index: Index) -> Array:
        total = np.array([self.dim(index.offset)])
        for v, c in index.terms:
            at = self.places[v] if isinstance(v, Axis) else self.locals[v].astype(np.int64)  # type: ignore[index]
            total = total + self.dim(c) * at
        return total

    def value(self, e: Expr) -> Array:
        self.memo.clear()
        return self.evaluated(e)

    def evaluated(self, e: Expr) -> Array:
        """Operands first, without recursion: chains of operators may be long."""
        stack = [e]
        while stack:
            x = stack[-1]
            operands = x.args if isinstance(x, Apply) else (x.at,) if isinstance(x, Lookup) else ()
            waiting = [c for c in operands if c not in self.memo]
            if waiting and x not in self.memo:
                stack += waiting
                continue
            if x not in self.memo:
                self.memo[x] = self.computed(x)
            stack.pop()
        return self.memo[e]

    def computed(self, e: Expr) -> Array:
        match e:
            case Literal():
                return np.array([e.value]).astype(e.dtype)
            case Read():
                return self.fetched(e.buffer, self.index(e.index)).astype(e.dtype)
            case Use():
                return self.locals[e.local]
            case Position():
                return self.index(e.index)
            case Guarded():
                return self.guarded(e)
            case Apply():
                return self.applied(e)
            case Lookup():
                return np.array(e.table, np.uint8)[self.memo[e.at].view(np.uint8)].view(e.dtype)

    def fetched(self, buffer: Buffer, at: Array) -> Array:
        """Elements of a buffer; those at which no lane is active may be anywhere, and are 0."""
        memory = self.memory[buffer]
        uniform = at.shape == (1,) or self.active.shape == (1,)
        wanted = np.full(at.shape, self.active.any()) if uniform else self.active
        inside = (at >= 0) & (at < memory.size)
        if (wanted & ~inside).any():
            raise Fault(f"{buffer.name}[{at[wanted & ~inside][0]}] of {memory.size}")
        if memory.size == 0:
            return np.zeros(at.shape, buffer.dtype)
        safe = np.where(inside, at, 0)
        if buffer.space != "global" and (wanted & ~self.stored[buffer][safe]).any():
            raise Fault(f"{buffer.name}[{at[wanted & ~self.stored[buffer][safe]][0]}] is read before it is stored")
        return np.where(wanted, memory[safe], np.zeros(1, buffer.dtype)).astype(buffer.dtype)

    def within(self, bounds: tuple[Bound, ...]) -> Array:
        holds = np.ones(1, bool)
        for b in bounds:
            at = self.index(b.index)
            holds = holds & (at >= 0) & (at < self.dim(b.limit))
        return holds

    def guarded(self, e: Guarded) -> Array:
        holds = self.within(e.bounds)
        memo, active = self.memo, self.active
        self.memo, self.active = {}, active & holds
        value = self.evaluated(e.value)
        self.memo, self.active = memo, active
        return np.where(holds, value, np.array([e.otherwise.value]).astype(e.dtype)).astype(e.dtype)

    def applied(self, e: Apply) -> Array:
        fused = multiply_add(e.prim, e.args)
        if fused and self.target.fma:
            value = self.multiply_add(*(self.evaluated(a) for a in fused))
        else:
            value = apply(e.prim, tuple(self.memo[a] for a in e.args), e.dtype)
        return value if e.rounded is None else value.astype(e.rounded).astype(e.dtype)

    def multiply_add(self, a: Array, b: Array, c: Array) -> Array:
        if not self.target.fma:
            return a * b + c
        if a.dtype == dtypes.FLOAT32:
            return NumpyBuilder().fma(*np.broadcast_arrays(a, b, c))
        return _fma_double(*np.broadcast_arrays(a, b, c))


class _Sum:
    """A fold of `count` terms for each of some lanes: `block` is what its last block has come to."""

    def __init__(self, fold: Fold, lanes: int, count: int) -> None:
        self.fold = fold
        self.empty = np.full(lanes, identity(fold.op, fold.local.dtype), fold.local.dtype)
        self.limit = block_of(count) if is_blocked(fold) else count
        self.total: Array | None = None
        self.block, self.terms = self.empty, 0

    def put(self, block: Array) -> None:
        self.block, self.terms = block, self.terms + 1
        if self.terms == self.limit:
            self.total, self.block, self.terms = self.all(), self.empty, 0

    def all(self) -> Array:
        if self.total is None or self.terms == 0:
            return self.block if self.total is None else self.total
        return apply(self.fold.op, (self.total, self.block), self.fold.local.dtype)


def apply(prim: str, args: Sequence[Array], dtype: np.dtype) -> Array:
    """A primitive as generated code computes it: the meaning, but of two zeros max and min take a certain one, and
    float32 functions have the library's bits."""
    kind = args[-1].dtype
    if prim in ("max", "min") and dtypes.is_float(kind):
        a, b = args
        beyond = b > a if prim == "max" else b < a
        return np.where(beyond | np.isnan(b), b, a)
    if prim == "fma":
        return np.asarray(NumpyBuilder().fma(*np.broadcast_arrays(*args)))
    if prim in FUNCTIONS and kind == dtypes.FLOAT32:
        return np.asarray(evaluate(prim, *np.broadcast_arrays(*args)))
    args = args if prim == "bitcast" else np.broadcast_arrays(*args)
    return np.asarray(PRIMITIVES[prim].meaning({"dtype": dtype}, *args)).astype(dtype)


def _fma_double(a: Array, b: Array, c: Array) -> Array:
    """One rounding by exact arithmetic, an element at a time."""
    plain = a * b + c
    out = plain.copy()
    for i in range(plain.size):
        x, y, z = (float(v.flat[i]) for v in (a, b, c))
        if np.isfinite([x, y, z]).all() and (x * y + z or x * y):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            try:
                out.flat[i] = float(exact) if exact else plain.flat[i]
            except OverflowError:
                out.flat[i] = np.inf if exact > 0 else -np.inf
    return out
