"""How long one inference takes, beside onnxruntime with its default optimisations.

    python -m benchmarks.latency [--models NAME ...] [--threads 1,2] [--rounds N] [--record]

Each engine with each number of threads is a process of its own, kept to as many processors as it has threads; models
are loaded into all of them once. Outputs are compared first. Then the engines take turns: in each round, each runs for
a slice of time, one right after the other, so that both see the same neighbours. An engine's time is the median over
rounds of the medians within them; the ratio is the median of the rounds' ratios, and its spread reaches from the
lowest to the highest quarter of them. `best` compares the shortest single runs, which neighbours disturb least.

With one thread, nothing waits in either engine, and times are the thread's processor time: what others take of the
processor does not count. With more, they are wall time, and mean little on a machine that is not idle.

--record puts the tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, oracle, results

ENGINES = ("stitch", "onnxruntime")
SLICE_S = 0.15  # per engine and round, at least MIN_RUNS
MIN_RUNS = 3
QUICK = (
    *("mnist_cntk", "yunet_n_dyn", "magika_v3_3", "vespa_transformer"),
    *("light_squeezenet", "light_shufflenet", "mobilenet_v2"),
)

Feed = dict[str, np.ndarray]


# ------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Case:
    """A model with one feed; `noise` is how far a correct runtime may be off beside a thousandth of the largest."""

    collection: str
    name: str
    path: Path
    feed: Feed
    noise: float = 0.0


def cases(wanted: Sequence[str], folder: Path) -> Iterator[Case]:
    """Everything in float32 that is there, or those named. `folder`: for models that have to be written first."""
    for collection, name in models.names():
        if wanted and name not in wanted and f"{collection}_{name}" not in wanted:
            continue
        match collection:
            case "shared":
                case = next(iter(oracle.cases([name])))
                if case.tolerance == "fp32":
                    yield Case(collection, name, case.path, case.feed(), max(case.noise.values(), default=0.0))
            case "light":
                path = folder / f"{name}.onnx"
                feed = image(models.light() / path.name)
                give_weights(models.light() / path.name, path)
                yield Case(collection, name, path, feed)
                path.unlink()
            case "exports":
                root = models.exports()
                assert root is not None
                spec = json.loads((root / f"{name}.json").read_text())
                if spec["tolerance"] == "fp32":
                    yield Case(collection, name, root / spec["file"], models.make_feed(spec, spec["dims"]))


def image(path: Path, sizes: Mapping[str, int] | None = None) -> Feed:
    """Noise for the inputs of a model that are not weights; a dim that is open is 1, or what `sizes` says."""
    import onnx
    from onnx import helper

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {w.name for w in graph.initializer}
    rng = np.random.default_rng(models.SEED)
    feed = {}
    for i in graph.input:
        if i.name not in weights:
            kind = i.type.tensor_type
            shape = [d.dim_value or (sizes or {}).get(d.dim_param, 1) for d in kind.shape.dim]
            feed[i.name] = rng.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return feed


def give_weights(source: Path, path: Path) -> None:
    """The model with random weights. In the original every weight is the same number, which stitch would make use of,
    and which drives activations into denormals, where onnxruntime crawls: neither says anything about real models."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(source))
    graph = model.graph
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    rng = np.random.default_rng(models.SEED)
    kept = []
    for node in graph.node:
        shape = shapes.get(node.input[0]) if node.op_type == "ConstantOfShape" else None
        if shape is None:
            kept.append(node)
        elif len(shape) > 1:
            scale = 1 / math.sqrt(math.prod(shape[1:].tolist()))
            weights = rng.standard_normal(shape.tolist(), np.float32) * np.float32(scale)
            graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
        else:
            weights = rng.uniform(0.9, 1.1, shape.tolist()).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    onnx.save(model, str(path))


# ------------------------------------------------------------------ a process with one engine


class Failed(Exception):
    """What an engine answered instead of a result."""


class Worker:
    """A process that holds one model at a time in one engine."""

    def __init__(self, engine: str, threads: int, cache: Path) -> None:
        self.engine, self.threads = engine, threads
        self._cache = cache
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.latency", "--worker", self.engine, str(self.threads)]
        environ = os.environ | {"STITCH_CACHE_DIR": str(self._cache), "OMP_NUM_THREADS": str(self.threads)}
        self._process = subprocess.Popen(
            command, cwd=models.ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, *message: Any) -> Any:
        """The answer to a command. Raises Failed; a process that died is replaced."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
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


def processors(threads: int) -> set[int]:
    """The last ones of those that we may use: interrupts go to the first."""
    return set(sorted(os.sched_getaffinity(0))[-threads:])


def serve(engine: str, threads: int) -> None:
    """Answers commands from stdin on stdout, in pickles."""
    os.sched_setaffinity(0, processors(threads))
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    session: Any = None
    feed: Feed = {}
    while True:
        try:
            command, *rest = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = None
            match command:
                case "load":
                    session = None
                    path, feed = rest
                    session = _session(engine, threads, path)
                    feed = {n: np.array(feed[n], np.dtype(feed[n].dtype.name)) for n in _inputs(session) if n in feed}
                case "outputs":
                    answer = session.run(None, feed)
                case "time":
                    answer = _time(session, feed, *rest)
                case "drop":
                    session = None
            good = True
        except Exception as problem:
            good, answer = False, f"{type(problem).__name__}: {problem}"
        pickle.dump((good, answer), answers)
        answers.flush()


def _session(engine: str, threads: int, path: str) -> Any:
    if engine == "stitch":
        import stitch

        return stitch.optimize(path, threads=threads)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _inputs(session: Any) -> list[str]:
    found = session.get_inputs() if hasattr(session, "get_inputs") else session.inputs
    return [i.name for i in found]


def _time(session: Any, feed: Feed, seconds: float, least: int) -> list[float]:
    """Seconds of each run, for that long. The first one, which finds cold caches, does not count."""
    clock = time.thread_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    session.run(None, feed)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < 20000):
        start = clock()
        session.run(None, feed)
        times.append(clock() - start)
    return times


# ------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Row:
    name: str
    threads: int
    ms: tuple[float, float] = (0.0, 0.0)  # in the order of ENGINES
    ratio: float = 0.0
    spread: tuple[float, float] = (0.0, 0.0)
    best: tuple[float, float] = (0.0, 0.0)
    problem: str = ""


def measure(case: Case, workers: Sequence[Worker], threads: int, rounds: int) -> Row:
    """Engines with this many threads against each other."""
    pair = [w for w in workers if w.threads == threads]
    outputs = []
    for w in pair:
        try:
            w.ask("load", str(case.path), case.feed)
            outputs.append(w.ask("outputs"))
        except Failed as problem:
            return Row(case.name, threads, problem=f"{w.engine}: {str(problem).splitlines()[0][:150]}")
    error = difference(outputs[0], outputs[1], case.noise)
    if not error <= 1:
        return Row(case.name, threads, problem=f"outputs differ: {error:.3g} of what is allowed")
    per_round: list[list[float]] = []
    best = [math.inf, math.inf]
    for number in range(rounds):
        medians = [0.0, 0.0]
        for k in (0, 1) if number % 2 else (1, 0):
            times = pair[k].ask("time", SLICE_S, MIN_RUNS)
            medians[k] = 1e3 * statistics.median(times)
            best[k] = min(best[k], 1e3 * min(times))
            time.sleep(0.005)  # for threads that still spin
        per_round.append(medians)
    for w in pair:
        w.ask("drop")
    ratios = np.array([theirs / ours for ours, theirs in per_round])
    ms = statistics.median(m[0] for m in per_round), statistics.median(m[1] for m in per_round)
    low, high = (float(q) for q in np.quantile(ratios, (0.25, 0.75)))
    return Row(case.name, threads, ms, float(np.median(ratios)), (low, high), (best[0], best[1]))


def difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], noise: float) -> float:
    """The largest error as a part of what is allowed: a thousandth of the largest number of that output, and noise."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if not b.size:
            continue
        if b.dtype.kind != "f":
            worst = max(worst, 0.0 if np.array_equal(a, b) else math.inf)
            continue
        allowed = 1e-3 * float(np.nanmax(np.abs(b))) + 10 * noise
        off = float(np.nanmax(np.abs(a.astype(np.float64) - b)))
        worst = max(worst, off / allowed if allowed else (0.0 if off == 0 else math.inf))
    return worst


# ------------------------------------------------------------------ telling


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | threads | stitch ms | onnxruntime ms | onnxruntime / stitch | quartiles | best / best |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for r in rows:
        if r.problem:
            lines.append(f"| {r.name} | {r.threads} | | | not compared | {r.problem} | |")
            continue
        low, high = r.spread
        best = r.best[1] / r.best[0]
        lines.append(
            f"| {r.name} | {r.threads} | {figure(r.ms[0])} | {figure(r.ms[1])} | {r.ratio:.2f} "
            f"| {low:.2f} to {high:.2f} | {best:.2f} |"
        )
    return "\n".join(lines)


def figure(ms: float) -> str:
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def summary(rows: Sequence[Row]) -> str:
    """Geometric means, and where stitch is slower."""
    out = []
    for threads in sorted({r.threads for r in rows}):
        good = [r for r in rows if r.threads == threads and not r.problem]
        if not good:
            continue
        mean = math.exp(statistics.fmean(math.log(r.ratio) for r in good))
        best = math.exp(statistics.fmean(math.log(r.best[1] / r.best[0]) for r in good))
        slower = sorted((r for r in good if r.ratio < 1), key=lambda r: r.ratio)
        names = ", ".join(f"{r.name} ({r.ratio:.2f})" for r in slower) or "none"
        noun = "thread" if threads == 1 else "threads"
        out.append(
            f"{threads} {noun}: geometric mean of onnxruntime / stitch over {len(good)} models {mean:.2f} (best runs: "
            f"{best:.2f}). stitch is faster on {len(good) - len(slower)}; slower on {len(slower)}: {names}."
        )
    return "\n\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--threads", default="1,2", help="numbers with commas (default 1,2)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help=f"three rounds of {', '.join(QUICK)}")
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker[0], int(args.worker[1]))
        return 0
    wanted, rounds = (list(QUICK), 3) if args.quick else (args.models, args.rounds)
    counts = [int(n) for n in args.threads.split(",")]
    most = len(os.sched_getaffinity(0))
    for n in [n for n in counts if n > most]:
        print(f"{n} threads are left out: there are {most} processors")
    counts = [n for n in counts if n <= most]
    rows: list[Row] = []
    collections: dict[str, list[Row]] = {}
    with ExitStack() as stack:
        cache = Path(tempfile.mkdtemp(prefix="stitch-bench-"))
        stack.callback(shutil.rmtree, cache, ignore_errors=True)
        workers = [Worker(engine, n, cache) for n in counts for engine in ENGINES]
        for w in workers:
            stack.callback(w.close)
        for case in cases(wanted, cache):
            for n in counts:
                row = measure(case, workers, n, rounds)
                rows.append(row)
                collections.setdefault(case.collection, []).append(row)
                print(table([row]).splitlines()[-1], flush=True)
            for file in cache.glob("*.artifact"):  # the other number of threads has used it
                file.unlink(missing_ok=True)
    print("\n" + summary(rows))
    if models.exports() is None:
        print("\nno exported architectures found; `make exports` makes them")
    if args.record and rows:
        text = [summary(rows), *(f"**{TITLES[c]}**\n\n{table(found)}" for c, found in collections.items())]
        results.record("latency", "One inference, beside onnxruntime", results.origin() + "\n\n" + "\n\n".join(text))
    return 0


TITLES = {
    "shared": "Real models",
    "light": "The networks in the onnx package, with random weights",
    "exports": "Large architectures, random weights, symbolic dims",
}


if __name__ == "__main__":
    sys.exit(main())
