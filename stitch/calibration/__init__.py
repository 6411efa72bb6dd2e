"""A calibration of the cost model: networks that are timed on this machine, and rates that predict their times.

rates = calibrate(target)         half a minute; `stitch.cost.save` keeps them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stitch import cost, dtypes, fitting
from stitch.calibration.networks import Network, all_networks
from stitch.cost import Rates, Work
from stitch.graph import Builder
from stitch.measure import Probe, Sample
from stitch.target import Target

Array = np.ndarray[Any, Any]

SECONDS = 0.25
"""How long each network is run for each of its shapes."""

SHORT = 5e-7
"""Phases that are shorter are not fitted to: reading the counter takes a good part of them."""

ROUNDS = 60
"""Of fitting in turn which of computing and memory is the longer, and the rates, given that."""


def calibrate(target: Target, note: Callable[[str], None] = lambda _: None) -> Rates:
    """Rates for the cores that this process may use. `note` is told what is being done."""
    found: list[Sample] = []
    for network in all_networks():
        note(network.name)
        found += samples(network, target)
    rates = fit(found)
    note("teams")
    return with_teams(rates, target)


def samples(network: Network, target: Target, threads: int = 1) -> list[Sample]:
    """Times of the phases of a network, with its results in the same memory each time."""
    probe = Probe.of(network.graph, target, threads)
    random = np.random.default_rng(0)
    found: list[Sample] = []
    for shape in network.shapes:
        x = random.standard_normal(shape, np.float32)
        for share in network.away:
            found += probe.samples([x], SECONDS / len(network.away), outputs=True, away=int(share * target.l3_bytes))
    return found


def fit(found: Iterable[Sample]) -> Rates:
    """Rates with the least squares of relative errors. Phases that do the same count less than as many different ones:
    a network of equal layers is no proof of many kinds."""
    used = [s for s in found if s.seconds > SHORT]
    times = np.array([s.seconds for s in used])
    counts = _table(used, Work.COUNTS)
    counts = np.hstack([counts, np.ones((len(used), 1))])  # the dispatch
    moved = _table(used, Work.BYTES)
    alike = Counter(s.work for s in used)
    weight = np.array([alike[s.work] ** -0.5 for s in used])
    n = counts.shape[1]
    x = fitting.nonnegative(np.hstack([counts, moved]) * (weight / times)[:, None], weight)
    best, least = x, np.inf
    for _ in range(ROUNDS):
        compute, memory = counts @ x[:n], moved @ x[n:]
        longer = compute >= memory
        guess = np.maximum(compute, memory) + cost.OVERLAP * np.minimum(compute, memory)
        error = float((weight * np.log(np.maximum(guess, 1e-12) / times) ** 2).mean())
        if error < least:
            best, least = x, error
        # The geometric mean of time and guess as the unit: with either alone, rates come out too low or too high.
        scale = weight / np.sqrt(times * np.maximum(guess, times / 3))
        share = np.where(longer, 1.0, cost.OVERLAP)[:, None]
        linear = np.hstack([counts * share, moved * np.where(longer, cost.OVERLAP, 1.0)[:, None]])
        x = (x + fitting.nonnegative(linear * scale[:, None], times * scale)) / 2
    return Rates(tuple(best[: n - 1]), tuple(best[n:]), float(best[n - 1]), 0.0, 1.0, fitted=True)


def _table(used: Sequence[Sample], names: Sequence[str]) -> Array:
    return np.array([[getattr(s.work, name) for name in names] for s in used], float)


def with_teams(rates: Rates, target: Target) -> Rates:
    """The same, and what it costs to hand a phase to all cores, and how much faster memory serves them than one."""
    if target.cores == 1:
        return rates
    shared = max(_copy(target, target.cores) / _copy(target, 1), 1.0)
    plain = replace(rates, shared=shared)
    network = replace(next(n for n in all_networks() if len(n.shapes) > 2), away=(0.0,))  # nothing but the team differs
    late = [
        s.seconds - plain.seconds(s.work, target.cores)
        for s in samples(network, target, target.cores)
        if cost.parallel(s.work, target.cores) > 1
    ]
    return replace(plain, wake=max(float(np.median(late)), 0.0))


def _copy(target: Target, threads: int) -> float:
    """Elements per second of a copy that fits no cache."""
    b = Builder("copy")
    size = max(4 * target.l3_bytes // 4, 1 << 20)
    graph = b.finish({"y": b.mul(b.input("x", dtypes.FLOAT32, (size,)), 2.0)})
    found = Probe.of(graph, target, threads).samples([np.ones(size, np.float32)], SECONDS, outputs=True)
    return size / max(s.seconds for s in found)
