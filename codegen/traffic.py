"""The bytes that a loop nest brings into a cache of some capacity, from the footprints of its loops.

The *footprint* of a loop is what its accesses touch while it runs through once. An outermost loop whose footprint fits
a cache brings it in once for each time that a loop around it moves on; loops next to it that do not move an access
leave it there. That is the model of Wolf and Lam ("A data locality optimizing algorithm", PLDI 1991) with capacities in
place of reuse vectors; conflicts between addresses are not seen.

What passes through a phase only once may be in the cache already: `near` says how many bytes the kernels before have
touched since it was used last (Mattson's stack distance, for whole buffers).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stitch.access import Axis, Variable
from stitch.codegen.loops import Buffer
from stitch.cost import LINE

ONCE = 1.5
"""Times that something is brought in, up to which it counts as passing through once: windows overlap a little."""


@dataclass(frozen=True)
class Around:
    """A loop around a statement. `steps`: how often its body runs, a vector being one step of a loop with `lanes`;
    `share`: of the times that the loop is reached, those in which it runs at all."""

    axis: Axis | None
    steps: float
    share: float = 1.0
    lanes: bool = False


@dataclass(frozen=True)
class Access:
    """`steps`: elements by which an axis moves it. `spans`: loops of its own, each an extent and a step, such as those
    of a contraction and the lanes of a vector."""

    buffer: Buffer
    steps: tuple[tuple[Variable, float], ...]
    spans: tuple[tuple[float, float], ...] = ()

    @property
    def key(self) -> object:
        """Equal for accesses that touch the same: of one buffer, with the same steps."""
        return (self.buffer, *sorted(step for _, step in self.steps), *self.spans)


@dataclass(eq=False)
class Nest:
    """A loop, or the phase as a whole (without an axis), with what it touches itself and the loops below."""

    loop: Around
    below: list[Nest] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)

    def walk(self, loops: tuple[Around, ...] = ()) -> Iterator[tuple[Access, tuple[Around, ...]]]:
        """All accesses, with the loops around them from this one on."""
        here = (*loops, self.loop) if self.loop.axis is not None else loops
        for a in self.accesses:
            yield a, here
        for n in self.below:
            yield from n.walk(here)


class Traffic:
    """Questions about one phase. `size`: bytes of each buffer; `lanes`: elements of a vector."""

    def __init__(self, root: Nest, size: Mapping[Buffer, float], near: Mapping[Buffer, float], lanes: int) -> None:
        self.root, self.size, self.near, self.lanes = root, size, near, lanes
        self.found: dict[Nest, dict[object, tuple[Access, float]]] = {}
        self.whole = {key: size for key, (_, size) in self.regions(root).items()}

    @property
    def touched(self) -> float:
        """Bytes of all distinct accesses."""
        return sum(self.whole.values())

    def beyond(self, capacity: float) -> float:
        """Bytes that come from beyond a cache."""
        return self._beyond(self.root, capacity, ())

    def regions(self, nest: Nest) -> dict[object, tuple[Access, float]]:
        """The footprint of a loop: its distinct accesses, and the bytes of each."""
        if nest not in self.found:
            out: dict[object, tuple[Access, float]] = {}
            for a, loops in nest.walk():
                size = self.region(a, loops)
                if a.key not in out or out[a.key][1] < size:
                    out[a.key] = (a, size)
            self.found[nest] = out
        return self.found[nest]

    def region(self, a: Access, loops: Sequence[Around]) -> float:
        """Bytes of the distinct cache lines that an access touches while these loops run."""
        steps = dict(a.steps)
        moving = [(n.steps, steps[n.axis] * (self.lanes if n.lanes else 1)) for n in loops if n.axis in steps]
        item, run, pieces = a.buffer.dtype.itemsize, 1.0, 1.0
        if any(n <= 0 for n, _ in moving):
            return 0.0  # a loop that is never run
        for n, step in sorted((*moving, *a.spans), key=lambda m: m[1]):
            if step <= max(run, LINE / item):  # within what is touched already, or next to it: the piece becomes longer
                run += step * (n - 1)
            else:
                pieces *= n
        lines = pieces * max(run * item, LINE if pieces > 1 else item)
        return min(lines, max(self.size[a.buffer], item))

    def _beyond(self, nest: Nest, capacity: float, around: tuple[Around, ...]) -> float:
        regions = self.regions(nest)
        if sum(size for _, size in regions.values()) <= capacity:
            return sum(self._brought(a, size * _changes(a, around), capacity) for a, size in regions.values())
        here = (*around, nest.loop) if nest.loop.axis is not None else around
        total = sum(self._beyond(n, capacity, here) for n in nest.below)
        own = {a.key: (a, self.region(a, ())) for a in nest.accesses}
        if sum(size for _, size in own.values()) <= capacity:
            return total + sum(self._brought(a, size * _changes(a, here), capacity) for a, size in own.values())
        times = math.prod(n.steps for n in here)
        return total + sum(size * times for _, size in own.values())

    def _brought(self, a: Access, size: float, capacity: float) -> float:
        """Of so many bytes, those that are not in the cache before; scratch that fits at all stays where it is."""
        if a.buffer.space != "global" or size <= 0:
            return 0.0
        if size > ONCE * self.whole[a.key]:
            return size
        left = capacity - self.near.get(a.buffer, math.inf)
        return size * (1.0 - min(max(left / self.whole[a.key], 0.0), 1.0))


def _changes(a: Access, around: Sequence[Around]) -> float:
    """How often a region changes: loops next to it that do not move it leave it in the cache."""
    moving = {v for v, _ in a.steps}
    inner = len(around)
    while inner and around[inner - 1].axis not in moving:
        inner -= 1
    return math.prod(n.steps for n in around[:inner])
