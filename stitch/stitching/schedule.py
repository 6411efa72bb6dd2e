"""What the stitcher decides: kernels, their phases, the groups in them, and where every value lives.

    Stitched  = kernels in order, over one graph
    Kernel    = phases in order, with a barrier between two of them; where each value it makes is placed
                or a chain: contractions and rows of what is between them, all of which a task does for some rows
    Phase     = groups under common parallel axes: at one point of these, a task runs all groups one after another
    Group     = roots with one iteration domain, computed together in one loop nest
    Root      = one value that a group makes available: by storing `source`, or by folding it over `reduced`

A group's axes are the phase's parallel axes and its own. Placement says how a value gets from one group to the next:

    register   one number per point of the parallel axes          local to one group, or a row's sum
    tile       worker's scratch, the extent of the other axes      AStitch's regional scheme
    block      the same between the phases of a chain, for some rows
    buffer     a whole array in the arena, or an output            AStitch's global scheme, and between kernels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from stitch import access
from stitch.access import Axis, Index
from stitch.graph import Graph, Node, Value
from stitch.stitching.trace import Access

Placement = Literal["register", "tile", "block", "buffer"]


@dataclass(frozen=True, eq=False)
class Root:
    """`value[store] := source[at]` for all points of the group's axes, folded with `fold` over those not in store."""

    value: Value
    source: Value
    at: tuple[Index, ...]
    store: tuple[Index, ...]
    fold: Literal["add", "mul", "max", "min"] | None = None

    @property
    def is_piece(self) -> bool:
        """True for one part of a concat: the rest of the value is made elsewhere."""
        return self.fold is None and self.source is not self.value

    def substitute(self, mapping: Mapping[Axis, Index]) -> Root:
        at = tuple(i.substitute(mapping) for i in self.at)
        return replace(self, at=at, store=tuple(i.substitute(mapping) for i in self.store))


@dataclass(frozen=True, eq=False)
class Group:
    axes: tuple[Axis, ...]
    roots: tuple[Root, ...]
    accesses: tuple[Access, ...] = ()  # of values that other groups make, and of inputs and constants
    nodes: tuple[Node, ...] = ()  # evaluated inside, without their values leaving

    @cached_property
    def reduced(self) -> frozenset[Axis]:
        """Axes that some root folds over."""
        kept = [frozenset(a for i in r.store for a in i.axes()) for r in self.roots if r.fold]
        return frozenset(a for a in self.axes if any(a not in k for k in kept))

    def substitute(self, mapping: Mapping[Axis, Index]) -> Group:
        axes = dict.fromkeys(a for x in self.axes for a in ([x] if x not in mapping else mapping[x].parts))
        accesses = tuple(replace(a, at=tuple(i.substitute(mapping) for i in a.at)) for a in self.accesses)
        roots = tuple(r.substitute(mapping) for r in self.roots)
        return replace(self, axes=tuple(axes), roots=roots, accesses=accesses)


@dataclass(frozen=True, eq=False)
class Contraction:
    """The heavy half of a contraction's phase: `node` over axes by label; its result is the tile that groups read."""

    node: Node
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]  # labels of a and the result
    columns: tuple[Axis, ...]  # labels of b and the result
    summed: tuple[Axis, ...]
    a: Access
    b: Access
    store: tuple[Index, ...]  # index of the result

    def substitute(self, mapping: Mapping[Axis, Index]) -> Contraction:
        """Over other axes; batch, rows and columns stay apart."""

        def of(axes: Sequence[Axis]) -> tuple[Axis, ...]:
            return tuple(dict.fromkeys(a for x in axes for a in ([x] if x not in mapping else mapping[x].parts)))

        def moved(a: Access) -> Access:
            return replace(a, at=tuple(i.substitute(mapping) for i in a.at))

        return replace(
            self, batch=of(self.batch), rows=of(self.rows), columns=of(self.columns), summed=of(self.summed),
            a=moved(self.a), b=moved(self.b), store=tuple(i.substitute(mapping) for i in self.store),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Phase:
    parallel: tuple[Axis, ...]
    groups: tuple[Group, ...]
    contraction: Contraction | None = None

    def substitute(self, mapping: Mapping[Axis, Index]) -> Phase:
        axes = dict.fromkeys(a for x in self.parallel for a in ([x] if x not in mapping else mapping[x].parts))
        heavy = None if self.contraction is None else self.contraction.substitute(mapping)
        return Phase(tuple(axes), tuple(g.substitute(mapping) for g in self.groups), heavy)


@dataclass(frozen=True, eq=False)
class Chain:
    """What the phases of a kernel without barriers have in common: one task takes some of `row`, at one point of
    `batch`, through all of them; without `row`, all rows that the contractions have."""

    batch: tuple[Axis, ...]
    row: Axis | None


@dataclass(frozen=True, eq=False)
class Kernel:
    """`opaque` is set for host operators and scatters, which are kernels of their own without phases."""

    name: str
    phases: tuple[Phase, ...]
    placements: Mapping[Value, Placement] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    opaque: Node | None = None
    reasons: tuple[str, ...] = ()
    chain: Chain | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(g for p in self.phases for g in p.groups)

    def reads(self) -> tuple[Value, ...]:
        """Values that must be in memory before the kernel runs."""
        if self.opaque is not None:
            return tuple(dict.fromkeys(self.opaque.inputs))
        found = dict.fromkeys(a.value for g in self.groups for a in g.accesses)
        for p in self.phases:
            if p.contraction is not None:
                found.update(dict.fromkeys((p.contraction.a.value, p.contraction.b.value)))
        return tuple(v for v in found if v not in self.placements)

    def writes(self) -> tuple[Value, ...]:
        """Values that it leaves in memory."""
        if self.opaque is not None:
            return self.opaque.outputs
        return tuple(v for v, p in self.placements.items() if p == "buffer")


@dataclass(frozen=True, eq=False)
class Stitched:
    graph: Graph
    kernels: tuple[Kernel, ...]

    def check(self) -> None:
        """Raises AssertionError unless every value is written once (a concat: in pieces), before it is read."""
        ready = set(self.graph.inputs) | {n.output for n in self.graph.nodes if n.prim == "const"}
        begun: set[Value] = set()
        for k in self.kernels:
            missing = [v.name for v in k.reads() if v not in ready]
            assert not missing, f"{k.name} reads {missing} before they are written"
            pieces = {r.value for g in k.groups for r in g.roots if r.is_piece}
            for v in k.writes():
                assert v not in ready or v in begun & pieces, f"{k.name} writes {v.name} again"
                ready.add(v)
            begun = (begun | pieces) - set(k.reads())
            made = {r.value for g in k.groups for r in g.roots}
            made |= {p.contraction.node.output for p in k.phases if p.contraction}
            assert k.opaque is not None or set(k.placements) == made, f"{k.name}: placements do not match its roots"
        assert all(v in ready for v in self.graph.outputs), "an output is not written"


def render(stitched: Stitched) -> str:
    """The stable text form: kernels, phases, groups, placements."""
    lines: list[str] = []
    for k in stitched.kernels:
        lines.append(f"kernel {k.name}: {', '.join(dict.fromkeys(n.prim for n in k.nodes))}")
        if k.chain is not None:
            shared = (*k.chain.batch, *([k.chain.row] if k.chain.row is not None else []))
            lines.append(f"  chain over ({', '.join(f'{a.name} < {a.extent}' for a in shared)})")
        for phase in k.phases:
            lines.append(f"  parallel ({', '.join(f'{a.name} < {a.extent}' for a in phase.parallel)})")
            if phase.contraction is not None:
                c = phase.contraction
                sides = [("batch", c.batch), ("rows", c.rows), ("columns", c.columns), ("summed", c.summed)]
                lines.append("    contract " + ", ".join(f"{n} {_extents(a)}" for n, a in sides))
            for g in phase.groups:
                inner = [a for a in g.axes if a not in phase.parallel]
                lines.append(f"    group over {_extents(inner)}")
                for r in g.roots:
                    how = f"{r.fold} of {r.source.name}" if r.fold else "store"
                    lines.append(f"      {r.value.name} {_extents_of(r.value)} {k.placements[r.value]} = {how}")
    return "\n".join(lines) + "\n"


def _extents(axes: Sequence[Axis]) -> str:
    return "(" + ", ".join(str(a.extent) for a in axes) + ")"


def _extents_of(value: Value) -> str:
    return f"{value.dtype.name}[{', '.join(map(str, value.shape))}]"


def identity(at: Sequence[Index], value: Value, axes: Sequence[Axis]) -> dict[Axis, int] | None:
    """Which dim of `value` each of `axes` is, if `at` is a one-to-one relation between its dims and these axes."""
    out: dict[Axis, int] = {}
    for k, (i, d) in enumerate(zip(at, value.shape, strict=True)):
        if d == 1 and i == access.ZERO:
            continue
        axis = i.axis()
        if axis is None or axis in out or axis.extent != d:
            return None
        out[axis] = k
    return out if all(a in out or a.extent == 1 for a in axes) else None
