"""A fresh process that loads a network, runs it once, and prints what it knows about that, as JSON.

    python -m benchmarks.networks.start ENGINE|profile MODEL FEED CACHE

`benchmarks.loading` starts it. What it imports counts as a part of loading, so that is little.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.networks.engines import ENGINES
from benchmarks.pipe import OURS, told

COMPILER = ("onnx", "sympy", "stitch.compiler", "stitch.codegen", "stitch.importer", "stitch.graph", "stitch.dims")
PROFILE = "profile"  # stitch, by stages

IMPORTS, LLVM = "imports of the compiler", "LLVM: parse and generate code"
PARTS = (
    (IMPORTS, "", ""),
    ("hash of the file", "api.py", "_file_digest"),
    ("importer", "importer.py", "load"),
    ("simplify", "simplify", "simplify"),
    ("stitch", "stitch.py", "stitch"),
    ("lower to loop programs", "kernels.py", "lower"),
    ("emit LLVM text", "assemble.py", "_code"),
    ("entry, layout, arena", "assemble.py", "_step"),
    (LLVM, "", ""),
    ("pack the weights", "assemble.py", "build"),
    ("store in the cache", "cache.py", "store"),
    ("load the code", "executable.py", "__init__"),
)
"""Stages of a cold start: the function that each is, by file and name."""


def begin(engine: str, path: str, feed_file: str, cache: str) -> dict[str, Any]:
    """What is known: seconds, bytes, and why something could not be done."""
    start = time.perf_counter()
    importlib.import_module("stitch.api" if engine in (OURS, PROFILE) else engine)
    imported = time.perf_counter()
    if engine == PROFILE:
        return stages(path)
    session = ENGINES[engine](Path(path), len(os.sched_getaffinity(0)), Path(cache))
    loaded, processor = time.perf_counter(), time.process_time()
    found = {"loaded": loaded, "import": imported - start, "call": loaded - imported, "processor": processor}
    modules = [name for name in COMPILER if name in sys.modules]
    first: dict[str, Any]
    try:
        feed = session.taken(pickle.loads(Path(feed_file).read_bytes()))
        run_at = time.perf_counter()
        session.run(feed)
        first = {"first": time.perf_counter() - run_at}
    except Exception as problem:
        first = {"not_run": told(problem)}
    return {**found, **first, "peak": _peak(), "modules": modules}


def _peak() -> float:
    """Bytes."""
    match = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024.0 * int(match[1]) if match else float("nan")


def stages(path: str) -> dict[str, float]:
    """Seconds of each of PARTS, calls inside counted."""
    import cProfile
    import pstats
    from unittest import mock

    start = time.perf_counter()
    import stitch.compiler
    from stitch.codegen import machine

    found = {IMPORTS: time.perf_counter() - start}
    generate = machine.compile

    def timed(*args: Any) -> bytes:  # it runs in a thread, of which the profiler does not hear
        start = time.perf_counter()
        code = generate(*args)
        found[LLVM] = time.perf_counter() - start
        return code

    with cProfile.Profile() as profile, mock.patch.object(machine, "compile", timed):
        stitch.api.optimize(path)
    stats: Mapping[tuple[str, int, str], tuple[Any, ...]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, function), (_, _, _, seconds, _) in stats.items():
        for label, part, name in PARTS:
            if function == name and part in file.replace("\\", "/").split("/")[-2:]:
                found[label] = max(found.get(label, 0.0), seconds)
    return found


if __name__ == "__main__":
    answer: dict[str, Any]
    try:
        answer = begin(*sys.argv[1:])
    except Exception as problem:
        answer = {"refused": told(problem)}
    print(json.dumps(answer))
