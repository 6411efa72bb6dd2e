"""The stitcher: a simplified graph in, kernels out.

clusters      which nodes become one kernel
dominants     which of their values are made available, and the groups around them, merged
schemes       phases of groups that share parallel axes, and where each value lives
contractions  the same for kernels around a matmul or convolution
chains        contractions and work on rows beside them (stages: which nodes these are)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np

from stitch import dims, dtypes
from stitch.graph import Graph, Node, Value
from stitch.knobs import Scheme
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching import chains, clusters, contractions, dominants, schemes
from stitch.stitching.legalise import legalise
from stitch.stitching.parts import in_parts
from stitch.stitching.schedule import Kernel, Stitched
from stitch.stitching.stages import Stages
from stitch.stitching.trace import Blocked, Flow

ALL: frozenset[Scheme] = frozenset(("independent", "local", "regional", "global"))


def stitch(graph: Graph, budget: int, allowed: Collection[Scheme] = ALL, merging: bool = True) -> Stitched:
    """Cuts a graph into kernels. `budget`: bytes of tiles that a worker may use; `allowed`: schemes (for tests and
    ablation): without "local" nothing is computed inside another group and contractions have no epilogue, without
    "regional" every group is a phase of its own, without "global" no kernel has more than one phase. `merging`: groups
    joined by local edges become one; it needs "local"."""
    graph = materialise(legalise(graph))
    if {"regional", "global"} <= set(allowed):
        graph = in_parts(graph, budget)
    stops: set[Value] = {v for n in graph.nodes if n.prim in ("scatter", "host") for v in n.inputs}
    stops |= set(graph.outputs) | _picked(graph)
    while True:
        flow = Flow(graph, stops)
        try:
            return _cut(flow, budget, frozenset(allowed), merging)
        except Blocked as problem:
            value = problem.value
            if flow.kind(value) == "source":
                graph, value = _copied(graph, value)
            assert value not in stops, value.name
            stops.add(value)


def _cut(flow: Flow, budget: int, allowed: frozenset[Scheme], merging: bool) -> Stitched:
    outputs = set(flow.graph.outputs)

    def outside(nodes: Collection[Node]) -> Callable[[Value], bool]:
        inside = {v for n in nodes for v in n.outputs}
        return lambda v: v not in inside and not flow.is_movement(v) and _in_memory(flow, v)

    def chained(so_far: clusters.Clusters, found: Stages) -> Kernel | None:
        home, users = set(found.nodes), so_far.users
        away = {n.output for n in home if n.output in outputs or set(users.get(n.output, ())) - home}
        try:
            return chains.kernel(flow, "chain", found, away, outside, so_far.order, budget)
        except (chains.Unchained, Blocked):
            pass
        return None

    together = chained if {"local", "regional"} <= allowed else lambda *_: None
    found = clusters.grow(flow, bool(allowed - {"independent"}), "local" in allowed, together)
    readers: dict[Value, set[int]] = {}
    for n in found.nodes:
        for e in flow.reads(n):
            readers.setdefault(e.value, set()).add(found.of[n])
    kernels: list[Kernel] = []
    for k, members in enumerate(found.sorted()):
        home = found.of[members[0]]
        leaving = {v for n in members for v in n.outputs if v in outputs or readers.get(v, set()) - {home}}
        if home in found.chains:
            kernels.append(replace(found.chains[home], name=f"k{k}"))
        else:
            kernels += _kernels(flow, f"k{k}", members, leaving, outside(members), budget, allowed, merging)
    return Stitched(flow.graph, tuple(kernels))


def _picked(graph: Graph) -> set[Value]:
    """Gathers of few elements of something computed: made where it is computed, so that it need not be in memory."""
    flow = Flow(graph)
    found = [n for n in graph.nodes if n.prim == "gather" and flow.kind(n.inputs[0]) == "elementwise"]
    return {
        n.output for n in found if n.output.size != n.inputs[0].size and dims.prove_le(n.output.size, n.inputs[0].size)
    }


def _in_memory(flow: Flow, value: Value) -> bool:
    """True for what another kernel makes, inputs, and constants of more than one element."""
    node = flow.producer.get(value)
    return node is None or (node.prim == "const" and value not in flow.scalars) or flow.is_computed(node)


def _kernels(
    flow: Flow, name: str, members: Sequence[Node], leaving: set[Value], outside: Callable[[Value], bool],
    budget: int, allowed: frozenset[Scheme], merging: bool,
) -> list[Kernel]:  # fmt: skip
    first = members[0]
    if first.prim in ("scatter", "host"):
        return [Kernel(name, (), {}, tuple(members), opaque=first)]
    if any(n.prim == "contract" for n in members):
        return [contractions.kernel(flow, name, members, leaving, outside)]
    forced = {v for v in flow.stops if any(v is n.output for n in members)}
    inside = {n.output: n for n in members}
    again: set[Value] = set()
    while True:
        made = dominants.groups(flow, members, leaving | forced, outside, "local" in allowed, again)
        merged = dominants.sort(dominants.merge(made, merging and "local" in allowed))
        cut = schemes.phases(merged, budget, "regional" in allowed, flow.batches)
        placements, reasons = schemes.place(cut, leaving, budget)
        written = {v for v, p in placements.items() if p == "buffer" and inside[v].prim != "mul"}
        written -= leaving | forced | again
        cheap = {v for v in written if dominants.repeatable(flow, inside[v], inside, _worth(v, budget))}
        if not cheap or "local" not in allowed:
            break
        again |= cheap
    whole = Kernel(name, cut, placements, tuple(members), reasons=reasons)
    return [whole] if "global" in allowed or len(cut) == 1 else _separate(whole)


def _worth(value: Value, budget: int) -> float:
    """Instructions in which a vector of the value is computed again sooner than written and read."""
    far = schemes.estimate(value.bytes) > schemes.FAR * budget
    return dominants.CHEAP_FAR if far else dominants.CHEAP


def _separate(kernel: Kernel) -> list[Kernel]:
    """One kernel per phase."""
    out = []
    for k, phase in enumerate(kernel.phases):
        made = {r.value for g in phase.groups for r in g.roots}
        inside = {n for g in phase.groups for n in g.nodes}
        nodes = tuple(n for n in kernel.nodes if n in inside or n.output in made)
        placements = {v: p for v, p in kernel.placements.items() if v in made}
        out.append(replace(kernel, name=f"{kernel.name}.{k}", phases=(phase,), placements=placements, nodes=nodes))
    return out


def materialise(graph: Graph) -> Graph:
    """Gives every output a value of its own that a kernel computes, and known shapes the form of a concat of scalars.

    Before: `y = x`, an output that is an input, a constant, or twice the same value; after: `y = reshape(x)`, which
    the stitcher carries out as a copy."""
    nodes: list[Node] = []
    renamed: dict[Value, Value] = {}
    source = graph.producers()
    for n in graph.nodes:
        if n.prim == "shape" and n.output.rank > 0:
            parts = []
            flat = n.output if n.output.rank == 1 else Value(f"{n.output.name}.flat", dtypes.INT64, (n.output.size,))
            for k, d in enumerate(n.attrs["dims"]):
                scalar = Value(f"{n.output.name}.{k}", dtypes.INT64, ())
                one = Value(f"{n.output.name}.{k}.1", dtypes.INT64, (1,))
                nodes.append(replace(n, outputs=(scalar,), attrs={"dims": (d,), "shape": ()}))
                nodes.append(Node("reshape", (scalar,), (one,), {"shape": (1,)}, n.origin))
                parts.append(one)
            if len(parts) > 1:
                nodes.append(Node("concat", tuple(parts), (flat,), {"axis": 0}, n.origin))
            elif parts and flat is n.output:
                renamed[flat] = parts[0]
            elif parts:
                flat = parts[0]
            else:
                nodes.append(replace(n, prim="const", attrs={"array": np.zeros(n.output.shape, np.int64)}))
                continue
            if n.output.rank > 1:
                nodes.append(Node("reshape", (flat,), n.outputs, {"shape": n.output.shape}, n.origin))
            continue
        if n.prim in ("scatter", "host"):  # these read memory, and no code makes a count or a shape by itself
            for v in dict.fromkeys(n.inputs):
                if v in source and source[v].prim in ("iota", "shape"):
                    copy = Value(f"{v.name}.copy", v.dtype, v.shape)
                    nodes.append(Node("reshape", (renamed.get(v, v),), (copy,), {"shape": v.shape}, n.origin))
                    n = replace(n, inputs=tuple(copy if x is v else x for x in n.inputs))
        nodes.append(replace(n, inputs=tuple(renamed.get(v, v) for v in n.inputs)) if renamed else n)
    source = {v: n for n in nodes for v in n.outputs}
    taken: set[Value] = set()
    outputs: list[Value] = []
    for name, v in zip(graph.output_names, graph.outputs, strict=True):
        v = renamed.get(v, v)
        if v not in source or v in taken or source[v].prim in ("const", "shape", "iota"):
            copy = Value(f"{name}.copy", v.dtype, v.shape)
            nodes.append(Node("reshape", (v,), (copy,), {"shape": v.shape}))
            v = copy
        taken.add(v)
        outputs.append(v)
    return replace(graph, nodes=tuple(nodes), outputs=tuple(outputs))


def _copied(graph: Graph, value: Value) -> tuple[Graph, Value]:
    """A source with a copy for memory, which movement and contractions read in its place."""
    copy = Value(f"{value.name}.copy", value.dtype, value.shape)
    nodes: list[Node] = []
    for n in graph.nodes:
        if value in n.inputs and PRIMITIVES[n.prim].kind in ("movement", "contraction"):
            n = replace(n, inputs=tuple(copy if v is value else v for v in n.inputs))
        nodes.append(n)
        if value in n.outputs:
            nodes.append(Node("reshape", (value,), (copy,), {"shape": value.shape}, n.origin))
    return replace(graph, nodes=tuple(nodes)), copy
