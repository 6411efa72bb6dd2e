"""A process with one engine and one number of threads, kept to as many processors, and its end of the pipe.

    python -m benchmarks.chains.worker ENGINE THREADS

Messages and answers are pickles: a command with its arguments; whether it went well, and the result or the reason.
Arrays do not travel: a worker makes its inputs itself, and reads the oracle's outputs from a folder.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import resource
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chains import checking
from benchmarks.chains.case import Array, Case, Dims
from benchmarks.chains.cases import CASES
from benchmarks.chains.engines import ENGINES, Job, Session

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240  # for one answer: a compiler may be slow, but not that slow
SAMPLE_S = 2e-4  # what one reading of the clock measures, at least: as many runs as that takes
SPARE = 4  # times the bytes of a case, for an engine's outputs and intermediates
ATTEMPTS = 5  # to find a run without page faults
SETTLE_S = 1.0  # spent on warming up, at most
LINE = 64  # bytes
CASE = {case.name: case for case in CASES}
FIRST = CASE["residual_relu"]  # in a size of its own, before anything is measured: imports are not compilation


class Failed(Exception):
    """What an engine answered instead of a result."""


class Worker:
    """Our end of the pipe."""

    def __init__(self, engine: str, threads: int, python: str, caches: Path) -> None:
        self.engine = engine
        self._command = [python, "-m", "benchmarks.chains.worker", engine, str(threads)]
        self._environ = os.environ | environment(threads, caches)
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, *message: Any) -> Any:
        """The answer to a command. Raises Failed; a process that died, or does not answer, is replaced."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
                self._process.kill()
            good, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            self._start()
            raise Failed(f"the process ended with {code}") from None
        if not good:
            raise Failed(answer)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


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
    """Answers commands from stdin on stdout, until there are no more."""
    os.sched_setaffinity(0, processors(threads))
    answers, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    os.dup2(2, 1)  # what a library prints is no answer
    load, module = ENGINES[engine]
    job: Job | None = None
    session: Session | None = None
    while True:
        try:
            command, *rest = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = None
            match command:
                case "start":
                    answer = str(importlib.import_module(module).__version__)
                    load(prepare(FIRST, {"n": 64}, threads))
                case "prepare":
                    session = None
                    name, size = rest
                    job = prepare(CASE[name], CASE[name].sizes[size], threads)
                case "load":
                    session = None
                    assert job is not None
                    start = time.perf_counter()
                    session = load(job)
                    answer = time.perf_counter() - start
                case "error":
                    assert job is not None
                    assert session is not None
                    settle(session)
                    answer = checking.error(session.results(), expected(*rest), job.outputs)
                case "time":
                    assert session is not None
                    answer = sample(session, *rest)
                case "drop":
                    session = job = None
            good = True
        except Exception as problem:
            good, answer = False, _told(problem)
        pickle.dump((good, answer), answers)
        answers.flush()


def _told(problem: Exception) -> str:
    """The type and the first line that says something."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0][:150] if lines else ''}"


def processors(threads: int) -> set[int]:
    """The last ones of those that we may use: interrupts go to the first."""
    return set(sorted(os.sched_getaffinity(0))[-threads:])


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
