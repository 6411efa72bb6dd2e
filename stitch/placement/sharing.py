"""Operators on one device with the help of all others, where that pays: core sets in one memory as a team.

One set leads. It runs what is not worth sharing out, and one of its cores hands out the rest in pieces, to the cores of
all sets in proportion to what they can do. Which, and to whom how many, is decided for each operator by itself, with
`stitch.placement.split`. To the placement for latency, the leader is a device that runs some items faster than it
could alone (`help_out`), so that it still weighs a team against each set by itself, transfers included.

Between sets that share a cache, handing out and waiting are all that sharing costs. Of the others' sets, what they read
counts as sent by the leader each time, which is the most it can be.
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
    bytes    that it reads"""

    pieces: int
    alone: tuple[float, ...]
    core: tuple[float, ...]
    fixed: float = 0.0
    bytes: int = 0
    way: Way = "rows"


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
    for most in PIECES:
        count = min(operator.pieces, most * sum(d.cores for d in devices))
        if count < 2:
            continue
        rounds = [math.ceil(count / d.cores) for d in devices]
        seconds = tuple(one * n / count for one, n in zip(operator.core, rounds, strict=True))
        rows, columns = (count, 1) if operator.way == "rows" else (1, count)
        kind: Literal["rowwise", "contraction"] = "rowwise" if operator.way == "rows" else "contraction"
        found = choose(Operator(kind, rows, columns, seconds, input=operator.bytes), devices, links, lead)
        pieces = [0] * len(devices)
        for part in found.shares:
            pieces[part.device] += part.end - part.begin
        total = operator.fixed + found.seconds
        if found.way == operator.way and pieces[lead] and total < (1 - GAIN) * best.seconds:
            best = Share(total, tuple(pieces))
    return best


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
