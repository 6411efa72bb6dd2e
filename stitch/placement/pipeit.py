"""Pipe-it's heuristic for the same problem as `stitch.placement.throughput`, to compare with the optimum.

Wang and others, "High-Throughput CNN Inference on Embedded ARM big.LITTLE Multicore Processors", IEEE TCAD 2019. The
paper could not be read here: this is from memory, and details may differ.

    1. Stages are single cores, those of the fastest device first. All items are in the first stage.
    2. Items flow from the end of a stage to the start of the next one while that lowers the larger of the two times.
       This goes on over all neighbours until nothing moves.
    3. Two neighbouring stages of one device are merged into one with the cores of both, and items flow anew. The merge
       that raises the throughput most is kept, and the next one is looked for; until none does.

It sees neither orders in which a slower device comes first, nor that an item cannot run on a device: then it may find
no pipeline at all, which shows as infinite seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from stitch.placement.problem import Pipeline, Problem, Stage, stage_seconds

Cores = tuple[int, int]  # device, number of cores
STEPS = 10_000  # over all neighbours; each lowers a time, so it ends, but rounding shall not decide whether


def place(problem: Problem) -> Pipeline:
    """The pipeline that the heuristic finds."""
    if not problem.items:
        return Pipeline((), (), False)
    order = sorted(range(len(problem.devices)), key=lambda d: sum(item.seconds[d][0] for item in problem.items))
    stages: list[Cores] = [(d, 1) for d in order for _ in range(problem.devices[d].cores)]
    best = flow(problem, stages)
    while True:
        tried = [(flow(problem, merged), merged) for merged in _merges(stages)]
        if not tried:
            return best
        found, merged = min(tried, key=lambda pair: pair[0].bottleneck)
        if found.bottleneck >= best.bottleneck:
            return best
        best, stages = found, merged


def flow(problem: Problem, stages: Sequence[Cores]) -> Pipeline:
    """Items over given stages, from the first stage downstream; stages that get none are left out."""
    count = len(problem.items)
    borders = [0, *[count] * len(stages)]  # stage k has the items from borders[k] to borders[k + 1]
    for _ in range(STEPS):
        moved = [_move(problem, stages, borders, k) for k in range(len(stages) - 1)]
        if not any(moved):
            break
    found = _stages(stages, borders)
    return Pipeline(found, stage_seconds(problem, found), False)


def _move(problem: Problem, stages: Sequence[Cores], borders: list[int], k: int) -> bool:
    """Moves items from the end of stage k to stage k + 1 while the larger of their times falls."""
    moved = False
    now = _larger(problem, stages, borders, k)
    while borders[k + 1] > borders[k]:
        borders[k + 1] -= 1
        after = _larger(problem, stages, borders, k)
        if after >= now:
            borders[k + 1] += 1
            break
        now, moved = after, True
    return moved


def _larger(problem: Problem, stages: Sequence[Cores], borders: Sequence[int], k: int) -> float:
    """The larger of the times of stages k and k + 1, with what they hand to each other and to those around them."""
    found = _stages(stages, borders)
    times = stage_seconds(problem, found)
    inside = (borders[k], borders[k + 2])
    return max((t for s, t in zip(found, times, strict=True) if inside[0] <= s.begin and s.end <= inside[1]), default=0)


def _stages(stages: Sequence[Cores], borders: Sequence[int]) -> tuple[Stage, ...]:
    spans = zip(stages, borders, borders[1:], strict=False)
    return tuple(Stage(d, cores, begin, end) for (d, cores), begin, end in spans if begin < end)


def _merges(stages: Sequence[Cores]) -> list[list[Cores]]:
    out = []
    for k, ((d, n), (e, m)) in enumerate(pairwise(stages)):
        if d == e:
            out.append([*stages[:k], (d, n + m), *stages[k + 2 :]])
    return out
