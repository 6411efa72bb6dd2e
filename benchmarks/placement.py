"""Placement on a described board: pipelines over core clusters, exact and by Pipe-it's heuristic.

    python -m benchmarks.placement [--fit] [--seeds N] [--scale] [--record]

The board is a Kirin 970 whose rates are fitted to the throughput of five networks on each of its clusters (`--fit`
prints that fit, for `stitch/boards/kirin970.toml`). So that a pipeline over both is faster than one follows from the
calibration, and proves nothing about a model of costs; Pipe-it measured +39 % over 4 Cortex-A73. What is to be learnt
here is how near the heuristic comes to the optimum, and how both decay when the times that they are given are wrong:

    e %      each time of a kernel on a cluster is multiplied by exp(N(0, s)), with s such that it is wrong by e % in
             the mean; the pipeline found for these times is then judged by the true ones
    kept     its throughput as a share of the optimum for the true times: mean, and the worst tenth of the seeds

`--scale` measures how long the search takes for 10 to 1,000 items on 4 + 4 cores.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks import results
from benchmarks.published import PUBLISHED, Network, networks
from stitch import boardfile, target
from stitch.fitting import nonnegative
from stitch.placement import latency, pipeit, throughput
from stitch.placement.problem import Device, Item, Link, Pipeline, Problem, Value, stage_seconds
from stitch.simulate.model import problem_of
from stitch.topology import Board

ERRORS = (0.05, 0.10, 0.20, 0.40)
SEARCHES: dict[str, Callable[[Problem], Pipeline]] = {
    "exact": throughput.place,
    "fewest stages within 5 %": partial(throughput.place, slack=0.05),
    "Pipe-it": pipeit.place,
}
COEFFICIENTS = ("contraction", "elementwise", "bandwidth", "kernel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the board's rates")
    parser.add_argument("--seeds", type=int, default=50, metavar="N", help="for each error (default 50)")
    parser.add_argument("--record", action="store_true", help="write the tables to benchmarks/RESULTS.md")
    parser.add_argument("--scale", action="store_true", help="how long the search takes")
    args = parser.parse_args()
    if args.scale:
        scale()
        return
    board = boardfile.load("kirin970")
    found = list(networks(target.parse(board.target)))
    if args.fit:
        fit(found)
        return
    problems = [(n.name, problem_of(n.stitched, board, {}).problem) for n in found]
    text = [*throughputs(problems, board), "", *errors(problems, args.seeds)]
    print("\n".join(text))
    if args.record:
        results.record(
            "placement", "Placement on a Kirin 970 that is only described", "\n".join([results.origin(), "", *text])
        )


# ------------------------------------------------------------------ calibration


def fit(found: Sequence[Network]) -> None:
    """Seconds = work . coefficients, by the squares of relative errors: four coefficients, five networks."""
    totals = [n.total for n in found]
    for n in found:
        print(f"{n.name:12} {n.total}")
    rows = np.array([[t.contraction, t.elementwise, t.bytes, t.kernels] for t in totals])
    unit = rows.max(axis=0)
    for column, cluster in ((1, "a73"), (0, "a53")):
        seconds = np.array([1 / PUBLISHED[n.name][column] for n in found])
        solved = nonnegative(rows / unit / seconds[:, None], np.ones(len(found))) / unit
        print(f"\n{cluster}")
        for name, value in zip(COEFFICIENTS, solved, strict=True):
            rate = value if name == "kernel" else (1 / value if value else math.inf)
            print(f"{name} = {rate:.6e}")
        for n, predicted, true in zip(found, rows @ solved, seconds, strict=True):
            print(f"# {n.name}: {1 / predicted:.2f} images/s, published {1 / true:.2f}")


# ------------------------------------------------------------------ throughput


def throughputs(problems: Sequence[tuple[str, Problem]], board: Board) -> list[str]:
    lines = ["Images/s on the Kirin 970 as calibrated; in brackets what was published for the cluster.", ""]
    lines.append(
        "| network | kernels | 4xA53 | 4xA73 | exact | gain | Pipe-it's heuristic | of the optimum | sum of both |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    gains, shares = [], []
    for name, problem in problems:
        a73, a53 = (sum(item.seconds[d][-1] for item in problem.items) for d in (0, 1))
        best, other = throughput.place(problem), pipeit.place(problem)
        gain, share = a73 / best.bottleneck, best.bottleneck / other.bottleneck
        gains.append(gain)
        shares.append(share)
        low, high = PUBLISHED[name]
        both = 1 / a53 + 1 / a73
        lines.append(
            f"| {name} | {len(problem.items)} | {1 / a53:.1f} ({low}) | {1 / a73:.1f} ({high}) "
            f"| {1 / best.bottleneck:.1f}, {len(best.stages)} stages | {100 * (gain - 1):+.0f} % "
            f"| {1 / other.bottleneck:.1f}, {len(other.stages)} stages | {100 * share:.1f} % | {both:.1f} |"
        )
    lines.append(f"| mean | | | | | {100 * (np.mean(gains) - 1):+.0f} % | | {100 * np.mean(shares):.1f} % | |")
    said = (
        "The gain over 4xA73 follows from the calibration and proves nothing about it. It may exceed the sum of both "
        "clusters, since each gets the kernels that the fit says it is better at."
    )
    return [*lines, "", said]


# ------------------------------------------------------------------ wrong predictions


def disturbed(problem: Problem, error: float, rng: np.random.Generator) -> Problem:
    """With times that are wrong by `error` in the mean, the same for all numbers of cores of a device."""
    width = _width(error)
    items = []
    for item in problem.items:
        factors = np.exp(rng.normal(0, width, len(item.seconds)))
        seconds = tuple(tuple(t * float(f) for t in times) for times, f in zip(item.seconds, factors, strict=True))
        items.append(replace(item, seconds=seconds))
    return replace(problem, items=tuple(items))


def _width(error: float) -> float:
    """The s with E|exp(N(0, s)) - 1| = error, by bisection on a fixed sample."""
    sample = np.random.default_rng(0).normal(size=20_000)
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if np.abs(np.exp(middle * sample) - 1).mean() < error else (low, middle)
    return low


def errors(problems: Sequence[tuple[str, Problem]], seeds: int) -> list[str]:
    lines = [f"Throughput kept when the times are wrong; {seeds} seeds: mean, and the worst tenth.", ""]
    lines.append("| network | search | " + " | ".join(f"{100 * e:.0f} %" for e in ERRORS) + " |")
    lines.append("|---|---|" + "---|" * len(ERRORS))
    for name, problem in problems:
        best = throughput.place(problem).bottleneck
        for label, search in SEARCHES.items():
            cells = []
            for error in ERRORS:
                kept = []
                for seed in range(seeds):
                    wrong = disturbed(problem, error, np.random.default_rng(seed))
                    kept.append(best / max(stage_seconds(problem, search(wrong).stages)))
                worst = float(np.mean(sorted(kept)[: max(1, seeds // 10)]))
                cells.append(f"{100 * np.mean(kept):.1f} % ({100 * worst:.1f})")
            lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    return lines


# ------------------------------------------------------------------ how long it takes


def scale() -> None:
    print("| items | pipeline on 4 + 4 cores | Pipe-it's heuristic | latency, 2 devices | latency, 3 devices |")
    print("|---|---|---|---|---|")
    for count in (10, 100, 300, 1000):
        cells = []
        for cores, search in (
            ((4, 4), throughput.place), ((4, 4), pipeit.place), ((1, 1), latency.place), ((1, 1, 1), latency.place),
        ):  # fmt: skip
            if search is pipeit.place and count > 100:
                cells.append("-")
                continue
            problem = made_up(count, cores)
            start = time.perf_counter()
            search(problem)
            cells.append(f"{time.perf_counter() - start:.3f} s")
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


def made_up(count: int, cores: tuple[int, ...]) -> Problem:
    """Random times, and each value used by one or two of the next three items."""
    rng = np.random.default_rng(count)
    base = rng.random(count) * 1e-3
    factors = rng.uniform(0.5, 2, (count, len(cores)))
    items = tuple(
        Item(
            f"k{k}",
            tuple(tuple(float(base[k] * f / n) for n in range(1, c + 1)) for f, c in zip(row, cores, strict=True)),
        )
        for k, row in enumerate(factors)
    )
    values = tuple(
        Value(f"v{k}", k, tuple(sorted({min(count - 1, k + 1 + int(n)) for n in rng.integers(0, 3, 2)})), 100_000)
        for k in range(count - 1)
    )
    links = tuple(tuple(Link(1e-5, 1e9) for _ in cores) for _ in cores)
    return Problem(items, tuple(Device(f"d{d}", c) for d, c in enumerate(cores)), values, links)


if __name__ == "__main__":
    main()
