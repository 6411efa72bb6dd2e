"""Transposes: the statement against the interpreter, and its functions on memory that ends where the matrices do."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as binding
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import dims, target
from stitch.access import Axis, Index, index
from stitch.codegen import interp, machine
from stitch.codegen.kernels import symbols
from stitch.codegen.loop_rules import check
from stitch.codegen.loop_text import render
from stitch.codegen.loops import (
    Buffer,
    Clip,
    Literal,
    Loop,
    Phase,
    Program,
    Read,
    Stmt,
    Store,
    Transpose,
)
from stitch.codegen.transpose import DENSE, transpose_kernel
from stitch.dims import Dim
from stitch.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, INT8, INT64, UINT8
from stitch.target import Target
from tests.programs import data
from tests.test_llvm import RUNNABLE, agree, jit

Array = npt.NDArray[Any]
SIZES = (1, 2, 4, 8)
OF_SIZE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES = (UINT8, INT8, BOOL, FLOAT16, BFLOAT16, FLOAT32, INT64, FLOAT64)

PLAIN = target.parse("avx512")  # without the instructions that came later
ON = [*RUNNABLE, *([PLAIN] if all(RUNNABLE[0].has(f[1:]) for f in PLAIN.features) else [])]

# ------------------------------------------------------------------ the functions

numbers = itertools.count()


@cache
def compiled(on: Target, text: str, name: str) -> tuple[object, Callable[..., None]]:
    builder = binding.JITLibraryBuilder().add_object_img(machine.compile(text, on)).export_symbol(name)
    library = builder.link(jit(), f"transpose{next(numbers)}")
    return library, ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(library[name])


def function(on: Target, size: int, *known: int | None) -> Callable[..., None]:
    kernels: dict[str, str] = {}
    name = transpose_kernel(kernels, on, size, *known)
    assert list(kernels) == [name]
    return compiled(on, kernels[name].replace("define internal", "define"), name)[1]


class Fenced:
    """Memory between two pages that must not be touched."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        self.room = -(-size // page) * page
        self.map = mmap.mmap(-1, self.room + 2 * page)
        self.bytes = np.frombuffer(self.map, np.uint8)
        start = self.bytes.ctypes.data
        protect = ctypes.CDLL(None).mprotect
        for at in (start, start + page + self.room):
            assert protect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0) == 0

    def array(self, count: int, size: int, last: bool) -> Array:
        """Elements at the end of it, or at the start."""
        start = mmap.PAGESIZE + (self.room - count * size if last else 0)
        return self.bytes[start : start + count * size].view(OF_SIZE[size])


SOURCE, TO = Fenced(160 * 160 * 8), Fenced(160 * 160 * 8)


def transposes(on: Target, size: int, rows: int, columns: int, more: tuple[int, int], known: int, last: bool) -> None:
    """Runs a function that is told what the bits of `known` say."""
    to_step, step = columns + more[0], rows + more[1]
    given = (to_step, step, rows, columns)
    run = function(on, size, *(n if known >> k & 1 else None for k, n in enumerate(given)))
    inside = min(rows, columns) > 0
    source = SOURCE.array((columns - 1) * step + rows if inside else 0, size, last)
    to = TO.array((rows - 1) * to_step + columns if inside else 0, size, last)
    random = np.random.default_rng(abs(rows) * 71 + abs(columns))
    source[:] = random.integers(0, 1 << 8 * size, source.size, OF_SIZE[size])
    to[:] = 77
    expected = to.copy()
    for i in range(rows if inside else 0):
        expected[i * to_step : i * to_step + columns] = source[i : i + (columns - 1) * step + 1 : step]
    run(to.ctypes.data, to_step, source.ctypes.data, step, rows, columns)
    np.testing.assert_array_equal(to, expected, err_msg=f"{on.vector_bits} {size} {given} {known:04b}")


@settings(max_examples=400)
@given(
    st.sampled_from(ON),
    st.sampled_from(SIZES),
    st.integers(-1, 70),
    st.integers(-1, 70),
    st.tuples(st.sampled_from((0, 0, 1, 5)), st.sampled_from((0, 0, 1, 5))),
    st.sampled_from((0, 0, 0b0001, 0b0010, 0b0100, 0b1000, 0b1100, 0b1111)),
    st.booleans(),
)
def test_functions(
    on: Target, size: int, rows: int, columns: int, more: tuple[int, int], known: int, last: bool
) -> None:
    transposes(on, size, rows, columns, more, known, last)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("on", ON, ids=lambda t: f"{t.vector_bits}.{t.cpu}")
def test_edges(on: Target, size: int) -> None:
    """Sizes beside those of blocks, each with each."""
    beside = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130)
    for rows, columns in itertools.product(beside, beside):
        transposes(on, size, rows, columns, (0, 0), 0, True)
    for n, known in itertools.product(range(1, 20), (0b0100, 0b1000)):
        transposes(on, size, n if known == 0b0100 else 40, n if known == 0b1000 else 40, (1, 1), known, False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("on", ON, ids=lambda t: f"{t.vector_bits}.{t.cpu}")
def test_dense(on: Target, size: int) -> None:
    for few, many in itertools.product(range(1, DENSE + 2), (0, 1, 2, 5, 15, 16, 17, 40, 64, 70, 130)):
        transposes(on, size, few, many, (3, 0), 0b0110, True)
        transposes(on, size, few, many, (3, 0), 0b0110, False)
        transposes(on, size, many, few, (0, 3), 0b1001, True)
        transposes(on, size, many, few, (0, 3), 0b1001, False)


def instructions(on: Target, size: int, *known: int | None) -> Counter[str]:
    kernels: dict[str, str] = {}
    transpose_kernel(kernels, on, size, *known)
    text = machine.assembly("".join(kernels.values()).replace("define internal", "define"), on)
    return Counter(re.findall(r"^\t([a-z]\w*)", text, re.MULTILINE))


def test_instructions() -> None:
    """What a block is made of: nothing else is moved."""
    wide = instructions(target.parse("avx512"), 4, None, None, 64, 64)
    assert wide["vmovdqu64"] + wide["vmovups"] == 32, "no spills"
    assert sum(n for name, n in wide.items() if re.match("vpunpck|vunpck|vshuf", name)) == 64
    assert not any(name.startswith("vperm") for name in wide)
    pixels = instructions(target.parse("neon"), 1, None, 3, 3, None)
    assert pixels["ld3"]
    assert instructions(target.parse("neon"), 1, 3, None, None, 3)["st3"]
    assert instructions(target.parse("neon"), 4, None, None, 64, 64)["zip2"] == 4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", target.NAMES)
def test_every_target_is_compiled(name: str, size: int) -> None:
    for known in ((None,) * 4, (None, None, 7, 100), (None, 3, 3, None), (8, None, None, 8), (None, None, 0, 5)):
        assert instructions(target.parse(name), size, *known)["ret" if name == "neon" else "retq"] == 1


# ------------------------------------------------------------------ the statement


def tiled(dtype: np.dtype, m: Dim, n: Dim, block: tuple[int, int], staged: bool) -> Program:
    """y[n, m] = x[m, n] transposed in blocks, straight or by way of a tile."""
    tall, broad = block
    x, y, tile = Buffer("x", dtype, m * n), Buffer("y", dtype, m * n), Buffer("t", dtype, tall * broad, "tile")
    i, j = Axis("i", dims.ceil_div(n, tall)), Axis("j", dims.ceil_div(m, broad))
    rows, columns = Axis("rows", tall), Axis("columns", broad)
    high, wide = Clip(tall, i, n), Clip(broad, j, m)
    source, to = index(0, (j, n * broad), (i, tall)), index(0, (i, m * tall), (j, broad))
    body: tuple[Stmt, ...]
    if staged:
        a, b = Axis("a", tall), Axis("b", broad)
        copy = Store(y, index(0, (i, m * tall), (a, m), (j, broad), (b, 1)), Read(tile, index(0, (a, broad), (b, 1))))
        body = (
            Transpose(tile, Index(), broad, x, source, n, rows, columns, high, wide),
            Loop(a, (Loop(b, (copy,), (), "vector", wide),), (), "serial", high),
        )
    else:
        body = (Transpose(y, to, m, x, source, n, rows, columns, high, wide),)
    phase = Phase((i, j), body)
    return Program("k", (x, y), (tile,) if staged else (), (phase,), symbols([phase], (x, y, tile)))


@settings(max_examples=60)
@given(
    st.sampled_from(ON),
    st.sampled_from(DTYPES),
    st.integers(0, 70),
    st.integers(0, 70),
    st.sampled_from(((64, 64), (16, 64), (10, 20), (3, 33))),
    st.booleans(),
    st.booleans(),
)
def test_programs(
    on: Target, dtype: np.dtype, m: int, n: int, block: tuple[int, int], symbolic: bool, staged: bool
) -> None:
    high, wide = (dims.symbol("m"), dims.symbol("n")) if symbolic else (m, n)
    program = tiled(dtype, high, wide, block, staged)
    x, y = program.buffers
    values = data(dtype, m * n, np.random.default_rng(m * n))
    found = agree(program, {x: values, y: np.zeros(m * n, dtype)}, {"m": m, "n": n}, on)
    expected = values.reshape(m, n).T.ravel()
    if not staged:  # the bits of NaNs too
        np.testing.assert_array_equal(found[y].view(np.uint8), expected.copy().view(np.uint8))


def test_a_transpose_is_a_store() -> None:
    """What was read from the destination before is read again."""
    x, y, tile = Buffer("x", FLOAT32, 12), Buffer("y", FLOAT32, 24), Buffer("t", FLOAT32, 12, "tile")
    a, b, c = (Axis(k, 12) for k in "abc")
    body: tuple[Stmt, ...] = (
        Loop(a, (Store(tile, index(0, (a, 1)), Literal(1, FLOAT32)),), (), "vector"),
        Loop(b, (Store(y, index(0, (b, 1)), Read(tile, index(0, (b, 1)))),), (), "vector"),
        Transpose(tile, Index(), 4, x, Index(), 3, Axis("r", 3), Axis("c", 4)),
        Loop(c, (Store(y, index(12, (c, 1)), Read(tile, index(0, (c, 1)))),), (), "vector"),
    )
    program = Program("again", (x, y), (tile,), (Phase((), body),))
    values = np.arange(12, dtype=np.float32)
    for on in RUNNABLE:
        found = agree(program, {x: values, y: np.zeros(24, np.float32)}, {}, on)
        np.testing.assert_array_equal(found[y][12:], values.reshape(4, 3).T.ravel())


# ------------------------------------------------------------------ what must not be


def of(to: Buffer, source: Buffer, to_step: Dim = 3, **changed: Any) -> Program:
    parts: dict[str, Any] = {"to_index": Index(), "index": Index(), "step": 2} | changed
    one = Transpose(to=to, source=source, to_step=to_step, rows=Axis("r", 2), columns=Axis("c", 3), **parts)
    tiles = tuple(b for b in (to, source) if b.space == "tile")
    return Program("k", tuple(b for b in (to, source) if b not in tiles), tiles, (Phase((), (one,)),))


X, Y = Buffer("x", FLOAT32, 6), Buffer("y", FLOAT32, 6)


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (of(Y, X, index=Index(1)), r"x\[6\] of 6"),
        (of(Y, X, index=Index(-1)), r"x\[-1\] of 6"),
        (of(Y, X, to_step=4), r"a store to y\[0..6\] of 6"),
        (of(Y, X, to_step=2), "stored twice"),
        (of(Y, Buffer("t", FLOAT32, 6, "tile")), "read before it is stored"),
    ],
)
def test_faults(program: Program, complaint: str) -> None:
    check(program)
    with pytest.raises(interp.Fault, match=complaint):
        interp.run(program, {b: np.zeros(6, np.float32) for b in program.buffers}, {}, RUNNABLE[0])


def test_checks() -> None:
    elsewhere = Axis("e", 1)
    with pytest.raises(AssertionError, match=r"y: transpose of float64"):
        check(of(Y, Buffer("x", FLOAT64, 6)))
    with pytest.raises(AssertionError, match="x is transposed into itself"):
        check(of(X, X))
    with pytest.raises(AssertionError, match="which is not in scope"):
        check(of(Y, X, index=index(0, (elsewhere, 1))))
    with pytest.raises(AssertionError, match="which is not in scope"):
        check(of(Y, X, to_index=index(0, (elsewhere, 1))))
    with pytest.raises(AssertionError, match="a clip by"):
        check(of(Y, X, column_clip=Clip(3, elsewhere, 3)))
    with pytest.raises(AssertionError):
        check(Program("k", (X,), (), of(Y, X).phases))
    loop = Loop(Axis("v", 1), of(Y, X).phases[0].body, (), "vector")
    with pytest.raises(AssertionError, match="inside a vector loop"):
        check(Program("k", (X, Y), (), (Phase((), (loop,)),)))


def test_text() -> None:
    assert render(tiled(FLOAT32, dims.symbol("m"), 20, (16, 64), False)) == (
        "program k(x: float32[20*m], y: float32[20*m])\n"
        "  parallel (i < 2, j < (m + 63) // 64) grain 1\n"
        "    y[(16*m)*i + (64)*j + m*row + column] := x[(1280)*j + (16)*i + 20*column + row]"
        " over min(16, 20 - 16*i), min(64, m - 64*j)\n"
    )
