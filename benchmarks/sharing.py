"""Latency on two sets of one core each, where operators are shared by both (docs/placement.md).

    python -m benchmarks.sharing PATH ... [--slow 0.4] [--seconds S]

PATH is an exported network with its NAME.json beside it (`make exports`); run `stitch calibrate` first. In turn for
some rounds: the whole model on the first core, a team of two that takes the cores to be equal, and what is decided for
`cpu:0` and `cpu:1` or, with --slow, `cpu:1@SHARE`: then the second core is under a quota in all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from pathlib import Path

from benchmarks.streaming import feed_of, quota, sizes_of
from stitch.api import optimize
from stitch.pipelined import PlacedModel


def threads_on(cpu: int) -> list[int]:
    """Those of this process that may run on one CPU only."""
    return [int(t) for t in os.listdir("/proc/self/task") if os.sched_getaffinity(int(t)) == {cpu}]


def compare(path: Path, share: float | None, seconds: float) -> str:
    cpus, feed, sizes = sorted(os.sched_getaffinity(0))[:2], feed_of(path), sizes_of(path)
    second = f"cpu:{cpus[1]}" + (f"@{share}" if share else "")
    wanted = {"one core": [f"cpu:{cpus[0]}"], "equal": [f"cpu:{c}" for c in cpus], "shared": [f"cpu:{cpus[0]}", second]}
    taken: dict[str, list[float]] = {name: [] for name in wanted}
    with contextlib.ExitStack() as stack:
        join = stack.enter_context(quota(share)) if share else None
        models = {name: optimize(path, devices=devices, sizes=sizes) for name, devices in wanted.items()}
        expected = optimize(path, threads=1).run(None, feed)
        for model in models.values():
            got = model.run(None, feed)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(got, expected, strict=True))
        if join is not None:
            join(threads_on(cpus[1]))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name, model in models.items():
                for _ in range(3):
                    start = time.perf_counter()
                    model.run(None, feed)
                    taken[name].append(time.perf_counter() - start)
    shared = models["shared"]
    assert isinstance(shared, PlacedModel)
    decision = shared.decision
    one, equal, found = (statistics.median(t) for t in taken.values())
    count = f"{sum(p.shared for p in decision.phases)} of {len(decision.phases)}"
    times = " | ".join(f"{1e3 * t:.2f}" for t in (one, equal, found, decision.seconds))
    mean = statistics.fmean(taken["equal"]) / statistics.fmean(taken["shared"])
    return f"| {path.stem} | {count} | {times} | {one / found:.2f} | {equal / found:.2f} | {mean:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--slow", type=float, metavar="SHARE", help="the share of its time that the second core gets")
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    print("| ms an input | phases shared | one core | equal shares | shared | predicted | ÷ one | equal ÷ | of means |")
    print("|---|---:|" + "---:|" * 7)
    for path in args.paths:
        print(compare(path, args.slow, args.seconds))


if __name__ == "__main__":
    main()
