"""The work of kernels that run one after the other, and find in the caches what those before have left there.

How far away something is follows from a clock that counts the bytes that kernels touch: weights, inputs and results by
when they were touched last; what lies in the arena by when its pages were, whoever used them then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stitch import dims
from stitch.codegen import arena, descriptors
from stitch.codegen.kernels import Lowered
from stitch.codegen.loops import Buffer
from stitch.codegen.traffic import Access
from stitch.cost import Work
from stitch.graph import Value
from stitch.target import Target

PAGE = 4096
"""Bytes of the arena that are looked at together, at least."""

WHOLE = 0.9
"""The share of a buffer from which an access is one to all of it."""

PAGES = 1 << 20
"""And at most so many pages, however large a model's sizes are."""


def sequence(
    kernels: Sequence[Lowered],
    sizes: Mapping[str, int],
    target: Target,
    results: Collection[Value],
    reused: bool,
    away: float = 0.0,
) -> list[tuple[Work, ...]]:
    """The work of each phase of each kernel, if they run again and again. The `results` are in memory of their own, the
    same each time if it is `reused`. `away`: bytes that others touch between two runs."""
    memory = _Memory(kernels, sizes, set(results), reused)
    found: list[tuple[Work, ...]] = []
    for again in (False, True):
        memory.start(away)
        for low in kernels:
            works = _kernel(low, sizes, target, memory)
            if again:
                found.append(works)
    return found


def _kernel(low: Lowered, sizes: Mapping[str, int], target: Target, memory: _Memory) -> tuple[Work, ...]:
    given: dict[Buffer, object] = dict(zip(low.program.buffers, low.parameters, strict=True))
    same = {b: a for a, p in given.items() for b, q in given.items() if memory.replaced.get(q) is p}

    def near(access: Access, share: float) -> float:
        return memory.distance(given[access.buffer], access.place, share)

    works = []
    for phase in low.program.phases:
        work, touched = descriptors.describe(phase, sizes, target, near, same)
        for t in touched:
            if t.buffer in given:
                memory.touch(given[t.buffer], t.place, t.share)
        memory.clock += work.touched  # who goes over it again in the same order finds what is so far away
        works.append(work)
    return tuple(works)


@dataclass
class _Parts:
    """Of a parameter that is touched piece by piece: when it was before, and where the pieces begin."""

    before: float
    places: set[float] = field(default_factory=set)


class _Memory:
    def __init__(self, kernels: Sequence[Lowered], sizes: Mapping[str, int], results: set[Value], reused: bool) -> None:
        made = {v for low in kernels for v in low.parameters if isinstance(v, Value)} - results
        plan = arena.plan(kernels, made.__contains__)
        starts = {v: max(dims.evaluate(at, sizes), 0) for v, at in plan.offsets.items()}
        ends = {v: start + max(dims.evaluate(v.bytes, sizes), 1) for v, start in starts.items()}
        page = max(PAGE, -(-max(ends.values(), default=0) // PAGES))
        self.pages = {v: slice(start // page, -(-ends[v] // page)) for v, start in starts.items()}
        self.touched_at = np.full(max((p.stop for p in self.pages.values()), default=0), -math.inf)
        self.last: dict[object, float] = {}
        self.parts: dict[object, _Parts] = {}
        self.clock = 0.0
        self.results, self.reused = results, reused
        self.replaced: dict[object, Value] = dict(plan.replaced.items())

    def start(self, away: float) -> None:
        """Another run begins."""
        self.clock += away
        self.parts.clear()
        if not self.reused:
            for v in self.results:
                self.last.pop(v, None)

    def distance(self, parameter: object, place: float, share: float) -> float:
        """Bytes that were touched since that share of it was; infinite for what is new."""
        parts = self.parts.get(parameter)
        if share < WHOLE and parts is not None and place not in parts.places:
            return self.clock - parts.before
        return self.clock - self.when(parameter)

    def when(self, parameter: object) -> float:
        """The time when it was touched last, or its pages were."""
        if isinstance(parameter, Value) and parameter in self.pages:
            return float(self.touched_at[self.pages[parameter]].mean())
        return self.last.get(parameter, -math.inf)

    def touch(self, parameter: object, place: float, share: float) -> None:
        """Some of it is touched now."""
        if share < WHOLE:
            if parameter not in self.parts:
                self.parts[parameter] = _Parts(self.when(parameter))
            self.parts[parameter].places.add(place)
        else:
            self.parts.pop(parameter, None)
        if isinstance(parameter, Value) and parameter in self.pages:
            self.touched_at[self.pages[parameter]] = self.clock
        self.last[parameter] = self.clock
