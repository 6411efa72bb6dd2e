"""The stages in order: from an ONNX model to an artifact. One line per stage; each takes and gives a frozen value."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch import importer, knobs, report
from stitch.bundle import Bundle
from stitch.codegen import assemble, machine
from stitch.decision import Assignment
from stitch.errors import ResourceError
from stitch.graph import Graph
from stitch.partition import split
from stitch.plan import Artifact
from stitch.simplify import simplify
from stitch.stitching.schedule import Stitched, render
from stitch.stitching.stitch import stitch
from stitch.target import Target

Shapes = Mapping[str, Sequence["int | str | None"]]


@dataclass(frozen=True)
class Front:
    """A model up to where it is cut: its kernels, and the report on them."""

    stitched: Stitched
    report: Mapping[str, Any]


def compile(model: Any, target: Target, shapes: Shapes | None) -> Artifact:
    """Raises UnsupportedOperator or InvalidModel, and ResourceError for a model that nests too deeply."""
    front = stitched(model, target, shapes)
    with _nesting(), _stage("assemble"):
        return _assembled(front.stitched, target, front.report)


def compile_parts(
    model: Any,
    target: Target,
    shapes: Shapes | None,
    assign: Callable[[Stitched], Assignment],
) -> Bundle:
    """The model in parts: `assign` says for each kernel which part it goes to (see `stitch.partition.split`), and more.

    Raises what `compile` raises, and ValueError for kernels that cannot be split so."""
    front = stitched(model, target, shapes)
    with _nesting(), _stage("assemble"):
        found = assign(front.stitched)
        parts = split(front.stitched, found.parts)
        allowed, external = knobs.current().schemes, {"external": front.report["external"]}

        def assembled(part: Stitched) -> Artifact:
            return _assembled(part, target, report.describe(part, allowed=allowed) | external, found.tables)

        return parts.bundle(assembled, {**front.report, **found.notes})


def stitched(model: Any, target: Target, shapes: Shapes | None) -> Front:
    """The stages before code is made. Raises UnsupportedOperator, InvalidModel or ResourceError."""
    with _nesting():
        with _stage("import"):
            opened: list[Path] = []
            imported = importer.load(model, shapes, opened)
            external = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in opened]
        found = cut(imported, target)
        return Front(found, report.describe(found, imported, knobs.current().schemes) | {"external": external})


def cut(imported: Graph, target: Target) -> Stitched:
    """The kernels that a graph becomes on a target."""
    now = knobs.current()
    with _stage("simplify"):
        graph = simplify(imported)
    with _stage("stitch"):
        found = stitch(graph, (now.l2_bytes or target.l2_bytes) // 2, now.schemes, now.merging)
    if now.debug >= 2:
        print(render(found), file=sys.stderr)
    return found


def _assembled(
    found: Stitched, target: Target, report: Mapping[str, Any], tables: assemble.Tables | None = None
) -> Artifact:
    debug = knobs.current().debug
    return assemble.assemble(found, target, lambda text: _object(text, target, debug), report, tables=tables)


def _object(text: str, target: Target, debug: int) -> bytes:
    if debug >= 4:
        print(text, machine.assembly(text, target), sep="\n", file=sys.stderr)
    return machine.compile(text, target)


@contextmanager
def _nesting() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ResourceError("stack", "the model nests too deeply", "raise sys.setrecursionlimit, or cut it") from None


@contextmanager
def _stage(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if knobs.current().debug >= 1:
        print(f"stitch: {name} {1e3 * (time.perf_counter() - start):.0f} ms", file=sys.stderr)
