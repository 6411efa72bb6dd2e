"""What open dims cost: one compilation for all shapes, beside one for each.

The chain is compiled with a symbol for every dim, run at many shapes and compared with the oracle at each. Compiling is
timed in turns with the same chain's fixed dims; so is a run, both on the caller's arrays.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np

import stitch
from benchmarks.chains import checking, numpy_like
from benchmarks.chains.case import Case, Dims
from benchmarks.chains.engines import Session
from benchmarks.chains.program import translate
from benchmarks.chains.worker import aligned, sample
from stitch import compiler

SHAPES, TURNS, SLICE_S = 20, 7, 0.05
MOST = 800  # of a dim


@dataclass(frozen=True)
class Symbols:
    """`runs`: by size, microseconds of a run with open dims and with fixed ones."""

    case: str
    shapes: int
    compilations: int
    error: float  # the largest, as a part of what is allowed
    open_ms: float
    fixed_ms: float
    runs: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        more = 100 * (self.open_ms / self.fixed_ms - 1)
        runs = ", ".join(f"{size} {o:.1f} us ({f:.1f} fixed)" for size, (o, f) in self.runs.items())
        noun = "compilation" if self.compilations == 1 else "compilations"
        return (
            f"{self.case} with open dims: {self.compilations} {noun} for {self.shapes} shapes, {self.open_ms:.1f} ms "
            f"beside {self.fixed_ms:.1f} ms for one fixed shape ({more:+.0f} %); largest error {self.error:.2g} of "
            f"what is allowed; a run: {runs}."
        )


def measure(case: Case, sizes: tuple[str, ...] = ("small", "l3")) -> Symbols:
    """One thread; compiled without the disk's cache, in processor time. The compiler's imports are not counted."""
    model = case.open_model.SerializeToString()
    fixed_ms, open_ms = [], []
    stitch.optimize(model, threads=1, cache=False)
    for _ in range(TURNS):
        fixed_ms.append(_compile_ms(model, _shapes(case, case.sizes["small"])))
        open_ms.append(_compile_ms(model))
    with mock.patch.object(compiler, "compile", wraps=compiler.compile) as compilations:
        compiled = stitch.optimize(model, threads=1, cache=False)
        error = max(_error(case, compiled, dims) for dims in shapes(case, SHAPES))
    runs = {size: _runs(case, compiled, case.sizes[size]) for size in sizes}
    found = compilations.call_count
    return Symbols(case.name, SHAPES, found, error, statistics.median(open_ms), statistics.median(fixed_ms), runs)


def shapes(case: Case, count: int) -> list[dict[str, int]]:
    """Small and larger ones, most of them odd in every sense."""
    rng = np.random.default_rng(0)
    names = list(case.sizes["small"])
    return [{name: int(MOST ** rng.random()) for name in names} for _ in range(count)]


def _shapes(case: Case, dims: Dims) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in case.open_feed(dims).items()}


def _compile_ms(model: bytes, shapes: dict[str, tuple[int, ...]] | None = None) -> float:
    start = time.process_time()
    stitch.optimize(model, threads=1, cache=False, shapes=shapes)
    return 1e3 * (time.process_time() - start)


def _error(case: Case, compiled: stitch.CompiledModel, dims: Dims) -> float:
    feed = case.open_feed(dims)
    want = numpy_like.oracle(translate(case.open_model), feed)
    return checking.error(compiled.run(None, feed), want, case.outputs(dims))


def _runs(case: Case, compiled: stitch.CompiledModel, dims: Dims) -> tuple[float, float]:
    """Microseconds with open dims, and with fixed ones."""
    feed = {name: aligned(x) for name, x in case.open_feed(dims).items()}
    outputs = [aligned(y) for y in case.outputs(dims)]
    fixed = stitch.optimize(case.open_model, threads=1, cache=False, shapes=_shapes(case, dims))
    times: tuple[list[float], list[float]] = [], []
    for _ in range(TURNS):
        for engine, taken in zip((compiled, fixed), times, strict=True):
            session = Session(lambda e=engine: e.run(None, feed, outputs), lambda: outputs)  # type: ignore[misc]
            taken.append(1e6 * statistics.median(sample(session, SLICE_S)))
    return statistics.median(times[0]), statistics.median(times[1])
