"""What each step of stitching is worth: settings that have one step more each, on chains and on whole models.

    python -m benchmarks.ablation [--cases NAME ...] [--sizes l3,dram] [--threads N] [--rounds N] [--record]

    local only               elementwise chains in one loop nest; each reduction, and what is needed twice, is a kernel
    + regional and global    kernels of several loop nests, on tiles at the same point, or with a barrier between them
    + dominant merging       loop nests that local edges join are one
    + adaptive mapping       vector axis, blocks, transposes and parts of long folds by cost, rather than by one rule

All run in this process, kept to as many processors as there are threads, and take turns; their outputs are compared
first. A step's gain is the median over rounds of the ratio of times without and with it. --record puts the tables into
benchmarks/RESULTS.md; docs/ablation.md says what to make of them.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pipe, results
from benchmarks.chains import worker
from benchmarks.chains.case import SIZES
from benchmarks.chains.cases import CASES
from benchmarks.chains.engines import Session
from benchmarks.networks.agreement import difference
from benchmarks.networks.cases import networks
from stitch import dims, importer, knobs, optimize, target
from stitch.dims import Dim
from stitch.graph import Graph
from stitch.simplify import simplify
from stitch.stitching.schedule import Stitched
from stitch.stitching.stitch import stitch

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "local only": {"schemes": "independent,local", "merging": False, "adaptive_mapping": False},
    "+ regional and global": {"merging": False, "adaptive_mapping": False},
    "+ dominant merging": {"adaptive_mapping": False},
    "+ adaptive mapping": {},
}
FIRST, *STEPS = SETTINGS

CHAINS = (
    "layernorm_gelu", "scale_mask_softmax", "rmsnorm_swiglu", "rope", "softmax_middle", "softmax_first",
    "softmax_short_rows", "log_softmax_nll", "sinkhorn", "layernorm_channels", "groupnorm_swish",
)  # fmt: skip
MODELS = ("distilbert", "vespa_transformer")
SLICE_S = 0.1  # of a setting in a round

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Subject:
    """A model with one feed, and arrays for its outputs."""

    name: str
    model: bytes | Path
    feed: Mapping[str, Array]
    outputs: Sequence[Array]


@dataclass(frozen=True)
class Count:
    """What the stitcher made of a model; bytes are those of activations in memory, caches or not."""

    kernels: int
    barriers: int  # between the phases of a kernel
    nests: int
    walked: int  # read and written, by phase: what a task finds in its tiles or registers is not
    stored: int  # written without being an output


@dataclass(frozen=True)
class Row:
    """Counts and microseconds by setting, and the gains of the steps."""

    name: str
    counts: Sequence[Count]
    times: Sequence[float]
    gains: Sequence[float]


# ------------------------------------------------------------------ what is measured


def chains(wanted: Sequence[str], size: str, threads: int) -> Iterator[Subject]:
    for case in CASES:
        if case.name in wanted:
            job = worker.prepare(case, case.sizes[size], threads)
            yield Subject(case.name, job.model.SerializeToString(), job.feed, job.outputs)


def models(wanted: Sequence[str]) -> Iterator[Subject]:
    """Those that are there."""
    if not wanted:  # which would be all of them
        return
    with tempfile.TemporaryDirectory() as folder:
        for case in networks(wanted, Path(folder)):
            compiled = optimize(case.path, cache=False)
            feed = {p.name: worker.aligned(case.feed[p.name]) for p in compiled.inputs}
            yield Subject(case.name, case.path, feed, [worker.aligned(y) for y in compiled.run(None, feed)])


def measure(subject: Subject, threads: int, rounds: int) -> Row:
    """Raises ValueError if two settings disagree."""
    graph = simplify(importer.load(subject.model))
    sizes = symbols(graph, subject.feed)
    counts, sessions, answers = [], [], []
    for setting in SETTINGS.values():
        with knobs.using(**setting) as now:
            budget = (now.l2_bytes or target.parse("host").l2_bytes) // 2
            counts.append(count(stitch(graph, budget, now.schemes, now.merging), sizes))
            sessions.append(_session(subject, threads))
        sessions[-1].run()
        answers.append([y.copy() for y in subject.outputs])
    for title, answer in zip(SETTINGS, answers, strict=True):
        if (error := difference(answer, answers[-1], 0.0)) > 1:
            raise ValueError(f"{subject.name}, {title}: {error:.3g} times the difference that is allowed")
    taken: list[list[float]] = [[] for _ in sessions]
    for number in range(rounds):
        for k in range(len(sessions)) if number % 2 else reversed(range(len(sessions))):
            taken[k].append(1e6 * statistics.median(worker.sample(sessions[k], SLICE_S)))
    gains = [
        statistics.median(a / b for a, b in zip(taken[k], taken[k + 1], strict=True)) for k in range(len(taken) - 1)
    ]
    return Row(subject.name, counts, [statistics.median(t) for t in taken], gains)


def _session(subject: Subject, threads: int) -> Session:
    compiled = optimize(subject.model, threads=threads, cache=False)
    session = Session(lambda: compiled.run(None, subject.feed, subject.outputs), lambda: list(subject.outputs))
    worker.settle(session)
    return session


def symbols(graph: Graph, feed: Mapping[str, Array]) -> dict[str, int]:
    """The graph's symbols, from the shapes of the feed."""
    found: dict[str, int] = {}
    for v in graph.inputs:
        for d, n in zip(v.shape, feed[v.name].shape, strict=True):
            for name in dims.symbols(d):
                if dims.symbol(name) == d:
                    found[name] = n
    return found


def count(stitched: Stitched, sizes: Mapping[str, int]) -> Count:
    """Each phase finds its inputs in memory anew."""
    constants = {n.output for n in stitched.graph.nodes if n.prim == "const"}
    outputs = set(stitched.graph.outputs)
    walked: Dim = 0
    stored: Dim = 0
    for k in stitched.kernels:
        written = set(k.writes())
        for p in k.phases:
            made = {r.value for g in p.groups for r in g.roots}
            read = {a.value for g in p.groups for a in g.accesses} - made - constants
            if p.contraction is not None:
                read |= {p.contraction.a.value, p.contraction.b.value} - constants
            for v in (*read, *(made & written)):
                walked = walked + v.bytes
        if k.opaque is not None:
            for v in (*k.opaque.inputs, *k.opaque.outputs):
                walked = walked + (0 if v in constants else v.bytes)
        for v in written - outputs:
            stored = stored + v.bytes
    return Count(
        kernels=len(stitched.kernels),
        barriers=sum(max(len(k.phases) - 1, 0) for k in stitched.kernels),
        nests=sum(len(k.groups) or 1 for k in stitched.kernels),
        walked=dims.evaluate(walked, sizes),
        stored=dims.evaluate(stored, sizes),
    )


# ------------------------------------------------------------------ telling


def time_table(rows: Sequence[Row]) -> str:
    """Markdown: the time in each setting, and what each step gains."""
    lines = [
        f"| us | {FIRST} | " + " | ".join(f"{s} | gain" for s in STEPS) + " | all gains |",
        "|---|---:|" + "---:|---:|" * len(STEPS) + "---:|",
    ]
    for r in rows:
        cells = [f"{_figure(t)} | {g:.2f}" for t, g in zip(r.times[1:], r.gains, strict=True)]
        lines.append(f"| {r.name} | {_figure(r.times[0])} | {' | '.join(cells)} | {math.prod(r.gains):.2f} |")
    return "\n".join(lines)


def _figure(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def count_table(rows: Sequence[Row]) -> str:
    """Markdown: what there is in each setting. The last step, which is made after stitching, changes none of it."""
    lines = [
        "| | kernels | barriers inside | loop nests | MB read and written | MB of intermediates |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        found = r.counts[:-1]
        columns = [
            [str(c.kernels) for c in found], [str(c.barriers) for c in found], [str(c.nests) for c in found],
            [f"{c.walked / 1e6:.3g}" for c in found], [f"{c.stored / 1e6:.3g}" for c in found],
        ]  # fmt: skip
        lines.append(f"| {r.name} | {' | '.join(', '.join(c) for c in columns)} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row], what: str) -> str:
    """Geometric means over rows."""
    each = list(zip(*(r.gains for r in rows), strict=True))
    gains = ", ".join(f"{s} {statistics.geometric_mean(g):.2f}" for s, g in zip(STEPS, each, strict=True))
    whole = statistics.geometric_mean([math.prod(r.gains) for r in rows])
    return f"Geometric means of the gains over {len(rows)} {what}: {gains}; all together {whole:.2f}."


def report(rows: Sequence[Row], what: str) -> str:
    note = f"The same in the settings {', '.join(list(SETTINGS)[:-1])}:"
    return "\n\n".join([summary(rows, what), time_table(rows), note, count_table(rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*CHAINS, *MODELS], metavar="NAME", help="chains and models")
    parser.add_argument("--sizes", default="l3,dram", help=f"of chains, some of {','.join(SIZES)} (default l3,dram)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    args = parser.parse_args()
    sizes = args.sizes.split(",")
    if not {*sizes} <= {*SIZES}:
        parser.error(f"sizes are {', '.join(SIZES)}")
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, pipe.processors(args.threads))
    subjects_of = {f"chains, size {size}": chains(args.cases, size, args.threads) for size in sizes}
    subjects_of["models"] = models([name for name in args.cases if all(name != c.name for c in CASES)])
    found: dict[str, list[Row]] = {}
    for what, subjects in subjects_of.items():
        for subject in subjects:
            row = measure(subject, args.threads, args.rounds)
            found.setdefault(what, []).append(row)
            print(time_table([row]).splitlines()[-1], flush=True)
    text = "\n\n".join(report(rows, what) for what, rows in found.items())
    print(f"\n{text}")
    os.sched_setaffinity(0, everywhere)
    if args.record:
        results.record("ablation", "What each step of stitching is worth", f"{results.origin()}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
