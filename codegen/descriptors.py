"""What the phases of a loop program do, in numbers: the descriptors from which `stitch.cost` predicts their time.

    describe(phase, sizes, target, near, same)        a `Work`, and what the phase touches

Numbers, not expressions: symbols have the values that `sizes` gives. Counted are executions of vector instructions by
kind, as code generation will emit them: an expression runs as often as the innermost loop that it depends on, so what
is invariant is counted outside; of a loop with lanes each vector counts, the last one wholly. Bytes come from
`stitch.codegen.traffic`.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stitch import dims
from stitch.access import Index, Variable
from stitch.codegen.loops import (
    Apply,
    Buffer,
    Clip,
    Contract,
    Define,
    Expr,
    Gate,
    Guarded,
    Local,
    Lookup,
    Loop,
    Phase,
    Position,
    Prefetch,
    Read,
    Stmt,
    Store,
    Transpose,
    Use,
)
from stitch.codegen.traffic import Access, Around, Near, Nest, Traffic
from stitch.cost import Work
from stitch.dims import Dim
from stitch.ops.primitives import PRIMITIVES
from stitch.target import Target

TABLE = 6.0
"""Instructions of looking a byte up in a table of 256, which is in registers."""

DEAR = 5.0
"""Instructions from which a primitive counts as transcendental: it is a chain of them, which wait for each other."""

RIM = 4
"""What is within this part of the third cache is there for sure; others use it too, and it forgets sooner."""

FAR = 1 << 20
"""Elements between two places that are looked up, so that they share nothing."""

LATENCY = 4
"""Cycles of a multiply-add: so many accumulators are needed to issue one each cycle."""


@dataclass(frozen=True)
class Touch:
    """What a phase leaves in the caches: a share of a buffer, from some element on."""

    buffer: Buffer
    place: float
    share: float


def describe(
    phase: Phase, sizes: Mapping[str, int], target: Target, near: Near, same: Mapping[Buffer, Buffer]
) -> tuple[Work, tuple[Touch, ...]]:
    """The work of a phase, and what it touches. `same`: parameters that take the place of another one."""
    c = _Counter(sizes, target, same)
    around = tuple(Around(a, c.extent(a.extent)) for a in phase.axes)
    node = root = Nest(Around(None, 1.0))
    for a in around:
        node.below.append(inner := Nest(a))
        node = inner
    c.body(phase.body, around, node)
    size = {a.buffer: c.extent(a.buffer.size) * a.buffer.dtype.itemsize for a, _ in root.walk()}
    traffic = Traffic(root, size, near, c.lanes)
    brought = [traffic.beyond(float(target.l1_bytes))]
    for capacity in (target.l2_bytes, max(target.l3_bytes // RIM, target.l2_bytes), target.l3_bytes):
        beyond = traffic.beyond(float(capacity)) if capacity else brought[-1]  # a cache that is not there
        brought.append(min(beyond, brought[-1], key=lambda moved: moved.bytes))  # and a larger one never brings more
    second, far, rim = (a - b for a, b in itertools.pairwise(brought))
    memory = brought[-1]
    work = Work(
        tasks=math.prod(a.steps for a in around), grain=max(c.number(phase.grain), 1.0), touched=traffic.touched,
        near=second.bytes, far=far.bytes, rim=rim.bytes, memory=memory.bytes,
        far_loose=far.loose, rim_loose=rim.loose, memory_loose=memory.loose,
        memory_stored=memory.stored,
        **{name: c.counts[name] for name in Work.COUNTS},
    )  # fmt: skip
    return work, tuple(Touch(a.buffer, a.place, traffic.share(a)) for a, _ in root.walk())


class _Counter:
    def __init__(self, sizes: Mapping[str, int], target: Target, same: Mapping[Buffer, Buffer]) -> None:
        self.sizes, self.target, self.same = sizes, target, same
        self.lanes = target.vector_bits // 32
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.deps: dict[Local, frozenset[Variable]] = {}
        self.of: dict[int, frozenset[Variable]] = {}
        self.counted: set[int] = set()
        self.kept: list[Expr] = []  # so that no other object gets the id of one that was counted

    def number(self, d: Dim) -> float:
        return float(d) if isinstance(d, int) else float(dims.evaluate(d, self.sizes))

    def extent(self, d: Dim) -> float:
        """How many there are. Sizes that no input can have, such as images smaller than a window, make it negative."""
        return max(self.number(d), 0.0)

    # -------------------------------------------------- loops

    def body(self, body: Sequence[Stmt], around: tuple[Around, ...], node: Nest) -> None:
        for s in body:
            match s:
                case Loop():
                    self.loop(s, around, node)
                case Define():
                    self.expr(s.value, around, node)
                    self.deps[s.local] = self.depends(s.value)
                case Store():
                    self.expr(s.value, around, node)
                    self.access("stores", s.buffer, s.index, around, node)
                case Contract():
                    self.contract(s, around, node)
                case Transpose():
                    self.transpose(s, around, node)
                case Prefetch():
                    self.count("loads", around, self.depends_on(s.index))

    def loop(self, loop: Loop, around: tuple[Around, ...], node: Nest) -> None:
        inner = self.entered(loop, around)
        node.below.append(below := Nest(inner))
        inside = (*around, inner)
        self.body(loop.body, inside, below)
        times = _times(around) * inner.share
        self.counts["loops"] += times
        if loop.mode == "vector" and loop.folds:
            self.counts["folds"] += times * len(loop.folds)
        for f in loop.folds:
            self.expr(f.value, inside, below)
            own = self.depends(f.value)
            cost = 3 if f.op in ("max", "min") else 0 if f.op == "add" and _is_product(f.value) else 1
            self.count("simple", inside, own | {loop.axis}, cost)
            self.deps[f.local] = own - {loop.axis}

    def entered(self, loop: Loop, around: Sequence[Around]) -> Around:
        extent, share = self.extent(loop.axis.extent), 1.0
        full, rest, wholes = extent, 0.0, 1.0  # of all entries, `wholes` have `full` iterations, the others `rest`
        match loop.clip:
            case Clip(block, outer, limit):
                outers = max(self.extent(outer.extent), 1.0)
                full, left = float(block), self.number(limit)
                rest = left - block * (outers - 1) if left < block * outers else float(block)
                full = min(full, max(left, 0.0))
                wholes = (outers - 1) / outers if rest != block else 1.0
                rest = max(rest, 0.0)
            case Gate():
                share = self.share(loop.clip, around)
        lanes = self.lanes if loop.mode == "vector" else 1
        steps = wholes * math.ceil(full / lanes) + (1 - wholes) * math.ceil(rest / lanes)
        return Around(loop.axis, steps, share, loop.mode == "vector")

    def share(self, gate: Gate, around: Sequence[Around]) -> float:
        """The share of the points of the loops around at which all bounds hold; bounds on one axis overlap."""
        shares: dict[Variable | None, float] = {}
        for b in gate.bounds:
            terms = [(v, self.number(c)) for v, c in b.index.terms]
            if not terms:
                continue
            axis, step = terms[0]
            extent = next((a.steps for a in around if a.axis is axis), 1.0)
            offset, limit = self.number(b.index.offset), self.number(b.limit)
            if not step:  # by a stride of nothing
                shares[axis] = min(shares.get(axis, 1.0), float(0 <= offset < limit))
                continue
            low, high = sorted(((0 - offset) / step, (limit - offset) / step))
            valid = max(min(high, extent) - max(low, 0.0), 0.0) / max(extent, 1.0)
            shares[axis] = min(shares.get(axis, 1.0), min(valid, 1.0))
        inside = math.prod(shares.values())
        return 1.0 - inside if gate.without else inside

    # -------------------------------------------------- expressions

    def depends_on(self, index: Index) -> frozenset[Variable]:
        found: set[Variable] = set()
        for v, _ in index.terms:
            found |= self.deps.get(v, frozenset()) if isinstance(v, Local) else {v}
        return frozenset(found)

    def depends(self, e: Expr) -> frozenset[Variable]:
        if id(e) in self.of:
            return self.of[id(e)]
        found: frozenset[Variable] = frozenset()
        match e:
            case Use(local):
                return self.deps.get(local, frozenset())
            case Read() | Position():
                found = self.depends_on(e.index)
            case Apply():
                found = frozenset().union(*(self.depends(a) for a in e.args))
            case Lookup():
                found = self.depends(e.at)
            case Guarded():
                found = self.depends(e.value).union(*(self.depends_on(b.index) for b in e.bounds))
        self.of[id(e)] = found
        self.kept.append(e)
        return found

    def expr(self, e: Expr, around: tuple[Around, ...], node: Nest) -> None:
        if id(e) in self.counted:
            return
        self.counted.add(id(e))
        self.kept.append(e)
        match e:
            case Read():
                self.access("loads", e.buffer, e.index, around, node)
            case Apply():
                for a in e.args:
                    self.expr(a, around, node)
                cost = PRIMITIVES[e.prim].cost + (2 if e.rounded is not None else 0)
                if e.prim in ("add", "sub") and any(_is_product(a) for a in e.args):
                    cost = 0  # one multiply-add with the product
                self.count("dear" if cost > DEAR else "simple", around, self.depends(e), cost)
            case Lookup():
                self.expr(e.at, around, node)
                self.count("simple", around, self.depends(e), TABLE)
            case Guarded():
                self.expr(e.value, around, node)
                for b in e.bounds:
                    self.count("simple", around, self.depends_on(b.index), 2)

    def count(self, what: str, around: Sequence[Around], on: frozenset[Variable], cost: float = 1.0) -> None:
        """`cost` for each time that the innermost loop runs which it depends on; those without lanes are scalar."""
        depth = max((k for k, a in enumerate(around) if a.axis in on), default=-1)
        within = around[: depth + 1]
        times = cost * _times(within) * math.prod(a.share for a in around[depth + 1 :])
        vector = any(a.lanes and a.axis in on for a in within)
        if not vector and any(a.lanes for a in within):
            times /= max(math.prod(a.steps for a in within if a.lanes and a.axis not in on), 1.0)
        self.counts[what if vector else "scalars"] += times

    def access(self, what: str, buffer: Buffer, index: Index, around: tuple[Around, ...], node: Nest) -> None:
        on, stored = self.depends_on(index), what == "stores"
        lanes = next((a.axis for a in around if a.lanes and a.axis in on), None)
        step = 0.0 if lanes is None else abs(self.number(index.coefficient(lanes)))
        if lanes is not None and step != 1:
            what, cost = "gathers", float(self.lanes)
        else:
            cost = max(buffer.dtype.itemsize / 4, 1.0)
        self.count(what, around, on, cost)
        self.touch(node, buffer, index, around, stored=stored)

    def touch(
        self, node: Nest, buffer: Buffer, index: Index, around: Sequence[Around],
        spans: Iterable[tuple[float, float]] = (), stored: bool = False,
    ) -> None:  # fmt: skip
        steps = tuple((a, abs(self.number(c))) for a, c in self.moving(index))
        wide = [(float(self.lanes), step) for v, step in steps for a in around if a.lanes and a.axis is v]
        own = tuple((n, step) for n, step in (*spans, *wide) if n > 1 and step)
        node.accesses.append(Access(self.same.get(buffer, buffer), self.number(index.offset), steps, own, stored))

    def moving(self, index: Index) -> Iterable[tuple[Variable, Dim]]:
        """The axes that move an index, and by how much; where an index is loaded, far."""
        for v, c in index.terms:
            if isinstance(v, Local):
                yield from ((a, FAR) for a in self.deps.get(v, frozenset()))
            else:
                yield v, c

    # -------------------------------------------------- heavy statements

    def contract(self, c: Contract, around: tuple[Around, ...], node: Nest) -> None:
        times = _times(around)
        summed = math.prod(self.extent(k.extent) for k in c.loops)
        rows = float(c.rows)
        if c.clip is not None:
            outers = max(next((a.steps for a in around if a.axis is c.clip.outer), 1.0), 1.0)
            rows = min(rows, max(self.extent(c.clip.limit) / outers, 1.0))
        cycles = max(rows * c.vectors, LATENCY, c.vectors + rows / 2)
        self.counts["fused"] += times * summed * cycles
        self.counts["tiles"] += times
        self.counts["tile_stores"] += times * rows * c.vectors
        width = c.vectors * self.lanes
        a_loops = [(self.extent(k.extent), abs(self.number(k.a_stride))) for k in c.loops]
        b_loops = [(self.extent(k.extent), abs(self.number(k.b_stride))) for k in c.loops]
        self.touch(node, c.a, c.a_index, around, [(rows, abs(self.number(c.a_row))), *a_loops])
        self.touch(node, c.b, c.b_index, around, [*b_loops, (float(width), 1.0)])
        self.touch(node, c.tile, Index(), around, [(rows * width, 1.0)])

    def transpose(self, t: Transpose, around: tuple[Around, ...], node: Nest) -> None:
        rows, columns = self.extent(t.rows.extent), self.extent(t.columns.extent)
        for clip, which in ((t.row_clip, 0), (t.column_clip, 1)):
            if clip is not None:
                outers = max(self.extent(clip.outer.extent), 1.0)
                mean = min(float(clip.block), self.extent(clip.limit) / outers)
                rows, columns = (mean, columns) if which == 0 else (rows, mean)
        times = _times(around)
        self.counts["turned"] += times * rows * columns / self.lanes
        self.counts["loops"] += times
        self.touch(node, t.source, t.index, around, [(rows, 1.0), (columns, abs(self.number(t.step)))])
        self.touch(node, t.to, t.to_index, around, [(rows, abs(self.number(t.to_step))), (columns, 1.0)], True)


def _is_product(e: Expr) -> bool:
    return isinstance(e, Apply) and e.prim == "mul"


def _times(around: Sequence[Around]) -> float:
    return math.prod(a.steps * a.share for a in around)
