"""The main job, from end to end: compile a model, show what was stitched, compare the answers, measure the speed.

    python -m benchmarks.demo [--out FOLDER] [--size NAME=VALUE ...] [MODEL]

MODEL is a path, or one of `benchmarks.architectures`; by default distilbert (6 layers, 66 million parameters), which is
built here. Inputs are random; symbolic dims are those given by --size, or small. Three run the model in turns with
equally many threads: stitch, stitch without stitching (a kernel for each primitive operation), and onnxruntime where
it is installed. The picture goes to FOLDER, where matplotlib is installed. The exit status is 1 if answers differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import stitch
from benchmarks import chart
from stitch import dims, knobs
from stitch.errors import StitchError
from stitch.explain import Explanation
from stitch.runtime.threads import available_cores

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
Sizes = dict[str, int]

DEFAULT = "distilbert"
TEXT: Sequence[Sizes] = ({"batch": 1, "seq": 32}, {"batch": 1, "seq": 128}, {"batch": 4, "seq": 64})
SIZES: Mapping[str, Sequence[Sizes]] = {
    "distilbert": TEXT,
    "bert_base": TEXT,
    "mobilenet": ({"batch": 1}, {"batch": 4}),
}
WORDS = {"input_ids": 30522}  # in our own models; integers for others are 0 or 1, which is safe for any
SMALL = {"batch": 1, "seq": 64, "len": 64, "height": 224, "width": 224, "past": 8}  # by a part of a symbol's name
OTHERWISE = 16
SECONDS = 1.5  # of measuring, per engine and size
NOISE = 10  # times as far as numpy is from both, where that is far: some inputs amplify rounding
TINY = 1e-3  # a largest value below it counts as this: sigmoids far out are exact to 1e-7, not relative to themselves
TURN = 0.06  # seconds in which one engine runs, at least twice, before the next has its turn
CLOSE = 1e-3  # of the largest output: how far sums of float32 in another order may lead, in a deep model


@dataclass
class Engine:
    """Something that runs the model, and how long that took, in milliseconds by size."""

    name: str
    run: Callable[[Feeds], list[Array]]
    times: dict[str, float] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=DEFAULT, metavar="MODEL")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the picture goes; none without it")
    parser.add_argument("--size", action="append", default=[], type=read_size, metavar="NAME=VALUE")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of measuring, per engine and size")
    args = parser.parse_args(arguments)
    try:
        return demonstrate(args.model, dict(args.size), args.out, args.seconds)
    except (StitchError, OSError) as problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 1


def read_size(text: str) -> tuple[str, int]:
    name, _, value = text.rpartition("=")
    if not name or not value.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not like batch=2")
    return name, int(value)


def demonstrate(model: str, chosen: Sizes, out: Path | None = None, seconds: float = SECONDS) -> int:
    """All of it, printed. 1 if an answer is wrong."""
    threads = knobs.current().threads or available_cores()
    name, source = find(model)
    compiled, engines = load(source, threads)
    known = guesses(compiled)
    for symbol in chosen:
        if symbol not in known:
            raise StitchError(f"the model has no symbol {symbol!r}", f"its symbols are {', '.join(known) or 'none'}")
    sizes = [{**known, **s, **chosen} for s in SIZES.get(name, ({},))]
    sizes = [s for k, s in enumerate(sizes) if s not in sizes[:k]]
    print(f"\n{excerpt(compiled.explain(), sizes[len(sizes) // 2])}\n")
    feeds = {label(s): random_feeds(compiled, s, WORDS if name in SIZES else {}) for s in sizes}
    right = compare(engines, feeds, source)
    measure(engines, feeds, seconds)
    title = f"{name}, milliseconds per inference, {count(threads, 'thread')}"
    rows = {size: {e.name: e.times[size] for e in engines} for size in feeds}
    print(f"\n{chart.text(title, rows, chart.is_plain(sys.stdout.encoding, os.environ))}")
    if out is not None:
        path = chart.picture(out / f"{name}.png", title, rows)
        print(f"\npicture: {path}" if path else "\nno picture: matplotlib is not installed")
    return 0 if right else 1


# ------------------------------------------------------------------ the model, and those who run it


def find(model: str) -> tuple[str, bytes | Path]:
    """Its name, and where it is, or itself. Raises OSError."""
    from benchmarks import architectures

    if model not in architectures.MODELS:
        path = Path(model)
        if not path.is_file():
            known = ", ".join(architectures.MODELS)
            raise OSError(f"there is no file {model!r}, and what can be built here is {known}")
        return path.stem, path
    start = time.perf_counter()
    built = architectures.MODELS[model]()
    millions = architectures.parameters(built) / 1e6
    print(f"built {model}: {millions:.1f} million parameters, opset {architectures.OPSET}, in {since(start)}")
    return model, built.SerializeToString()


def load(source: bytes | Path, threads: int) -> tuple[stitch.CompiledModel, list[Engine]]:
    """The stitched model, and all engines, it first."""
    start = time.perf_counter()
    compiled = stitch.optimize(source, threads=threads, cache=False)
    print(f"stitch compiled it in {since(start)}, once for all sizes")
    start = time.perf_counter()
    with knobs.using(schemes=("independent",)):
        single = stitch.optimize(source, threads=threads, cache=False)
    kernels = len(single.explain().to_dict()["kernels"])
    print(f"without stitching, with a kernel for each primitive operation, it has {kernels} kernels ({since(start)})")
    engines = [
        Engine("stitch", lambda feeds: compiled.run(None, feeds)),
        Engine("without stitching", lambda feeds: single.run(None, feeds)),
    ]
    start = time.perf_counter()
    peer = onnxruntime(source, threads, [o.name for o in compiled.outputs])
    if peer is not None:
        engines.append(peer)
        print(f"{peer.name} loaded it in {since(start)}")
    return compiled, engines


def onnxruntime(source: bytes | Path, threads: int, outputs: list[str]) -> Engine | None:
    """onnxruntime with its default optimisations, or None where it is missing, or refuses the model."""
    try:
        import onnxruntime as peer
    except ImportError:
        print("onnxruntime is not installed: the answers are compared with numpy instead")
        return None
    options = peer.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        content = source if isinstance(source, bytes) else str(source)
        session = peer.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # it has no common class for what goes wrong
        print(f"onnxruntime cannot load the model: {str(problem).splitlines()[0]}")
        return None
    return Engine(f"onnxruntime {peer.__version__}", lambda feeds: session.run(outputs, feeds))


# ------------------------------------------------------------------ inputs


def guesses(model: stitch.CompiledModel) -> Sizes:
    """A small extent for every symbol, by its name, else by where it stands."""
    found: Sizes = {}
    for port in model.inputs:
        for axis, d in enumerate(port.shape):
            place = 1 if axis == 0 else 224 if len(port.shape) == 4 else OTHERWISE
            for s in sorted(dims.symbols(dims.parse(d))) if isinstance(d, str) else ():
                found.setdefault(s, next((n for part, n in SMALL.items() if part in s.lower()), place))
    return found


def random_feeds(model: stitch.CompiledModel, sizes: Sizes, highest: Mapping[str, int] | None = None) -> Feeds:
    """Random arrays for the inputs: normal floats, and integers from 0 to `highest`, exclusive, or else 0 and 1."""
    rng = np.random.default_rng(0)
    highest = highest or {}
    feeds: Feeds = {}
    for port in model.inputs:
        shape = [d if isinstance(d, int) else dims.evaluate(dims.parse(d), sizes) for d in port.shape]
        if any(n < 0 for n in shape):
            raise StitchError(
                f"at {label(sizes)} input {port.name!r} would be {tuple(shape)}", "choose others with --size"
            )
        if port.dtype.kind == "f" or port.dtype.name == "bfloat16":
            feeds[port.name] = rng.standard_normal(shape).astype(port.dtype)
        else:
            feeds[port.name] = rng.integers(0, highest.get(port.name, 2), shape).astype(port.dtype)
    return feeds


def label(sizes: Sizes) -> str:
    return ", ".join(f"{k}={v}" for k, v in sizes.items()) or "its only size"


# ------------------------------------------------------------------ what was stitched


def excerpt(explanation: Explanation, sizes: Sizes, rows: int = 12, lines: int = 24) -> str:
    """The readable part of an explanation: totals, the kernels, and the one in which most was stitched."""
    known = explanation.to_dict()["symbols"]
    sized = explanation.at(**{k: v for k, v in sizes.items() if k in known}) if sizes else explanation
    head, table = str(sized).split("\n\n")[:2]
    shown = table.splitlines()
    if len(shown) > rows + 1:
        shown[rows + 1 :] = [f"... and {len(shown) - rows - 1} rows more: stitch explain MODEL"]
    clusters = explanation.to_dict()["clusters"]
    if not clusters:
        return head
    edges = {c["kernel"]: len(c["edges"]) for c in clusters}
    best = max(explanation.to_dict()["kernels"], key=lambda k: (k["onnx"], edges[k["name"]]))
    detail = sized.kernel(best["name"]).splitlines()
    if len(detail) > lines:
        detail[lines:] = [f"    ... and {len(detail) - lines} lines more"]
    return "\n".join([head, "", *shown, "", "for example, the one with most in it:", "", *detail])


# ------------------------------------------------------------------ answers


def compare(engines: Sequence[Engine], feeds: Mapping[str, Feeds], source: bytes | Path) -> bool:
    """Whether stitch agrees with all others; where onnxruntime is missing, with numpy too, at the first size."""
    right = True
    for size, feed in feeds.items():
        mine = engines[0].run(feed)
        others = [(e.name, e.run(feed)) for e in engines[1:]]
        if len(engines) == 2 and size == next(iter(feeds)):
            others.append(("numpy", evaluate(source, feed)))
        for name, theirs in others:
            found = worst(mine, theirs)
            noise = 0.0
            if found > CLOSE:  # is it the inputs, on which any two answers differ?
                third = evaluate(source, feed)
                noise = min(worst(third, theirs), worst(third, mine))
            agrees = found <= max(CLOSE, NOISE * noise)
            right &= agrees
            note = f" (numpy is {noise:.1e} from either: these inputs amplify rounding)" if agrees and noise else ""
            verdict = "agrees with" if agrees else "DIFFERS FROM"
            print(f"{size}: stitch {verdict} {name}; largest difference {found:.1e} of the largest value{note}")
    return right


def worst(a: Sequence[Array], b: Sequence[Array]) -> float:
    return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def difference(a: Array, b: Array) -> float:
    """The largest difference as a part of the largest finite value; infinite for another shape, type, NaN or Inf."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.size:
        return 0.0
    if a.dtype.kind not in "fiu" and a.dtype.name != "bfloat16":
        return 0.0 if np.array_equal(a, b) else float("inf")
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(finite, np.isfinite(x)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(y[finite]).max()) if a.dtype.kind != "f" else max(float(np.abs(y[finite]).max()), TINY)
    most = float(np.abs(x[finite] - y[finite]).max())
    return most / scale if scale else most


def evaluate(source: bytes | Path, feeds: Feeds) -> list[Array]:
    """The outputs by numpy on the model's primitives, one after another."""
    from stitch import evaluate, importer

    return evaluate.evaluate(importer.load(source), feeds)


# ------------------------------------------------------------------ speed


def measure(engines: Sequence[Engine], feeds: Mapping[str, Feeds], seconds: float) -> None:
    """Medians of runs in turns: neighbours on the machine disturb all engines alike. The first run of a turn is not
    counted, since threads of the engine before may still be looking for work."""
    for size, feed in feeds.items():
        found: dict[str, list[float]] = {e.name: [] for e in engines}
        end = time.perf_counter() + seconds * len(engines)
        while time.perf_counter() < end or len(found[engines[0].name]) < 3:
            for e in engines:
                e.run(feed)
                now = begin = time.perf_counter()
                while now == begin or now < begin + TURN:
                    start = now
                    e.run(feed)
                    now = time.perf_counter()
                    found[e.name].append(1e3 * (now - start))
        for e in engines:
            e.times[size] = statistics.median(found[e.name])


def since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


if __name__ == "__main__":
    sys.exit(main())
