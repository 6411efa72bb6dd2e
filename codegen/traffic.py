"""The bytes that a loop nest brings into a cache of some capacity, from the footprints of its loops.

The *footprint* of a loop is what its accesses touch while it runs through once. An outermost loop whose footprint fits
a cache brings it in once for each time that a loop around it moves on; loops next to it that do not move an access
leave it there. That is the model of Wolf and Lam ("A data locality optimizing algorithm", PLDI 1991) with capacities in
place of reuse vectors; conflicts between addresses are not seen.

What passes through a phase only once may be in the cache already: `near` says how many bytes the phases before have
touched since it was used last (Mattson's stack distance, for whole buffers and their parts).

Of the bytes, those are *loose* that come in short pieces: so few next to each other are touched one after the other
that the processor does not fetch ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stitch.access import Axis, Variable
from stitch.codegen.loops import Buffer
from stitch.cost import LINE

ONCE = 1.5
"""Times that something is brought in, up to which it counts as passing through once: windows overlap a little."""

AHEAD = 2048
"""Bytes at the start of a piece that nothing has fetched ahead."""


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
    """`place`: the element where it begins; `steps`: elements by which an axis moves it. `spans`: loops of its own,
    each an extent and a step, such as those of a contraction and the lanes of a vector."""

    buffer: Buffer
    place: float
    steps: tuple[tuple[Variable, float], ...]
    spans: tuple[tuple[float, float], ...] = ()
    stored: bool = False

    @property
    def key(self) -> object:
        """Equal for accesses that touch the same: of one buffer, with the same steps."""
        return (self.buffer, *sorted(step for _, step in self.steps), *self.spans)

    def piece(self, loops: Sequence[Around], lanes: int) -> float:
        """Bytes next to each other that are touched one after the other, by its spans and the innermost loops."""
        steps, item, run = dict(self.steps), self.buffer.dtype.itemsize, 1.0
        inwards = ((n.steps, steps.get(n.axis, 0.0) * (lanes if n.lanes else 1)) for n in reversed(loops) if n.axis)
        for n, step in (*sorted(self.spans, key=lambda s: s[1]), *inwards):
            if step > max(run, LINE / item) and n > 1:
                break
            run += step * (n - 1)
        return run * item


@dataclass(frozen=True)
class Moved:
    """Bytes that come into a cache, how many of them are loose, and how many are overwritten there and go back."""

    bytes: float = 0.0
    loose: float = 0.0
    stored: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.bytes + other.bytes, self.loose + other.loose, self.stored + other.stored)

    def __sub__(self, other: Moved) -> Moved:
        own, others = (self.bytes, self.loose, self.stored), (other.bytes, other.loose, other.stored)
        return Moved(*(max(a - b, 0.0) for a, b in zip(own, others, strict=True)))


NOTHING = Moved()

Near = Callable[[Access, float], float]
"""Bytes that were touched since something was, of which an access touches that share; infinite for what is new."""


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


@dataclass(frozen=True)
class Region:
    """What an access touches: bytes of cache lines, in pieces of `run` elements that begin `apart` elements from each
    other."""

    access: Access
    bytes: float
    run: float
    apart: float

    def meets(self, other: Region) -> bool:
        """Whether it may touch what another one does: pieces of equal steps that lie between each other do not."""
        if self.access.key != other.access.key:
            return False
        first, second = sorted((self, other), key=lambda r: r.access.place)
        between = second.access.place - first.access.place
        if math.isfinite(self.apart):
            between %= self.apart
        return between < first.run or self.apart - between < second.run


def _distinct(found: Iterable[Region]) -> list[Region]:
    """Of regions that meet, such as the windows of a convolution, the largest."""
    out: list[Region] = []
    for r in found:
        k = next((k for k, other in enumerate(out) if other.meets(r)), None)
        if k is None:
            out.append(r)
        elif out[k].bytes < r.bytes:
            out[k] = r
    return out


class Traffic:
    """Questions about one phase. `size`: bytes of each buffer; `lanes`: elements of a vector."""

    def __init__(self, root: Nest, size: Mapping[Buffer, float], near: Near, lanes: int) -> None:
        self.root, self.size, self.near, self.lanes = root, size, near, lanes
        self.found: dict[Nest, list[Region]] = {}
        self.whole: dict[object, float] = {}  # bytes of the largest of equal accesses
        for r in self.regions(root):
            self.whole[r.access.key] = max(self.whole.get(r.access.key, 0.0), r.bytes)
        self.loose: dict[object, float] = {}  # of the longest of equal accesses
        self.stored = {a.key for a, _ in root.walk() if a.stored}
        for a, loops in root.walk():
            share = min(AHEAD / max(a.piece(loops, lanes), 1.0), 1.0)
            self.loose[a.key] = min(self.loose.get(a.key, 1.0), share)

    def share(self, a: Access) -> float:
        """Of a buffer, how much an access touches."""
        return min(self.whole[a.key] / max(self.size[a.buffer], 1.0), 1.0)

    @property
    def touched(self) -> float:
        """Bytes of all distinct accesses."""
        return sum(r.bytes for r in self.regions(self.root))

    def beyond(self, capacity: float) -> Moved:
        """What comes from beyond a cache."""
        return self._beyond(self.root, capacity, ())

    def regions(self, nest: Nest) -> list[Region]:
        """The footprint of a loop: what its distinct accesses touch."""
        if nest not in self.found:
            self.found[nest] = _distinct(self.region(a, loops) for a, loops in nest.walk())
        return self.found[nest]

    def region(self, a: Access, loops: Sequence[Around]) -> Region:
        """The distinct cache lines that an access touches while these loops run."""
        steps = dict(a.steps)
        moving = [(n.steps, steps[n.axis] * (self.lanes if n.lanes else 1)) for n in loops if n.axis in steps]
        item, run, pieces, apart = a.buffer.dtype.itemsize, 1.0, 1.0, math.inf
        if any(n <= 0 for n, _ in moving):
            return Region(a, 0.0, 0.0, math.inf)  # a loop that is never run
        for n, step in sorted((*moving, *a.spans), key=lambda m: m[1]):
            if step <= max(run, LINE / item):  # within what is touched already, or next to it: the piece becomes longer
                run += step * (n - 1)
            elif n > 1:
                pieces *= n
                apart = min(apart, step)
        lines = pieces * max(run * item, LINE if pieces > 1 else item)
        return Region(a, min(lines, max(self.size[a.buffer], item)), run, apart)

    def _beyond(self, nest: Nest, capacity: float, around: tuple[Around, ...]) -> Moved:
        regions = self.regions(nest)
        if sum(r.bytes for r in regions) <= capacity:
            return self._brought(((r.access, r.bytes * _changes(r.access, around)) for r in regions), capacity)
        here = (*around, nest.loop) if nest.loop.axis is not None else around
        total = sum((self._beyond(n, capacity, here) for n in nest.below), NOTHING)
        own = _distinct(self.region(a, ()) for a in nest.accesses)
        if sum(r.bytes for r in own) <= capacity:
            return total + self._brought(((r.access, r.bytes * _changes(r.access, here)) for r in own), capacity)
        times = math.prod(n.steps for n in here)
        return total + sum((self._moved(r.access, r.bytes * times) for r in own), NOTHING)

    def _brought(self, found: Iterable[tuple[Access, float]], capacity: float) -> Moved:
        """Of so many bytes, those that are not in the cache before; scratch that fits at all stays where it is."""
        total = NOTHING
        for a, size in found:
            if a.buffer.space != "global" or size <= 0:
                continue
            if size <= ONCE * self.whole[a.key]:
                left = capacity - self.near(a, self.share(a))
                size *= 1.0 - min(max(left / self.whole[a.key], 0.0), 1.0)
            total += self._moved(a, size)
        return total

    def _moved(self, a: Access, size: float) -> Moved:
        return Moved(size, size * self.loose[a.key], size if a.key in self.stored else 0.0)


def _changes(a: Access, around: Sequence[Around]) -> float:
    """How often a region changes: loops next to it that do not move it leave it in the cache."""
    moving = {v for v, _ in a.steps}
    inner = len(around)
    while inner and around[inner - 1].axis not in moving:
        inner -= 1
    return math.prod(n.steps for n in around[:inner])
