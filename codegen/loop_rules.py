"""The rules of the loop IR that can be seen without running a program: names are in scope, types agree."""

from __future__ import annotations

from stitch import dtypes
from stitch.codegen.loops import (
    Apply,
    Axis,
    Buffer,
    Clip,
    Contract,
    Define,
    Expr,
    Gate,
    Guarded,
    Index,
    Local,
    Lookup,
    Loop,
    Position,
    Prefetch,
    Program,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
    children,
)
from stitch.ops.primitives import PRIMITIVES


def check(program: Program) -> None:
    """Raises AssertionError if the program breaks a rule of `stitch.codegen.loops`."""
    for phase in program.phases:
        _check_body(phase.body, set(phase.axes), set(), set(program.buffers) | set(program.tiles), vector=False)


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
