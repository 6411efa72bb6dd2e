"""From kernels to an artifact: programs compiled once each, memory planned, constants laid out, steps put in order.

Consecutive kernels are one native step. A value that lives within a step is in the arena, where `arena` puts it; one
that crosses to or from the host has a slot of its own.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from stitch import dims, knobs, peak, plan, weights
from stitch.codegen import arena, entry, kernels, llvm
from stitch.codegen.constants import Panels, Relaid
from stitch.codegen.entry import KernelCall, PhaseCall, Place
from stitch.codegen.kernels import Lowered
from stitch.codegen.loop_text import render
from stitch.dims import Dim
from stitch.errors import UnsupportedOperator
from stitch.graph import Graph, Guard, Node, Origin, Value
from stitch.ops.primitives import Array
from stitch.stitching.schedule import Kernel, Stitched
from stitch.stitching.trace import Flow
from stitch.target import Target

HUGE = 2 << 20
"""Bytes of a huge page; from this size on, constants are in such."""

_PIECE = 4 << 20
"""Elements that are copied at a time."""

Pack: TypeAlias = Callable[[Array, Array], None]
"""Writes a constant's elements, the first argument, in some order to the second, which is flat."""

Tables: TypeAlias = Mapping[str, Sequence[tuple[int, ...]]]
"""By kernel, for each of its phases: how a team of unlike members shares it out (`entry.PhaseCall.table`)."""


@dataclass
class _Blob:
    """The constants: pieces at aligned offsets, each put in once."""

    offsets: dict[Any, int] = field(default_factory=dict)
    parts: list[tuple[int, int, Array, Pack]] = field(default_factory=list)  # offset, elements, source
    size: int = 0

    def place(self, key: Any, source: Array, elements: int, pack: Pack) -> int:
        """The offset of what `pack` makes of a constant, as many elements of its dtype."""
        if key not in self.offsets:
            self.offsets[key] = self.size
            self.parts.append((self.size, elements, source, pack))
            self.size += -(-max(elements * source.itemsize, 1) // arena.ALIGNMENT) * arena.ALIGNMENT
        return self.offsets[key]

    def build(self) -> Array:
        """Constant by constant, each read from the model's file and written to its place, so that there is never more
        than one that takes memory twice.

        In huge pages: making small ones would take as long as the rest, and reading them takes a fifth more. Private,
        since memory that is shared has pages of another kind, and by default no huge ones."""
        huge = HUGE if self.size >= HUGE else 0
        block = mmap.mmap(-1, max(self.size, 1) + huge, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # zeros
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                block.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(block, np.uint8)
        start = -whole.ctypes.data % huge if huge else 0
        out = whole[start : start + self.size]
        for at, elements, source, pack in self.parts:
            pack(source, out[at : at + elements * source.itemsize].view(source.dtype))
            weights.release(source)
        return out


def _as_it_is(array: Array, out: Array) -> None:
    """In pieces: a table of words is the largest constant by far."""
    flat = array.reshape(-1)
    for at in range(0, flat.size, _PIECE):
        out[at : at + _PIECE] = flat[at : at + _PIECE]
        weights.release(flat)


def assemble(
    stitched: Stitched,
    target: Target,
    compile: Callable[[str], bytes],
    report: Mapping[str, Any],
    lowered: Mapping[str, Lowered] | None = None,
    tables: Tables | None = None,
) -> plan.Artifact:
    """The artifact. `compile` turns LLVM text into an object; `lowered` is what `lower` gives, if that is known.
    `tables`: see `Tables`; None: a team of equal members."""
    return _Assembly(stitched, target, lowered, tables).artifact(compile, report)


def lower(stitched: Stitched, target: Target) -> dict[str, Lowered]:
    """The loop program of each kernel that does not run on the host, by name."""
    flow = _flow(stitched)
    return {k.name: kernels.lower(k, flow, target) for k in stitched.kernels if not _is_host([k])}


def _flow(stitched: Stitched) -> Flow:
    stops = {v for k in stitched.kernels if k.opaque for v in k.opaque.inputs} | set(stitched.graph.outputs)
    stops |= {n.output for k in stitched.kernels for n in k.nodes}
    return Flow(stitched.graph, stops)


class _Assembly:
    def __init__(
        self, stitched: Stitched, target: Target, lowered: Mapping[str, Lowered] | None = None,
        tables: Tables | None = None,
    ) -> None:  # fmt: skip
        self.stitched = stitched
        self.tables = tables or {}
        self.graph: Graph = stitched.graph
        self.target = target
        self.flow = _flow(stitched)
        self.lowered = lowered if lowered is not None else lower(stitched, target)
        self.blob = _Blob()
        self.codes: dict[str, llvm.Code] = {}
        self.steps = self._split()
        self.symbols = self._symbols()
        self.order = {s: k for k, s in enumerate(self.symbols)}
        self.guards = (*self.graph.guards, *self.graph.extents())
        self.memories: list[dict[str, Any]] = []  # of native steps, for the report

    # -------------------------------------------------- steps and slots

    def _split(self) -> list[list[Kernel]]:
        """Native steps as runs of kernels; a host kernel is a step of its own."""
        steps: list[list[Kernel]] = []
        for k in self.stitched.kernels:
            host = k.opaque is not None and k.opaque.prim == "host"
            if host or not steps or _is_host(steps[-1]):
                steps.append([])
            steps[-1].append(k)
        return steps

    def _symbols(self) -> tuple[str, ...]:
        """Symbols of the inputs, then those that host operators bind."""
        found = dict.fromkeys(s for v in self.graph.inputs for d in v.given for s in sorted(_names(d)))
        for step in self.steps:
            if _is_host(step):
                node = step[0].opaque
                assert node is not None
                found.update(dict.fromkeys(s for v in node.outputs for d in v.shape for s in sorted(_names(d))))
        return tuple(found)

    def artifact(self, compile: Callable[[str], bytes], report: Mapping[str, Any]) -> plan.Artifact:
        graph = self.graph
        self.slot_of: dict[Value, int] = {v: k for k, v in enumerate((*graph.inputs, *graph.outputs))}
        slots = [plan.Slot(v.dtype.name, v.rank, "input") for v in graph.inputs]
        slots += [plan.Slot(v.dtype.name, v.rank, "output") for v in graph.outputs]
        self.constant_slot = len(slots)
        lowered = self.lowered
        self._place_constants(lowered)
        slots.append(plan.Slot("uint8", 1, "constant", 0, (self.blob.size,)))
        for v in self._host_constants():
            array = self._array(v)
            at = self.blob.place(("const", v), array, array.size, _as_it_is)
            self.slot_of[v] = len(slots)
            slots.append(plan.Slot(v.dtype.name, v.rank, "constant", at, array.shape))
        slots[self.constant_slot] = plan.Slot("uint8", 1, "constant", 0, (self.blob.size,))
        for v in self._crossing(lowered):
            self.slot_of[v] = len(slots)
            slots.append(plan.Slot(v.dtype.name, v.rank, "frame"))
        texts: list[str] = []
        steps = self._native_first([self._step(k, step, lowered, texts) for k, step in enumerate(self.steps)], texts)
        text = llvm.module(self.codes.values(), self.target.triple) + entry.DECLARATIONS + "".join(texts)
        with ThreadPoolExecutor(1) as other:  # both let go of the interpreter's lock most of the time
            compiling = other.submit(copy_context().run, compile, text)
            constants = self.blob.build()
        code = compiling.result()
        bindings = self._bindings()
        artifact = plan.Artifact(
            str(self.target), self.symbols,
            tuple(plan.Port(v.name, v.dtype.name, _texts(v.given)) for v in graph.inputs),
            tuple(
                plan.Port(n, v.dtype.name, _texts(v.shape))
                for n, v in zip(graph.output_names, graph.outputs, strict=True)
            ),
            tuple(slots), bindings, tuple(steps), code, constants, (),
            dict(report) | {"memory": json.dumps(self._memory())},
        )  # fmt: skip
        artifact.check()
        return artifact

    def _bindings(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(
            (self.order[name], i, axis)
            for i, v in enumerate(self.graph.inputs)
            for axis, d in enumerate(v.given)
            if (name := dims.lone(d)) is not None
        )

    def _host_constants(self) -> list[Value]:
        inputs = [v for s in self.steps if _is_host(s) for v in _opaque(s).inputs]
        return [v for v in dict.fromkeys(inputs) if self._is_const(v)]

    def _place_constants(self, lowered: Mapping[str, Lowered]) -> None:
        for low in lowered.values():
            for p in low.parameters:
                if isinstance(p, Panels | Relaid):
                    self.blob.place(p, self._array(p.value), p.size, p.pack)
                elif self._is_const(p):
                    array = self._array(p)
                    self.blob.place(("const", p), array, array.size, _as_it_is)

    def _memory(self) -> dict[str, Any]:
        """The record that `stitch.peak` describes."""
        outside = [v for v in self.slot_of if self.slot_of[v] > self.constant_slot and not self._is_const(v)]
        frames = [peak.frame(v.name, _size(v.bytes)) for v in outside if v.dtype.kind != "O"]
        return {"weights": self._weights(), "steps": self.memories, "frames": frames}

    def _weights(self) -> dict[str, int]:
        """Bytes of the constants, by whether they are in the order of the model."""
        packed = sum(p.size * p.value.dtype.itemsize for p in self.blob.offsets if isinstance(p, Panels | Relaid))
        return {"packed": packed, "as_they_are": max(self.blob.size - packed, 0)}

    def _is_const(self, v: Value) -> bool:
        return v in self.flow.producer and self.flow.producer[v].prim == "const"

    def _array(self, constant: Value) -> Array:
        array: Array = self.flow.producer[constant].attrs["array"]
        return array

    def _crossing(self, lowered: Mapping[str, Lowered]) -> list[Value]:
        """Values that one step makes and another needs, other than outputs."""
        home: dict[Value, int] = {}
        crossing: dict[Value, None] = {}
        for s, step in enumerate(self.steps):
            for k in step:
                for v in k.writes():
                    home[v] = s
                    if _is_host(step) and v not in self.slot_of:
                        crossing[v] = None
        for s, step in enumerate(self.steps):
            for k in step:
                for p in k.reads() if _is_host(step) else lowered[k.name].parameters:
                    if isinstance(p, Value) and p in home and home[p] != s and p not in self.slot_of:
                        crossing[p] = None
        return list(crossing)

    # -------------------------------------------------- one step

    def _step(self, number: int, step: Sequence[Kernel], lowered: Mapping[str, Lowered], texts: list[str]) -> plan.Step:
        if _is_host(step):
            return self._host_step(step[0])
        memory = arena.plan([lowered[k.name] for k in step], lambda v: v not in self.slot_of and not self._is_const(v))
        scratch: Dim = 0
        calls = []
        for k in step:
            low = lowered[k.name]
            try:
                code = self._code(low)
            except NotImplementedError as problem:
                raise _unsupported(k, str(problem)) from None
            scratch = dims.dim_max(scratch, code.scratch)
            tables = self.tables.get(k.name, [()] * len(code.functions))
            phases = tuple(
                PhaseCall(f, p.tasks, p.grain, table)
                for f, p, table in zip(code.functions, low.program.phases, tables, strict=True)
            )
            places = tuple(self._locate(p, memory.offsets) for p in low.parameters)
            calls.append(KernelCall(phases, places, low.program.symbols))
        self.memories.append(_described(step, lowered, memory, scratch))
        writes = list(dict.fromkeys(v for k in step for v in k.writes() if v in self.slot_of))
        guards = self._guards(number)
        checks = self._checks() if number == self._first_native() else []
        results = [self.graph.inputs[i].given[a] for i, a in checks]
        results += [d for g in guards for d in (g.left, g.right)]
        results += [d for v in writes for d in v.shape]
        name, shape = f"stitch_entry_{number}", f"stitch_layout_{number}"
        texts.append(entry.entry(name, calls, self.order, memory.total, scratch))
        texts.append(entry.layout(shape, results, self.order, memory.total, scratch))
        return plan.NativeStep(
            name, shape, tuple(self.slot_of[v] for v in writes),
            tuple(plan.Guard(str(g.left), str(g.right), g.where) for g in guards), tuple(checks),
        )  # fmt: skip

    def _native_first(self, steps: list[plan.Step], texts: list[str]) -> list[plan.Step]:
        """Guards and checks are a layout's affair, so there has to be one before the first host step."""
        if steps and isinstance(steps[0], plan.NativeStep):
            return steps
        guards, checks = self._guards(-1), self._checks()
        results = [self.graph.inputs[i].given[a] for i, a in checks]
        results += [d for g in guards for d in (g.left, g.right)]
        texts.append(entry.layout("stitch_layout_first", results, self.order, 0, 0))
        records = tuple(plan.Guard(str(g.left), str(g.right), g.where) for g in guards)
        return [plan.NativeStep("", "stitch_layout_first", (), records, tuple(checks)), *steps]

    def _first_native(self) -> int:
        return 0 if self.steps and not _is_host(self.steps[0]) else -1

    def _bound_by(self, number: int) -> set[str]:
        """Symbols known when step `number` starts (-1: from the inputs alone)."""
        known = {s for v in self.graph.inputs for d in v.given for s in _names(d)}
        for step in self.steps[: max(number, 0)]:
            if _is_host(step):
                known |= {s for v in _opaque(step).outputs for d in v.shape for s in _names(d)}
        return known

    def _guards(self, number: int) -> list[Guard]:
        """The guards whose symbols are all known at this step, but were not at an earlier native one."""
        earlier = [k for k, s in enumerate(self.steps[: max(number, 0)]) if not _is_host(s)]
        before = None
        if earlier or self._first_native() < 0 <= number:
            before = self._bound_by(earlier[-1] if earlier else -1)
        now = self._bound_by(number)
        fresh = []
        for g in self.guards:
            names = _names(g.left) | _names(g.right)
            if names <= now and (before is None or not names <= before):
                fresh.append(g)
        return list({(g.left, g.right): g for g in fresh}.values())

    def _checks(self) -> list[tuple[int, int]]:
        """Input dims that are expressions."""
        return [
            (i, axis)
            for i, v in enumerate(self.graph.inputs)
            for axis, d in enumerate(v.given)
            if not isinstance(d, int) and dims.lone(d) is None
        ]

    def _host_step(self, kernel: Kernel) -> plan.HostStep:
        node: Node | None = kernel.opaque
        assert node is not None
        bound = {dims.lone(d) for v in self.graph.inputs for d in v.given}
        binds = []
        for k, v in enumerate(node.outputs):
            for axis, d in enumerate(v.shape):
                if (name := dims.lone(d)) is not None and name not in bound:
                    binds.append((k, axis, self.order[name]))
        attrs = {k: v for k, v in node.attrs.items() if k not in ("function", "shapes")}
        return plan.HostStep(
            node.attrs["function"], attrs, tuple(self.slot_of[v] for v in node.inputs),
            tuple(self.slot_of.get(v, -1) for v in node.outputs), tuple(binds),
            (node.origin.node, node.origin.operator),
        )  # fmt: skip

    def _code(self, low: Lowered) -> llvm.Code:
        """The code of a program; equal programs share it."""
        text = render(low.program)
        if text not in self.codes:
            self.codes[text] = llvm.emit(replace(low.program, name=f"stitch_k{len(self.codes)}"), self.target)
            if knobs.current().debug >= 3:
                print(text, file=sys.stderr)
        return self.codes[text]

    def _locate(self, p: Value | Panels | Relaid, offsets: Mapping[Value, Dim]) -> Place:
        if isinstance(p, Panels | Relaid):
            return Place("slot", self.constant_slot, self.blob.offsets[p])
        if p in self.slot_of and not self._is_const(p):
            return Place("slot", self.slot_of[p], 0)
        if p in offsets:
            return Place("arena", 0, offsets[p])
        return Place("slot", self.constant_slot, self.blob.offsets["const", p])


def _described(
    step: Sequence[Kernel], lowered: Mapping[str, Lowered], memory: arena.Memory, scratch: Dim
) -> dict[str, Any]:
    """The memory of a native step, for the report."""
    phases = [k.name for k in step for _ in lowered[k.name].program.phases]
    values = [
        peak.value(
            x.value.name, _size(x.size), x.first, x.last,
            memory.replaced[x.value].name if x.value in memory.replaced else "",
        )
        for x in memory.lifetimes
    ]  # fmt: skip
    return peak.step(phases, values, _size(memory.total), _size(scratch))


def _size(d: Dim) -> int | str:
    return d if isinstance(d, int) else str(d)


def _unsupported(kernel: Kernel, problem: str) -> UnsupportedOperator:
    """What the code generator has no rule for, told of the last ONNX node in the kernel."""
    o = next((n.origin for n in reversed(kernel.nodes) if n.origin.operator), Origin(operator=kernel.name))
    advice = f"there is no machine code for {problem}, which it or a node stitched to it needs; cast to another type"
    return UnsupportedOperator(o.operator, node=o.node, domain=o.domain, opset=o.opset, advice=advice)


def _names(d: Dim) -> frozenset[str]:
    return frozenset() if isinstance(d, int) else dims.symbols(d)


def _texts(shape: Sequence[Dim]) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d) for d in shape)


def _opaque(step: Sequence[Kernel]) -> Node:
    """The node of a host step."""
    node = step[0].opaque
    assert node is not None
    return node


def _is_host(step: Sequence[Kernel]) -> bool:
    return step[0].opaque is not None and step[0].opaque.prim == "host"
