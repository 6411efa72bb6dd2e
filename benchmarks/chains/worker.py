"""A process with one engine and one number of threads, kept to as many processors, and its end of the pipe.

    python -m benchmarks.chains.worker ENGINE THREADS

Arrays do not travel: a worker makes its inputs itself, and reads the oracle's outputs from a folder.
"""

from __future__ import annotations

import importlib
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pipe
from benchmarks.chains import checking
from benchmarks.chains.case import Array, Case, Dims
from benchmarks.chains.cases import CASES
from benchmarks.chains.engines import ENGINES, Job, Session
from benchmarks.pipe import Process, processors

SAMPLE_S = 2e-4  # what one reading of the clock measures, at least: as many runs as that takes
SPARE = 4  # times the bytes of a case, for an engine's outputs and intermediates
ATTEMPTS = 5  # to find a run without page faults
SETTLE_S = 1.0  # spent on warming up, at most
LINE = 64  # bytes
CASE = {case.name: case for case in CASES}
FIRST = CASE["residual_relu"]  # in a size of its own, before anything is measured: imports are not compilation


class Worker(Process):
    """Our end of the pipe."""

    def __init__(self, engine: str, threads: int, python: str, caches: Path) -> None:
        self.engine = engine
        arguments = ["-m", "benchmarks.chains.worker", engine, str(threads)]
        super().__init__(python, arguments, environment(threads, caches))


def environment(threads: int, caches: Path) -> Mapping[str, str]:
    """Variables that tell every library how many threads to use, where to keep compiled code, and to keep memory.

    glibc gives large blocks back to the system when they are freed, and gets them again page by page. That would be
    most of the time of an engine that allocates its outputs, so memory is kept, and in large pages, as numpy's is."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "NUMEXPR_MAX_THREADS": count,
        "NUMBA_NUM_THREADS": count,
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}",
        "JAX_PLATFORMS": "cpu",
        "STITCH_CACHE_DIR": str(caches / "stitch"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "GLIBC_TUNABLES": ":".join(
            f"glibc.malloc.{name}" for name in ("mmap_max=0", f"trim_threshold={1 << 40}", "arena_max=1", "hugetlb=1")
        ),
    }


# ------------------------------------------------------------------ the other end


def serve(engine: str, threads: int) -> None:
    """Answers commands until there are no more."""
    os.sched_setaffinity(0, processors(threads))
    load, module = ENGINES[engine]
    job: Job | None = None
    session: Session | None = None

    def handle(command: str, *rest: Any) -> Any:
        nonlocal job, session
        match command:
            case "start":
                load(prepare(FIRST, {"n": 64}, threads))
                return str(importlib.import_module(module).__version__)
            case "prepare":
                session = None
                name, size = rest
                job = prepare(CASE[name], CASE[name].sizes[size], threads)
            case "load":
                session = None
                assert job is not None
                start = time.perf_counter()
                session = load(job)
                return time.perf_counter() - start
            case "error":
                assert job is not None
                assert session is not None
                settle(session)
                return checking.error(session.results(), expected(*rest), job.outputs)
            case "time":
                assert session is not None
                return sample(session, *rest)
            case "drop":
                session = job = None
        return None

    pipe.serve(handle)


def prepare(case: Case, dims: Dims, threads: int) -> Job:
    """The model and arrays of a case, with memory at hand for what the engine will allocate."""
    np.ones(SPARE * case.bytes(dims), np.uint8)  # freed at once, but its pages stay: see `environment`
    feed = {k: aligned(x) for k, x in case.feed(dims).items()}
    return Job(case.model(dims), feed, [aligned(y) for y in case.outputs(dims)], threads)


def aligned(x: Array) -> Array:
    """A copy that begins on a cache line, as the arrays of all frameworks do, while numpy's begin anywhere."""
    room = np.empty(x.nbytes + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def expected(folder: Path) -> list[Array]:
    """What the oracle left there."""
    return [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]


def settle(session: Session) -> None:
    """Runs until the allocator has all the pages it needs, so that a run takes no page faults; not for long, though."""
    before, end = -1, time.perf_counter() + SETTLE_S
    while before != (before := faults()) and time.perf_counter() < end:
        session.run()


def faults() -> int:
    """Page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def sample(session: Session, seconds: float) -> list[float]:
    """Seconds of a run, measured for about that long, at least once. The first run, which finds cold caches, does not
    count if there is time for others; nor do those with more page faults than the others, in which the allocator of an
    engine found no room among its pages.

    With one processor the clock is the process's time on it, whichever of its threads ran: what other processes take
    does not count. With more it is wall time."""
    clock = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    end = time.perf_counter() + seconds

    def measured(number: int) -> tuple[int, float]:
        before, start = faults(), clock()
        for _ in range(number):
            session.run()
        return faults() - before, (clock() - start) / number

    first = measured(1)
    number = math.ceil(SAMPLE_S / max(first[1], 1e-6))
    found = [first] if first[1] > seconds / 3 else []
    while not found or time.perf_counter() < end or (min(found)[0] and len(found) < ATTEMPTS):
        found.append(measured(number))
    least = min(found)[0]
    return [each for missed, each in found if missed == least]


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
