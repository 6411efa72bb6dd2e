"""Which kernels of a model run on which devices: what `stitch.optimize(model, devices=..., objective=...)` decides.

    found = decide(stitched, target, devices, board, "throughput", sizes, rates)
    found.assignment        the part that each kernel goes to; `found.stages` says where the parts run
    print(found)            stages, predicted times, the bottleneck, and what the alternatives would have cost

Times are those of `stitch.cost`. The algorithms are in `stitch.placement`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise

from stitch.codegen import assemble
from stitch.codegen.assemble import Tables
from stitch.cost import Rates, Work
from stitch.decision import Decision, Objective, Phase, Stage
from stitch.devices import Device
from stitch.measure import works
from stitch.partition import borders
from stitch.placement import latency, pipeit, sharing, throughput
from stitch.placement import problem as placing
from stitch.placement.problem import Item, Link, Problem, Value
from stitch.shared import Team
from stitch.simulate.model import links_of, sizes_of, values_of
from stitch.stitching.schedule import Kernel, Stitched
from stitch.target import Target
from stitch.topology import Board, Cluster, render_cpus

__all__ = ["decide", "sizes_of"]

SLACK = 0.02
"""By how much the bottleneck of a pipeline may be longer than the shortest, if that saves a stage."""

HOST_CALL, HOST_BYTES = 20e-6, 2e9
"""Seconds of a step in numpy, and the bytes that it goes over in a second."""


def decide(
    stitched: Stitched, target: Target, devices: Sequence[Device], board: Board, objective: Objective,
    sizes: Mapping[str, int], rates: Rates,
) -> Decision:  # fmt: skip
    """Where each kernel runs, at these sizes of all symbols. Raises PlacementError."""
    return place(stitched, target, devices, board, objective, sizes, rates)[0]


def place(
    stitched: Stitched, target: Target, devices: Sequence[Device], board: Board, objective: Objective,
    sizes: Mapping[str, int], rates: Rates,
) -> tuple[Decision, Tables]:  # fmt: skip
    """The same, and how the teams of stages with helpers share out their work."""
    lowered = assemble.lower(stitched, target)
    described = iter(works(stitched, lowered, sizes, target, reused=True))
    work = [next(described) if k.name in lowered else () for k in stitched.kernels]
    cuts = [0, *borders(stitched), len(stitched.kernels)]
    pieces = [range(a, b) for a, b in pairwise(cuts) if b > a]
    awake = [rates.slower(_slowness(d, board)) for d in devices]
    own = [r.slower(1 / d.share) for r, d in zip(awake, devices, strict=True)]
    problem = _problem(stitched, pieces, work, devices, board, sizes, own)
    alternatives = _alone(problem, devices)
    team = Team()
    if objective == "throughput":
        found = throughput.place(problem, SLACK)
        runs = [(s.device, s.cores, range(s.begin, s.end)) for s in found.stages]
        seconds, times, exact = found.bottleneck, found.seconds, found.exact
        if len(problem.devices) > 1:
            alternatives.append(("the heuristic of Pipe-it", pipeit.place(problem).bottleneck))
    else:
        if len(devices) > 1:
            alternatives.append(("no operator shared by devices", latency.place(problem).seconds))
            named = {k.name: w for k, w in zip(stitched.kernels, work, strict=True) if w}
            lead, given = sharing.leader(problem.items), [d.share for d in devices]
            team = Team.of(lowered, named, problem.devices, _hops(problem, devices), awake, given, sizes, lead)
            saved = [sum(team.saved(stitched.kernels[k].name) for k in piece) for piece in pieces]
            problem = sharing.help_out(problem, lead, saved)
        placement = latency.place(problem)
        runs = _runs(problem, placement.devices)
        seconds, exact = placement.seconds, placement.exact
        times = tuple(sum(problem.items[k].seconds[d][n - 1] for k in at) for d, n, at in runs)
    if len(devices) > 1:
        cores, given_all = sum(d.cores for d in devices), math.prod(d.share for d in devices)
        slowest = max(awake, key=lambda r: r.dispatch)
        total = sum(_seconds(w, k, slowest, cores, sizes) for w, k in zip(work, stitched.kernels, strict=True))
        alternatives.append((f"one team on all {cores} cores, in equal shares", total / given_all))
    insides = [[k for p in at for k in pieces[p]] for _, _, at in runs]
    assignment = [0] * len(stitched.kernels)
    for number, inside in enumerate(insides):
        for k in inside:
            assignment[k] = number
    stages: list[Stage] = []
    phases: list[Phase] = []
    tables: dict[str, Sequence[tuple[int, ...]]] = {}
    sets = _sets(runs, devices, objective == "throughput")
    for (d, _, _), inside, cpus, spent in zip(runs, insides, sets, times, strict=True):
        names = [stitched.kernels[k].name for k in inside]
        helpers = team.helpers(names) if d == team.lead else []
        label = " + ".join([f"cpu:{render_cpus(cpus)}", *(str(devices[h]) for h in helpers)])
        beside = tuple(devices[h].cpus for h in helpers)
        stages.append(Stage(label, cpus, names[0], names[-1], len(names), spent, beside))
        if helpers:
            tables |= team.tables(names, [len(c.cpus) if h in (d, *helpers) else 0 for h, c in enumerate(devices)])
            phases += team.phases(names)
    busy = {cpu for s in stages for cpus in (s.cpus, *s.helpers) for cpu in cpus}
    idle = tuple(str(d) for d in devices if busy.isdisjoint(d.cpus))
    decision = Decision(
        objective, tuple(stages), tuple(assignment), seconds, exact, tuple(alternatives), dict(sizes), rates.fitted,
        tuple(map(str, devices)), tuple(phases), idle,
    )  # fmt: skip
    return decision, tables


def _sets(runs: Sequence[tuple[int, int, range]], devices: Sequence[Device], apart: bool) -> Iterator[tuple[int, ...]]:
    """The CPUs of each stage; `apart`: stages work at the same time, each on cores of its own."""
    free = [[core for c in d.clusters for core in c.cores] for d in devices]
    for d, cores, _ in runs:
        yield tuple(sorted(cpu for core in free[d][:cores] for cpu in core))
        if apart:
            del free[d][:cores]


def _hops(problem: Problem, devices: Sequence[Device]) -> list[list[Link]]:
    """The links for sharing: none between sets that share a cache, which the cost of handing out includes."""
    names = [_cluster(d).name for d in devices]
    return [[Link() if a == b else problem.link(k, n) for n, b in enumerate(names)] for k, a in enumerate(names)]


def _problem(
    stitched: Stitched, pieces: Sequence[range], work: Sequence[Sequence[Work]], devices: Sequence[Device],
    board: Board, sizes: Mapping[str, int], own: Sequence[Rates],
) -> Problem:  # fmt: skip
    """An item for each piece that cannot be cut."""
    items = tuple(
        Item(
            stitched.kernels[piece[0]].name,
            tuple(
                tuple(
                    sum(_seconds(work[k], stitched.kernels[k], own[d], n, sizes) for k in piece)
                    for n in range(1, device.cores + 1)
                )
                for d, device in enumerate(devices)
            ),
        )
        for piece in pieces
    )
    home = {k: p for p, piece in enumerate(pieces) for k in piece}
    values = []
    for v in values_of(stitched, sizes):
        producer = home.get(v.producer, placing.INPUT)
        users = tuple(dict.fromkeys(home[u] for u in v.consumers if home[u] > producer))
        if users or v.output:
            values.append(Value(v.name, producer, users, v.bytes, v.output))
    clusters = [_cluster(d) for d in devices]
    named = tuple(placing.Device(str(d), d.cores) for d in devices)
    return Problem(items, named, tuple(values), links_of(board, clusters))


def _cluster(device: Device) -> Cluster:
    """That of most of a device's cores."""
    return max(device.clusters, key=lambda c: len(c.cores))


def _slowness(device: Device, board: Board) -> float:
    """Of its cores, while it has them."""
    fastest = max(c.capacity for c in board.clusters)
    return fastest / min(c.capacity for c in device.clusters)


def _seconds(work: Sequence[Work], kernel: Kernel, rates: Rates, cores: int, sizes: Mapping[str, int]) -> float:
    if work:
        return rates.total(work, cores)
    from stitch import dims

    moved = sum(max(dims.evaluate(v.bytes, sizes), 0) for v in (*kernel.reads(), *kernel.writes()))
    return HOST_CALL + moved / HOST_BYTES


def _alone(problem: Problem, devices: Sequence[Device]) -> list[tuple[str, float]]:
    return [(f"everything on {device}", float(problem.sums[d][-1][-1])) for d, device in enumerate(devices)]


def _runs(problem: Problem, assignment: Sequence[int]) -> list[tuple[int, int, range]]:
    """Consecutive items on one device, each on all of its cores."""
    runs, at = [], 0
    for d, group in groupby(assignment):
        count = len(list(group))
        runs.append((d, problem.devices[d].cores, range(at, at + count)))
        at += count
    return runs
