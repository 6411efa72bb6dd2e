"""What `explain()` tells: kernels, clusters, nodes by where they run, and bytes. Made at compile time, kept as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stitch import dims
from stitch.dims import Dim
from stitch.graph import Node, Value
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching.schedule import Kernel, Stitched

REASONS: Mapping[str, str] = {
    "over-budget": "a tile would not fit the cache budget, so it is a buffer",
    "global": "a reader needs more of the value than one task makes: memory and a barrier between them",
    "heavy": "a matmul or convolution, with the elementwise work behind it",
    "alone": "nothing that it reads or that reads it could join it",
    "opaque": "an operator with stores that depend on data",
    "data-dependent": "its result's shape depends on data: it runs on the host, in numpy",
    "stitched": "memory-bound operators joined by data flow",
}
"""The closed set of reason codes, and what each means."""


def describe(stitched: Stitched) -> dict[str, Any]:
    """The report as JSON-able data: `kernels`, `clusters`, `native_nodes`, `host_nodes`, `bytes`."""
    kernels, clusters, host = [], [], []
    walked: Dim = 0
    intermediate: Dim = 0
    outputs = set(stitched.graph.outputs)
    constants = {n.output for n in stitched.graph.nodes if n.prim == "const"}
    for k in stitched.kernels:
        reads = [v for v in k.reads() if v not in constants]
        moved = _bytes(reads) + _bytes(k.writes())
        walked = walked + moved
        intermediate = intermediate + _bytes([v for v in k.writes() if v not in outputs])
        origins = _origins(k.nodes)
        if k.opaque is not None and k.opaque.prim == "host":
            o = k.opaque.origin
            host.append({"node": o.node, "operator": o.operator, "reason": "data-dependent"})
            continue
        kernels.append({
            "name": k.name, "phases": len(k.phases) or 2, "groups": len(k.groups), "nodes": origins,
            "primitives": dict(Counter(n.prim for n in k.nodes)), "bytes": str(moved),
            "reads": len(reads), "writes": len(k.writes()),
        })  # fmt: skip
        clusters.append({"kernel": k.name, "nodes": origins, "edges": _edges(k), "reasons": list(_reasons(k))})
    return {
        "kernels": kernels, "clusters": clusters,
        "native_nodes": sorted({o for c in clusters for o in c["nodes"]}), "host_nodes": host,
        "bytes": {"walked": str(walked), "intermediate": str(intermediate)},
    }  # fmt: skip


def _bytes(values: Sequence[Value]) -> Dim:
    total: Dim = 0
    for v in values:
        total = total + v.bytes
    return total


def _origins(nodes: Sequence[Node]) -> list[str]:
    """ONNX nodes, as "operator 'node'", in order."""
    return list(dict.fromkeys(f"{n.origin.operator} {n.origin.node!r}" for n in nodes if n.origin.operator))


def _edges(k: Kernel) -> list[dict[str, str]]:
    """Every value that passes between groups of a kernel, with the scheme that carries it."""
    out = []
    home = {r.value: (i, j) for i, p in enumerate(k.phases) for j, g in enumerate(p.groups) for r in g.roots}
    for i, p in enumerate(k.phases):
        if p.contraction is not None:
            out += [{"value": p.contraction.node.output.name, "scheme": "regional"}]
        for j, g in enumerate(p.groups):
            for a in dict.fromkeys(x.value for x in g.accesses):
                if a not in home:
                    continue
                if home[a][0] != i:
                    scheme = "global"
                else:
                    scheme = "local" if k.placements[a] == "register" or home[a][1] == j else "regional"
                out.append({"value": a.name, "scheme": scheme})
    return out


def _reasons(k: Kernel) -> Sequence[str]:
    if k.opaque is not None:
        return ("opaque",)
    found = list(k.reasons)
    if any(p.contraction is not None for p in k.phases):
        found.append("heavy")
    elif sum(PRIMITIVES[n.prim].kind != "movement" for n in k.nodes) > 1:
        found.append("stitched")
    else:
        found.append("alone")
    return tuple(found)


class Explanation:
    """What was stitched, for people as `str()` and for programs as `to_dict()`."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self._report = dict(report)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._report)

    def __str__(self) -> str:
        r = self._report
        schemes = Counter(e["scheme"] for c in r["clusters"] for e in c["edges"])
        lines = [
            f"{len(r['native_nodes'])} ONNX nodes in {len(r['kernels'])} kernels, {len(r['host_nodes'])} on the host",
            "stitched edges: " + (", ".join(f"{n} {s}" for s, n in sorted(schemes.items())) or "none"),
            f"bytes walked: {r['bytes']['walked']}; of intermediates written: {r['bytes']['intermediate']}",
            "",
        ]
        for k, c in zip(r["kernels"], r["clusters"], strict=True):
            prims = ", ".join(f"{n} {p}" if n > 1 else p for p, n in k["primitives"].items())
            lines.append(f"{k['name']}: {prims}")
            lines.append(f"    {len(k['nodes'])} nodes, {k['phases']} phases, {k['groups']} groups, {k['bytes']} bytes")
            lines.append(f"    {'; '.join(f'{x}: {REASONS[x]}' for x in c['reasons'])}")
        for h in r["host_nodes"]:
            lines.append(f"host: {h['operator']} {h['node']!r}: {REASONS[h['reason']]}")
        return "\n".join(lines)
