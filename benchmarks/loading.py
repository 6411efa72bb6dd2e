"""How long it takes from a model file to something that can run.

    python -m benchmarks.loading [--model PATH] [--rounds N] [--record]

Every figure is one of a fresh process: with an empty cache, with the cache that the one before has filled, and
onnxruntime's session beside them; the file is in the page cache. The time is taken from the process's start,
interpreter included, and for `optimize` by itself; beside it the process's processor time, in which neighbours hardly
show. In the second process it is checked that the compiler was not imported. Then the stages of a cold start, from one
more process, under a profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


# ------------------------------------------------------------------ from outside


def start(engine: str, path: Path, cache: Path) -> dict[str, Any]:
    """What a fresh process says, and how long it lived."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STITCH_")}
    environ |= {"STITCH_CACHE_DIR": str(cache / "stitch"), "PYTHONPYCACHEPREFIX": str(cache.parent / "bytecode")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "benchmarks.loading", "--child", engine, str(path)]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=models.ROOT, env=environ, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": wall, "processor": processor}


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
        parts = {label: parts[label] for label, _, _ in PARTS if label in parts}
    return found, parts


def tell(name: str, found: Mapping[str, Sequence[Mapping[str, Any]]], parts: Mapping[str, float]) -> str:
    """Markdown."""
    labels = {
        "cold": "stitch, empty cache",
        "second": "stitch, second process",
        "onnxruntime": "onnxruntime, session",
    }
    lines = [
        f"| {name} | process, s: best (median) | its processor time, s | imports, s | call, s: best (median) |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, label in labels.items():
        columns = ([s[key] for s in found[kind]] for key in ("wall", "processor", "import", "call"))
        wall, processor, imports, call = columns
        lines.append(
            f"| {label} | {min(wall):.2f} ({statistics.median(wall):.2f}) | {min(processor):.2f} | {min(imports):.2f} "
            f"| {min(call):.2f} ({statistics.median(call):.2f}) |"
        )
    cold, second = (min(s["wall"] for s in found[kind]) for kind in ("cold", "second"))
    loaded = sorted({module for s in found["second"] for module in s["modules"]})
    lines += [
        "",
        f"Aims, for the shortest start, since neighbours only add: cold below {COLD_S:g} s: "
        f"{'met' if cold < COLD_S else 'MISSED'}; second process below {SECOND_S:g} s: "
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


def _distilbert(folder: Path) -> Path:
    """The exported one, or else one that is built here and now, in the folder."""
    found = models.exports()
    if found is not None and (found / "distilbert.onnx").exists():
        return found / "distilbert.onnx"
    import onnx

    from benchmarks import architectures

    path = folder / "distilbert.onnx"
    onnx.save(architectures.MODELS["distilbert"](), str(path))
    time.sleep(3)  # stitch does not trust the times of a file that was written just now
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ONNX file (default: distilbert, exported or built)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(*args.child)
        return 0
    with tempfile.TemporaryDirectory(prefix="stitch-bench-") as folder:
        path = args.model.resolve() if args.model else _distilbert(Path(folder))
        text = tell(path.stem, *measure(path, args.rounds))
        size = path.stat().st_size / 1e6
    print(text)
    if args.record:
        about = f"`{path.name}` has {size:.0f} MB."
        results.record("loading", "From a file to a model", f"{results.origin()}\n\n{about}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
