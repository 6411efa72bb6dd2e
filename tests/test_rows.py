"""Short rows: several in a task, NaN marked beside the largest number, positions in 32 bits, bytes looked up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims, target
from stitch.access import Axis, index, of
from stitch.codegen import abreast, kernels, narrowing
from stitch.codegen.loop_rules import check
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Define,
    Fold,
    Literal,
    Local,
    Lookup,
    Loop,
    Phase,
    Position,
    Program,
    Read,
    Store,
    Use,
    children,
    expressions,
    walk,
)
from stitch.dtypes import BFLOAT16, BOOL, FLOAT32, INT8, INT32, INT64, UINT8
from stitch.evaluate import evaluate
from stitch.graph import Builder, Graph, Value
from stitch.stitching.trace import Flow
from stitch.target import Target
from tests import pipeline
from tests.test_llvm import agree

Array = npt.NDArray[Any]
HOST = pipeline.host()
RUNNABLE = [HOST, *(t for t in map(target.parse, ("avx2", "sse2")) if HOST.is_x86 and HOST.has("avx2"))]
EVERY = pytest.mark.parametrize("on", RUNNABLE, ids=lambda t: f"{t.vector_bits}")
WIDE = target.parse("avx512")
BYTES = replace(WIDE, features=(*WIDE.features, "+avx512vbmi"))


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def lowered(graph: Graph, on: Target = WIDE) -> Program:
    stitched = pipeline.cut(graph)
    (kernel,) = stitched.kernels
    return kernels.lower(kernel, Flow(stitched.graph), on).program


def softmax(rows: dims.Dim, columns: int) -> Graph:
    b = Builder("softmax")
    x = b.input("x", FLOAT32, (rows, columns))
    e = b.elementwise("exp", b.sub(x, b.reduce("reduce_max", x, [1], keepdims=True)))
    return b.finish({"y": b.div(e, b.reduce("reduce_sum", e, [1], keepdims=True))})


# ------------------------------------------------------------------ rows side by side


@pytest.mark.parametrize(
    ("rows", "columns", "together"),
    [
        (64, 64, 4),
        (62, 64, 2),
        (63, 64, 1),
        (64, 256, 2),
        (64, 4096, 1),
        (16, 64, 1),
        (dims.symbol("n"), 64, 1),
        (1 << 20, 64, 1),
    ],
)
def test_how_many_rows_are_a_task(rows: dims.Dim, columns: int, together: int) -> None:
    (phase,) = lowered(softmax(rows, columns)).phases
    assert [len(s.folds) for s in phase.body if isinstance(s, Loop)] == [together, together, 0]
    assert phase.tasks * together == rows


def test_rows_have_tiles_of_their_own() -> None:
    program = lowered(softmax(64, 64))
    assert len(program.tiles) == 4
    stored = [s.buffer for s in walk(program.phases[0].body) if isinstance(s, Store) and s.buffer.space == "tile"]
    assert set(stored) == set(program.tiles)
    assert len(stored) == 4


def test_an_index_that_was_loaded_for_a_row() -> None:
    """Each row gathers at its own."""
    x, at, y = Buffer("x", FLOAT32, 1024), Buffer("at", INT64, 32), Buffer("y", FLOAT32, 32)
    i, j, local, total = Axis("i", 32), Axis("j", 32), Local("ix", INT64), Local("sum", FLOAT32)
    loop = Loop(j, (), (Fold(total, "add", Read(x, index(0, (local, 32), (j, 1)))),), "vector", None, 4)
    body = (Define(local, Read(at, of(i))), loop, Store(y, of(i), Use(total)))
    phase, _ = abreast.abreast(Phase((i,), body), WIDE)
    assert phase.axes[0].extent == 16
    rng = np.random.default_rng(3)
    arrays: dict[Buffer, Array] = {
        x: rng.standard_normal(1024, np.float32),
        at: rng.permutation(32),
        y: np.zeros(32, np.float32),
    }
    out = agree(Program("rows", (x, at, y), (), (phase,)), arrays, {}, HOST)[y]
    np.testing.assert_allclose(out, arrays[x].reshape(32, 32)[arrays[at]].sum(1), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([32, 34, 64, 96]), st.integers(1, 300), st.sampled_from(RUNNABLE))
def test_no_bit_changes(rows: int, columns: int, on: Target) -> None:
    """With one row for each task, and on any number of threads."""
    x = np.random.default_rng(columns).standard_normal((rows, columns), np.float32)
    graph = softmax(rows, columns)
    together = pipeline.compile(graph, target=on)
    with mock.patch.object(abreast, "abreast", lambda phase, target: (phase, ())):
        alone = pipeline.compile(graph, target=on)
    got = [pipeline.run(together, {"x": x}, threads=threads) for threads in (1, 2)]
    want = pipeline.run(alone, {"x": x})
    assert pipeline.same_bits(got[0], want)
    assert pipeline.same_bits(got[1], want)
    np.testing.assert_allclose(want[0], evaluate(graph, {"x": x})[0], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------ NaN beside the largest


@EVERY
@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 48, 64, 80, 127, 128, 200])
@pytest.mark.parametrize("open_", [False, True])
def test_nan_wins_wherever_it_is(op: str, n: int, open_: bool, on: Target) -> None:
    b = Builder()
    x = b.input("x", FLOAT32, (dims.symbol("r"), dims.symbol("c")) if open_ else (n + 1, n))
    artifact = pipeline.compile(b.finish({"y": b.reduce(f"reduce_{op}", x, [1])}), target=on)
    rows = np.random.default_rng(n).standard_normal((n + 1, n), np.float32)
    rows[np.arange(n), np.arange(n)] = np.nan  # each row but the last has one, each at its own place
    rows[n, n // 2] = np.inf if op == "min" else -np.inf
    (y,) = pipeline.run(artifact, {"x": rows})
    assert np.isnan(y[:n]).all()
    assert y[n] == (rows[n].max() if op == "max" else rows[n].min())


@EVERY
def test_a_row_of_the_lowest_number(on: Target) -> None:
    x = np.full((32, 40), -np.inf, np.float32)
    b = Builder()
    graph = b.finish({"y": b.reduce("reduce_max", b.input("x", FLOAT32, x.shape), [1])})
    assert (pipeline.run(pipeline.compile(graph, target=on), {"x": x})[0] == -np.inf).all()


# ------------------------------------------------------------------ positions in 32 bits


def counted(phase: Phase) -> set[np.dtype]:
    """The types of what loops fold."""
    return {f.local.dtype for s in walk(phase.body) if isinstance(s, Loop) for f in s.folds}


def positions(n: dims.Dim, offset: int, op: Any = "min") -> tuple[Phase, Buffer, Buffer]:
    """The first place at which x is true, or n; plus an offset."""
    x, y = Buffer("x", BOOL, n), Buffer("y", INT64, 1)
    j, local = Axis("j", n), Local("first", INT64)
    value = Apply("where", (Read(x, of(j)), Position(index(offset, (j, 1))), Position(index(n))), INT64)
    loop = Loop(j, (), (Fold(local, op, value),), "vector", None, 4)
    return Phase((), (loop, Store(y, index(0), Use(local)))), x, y


@pytest.mark.parametrize(
    ("n", "offset", "op", "dtype"),
    [(100, 0, "min", INT32), (100, 0, "max", INT32), (100, 0, "add", INT64), (100, 2**31 - 99, "min", INT64),
     (100, 2**31 - 100, "min", INT32), (0, 0, "min", INT64), (dims.symbol("n"), 0, "min", INT64)],
)  # fmt: skip
def test_what_is_counted_in_32_bits(n: dims.Dim, offset: int, op: str, dtype: np.dtype) -> None:
    phase, _, _ = positions(n, offset, op)
    assert counted(narrowing.narrowed(phase)) == {dtype}


@EVERY
@pytest.mark.parametrize("offset", [0, 5, -7, 2**31 - 100, -(2**31)])
def test_places_are_the_same(offset: int, on: Target) -> None:
    phase, x, y = positions(100, offset)
    arrays = {x: np.arange(100) % 37 == 36, y: np.zeros(1, np.int64)}
    got = agree(Program("first", (x, y), (), (narrowing.narrowed(phase),)), arrays, {}, on)[y]
    assert got[0] == min(36 + offset, 100)


def test_a_local_of_two_loops_stays_as_it_is() -> None:
    """What the one loop leaves is the other's where that does not run."""
    phase, _, _ = positions(100, 0)
    loop = phase.body[0]
    assert isinstance(loop, Loop)
    both = replace(phase, body=(loop, replace(loop, axis=loop.axis), *phase.body[1:]))
    assert counted(narrowing.narrowed(both)) == {INT64}


def test_what_comes_from_memory_is_not_known() -> None:
    x, y, j, local = Buffer("x", INT64, 64), Buffer("y", INT64, 1), Axis("j", 64), Local("m", INT64)
    value = Apply("min", (Read(x, of(j)), Literal(3, INT64)), INT64)
    phase = Phase((), (Loop(j, (), (Fold(local, "min", value),), "vector"), Store(y, index(0), Use(local))))
    assert counted(narrowing.narrowed(phase)) == {INT64}


# ------------------------------------------------------------------ bytes looked up


def swish(b: Builder, x: Value, dtype: np.dtype = INT8) -> Value:
    real = b.mul(b.sub(b.cast(x, FLOAT32), 3.0), 0.05)
    y = b.add(b.unary("rint", b.div(b.mul(real, b.elementwise("sigmoid", real)), 0.04)), -20.0)
    return b.cast(b.min(b.max(y, -128.0), 127.0), dtype)


def tables(program: Program) -> int:
    stack = [e for p in program.phases for s in walk(p.body) for e in expressions(s)]
    seen = set()
    while stack:
        e = stack.pop()
        seen.add(e)
        stack += children(e)
    return sum(isinstance(e, Lookup) for e in seen)


@pytest.mark.parametrize(("on", "found"), [(BYTES, 1), (WIDE, 0), (target.parse("neon"), 0)], ids=str)
def test_where_bytes_are_looked_up(on: Target, found: int) -> None:
    b = Builder()
    assert tables(lowered(b.finish({"y": swish(b, b.input("x", INT8, (1000,)))}), on)) == found


def test_what_is_no_function_of_one_byte() -> None:
    b = Builder()
    x, y = b.input("x", INT8, (1000,)), b.input("y", FLOAT32, (1000,))
    assert tables(lowered(b.finish({"y": b.cast(b.add(swish(b, x, FLOAT32), y), INT8)}), BYTES)) == 0
    b = Builder()
    x = b.input("x", INT8, (1000,))
    cheap = b.max(b.add(x, 3), 0)
    assert tables(lowered(b.finish({"y": cheap}), BYTES)) == 0


def test_functions_of_two_bytes() -> None:
    """Of neighbours, too: their places are not the same."""
    b = Builder()
    x = b.input("x", INT8, (1001,))
    left, right = (b.cast(b.slice(x, [k], [1000]), FLOAT32) for k in (0, 1))
    both = b.elementwise("sigmoid", b.mul(left, right))
    program = lowered(b.finish({"y": b.cast(b.mul(both, 100.0), INT8)}), BYTES)
    assert tables(program) == 0


@EVERY
@pytest.mark.parametrize("dtype", [INT8, UINT8], ids=str)
@pytest.mark.parametrize("n", [256, 1, 63, 64, 100, 4096])
def test_all_bytes(n: int, dtype: np.dtype, on: Target) -> None:
    x = np.resize(np.arange(256, dtype=np.uint8).view(dtype), n)
    b = Builder()
    graph = b.finish({"y": swish(b, b.input("x", dtype, (n,)))})
    (want,) = evaluate(graph, {"x": x})
    (got,) = pipeline.run(pipeline.compile(graph, target=on), {"x": x})
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", ["vector", "serial"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside floats"])
def test_lookups_run_as_the_interpreter_says(mode: Any, beside: bool) -> None:
    if not (HOST.is_x86 and HOST.has("avx512vbmi")):
        pytest.skip("no instruction for it")
    rng = np.random.default_rng(5)
    table = tuple(map(int, rng.integers(0, 256, 256)))
    x, y, z = Buffer("x", INT8, 777), Buffer("y", UINT8, 777), Buffer("z", FLOAT32, 777)
    i = Axis("i", 777)
    found = Lookup(table, Read(x, of(i)), UINT8)
    stores = [Store(y, of(i), found), Store(z, of(i), Apply("cast", (found,), FLOAT32))][: 1 + beside]
    program = Program("t", (x, y, z), (), (Phase((), (Loop(i, tuple(stores), (), mode, None, 4),)),))
    check(program)
    arrays: dict[Buffer, Array] = {x: rng.integers(-128, 128, 777).astype(np.int8), y: np.zeros(777, np.uint8)}
    arrays[z] = np.zeros(777, np.float32)
    out = agree(program, arrays, {}, HOST)
    np.testing.assert_array_equal(out[y], np.array(table, np.uint8)[arrays[x].view(np.uint8)])


def test_a_table_is_worth_more_tasks_at_a_time() -> None:
    b = Builder()
    graph = b.finish({"y": swish(b, b.input("x", INT8, (1 << 20,)))})
    plain, quick = (lowered(graph, on).phases[0].grain for on in (WIDE, BYTES))
    assert isinstance(plain, int)
    assert isinstance(quick, int)
    assert quick > 4 * plain


# ------------------------------------------------------------------ bfloat16


@EVERY
@pytest.mark.parametrize("n", [16, 32, 48, 64, 65536 + 21])
def test_subnormals_are_rounded_too(n: int, on: Target) -> None:
    """Among normal numbers, in any lane: the instruction alone would make zeros of them."""
    rng = np.random.default_rng(n)
    x = rng.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
    x[rng.integers(0, n, n // 8)] &= 0x807FFFFF
    values = x.view(np.float32)
    b = Builder()
    graph = b.finish({"y": b.cast(b.unary("neg", b.input("x", FLOAT32, (n,))), BFLOAT16)})
    (got,) = pipeline.run(pipeline.compile(graph, target=on), {"x": values})
    (want,) = evaluate(graph, {"x": values})
    nan = np.isnan(values)
    assert np.isnan(got[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])
