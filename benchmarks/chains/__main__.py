"""Chains of memory-bound operators in stitch and its peers, beside what the machine allows.

    python -m benchmarks.chains [--cases PATTERN ...] [--sizes small,l3,dram] [--threads 1,2] [--engines NAME,...]
                                [--rounds N] [--json FILE] [--plot FILE] [--record]
    python -m benchmarks.chains --against FILE.json     # stitch alone, beside the peers of an earlier run

Each engine is a process; outputs are compared with a float64 oracle before anything is timed, and then the engines
take turns. `make bench-setup` installs the peers into .venv-bench; those that are missing are left out, with a reason.
docs/benchmarks.md says what each engine does and how the limit is found.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.chains import limit, numpy_like, report, symbols
from benchmarks.chains.case import SIZES, Case
from benchmarks.chains.cases import chosen
from benchmarks.chains.engines import ENGINES
from benchmarks.chains.program import translate
from benchmarks.chains.report import Row, Timing
from benchmarks.chains.worker import Worker
from benchmarks.pipe import ROOT, Failed, default_peers, interpreter

SLICE_S = 0.1  # of an engine in a round
OURS = report.OURS


class Bench:
    """The engines' processes for one number of threads."""

    def __init__(self, engines: Sequence[str], threads: int, peers: str, folder: Path) -> None:
        self.threads = threads
        self.versions: dict[str, str] = {}
        self._folder = folder
        caches = ROOT / "build" / "chains"  # of the compilers among the peers, which would take most of the time
        self._workers = []
        self._missing: dict[str, str] = {}
        for engine in engines:
            own = folder / f"cache{threads}" if engine == OURS else caches
            worker = Worker(engine, threads, interpreter(engine, peers), own)
            try:
                self.versions[engine] = worker.ask("start")
                self._workers.append(worker)
            except Failed as problem:
                self._missing[engine] = str(problem)
                worker.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def measure(self, case: Case, size: str, machine: limit.Machine, rounds: int) -> Row:
        """One row, all engines in it."""
        dims = case.sizes[size]
        least = limit.limit(case, dims, machine)
        row = Row(case.name, size, self.threads, case.bytes(dims), 1e6 * least.seconds, least.bound)
        for path in self._folder.glob("*.npy"):
            path.unlink()
        for k, y in enumerate(numpy_like.oracle(translate(case.model(dims)), case.feed(dims))):
            np.save(self._folder / f"{k}.npy", y)
        timings = {engine: Timing(problem=reason) for engine, reason in self._missing.items()}
        ready = []
        for worker in self._workers:
            timings[worker.engine] = self._load(worker, case.name, size)
            if timings[worker.engine].good:
                ready.append(worker)
        taken: dict[str, list[list[float]]] = {w.engine: [] for w in ready}
        for number in range(rounds):
            for worker in ready if number % 2 else ready[::-1]:
                if timings[worker.engine].good:
                    try:
                        taken[worker.engine].append(worker.ask("time", SLICE_S))
                    except Failed as problem:
                        timings[worker.engine] = Timing(problem=str(problem))
        for worker in self._workers:
            worker.ask("drop")
        for engine, samples in taken.items():
            if timings[engine].good:
                timings[engine] = _timing(timings[engine], samples)
        return replace(row, timings={e: timings[e] for e in ENGINES if e in timings})

    def _load(self, worker: Worker, name: str, size: str) -> Timing:
        """Made ready and compared: how long loading took, or what is wrong."""
        try:
            worker.ask("prepare", name, size)
            load = worker.ask("load")
            reload = worker.ask("load") if worker.engine == OURS else 0.0
            error = worker.ask("error", self._folder)
        except Failed as problem:
            return Timing(problem=str(problem))
        wrong = "" if error <= 1 else f"wrong: {error:.3g} times the error that is allowed"
        return Timing(load_ms=1e3 * load, reload_ms=1e3 * reload, problem=wrong)


def _timing(timing: Timing, samples: Sequence[Sequence[float]]) -> Timing:
    medians = [1e6 * statistics.median(s) for s in samples]
    low, high = (float(q) for q in np.quantile(medians, (0.25, 0.75)))
    best = 1e6 * min(map(min, samples))
    return replace(timing, us=statistics.median(medians), low=low, high=high, best=best)


# ------------------------------------------------------------------ the command


def _with_peers(row: Row, before: Mapping[tuple[str, str, int], Row]) -> Row:
    """With the peers' times of an earlier run."""
    peers = {e: t for e, t in before[row.key].timings.items() if e != OURS} if row.key in before else {}
    return replace(row, timings={**row.timings, **peers})


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="names, with * and ?")
    parser.add_argument("--sizes", type=_list, default=list(SIZES), help="default small,l3,dram")
    parser.add_argument("--threads", type=_list, default=["1", "2"], help="default 1,2")
    parser.add_argument("--engines", type=_list, default=list(ENGINES), help=f"default {','.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, after each row")
    parser.add_argument("--against", type=Path, metavar="FILE", help="time stitch alone; peers are from that JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="time over limit, as SVG or PNG")
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    parser.add_argument("--peers", default=default_peers(), metavar="PYTHON", help="default .venv-bench/bin/python")
    args = parser.parse_args()
    for name in {*args.engines} - {*ENGINES}:
        parser.error(f"no engine {name}: there are {', '.join(ENGINES)}")
    for size in {*args.sizes} - {*SIZES}:
        parser.error(f"no size {size}: there are {', '.join(SIZES)}")
    if not chosen(args.cases):
        parser.error(f"no case matches {' '.join(args.cases)}: there are {', '.join(c.name for c in chosen([]))}")
    return args


def main() -> int:
    args = _arguments()
    before = {row.key: row for row in report.load(args.against)} if args.against else {}
    engines = [OURS] if args.against else args.engines
    about: dict[str, Any] = {"date": str(datetime.datetime.now(datetime.UTC).date()), "versions": {}, "limits": []}
    rows: list[Row] = []
    most = len(os.sched_getaffinity(0))
    for threads in map(int, args.threads):
        if threads > most:
            print(f"{threads} threads are left out: there are {most} processors")
            continue
        machine = limit.measure(threads)
        about["limits"].append(vars(machine))
        print(f"\n{threads} thread{'s' if threads > 1 else ''}; {_told(machine)}\n\n{report.line(report.COLUMNS)}")
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(engines, threads, args.peers, Path(folder))
            about["versions"] |= bench.versions
            try:
                for case in chosen(args.cases):
                    for size in args.sizes:
                        row = _with_peers(bench.measure(case, size, machine, args.rounds), before)
                        rows.append(row)
                        print(report.line(report.cells(row)), flush=True)
                        if args.json:
                            report.save(args.json, rows, about)
            finally:
                bench.close()
    found = [str(symbols.measure(c)) for c in chosen(args.cases) if c.symbolic and OURS in engines]
    text = "\n\n".join([report.summary(rows), *found])
    print(f"\n{text}")
    if args.plot:
        try:
            report.picture(args.plot, rows)
        except ImportError:
            print("no picture without matplotlib")
    if args.record:
        tables = [f"**{n} threads**\n\n{report.table(r for r in rows if r.threads == n)}" for n in _counts(rows)]
        peers = ", ".join(f"{e} {v}" for e, v in about["versions"].items() if e != OURS)
        body = [results.origin(), f"Peers: {peers}.", text, *tables]
        results.record("chains", "Chains of memory-bound operators", "\n\n".join(body))
    return 0 if all(row.ours.good or OURS not in row.timings for row in rows) else 1


def _counts(rows: Sequence[Row]) -> list[int]:
    return sorted({row.threads for row in rows})


def _told(machine: limit.Machine) -> str:
    rates = f"{machine.mixed / 1e9:.1f} G instructions/s and core, {machine.multiplying / 1e9:.1f} of them multiply"
    sizes = (("256 KB", 1 << 18), ("8 MB", 1 << 23), ("128 MB", 1 << 27))
    at = ", ".join(f"{name} {machine.bandwidth(size) / 1e9:.0f}" for name, size in sizes)
    return f"{32 * machine.lanes} bits; {rates}; copying, GB/s: {at}"


if __name__ == "__main__":
    sys.exit(main())
