"""Kernels as loop programs: what `stitch.codegen.lower`, `mapping` and `tiling` make of each phase, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stitch import access, dims, dtypes, knobs
from stitch.access import Index
from stitch.codegen import (
    abreast,
    across,
    ahead,
    blocks,
    divisors,
    lookups,
    mapping,
    narrowing,
    peeling,
    splitting,
    tiling,
    windows,
)
from stitch.codegen.constants import Constant
from stitch.codegen.loop_rules import check
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Clip,
    Contract,
    Define,
    Expr,
    Gate,
    Guarded,
    Literal,
    Local,
    Lookup,
    Phase,
    Position,
    Program,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
    expressions,
    walk,
)
from stitch.codegen.lower import Names, Nest, nests
from stitch.dims import Dim
from stitch.graph import Node, Value
from stitch.stitching.schedule import Kernel
from stitch.stitching.trace import Flow
from stitch.target import Target


@dataclass(frozen=True, eq=False)
class Lowered:
    """A program, and what each of its parameters is; `own`: those that nothing outside the kernel needs."""

    program: Program
    parameters: tuple[Value | Constant, ...]
    own: tuple[Value, ...] = ()


def lower(kernel: Kernel, flow: Flow, target: Target) -> Lowered:
    """The loop program of a kernel that is not a host operator."""
    if kernel.opaque is not None:
        return scatter(kernel.opaque, target)
    adaptive = knobs.current().adaptive_mapping
    names = Names(kernel, flow)
    phases: list[Phase] = []
    tiles: list[Buffer] = []
    packed: dict[Buffer, Constant] = {}
    panels: Mapping[Buffer, Constant]
    parts: dict[Buffer, Value] = {}
    for part in kernel.phases:
        names.tiles.clear()
        names.registers.clear()
        if kernel.chain is not None:
            made = blocks.phases(names, target)
            packed |= made.packed
            parts |= made.panels
            phases += made.phases
            tiles += made.tiles
            break
        if part.contraction is not None:
            loops, own, panels = tiling.phase(names, part, target)
            packed |= panels
            phases.append(loops)
            tiles += own
        else:
            work = nests(names, part)
            whole = splitting.Work(part.parallel, tuple(work))
            cut, new = splitting.split(whole, across.ROWS, target.l2_bytes) if adaptive else ((whole,), ())
            parts |= dict(new)
            for piece in cut:
                loops, own, relaid = mapping.phase(piece, target, names.constants(), adaptive)
                packed |= relaid
                phases.append(loops)
                tiles += own
    phases = [narrowing.narrowed(p) for p in phases]
    phases = [divisors.shared(windows.ordered(peeling.peeled(p)), target.vector_bits // 32) for p in phases]
    if adaptive:
        beside = [abreast.abreast(ahead.asked(p, target), target) for p in phases]
        phases = [p for p, _ in beside]
        tiles += [t for _, own in beside for t in own]
        phases = [lookups.looked_up(p, target) for p in phases]
    used = {b for p in phases for b in buffers(p)}
    given: dict[Buffer, Value | Constant] = {b: v for v, b in names.buffers.items() if b in used}
    return _program(phases, tuple(tiles), given | packed | parts, tuple(parts.values()))


def _program(
    phases: list[Phase],
    tiles: tuple[Buffer, ...],
    given: Mapping[Buffer, Value | Constant],
    own: tuple[Value, ...] = (),
) -> Lowered:
    program = Program("kernel", tuple(given), tiles, tuple(phases), symbols(phases, (*given, *tiles)))
    check(program)
    return Lowered(program, tuple(given.values()), own)


def buffers(phase: Phase) -> set[Buffer]:
    """All that a phase reads or stores."""
    found: set[Buffer] = set()
    seen: set[int] = set()

    def visit(e: Expr) -> None:
        if id(e) in seen:
            return
        seen.add(id(e))
        match e:
            case Read():
                found.add(e.buffer)
            case Apply():
                for a in e.args:
                    visit(a)
            case Guarded():
                visit(e.value)
            case Lookup():
                visit(e.at)

    for s in walk(phase.body):
        for name in ("buffer", "a", "b", "to", "source"):
            if isinstance(b := getattr(s, name, None), Buffer):
                found.add(b)
        for e in expressions(s):
            visit(e)
    return found


def symbols(phases: list[Phase], buffers: tuple[Buffer, ...]) -> tuple[str, ...]:
    """All symbols that extents and indices use, sorted."""
    found: set[str] = set()

    def dim(d: Dim) -> None:
        if not isinstance(d, int):
            found.update(dims.symbols(d))

    def index(i: Index) -> None:
        dim(i.offset)
        for _, c in i.terms:
            dim(c)

    seen: set[int] = set()

    def expr(e: Expr) -> None:
        if id(e) in seen:
            return
        seen.add(id(e))
        match e:
            case Read() | Position():
                index(e.index)
            case Apply():
                for a in e.args:
                    expr(a)
            case Literal() | Use():
                pass
            case Lookup():
                expr(e.at)
            case _:
                for b in e.bounds:
                    index(b.index)
                    dim(b.limit)
                expr(e.value)

    for b in buffers:
        dim(b.size)
    for p in phases:
        dim(p.grain)
        for a in p.axes:
            dim(a.extent)
        for s in walk(p.body):
            for e in expressions(s):
                expr(e)
            for name in ("index", "a_index", "b_index", "to_index", "tile_index"):
                if isinstance(i := getattr(s, name, None), Index):
                    index(i)
            if (axis := getattr(s, "axis", None)) is not None:
                dim(axis.extent)
            clip = getattr(s, "clip", None)
            if isinstance(clip, Clip):
                dim(clip.limit)
            for bound in clip.bounds if isinstance(clip, Gate) else ():
                dim(bound.limit)
                index(bound.index)
            if isinstance(s, Contract):
                dim(s.a_row)
                dim(s.tile_row or 0)
                for k in s.loops:
                    for d in (k.extent, k.a_stride, k.b_stride):
                        dim(d)
            if isinstance(s, Transpose):
                for d in (s.to_step, s.step, s.rows.extent, s.columns.extent):
                    dim(d)
                for clip in (s.row_clip, s.column_clip):
                    if clip is not None:
                        dim(clip.limit)
    return tuple(sorted(found))


def scatter(node: Node, target: Target) -> Lowered:
    """Copy the data, then the updates in order: later ones win, and a reduction sees the earlier ones."""
    data, updates, *places = node.inputs
    out = node.output
    axes = node.attrs["axes"]
    to = Buffer("out", out.dtype, out.size)
    given: dict[Buffer, Value | Constant] = {to: out}
    read: dict[Value, Buffer] = {}
    for v in node.inputs:
        if v not in read:
            read[v] = Buffer("m", v.dtype, v.size)
            given[read[v]] = v
    flat = access.Axis("i", out.size)
    copy = Nest((), (), (Store(to, access.of(flat), Read(read[data], access.of(flat))),))
    first, _, _ = mapping.phase(splitting.Work((flat,), (copy,)), target)

    moving = [access.Axis("u", d) for d in places[0].shape]
    rest = [access.Axis("r", data.shape[k]) for k in range(data.rank) if k not in axes]
    at = [access.of(a) for a in moving]
    body: list[Stmt] = []
    inside: Expr = Literal(True, dtypes.BOOL)
    target_at: list[Index] = []
    others = iter(rest)
    local_of: dict[int, Local] = {}
    for place, axis in zip(places, axes, strict=True):
        value: Expr = Read(read[place], access.linear(place.shape, at))
        if value.dtype != dtypes.INT64:
            value = Apply("cast", (value,), dtypes.INT64)
        raw = Local("ix", dtypes.INT64)
        body.append(Define(raw, value))
        low = Apply("le", (Literal(0, dtypes.INT64), Use(raw)), dtypes.BOOL)
        high = Apply("lt", (Use(raw), Position(Index(data.shape[axis]))), dtypes.BOOL)
        inside = Apply("and", (inside, Apply("and", (low, high), dtypes.BOOL)), dtypes.BOOL)
        last = Position(Index(data.shape[axis] - 1))
        bounded = Apply("min", (Use(raw), last), dtypes.INT64)
        local = Local("at", dtypes.INT64)
        body.append(Define(local, Apply("max", (bounded, Literal(0, dtypes.INT64)), dtypes.INT64)))
        local_of[axis] = local
    for k in range(data.rank):
        target_at.append(Index(0, ((local_of[k], 1),)) if k in local_of else access.of(next(others)))
    where = access.linear(data.shape, target_at)
    kind = dtypes.compute(out.dtype)
    old = Read(to, where)
    here = access.linear((*places[0].shape, *(a.extent for a in rest)), [*at, *(access.of(a) for a in rest)])
    new: Expr = Read(read[updates], here)
    if node.attrs["op"] != "none":
        new = Apply(node.attrs["op"], (old, new), kind)
    body.append(Store(to, where, Apply("where", (inside, new, old), kind)))
    kept = [a for a in (*moving, *rest) if a.extent != 1]
    vector = rest[-1] if rest and rest[-1].extent != 1 and where.coefficient(rest[-1]) == 1 else None
    nest = Nest(tuple(kept), (), tuple(body))
    second = Phase((), mapping.loops(nest, vector, times=1))
    return _program([first, second], (), given)
