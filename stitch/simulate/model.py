"""A stitched model as a placement problem: an item for each kernel, a device for each cluster of a board, or for each
set of cores that is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stitch import dims
from stitch.graph import Value as Tensor
from stitch.ops.primitives import PRIMITIVES
from stitch.placement.problem import INPUT, Device, Item, Link, Problem, Value
from stitch.simulate.work import Work, rates_of, seconds, work_of
from stitch.sizes import checked
from stitch.stitching.schedule import Kernel, Stitched
from stitch.topology import Board, Cluster

Clock = Callable[[Work, Cluster, int], float]
"""Seconds of a work on so many cores of a cluster."""


def by_rates(work: Work, cluster: Cluster, cores: int) -> float:
    return seconds(work, rates_of(cluster), cores)


@dataclass(frozen=True)
class Loaded:
    """`work` by kernel, and the problem with an item for each kernel, in their order."""

    problem: Problem
    work: tuple[Work, ...]


def problem_of(
    stitched: Stitched,
    board: Board,
    sizes: Mapping[str, int],
    clock: Clock = by_rates,
    sets: Sequence[Cluster] | None = None,
) -> Loaded:
    """The problem of placing a model's kernels, at these sizes of all symbols. `sets`: clusters, or parts of them, in
    the order of the problem's devices; None: all of the board."""
    clusters = board.clusters if sets is None else sets
    constants = {n.output for n in stitched.graph.nodes if PRIMITIVES[n.prim].kind == "source"}
    work = tuple(work_of(k, sizes, constants) for k in stitched.kernels)
    items = tuple(
        Item(k.name, tuple(tuple(clock(w, c, n) for n in range(1, len(c.cores) + 1)) for c in clusters), w.weights)
        for k, w in zip(stitched.kernels, work, strict=True)
    )
    devices = tuple(Device(c.name, len(c.cores)) for c in clusters)
    return Loaded(Problem(items, devices, values_of(stitched, sizes), links_of(board, clusters)), work)


def links_of(board: Board, clusters: Sequence[Cluster]) -> tuple[tuple[Link, ...], ...]:
    """By source and destination; the diagonal is between two sets of cores of one cluster."""
    names = [c.name for c in clusters]
    return tuple(tuple(Link(link.latency, link.bandwidth) for b in names for link in [board.link(a, b)]) for a in names)


def values_of(stitched: Stitched, sizes: Mapping[str, int]) -> tuple[Value, ...]:
    """The values that pass between kernels, which are counted from 0, and inputs and outputs."""
    constants = {n.output for n in stitched.graph.nodes if PRIMITIVES[n.prim].kind == "source"}
    made: dict[Tensor, int] = dict.fromkeys(stitched.graph.inputs, INPUT)
    users: dict[Tensor, list[int]] = {}
    for k, kernel in enumerate(stitched.kernels):
        for v in kernel.writes():
            made[v] = k  # of a concat in pieces, the last
    for k, kernel in enumerate(stitched.kernels):
        _note(kernel, k, users, constants)
    outputs = set(stitched.graph.outputs)
    return tuple(
        Value(
            v.name, k, tuple(dict.fromkeys(u for u in users.get(v, ()) if u > k)),
            max(0, dims.evaluate(v.bytes, sizes)), v in outputs,
        )
        for v, k in made.items()
    )  # fmt: skip


def _note(kernel: Kernel, k: int, users: dict[Tensor, list[int]], constants: set[Tensor]) -> None:
    for v in kernel.reads():
        if v not in constants:
            users.setdefault(v, []).append(k)


OTHERWISE = 1  # the extent of a symbol that is not given


def sizes_of(stitched: Stitched, given: Mapping[str, int]) -> dict[str, int]:
    """An extent for every symbol of a model."""
    values = [*stitched.graph.inputs, *(v for n in stitched.graph.nodes for v in n.outputs)]
    inputs = {s for v in stitched.graph.inputs for d in v.shape for s in dims.symbols(d)}
    known = checked(given, inputs)
    return {s: known.get(s, OTHERWISE) for v in values for d in v.shape for s in dims.symbols(d)}
