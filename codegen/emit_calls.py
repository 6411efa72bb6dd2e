"""Statements that are calls of functions which kernels share: contractions, with their epilogues, and transposes."""

from __future__ import annotations

from collections.abc import Callable

from stitch import dims
from stitch.codegen import emit_endings as endings
from stitch.codegen.emit_expressions import Expressions
from stitch.codegen.emit_kernels import tile_kernel
from stitch.codegen.emit_loops import trips_of
from stitch.codegen.emit_memory import Memory
from stitch.codegen.emit_rules import stored_in
from stitch.codegen.loops import Axis, Buffer, Contract, ContractLoop, Stmt, Transpose
from stitch.codegen.sums import block_of
from stitch.codegen.transpose import transpose_kernel
from stitch.target import Target


class Calls:
    """The calls of a phase. `kernels`: the functions by name, to which those are added that are called; `body` emits
    statements as they are written."""

    def __init__(
        self,
        target: Target,
        m: Memory,
        values: Expressions,
        kernels: dict[str, str],
        body: Callable[[tuple[Stmt, ...]], None],
    ) -> None:
        self.target, self.w, self.d, self.m, self.values = target, m.w, m.d, m, values
        self.kernels, self.body = kernels, body

    def contract(self, s: Contract) -> None:
        dtype = s.tile.dtype
        width = s.vectors * self.target.lanes(dtype)
        unit = s.loops[-1].a_stride == 1
        terms = dims.product(k.extent for k in s.loops)
        short = isinstance(terms, int) and terms <= block_of(terms)
        clipped, ahead = s.clip is not None, s.ahead and unit
        name = tile_kernel(self.kernels, self.target, dtype, s.rows, s.vectors, unit, clipped, short, ahead)
        a, row, b, table = self._operands(s)
        to = self.m.base(s.tile) if s.tile_row is None else self.m.pointer(s.tile, s.tile_index)
        step = self.d.value(width if s.tile_row is None else s.tile_row)
        given = f"{a}, {row}, {b}, ptr {to}, i64 {step}, {table}"
        rows = f", i64 {trips_of(self.m, Axis('rows', s.rows), s.clip)}" if s.clip is not None else ""
        self.w.effect(f"call void @{name}({given}{rows})", s.tile)

    def transpose(self, s: Transpose) -> None:
        rows, columns = trips_of(self.m, s.rows, s.row_clip), trips_of(self.m, s.columns, s.column_clip)
        numbers = (s.to_step, s.step, rows, columns)
        fixed = tuple(x if isinstance(x, int) else None for x in numbers)
        name = transpose_kernel(self.kernels, self.target, s.to.dtype.itemsize, *fixed)
        to, source = self.m.pointer(s.to, s.to_index), self.m.pointer(s.source, s.index)
        given = f"ptr {to}, i64 {self.d.value(s.to_step)}, ptr {source}, i64 {self.d.value(s.step)}"
        self.w.effect(f"call void @{name}({given}, i64 {rows}, i64 {columns})", s.to)

    def ended(self, e: endings.Epilogue, plain: tuple[Stmt, ...]) -> None:
        """A contraction with its epilogue: on registers where the tile is whole, else as it is written."""
        stored = stored_in(plain)
        self.values.forget(stored)
        counts = [(trips_of(self.m, Axis("rows", e.contract.rows), e.contract.clip), e.contract.rows)]
        counts += [(trips_of(self.m, e.lanes.axis, e.lanes.clip), e.width)]
        tests = [self.w.pure(f"icmp eq i64 {n}, {all_}", n) for n, all_ in counts if isinstance(n, str)]
        if not tests:
            return self._call_ended(e, stored)
        whole = tests[0] if len(tests) == 1 else self.w.pure(f"and i1 {tests[0]}, {tests[1]}", *tests)
        for wanted, do in (("1", lambda: self._call_ended(e, stored)), ("0", lambda: self._plain(plain))):
            test = self.w.pure(f"icmp eq i1 {whole}, {wanted}", whole)
            count = self.w.pure(f"zext i1 {test} to i64", test)

            def body(_: str | int, __: list[str], do: Callable[[], None] = do) -> list[str]:
                with self.values.inside():
                    do()
                return []

            self.w.repeat(0, count, 1, [], body, stored, once=True)
        self.values.forget(stored)
        return None

    def _plain(self, body: tuple[Stmt, ...]) -> None:
        contract, *rest = body
        assert isinstance(contract, Contract)
        self.contract(contract)
        self.values.forget({contract.tile})
        self.body(tuple(rest))

    def _call_ended(self, e: endings.Epilogue, stored: frozenset[Buffer]) -> None:
        name = endings.kernel(self.kernels, self.target, e)
        given = []
        for p in e.pointers:
            given += [f"ptr {self.m.pointer(p.buffer, p.base)}"]
            given += [] if isinstance(p.step, int) else [f"i64 {self.d.value(p.step)}"]
        a, row, b, table = self._operands(e.contract)
        self.w.effect(f"call void @{name}({', '.join([a, row, b, table, *given])})")
        for buffer in stored:
            self.w.effect("", buffer)
        self.values.forget(stored)

    def _operands(self, s: Contract) -> tuple[str, str, str, str]:
        """What a micro-kernel gets: a, its row stride, b, and the loops."""
        padded = (*[ContractLoop(1, 0, 0)] * (3 - len(s.loops)), *s.loops)
        words = [*(k.extent for k in padded), *(k.a_stride for k in padded), *(k.b_stride for k in padded)]
        table = self.w.table([self.d.value(x) for x in words])
        a, b = self.m.pointer(s.a, s.a_index), self.m.pointer(s.b, s.b_index)
        return f"ptr {a}", f"i64 {self.d.value(s.a_row)}", f"ptr {b}", f"ptr {table}"
