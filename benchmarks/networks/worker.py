"""A process that holds one network at a time in one engine, kept to as many processors as it has threads.

    python -m benchmarks.networks.worker ENGINE THREADS

It runs in the environment of its engine, so it imports numpy and nothing else that is not Python's own.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import pipe
from benchmarks.networks.engines import ENGINES, Feed, Session

MOST = 20000  # runs in a turn


class Worker(pipe.Process):
    """Our end of the pipe."""

    def __init__(self, engine: str, threads: int, python: str, cache: Path) -> None:
        self.engine = engine
        environ = {"STITCH_CACHE_DIR": str(cache), "OMP_NUM_THREADS": str(threads)}
        super().__init__(python, ["-m", "benchmarks.networks.worker", engine, str(threads)], environ)


def serve(engine: str, threads: int) -> None:
    """The other end."""
    os.sched_setaffinity(0, pipe.processors(threads))
    session: Session | None = None
    feed: Feed = {}

    def handle(command: str, *rest: Any) -> Any:
        nonlocal session, feed
        if command == "start":
            return str(importlib.import_module(engine).__version__)
        if command == "drop":
            session, feed = None, {}
            return None
        if command == "load":
            session = None
            session = ENGINES[engine](rest[0], threads, None)
            return None
        if session is None:
            raise RuntimeError("nothing is loaded: the process had to be started again")
        match command:
            case "outputs":
                feed = session.taken(rest[0])
                return list(session.run(feed))
            case "time":
                return sample(session, feed, *rest)
        raise ValueError(command)

    pipe.serve(handle)


def sample(session: Session, feed: Feed, seconds: float, least: int) -> list[float]:
    """Seconds of each run, for that long. The first one, which finds cold caches, does not count.

    With one processor the clock is the process's time on it, whichever of its threads ran, and what other processes
    take does not count. With more it is wall time."""
    clock = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    run = session.run
    run(feed)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < MOST):
        start = clock()
        run(feed)
        times.append(clock() - start)
    return times


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
