"""Latency on two sets of one core each, where operators are shared by both (docs/placement.md).

    python -m benchmarks.sharing PATH ... [--slow 0.4 | --quota 0.4] [--seconds S]

PATH is an exported network with its NAME.json beside it (`make exports`); run `stitch calibrate` first. In turn for
some rounds: the whole model on the first core, a team of two that takes the cores to be equal, and what is decided.

--slow     the second core is taken to have such a capacity; it waits after each chunk, so that this took as much longer
--quota    the second core is `cpu:1@SHARE`, its thread under a quota: as fast as the other, and stopped in between
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from benchmarks.streaming import feed_of, quota, sizes_of
from stitch import detection
from stitch.api import optimize
from stitch.pipelined import PlacedModel
from stitch.runtime import cpu
from stitch.topology import Board, Cluster, Link

RUNS, FIRST = 20, 4  # of one model at a time, and how many of them do not count
SLOWED = """
declare void @stitch_share(ptr, ptr, ptr, i64, i64, ptr)
declare i64 @llvm.readcyclecounter()

define internal void @chunk(ptr %args, i64 %begin, i64 %end, i64 %worker) {
  %own_at = getelementptr ptr, ptr %args, i64 1
  %fn = load ptr, ptr %args
  %own = load ptr, ptr %own_at
  %start = call i64 @llvm.readcyclecounter()
  call void %fn(ptr %own, i64 %begin, i64 %end, i64 %worker)
  %caller = icmp eq i64 %worker, 0
  br i1 %caller, label %out, label %wait
wait:
  %done = call i64 @llvm.readcyclecounter()
  %took = sub i64 %done, %start
  %more = mul i64 %took, MORE
  %longer = udiv i64 %more, 1000
  %until = add i64 %done, %longer
  br label %again
again:
  %now = call i64 @llvm.readcyclecounter()
  %early = icmp ult i64 %now, %until
  br i1 %early, label %again, label %out
out:
  ret void
}

define void @slow_share(ptr %team, ptr %fn, ptr %own, i64 %tasks, i64 %grain, ptr %table) {
  %args = alloca [2 x ptr]
  store ptr %fn, ptr %args
  %own_at = getelementptr ptr, ptr %args, i64 1
  store ptr %own, ptr %own_at
  call void @stitch_share(ptr %team, ptr @chunk, ptr %args, i64 %tasks, i64 %grain, ptr %table)
  ret void
}

define void @slow_parallel(ptr %team, ptr %fn, ptr %own, i64 %tasks, i64 %grain) {
  call void @slow_share(ptr %team, ptr %fn, ptr %own, i64 %tasks, i64 %grain, ptr null)
  ret void
}
"""


@contextlib.contextmanager
def slowed(share: float) -> Iterator[None]:
    """Models that are made meanwhile have workers of this speed; those who call are as fast as ever."""
    real = dict(cpu.support())
    code = cpu.compile_ir(SLOWED.replace("MORE", str(round(1000 * (1 / share - 1)))))
    library = cpu.Library(code, ["slow_share", "slow_parallel"], real)
    library.keep()
    ours = {"stitch_share": library["slow_share"], "stitch_parallel": library["slow_parallel"]}
    with mock.patch.object(cpu, "_support", real | ours):
        yield


def unlike(cpus: list[int], share: float) -> Board:
    """This machine, with a second core of less capacity. Both have one cache."""
    here = detection.detect()
    clusters = tuple(Cluster(f"c{c}", ((c,),), round(1024 * s)) for c, s in zip(cpus, (1.0, share), strict=True))
    return Board(here.name, here.target, clusters, (Link(clusters[0].name, clusters[1].name, 0.0, math.inf),))


def threads_on(cpu: int) -> list[int]:
    """Those of this process that may run on one CPU only."""
    return [int(t) for t in os.listdir("/proc/self/task") if os.sched_getaffinity(int(t)) == {cpu}]


def compare(path: Path, slow: float | None, part: float | None, seconds: float) -> str:
    cpus, feed, sizes = sorted(os.sched_getaffinity(0))[:2], feed_of(path), sizes_of(path)
    two = [f"cpu:{c}" for c in cpus]
    taken: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        join = stack.enter_context(quota(part)) if part else None
        if slow:
            stack.enter_context(slowed(slow))
        models = {
            "one": optimize(path, devices=two[:1], sizes=sizes),
            "equal": optimize(path, devices=two, sizes=sizes),
        }
        if slow:
            stack.enter_context(mock.patch.object(detection, "detect", return_value=unlike(cpus, slow)))
        wanted = [two[0], f"{two[1]}@{part}" if part else two[1]]
        models["found"] = optimize(path, devices=wanted, sizes=sizes)
        expected = optimize(path, threads=1).run(None, feed)
        for model in models.values():
            got = model.run(None, feed)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(got, expected, strict=True))
        if join is not None:
            join(threads_on(cpus[1]))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not taken:
            for name, model in models.items():
                for k in range(RUNS):
                    start = time.perf_counter()
                    model.run(None, feed)
                    if k >= FIRST:
                        taken.setdefault(name, []).append(time.perf_counter() - start)
    shared = models["found"]
    assert isinstance(shared, PlacedModel)
    decision = shared.decision
    middle = statistics.fmean if part else statistics.median  # a quota's stops are rare and long
    one, equal, found = (middle(t) for t in taken.values())
    times = " | ".join(f"{1e3 * t:.2f}" for t in (one, equal, found, decision.seconds))
    count = f"{sum(p.shared for p in decision.phases)} of {len(decision.phases)}"
    return f"| {path.stem} | {count} | {times} | {one / found:.2f} | {equal / found:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--slow", type=float, metavar="SHARE", help="the capacity of the second core")
    parser.add_argument("--quota", type=float, metavar="SHARE", help="the part of its time that it gets")
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    print("| ms an input | phases shared | one core | equal shares | as decided | predicted | one ÷ | equal ÷ |")
    print("|---|---:|" + "---:|" * 6)
    for path in args.paths:
        print(compare(path, args.slow, args.quota, args.seconds))


if __name__ == "__main__":
    main()
