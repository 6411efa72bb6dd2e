"""How long one inference of a whole network takes, beside onnxruntime and OpenVINO, and beside the machine's limit.

    python -m benchmarks.latency [--models NAME ...] [--threads 1,2] [--rounds N] [--engines NAME,...] [--peers PYTHON]
                                 [--variants] [--dims DIM=N,...] [--quick] [--record]

Each engine with each number of threads is a process of its own, kept to as many processors as it has threads; a model
is loaded into all of them once. Outputs are compared first. Then the engines take turns: in each round, each runs for
a slice of time, one right after the other, so that all see the same neighbours. An engine's time is the median over
rounds of the medians within them; the ratio is the median of the rounds' ratios to the peer that is fastest, and its
quartiles are those of the rounds.

With one thread, nothing waits in any engine, and times are the process's processor time: what others take of the
processor does not count. With more, they are wall time, and mean little on a machine that is not idle.

Exports have open dims: --variants measures them with their own, with a batch of 4, and with half of the sequence too;
--dims replaces their own. docs/benchmarks.md says what an engine that is left out or blank means, and how the limit is
found. The exit status is 1 if stitch's outputs are not those that the peers agree on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import models, results
from benchmarks.chains import limit
from benchmarks.networks import report
from benchmarks.networks.agreement import disputed
from benchmarks.networks.cases import Feed, Network, networks
from benchmarks.networks.engines import ENGINES
from benchmarks.networks.limit import Work, described, work
from benchmarks.networks.report import Row, Timing
from benchmarks.networks.worker import Worker
from benchmarks.pipe import OURS, Failed, default_peers, interpreter

SLICE_S = 0.15  # per engine and round, at least MIN_RUNS
MIN_RUNS = 3
QUICK = (
    *("mnist_cntk", "yunet_n_dyn", "magika_v3_3", "vespa_transformer"),
    *("light_squeezenet", "light_shufflenet", "mobilenet_v2"),
)


class Bench:
    """The engines' processes for one number of threads."""

    def __init__(self, engines: Sequence[str], threads: int, peers: str, cache: Path) -> None:
        self.threads = threads
        self.machine = limit.measure(threads)
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self._workers: list[Worker] = []
        for engine in engines:
            worker = Worker(engine, threads, interpreter(engine, peers), cache)
            try:
                self.versions[engine] = worker.ask("start")
                self._workers.append(worker)
            except Failed as problem:
                self.missing[engine] = str(problem)
                worker.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def measure(self, network: Network, needs: Work | None, rounds: int) -> Iterator[Row]:
        """A row for each choice of dims."""
        refused: dict[str, Timing] = {}
        for worker in self._workers:
            try:
                worker.ask("load", network.path)
            except Failed as problem:
                refused[worker.engine] = Timing(problem=str(problem))
        loaded = [w for w in self._workers if w.engine not in refused]
        for dims, feed in network.feeds.items():
            least = None if needs is None else needs.limit(feed, self.machine)
            found = refused | self._timings(loaded, feed, network.noise, rounds)
            ordered = {e: found[e] for e in self.versions}
            yield Row(network.collection, network.name, dims, self.threads, least, ordered)
        for worker in self._workers:
            worker.ask("drop")

    def _timings(self, workers: Sequence[Worker], feed: Feed, noise: float, rounds: int) -> dict[str, Timing]:
        found: dict[str, Timing] = {}
        outputs = {}
        for worker in workers:
            try:
                outputs[worker.engine] = worker.ask("outputs", feed)
            except Failed as problem:
                found[worker.engine] = Timing(problem=str(problem))
        found |= {engine: Timing(problem=why, wrong=True) for engine, why in disputed(outputs, noise).items()}
        taken: dict[str, list[list[float]]] = {w.engine: [] for w in workers if w.engine not in found}
        for number in range(rounds):
            for worker in workers if number % 2 else workers[::-1]:
                if worker.engine not in found:
                    try:
                        taken[worker.engine].append(worker.ask("time", SLICE_S, MIN_RUNS))
                    except Failed as problem:
                        found[worker.engine] = Timing(problem=str(problem))
                    time.sleep(0.005)  # for threads that still spin
        for engine, samples in taken.items():
            if engine not in found:
                medians = [1e3 * statistics.median(s) for s in samples]
                found[engine] = Timing(medians, 1e3 * min(map(min, samples)))
        return found


def _sizes(text: str) -> dict[str, int]:
    return {name: int(n) for name, n in (part.split("=") for part in text.split(","))}


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="default: all that are found")
    parser.add_argument("--threads", type=_list, default=["1", "2"], help="numbers with commas (default 1,2)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engines", type=_list, default=list(ENGINES), help=f"default {','.join(ENGINES)}")
    parser.add_argument("--peers", default=default_peers(), metavar="PYTHON", help="default .venv-bench/bin/python")
    parser.add_argument("--variants", action="store_true", help="exports at several dims")
    parser.add_argument("--dims", type=_sizes, default={}, metavar="DIM=N,...", help="of exports, instead of their own")
    parser.add_argument("--quick", action="store_true", help=f"three rounds of {', '.join(QUICK)}")
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    args = parser.parse_args()
    for name in {*args.engines} - {*ENGINES}:
        parser.error(f"no engine {name}: there are {', '.join(ENGINES)}")
    if args.quick:
        args.models, args.rounds = list(QUICK), 3
    return args


def main() -> int:
    args = _arguments()
    most = len(os.sched_getaffinity(0))
    counts = [int(n) for n in args.threads]
    for n in [n for n in counts if n > most]:
        print(f"{n} threads are left out: there are {most} processors")
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="stitch-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        benches = [Bench(args.engines, n, args.peers, folder) for n in counts if n <= most]
        versions: dict[str, str] = {}
        for bench in benches:
            stack.callback(bench.close)
            versions |= bench.versions
        for engine, reason in (benches[0].missing if benches else {}).items():
            print(f"{engine} is left out: {reason}")
        engines = [e for e in args.engines if e in versions]
        machines = "; ".join(described(bench.machine) for bench in benches)
        print("\n".join([f"{machines}\n", *report.header(engines)]))
        for network in networks(args.models, folder, args.dims, args.variants):
            needs = work(network.path)
            for bench in benches:
                for row in bench.measure(network, needs, args.rounds):
                    rows.append(row)
                    print(
                        "\n".join([report.line(row, engines), *(f"  {why}" for why in report.blanks([row]))]),
                        flush=True,
                    )
            for file in folder.glob("*.artifact"):  # the other number of threads has used it
                file.unlink(missing_ok=True)
    print("\n" + report.summary(rows))
    if models.exports() is None:
        print("\nno exported architectures found; `make exports` makes them")
    if args.record and rows:
        peers = ", ".join(f"{e} {v}" for e, v in versions.items() if e != OURS)
        parts = [results.origin(), f"Peers: {peers}. Limits: {machines}.", report.summary(rows)]
        for collection in dict.fromkeys(r.collection for r in rows):
            found = [r for r in rows if r.collection == collection]
            parts.append(f"**{report.TITLES[collection]}**\n\n{report.table(found, engines)}")
        results.record("latency", "One inference, beside onnxruntime and OpenVINO", "\n\n".join(parts))
    return 1 if any(r.wrong for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
