"""Whole models: are the answers right?

    python -m benchmarks.models --check [NAME ...]

runs three collections, each model in a process of its own, compiled once and run at every size given for it:

    shared     real models with stored references (see benchmarks/oracle.py)
    light      the nine models in the onnx package, with their stored references
    exports    large architectures with symbolic dims, in the folder `ONNX_EXPORTS`, `build/exports` or `../exports`
               (`make exports` makes them); compared with onnxruntime, its graph optimisations off, at two sizes

A model is right if every output is within its tolerance class, refused if stitch raises UnsupportedOperator, disputed
if numpy on the primitives gives what stitch gives and not what is stored (a reference may be wrong too: onnxruntime's
Sigmoid(-20.7) is 0, and its logarithm decides an index), else wrong. The exit status is 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import oracle

ROOT = Path(__file__).resolve().parent.parent
SEED = 7


def exports() -> Path | None:
    """The folder with exported architectures, or None."""
    places = [os.environ.get("ONNX_EXPORTS"), ROOT / "build" / "exports", ROOT.parent / "exports"]
    return next((Path(p) for p in places if p and any(Path(p).glob("*.json"))), None)


def light() -> Path:
    import onnx

    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def names() -> list[tuple[str, str]]:
    """(collection, model) for everything that is there."""
    out = [("shared", n) for n in dict.fromkeys(c.name for c in oracle.cases())]
    out += [("light", p.stem) for p in sorted(light().glob("*.onnx"))]
    folder = exports()
    if folder is not None:
        out += [("exports", p.stem) for p in sorted(folder.glob("*.json"))]
    return out


# ------------------------------------------------------------------ feeds of the exports


def evaluate(d: int | str, sizes: dict[str, int]) -> int:
    """A dim of an export's description: an int, a symbol, or a sum of these."""
    return d if isinstance(d, int) else sum(int(t) if t.isdigit() else sizes[t] for t in d.replace(" ", "").split("+"))


def make_feed(spec: dict[str, Any], sizes: dict[str, int], seed: int = SEED) -> dict[str, np.ndarray]:
    """Arrays for an export, by the rules in its description (the exporting script's header explains them)."""
    rng = np.random.default_rng(seed)
    feed = {}
    for i in spec["inputs"]:
        shape, rule = [evaluate(d, sizes) for d in i["shape"]], i["value"]
        match rule["rule"]:
            case "normal":
                a = rng.standard_normal(shape, np.float32) * rule["std"] + rule["mean"]
            case "randint":
                a = rng.integers(rule["low"], rule["high"], shape)
            case "constant":
                a = np.full(shape, rule["value"])
            case "arange":
                along = [shape[k] if k == rule["axis"] else 1 for k in range(len(shape))]
                counted = np.arange(shape[rule["axis"]]).reshape(along)
                a = np.broadcast_to(counted + evaluate(rule["start"], sizes), shape)
            case other:
                raise ValueError(f"unknown rule {other!r}")
        feed[i["name"]] = np.ascontiguousarray(a, dtype=i["dtype"])
    return feed


def sizes_of(spec: dict[str, Any]) -> list[dict[str, int]]:
    """The default sizes, and the first others."""
    return [spec["dims"], *({**spec["dims"], **o} for o in spec["other_dims"][:3])]


def off(spec: dict[str, Any], got: np.ndarray, want: np.ndarray) -> float:
    """Error as a part of what the tolerance class allows."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    scale = float(np.abs(want.astype(np.float64)).max()) if want.size else 0.0
    diff = np.abs(got.astype(np.float64) - want.astype(np.float64))
    if not want.size:
        return 0.0
    match spec["tolerance"]:
        case "fp32":
            return float(diff.max()) / (1e-3 * scale)
        case "fp16":
            return float(diff.mean()) / (1e-2 * scale)
        case _:
            return float(diff.mean()) / (5e-2 * scale)


# ------------------------------------------------------------------ one model


def check(collection: str, name: str) -> Iterator[tuple[str, float]]:
    """(what was run, error as a part of what is allowed). Raises what stitch raises."""
    import stitch

    match collection:
        case "shared":
            model = None
            for case in oracle.cases([name]):
                model = model or stitch.optimize(case.path, cache=False)
                wanted = case.expected()
                got = model.run([e.name for e in wanted], case.feed())
                errors = case.errors({e.name: g for e, g in zip(wanted, got, strict=True)})
                worst = max(errors.values())
                if not worst <= 1 and as_numpy(case, wanted, got):
                    yield f"feed {case.feed_index} disputed", 0.0
                else:
                    yield f"feed {case.feed_index}", worst
        case "light":
            yield from _check_light(name)
        case "exports":
            folder = exports()
            assert folder is not None
            spec = json.loads((folder / f"{name}.json").read_text())
            path = folder / spec["file"]
            model = stitch.optimize(path, cache=False)
            peer = _peer(path)
            for sizes in sizes_of(spec):
                feed = make_feed(spec, sizes)
                got, want = model.run(None, feed), peer.run([o.name for o in model.outputs], feed)
                label = " ".join(f"{k}={v}" for k, v in sizes.items())
                yield label, max(off(spec, g, w) for g, w in zip(got, want, strict=True))


def as_numpy(case: oracle.Case, wanted: list[oracle.Expected], got: list[np.ndarray]) -> bool:
    """Whether the results are those of numpy on the primitives, within the same tolerance."""
    from stitch import evaluate as reference
    from stitch import importer

    graph = importer.load(case.path)
    truth = dict(zip(graph.output_names, reference.evaluate(graph, case.feed()), strict=True))
    return all(
        oracle.Expected(e.name, truth[e.name], None, e.noise).error(g) <= 1 for e, g in zip(wanted, got, strict=True)
    )


def _check_light(name: str) -> Iterator[tuple[str, float]]:
    import onnx
    from onnx import numpy_helper

    import stitch

    def read(path: Path) -> np.ndarray:
        tensor = onnx.TensorProto()
        tensor.ParseFromString(path.read_bytes())
        return numpy_helper.to_array(tensor)

    path = light() / f"{name}.onnx"
    model = stitch.optimize(path, cache=False)
    rng = np.random.default_rng(SEED)
    stored = sorted(light().glob(f"{name}_output_*.pb"))
    feed = {}
    for port in model.inputs:
        shape = [d if isinstance(d, int) else 1 for d in port.shape]
        if stored:  # as in the suite: a ramp divided by its size
            feed[port.name] = (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(port.dtype)
        else:
            feed[port.name] = rng.standard_normal(shape).astype(port.dtype)
    got = model.run(None, feed)
    if stored:
        # The references are onnx's; its own runner allows 1e-3.
        errors = [
            float(np.abs(g - w).max()) / (1e-3 * float(np.abs(w).max()))
            for g, w in zip(got, map(read, stored), strict=True)
        ]
        yield "stored reference", max(errors)
    want = _peer(path).run(None, feed)
    errors = [float(np.abs(g - w).max()) / (1e-4 * float(np.abs(w).max())) for g, w in zip(got, want, strict=True)]
    yield "onnxruntime", max(errors)


def _peer(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _one(collection: str, name: str) -> int:
    """Runs one model and prints one line. 0 right, 2 refused, 3 disputed, 1 wrong."""
    from stitch.errors import UnsupportedOperator

    label = f"{collection:8} {name:30}"
    start = time.perf_counter()
    try:
        results = list(check(collection, name))
    except UnsupportedOperator as problem:
        print(f"{label} refused  {problem}", flush=True)
        return 2
    wrong = [r for r in results if not r[1] <= 1]
    detail = "; ".join(f"{what}: {error:.2g} of the bound" for what, error in results)
    disputed = any("disputed" in what for what, _ in results)
    verdict = "WRONG   " if wrong else "disputed" if disputed else "right   "
    print(f"{label} {verdict} {detail}  ({time.perf_counter() - start:.1f} s)", flush=True)
    return 1 if wrong else 3 if disputed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with references (the default)")
    parser.add_argument("--one", nargs=2, metavar=("COLLECTION", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.one:
        return _one(*args.one)
    count = {0: 0, 1: 0, 2: 0, 3: 0}
    for collection, name in names():
        if args.names and name not in args.names:
            continue
        command = [sys.executable, "-m", "benchmarks.models", "--one", collection, name]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code not in count:
            print(f"{collection:8} {name:30} WRONG    the process ended with {code}", flush=True)
        count[code if code in count else 1] += 1
    if exports() is None:
        print("no exported architectures found; `make exports` makes them")
    print(f"{count[0]} right, {count[2]} refused, {count[3]} disputed, {count[1]} wrong")
    return 1 if count[1] else 0


if __name__ == "__main__":
    sys.exit(main())
