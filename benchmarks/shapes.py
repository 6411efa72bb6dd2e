"""One compilation for all shapes, beside one for the very shape that is run.

    python -m benchmarks.shapes [--models NAME ...] [--threads 1,2] [--rounds N] [--json FILE] [--record]

Exported networks are compiled once as they are, with open dims, and once for each choice of dims with these put in
(`stitch.optimize(model, shapes=...)`). The two run in turn, with the same arrays, at sizes that the first compilation
was told nothing of: those that the export was made with, a batch of three, and, where there are lengths, odd ones. The
ratio is the median over rounds of the ratios of medians: 1.05 says that knowing the shape would save 5 %. Outputs are
compared first. With one thread, times are the process's processor time.

--json keeps rows from one call to the next, so that a machine need not be kept quiet for long; --record puts the table
of what is in it, or was just measured, into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import stitch
from benchmarks import models, pipe, results
from benchmarks.networks.cases import Feed, label

SLICE_S = 0.1  # per model and round
MIN_RUNS = 3
LIMIT = 1.05


@dataclass(frozen=True)
class Row:
    """Milliseconds of the open and of the fixed compilation, and the quartiles of the rounds' ratios open / fixed."""

    name: str
    dims: str
    threads: int
    open_ms: float
    fixed_ms: float
    quartiles: tuple[float, float, float]

    @property
    def ratio(self) -> float:
        return self.quartiles[1]


def choices(default: Mapping[str, int]) -> list[dict[str, int]]:
    """The dims themselves, a batch of three, and odd lengths: 4/5 of those that are more than a few."""
    odd = {k: n if k == "batch" or n < 8 else 4 * n // 5 | 1 for k, n in default.items()}
    found = [dict(default), {**default, "batch": 3}, odd]
    return [dims for k, dims in enumerate(found) if dims not in found[:k]]


def _sample(model: stitch.CompiledModel, feed: Feed, clock: Any) -> float:
    """The median of runs in a slice of time; the first one finds cold caches and does not count."""
    model.run(None, feed)
    times: list[float] = []
    end = time.perf_counter() + SLICE_S
    while len(times) < MIN_RUNS or time.perf_counter() < end:
        start = clock()
        model.run(None, feed)
        times.append(clock() - start)
    return statistics.median(times)


def _agree(spec: Mapping[str, Any], a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return all(models.off(dict(spec), x, y) <= 1 for x, y in zip(a, b, strict=True))


def measure(name: str, threads: int, rounds: int) -> list[Row]:
    """The rows of one network. Raises AssertionError if the two give different outputs."""
    root = models.exports()
    assert root is not None
    spec = json.loads((root / f"{name}.json").read_text())
    path = root / spec["file"]
    clock = time.process_time if threads == 1 else time.perf_counter
    general = stitch.optimize(path, threads=threads, cache=False)
    rows = []
    for dims in choices(spec["dims"]):
        feed = models.make_feed(spec, dims)
        feed = {t.name: feed[t.name] for t in general.inputs}
        fixed = stitch.optimize(path, threads=threads, cache=False, shapes={k: a.shape for k, a in feed.items()})
        assert _agree(spec, general.run(None, feed), fixed.run(None, feed)), f"{name} {label(dims)}: other outputs"
        pairs = []
        for number in range(rounds):
            both = [(k, _sample(m, feed, clock)) for k, m in ((0, general), (1, fixed))[:: 1 if number % 2 else -1]]
            pairs.append([s for _, s in sorted(both)])
        low, middle, high = np.quantile([a / b for a, b in pairs], (0.25, 0.5, 0.75)).tolist()
        medians = [1e3 * statistics.median(p[k] for p in pairs) for k in (0, 1)]
        rows.append(Row(name, label(dims), threads, medians[0], medians[1], (low, middle, high)))
        print(line(rows[-1]), flush=True)
        fixed._executable.close()
    return rows


# ------------------------------------------------------------------ tables

HEADER = (
    "| model | dims | threads | open ms | fixed ms | open / fixed | quartiles |",
    "|---|---|---:|---:|---:|---:|---|",
)


def line(row: Row) -> str:
    low, middle, high = row.quartiles
    times = f"{row.open_ms:.3f} | {row.fixed_ms:.3f}"
    return f"| {row.name} | {row.dims} | {row.threads} | {times} | {middle:.3f} | {low:.3f} to {high:.3f} |"


def summary(rows: Sequence[Row]) -> str:
    out = []
    for threads in sorted({r.threads for r in rows}):
        found = [r for r in rows if r.threads == threads]
        mean = math.exp(statistics.fmean(math.log(r.ratio) for r in found))
        above = [f"{r.name} {r.dims} ({r.ratio:.2f})" for r in found if r.ratio > LIMIT]
        text = f"{threads} thread{'s' if threads > 1 else ''}: geometric mean {mean:.3f} over {len(found)} rows; above "
        out.append(f"* {text}{LIMIT}: {len(above)}{': ' + ', '.join(above) if above else ''}")
    return "\n".join(out)


def _kept(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [Row(**{**r, "quartiles": tuple(r["quartiles"])}) for r in json.loads(path.read_text())]


def _wanted() -> list[str]:
    """The exports in float32."""
    root = models.exports()
    found = sorted(root.glob("*.json")) if root is not None else []
    return [p.stem for p in found if json.loads(p.read_text())["tolerance"] == "fp32"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=None, metavar="NAME", help="default: all exports in float32")
    parser.add_argument("--threads", default="1,2", help="numbers with commas (default 1,2)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep rows here, and those of earlier calls")
    parser.add_argument("--record", action="store_true", help="put the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    names = _wanted() if args.models is None else args.models
    counts = [int(n) for n in args.threads.split(",")]
    everyone = os.sched_getaffinity(0)
    rows: list[Row] = []
    print("\n".join(HEADER))
    for name in names:
        for threads in counts:
            if threads > len(everyone):
                continue
            os.sched_setaffinity(0, pipe.processors(threads))
            rows += measure(name, threads, args.rounds)
            os.sched_setaffinity(0, everyone)
    fresh = {(r.name, r.dims, r.threads) for r in rows}
    rows = sorted(
        [*rows, *(r for r in _kept(args.json) if (r.name, r.dims, r.threads) not in fresh)],
        key=lambda r: (r.name, r.threads),
    )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(r) for r in rows]))
    if not rows:
        print("nothing is measured; `make exports` makes the networks")
        return 1
    print("\n" + summary(rows))
    if args.record:
        text = "\n".join([*HEADER, *map(line, rows)])
        old = len(rows) - len(fresh)
        whence = f"\n* {old} of {len(rows)} rows are of earlier calls, maybe of an earlier compiler" if old else ""
        parts = [results.origin() + whence, summary(rows), text]
        results.record("shapes", "One compilation for all shapes", "\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
