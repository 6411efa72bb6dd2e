"""What a kernel computes and moves, from the stitcher's decisions alone, and how long that takes a cluster.

    seconds = contraction / rate + elementwise / rate + bytes / bandwidth + kernel

with the rates of `stitch.topology.Rates`, or, where a board has none, its peak flops and bandwidth, of which kernels
are taken to reach the shares below. On k of n cores everything but the bytes is slower by Amdahl's law, the seconds of
each kernel too (taking these as constant would favour stages of one core); of the bandwidth they get k / n, since the
other cores are at work as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from stitch import dims
from stitch.access import Axis
from stitch.graph import Value
from stitch.ops.primitives import PRIMITIVES
from stitch.stitching.schedule import Group, Kernel
from stitch.topology import Cluster, Rates

REACHED = {"contraction": 0.6, "elementwise": 0.25}
"""The share of a core's peak that is reached where nothing was measured: a rough guess, the same for all boards."""
KERNEL = 5e-6  # seconds to begin and end one, likewise
PARALLEL = 0.95


@dataclass(frozen=True)
class Work:
    """`contraction` in flop (a multiply-add is two), `elementwise` in operations, the others in bytes.

    Depthwise convolutions are elementwise: the stitcher makes them products and sums."""

    contraction: float = 0.0
    elementwise: float = 0.0
    read: int = 0
    written: int = 0
    weights: int = 0
    kernels: int = 1

    @property
    def bytes(self) -> int:
        return self.read + self.written + self.weights

    def __add__(self, other: Work) -> Work:
        return Work(
            self.contraction + other.contraction, self.elementwise + other.elementwise,
            self.read + other.read, self.written + other.written, self.weights + other.weights,
            self.kernels + other.kernels,
        )  # fmt: skip


def work_of(kernel: Kernel, sizes: Mapping[str, int], constants: Iterable[Value]) -> Work:
    """The work of a kernel. `sizes`: extents of all symbols; `constants`: those of the graph, whose bytes are weights.

    Each point of a group's axes counts all that is evaluated there, and each value read counts once."""
    known = frozenset(constants)
    extent = partial(_extent, sizes=sizes)
    heavy = elementwise = 0.0
    for phase in kernel.phases:
        c = phase.contraction
        if c is not None:
            heavy += 2.0 * extent((*c.batch, *c.rows, *c.columns, *c.summed))
        for group in phase.groups:
            elementwise += extent(group.axes) * _operations(kernel, group)
    if kernel.opaque is not None:  # a scatter, or numpy: elements times what one costs
        cost = PRIMITIVES[kernel.opaque.prim].cost or 1.0
        elementwise += cost * sum(dims.evaluate(v.size, sizes) for v in kernel.opaque.inputs)

    def bytes_of(values: Iterable[Value]) -> int:
        return sum(max(0, dims.evaluate(v.bytes, sizes)) for v in values)

    reads = kernel.reads()
    return Work(
        heavy, elementwise, bytes_of(v for v in reads if v not in known), bytes_of(kernel.writes()),
        bytes_of(v for v in reads if v in known),
    )  # fmt: skip


def _operations(kernel: Kernel, group: Group) -> float:
    """Of one point: the elementwise primitives, and a fold's step."""
    makers = {v: n for n in kernel.nodes for v in n.outputs}
    nodes = {*group.nodes, *(makers[r.value] for r in group.roots if r.value in makers)}
    return sum(
        PRIMITIVES[n.prim].cost for n in nodes if PRIMITIVES[n.prim].kind in ("elementwise", "reduction", "movement")
    )


def _extent(axes: Iterable[Axis], sizes: Mapping[str, int]) -> int:
    return math.prod(max(0, dims.evaluate(a.extent, sizes)) for a in axes)


def rates_of(cluster: Cluster) -> Rates:
    """The rates that were measured, or what the peak numbers promise. Raises ValueError if nothing is known."""
    if cluster.rates is not None:
        return cluster.rates
    if not cluster.flops or not cluster.bandwidth:
        raise ValueError(f"neither rates nor peak numbers are known of the cluster {cluster.name!r}")
    peak = cluster.flops * len(cluster.cores)
    arithmetic = {kind: peak * share for kind, share in REACHED.items()}
    # An elementwise operation is one, a multiply-add two.
    arithmetic["elementwise"] /= 2
    return Rates(**arithmetic, bandwidth=cluster.bandwidth, kernel=KERNEL, cores=len(cluster.cores), parallel=PARALLEL)


def seconds(work: Work, rates: Rates, cores: int) -> float:
    """On so many cores of a cluster with these rates."""
    of = rates.cores
    slower = (1 - rates.parallel + rates.parallel / cores) / (1 - rates.parallel + rates.parallel / of)
    arithmetic = work.contraction / rates.contraction + work.elementwise / rates.elementwise
    own = (arithmetic + rates.kernel * work.kernels) * slower
    return own + work.bytes / rates.bandwidth * of / cores
