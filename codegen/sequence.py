"""The work of kernels that run one after the other, and find in the caches what those before have left there.

How far away something is follows from a clock that counts the bytes that kernels touch: weights, inputs and results by
when they were touched last; what lies in the arena by when its pages were, whoever used them then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from stitch import dims
from stitch.codegen import arena, descriptors
from stitch.codegen.kernels import Lowered
from stitch.codegen.loops import Buffer
from stitch.cost import Work
from stitch.graph import Value
from stitch.target import Target

PAGE = 4096
"""Bytes of the arena that are looked at together, at least."""

PAGES = 1 << 20
"""And at most so many pages, however large a model's sizes are."""


def sequence(
    kernels: Sequence[Lowered], sizes: Mapping[str, int], target: Target, results: Collection[Value], reused: bool
) -> list[tuple[Work, ...]]:
    """The work of each phase of each kernel, if they run again and again. The `results` are in memory of their own, the
    same each time if it is `reused`."""
    memory = _Memory(kernels, sizes, set(results), reused)
    found: list[tuple[Work, ...]] = []
    for again in (False, True):
        memory.start()
        for low in kernels:
            given = list(zip(low.program.buffers, low.parameters, strict=True))
            near = {buffer: memory.distance(parameter) for buffer, parameter in given}
            works = descriptors.describe(low.program, sizes, target, near)
            if again:
                found.append(works)
            most = sum(w.touched for w in works)  # of a table of words only some rows are
            for buffer, parameter in given:
                memory.touch(parameter, min(_bytes(buffer, sizes), most))
    return found


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
        self.clock = 0.0
        self.results, self.reused = results, reused

    def start(self) -> None:
        """Another run begins."""
        if not self.reused:
            for v in self.results:
                self.last.pop(v, None)

    def distance(self, parameter: object) -> float:
        """Bytes that were touched since it was; infinite for what is new."""
        if isinstance(parameter, Value) and parameter in self.pages:
            return self.clock - float(self.touched_at[self.pages[parameter]].mean())
        return self.clock - self.last.get(parameter, -math.inf)

    def touch(self, parameter: object, size: float) -> None:
        self.clock += size
        if isinstance(parameter, Value) and parameter in self.pages:
            self.touched_at[self.pages[parameter]] = self.clock
        self.last[parameter] = self.clock


def _bytes(buffer: Buffer, sizes: Mapping[str, int]) -> float:
    return max(float(dims.evaluate(buffer.size, sizes)), 0.0) * buffer.dtype.itemsize
