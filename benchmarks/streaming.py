"""Streams: what passing an item on costs, and what two stages of one core bring.

    python -m benchmarks.streaming --overhead [--items N]
    python -m benchmarks.streaming --cut PATH ...             times kernels, chooses cuts, compiles into the cache
    python -m benchmarks.streaming PATH ... [--seconds S]     measures with these cuts

PATH is an exported network with its NAME.json beside it (`make exports`). Kernels are timed on one core, as by
`benchmarks.profile`, and the model is cut in two where the larger sum of times is the smallest. Then, in turn for some
rounds: the whole model on one core, on two threads, and streamed through two stages of a core each. Run `--cut` first:
the cuts are in build/streaming.json, and measuring does not compile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import architectures, models, profile
from stitch.api import optimize, pipelined
from stitch.bundle import Given, Made
from stitch.partition import borders
from stitch.runtime.pipeline import Pipeline
from stitch.runtime.stage import Stage

CUTS = Path("build/streaming.json")
ROUNDS = 5
TRIES = 4


def kernel_seconds(path: Path, feed: Any) -> tuple[list[float], tuple[int, ...]]:
    """The time of each kernel on one core, and the positions between them at which the model can be cut."""
    c = profile.compiled(path, 1)
    spent = iter(c.measure([feed[p.name] for p in c.artifact.inputs], 1.0, outputs=True))
    native = {k.name: sum(next(spent) for _ in c.lowered[k.name].program.phases) for k in c.kernels}
    return [native.get(k.name, 0.0) for k in c.stitched.kernels], borders(c.stitched)


def best_cut(seconds: Sequence[float], allowed: Sequence[int]) -> int:
    return min(allowed, key=lambda k: max(sum(seconds[:k]), sum(seconds[k:])))


def feed_of(path: Path) -> dict[str, np.ndarray]:
    spec = json.loads(path.with_suffix(".json").read_text())
    return models.make_feed(spec, spec["dims"])


def staged(path: Path, cut: int, cpus: Sequence[int]) -> Any:
    def assign(stitched: Any) -> list[int]:
        return [int(k >= cut) for k in range(len(stitched.kernels))]

    return pipelined(path, [{c} for c in cpus[:2]], assign=assign, named=f"cut {cut}")


def choose(paths: Sequence[Path]) -> None:
    known = json.loads(CUTS.read_text()) if CUTS.exists() else {}
    for path in paths:
        seconds, allowed = kernel_seconds(path, feed_of(path))
        cut = best_cut(seconds, allowed)
        known[path.stem] = cut
        first, second = sum(seconds[:cut]), sum(seconds[cut:])
        print(f"{path.stem}: {len(seconds)} kernels, cut at {cut}: {1e3 * first:.2f} and {1e3 * second:.2f} ms")
        optimize(path)
        staged(path, cut, sorted(os.sched_getaffinity(0))).close()
    CUTS.parent.mkdir(exist_ok=True)
    CUTS.write_text(json.dumps(known))


def rate(run: Callable[[int], float], seconds: float) -> float:
    """Items a second, where others leave the machine alone: stages that are bound to a core wait for whoever else is on
    it, unlike a team. It is measured again up to TRIES times; what counts is the time with the fewest others."""
    count = max(4, int(seconds / max(run(3) / 3, 1e-6)))
    found = []
    for _ in range(TRIES):
        busy, start = _others(), time.perf_counter()
        took = run(count)
        found.append(((_others() - busy) / (time.perf_counter() - start), count / took))
        if found[-1][0] < 0.02:
            break
    return min(found)[1]


def _others() -> float:
    """Seconds of processor time that other processes have had so far, hypervisors included."""
    fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(fields) - fields[3] - fields[4]  # all but idle and waiting for disks
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def compare(path: Path, seconds: float) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    feed, cut = feed_of(path), json.loads(CUTS.read_text())[path.stem]
    alone, together = optimize(path, threads=1), optimize(path, threads=2)
    model = staged(path, cut, cpus)
    wanted = alone.run(None, feed)
    for got in model.stream([feed] * 3):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, wanted, strict=True))

    def one(count: int) -> float:
        os.sched_setaffinity(0, cpus[:1])
        start = time.perf_counter()
        for _ in range(count):
            alone.run(None, feed)
        took = time.perf_counter() - start
        os.sched_setaffinity(0, cpus)
        return took

    def two(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            together.run(None, feed)
        return time.perf_counter() - start

    def stages(count: int) -> float:
        """From the first result on: before that, there is nothing to do for the second stage. Items do not run out
        before the last result either."""
        with model.stream(itertools.repeat(feed), reuse=True) as results:
            next(results)
            start = time.perf_counter()
            for _ in range(count):
                next(results)
            return time.perf_counter() - start

    rows = [[rate(run, seconds) for run in (one, two, stages)] for _ in range(ROUNDS)]
    a, b, c = (statistics.median(column) for column in zip(*rows, strict=True))
    gains = [statistics.median(r[2] / r[k] for r in rows) for k in (0, 1)]
    print(
        f"{path.stem:14} {a:7.2f} /s on one core, {b:7.2f} on two threads, {c:7.2f} in two stages: "
        f"{gains[0]:.2f}x and {gains[1]:.2f}x"
    )


def overhead(items: int) -> None:
    """Stages that do nothing but return what they made before."""
    x = np.zeros(4, np.float32)
    cpus = sorted(os.sched_getaffinity(0))

    def run(arrays: list[np.ndarray], outputs: Any = None) -> list[np.ndarray]:
        return [np.empty(4, np.float32)] if outputs is None else outputs

    for count in (1, 2, 3):
        for pinned in (False, True):
            stages = [
                Stage(f"{k}", run, (Given(0) if k == 0 else Made(k - 1, 0),),
                      frozenset({cpus[k % len(cpus)]}) if pinned else None)
                for k in range(count)
            ]  # fmt: skip
            pipeline = Pipeline(stages, [Made(count - 1, 0)])
            for depth in (2, 8):
                times = []
                for _ in range(3):
                    start = time.perf_counter()
                    n = sum(1 for _ in pipeline.stream(range(items), lambda _: [x], lambda r: r, depth=depth))
                    times.append((time.perf_counter() - start) / n)
                where = "pinned" if pinned else "not pinned"
                each = 1e6 * statistics.median(times)
                print(f"{count} stages, {where}, depth {depth}: {each:.1f} us an item, {each / count:.1f} per stage")


def overhead_of_a_model(items: int) -> None:
    """A small network: a stream beside a loop of runs."""
    network = architectures.encoder("block", layers=1, width=32, heads=2, vocabulary=50, positions=32)
    model = optimize(network, threads=1, cache=False)
    feed = {p.name: np.zeros([4 if isinstance(d, str) else d for d in p.shape], p.dtype) for p in model.inputs}
    cores = sorted(os.sched_getaffinity(0))[:2]
    staging = optimize(network, devices=[f"cpu:{c}" for c in cores], objective="throughput", cache=False)

    def alone() -> None:
        for _ in range(items):
            model.run(None, feed)

    def streamed() -> None:
        assert sum(1 for _ in model.stream(feed for _ in range(items))) == items

    def staged_() -> None:
        assert sum(1 for _ in staging.stream(feed for _ in range(items))) == items

    rows = []
    for _ in range(3):
        row = []
        for run in (alone, streamed, staged_):
            start = time.perf_counter()
            run()
            row.append(1e6 * (time.perf_counter() - start) / items)
        rows.append(row)
    a, b, c = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"a small network, {a:.1f} us a run: streamed {b:.1f} us an item, in two stages {c:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--cut", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    if args.overhead:
        overhead(args.items)
        overhead_of_a_model(args.items)
    if args.cut:
        choose(args.paths)
    else:
        for path in args.paths:
            compare(path, args.seconds)


if __name__ == "__main__":
    main()
