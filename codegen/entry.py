"""The code around the kernels of one native step: `entry` calls them in order, `layout` says what it needs.

The ABI is in `stitch.plan`. Everything that depends on the shapes alone (offsets in the arena, numbers of tasks) is
arithmetic on `dims` at the top of these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stitch import dims
from stitch.codegen.emit_code import Writer
from stitch.codegen.emit_dims import Dims
from stitch.dims import Dim


@dataclass(frozen=True)
class Place:
    """Where a kernel's parameter is: `base` is the arena or a slot, `offset` in bytes."""

    base: str  # "arena" or "slot"
    slot: int
    offset: Dim


@dataclass(frozen=True)
class PhaseCall:
    """`table`: how its chunks are dealt to the members of a team of unlike processors (`stitch.runtime.shares`); ():
    all members alike; (1,): the caller does it alone."""

    function: str
    tasks: Dim
    grain: Dim
    table: tuple[int, ...] = ()


@dataclass(frozen=True)
class KernelCall:
    """One kernel: its parameters, the symbols it wants (as words after the pointers), and its phases."""

    phases: tuple[PhaseCall, ...]
    parameters: tuple[Place, ...]
    symbols: tuple[str, ...]


ATTRIBUTES = "nounwind noinline optnone"
"""Of what runs once in an inference, or once for a shape: LLVM does without its optimisations, and is faster for it."""

DECLARATIONS = (
    "declare void @stitch_parallel(ptr, ptr, ptr, i64, i64)\ndeclare void @stitch_share(ptr, ptr, ptr, i64, i64, ptr)\n"
)


def entry(name: str, calls: Sequence[KernelCall], symbols: Mapping[str, int], scratch_at: Dim, scratch: Dim) -> str:
    """i64 @name(ptr team, ptr dims, ptr slots, ptr arena). `scratch_at`: bytes of the arena before the workers' scratch
    memory; `scratch`: bytes of it per worker."""
    w = Writer()
    d = Dims(w, _Symbols(w, symbols))
    words = max((len(c.parameters) + len(c.symbols) + 2 for c in calls), default=1)
    w.effect(f"%args = alloca [{words} x i64], align 16")
    base = _address(w, "%arena", d.value(scratch_at))
    tables: dict[tuple[int, ...], str] = {}
    stride = d.value(scratch)
    for call in calls:
        at = 0
        for p in call.parameters:
            if p.base == "arena":
                pointer = _address(w, "%arena", d.value(p.offset))
            else:
                slot = w.pure(f"getelementptr i8, ptr %slots, i64 {8 * p.slot}")
                pointer = _address(w, w.pure(f"load ptr, ptr {slot}, align 8", slot), d.value(p.offset))
            at = _put(w, at, "ptr", pointer)
        for s in call.symbols:
            at = _put(w, at, "i64", d.value(dims.symbol(s)))
        at = _put(w, at, "ptr", base)
        _put(w, at, "i64", stride)
        for phase in call.phases:
            tasks = d.value(phase.tasks)
            if phase.tasks == 1 or len(phase.table) == 1:
                w.effect(f"call void @{phase.function}(ptr %args, i64 0, i64 {tasks}, i64 0)")
            elif phase.table:
                table = tables.setdefault(phase.table, f"@{name}_table{len(tables)}")
                team = f"call void @stitch_share(ptr %team, ptr @{phase.function}, ptr %args"
                w.effect(f"{team}, i64 {tasks}, i64 {d.value(phase.grain)}, ptr {table})")
            else:
                team = f"call void @stitch_parallel(ptr %team, ptr @{phase.function}, ptr %args"
                w.effect(f"{team}, i64 {tasks}, i64 {d.value(phase.grain)})")
    body = w.text().replace("ret void", "ret i64 0")
    constants = "".join(_constant(at, table) for table, at in tables.items())
    return f"{constants}define i64 @{name}(ptr %team, ptr %dims, ptr %slots, ptr %arena) {ATTRIBUTES} {{\n{body}\n}}\n"


def _constant(name: str, words: Sequence[int]) -> str:
    values = ", ".join(f"i32 {word}" for word in words)
    return f"{name} = internal constant [{len(words)} x i32] [{values}], align 4\n"


def layout(name: str, results: Sequence[Dim], symbols: Mapping[str, int], scratch_at: Dim, scratch: Dim) -> str:
    """void @name(ptr dims, ptr out): the arena's bytes, then `results`."""
    w = Writer()
    d = Dims(w, _Symbols(w, symbols))
    team = w.pure(f"getelementptr i8, ptr %dims, i64 {8 * len(symbols)}")
    workers = w.pure(f"load i64, ptr {team}, align 8", team)
    total = d.add(d.value(scratch_at), d.mul(d.value(scratch), workers))
    for k, value in enumerate([total, *(d.value(r) for r in results)]):
        to = w.pure(f"getelementptr i8, ptr %out, i64 {8 * k}")
        w.effect(f"store i64 {value}, ptr {to}, align 8")
    return f"define void @{name}(ptr %dims, ptr %out) {ATTRIBUTES} {{\n{w.text()}\n}}\n"


class _Symbols(dict[str, str]):
    """Symbols by name, loaded from `dims` when first asked for."""

    def __init__(self, writer: Writer, order: Mapping[str, int]) -> None:
        super().__init__()
        self.writer = writer
        self.order = order

    def __missing__(self, name: str) -> str:
        at = self.writer.pure(f"getelementptr i8, ptr %dims, i64 {8 * self.order[name]}")
        self[name] = self.writer.pure(f"load i64, ptr {at}, align 8", at)
        return self[name]


def _address(w: Writer, base: str, offset: str) -> str:
    return base if offset == "0" else w.pure(f"getelementptr i8, ptr {base}, i64 {offset}", base, offset)


def _put(w: Writer, k: int, kind: str, value: str) -> int:
    to = w.pure(f"getelementptr i8, ptr %args, i64 {8 * k}") if k else "%args"
    w.effect(f"store {kind} {value}, ptr {to}, align 8")
    return k + 1
