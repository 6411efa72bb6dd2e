"""Lowering: the groups of a phase as loop nests over expressions.

Every root becomes an expression of the group's axes, built by walking from it through elementwise nodes and movement
down to what is in memory, in a tile, or in a register. A `Nest` keeps the loops of a group apart from what is done in
them, so that `stitch.codegen.mapping` can choose their order and which of them is a vector loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stitch import access, dtypes
from stitch.access import Axis, Bound, Index
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Define,
    Expr,
    Fold,
    Guarded,
    Literal,
    Local,
    Position,
    Read,
    Stmt,
    Store,
    Use,
    children,
)
from stitch.codegen.tops import most
from stitch.dims import Dim
from stitch.graph import Value
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching.schedule import Group, Kernel, Phase, Root
from stitch.stitching.trace import Access, Flow, count

SKEW = 16
"""Elements by which rows of a block are longer than they need to be."""


@dataclass(frozen=True, eq=False)
class Nest:
    """for kept { for reduced { body; folds }; after }."""

    kept: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    body: tuple[Stmt, ...]
    folds: tuple[Fold, ...] = ()
    after: tuple[Stmt, ...] = ()


@dataclass(frozen=True)
class Tile:
    """A value in the worker's scratch: what its dims still range over where a task stands, at a point of `parallel`."""

    buffer: Buffer
    shape: tuple[Dim, ...]
    parallel: tuple[Axis, ...]

    def index(self, at: Sequence[Index]) -> Index:
        return tile_index(self.shape, at, self.parallel)


@dataclass
class Names:
    """The buffers of one kernel, and what its values have become so far. `block`: the axes at whose points a task of a
    chain stands."""

    kernel: Kernel
    flow: Flow
    buffers: dict[Value, Buffer] = field(default_factory=dict)  # parameters, in order of first use
    tiles: dict[Value, Tile] = field(default_factory=dict)
    registers: dict[Value, Local] = field(default_factory=dict)
    results: dict[Value, Callable[[tuple[Index, ...]], Expr]] = field(default_factory=dict)  # of contractions
    block: tuple[Axis, ...] = ()

    def label(self, value: Value) -> str:
        """What a local is called: after the primitive, so that equal kernels have equal text."""
        node = self.flow.producer.get(value)
        return node.prim.removeprefix("reduce_") if node is not None else "x"

    def buffer(self, value: Value) -> Buffer:
        if value not in self.buffers:
            self.buffers[value] = Buffer("m", value.dtype, value.size)
        return self.buffers[value]

    def constants(self) -> dict[Buffer, Value]:
        """The buffers so far that hold constants."""
        made = self.flow.producer
        return {b: v for v, b in self.buffers.items() if v in made and made[v].prim == "const"}

    def operand(self, a: Access) -> tuple[Buffer, Index]:
        """Where a contraction finds an operand."""
        if a.value in self.tiles:
            tile = self.tiles[a.value]
            return tile.buffer, tile.index(a.at)
        return self.buffer(a.value), a.offset


def nests(names: Names, phase: Phase) -> list[Nest]:
    """One nest per group, in order."""
    return [_nest(names, phase, g) for g in phase.groups]


def _nest(names: Names, phase: Phase, group: Group) -> Nest:
    parallel = frozenset(phase.parallel)
    reduced = tuple(a for a in group.axes if a in group.reduced)
    kept = tuple(a for a in group.axes if a not in parallel and a not in reduced)
    walk = _Walk(names, phase, group)
    body: list[Stmt] = []
    folds: list[Fold] = []
    after: list[Stmt] = []
    for r in group.roots:
        value = walk.root(r)
        if r.fold:
            local = Local(names.label(r.value), value.dtype)
            boolean = {"max": "or", "min": "and"} if value.dtype == dtypes.BOOL else {}
            folds.append(Fold(local, boolean.get(r.fold, r.fold), value))  # type: ignore[arg-type]
            if names.kernel.placements[r.value] == "register":
                names.registers[r.value] = local
            else:
                after.append(_store(names, phase, r, Use(local)))
        elif names.kernel.placements[r.value] == "register":
            local = Local(names.label(r.value), value.dtype)
            body += walk.take()
            body.append(Define(local, value))
            names.registers[r.value] = local
        else:
            body += walk.take()
            body.append(_store(names, phase, r, value))
    return Nest(kept, reduced, (*body, *walk.take()), tuple(folds), tuple(after))


def _store(names: Names, phase: Phase, root: Root, value: Expr) -> Store:
    if names.kernel.placements[root.value] == "buffer":
        return Store(names.buffer(root.value), access.linear(root.value.shape, root.store), value)
    block = names.kernel.placements[root.value] == "block"
    parallel = names.block if block else phase.parallel
    shape = tile_shape(root, parallel)
    if block:  # rows that do not all fall into the same sets of a cache
        shape = (*shape[:-1], shape[-1] + SKEW)
    dtype = value.dtype if value.dtype != dtypes.BOOL else root.value.dtype
    tile = Tile(Buffer("t", dtype, _product(shape), "block" if block else "tile"), shape, parallel)
    names.tiles[root.value] = tile
    return Store(tile.buffer, tile.index(root.store), value)


def tile_shape(root: Root, parallel: Sequence[Axis]) -> tuple[Dim, ...]:
    """The extents of a value at one parallel point: what its dims still range over."""
    out: list[Dim] = []
    for i in root.store:
        span: Dim = 1
        for v, c in i.terms:
            if isinstance(v, Axis) and v not in parallel:
                span = span + c * (v.extent - 1)
        out.append(span)
    return tuple(out)


def tile_index(shape: Sequence[Dim], at: Sequence[Index], parallel: Sequence[Axis]) -> Index:
    """Offset in a tile of the element at `at`: parallel axes are where the task stands, and drop out. A dim of one
    element can only be read at 0, whatever the index (guards see to that)."""
    inner = [
        access.ZERO if d == 1 else Index(i.offset, tuple(t for t in i.terms if t[0] not in parallel))
        for i, d in zip(at, shape, strict=True)
    ]
    return access.linear(shape, inner)


def _product(shape: Sequence[Dim]) -> Dim:
    total: Dim = 1
    for d in shape:
        total = total * d
    return total


class _Walk:
    """Expressions of one group. Equal (value, index) pairs are one object, and so are computed once."""

    def __init__(self, names: Names, phase: Phase, group: Group) -> None:
        self.names = names
        self.phase = phase
        self.own: dict[tuple[Value, tuple[Index, ...]], Root] = {
            (r.value, r.at): r for r in group.roots if r.source is r.value and not r.fold
        }
        self.memo: dict[tuple[Value, tuple[Index, ...], tuple[Bound, ...]], Expr] = {}
        self.loaded: dict[tuple[Value, tuple[Index, ...]], Local] = {}
        self.fresh: list[Stmt] = []

    def take(self) -> list[Stmt]:
        """The definitions of loaded indices made since the last call."""
        out, self.fresh = self.fresh, []
        return out

    def root(self, root: Root) -> Expr:
        if root.value in self.names.results:
            return self.names.results[root.value](root.at)
        if root.source is root.value:
            key = (root.value, root.at, ())
            if key not in self.memo:
                self.memo[key] = self._compute(root.value, root.at, ())
            return self.memo[key]
        return self.value(root.source, root.at, ())

    def value(self, value: Value, at: tuple[Index, ...], guards: tuple[Bound, ...]) -> Expr:
        key = (value, at, guards)
        if key not in self.memo:
            self.memo[key] = self._value(value, at, guards)
        return self.memo[key]

    def _value(self, value: Value, at: tuple[Index, ...], guards: tuple[Bound, ...]) -> Expr:
        names = self.names
        if value in names.flow.scalars:
            array = names.flow.producer[value].attrs["array"]
            return literal(array.reshape(-1)[0], value.dtype)
        if (value, at) in self.own:
            return self.root(self.own[value, at])
        if value in names.results:
            return names.results[value](at)
        if value in names.registers:
            return Use(names.registers[value])
        if value in names.tiles:
            tile = names.tiles[value]
            return Read(tile.buffer, tile.index(at))
        if names.flow.is_movement(value) or not self._in_memory(value):
            return self._compute(value, at, guards)
        return Read(names.buffer(value), access.linear(value.shape, at))

    def _in_memory(self, value: Value) -> bool:
        node = self.names.flow.producer.get(value)
        if node is None or node.prim == "const" or value in self.names.kernel.placements:
            return True
        return PRIMITIVES[node.prim].kind != "source" and node not in self.names.kernel.nodes

    def _compute(self, value: Value, at: tuple[Index, ...], guards: tuple[Bound, ...]) -> Expr:
        node = self.names.flow.producer[value]
        dtype = dtypes.compute(value.dtype)
        if PRIMITIVES[node.prim].kind == "elementwise":
            args = tuple(self.value(x, at, guards) for x in node.inputs)
            rounded = value.dtype if node.prim == "cast" and value.dtype != dtype else None
            return Apply(node.prim, args, dtype, rounded, most(node, self.names.flow.producer))
        match node.prim:
            case "iota":
                return Position(at[node.attrs["axis"]])
            case "shape":
                return Position(Index(node.attrs["dims"][0]))
            case "gather":
                picks = []
                for x, axis in zip(node.inputs[1:], node.attrs["axes"], strict=True):
                    limit = node.inputs[0].shape[axis]
                    counted = count(self.names.flow, x, at[: x.rank], limit)
                    if counted is None:
                        counted = Index(0, ((self._load(x, at[: x.rank], limit, guards), 1),))
                    picks.append(counted)
                return self.value(node.inputs[0], access.gather_index(node, at, picks), guards)
            case "pad":
                bounds = access.bounds(node, at)
                inner = self.value(node.inputs[0], access.operand_index(node, at), guards + bounds)
                return Guarded(bounds, inner, literal(node.attrs["value"], value.dtype))
            case "reshape":
                x = node.inputs[0]
                # A whole buffer may be seen in any shape; anything else has to be followed dim by dim.
                if not self.names.flow.is_movement(x) and self._in_memory(x) and self._is_whole(x):
                    return Read(self.names.buffer(x), access.linear(value.shape, at))
                try:
                    inner_at = access.operand_index(node, at)
                except access.NotAffine:
                    offset = access.linear(value.shape, at)
                    if x in self.names.tiles:
                        return Read(self.names.tiles[x].buffer, offset)
                    return Read(self.names.buffer(x), offset)
                return self.value(x, inner_at, guards)
            case _:
                return self.value(node.inputs[0], access.operand_index(node, at), guards)

    def _is_whole(self, value: Value) -> bool:
        return value not in self.names.kernel.placements and value not in self.names.flow.scalars

    def _load(self, value: Value, at: tuple[Index, ...], limit: Dim, guards: tuple[Bound, ...]) -> Local:
        """A gather's index, clamped into range, as a local."""
        key = (value, at)
        if key not in self.loaded:
            expr = self.value(value, at, guards)
            if expr.dtype != dtypes.INT64:
                expr = Apply("cast", (expr,), dtypes.INT64)
            if guards:
                expr = Guarded(guards, expr, Literal(0, dtypes.INT64))
            last = Position(Index(limit - 1))
            zero = Literal(0, dtypes.INT64)
            clamped = Apply("max", (Apply("min", (expr, last), dtypes.INT64), zero), dtypes.INT64)
            local = Local("ix", dtypes.INT64)
            self.loaded[key] = local
            self.fresh.append(Define(local, clamped))
        return self.loaded[key]


def literal(x: float | int | bool | np.generic, dtype: np.dtype) -> Literal:
    """A constant in its computation type, as a Python number."""
    kind = dtypes.compute(dtype)
    if dtypes.is_float(kind):
        return Literal(float(np.asarray(x).astype(kind)), kind)
    return Literal(bool(x) if kind == dtypes.BOOL else int(x), kind)


# ------------------------------------------------------------------ rewriting indices


class Rewriter:
    """Applies a change to every index of expressions and statements, keeping shared objects shared."""

    def __init__(self, change: Callable[[Buffer | None, Index], Index]) -> None:
        self.change = change
        self.memo: dict[int, Expr] = {}
        self.held: list[Expr] = []  # keeps the ids in memo alive

    def expr(self, e: Expr) -> Expr:
        if id(e) not in self.memo:
            self.held.append(e)
            self.memo[id(e)] = self._expr(e)
        return self.memo[id(e)]

    def _expr(self, e: Expr) -> Expr:
        match e:
            case Read():
                return Read(e.buffer, self.change(e.buffer, e.index))
            case Position():
                return Position(self.change(None, e.index))
            case Apply():
                return replace(e, args=tuple(self.expr(a) for a in e.args))
            case Guarded():
                bounds = tuple(Bound(self.change(None, b.index), b.limit) for b in e.bounds)
                return Guarded(bounds, self.expr(e.value), e.otherwise)
            case _:
                return e

    def stmt(self, s: Stmt) -> Stmt:
        match s:
            case Define():
                return Define(s.local, self.expr(s.value))
            case Store():
                return Store(s.buffer, self.change(s.buffer, s.index), self.expr(s.value))
            case _:
                raise AssertionError("nests hold definitions and stores only")

    def nest(self, n: Nest, rename: Mapping[Axis, Axis | None]) -> Nest:
        """The nest with every index changed; axes are renamed, or dropped where renamed to None."""

        def axes(xs: Sequence[Axis]) -> tuple[Axis, ...]:
            return tuple(y for x in xs if (y := rename.get(x, x)) is not None)

        body = tuple(self.stmt(s) for s in n.body)
        folds = tuple(Fold(f.local, f.op, self.expr(f.value)) for f in n.folds)
        return Nest(axes(n.kept), axes(n.reduced), body, folds, tuple(self.stmt(s) for s in n.after))


def expressions(n: Nest) -> Iterator[Expr]:
    """Every expression in a nest, shared ones once, operands after what they are operands of."""
    stack = [s.value for s in (*n.body, *n.after) if isinstance(s, Store | Define)] + [f.value for f in n.folds]
    seen: set[int] = set()
    while stack:
        e = stack.pop()
        if id(e) not in seen:
            seen.add(id(e))
            yield e
            stack += children(e)


def indices(n: Nest) -> list[tuple[Buffer | None, Index, bool]]:
    """Every index in a nest: (buffer or None, index, is a store). Shared expressions count once."""
    out: list[tuple[Buffer | None, Index, bool]] = []
    seen: set[int] = set()

    def visit(root: Expr) -> None:
        stack = [root]
        while stack:
            e = stack.pop()
            if id(e) in seen:
                continue
            seen.add(id(e))
            match e:
                case Read():
                    out.append((e.buffer, e.index, False))
                case Position():
                    out.append((None, e.index, False))
                case Apply():
                    stack += reversed(e.args)
                case Guarded():
                    out.extend((None, b.index, False) for b in e.bounds)
                    stack.append(e.value)
                case _:
                    pass

    for s in (*n.body, *n.after):
        if isinstance(s, Store):
            out.append((s.buffer, s.index, True))
        if isinstance(s, Store | Define):
            visit(s.value)
    for f in n.folds:
        visit(f.value)
    return out


def cost(n: Nest) -> float:
    """Instructions of one point of a nest, as the primitives' rows and one per access say."""
    total = 0.0
    seen: set[int] = set()

    def visit(e: Expr) -> None:
        nonlocal total
        if id(e) in seen:
            return
        seen.add(id(e))
        match e:
            case Read():
                total += 1
            case Apply():
                total += PRIMITIVES[e.prim].cost
                for a in e.args:
                    visit(a)
            case Guarded():
                total += 2 * len(e.bounds)
                visit(e.value)
            case _:
                pass

    for s in n.body:
        if isinstance(s, Store | Define):
            total += 1
            visit(s.value)
    for f in n.folds:
        total += 1
        visit(f.value)
    return total


class Retiler(Rewriter):
    """Exchanges tile buffers for others of the same contents."""

    def __init__(self, buffers: dict[Buffer, Buffer]) -> None:
        super().__init__(lambda _, i: i)
        self.buffers = buffers

    def _expr(self, e: Expr) -> Expr:
        out = super()._expr(e)
        return replace(out, buffer=self.buffers.get(out.buffer, out.buffer)) if isinstance(out, Read) else out

    def stmt(self, s: Stmt) -> Stmt:
        out = super().stmt(s)
        return replace(out, buffer=self.buffers.get(out.buffer, out.buffer)) if isinstance(out, Store) else out


def tiles_of(nests: Sequence[Nest]) -> tuple[Buffer, ...]:
    found = dict.fromkeys(b for n in nests for b, _, _ in indices(n) if b is not None and b.space == "tile")
    return tuple(found)
