"""Streams: what passing an item on costs, and what two stages of one core bring.

    python -m benchmarks.streaming --overhead [--items N]
    python -m benchmarks.streaming PATH ... [--seconds S] [--record]
    python -m benchmarks.streaming PATH ... --slow 0.4           with a quota on the second core
    python -m benchmarks.streaming PATH --picture FILE.svg       who worked on which input when, as measured

PATH is an exported network with its NAME.json beside it (`make exports`). The model is cut by predicted times, so run
`stitch calibrate` first. In turn for some rounds: the whole model on one core, on two threads, and streamed through two
stages of a core each. With --slow, what was chosen is compared with all cuts that measured times say could be good.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import architectures, models, profile, results
from stitch.api import optimize, pipelined
from stitch.bundle import Given, Made
from stitch.partition import borders
from stitch.pipelined import PlacedModel
from stitch.runtime.pipeline import Pipeline
from stitch.runtime.stage import Stage
from stitch.simulate import gantt
from stitch.simulate.events import Run, Span

ROUNDS = 5
TRIES = 4
NEAR = 1.3
"""Cuts are tried whose bottleneck is predicted to be at most so many times the least."""


def feed_of(path: Path) -> dict[str, np.ndarray]:
    spec = json.loads(path.with_suffix(".json").read_text())
    return models.make_feed(spec, spec["dims"])


def sizes_of(path: Path) -> dict[str, int]:
    sizes: dict[str, int] = json.loads(path.with_suffix(".json").read_text())["dims"]
    return sizes


def staged(path: Path, cut: int, cpus: Sequence[int]) -> Any:
    def assign(stitched: Any) -> list[int]:
        return [int(k >= cut) for k in range(len(stitched.kernels))]

    return pipelined(path, [{c} for c in cpus[:2]], assign=assign, named=f"cut {cut}")


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


def compare(path: Path, seconds: float) -> str:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    feed = feed_of(path)
    alone, together = optimize(path, threads=1), optimize(path, threads=2)
    model = optimize(path, devices=[f"cpu:{c}" for c in cpus], objective="throughput", sizes=sizes_of(path))
    assert isinstance(model, PlacedModel)
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
    predicted = [f"{1e3 * s.seconds:.2f}" for s in model.decision.stages]
    return (
        f"| {path.stem} | {' and '.join(predicted)} | {a:.2f} | {b:.2f} | {c:.2f} | {gains[0]:.2f} | {gains[1]:.2f} |"
    )


def slowed(path: Path, share: float, seconds: float) -> str:
    """Two stages of a core each, the second of which gets `share` of its core by a quota: all cuts that could be good,
    and which of them the predictions choose."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    feed, found = feed_of(path), {}
    chosen = optimize(
        path, devices=[f"cpu:{cpus[0]}", f"cpu:{cpus[1]}@{share}"], objective="throughput", sizes=sizes_of(path)
    )
    assert isinstance(chosen, PlacedModel)
    if chosen.decision.stages[0].cpus != (cpus[0],):
        cpus = cpus[::-1]
    shares = [1.0 if s.cpus == (min(cpus),) else share for s in chosen.decision.stages]
    probe = profile.compiled(path, 1)
    spent = iter(probe.measure([feed[p.name] for p in probe.artifact.inputs], 1.0, outputs=True))
    times = {k.name: sum(next(spent) for _ in probe.lowered[k.name].program.phases) for k in probe.kernels}
    each = [times.get(k.name, 0.0) for k in probe.stitched.kernels]
    allowed = borders(probe.stitched)
    bottleneck = {k: max(sum(each[:k]) / shares[0], sum(each[k:]) / shares[1]) for k in allowed}
    cut = chosen.decision.stages[0].kernels
    near = [k for k in allowed if bottleneck[k] <= NEAR * min(bottleneck.values()) or k == cut]
    with quota(share) as join:
        for k in near:
            with (
                contextlib.closing(staged(path, k, cpus)) as model,
                model.stream(itertools.repeat(feed), reuse=True) as results,
            ):
                next(results)
                slow = shares.index(share)
                join([t.native_id for t in threading.enumerate() if t.name == f"stitch-stage {slow}" and t.native_id])
                rates = []
                for _ in range(ROUNDS):
                    count = max(4, int(seconds / bottleneck[k]))
                    start = time.perf_counter()
                    for _ in range(count):
                        next(results)
                    rates.append(count / (time.perf_counter() - start))
                found[k] = statistics.median(rates)
    best = max(found, key=lambda k: found[k])
    return (
        f"| {path.stem} | {len(allowed)}, {len(near)} tried | {cut}: {found[cut]:.2f} | {best}: {found[best]:.2f} | "
        f"{found[cut] / found[best]:.3f} |"
    )


@contextlib.contextmanager
def quota(share: float) -> Iterator[Callable[[Sequence[int]], None]]:
    """Puts threads under a quota of `share` of a core; needs control groups (version 1, which takes threads), and the
    right to make one. Raises OSError."""
    folder = Path("/sys/fs/cgroup/cpu") / f"stitch-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "cpu.cfs_period_us").write_text("10000")
        (folder / "cpu.cfs_quota_us").write_text(str(round(10000 * share)))

        def join(threads: Sequence[int]) -> None:
            for thread in threads:
                (folder / "tasks").write_text(str(thread))

        yield join
    finally:
        for thread in (folder / "tasks").read_text().split():
            with contextlib.suppress(OSError):
                (folder.parent / "tasks").write_text(thread)
        folder.rmdir()


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


def picture(path: Path, items: int = 12, shown: int = 8) -> str:
    """What two stages of a core each did with so many inputs, after the stream has filled."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    model = optimize(path, devices=[f"cpu:{c}" for c in cpus], objective="throughput", sizes=sizes_of(path))
    assert isinstance(model, PlacedModel)
    spans: list[Span] = []

    def timed(number: int, stage: Stage) -> Stage:
        count = itertools.count()

        def run(inputs: Any, outputs: Any) -> Any:
            item, begin = next(count), time.perf_counter()
            results = stage.run(inputs, outputs)
            spans.append(Span(number, item, begin, time.perf_counter()))
            return results

        return replace(stage, run=run)

    stages = [timed(k, stage) for k, stage in enumerate(model.pipeline.stages)]
    feed = [feed_of(path)[port.name] for port in model.bundle.inputs]
    with Pipeline(stages, model.pipeline.results).stream([feed] * (2 * items), list, list) as results:
        for _ in results:
            pass
    kept = [s for s in spans if s.item >= items]
    start = min(s.begin for s in kept)
    moved = [Span(s.resource, s.item - items, s.begin - start, s.end - start) for s in kept]
    last = sorted(s.end for s in moved if s.resource == len(stages) - 1)
    done = Run(len(stages), tuple(moved), (), tuple(last), ())
    names = [f"{s.device}: {s.first} to {s.last}" for s in model.decision.stages]
    return gantt.svg(done, names, f"{path.stem} in two stages, as measured", last[shown - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--slow", type=float, metavar="SHARE", help="the share of its time that the second core gets")
    parser.add_argument("--record", action="store_true", help="write the table to benchmarks/RESULTS.md")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="an SVG of the first model's stages")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    if args.overhead:
        overhead(args.items)
        overhead_of_a_model(args.items)
    if args.picture is not None:
        args.picture.write_text(picture(args.paths[0]))
        return
    lines: list[str] = []
    if args.paths and args.slow is None:
        lines.append("| model | predicted ms | one core /s | two threads /s | two stages /s | of one | of two |")
        lines.append("|---|---|---:|---:|---:|---:|---:|")
        lines += [compare(path, args.seconds) for path in args.paths]
    elif args.paths:
        lines += [f"The second core slowed to {args.slow:g} by a quota:", "",
                  "| model | cuts | chosen by prediction, items/s | best that was tried | share of it |",
                  "|---|---|---|---|---:|"]  # fmt: skip
        lines += [slowed(path, args.slow, args.seconds) for path in args.paths]
    print("\n".join(lines))
    if args.record and lines:
        name = "streaming" if args.slow is None else "streaming-slow"
        title = "Two stages of one core" if args.slow is None else "Two stages, one of them slowed"
        results.record(name, title, "\n".join([results.origin(), "", *lines]))


if __name__ == "__main__":
    main()
