"""Operators on one device with the help of all others, where that pays: core sets in one memory as a team.

One set leads. It runs what is not worth sharing out, and one of its cores hands out the rest in pieces, to the cores of
all sets in proportion to what they can do. Which, and to whom how many, is decided for each operator by itself, with
`stitch.placement.split`. To the placement for latency, the leader is a device that runs some items faster than it
could alone (`help_out`), so that it still weighs a team against each set by itself, transfers included.

Between sets that share a cache, handing out and waiting are all that sharing costs. Of the others' sets, what they
read counts as sent by the leader each time, which is the most it can be.

A device that is slow gets fewer pieces. One that gets only a part of its time is another matter: it is as fast as any,
and then stopped for longer than an operator takes, while all others wait for the piece that it has. So it gets as many
pieces as others, and what it has a hand in takes longer by the inverse of that part; nearly always, it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stitch.placement.problem import Device, Item, Link, Problem
from stitch.placement.split import Operator, choose

Way = Literal["rows", "columns"]

PIECES = (4, 8)
"""Pieces for each core: more only if that is faster, since unlike cores need smaller ones to be done together."""

GAIN = 0.02
"""What another way must be faster by: less is no reason, if predictions are off by several times that."""


@dataclass(frozen=True)
class Divisible:
    """An operator that can be handed out in `pieces`, of its rows or columns.

    alone    seconds on each device, with all its cores, if it has it to itself
    core     seconds of all pieces on one core of each device, while all others are at work as well
    fixed    seconds for beginning, handing out and waiting, if it is shared
    bytes    that it reads
    given    the part of its time that each device gets, if it is not all; `alone` knows it already, `core` does not"""

    pieces: int
    alone: tuple[float, ...]
    core: tuple[float, ...]
    fixed: float = 0.0
    bytes: int = 0
    way: Way = "rows"
    given: tuple[float, ...] = ()


@dataclass(frozen=True)
class Share:
    """How an operator is shared out: pieces of each device, none for one that takes no part."""

    seconds: float
    pieces: tuple[int, ...]

    @property
    def shared(self) -> bool:
        return sum(n > 0 for n in self.pieces) > 1


def share(operator: Divisible, devices: Sequence[Device], links: Sequence[Sequence[Link]], lead: int) -> Share:
    """The fastest way to run an operator under a leader, alone or with others. `links` as in `Problem`, free between
    sets that share a cache; none: all do."""
    best = Share(operator.alone[lead], tuple(int(d == lead) for d in range(len(devices))))
    given = operator.given or (1.0,) * len(devices)
    for least in sorted(set(given), reverse=True):  # all that get so much of their time, or more
        able = [d for d, part in enumerate(given) if part >= least or d == lead]
        for most in PIECES:
            found = _dealt(operator, devices, links, lead, able, most)
            total = found.seconds / math.prod(part for part, n in zip(given, found.pieces, strict=True) if n)
            if found.shared and found.pieces[lead] and total < (1 - GAIN) * best.seconds:
                best = Share(total, found.pieces)
    return best


def _dealt(
    operator: Divisible, devices: Sequence[Device], links: Sequence[Sequence[Link]], lead: int, able: Sequence[int],
    most: int,
) -> Share:  # fmt: skip
    """The best pieces of the devices that are `able`, at most so many for each core; none if there are too few."""
    pieces = [0] * len(devices)
    count = min(operator.pieces, most * sum(devices[d].cores for d in able))
    if count < 2:
        return Share(math.inf, tuple(pieces))
    rounds = [math.ceil(count / d.cores) for d in devices]
    times = [one * n / count for one, n in zip(operator.core, rounds, strict=True)]
    seconds = tuple(t if d in able else math.inf for d, t in enumerate(times))
    rows, columns = (count, 1) if operator.way == "rows" else (1, count)
    kind: Literal["rowwise", "contraction"] = "rowwise" if operator.way == "rows" else "contraction"
    found = choose(Operator(kind, rows, columns, seconds, input=operator.bytes), devices, links, lead)
    for part in found.shares:
        pieces[part.device] += part.end - part.begin
    return Share(operator.fixed + found.seconds, tuple(pieces))


def leader(items: Sequence[Item]) -> int:
    """The device that takes least for all items alone, the first of those."""
    if not items:
        return 0
    totals = [math.fsum(item.seconds[d][-1] for item in items) for d in range(len(items[0].seconds))]
    return totals.index(min(totals))


def help_out(problem: Problem, lead: int, saved: Sequence[float]) -> Problem:
    """The problem where the leader has help, with which it saves so many seconds of each item."""
    items = []
    for item, less in zip(problem.items, saved, strict=True):
        rows = list(item.seconds)
        rows[lead] = (*rows[lead][:-1], max(rows[lead][-1] - less, 0.0))
        items.append(replace(item, seconds=tuple(rows)))
    return replace(problem, items=tuple(items))
