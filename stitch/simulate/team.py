"""Kernels that the clusters of a described board share, as the CPU sets of this machine would: `stitch.shared` with the
board's rates in place of a calibration, a kernel at a time.

What a kernel can be cut into is known from its loop program for the board's target. Its arithmetic and its bytes are
divided; beginning and ending it is not, and takes as long as on the slowest cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from stitch import dims, target
from stitch.codegen import assemble
from stitch.codegen.kernels import Lowered
from stitch.placement import sharing
from stitch.placement.sharing import Divisible
from stitch.shared import Team, way
from stitch.simulate.model import Loaded
from stitch.simulate.work import Work, rates_of, seconds
from stitch.stitching.schedule import Stitched
from stitch.topology import Board, Cluster


def team_of(stitched: Stitched, loaded: Loaded, board: Board, sizes: Mapping[str, int]) -> Team:
    """How the fastest cluster is helped by the others with each kernel."""
    lowered = assemble.lower(stitched, target.parse(board.target))
    problem, clusters = loaded.problem, board.clusters
    lead = sharing.leader(problem.items)
    found = {}
    for kernel, work in zip(stitched.kernels, loaded.work, strict=True):
        if kernel.name in lowered:
            of = divisible(lowered[kernel.name], work, clusters, sizes)
            found[kernel.name] = [(of, sharing.share(of, problem.devices, problem.links, lead))]
    return Team(lead, found)


def divisible(low: Lowered, work: Work, clusters: tuple[Cluster, ...], sizes: Mapping[str, int]) -> Divisible:
    """A kernel for the placement: into as many pieces as each of its phases can be cut."""

    def pieces(tasks: int, grain: int) -> int:
        return min(tasks // max(grain, 1), tasks)

    phases = low.program.phases
    nothing = Work(kernels=work.kernels)
    rates = [rates_of(c) for c in clusters]
    return Divisible(
        pieces=min((pieces(dims.evaluate(p.tasks, sizes), dims.evaluate(p.grain, sizes)) for p in phases), default=0),
        alone=tuple(seconds(work, r, len(c.cores)) for r, c in zip(rates, clusters, strict=True)),
        core=tuple(seconds(replace(work, kernels=0), r, 1) for r in rates),
        fixed=max(seconds(nothing, r, len(c.cores)) for r, c in zip(rates, clusters, strict=True)),
        bytes=math.ceil(work.read),
        way="columns" if any(way(p, sizes) == "columns" for p in phases) else "rows",
    )
