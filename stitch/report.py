"""The report of a compilation, made from its stages: kernels, how values pass inside and between them, and where every
node of the model went. `stitch.explain` shows it.

    native_nodes     ONNX nodes with work, or indexing, in some kernel
    host_nodes       those that run in numpy
    folded_nodes     all others, with the reason why nothing of them runs
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from stitch import dims
from stitch.dims import Dim
from stitch.explain import SCHEMES
from stitch.graph import Graph, Node, Origin, Value
from stitch.ops.primitives import PRIMITIVES, REDUCTIONS
from stitch.stitching.schedule import Kernel, Stitched
from stitch.stitching.trace import Flow

Edge = dict[str, str]


def describe(
    stitched: Stitched, imported: Graph | None = None, allowed: Collection[str] = tuple(SCHEMES)
) -> dict[str, Any]:
    """The report for an artifact. `imported`: the graph as it came from the model; `allowed`: schemes.

    It is one text, so that loading an artifact does not take it apart."""
    return {"explain": json.dumps(_Report(stitched, imported or stitched.graph, frozenset(allowed)).data())}


class _Report:
    def __init__(self, stitched: Stitched, imported: Graph, allowed: frozenset[str]) -> None:
        self.stitched, self.imported, self.allowed = stitched, imported, allowed
        computed = {v for k in stitched.kernels for n in k.nodes for v in n.outputs}
        self.flow = Flow(stitched.graph, computed | set(stitched.graph.outputs))
        self.constants = {n.output for n in stitched.graph.nodes if n.prim == "const"}
        self.home: dict[Value, Kernel] = {}  # the kernel that leaves a value in memory
        for k in stitched.kernels:
            self.home.update((v, k) for v in k.writes())

    def data(self) -> dict[str, Any]:
        native = [k for k in self.stitched.kernels if not _is_host(k)]
        nodes = {k.name: self.nodes(k) for k in self.stitched.kernels}
        kernels = [self.kernel(k) for k in native]
        clusters = [
            {"kernel": k.name, "nodes": _labels(nodes[k.name]), "edges": self.edges(k), "reasons": list(_reasons(k))}
            for k in native
        ]
        boundaries = self.boundaries()
        covered = {n.origin for k in native for n in nodes[k.name] if _is_named(n.origin)}
        host = [self.host(k) for k in self.stitched.kernels if _is_host(k)]
        written = {v for k in self.stitched.kernels for v in k.writes()} - set(self.stitched.graph.outputs)
        walked = [v for k in self.stitched.kernels for v in (*self.activations(k.reads()), *k.writes())]
        return {
            "kernels": kernels, "clusters": clusters, "boundaries": boundaries,
            "native_nodes": list(dict.fromkeys(map(_label, sorted(covered, key=self.position)))),
            "host_nodes": host, "folded_nodes": self.folded(covered, host),
            "bytes": {
                "walked": _text(_bytes(walked)), "intermediate": _text(_bytes(written)),
                "one_by_one": _text(self.one_by_one()),
            },
            "symbols": sorted({s for v in self.stitched.graph.inputs for d in v.shape for s in dims.symbols(d)}),
        }  # fmt: skip

    # -------------------------------------------------- one kernel

    def kernel(self, k: Kernel) -> dict[str, Any]:
        read, written = _bytes(self.activations(k.reads())), _bytes(k.writes())
        constants = _bytes([v for v in k.reads() if v in self.constants])
        heavy = [p.contraction.node for p in k.phases if p.contraction is not None]
        folded = [n for n in k.nodes if n.prim in REDUCTIONS or n.prim in ("argmax", "argmin", "cumsum")]
        dominants = heavy or folded or ([k.opaque] if k.opaque else [])
        return {
            "name": k.name, "onnx": len(_labels(k.nodes)), "phases": len(k.phases) or 2, "groups": len(k.groups),
            "dominants": _operators(dominants), "operators": _operators(k.nodes),
            "primitives": dict(Counter(n.prim for n in k.nodes)),
            "bytes": _text(read + written), "read": _text(read), "written": _text(written),
            "constants": _text(constants),
        }  # fmt: skip

    def activations(self, values: Iterable[Value]) -> list[Value]:
        return [v for v in values if v not in self.constants]

    def nodes(self, k: Kernel) -> list[Node]:
        """What a kernel computes, and the movement and sources that it looks through, in graph order."""
        found: dict[Node, None] = dict.fromkeys(k.nodes)
        waiting = [v for n in k.nodes for v in n.inputs]
        seen = set(waiting)
        while waiting:
            n = self.flow.producer.get(waiting.pop())
            if n is None or n in found or n.prim == "const" or self.flow.is_computed(n):
                continue
            found[n] = None
            fresh = [v for v in n.inputs if v not in seen]
            seen.update(fresh)
            waiting += fresh
        return sorted(found, key=self.order.__getitem__)

    @cached_property
    def order(self) -> Mapping[Node, int]:
        return {n: i for i, n in enumerate(self.stitched.graph.nodes)}

    def edges(self, k: Kernel) -> list[Edge]:
        """Every value that passes between two computed nodes of a kernel, with the scheme that carries it, and a link
        of scheme "independent" between parts that no value connects."""
        inside = {v: n for n in k.nodes for v in n.outputs}
        spots = _spots(k)
        out: dict[tuple[str, ...], Edge] = {}
        part = {n: n for n in k.nodes}

        def whole(n: Node) -> Node:
            while part[n] is not n:
                part[n] = part[part[n]]
                n = part[n]
            return n

        for n in k.nodes:
            for e in self.flow.reads(n):
                p = inside.get(e.value)
                if p is None or p is n:
                    continue
                part[whole(p)] = whole(n)
                scheme = _scheme(spots.get(p, set()), spots.get(n, set()), made=e.value in k.placements)
                if scheme == "global" and k.chain is not None:  # no barrier between its phases
                    scheme = "regional"
                heavy = p.prim == "contract" and scheme == "local"
                place = k.placements.get(e.value, "") if scheme != "local" or heavy else "register"
                edge = {"value": e.value.name, "from": _step(p), "to": _step(n), "scheme": scheme, "place": place}
                out.setdefault(tuple(edge.values()), edge)
        heads = list(dict.fromkeys(whole(n) for n in k.nodes))
        for a, b in pairwise(map(_step, heads)):
            out[a, b] = {"value": "", "from": a, "to": b, "scheme": "independent", "place": ""}
        return list(out.values())

    # -------------------------------------------------- between kernels

    def boundaries(self) -> list[dict[str, Any]]:
        """Every value that one kernel leaves in memory for another, and why they are not one."""
        out = []
        for k in self.stitched.kernels:
            for v in self.activations(k.reads()):
                writer = self.home.get(v)
                if writer is not None and writer is not k:
                    out.append({
                        "value": v.name, "from": writer.name, "to": k.name, "bytes": _text(v.bytes),
                        "reason": self.reason(writer, k, v),
                    })  # fmt: skip
        return out

    def reason(self, writer: Kernel, reader: Kernel, value: Value) -> str:
        if writer.opaque is not None or reader.opaque is not None:
            return "beside-opaque"
        if not {"regional", "global"} & self.allowed:
            return "switched-off"
        if writer.name.partition(".")[0] == reader.name.partition(".")[0]:
            return "switched-off"  # one kernel per phase, without "global"
        operands = [x for p in reader.phases if p.contraction for x in (p.contraction.a.value, p.contraction.b.value)]
        if value in operands:
            return "operand"
        if any(p.contraction for p in writer.phases) and any(p.contraction for p in reader.phases):
            return "epilogue"
        if any(p.contraction for p in writer.phases):
            if "local" not in self.allowed:
                return "switched-off"
            users = [n for n in reader.nodes if any(e.value is value for e in self.flow.reads(n))]
            simple = all(PRIMITIVES[n.prim].kind == "elementwise" and n.output.shape == value.shape for n in users)
            return "cycle" if simple else "tail"
        return "epilogue" if any(p.contraction for p in reader.phases) else "cycle"

    def one_by_one(self) -> Dim:
        """What would be read and written if each ONNX node with work of its own were a kernel."""
        made: dict[Origin, set[Value]] = {}
        read: dict[Origin, dict[Value, None]] = {}
        used: dict[Value, set[Origin]] = {}
        for n in self.stitched.graph.nodes:
            if not self.flow.is_computed(n):
                continue
            made.setdefault(n.origin, set()).update(n.outputs)
            for e in self.flow.reads(n):
                read.setdefault(n.origin, {})[e.value] = None
                used.setdefault(e.value, set()).add(n.origin)
        outputs = set(self.stitched.graph.outputs)
        total: Dim = 0
        for origin, values in made.items():
            total = total + _bytes(v for v in self.activations(read.get(origin, {})) if v not in values)
            total = total + _bytes(v for v in values if v in outputs or used.get(v, set()) - {origin})
        return total

    # -------------------------------------------------- nodes of the model

    def host(self, k: Kernel) -> dict[str, str]:
        node = k.opaque
        assert node is not None
        given = {s for v in self.stitched.graph.inputs for d in v.shape for s in dims.symbols(d)}
        open_ = {s for v in node.outputs for d in v.shape for s in dims.symbols(d)} - given
        reason = "data-dependent" if open_ else "host-only"
        return {"node": node.origin.node, "operator": node.origin.operator, "reason": reason}

    def folded(self, covered: Collection[Origin], host: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """The nodes of the model that are neither in a kernel nor on the host."""
        running = {o.node for o in covered} | {h["node"] for h in host}
        running |= {self.caller(name) for name in running}
        fixed: dict[str, bool] = {}
        varying = set(self.imported.inputs)
        for n in self.imported.nodes:
            depends = n.prim != "shape" and any(v in varying for v in n.inputs)
            if depends:
                varying.update(n.outputs)
            fixed[n.origin.node] = fixed.get(n.origin.node, True) and not depends
        out = []
        for o in self.model():
            if o.node not in running:
                reason = "constant" if fixed.get(o.node, o.operator == "Constant") else "vanished"
                out.append({"node": o.node, "operator": o.operator, "reason": reason})
        return out

    def model(self) -> Sequence[Origin]:
        """The nodes of the model, or, for a graph that was not imported, those that its nodes speak of."""
        return self.imported.origins or [*dict.fromkeys(n.origin for n in self.imported.nodes if _is_named(n.origin))]

    @cached_property
    def positions(self) -> Mapping[str, int]:
        return {o.node: i for i, o in enumerate(self.model())}

    def position(self, origin: Origin) -> int:
        return self.positions.get(self.caller(origin.node), len(self.positions))

    def caller(self, name: str) -> str:
        """The node of the model that a name belongs to: nodes of functions are called `caller/name`."""
        while name and name not in self.positions:
            name = name.rpartition("/")[0]
        return name


def _is_host(k: Kernel) -> bool:
    return k.opaque is not None and k.opaque.prim == "host"


def _is_named(o: Origin) -> bool:
    return bool(o.operator) and o.operator != "initializer"


def _bytes(values: Iterable[Value]) -> Dim:
    total: Dim = 0
    for v in values:
        total = total + v.bytes
    return total


def _text(d: Dim) -> int | str:
    return d if isinstance(d, int) else str(d)


def _label(o: Origin) -> str:
    return f"{o.operator} {o.node!r}"


def _labels(nodes: Iterable[Node]) -> list[str]:
    return list(dict.fromkeys(_label(n.origin) for n in nodes if _is_named(n.origin)))


def _operators(nodes: Iterable[Node]) -> list[str]:
    """The operator of each ONNX node that has work here, in order."""
    return [o.operator for o in dict.fromkeys(n.origin for n in nodes if _is_named(n.origin))]


def _step(n: Node) -> str:
    return f"{n.prim} ({_label(n.origin)})" if _is_named(n.origin) else n.prim


def _spots(k: Kernel) -> dict[Node, set[tuple[int, int]]]:
    """(phase, group) pairs in which a node is computed; a contraction, which no group holds, is in group -1."""
    makers = {v: n for n in k.nodes for v in n.outputs}
    out: dict[Node, set[tuple[int, int]]] = {}
    for i, p in enumerate(k.phases):
        if p.contraction is not None:
            out.setdefault(p.contraction.node, set()).add((i, -1))
        for j, g in enumerate(p.groups):
            held = [*g.nodes, *(makers[r.value] for r in g.roots if r.value in makers)]
            for n in held:
                if p.contraction is None or n is not p.contraction.node:
                    out.setdefault(n, set()).add((i, j))
    return out


def _scheme(writer: set[tuple[int, int]], reader: set[tuple[int, int]], made: bool) -> str:
    """How a value gets from where it is computed to where it is needed. `made`: it has a place of its own, so that a
    reader in another group does not compute it again."""
    if not writer or not reader or not made or writer & reader:
        return "local"
    if any(j == -1 and (i, 0) in reader for i, j in writer):
        return "local"  # the first group behind a contraction sees its tile one to one
    return "regional" if {i for i, _ in writer} & {i for i, _ in reader} else "global"


def _reasons(k: Kernel) -> Sequence[str]:
    if k.opaque is not None:
        return ("opaque",)
    found = list(k.reasons)
    if k.chain is not None:
        found.insert(0, "chained")
    elif any(p.contraction is not None for p in k.phases):
        found.insert(0, "heavy")
    elif sum(PRIMITIVES[n.prim].kind != "movement" for n in k.nodes) > 1:
        found.insert(0, "stitched")
    else:
        found.insert(0, "alone")
    return tuple(found)
