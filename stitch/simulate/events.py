"""A discrete-event simulation of a pipeline: stages, bounded queues between them, links.

    input -> stage 0 -> [queue] -> link -> stage 1 -> [queue] -> ... -> output

A stage works on one input at a time. What it has done goes into the queue behind it, if there is room; otherwise the
stage holds it, and does nothing else, until there is (back-pressure). A link takes the oldest value of its queue as
soon as it is free and carries one at a time; its value keeps its place in the queue until the next stage takes it. So
no more values are between two stages than the queue has room for, wherever they are. Inputs are always there.

Everything follows from the arguments: with `jitter` and one seed as well.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Span:
    """Stage or link number `resource` is at work on input `item` from `begin` to `end`, in seconds."""

    resource: int
    item: int
    begin: float
    end: float
    link: bool = False


@dataclass(frozen=True)
class Run:
    """What happened. `released[k]` is when result k was there, `started[k]` when stage 0 began with it.

    `fullest[s]`: the largest number of values between the stages s and s + 1."""

    stages: int
    spans: tuple[Span, ...]
    started: tuple[float, ...]
    released: tuple[float, ...]
    fullest: tuple[int, ...]

    @property
    def seconds(self) -> float:
        """From the first start to the last result."""
        return max(self.released, default=0.0)

    @property
    def throughput(self) -> float:
        """Results per second, between the first half of them and the last: filling the pipeline is not counted."""
        half = len(self.released) // 2
        if len(self.released) - half < 2:
            return len(self.released) / self.seconds if self.seconds else math.inf
        took = self.released[-1] - self.released[half]
        return (len(self.released) - 1 - half) / took if took > 0 else math.inf

    @property
    def latency(self) -> float:
        """Mean seconds from when the first stage takes an input to its result."""
        times = [b - a for a, b in zip(self.started, self.released, strict=True)]
        return math.fsum(times) / len(times) if times else 0.0

    def utilisation(self) -> tuple[float, ...]:
        """By stage: the share of all the time in which it works."""
        busy = [0.0] * self.stages
        for span in self.spans:
            if not span.link:
                busy[span.resource] += span.end - span.begin
        return tuple(b / self.seconds if self.seconds else 0.0 for b in busy)


@dataclass
class _Stage:
    working: int | None = None
    holding: int | None = None  # done, with no room behind
    ready: deque[int] = field(default_factory=deque)  # has arrived
    waiting: deque[int] = field(default_factory=deque)  # before the link that leads here
    carried: int | None = None  # by that link

    def queued(self) -> int:
        """Values in the queue before this stage."""
        return len(self.ready) + len(self.waiting) + (self.carried is not None)


def run(
    stages: Sequence[float],
    items: int,
    *,
    queue: int = 2,
    links: Sequence[float] = (),
    jitter: float = 0.0,
    seed: int = 0,
) -> Run:
    """Simulates so many inputs.

    stages   seconds that each stage takes for one
    queue    values that there is room for between two stages, at least one
    links    seconds between each two stages, one number less than stages; none: no time
    jitter   times vary by a factor exp(N(0, jitter)), independently
    """
    hops = list(links) or [0.0] * (len(stages) - 1)
    if not stages or len(hops) != len(stages) - 1:
        raise ValueError("a pipeline has a stage, and a link between each two")
    if items < 0 or queue < 1 or not all(0 <= s < math.inf for s in (*stages, *hops, jitter)):
        raise ValueError("times are finite and not below zero, and a queue has room for one value")
    return _Simulation(stages, hops, items, queue, jitter, seed).run()


class _Simulation:
    def __init__(
        self, stages: Sequence[float], hops: Sequence[float], items: int, queue: int, jitter: float, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        shape = items, len(stages)
        factors = np.exp(rng.normal(0.0, jitter, shape)) if jitter else np.ones(shape)
        self.times = (factors * np.asarray(stages, np.float64)).tolist()
        self.hops = hops
        self.queue = queue
        self.stages = [_Stage() for _ in stages]
        self.stages[0].ready.extend(range(items))
        self.events: list[tuple[float, int, bool]] = []  # when, which stage or link is done, whether it is a link
        self.spans: list[Span] = []
        self.started: list[float] = []
        self.released: list[float] = []
        self.fullest = [0] * (len(stages) - 1)

    def run(self) -> Run:
        self.settle(0.0)
        while self.events:
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:  # all that ends at this time, then all that may begin
                _, at, link = heapq.heappop(self.events)
                self.done(at, link)
            self.settle(now)
        return Run(len(self.stages), tuple(self.spans), tuple(self.started), tuple(self.released), tuple(self.fullest))

    def done(self, at: int, link: bool) -> None:
        stage = self.stages[at]
        if link:  # that leads to this stage
            assert stage.carried is not None
            stage.ready.append(stage.carried)
            stage.carried = None
        else:
            stage.holding, stage.working = stage.working, None

    def settle(self, now: float) -> None:
        """Begins everything that can begin, until nothing changes. From the last stage, since room appears there."""
        changed = True
        while changed:
            changed = False
            for at in reversed(range(len(self.stages))):
                changed |= self.hand_on(at, now) | self.take(at, now) | self.carry(at, now)

    def hand_on(self, at: int, now: float) -> bool:
        stage = self.stages[at]
        if stage.holding is None:
            return False
        if at + 1 == len(self.stages):
            self.released.append(now)
        else:
            following = self.stages[at + 1]
            if following.queued() >= self.queue:
                return False
            (following.waiting if self.hops[at] else following.ready).append(stage.holding)
            self.fullest[at] = max(self.fullest[at], following.queued())
        stage.holding = None
        return True

    def take(self, at: int, now: float) -> bool:
        stage = self.stages[at]
        if stage.working is not None or stage.holding is not None or not stage.ready:
            return False
        stage.working = stage.ready.popleft()
        if at == 0:
            self.started.append(now)
        end = now + self.times[stage.working][at]
        self.spans.append(Span(at, stage.working, now, end))
        heapq.heappush(self.events, (end, at, False))
        return True

    def carry(self, at: int, now: float) -> bool:
        stage = self.stages[at]
        if stage.carried is not None or not stage.waiting:
            return False
        stage.carried = stage.waiting.popleft()
        end = now + self.hops[at - 1]
        self.spans.append(Span(at - 1, stage.carried, now, end, True))
        heapq.heappush(self.events, (end, at, True))
        return True
