"""Epilogues on registers: what they store is what the loop behind the contraction would have stored, bit for bit, in
whole tiles and in those that are cut off, on every instruction set; and what is too much for registers stays a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stitch import dims
from stitch.access import Axis, Index, index
from stitch.codegen import emit_endings as endings
from stitch.codegen import llvm
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Clip,
    Contract,
    ContractLoop,
    Expr,
    Literal,
    Loop,
    Phase,
    Program,
    Read,
    Stmt,
    Store,
)
from stitch.dims import Dim
from stitch.dtypes import FLOAT32
from stitch.target import Target
from tests.test_llvm import EVERY, RUNNABLE, agree


def f32(prim: str, *args: Expr) -> Expr:
    return Apply(prim, args, FLOAT32)


def number(x: float) -> Expr:
    return Literal(x, FLOAT32)


Work = Callable[[Expr, Expr, Expr, Expr], Expr]  # of a result, its column's number, its row's, and another matrix's
WORK: dict[str, Work] = {
    "bias": lambda r, column, row, other: f32("add", r, column),
    "relu": lambda r, column, row, other: f32("max", f32("add", r, column), number(0)),
    "clip and add": lambda r, column, row, other: f32("add", other, f32("min", f32("max", r, number(-1)), number(1))),
    "hard swish": lambda r, column, row, other: f32(
        "mul", r, f32("min", f32("max", f32("add", f32("mul", r, number(0.2)), column), number(0)), number(1))
    ),
    "rows": lambda r, column, row, other: f32("add", f32("mul", f32("sub", r, row), column), other),
    "nothing of it": lambda r, column, row, other: f32("mul", row, column),
    "swish": lambda r, column, row, other: f32("mul", r, f32("sigmoid", f32("add", r, column))),
}


@dataclass(frozen=True)
class Product:
    """C = work(a · b) for rows and columns of which the last tiles are cut off, or which are one tile."""

    rows: int
    columns: int
    terms: int
    height: int
    vectors: int
    work: tuple[str, ...]
    is_open: bool = False

    def program(self, on: Target) -> Program:
        wide = self.vectors * on.lanes(FLOAT32)
        m: Dim = dims.symbol("m") if self.is_open else self.rows
        n, k, height = self.columns, self.terms, self.height
        panels, single = -(-n // wide), n <= wide
        a, b = Buffer("a", FLOAT32, m * k), Buffer("b", FLOAT32, panels * k * wide)
        column, row, other = Buffer("column", FLOAT32, n), Buffer("row", FLOAT32, m), Buffer("other", FLOAT32, m * n)
        results = [Buffer(f"y{i}", FLOAT32, m * n) for i in range(len(self.work))]
        tile = Buffer("tile", FLOAT32, height * wide, "tile")
        i, j, r = Axis("i", dims.ceil_div(m, height)), Axis("j", panels), Axis("r", height)
        c = Axis("c", n if single else wide)
        at = index(0, (i, height * n), (r, n), (j, wide), (c, 1))
        reads = (
            Read(tile, index(0, (r, wide), (c, 1))),
            Read(column, index(0, (j, wide), (c, 1))),
            Read(row, index(0, (i, height), (r, 1))),
            Read(other, at),
        )
        stores = tuple(Store(y, at, WORK[w](*reads)) for y, w in zip(results, self.work, strict=True))
        even = not self.is_open and self.rows % height == 0
        tall, broad = None if even else Clip(height, i, m), None if n % wide == 0 or single else Clip(wide, j, n)
        contract = Contract(
            tile, height, self.vectors, a, index(0, (i, k * height)), k, b, index(0, (j, k * wide)),
            (ContractLoop(k, 1, wide),), tall,
        )  # fmt: skip
        inner: Stmt = Loop(c, stores, (), "vector", broad, self.vectors)
        after = inner if height == 1 else Loop(r, (inner,), (), "serial", tall)
        if height == 1:
            place = {r: Index(0, ())}
            after = _moved(inner, place)
        names = ("m",) if self.is_open else ()
        buffers = (a, b, column, row, other, *results)
        return Program("product", buffers, (tile,), (Phase((i, j), (contract, after)),), names)

    def check(self, on: Target) -> None:
        program = self.program(on)
        rng = np.random.default_rng(3)
        env = {"m": self.rows} if self.is_open else {}
        sizes = [int(dims.evaluate(b.size, env)) for b in program.buffers]
        arrays = {b: rng.standard_normal(n).astype(np.float32) for b, n in zip(program.buffers, sizes, strict=True)}
        arrays[program.buffers[0]][:3] = [np.nan, np.inf, -0.0]
        agree(program, arrays, env, on)


def _moved(s: Stmt, place: dict[Axis, Index]) -> Stmt:
    from stitch.codegen.lower import Rewriter

    assert isinstance(s, Loop)
    change = Rewriter(lambda _, at: at.substitute(place))
    return Loop(s.axis, tuple(change.stmt(t) for t in s.body), (), s.mode, s.clip, s.unroll)


PRODUCTS = st.builds(
    Product,
    rows=st.integers(3, 40),
    columns=st.integers(1, 70),
    terms=st.integers(3, 9),
    height=st.sampled_from([1, 2, 5, 6, 8]),
    vectors=st.integers(1, 3),
    work=st.lists(st.sampled_from(sorted(WORK)), min_size=1, max_size=2).map(tuple),
    is_open=st.booleans(),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(PRODUCTS, st.sampled_from(RUNNABLE))
def test_products(product: Product, on: Target) -> None:
    product.check(on)


@EVERY
@pytest.mark.parametrize("work", sorted(WORK))
def test_whole_tiles_are_not_stored(work: str, machine_: Target) -> None:
    """Where all tiles are whole there is no tile in the code, unless the work is too much for the registers."""
    lanes = machine_.lanes(FLOAT32)
    program = Product(12, 4 * lanes, 7, 4, 2, (work,)).program(machine_)
    phase = program.phases[0]
    contract, after = phase.body
    assert isinstance(contract, Contract)
    found = endings.of(contract, after, endings.readers(phase), machine_)
    assert (found is not None) == (work not in ("swish", "nothing of it"))
    text = llvm.emit(program, machine_)
    assert any(name.startswith("contract.float32.4x2.unit.short") for name in text.kernels) == (found is None)


def test_a_tile_that_is_read_again_is_stored() -> None:
    on = RUNNABLE[0]
    program = Product(4, 2 * on.lanes(FLOAT32), 7, 4, 2, ("bias",)).program(on)
    contract, after = program.phases[0].body
    assert isinstance(contract, Contract)
    twice = Phase(program.phases[0].axes, (contract, after, after))
    assert endings.of(contract, after, endings.readers(program.phases[0]), on) is not None
    assert endings.of(contract, after, endings.readers(twice), on) is None


def test_sums_of_several_blocks_stay_in_memory() -> None:
    on = RUNNABLE[0]
    for terms, ended in ((1024, True), (1025, False)):
        phase = Product(4, 2 * on.lanes(FLOAT32), terms, 4, 2, ("bias",)).program(on).phases[0]
        contract, after = phase.body
        assert isinstance(contract, Contract)
        assert (endings.of(contract, after, endings.readers(phase), on) is not None) == ended
