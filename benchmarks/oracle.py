"""Reference models with inputs and outputs, and the rule for when an output is right.

    python -m benchmarks.oracle [NAME ...]         # numpy on the primitives against the stored outputs

The models are not part of the repository. `ONNX_MODELS` names their folder; without it, `../shared/models` beside the
repository is taken if it is there. `index.json` in it says which models there are, `feeds/` holds arrays.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Expected:
    """One output: its name, its elements (every `step`-th along each axis), and how far off they may be."""

    name: str
    array: Array
    step: tuple[int, ...] | None
    noise: float  # how far a correct runtime was seen to drift

    def error(self, got: Array) -> float:
        """How far `got` is off as a part of what is allowed: right up to 1, inf for another dtype or shape."""
        if self.step is not None and got.ndim == len(self.step):
            got = got[tuple(slice(None, None, s) for s in self.step)]
        if got.shape != self.array.shape or got.dtype != self.array.dtype:
            return float("inf")
        if got.dtype.kind != "f":
            return 0.0 if np.array_equal(got, self.array) else float("inf")
        want, have = self.array.astype(np.float64), got.astype(np.float64)
        finite = np.isfinite(want)
        if not np.array_equal(want[~finite], have[~finite], equal_nan=True) or not np.all(np.isfinite(have[finite])):
            return float("inf")
        if not finite.any():
            return 0.0
        scale = float(np.abs(want[finite]).max())
        off = float(np.abs(want[finite] - have[finite]).max())
        bound = 1e-4 * scale + 10 * self.noise
        return off / bound if bound else (0.0 if off == 0 else float("inf"))


@dataclass(frozen=True)
class Case:
    """A model with one set of inputs. `feed` and `expected` are read when they are asked for."""

    name: str
    feed_index: int
    path: Path
    file: Path
    tolerance: str  # "fp32", or "fp32-or-refuse": it may also raise UnsupportedOperator
    noise: Mapping[str, float]

    def feed(self) -> dict[str, Array]:
        with np.load(self.file) as z:
            return {n: z[f"in{i}"] for i, n in enumerate(z["in_names"].tolist())}

    def expected(self) -> list[Expected]:
        out = []
        with np.load(self.file) as z:
            for i, name in enumerate(z["out_names"].tolist()):
                strided = f"out{i}" not in z
                array = z[f"sub{i}" if strided else f"out{i}"]
                step = tuple(int(s) for s in z[f"sub{i}_step"]) if strided else None
                out.append(Expected(name, array, step, self.noise.get(name, 0.0)))
        return out

    def errors(self, outputs: Mapping[str, Array]) -> dict[str, float]:
        """`Expected.error` of each output by name; inf for one that is missing."""
        return {e.name: e.error(outputs[e.name]) if e.name in outputs else float("inf") for e in self.expected()}


def folder() -> Path | None:
    """Where the models are, or None."""
    root = Path(__file__).resolve().parent.parent
    path = Path(os.environ.get("ONNX_MODELS") or root.parent / "shared" / "models")
    return path if (path / "index.json").is_file() else None


def cases(names: Sequence[str] = ()) -> Iterator[Case]:
    """All cases in the order of the index, or those of the models in `names`. None without the folder."""
    root = folder()
    if root is None:
        return
    for model in json.loads((root / "index.json").read_text(encoding="utf-8"))["models"]:
        if names and model["name"] not in names:
            continue
        for k, feed in enumerate(model["feeds"]):
            noise = {o["name"]: _noise(o.get("noise", {})) for o in feed["outputs"]}
            path, file = root / model["file"], root / feed["file"]
            yield Case(model["name"], k, path, file, model["tolerance"], noise)


def _noise(entry: Mapping[str, Any]) -> float:
    return max((float(v["max_abs"]) for v in entry.values() if isinstance(v, Mapping) and "max_abs" in v), default=0.0)


def main(names: Sequence[str]) -> int:
    from stitch.errors import StitchError
    from stitch.evaluate import evaluate
    from stitch.importer import load

    wrong = 0
    for case in cases(names):
        start = time.perf_counter()
        label = f"{case.name}.{case.feed_index}"
        try:
            graph = load(case.path)
            loaded = time.perf_counter()
            outputs = dict(zip(graph.output_names, evaluate(graph, case.feed()), strict=True))
            error = max(case.errors(outputs).values())
            wrong += not error <= 1
            verdict = f"{'right' if error <= 1 else 'WRONG'}  {error:.2g} of the bound"
            times = f"import {loaded - start:.2f} s, run {time.perf_counter() - loaded:.2f} s"
            print(f"{label:24} {verdict}  ({len(graph.nodes)} nodes, {len(graph.guards)} guards, {times})", flush=True)
        except StitchError as problem:
            print(f"{label:24} {type(problem).__name__}: {problem}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
