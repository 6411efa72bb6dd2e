"""What there is to place: items in an order in which they can run, the values between them, devices, and links.

All times are seconds and all sizes bytes. A device here is a set of equal cores that share a cache; what it costs to
hand a value from one to another is in `links`, a row for each source. Inputs of the model lie on the device `home`, and
its outputs are wanted there.

Two things are placed in two ways. `Stage`s are runs of consecutive items on some cores of a device, working on one
input after another; an `assignment` is a device for each item, one input at a time, all cores of a device at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
INPUT = -1
"""The producer of a value that the model is given."""


@dataclass(frozen=True)
class Link:
    """Seconds for a value of no size, and bytes per second; infinite where devices share a cache."""

    latency: float = 0.0
    bandwidth: float = math.inf

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Device:
    name: str
    cores: int = 1


@dataclass(frozen=True)
class Item:
    """`seconds[d][k]` on k + 1 cores of device d, infinite where it cannot run there; `weights` stay on its device,
    `scratch` is needed while it runs."""

    name: str
    seconds: tuple[tuple[float, ...], ...]
    weights: int = 0
    scratch: int = 0


@dataclass(frozen=True)
class Value:
    """`producer` and `consumers` are positions of items; `output`: the model's user wants it."""

    name: str
    producer: int
    consumers: tuple[int, ...]
    bytes: int = 0
    output: bool = False


@dataclass(frozen=True)
class Problem:
    items: tuple[Item, ...]
    devices: tuple[Device, ...]
    values: tuple[Value, ...] = ()
    links: tuple[tuple[Link, ...], ...] = ()  # by source and destination; none: handing over is free
    home: int = 0

    def __post_init__(self) -> None:
        count = len(self.devices)
        if not count or any(device.cores < 1 for device in self.devices):
            raise ValueError("a problem has devices, and each has a core")
        if not 0 <= self.home < count:
            raise ValueError(f"there is no device {self.home} to be home")
        if self.links and [len(row) for row in self.links] != [count] * count:
            raise ValueError("links must have a row and a column for each device")
        for item in self.items:
            if [len(times) for times in item.seconds] != [device.cores for device in self.devices]:
                raise ValueError(f"{item.name}: a time for each number of cores of each device is needed")
            if any(not time >= 0 for times in item.seconds for time in times) or min(item.weights, item.scratch) < 0:
                raise ValueError(f"{item.name}: times and sizes must not be below zero")
        for value in self.values:
            if not INPUT <= value.producer < len(self.items) or value.bytes < 0:
                raise ValueError(f"{value.name}: no such producer, or a size below zero")
            if any(not value.producer < user < len(self.items) for user in value.consumers):
                raise ValueError(f"{value.name}: it is used before it is made, or by no item")

    def link(self, source: int, destination: int) -> Link:
        return self.links[source][destination] if self.links else Link()

    @cached_property
    def sums(self) -> tuple[tuple[Array, ...], ...]:
        """By device and number of cores: seconds of the first j items, leaving out those that cannot run there."""
        return tuple(
            tuple(
                np.concatenate([[0.0], np.cumsum([_finite(item.seconds[d][k]) for item in self.items])])
                for k in range(device.cores)
            )
            for d, device in enumerate(self.devices)
        )

    @cached_property
    def barred(self) -> tuple[tuple[Array, ...], ...]:
        """As `sums`: how many of the first j items cannot run there."""
        return tuple(
            tuple(
                np.concatenate([[0.0], np.cumsum([math.isinf(item.seconds[d][k]) for item in self.items])])
                for k in range(device.cores)
            )
            for d, device in enumerate(self.devices)
        )

    @cached_property
    def crossing(self) -> Array:
        """Bytes that stages hand on if there is a border before item j: values made before it, and used behind it."""
        change = np.zeros(len(self.items) + 1)
        for value in self.values:
            if value.consumers:
                change[value.producer + 1] += value.bytes
                change[max(value.consumers) + 1] -= value.bytes
        return np.cumsum(change)

    @cached_property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """By item: the values that it uses."""
        return _grouped(len(self.items), ((user, v) for v, value in enumerate(self.values) for user in value.consumers))

    @cached_property
    def makes(self) -> tuple[tuple[int, ...], ...]:
        """By item: the values that it makes."""
        made = ((value.producer, v) for v, value in enumerate(self.values) if value.producer != INPUT)
        return _grouped(len(self.items), made)


@dataclass(frozen=True)
class Stage:
    """Items `begin` to `end`, without `end`, on so many cores of a device."""

    device: int
    cores: int
    begin: int
    end: int


@dataclass(frozen=True)
class Pipeline:
    """`seconds`: of each stage with its transfers; `exact`: no other pipeline has a higher throughput."""

    stages: tuple[Stage, ...]
    seconds: tuple[float, ...]
    exact: bool

    @property
    def bottleneck(self) -> float:
        """Seconds between two results."""
        return max(self.seconds, default=0.0)


@dataclass(frozen=True)
class Placement:
    """A device for each item; `seconds` from the inputs to the outputs; `exact`: no other placement takes less.

    `peak`: bytes on each device, where memory was looked at."""

    devices: tuple[int, ...]
    seconds: float
    exact: bool
    peak: tuple[int, ...] = ()


def border(problem: Problem, source: int, destination: int, at: int) -> float:
    """Seconds for handing on what crosses the border before item `at`. It counts for both stages: one writes into the
    queue, the other reads from it. Nothing before the first stage and behind the last."""
    if at in (0, len(problem.items)):
        return 0.0
    return problem.link(source, destination).seconds(float(problem.crossing[at]))


def stage_seconds(problem: Problem, stages: Sequence[Stage]) -> tuple[float, ...]:
    """What each stage of a pipeline takes for one input: items and transfers; infinite if it cannot run something."""
    out = []
    for k, stage in enumerate(stages):
        total = math.fsum(i.seconds[stage.device][stage.cores - 1] for i in problem.items[stage.begin : stage.end])
        if k > 0:
            total += border(problem, stages[k - 1].device, stage.device, stage.begin)
        if k + 1 < len(stages):
            total += border(problem, stage.device, stages[k + 1].device, stage.end)
        out.append(total)
    return tuple(out)


def assignment_seconds(problem: Problem, assignment: Sequence[int]) -> float:
    """Seconds from the inputs to the outputs: items one after another, each on all cores of its device, and transfers,
    once for each value and device that it is needed on, from the nearest device that has it by then."""
    total = math.fsum(item.seconds[d][-1] for item, d in zip(problem.items, assignment, strict=True))
    holders = [{problem.home} if v.producer == INPUT else set[int]() for v in problem.values]

    def fetch(v: int, device: int) -> float:
        if device in holders[v]:
            return 0.0
        took = min(problem.link(other, device).seconds(problem.values[v].bytes) for other in holders[v])
        holders[v].add(device)
        return took

    for k, device in enumerate(assignment):
        total += math.fsum(fetch(v, device) for v in problem.reads[k])
        for v in problem.makes[k]:
            holders[v].add(device)
    return total + math.fsum(fetch(v, problem.home) for v, value in enumerate(problem.values) if value.output)


def _finite(seconds: float) -> float:
    return 0.0 if math.isinf(seconds) else seconds


def _grouped(count: int, pairs: Any) -> tuple[tuple[int, ...], ...]:
    groups: list[list[int]] = [[] for _ in range(count)]
    for k, member in pairs:
        groups[k].append(member)
    return tuple(tuple(dict.fromkeys(group)) for group in groups)
