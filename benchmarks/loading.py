"""How long it takes from a model file to something that can run.

    python -m benchmarks.loading [--model PATH] [--rounds N] [--record]

Every figure is one of a fresh process: with an empty cache, with the cache that the one before has filled, and
onnxruntime's session beside them; the file is in the page cache. Two times: from the process's start, interpreter
included, and `optimize` by itself. In the second process it is checked that the compiler was not imported. Then the
stages of a cold start, from one more process, under a profiler.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import models, results

COMPILER = ("onnx", "sympy", "stitch.compiler", "stitch.codegen", "stitch.importer", "stitch.graph", "stitch.dims")
COLD_S, SECOND_S = 5.0, 0.7  # what we want for distilbert

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


# ------------------------------------------------------------------ in the fresh process


def _child(engine: str, path: str) -> None:
    """Loads the model and prints what is known about it."""
    start = time.perf_counter()
    if engine == "onnxruntime":
        import onnxruntime as ort

        ort.set_default_logger_severity(3)
        imported = time.perf_counter()
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    else:
        import stitch.api

        imported = time.perf_counter()
        if engine == "profile":
            print(json.dumps(_parts(path)))
            return
        stitch.api.optimize(path)
    end = time.perf_counter()
    loaded = [name for name in COMPILER if name in sys.modules]
    print(json.dumps({"import": imported - start, "call": end - imported, "modules": loaded}))


def _parts(path: str) -> dict[str, float]:
    """Seconds of each of PARTS, calls inside counted."""
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


# ------------------------------------------------------------------ from outside


def start(engine: str, path: Path, cache: Path) -> dict[str, Any]:
    """What a fresh process says, and how long it lived."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STITCH_")}
    environ |= {"STITCH_CACHE_DIR": str(cache / "stitch"), "PYTHONPYCACHEPREFIX": str(cache.parent / "bytecode")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "benchmarks.loading", "--child", engine, str(path)]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=models.ROOT, env=environ, capture_output=True, text=True, check=True)
    wall = time.perf_counter() - begin
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": wall}


def measure(path: Path, rounds: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """All starts by kind, taking turns, and the seconds of each stage of a cold one."""
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "second": [], "onnxruntime": []}
    with tempfile.TemporaryDirectory(prefix="stitch-bench-") as folder:
        for engine in ("cold", "onnxruntime"):  # bytecode and the page cache, once for everybody
            start(engine, path, Path(folder) / "first")
        for number in range(rounds):
            cache = Path(folder) / str(number)
            for kind in found:
                found[kind].append(start(kind, path, cache))
            for file in (cache / "stitch").iterdir():
                file.unlink()
        parts = start("profile", path, Path(folder) / "profile")
        parts.pop("wall")
    return found, parts


def tell(name: str, found: Mapping[str, Sequence[Mapping[str, Any]]], parts: Mapping[str, float]) -> str:
    """Markdown."""
    labels = {
        "cold": "stitch, empty cache",
        "second": "stitch, second process",
        "onnxruntime": "onnxruntime, session",
    }
    lines = [
        f"| {name} | process, s: median (best) | imports, s | call, s: median (best) |",
        "|---|---:|---:|---:|",
    ]
    for kind, label in labels.items():
        wall, call, imports = ([s[key] for s in found[kind]] for key in ("wall", "call", "import"))
        lines.append(
            f"| {label} | {statistics.median(wall):.2f} ({min(wall):.2f}) | {statistics.median(imports):.2f} "
            f"| {statistics.median(call):.2f} ({min(call):.2f}) |"
        )
    cold, second = (statistics.median(s["wall"] for s in found[kind]) for kind in ("cold", "second"))
    loaded = sorted({module for s in found["second"] for module in s["modules"]})
    lines += [
        "",
        f"Aims: cold below {COLD_S:g} s: {'met' if cold < COLD_S else 'MISSED'}; second process below {SECOND_S:g} s: "
        f"{'met' if second < SECOND_S else 'MISSED'}; no compiler in the second process: "
        f"{'met' if not loaded else 'MISSED, it imports ' + ', '.join(loaded)}.",
        "",
        "A cold start by stages, under cProfile, which slows Python code down about twofold. Packing the weights and "
        "LLVM run side by side.",
        "",
        "| stage | s |",
        "|---|---:|",
        *(f"| {label} | {parts[label]:.2f} |" for label, _, _ in PARTS if label in parts),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ONNX file (default: the exported distilbert)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(*args.child)
        return 0
    folder = models.exports()
    path = args.model or (folder / "distilbert.onnx" if folder is not None else None)
    if path is None or not path.exists():
        print("no distilbert found: `make exports` makes it, or give --model")
        return 1
    text = tell(path.stem, *measure(path, args.rounds))
    print(text)
    if args.record:
        about = f"`{path.name}` has {path.stat().st_size / 1e6:.0f} MB."
        results.record("loading", "From a file to a model", f"{results.origin()}\n\n{about}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
