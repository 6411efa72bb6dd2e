"""What another runtime does faster, found by trying: more nodes for a delegate, where that is measured to pay.

    before    region 0 on stitch: a b c d e f g h
    after     region 0 on stitch: a b c d;  region 1 on the delegate: e f;  region 2 on stitch: g h

Stitch's cost model knows nothing of other runtimes, so both run. Tried is each region of stitch's as a whole; one that
the delegate is not faster at is halved, in the order of data, and each half is tried, down to `DEPTH` times. A trial is
the whole model, so that what handing over costs, and what stitch can no longer stitch together, is in its time. The
model with the part and without it run in turns. The part goes to the delegate if that takes at least `GAIN` less, and
gives the same results, as far as rounding allows. In the end all of it is timed against what it began with once more:
so the model is never slower for having been tried.

Nothing but the clock decides, so what was found is kept, and used as it is the next time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from stitch.delegated import DelegatedModel, Found
from stitch.delegation import Cutter
from stitch.errors import MissingRuntime, StitchError

GAIN = 0.05
"""What the model must take less with a part on the delegate: less is noise, and no reason for another runtime."""

DEPTH = 3
"""How often a region is halved."""

MOST = 24
"""Trials of one model."""

ROUNDS, SECONDS, PAUSE = 4, 0.05, 0.05
"""How often two models are timed in turn, for how long at least each time, and what they rest before."""

CLOSE = 1e-2
"""How far results may be from stitch's own, as a part of the largest number in them."""

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Clock = Callable[[DelegatedModel, DelegatedModel, Feeds], tuple[float, float]]
"""Seconds of one run of each of two models."""


def by_turns(a: DelegatedModel, b: DelegatedModel, feeds: Feeds) -> tuple[float, float]:
    """The medians of runs of two models: some of one, then some of the other, for ROUNDS. Before each there is a pause,
    since threads of another runtime may spin for a while after its last run, and would take the time of the next."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for model, times in zip((a, b), taken, strict=True):
            time.sleep(PAUSE)
            model.run(None, feeds)
            begin = start = time.perf_counter()
            while start - begin < SECONDS or not times:
                model.run(None, feeds)
                end = time.perf_counter()
                times.append(end - start)
                start = end
    return median(taken[0]), median(taken[1])


def tried(
    cutter: Cutter, base: DelegatedModel, build: Callable[[Cutter], DelegatedModel], feeds: Feeds, name: str,
    clock: Clock = by_turns,
) -> Found:  # fmt: skip
    """What a delegate of this name is faster at. `base`: what `build` makes of `cutter`, whose marks it may need more
    of, but which stay as they are.

    Raises InputError for feeds that are none of the model's, and MissingRuntime."""
    expected = base.run(None, feeds)
    best, nodes = base, dict[str, str]()
    waiting = [(region_nodes, 0) for kind, region_nodes in base.division.regions if kind == "stitch" and region_nodes]
    trials = refused = 0
    while waiting and trials < MOST:
        part, depth = waiting.pop(0)
        trials += 1
        try:
            other = build(Found({**nodes, **dict.fromkeys(part, "")}, ()).applied(cutter))
            agrees = close(expected, other.run(None, feeds))
        except MissingRuntime:
            raise
        except StitchError:  # the delegate, or stitch, cannot do its part
            agrees = False
        refused += not agrees
        if agrees:
            without, with_it = clock(best, other, feeds)
            if with_it <= (1 - GAIN) * without:
                best = other
                measured = f"{1e3 * with_it:.3g} ms with it on {name}, {1e3 * without:.3g} ms without"
                nodes |= dict.fromkeys(part, measured)
                continue
        if depth < DEPTH and len(part) > 1:
            half = len(part) // 2
            waiting += [(part[:half], depth + 1), (part[half:], depth + 1)]
    counted = f"{trials} parts tried on {name}"
    counted += f", {refused} of which it could not do, or did otherwise" if refused else ""
    if nodes:
        before, after = clock(base, best, feeds)
        if after <= (1 - GAIN) * before:
            note = f"{counted}: {1e3 * after:.3g} ms, and {1e3 * before:.3g} ms with all on stitch that it supports"
            return Found(nodes, (f"{note}, handing over included",))
    return Found({}, (f"{counted}: it is faster at none, by {100 * GAIN:.0f} % of the model's time or more",))


def close(expected: Sequence[Array], got: Sequence[Array]) -> bool:
    """Whether results are the same but for rounding: of the same types and shapes, whole numbers equal."""
    for a, b in zip(expected, got, strict=True):
        if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        if a.dtype.kind != "f":
            if not np.array_equal(a, b):
                return False
            continue
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
            return False
        x, y = a[finite].astype(np.float64), b[finite].astype(np.float64)
        if np.abs(x - y).max(initial=0.0) > CLOSE * np.abs(x).max(initial=0.0):
            return False
    return True
