"""The stages in order: from an ONNX model to an artifact. One line per stage; each takes and gives a frozen value."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stitch import importer, knobs, report
from stitch.codegen import assemble, machine
from stitch.errors import ResourceError
from stitch.graph import Graph
from stitch.plan import Artifact
from stitch.simplify import simplify
from stitch.stitching.schedule import Stitched, render
from stitch.stitching.stitch import stitch
from stitch.target import Target


def compile(model: Any, target: Target, shapes: Mapping[str, Sequence[int | str | None]] | None) -> Artifact:
    """Raises UnsupportedOperator or InvalidModel, and ResourceError for a model that nests too deeply."""
    try:
        return _compile(model, target, shapes)
    except RecursionError:
        raise ResourceError("stack", "the model nests too deeply", "raise sys.setrecursionlimit, or cut it") from None


def _compile(model: Any, target: Target, shapes: Mapping[str, Sequence[int | str | None]] | None) -> Artifact:
    debug = knobs.current().debug
    with _stage("import", debug):
        opened: list[Path] = []
        imported = importer.load(model, shapes, opened)
        external = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in opened]
    stitched = cut(imported, target)
    with _stage("assemble", debug):
        explained = report.describe(stitched, imported, knobs.current().schemes) | {"external": external}
        return assemble.assemble(stitched, target, lambda text: _object(text, target, debug), explained)


def cut(imported: Graph, target: Target) -> Stitched:
    """The kernels that a graph becomes on a target."""
    debug, now = knobs.current().debug, knobs.current()
    with _stage("simplify", debug):
        graph = simplify(imported)
    with _stage("stitch", debug):
        stitched = stitch(graph, (now.l2_bytes or target.l2_bytes) // 2, now.schemes, now.merging)
    if debug >= 2:
        print(render(stitched), file=sys.stderr)
    return stitched


def _object(text: str, target: Target, debug: int) -> bytes:
    if debug >= 4:
        print(text, machine.assembly(text, target), sep="\n", file=sys.stderr)
    return machine.compile(text, target)


@contextmanager
def _stage(name: str, debug: int) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if debug >= 1:
        print(f"stitch: {name} {1e3 * (time.perf_counter() - start):.0f} ms", file=sys.stderr)
