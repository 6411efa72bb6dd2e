"""Epilogues that are done on a contraction's results while they are in registers.

    before:  call contract(a, w, acc)                    the register tile is stored, and read again, row by row
             for row { vector lane { out := max(acc[row, lane] + bias[lane], 0) } }
    after:   call contract.max.add…(a, w, out, bias)     out := max(r + bias, 0), from the registers

Where a sum has few terms, as over the channels of a small network, storing the tile and reading it takes as long as the
tenth part of the sum or more. `of` finds out whether the loop behind a contraction can be done this way: elementwise
work that costs little, on what is in registers and what is read at places that are affine in row and lane. Work with
many intermediate results, as sigmoid has, stays in a loop of its own: beside a full tile there are three registers
left. Nothing is computed differently, so that no bit changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from stitch.access import Axis, Index
from stitch.codegen import emit_primitives as primitives
from stitch.codegen.contract import Ending, emit_micro_kernel
from stitch.codegen.emit_code import Writer
from stitch.codegen.emit_math import vector_isa
from stitch.codegen.emit_rules import lane_dtype, multiply_add, nodes
from stitch.codegen.emit_values import Operations, Value, literal
from stitch.codegen.loops import Apply, Buffer, Contract, Expr, Literal, Loop, Phase, Read, Stmt, Store, Transpose, walk
from stitch.codegen.loops import expressions as expressions_of
from stitch.codegen.sums import block_of
from stitch.dims import Dim, product
from stitch.dtypes import FLOAT32
from stitch.ops.primitives import PRIMITIVES
from stitch.target import Target

MOST = 16.0
"""Instructions for a vector of results, those of its loads included, up to which registers suffice."""

FIRST = 1000  # number of the first value that the writer names: those before are the micro-kernel's


@dataclass(frozen=True)
class Place:
    """What is read or stored at row i, lane j of a tile: buffer[base + i·step + j·lane]."""

    buffer: Buffer
    base: Index
    step: Dim
    lane: int


@dataclass(frozen=True)
class Epilogue:
    """The loop behind a contraction, as far as it is done on registers."""

    contract: Contract
    lanes: Loop  # over the columns
    row: Axis | None
    places: dict[int, Place]  # of reads and stores, by id
    width: int  # columns that there are, in a tile that is not cut off

    @property
    def pointers(self) -> tuple[Place, ...]:
        """The places, equal ones once: in this order they are the function's parameters."""
        return tuple(dict.fromkeys(self.places.values()))


def readers(phase: Phase) -> dict[Buffer, int]:
    """How many statements read each buffer."""
    found: dict[Buffer, int] = {}
    for s in walk(phase.body):
        read = {x.buffer for e in expressions_of(s) for x in nodes(e) if isinstance(x, Read)}
        if isinstance(s, Contract):
            read |= {s.a, s.b}
        elif isinstance(s, Transpose):
            read.add(s.source)
        for b in read:
            found[b] = found.get(b, 0) + 1
    return found


def of(s: Contract, after: Stmt | None, counts: dict[Buffer, int], target: Target) -> Epilogue | None:
    """The loop `after` a contraction as its epilogue, if it can be. `counts`: the phase's `readers`."""
    terms = product(k.extent for k in s.loops)
    if s.tile.dtype != FLOAT32 or not isinstance(terms, int) or not 0 < terms <= block_of(terms):
        return None
    if s.tile_row is not None:  # stored where others read it
        return None
    loop = after
    row: Axis | None = None
    if isinstance(after, Loop) and after.mode == "serial" and len(after.body) == 1:
        if after.folds or after.axis.extent != s.rows or after.clip != s.clip:
            return None
        loop, row = after.body[0], after.axis
    elif s.rows != 1:
        return None
    if not isinstance(loop, Loop) or loop.mode != "vector" or loop.folds or lane_dtype(loop) != FLOAT32:
        return None
    stores = [t for t in loop.body if isinstance(t, Store)]
    width = loop.axis.extent
    if len(stores) != len(loop.body) or not isinstance(width, int):
        return None
    if counts.get(s.tile) != sum(any(_is_of(x, s.tile) for x in nodes(t.value)) for t in stores):
        return None
    lanes = target.lanes(FLOAT32)
    rest = width - (s.vectors - 1) * lanes
    if not (rest == lanes or (1 < rest < lanes and vector_isa(target) == "avx512" and loop.clip is None)):
        return None
    places = _places(s, stores, row, loop.axis)
    return Epilogue(s, loop, row, places, width) if places is not None else None


def _is_of(e: Expr, buffer: Buffer) -> bool:
    return isinstance(e, Read) and e.buffer is buffer


def _places(s: Contract, stores: list[Store], row: Axis | None, lane: Axis) -> dict[int, Place] | None:
    """Where the statements read and store, by id; None if they do anything that registers are not enough for."""
    found: dict[int, Place] = {}
    changed = {t.buffer for t in stores}
    parts = list({id(e): e for t in stores for e in nodes(t.value)}.values())
    cost = 0.0
    for x in (*parts, *stores):
        match x:
            case Literal():
                continue
            case Read() | Store():
                if x.buffer.dtype != FLOAT32 or (isinstance(x, Read) and x.buffer in changed):
                    return None
                at = _place(x.buffer, x.index, row, lane)
                if at is None or (isinstance(x, Store) and at.lane != 1):
                    return None
                if x.buffer is s.tile:
                    own = Place(s.tile, Index(0, ()), 0 if row is None else s.vectors * _lanes(s), 1)
                    if isinstance(x, Store) or at != own:
                        return None
                    continue
                cost += 1
                found[id(x)] = at
            case Apply():
                if x.rounded is not None or any(v.dtype != FLOAT32 for v in (x, *x.args)):
                    return None
                cost += PRIMITIVES[x.prim].cost
            case _:
                return None
    return found if cost <= MOST else None


def _lanes(s: Contract) -> int:
    """Lanes of a vector: a tile has as many elements as results."""
    assert isinstance(s.tile.size, int)
    return s.tile.size // (s.rows * s.vectors)


def _place(buffer: Buffer, index: Index, row: Axis | None, lane: Axis) -> Place | None:
    step, along = index.coefficient(row) if row is not None else 0, index.coefficient(lane)
    if not isinstance(along, int) or along not in (0, 1) or any(not isinstance(v, Axis) for v, _ in index.terms):
        return None
    return Place(buffer, Index(index.offset, tuple(t for t in index.terms if t[0] not in (row, lane))), step, along)


def kernel(kernels: MutableMapping[str, str], target: Target, e: Epilogue) -> str:
    """The name of the function that contracts and stores, which is added to `kernels`. After the loops it has, for each
    place, a pointer to row 0 and lane 0, and, where that is no number, the elements from one row to the next."""
    s = e.contract
    unit = s.loops[-1].a_stride == 1
    ahead = s.ahead and unit

    def text(name: str) -> str:
        return emit_micro_kernel(
            name, target, FLOAT32, s.rows, s.vectors, unit, "internal", short=True, ahead=ahead,
            ending=_ending(e, target),
        )  # fmt: skip

    digest = hashlib.sha256(text("").encode()).hexdigest()[:12]
    name = f"contract.float32.{s.rows}x{s.vectors}{'.unit' if unit else ''}.{digest}"
    if name not in kernels:
        kernels[name] = text(name)
    return name


def _ending(e: Epilogue, target: Target) -> Ending:
    return _Text(e, target).ending()


class _Text:
    """The statements of an epilogue for all rows, one row after the other."""

    def __init__(self, e: Epilogue, target: Target) -> None:
        self.e, self.vectors = e, e.contract.vectors
        self.w = Writer()
        self.w.count = FIRST
        self.o = Operations(self.w, target.fma, vector_isa(target))
        self.o.width, self.o.copies = target.lanes(FLOAT32), self.vectors
        self.numbers = {p: k for k, p in enumerate(e.pointers)}
        self.rest = e.width - (self.vectors - 1) * self.o.width
        self.kind = f"<{self.o.width} x float>"
        lanes = ", ".join(f"i1 {str(k < self.rest).lower()}" for k in range(self.o.width))
        self.mask = f"<{self.o.width} x i1> <{lanes}>"

    def ending(self) -> Ending:
        parameters = []
        for p, k in self.numbers.items():
            parameters += [f"ptr %e{k}", *([] if isinstance(p.step, int) else [f"i64 %e{k}.row"])]
        for i in range(self.e.contract.rows):
            memo: dict[int, Value] = {}
            for s in self.e.lanes.body:
                assert isinstance(s, Store)
                self._store(self.e.places[id(s)], i, self.o.widen(self._value(s.value, i, memo)))
        return Ending(tuple(parameters), tuple(self.w.levels[0].lines))

    def _value(self, e: Expr, i: int, memo: dict[int, Value]) -> Value:
        if id(e) not in memo:
            memo[id(e)] = self._computed(e, i, memo)
        return memo[id(e)]

    def _computed(self, e: Expr, i: int, memo: dict[int, Value]) -> Value:
        match e:
            case Literal():
                return literal(e.value, e.dtype)
            case Read():
                if e.buffer is self.e.contract.tile:
                    return Value(FLOAT32, tuple(f"%s{i}.{j}" for j in range(self.vectors)), True)
                return self._load(self.e.places[id(e)], i)
            case _:
                assert isinstance(e, Apply)
                fused = multiply_add(e.prim, e.args)
                values = [self._value(a, i, memo) for a in fused or e.args]
                return self.o.multiply_add(*values) if fused else primitives.apply(self.o, e.prim, values, e.dtype)

    def _row(self, p: Place, i: int) -> str:
        """The pointer to lane 0 of a row."""
        at = f"%e{self.numbers[p]}"
        if i == 0 or p.step == 0:
            return at
        if isinstance(p.step, int):
            return self.w.pure(f"getelementptr float, ptr {at}, i64 {i * p.step}")
        before = self._row(p, i - 1)
        return self.w.pure(f"getelementptr float, ptr {before}, i64 {at}.row")

    def _vectors(self, p: Place, i: int) -> list[tuple[str, bool]]:
        """The pointers to a row's vectors, and whether only some lanes are there."""
        row, n = self._row(p, i), self.o.width
        at = [row, *(self.w.pure(f"getelementptr float, ptr {row}, i64 {j * n}") for j in range(1, self.vectors))]
        return [(q, j == self.vectors - 1 and self.rest < n) for j, q in enumerate(at)]

    def _load(self, p: Place, i: int) -> Value:
        if p.lane == 0:
            return Value(FLOAT32, (self.w.pure(f"load float, ptr {self._row(p, i)}, align 4"),))
        names = []
        for at, partial in self._vectors(p, i):
            text = f"load {self.kind}, ptr {at}, align 4"
            if partial:
                function = f"@llvm.masked.load.v{self.o.width}f32.p0"
                text = f"call {self.kind} {function}(ptr align 4 {at}, {self.mask}, {self.kind} zeroinitializer)"
            names.append(self.w.pure(text))
        return Value(FLOAT32, tuple(names), True)

    def _store(self, p: Place, i: int, v: Value) -> None:
        for (at, partial), x in zip(self._vectors(p, i), v.parts, strict=True):
            if partial:
                function = f"@llvm.masked.store.v{self.o.width}f32.p0"
                self.w.effect(f"call void {function}({self.kind} {x}, ptr align 4 {at}, {self.mask})")
            else:
                self.w.effect(f"store {self.kind} {x}, ptr {at}, align 4")
