"""Generated code against the interpreter, which it must equal to the bit, and against numpy."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import llvmlite.binding as binding
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stitch import dims, dtypes, target
from stitch.access import Axis, Bound, Index, index
from stitch.codegen import interp, llvm, loop_text, loops, machine
from stitch.codegen.emit_rules import lanes_of
from stitch.codegen.loop_rules import check
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Clip,
    Contract,
    ContractLoop,
    Define,
    Expr,
    Fold,
    Guarded,
    Literal,
    Local,
    Loop,
    Phase,
    Program,
    Read,
    Store,
    Use,
)
from stitch.dims import Dim
from stitch.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, INT32, INT64, UINT8
from stitch.ops.primitives import PRIMITIVES
from stitch.target import Target
from tests.programs import Case, cases, data

Array = npt.NDArray[Any]

# ------------------------------------------------------------------ running programs

HOST = machine.host()
X86 = [t for t in map(target.parse, ("avx2", "sse2")) if HOST.is_x86 and (t.vector_bits == 128 or HOST.has("avx2"))]
RUNNABLE = [HOST, *X86]
EVERY = pytest.mark.parametrize("machine_", RUNNABLE, ids=lambda t: f"{t.vector_bits}")


@functools.cache
def jit() -> binding.LLJIT:
    machine.host()
    return binding.create_lljit_compiler()


numbers = itertools.count()


class Compiled:
    """A program in memory, ready to run on flat arrays."""

    def __init__(self, program: Program, on: Target, level: machine.Level = 1) -> None:
        check(program)
        self.program = program
        self.code = llvm.emit(program, on)
        builder = binding.JITLibraryBuilder().add_current_process()
        builder.add_object_img(machine.compile(llvm.module([self.code]), on, level))
        for name in self.code.functions:
            builder.export_symbol(name)
        self.library = builder.link(jit(), f"test{next(numbers)}")

    def __call__(self, arrays: Mapping[Buffer, Array], env: Mapping[str, int] | None = None) -> None:
        env = env or {}
        size = dims.evaluate(self.code.scratch, env)
        scratch = np.zeros(2 * size + 64, np.uint8)
        scratch[:] = 0xFF  # NaN, to be seen if a tile is read before it is stored
        words = [arrays[b].ctypes.data for b in self.program.buffers]
        words += [env[s] for s in self.program.symbols] + [-(-scratch.ctypes.data // 64) * 64, size]
        args = np.array(words, np.int64)
        for name, phase in zip(self.code.functions, self.program.phases, strict=True):
            function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 3)(self.library[name])
            tasks = dims.evaluate(phase.tasks, env)
            function(args.ctypes.data, tasks // 2, tasks, 1)  # by two workers, the last tasks first
            function(args.ctypes.data, 0, tasks // 2, 0)


def agree(program: Program, arrays: Mapping[Buffer, Array], env: Mapping[str, int], on: Target) -> dict[Buffer, Array]:
    """Runs a program both ways, and returns the arrays if all of them are equal, signs of zeros too."""
    mine = {b: v.copy() for b, v in arrays.items()}
    theirs = {b: v.copy() for b, v in arrays.items()}
    interp.run(program, theirs, env, on)
    Compiled(program, on)(mine, env)
    for b in program.buffers:
        wrong = np.flatnonzero(~same(mine[b], theirs[b]))
        if wrong.size:
            k = wrong[:4]
            pytest.fail(f"{b.name}{list(k)} is {mine[b][k]}, not {theirs[b][k]}; {env}\n{loop_text.render(program)}")
    return mine


def same(a: Array, b: Array) -> Array:
    if not dtypes.is_float(a.dtype):
        return np.asarray(a == b)
    with np.errstate(all="ignore"):
        a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray(((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b)))


# ------------------------------------------------------------------ random programs


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(RUNNABLE))
def test_random_programs(case: Case, on: Target) -> None:
    agree(case.program, case.arrays, case.env, on)


# ------------------------------------------------------------------ primitives

UNARY = [p for p in PRIMITIVES.values() if p.kind == "elementwise" and p.arity == 1]
BINARY = [p for p in PRIMITIVES.values() if p.kind == "elementwise" and p.arity == 2]
COMPUTED = [d for d in dtypes.ALL if dtypes.compute(d) == d]


def defined(prim: str, dtype: np.dtype) -> bool:
    if dtype == BOOL:
        return prim in ("and", "or", "xor", "not", "eq", "ne", "lt", "le", "min", "max")
    if dtypes.is_float(dtype):
        return prim not in ("and", "or", "xor", "not", "shl", "shr")
    if prim in ("shl", "shr"):
        return not dtypes.is_signed(dtype)
    return prim not in float_only() and prim != "pow"


@functools.cache
def float_only() -> frozenset[str]:
    return frozenset(p.name for p in UNARY if p.domain == dtypes.FLOATS)


def elementwise(sources: list[np.dtype], results: list[tuple[str, np.dtype, np.dtype]], n: Dim) -> Program:
    """One vector loop: each result is (primitive, dtype of its operands, its own dtype)."""
    axis = Axis("i", n)
    at = index(0, (axis, 1))
    inputs = [Buffer(f"x{k}", d, n) for k, d in enumerate(sources)]
    outputs, body = [], []
    for prim, _, dtype in results:
        args = tuple(Read(b, at) for b in inputs[: PRIMITIVES[prim].arity])
        outputs.append(Buffer(f"{prim}.{dtype.name}", dtype, n))
        body.append(Store(outputs[-1], at, Apply(prim, args, dtype)))
    return Program("table", (*inputs, *outputs), (), (Phase((), (Loop(axis, tuple(body), (), "vector"),)),))


@EVERY
@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
def test_primitives(dtype: np.dtype, machine_: Target) -> None:
    """Against numpy itself: float64 functions are the C library's, and float32 ones tested elsewhere."""
    n = 203
    rows = [
        (p.name, dtype, BOOL if p.name in ("eq", "ne", "lt", "le") else dtype)
        for p in (*UNARY, *BINARY)
        if p.name not in ("cast", "bitcast") and defined(p.name, dtype)
    ]
    program = elementwise([dtype, dtype], rows, n)
    rng = np.random.default_rng(7)
    arrays = {b: data(dtype, n, rng) for b in program.buffers[:2]}
    arrays |= {b: np.zeros(n, b.dtype) for b in program.buffers[2:]}
    Compiled(program, machine_)(arrays)
    x, y = (arrays[b] for b in program.buffers[:2])
    for (prim, _, out), b in zip(rows, program.buffers[2:], strict=True):
        row = PRIMITIVES[prim]
        expected = row.meaning({}, *(x, y)[: row.arity])
        if row.ulp:
            with np.errstate(all="ignore"):
                close = np.abs(arrays[b] - expected) <= 2 * row.ulp * np.spacing(np.abs(expected)) + np.finfo(out).tiny
            good = close | (arrays[b] == expected) | (np.isnan(arrays[b]) & np.isnan(expected))
        else:
            good = (arrays[b] == expected) | ((arrays[b] != arrays[b]) & (expected != expected))
        k = np.flatnonzero(~good)[:4]
        assert good.all(), f"{prim}({x[k]}, {y[k]}) = {arrays[b][k]}, not {expected[k]}"


@EVERY
@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
def test_casts(dtype: np.dtype, machine_: Target) -> None:
    n = 203
    program = elementwise([dtype], [("cast", dtype, to) for to in COMPUTED], n)
    arrays = {program.buffers[0]: data(dtype, n, np.random.default_rng(3))}
    arrays |= {b: np.zeros(n, b.dtype) for b in program.buffers[1:]}
    agree(program, arrays, {}, machine_)


@EVERY
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_half_precision(dtype: np.dtype, machine_: Target) -> None:
    """All numbers are read exactly; sums that lie on and beside ties are rounded to even."""
    n = 1 << 16
    axis = Axis("i", n)
    at = index(0, (axis, 1))
    x, y, wide, narrow = (Buffer(k, d, n) for k, d in zip("xywn", (dtype, FLOAT32, FLOAT32, dtype), strict=True))
    body = (Store(wide, at, Read(x, at)), Store(narrow, at, Read(y, at)))
    program = Program("half", (x, y, wide, narrow), (), (Phase((), (Loop(axis, body, (), "vector", None, 2),)),))
    every = np.arange(n, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        middle = (every.astype(np.float64) + np.roll(every, -1).astype(np.float64)) / 2
        steps = np.random.default_rng(1).integers(-1, 2, n).astype(np.int32)
        beside = (middle.astype(np.float32).view(np.int32) + steps).view(np.float32)
        expected = beside.astype(dtype)
    arrays = {x: every, y: beside, wide: np.zeros(n, np.float32), narrow: np.zeros(n, dtype)}
    Compiled(program, machine_)(arrays)
    assert same(arrays[wide], every.astype(np.float32)).all()
    assert same(arrays[narrow], expected).all()


# ------------------------------------------------------------------ kernels as they occur


def f32(prim: str, *args: Expr) -> Expr:
    return Apply(prim, args, FLOAT32)


def number(x: float) -> Expr:
    return Literal(x, FLOAT32)


def softmax(rows: Dim, columns: Dim, unroll: int = 4) -> Program:
    x, y = (Buffer(n, FLOAT32, rows * columns) for n in "xy")
    tile = Buffer("tile", FLOAT32, columns, "tile")
    i, (j, k, last) = Axis("i", rows), (Axis(n, columns) for n in "jkl")
    top, e, total, scale = (Local(n, FLOAT32) for n in ("top", "e", "total", "scale"))

    def at(axis: Axis) -> Index:
        return index(0, (i, columns), (axis, 1))

    scaled = f32("mul", Read(tile, index(0, (last, 1))), Use(scale))
    exp = Define(e, f32("exp", f32("sub", Read(x, at(k)), Use(top))))
    body = (
        Loop(j, (), (Fold(top, "max", Read(x, at(j))),), "vector", None, unroll),
        Loop(k, (exp, Store(tile, index(0, (k, 1)), Use(e))), (Fold(total, "add", Use(e)),), "vector", None, unroll),
        Define(scale, f32("div", number(1), Use(total))),
        Loop(last, (Store(y, at(last), scaled),), (), "vector", None, unroll),
    )
    return Program("softmax", (x, y), (tile,), (Phase((i,), body),), symbols(rows, columns))


def layer_norm(rows: Dim, columns: Dim, unroll: int = 4) -> Program:
    """Layer norm of a sum of two."""
    x, r, y = (Buffer(n, FLOAT32, rows * columns) for n in "xry")
    gamma, beta = (Buffer(n, FLOAT32, columns) for n in ("gamma", "beta"))
    tile = Buffer("tile", FLOAT32, columns, "tile")
    i, (j, k, last) = Axis("i", rows), (Axis(n, columns) for n in "jkl")
    s, d, total, mean, squares, scale = (Local(n, FLOAT32) for n in ("s", "d", "total", "mean", "squares", "scale"))
    count = Apply("cast", (loops.Position(Index(columns)),), FLOAT32)

    def at(axis: Axis) -> Index:
        return index(0, (i, columns), (axis, 1))

    def centred(axis: Axis) -> Expr:
        return f32("sub", Read(tile, index(0, (axis, 1))), Use(mean))

    add = Define(s, f32("add", Read(x, at(j)), Read(r, at(j))))
    normal = f32("mul", f32("mul", centred(last), Use(scale)), Read(gamma, index(0, (last, 1))))
    out = Store(y, at(last), f32("add", normal, Read(beta, index(0, (last, 1)))))
    variance = f32("div", Use(squares), count)
    body = (
        Loop(j, (add, Store(tile, index(0, (j, 1)), Use(s))), (Fold(total, "add", Use(s)),), "vector", None, unroll),
        Define(mean, f32("div", Use(total), count)),
        Loop(k, (Define(d, centred(k)),), (Fold(squares, "add", f32("mul", Use(d), Use(d))),), "vector", None, unroll),
        Define(scale, f32("rsqrt", f32("add", variance, number(1e-5)))),
        Loop(last, (out,), (), "vector", None, unroll),
    )
    return Program("layer_norm", (x, r, gamma, beta, y), (tile,), (Phase((i,), body),), symbols(rows, columns))


def transposed(rows: Dim, columns: Dim) -> Program:
    x, y = (Buffer(n, FLOAT32, rows * columns) for n in "xy")
    j, i = Axis("j", columns), Axis("i", rows)
    store = Store(y, index(0, (j, rows), (i, 1)), Read(x, index(0, (i, columns), (j, 1))))
    phase = Phase((j,), (Loop(i, (store,), (), "vector", None, 2),))
    return Program("transpose", (x, y), (), (phase,), symbols(rows, columns))


def padded(rows: Dim, columns: Dim, low: int, high: int) -> Program:
    """Both axes of a matrix padded with 7."""
    high_rows, wide = rows + low + high, columns + low + high
    x, y = Buffer("x", FLOAT32, rows * columns), Buffer("y", FLOAT32, high_rows * wide)
    i, j = Axis("i", high_rows), Axis("j", wide)
    bounds = (Bound(index(-low, (i, 1)), rows), Bound(index(-low, (j, 1)), columns))
    value = Guarded(bounds, Read(x, index(-low * columns - low, (i, columns), (j, 1))), Literal(7, FLOAT32))
    store = Store(y, index(0, (i, wide), (j, 1)), value)
    phase = Phase((i,), (Loop(j, (store,), (), "vector", None, 2),))
    return Program("pad", (x, y), (), (phase,), symbols(rows, columns))


def gathered(rows: Dim, columns: Dim, table: Dim) -> Program:
    """Rows of a table by int64 indices, and then single columns of them by int32 ones."""
    x = Buffer("x", FLOAT32, table * columns)
    which, pick = Buffer("which", INT64, rows), Buffer("pick", INT32, columns)
    y, z = (Buffer(n, FLOAT32, rows * columns) for n in "yz")
    i, j = Axis("i", rows), Axis("j", columns)
    row, column = Local("row", INT64), Local("column", INT32)
    out = index(0, (i, columns), (j, 1))
    inner = (
        Define(column, Read(pick, index(0, (j, 1)))),
        Store(y, out, Read(x, index(0, (row, columns), (j, 1)))),
        Store(z, out, Read(x, index(0, (row, columns), (column, 1)))),
    )
    body = (Define(row, Read(which, index(0, (i, 1)))), Loop(j, inner, (), "vector", None, 2))
    return Program("gather", (x, which, pick, y, z), (), (Phase((i,), body),), symbols(rows, columns, table))


def matmul(m: Dim, n: Dim, k: Dim, rows: int, vectors: int, on: Target) -> Program:
    """relu(a · b + bias), b packed in panels."""
    wide = vectors * on.lanes(FLOAT32)
    panels = dims.ceil_div(n, wide)
    a, b = Buffer("a", FLOAT32, m * k), Buffer("b", FLOAT32, panels * k * wide)
    bias, y = Buffer("bias", FLOAT32, n), Buffer("y", FLOAT32, m * n)
    tile = Buffer("tile", FLOAT32, rows * wide, "tile")
    i, j, r, c = Axis("i", dims.ceil_div(m, rows)), Axis("j", panels), Axis("r", rows), Axis("c", wide)
    tall, broad = Clip(rows, i, m), Clip(wide, j, n)
    total = f32("add", Read(tile, index(0, (r, wide), (c, 1))), Read(bias, index(0, (j, wide), (c, 1))))
    store = Store(y, index(0, (i, n * rows), (r, n), (j, wide), (c, 1)), f32("max", total, number(0)))
    contract = Contract(tile, rows, vectors, a, index(0, (i, k * rows)), k, b, index(0, (j, k * wide)),
                        (ContractLoop(k, 1, wide),), tall)  # fmt: skip
    row = Loop(r, (Loop(c, (store,), (), "vector", broad, vectors),), (), "serial", tall)
    return Program("matmul", (a, b, bias, y), (tile,), (Phase((i, j), (contract, row)),), symbols(m, n, k))


def symbols(*some: Dim) -> tuple[str, ...]:
    return tuple(sorted({name for d in some for name in dims.symbols(d)}))


M, N, K = (dims.symbol(s) for s in "mnk")
SHAPES = [(3, 1), (2, 16), (5, 67), (2, 768), (1, 1000), (0, 8), (4, 0)]
EITHER = pytest.mark.parametrize("symbolic", [False, True])


def given_sizes(symbolic: bool, **sizes: int) -> tuple[list[Dim], dict[str, int]]:
    return ([dims.symbol(s) for s in sizes] if symbolic else list(sizes.values())), sizes


@EVERY
@EITHER
def test_softmax(symbolic: bool, machine_: Target) -> None:
    for m, n in SHAPES if symbolic else SHAPES[2:4]:
        shape, env = given_sizes(symbolic, m=m, n=n)
        program = softmax(shape[0], shape[1])
        x = (np.random.default_rng(0).standard_normal(m * n) * 20).astype(np.float32)
        y = agree(program, {program.buffers[0]: x, program.buffers[1]: np.zeros_like(x)}, env, machine_)
        if n:
            e = np.exp(x.reshape(m, n).astype(np.float64) - x.reshape(m, n).max(1, keepdims=True))
            expected = e / e.sum(1, keepdims=True)
            np.testing.assert_allclose(y[program.buffers[1]].reshape(m, n), expected, rtol=1e-5, atol=1e-30)


@EVERY
@EITHER
def test_layer_norm(symbolic: bool, machine_: Target) -> None:
    for m, n in SHAPES if symbolic else SHAPES[2:4]:
        shape, env = given_sizes(symbolic, m=m, n=n)
        program = layer_norm(shape[0], shape[1])
        rng = np.random.default_rng(0)
        sizes = [m * n, m * n, n, n, m * n]
        arrays = {b: rng.standard_normal(k).astype(np.float32) for b, k in zip(program.buffers, sizes, strict=True)}
        y = agree(program, arrays, env, machine_)[program.buffers[4]]
        x, r, gamma, beta = (arrays[b].astype(np.float64) for b in program.buffers[:4])
        if m and n > 1:
            s = (x + r).reshape(m, n)
            normal = (s - s.mean(1, keepdims=True)) / np.sqrt(s.var(1, keepdims=True) + 1e-5)
            np.testing.assert_allclose(y.reshape(m, n), normal * gamma + beta, rtol=1e-5, atol=1e-5)


@EVERY
@EITHER
def test_movement(symbolic: bool, machine_: Target) -> None:
    m, n = 5, 37
    shape, env = given_sizes(symbolic, m=m, n=n)
    x = np.random.default_rng(0).standard_normal((m, n)).astype(np.float32)
    program = transposed(shape[0], shape[1])
    got = agree(
        program, {program.buffers[0]: x.ravel(), program.buffers[1]: np.zeros(m * n, np.float32)}, env, machine_
    )
    np.testing.assert_array_equal(got[program.buffers[1]].reshape(n, m), x.T)
    program = padded(shape[0], shape[1], 2, 3)
    expected = np.pad(x, (2, 3), constant_values=7)
    blank = np.zeros(expected.size, np.float32)
    got = agree(program, {program.buffers[0]: x.ravel(), program.buffers[1]: blank}, env, machine_)
    np.testing.assert_array_equal(got[program.buffers[1]].reshape(expected.shape), expected)
    shape, env = given_sizes(symbolic, m=4, n=n, k=m)
    program = gathered(shape[0], shape[1], shape[2])
    which, pick = np.array([3, 0, 4, 3]), np.arange(n, dtype=np.int32)[::-1].copy()
    blanks = [np.zeros(4 * n, np.float32) for _ in "yz"]
    arrays = dict(zip(program.buffers, [x.ravel(), which, pick, *blanks], strict=True))
    got = agree(program, arrays, env, machine_)
    np.testing.assert_array_equal(got[program.buffers[3]].reshape(4, n), x[which])
    np.testing.assert_array_equal(got[program.buffers[4]].reshape(4, n), x[which][:, ::-1])


@EVERY
@EITHER
def test_matmul(symbolic: bool, machine_: Target) -> None:
    rows, vectors = (14, 2) if machine_.vector_registers == 32 else (6, 2)
    wide = vectors * machine_.lanes(FLOAT32)
    for m, n, k in [(29, 50, 33), (rows, wide, 8), (1, 7, 3), (5, 3, 0), (2, 5, 1300)]:
        shape, env = given_sizes(symbolic, m=m, n=n, k=k)
        program = matmul(shape[0], shape[1], shape[2], rows, vectors, machine_)
        rng = np.random.default_rng(0)
        a, b, bias = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n), n))
        panels = np.pad(b, ((0, 0), (0, -n % wide))).reshape(k, -(-n // wide), wide).transpose(1, 0, 2)
        values = [a.ravel(), np.ascontiguousarray(panels).ravel(), bias, np.zeros(m * n, np.float32)]
        got = agree(program, dict(zip(program.buffers, values, strict=True)), env, machine_)
        expected = np.maximum(a.astype(np.float64) @ b + bias, 0)
        np.testing.assert_allclose(got[program.buffers[3]].reshape(m, n), expected, rtol=1e-5, atol=1e-5)


@EVERY
@EITHER
def test_long_sums(symbolic: bool, machine_: Target) -> None:
    """More terms for each accumulator than a block has: one after the other, in lanes, and beside a fold of another
    kind."""
    for n in (1023, 1024, 1025, 2600, 70_001):
        shape, env = given_sizes(symbolic, n=n)
        x, y = Buffer("x", FLOAT32, shape[0]), Buffer("y", FLOAT32, 4)
        x, y = Buffer("x", FLOAT32, shape[0]), Buffer("y", FLOAT32, 2)
        i, total, top = Axis("i", shape[0]), Local("sum", FLOAT32), Local("max", FLOAT32)
        term = Read(x, index(0, (i, 1)))
        folds = (Fold(total, "add", f32("mul", term, term)), Fold(top, "max", term))
        loop = Loop(i, (), folds, "serial", None, 1) if n < 3000 else Loop(i, (), folds, "vector", None, 2)
        body = (loop, Store(y, index(0), Use(total)), Store(y, index(1), Use(top)))
        program = Program("sums", (x, y), (), (Phase((), body),), symbols(shape[0]))
        given = np.random.default_rng(n).random(n, np.float32)
        got = agree(program, {x: given, y: np.zeros(2, np.float32)}, env, machine_)[y]
        exact = np.square(given.astype(np.float64)).sum()
        np.testing.assert_allclose(got, [exact, given.max()], rtol=2e-6)


# ------------------------------------------------------------------ the code itself


def innermost(text: str) -> list[list[str]]:
    """The instructions of each loop that holds no other, from x86 assembly."""
    code: list[str] = []
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.?\w[\w.]*):", line):
            labels[label[1]] = len(code)
        elif re.match(r"\t[a-z]", line):
            code.append(line.strip())
            jump = re.match(r"j\w+\s+(\.?\w[\w.]*)", code[-1])
            if jump and jump[1] in labels:
                found.append((labels[jump[1]], len(code)))
    inner = [(a, b) for a, b in found if not any((a, b) != (c, d) and a <= c and d <= b for c, d in found)]
    return [code[a:b] for a, b in inner]


@pytest.mark.parametrize(
    ("program", "lengths"),
    [(layer_norm(1024, 768), (19, 15, 27)), (softmax(1024, 1024), (19, 110, 11))],
    ids=["layer_norm", "softmax"],
)
def test_hot_loops(program: Program, lengths: tuple[int, ...]) -> None:
    """Four full vectors a step, nothing spilled, and no more instructions than it takes."""
    on = target.parse("avx512")
    found = innermost(machine.assembly(llvm.module([llvm.emit(program, on)]), on))
    assert len(found) == len(lengths)
    for loop, most in zip(found, lengths, strict=True):
        assert len(loop) <= most, "\n".join(loop)
        assert sum("zmm" in x for x in loop) >= len(loop) - 3
        assert not any("rsp" in x or "rbp" in x for x in loop), "\n".join(loop)


@pytest.mark.parametrize("name", list(target.NAMES))
def test_assembly_for_every_target(name: str) -> None:
    on = target.parse(name)
    programs = [softmax(M, N), layer_norm(M, N), transposed(M, N), padded(M, N, 1, 1), gathered(M, N, K),
                matmul(M, N, K, 4, 2, on)]  # fmt: skip
    text = llvm.module(llvm.emit(p, on) for p in programs)
    code = machine.assembly(text, on)
    called = set(re.findall(r"\t(?:callq?|bl|jmp)\t([a-zA-Z_]\w*)(?:@PLT)?$", code, re.M))
    assert not called, "no library is needed"
    assert all(f"{p.name}.0:" in code for p in programs)


def test_lanes() -> None:
    axis = Axis("i", 8)
    at = index(0, (axis, 1))
    on = target.parse("avx512")

    def copy(*kinds: np.dtype) -> Loop:
        buffers = [Buffer("x", d, 8) for d in kinds]
        return Loop(axis, tuple(Store(b, at, Read(b, at)) for b in buffers), (), "vector")

    rule = {(FLOAT32,): 16, (FLOAT64,): 8, (FLOAT32, INT64): 16, (UINT8,): 64, (UINT8, FLOAT16): 16, (INT64, BOOL): 8}
    assert {kinds: lanes_of(copy(*kinds), on) for kinds in rule} == rule


def test_invariants_leave_loops() -> None:
    """A scalar read, its function and its splat are outside both loops that do not change it."""
    i, j = Axis("i", 100), Axis("j", 160)
    x, y = Buffer("x", FLOAT32, 1), Buffer("y", FLOAT32, 16000)
    value = f32("exp", Read(x, Index()))
    row = Loop(j, (Store(y, index(0, (i, 160), (j, 1)), value),), (), "vector")
    text = llvm.emit(Program("p", (x, y), (), (Phase((), (Loop(i, (row,)),)),)), target.parse("avx512")).text
    inner = text[text.rindex("phi i64") :]
    assert "fma" in text
    assert not re.search("fma|load|splat|shufflevector", inner[: inner.index("br i1")])


def test_interpreter_is_strict() -> None:
    i = Axis("i", 4)
    x, y, t = Buffer("x", FLOAT32, 3), Buffer("y", FLOAT32, 4), Buffer("t", FLOAT32, 4, "tile")

    def run(store: Store) -> None:
        program = Program("p", (x, y), (t,), (Phase((), (Loop(i, (store,), (), "vector"),)),))
        interp.run(program, {x: np.zeros(3, np.float32), y: np.zeros(4, np.float32)}, {}, HOST)

    at = index(0, (i, 1))
    with pytest.raises(interp.Fault, match=r"x\[3\] of 3"):
        run(Store(y, at, Read(x, at)))
    with pytest.raises(interp.Fault, match="before it is stored"):
        run(Store(y, at, Read(t, at)))
    with pytest.raises(interp.Fault, match="stored twice"):
        run(Store(y, Index(), number(0)))
    with pytest.raises(interp.Fault, match="a store to y"):
        run(Store(y, at.plus(1), number(0)))
    run(Store(y, at, Guarded((Bound(at, 3),), Read(x, at), Literal(math.inf, FLOAT32))))


@pytest.mark.parametrize("dtype", [dtypes.BFLOAT16, dtypes.FLOAT16, dtypes.UINT8, dtypes.INT16, dtypes.BOOL], ids=str)
@pytest.mark.parametrize("step", [1, -1])
def test_one_lane_of_a_narrow_type_is_stored_alone(dtype: np.dtype, step: int) -> None:
    """LLVM 22 stores the wide element where a masked store has one constant lane of a truncated vector."""
    task, lane = Axis("p", 3), Axis("v", 1)
    x, y = Buffer("x", dtypes.FLOAT32, 2), Buffer("y", dtype, 3)
    value = Apply("cast", (Read(x, index(0, (lane, 1))),), dtypes.compute(dtype))
    store = Store(y, index(2, (lane, step), (task, -1)), value)
    program = Program("one", (x, y), (), (Phase((task,), (Loop(lane, (store,), mode="vector"),)),))
    for on in RUNNABLE:
        agree(program, {x: np.array([1.5, 3.0], np.float32), y: np.zeros(3, dtype)}, {}, on)
