"""One operator over several devices: which of its dimensions is cut, where, and whether it pays at all.

    columns   output channels of a convolution, columns of a matmul: each device needs all of the input and its share
              of the weights
    rows      rows of a matmul's result, of a convolution's image, of a rowwise operator: each device needs its share
              of the input, for a convolution with the rows that its window reaches beyond (the halo), and all weights

A share is a number of whole tiles. A device's time for n tiles rises with n, so the best shares are found by giving one
tile after another to the device that would be done with it first: what that leaves as the largest time is the minimum,
since it picks the smallest of all times that any shares could have, tile by tile. The cores of a device take its tiles
in rounds. Every way is tried, and every single device; the cheapest wins. `stitch.placement.sharing` decides with it
for core sets in one memory.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from stitch.errors import NoDevice
from stitch.placement.problem import Device, Link

Kind = Literal["contraction", "convolution", "rowwise"]
Way = Literal["whole", "rows", "columns"]


@dataclass(frozen=True)
class Operator:
    """`rows` and `columns` of the result (of a convolution: image rows of the output, and output channels; columns of a
    rowwise operator are never cut, since a row is one piece of work), in tiles of `tile`.

    seconds       on each device alone, without transfers; infinite where it cannot run
    input         bytes that all results of one row come from; `weights`: bytes that all of a column come from
    moving        whether the weights are values, that must be sent too, rather than constants, that lie there
    window, stride  of a convolution, along rows: input rows of one output row, and from one to the next
    """

    kind: Kind
    rows: int
    columns: int
    seconds: tuple[float, ...]
    input: int = 0
    weights: int = 0
    output: int = 0
    tile: tuple[int, int] = (1, 1)
    window: int = 1
    stride: int = 1
    moving: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, *self.tile, self.window, self.stride) < 1:
            raise ValueError("an operator has rows, columns, tiles, a window and a stride of at least one")
        if min(self.input, self.weights, self.output) < 0 or any(not s >= 0 for s in self.seconds):
            raise ValueError("sizes and times must not be below zero")


@dataclass(frozen=True)
class Share:
    """Rows or columns `begin` to `end`, without `end`, on a device; `seconds` with transfers."""

    device: int
    begin: int
    end: int
    seconds: float


@dataclass(frozen=True)
class Split:
    """`others`: what the other ways would take, for `explain`; single devices are called whole."""

    way: Way
    shares: tuple[Share, ...]
    seconds: float
    others: tuple[tuple[Way, float], ...] = ()


def choose(
    operator: Operator,
    devices: Sequence[Device],
    links: Sequence[Sequence[Link]] = (),
    home: int = 0,
    start: float = 0.0,
) -> Split:
    """The fastest way to run an operator whose input lies on the device `home`, where its result is wanted, with all
    cores of each device that takes part.

    `start`: seconds to set a device other than home to work, and to wait for it. Transfers to different devices
    overlap. Raises NoDevice."""
    costs = _Costs(operator, links, home, start, [d.cores for d in devices])
    able = [d for d, seconds in enumerate(operator.seconds) if math.isfinite(seconds)]
    if not able:
        raise NoDevice(operator.kind, devices=[d.name for d in devices])
    found: list[Split] = []
    for d in able:
        seconds = costs.of("rows", d, operator.rows)
        found.append(Split("whole", (Share(d, 0, operator.rows, seconds),), seconds))
    ways: list[Way] = ["rows"] if operator.kind == "rowwise" else ["rows", "columns"]
    found += [split for way in ways if (split := _divided(costs, way, able)) is not None]
    best = min(found, key=lambda split: (split.seconds, len(split.shares)))
    others = tuple((split.way, split.seconds) for split in found if split is not best)
    return Split(best.way, best.shares, best.seconds, others)


class _Costs:
    def __init__(
        self, operator: Operator, links: Sequence[Sequence[Link]], home: int, start: float, cores: Sequence[int] = ()
    ) -> None:
        self.operator = operator
        self.cores = cores or [1] * len(operator.seconds)
        self.links = links
        self.home = home
        self.start = start

    def of(self, way: Way, device: int, count: int) -> float:
        """Seconds for so many rows or columns on a device, from the input at home to the result there."""
        o = self.operator
        extent = o.rows if way == "rows" else o.columns
        part = count / extent
        tile = o.tile[0 if way == "rows" else 1]
        cores = self.cores[device]
        whole = _rounds(count, tile, cores) / _rounds(extent, tile, cores)
        total = o.seconds[device] * whole
        if device == self.home:
            return total
        there, back = (self.links[self.home][device], self.links[device][self.home]) if self.links else (Link(), Link())
        given = self.input_part(count) * o.input if way == "rows" else o.input
        weights = (o.weights * (1.0 if way == "rows" else part)) if o.moving else 0.0
        return self.start + there.seconds(given + weights) + total + back.seconds(part * o.output)

    def input_part(self, rows: int) -> float:
        """The share of the input's rows that so many rows of the result read, halo included."""
        o = self.operator
        reach = (o.rows - 1) * o.stride + o.window
        return min(1.0, ((rows - 1) * o.stride + o.window) / reach)


def _rounds(count: int, tile: int, cores: int) -> int:
    """How often a core takes a tile until all are done; the last tile takes as long as any."""
    return math.ceil(math.ceil(count / tile) / cores)


def _divided(costs: _Costs, way: Way, able: Sequence[int]) -> Split | None:
    """The best shares of whole tiles over the devices; None if one device gets all."""
    o = costs.operator
    extent, tile = (o.rows, o.tile[0]) if way == "rows" else (o.columns, o.tile[1])
    tiles = math.ceil(extent / tile)
    given = dict.fromkeys(able, 0)
    waiting = [(costs.of(way, d, min(tile, extent)), d) for d in able]
    heapq.heapify(waiting)
    for _ in range(tiles):
        _, d = heapq.heappop(waiting)
        given[d] += 1
        heapq.heappush(waiting, (costs.of(way, d, min(tile * (given[d] + 1), extent)), d))
    if sum(n > 0 for n in given.values()) < 2:
        return None
    shares = tuple(_spans(costs, way, given, tile, extent))
    return Split(way, shares, max(share.seconds for share in shares))


def _spans(costs: _Costs, way: Way, given: dict[int, int], tile: int, extent: int) -> Iterator[Share]:
    begin = 0
    for device, count in given.items():
        if count:
            end = min(begin + count * tile, extent)
            yield Share(device, begin, end, costs.of(way, device, end - begin))
            begin = end
