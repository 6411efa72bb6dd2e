"""From a loop program to LLVM text: one function per phase, written straight down.

    void @NAME.K(ptr %args, i64 %begin, i64 %end, i64 %worker)

runs tasks [begin, end) of phase K. `args` points to words of eight bytes: a pointer for each global buffer, the value
of each symbol, the address of the scratch memory, and its stride from worker to worker. Tiles lie in the worker's
part of it, each at a multiple of 64 bytes.

The text is meant to be good as it stands. Vector loops are vectors: `unroll` of them side by side, then one at a time
under a mask (`emit_loops`, `emit_folds`). `emit_code` hoists and shares, `emit_expressions` walks expressions,
`emit_values` and `emit_primitives` do the arithmetic, `emit_memory` the addresses, `emit_calls` contractions and
transposes. What order sums have, and which multiply-adds are fused, is in `emit_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from stitch import dims
from stitch.codegen import emit_endings as endings
from stitch.codegen.emit_calls import Calls
from stitch.codegen.emit_code import Writer
from stitch.codegen.emit_dims import Dims
from stitch.codegen.emit_expressions import Expressions
from stitch.codegen.emit_loops import Loops
from stitch.codegen.emit_math import vector_isa
from stitch.codegen.emit_memory import ZEROS, Memory
from stitch.codegen.emit_rules import nodes, stored_in
from stitch.codegen.emit_values import Operations
from stitch.codegen.loops import (
    Buffer,
    Contract,
    Define,
    Loop,
    Phase,
    Prefetch,
    Program,
    Read,
    Stmt,
    Store,
    Transpose,
    expressions,
    walk,
)
from stitch.dims import Dim
from stitch.stitching.schemes import estimate
from stitch.target import Target

ALIGNMENT = 64

STREAMED = 4 << 20
"""Bytes of a buffer from which stores may go past the caches."""


@dataclass(frozen=True)
class Code:
    """A program as text: its phase functions in order, and what else they need in the module, by name."""

    text: str
    functions: tuple[str, ...]
    kernels: Mapping[str, str]  # declarations, constants and micro-kernels, which programs share
    scratch: Dim  # bytes for each worker


def emit(program: Program, target: Target) -> Code:
    """The code of a program that passes `loop_rules.check`."""
    offsets, scratch = scratch_layout(program)
    kernels: dict[str, str] = {}
    texts, names = [], []
    for k, phase in enumerate(program.phases):
        names.append(f"{program.name}.{k}")
        texts.append(_Phase(program, target, offsets, kernels).emit(names[-1], phase))
    return Code("\n".join(texts), tuple(names), kernels, scratch)


def module(codes: Iterable[Code], triple: str = "") -> str:
    """A module of many programs' code."""
    kernels: dict[str, str] = {}
    texts = []
    for code in codes:
        kernels |= code.kernels
        texts.append(code.text)
    head = [f'target triple = "{triple}"'] if triple else []
    return "\n".join([*head, *(kernels[k] for k in sorted(kernels)), *texts, ""])


def streamed(program: Program, phase: Phase, target: Target) -> dict[Buffer, Dim]:
    """The buffers that a phase stores past the caches: large ones that the kernel does not read, where what it walks is
    more than the last cache holds. Such a store need not read the line first, which is a third of all traffic in a
    chain of one input and one output. x86 only: elsewhere the order of such stores is another matter.

    With each buffer, what must be positive when the kernel runs. Where sizes are open, the buffer alone must be more
    than the cache holds: whoever reads it next does not find it there anyway."""
    sizes = {b: b.size * b.dtype.itemsize for b in program.buffers}
    if not target.is_x86:
        return {}
    fixed = all(isinstance(n, int) for n in sizes.values())
    if fixed and sum(n for n in sizes.values() if isinstance(n, int)) <= target.l3_bytes:
        return {}
    least = STREAMED if fixed else max(STREAMED, target.l3_bytes)
    read = {x.buffer for p in program.phases for t in walk(p.body) for e in expressions(t) for x in nodes(e)
            if isinstance(x, Read)}  # fmt: skip
    read |= {t.source for p in program.phases for t in walk(p.body) if isinstance(t, Transpose)}
    found = stored_in(phase.body) - read
    return {b: n - least + 1 for b, n in sizes.items() if b in found and estimate(n) >= least}


def scratch_layout(program: Program) -> tuple[dict[Buffer, Dim], Dim]:
    """The offset of each tile in a worker's scratch, and the size of all, in bytes."""
    offsets: dict[Buffer, Dim] = {}
    total: Dim = 0
    for tile in program.tiles:
        offsets[tile] = total
        total = total + dims.ceil_div(tile.size * tile.dtype.itemsize, ALIGNMENT) * ALIGNMENT
    return offsets, total


class _Phase:
    """The emission of one phase."""

    def __init__(
        self, program: Program, target: Target, offsets: Mapping[Buffer, Dim], kernels: dict[str, str]
    ) -> None:
        self.program, self.target, self.offsets, self.kernels = program, target, offsets, kernels
        self.w = Writer()
        self.o = Operations(self.w, target.fma, vector_isa(target), target.has("avx512bf16"))
        words = len(program.buffers)
        self.words = {s: words + i for i, s in enumerate(program.symbols)}
        self.scratch = words + len(program.symbols)
        self.d = Dims(self.w, _Lazy(lambda s: self._word(self.words[s], "i64")))
        self.m = Memory(self.o, self.d, self._base, target.f16c)
        self.values = Expressions(self.o, self.m)
        self.loops = Loops(target, self.o, self.m, self.values, self._body)
        self.calls = Calls(target, self.m, self.values, kernels, self._body)

    def emit(self, name: str, phase: Phase) -> str:
        stored = stored_in(phase.body)
        self.m.streamed = streamed(self.program, phase, self.target)
        self.readers = endings.readers(phase)
        self.w.repeat("%begin", "%end", 1, [], lambda task, _: self._task(phase, task), stored)
        if self.m.streamed:  # what was stored past the caches is seen by all from here on
            self.w.effect("call void @llvm.x86.sse.sfence()")
            self.kernels["!0"] = "!0 = !{i32 1}"
            self.kernels["sfence"] = "declare void @llvm.x86.sse.sfence()"
        self.kernels |= self.o.declared
        bits = self.target.vector_bits
        attributes = f'nounwind "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
        head = f"define void @{name}(ptr %args, i64 %begin, i64 %end, i64 %worker) {attributes}"
        text = self.w.text()
        if ZEROS in text:
            self.kernels[ZEROS] = f"{ZEROS} = private constant [1024 x i8] zeroinitializer, align 64"
        return f"{head} {{\n{text}\n}}\n"

    # ------------------------------------------------------------------ arguments

    def _word(self, number: int, kind: str) -> str:
        p = self.w.pure(f"getelementptr i64, ptr %args, i64 {number}")
        return self.w.pure(f"load {kind}, ptr {p}", p)

    def _base(self, buffer: Buffer) -> str:
        if buffer.space == "global":
            return self._word(self.program.buffers.index(buffer), "ptr")
        start, stride = self._word(self.scratch, "ptr"), self._word(self.scratch + 1, "i64")
        offset = self.d.add(self.d.mul(stride, "%worker"), self.d.value(self.offsets[buffer]))
        return self.w.pure(f"getelementptr i8, ptr {start}, i64 {offset}", start, offset)

    def _task(self, phase: Phase, task: str | int) -> Sequence[str]:
        """Splits the number of a task into the places of the phase's axes, and does the task."""
        rest = str(task)
        axes = [a for a in phase.axes if a.extent != 1]
        self.m.places |= dict.fromkeys(phase.axes, ("", 0))
        for axis in reversed(axes[1:]):
            extent = self.d.value(axis.extent)
            self.m.places[axis] = (self.w.pure(f"urem i64 {rest}, {extent}", rest, extent), 0)
            rest = self.w.pure(f"udiv i64 {rest}, {extent}", rest, extent)
        if axes:
            self.m.places[axes[0]] = (rest, 0)
        self._body(phase.body)
        return []

    # ------------------------------------------------------------------ statements

    def _body(self, body: tuple[Stmt, ...]) -> None:
        done: Stmt | None = None
        for s, after in zip_longest(body, body[1:]):
            match s:
                case _ if s is done:
                    pass
                case Define():
                    self.m.locals[s.local] = self.values.value(s.value)
                case Store():
                    self.m.store(s.buffer, s.index, self.values.value(s.value))
                    self.values.forget({s.buffer})
                case Loop(mode="vector"):
                    self.loops.vector(s)
                case Loop():
                    self.loops.serial(s)
                case Contract():
                    ending = endings.of(s, after, self.readers, self.target)
                    if ending is not None and not stored_in((ending.lanes,)) & self.m.streamed.keys():
                        self.calls.ended(ending, (s, after))
                        done = after
                    else:
                        self.calls.contract(s)
                        self.values.forget({s.tile})
                case Transpose():
                    self.calls.transpose(s)
                    self.values.forget({s.to})
                case Prefetch():
                    self.m.prefetch(s.buffer, s.index, s.near)
                    self.kernels["prefetch"] = "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"


class _Lazy(dict[str, str]):
    """Symbols are loaded when they are first used."""

    def __init__(self, load: Callable[[str], str]) -> None:
        super().__init__()
        self.load = load

    def __missing__(self, symbol: str) -> str:
        return self.load(symbol)
