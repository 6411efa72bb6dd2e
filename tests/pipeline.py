"""The whole compiler on a graph: for tests that build graphs by hand or at random instead of importing models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from stitch import target as targets
from stitch.codegen import assemble, machine
from stitch.graph import Graph
from stitch.knobs import Scheme
from stitch.ops.primitives import Array
from stitch.plan import Artifact
from stitch.runtime import cpu
from stitch.runtime.executable import Executable
from stitch.simplify import simplify
from stitch.stitching.schedule import Stitched
from stitch.stitching.stitch import ALL, stitch
from stitch.target import Target

BUDGET = 1 << 19
"""Bytes of tiles per worker that no small test exceeds."""

SCHEMES: tuple[tuple[Scheme, ...], ...] = (
    ("independent",),
    ("independent", "local"),
    ("independent", "global"),
    ("independent", "local", "regional"),
    ("independent", "local", "regional", "global"),
)
"""Every set of schemes that the stitcher has another way of working for."""


@lru_cache(maxsize=1)
def host() -> Target:
    here = cpu.host()
    return targets.from_host(here.triple, here.cpu, here.features)


def cut(graph: Graph, schemes: Collection[Scheme] = ALL, budget: int = BUDGET, simplified: bool = True) -> Stitched:
    """The kernels of a graph, checked."""
    stitched = stitch(simplify(graph) if simplified else graph, budget, schemes)
    stitched.check()
    return stitched


def build(stitched: Stitched, target: Target | None = None) -> Artifact:
    target = target or host()
    return assemble.assemble(stitched, target, lambda text: machine.compile(text, target), {})


def compile(
    graph: Graph, schemes: Collection[Scheme] = ALL, budget: int = BUDGET, target: Target | None = None
) -> Artifact:
    return build(cut(graph, schemes, budget), target)


def run(artifact: Artifact, feeds: Mapping[str, Array], threads: int = 1) -> list[Array]:
    """One run on a fresh executable."""
    executable = Executable(artifact, threads)
    try:
        return executable.run([np.asarray(feeds[p.name]) for p in artifact.inputs])
    finally:
        executable.close()


def native(graph: Graph, feeds: Mapping[str, Array], **options: Any) -> list[Array]:
    return run(compile(graph, **options), feeds)


def same_bits(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return all(
        x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )
