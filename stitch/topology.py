"""What a machine consists of, as data: clusters of equal cores, their caches, and the links between them.

    Board      a machine: clusters and links, detected here (`stitch.detection`) or described (`stitch.boardfile`)
    Cluster    cores of one kind that share their last cache, with what one of them can do
    Link       what it costs to hand a value from one cluster to another: seconds, and bytes per second

A number that nobody has measured is 0, "not known": the standard library cannot tell a bandwidth, and a guess would be
taken for a fact. Sets of CPUs are written as Linux writes them, 0-3,6.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property

BIG, LITTLE = "big", "little"


@dataclass(frozen=True)
class Cache:
    """`bytes` of one cache of a level, `shared` by so many cores; `bandwidth` of one core in bytes/s, 0: not known."""

    level: int
    bytes: int
    shared: int = 1
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What so many `cores` of a cluster were measured to do together: flop/s in contractions, operations/s in all the
    rest (depthwise convolutions too), bytes/s, and seconds for each kernel.

    `parallel` is the share of the arithmetic, and of a kernel's own time, that more cores make faster (Amdahl). A rate
    may be infinite: the measurements did not show that it matters."""

    contraction: float
    elementwise: float
    bandwidth: float
    kernel: float
    cores: int
    parallel: float = 1.0


@dataclass(frozen=True)
class Cluster:
    """`cores` are the CPU numbers of each physical core: two where it runs two threads.

    capacity    the Linux kernel's, 1024 for the fastest core of the machine
    hertz       the highest frequency; flops: float32 operations per second of one core at best; 0: not known
    bandwidth   bytes/s between memory and all cores of the cluster together; 0: not known
    target      for code of its own kind, as in `stitch.target`; empty: the board's
    """

    name: str
    cores: tuple[tuple[int, ...], ...]
    capacity: int = 1024
    hertz: float = 0.0
    flops: float = 0.0
    bandwidth: float = 0.0
    caches: tuple[Cache, ...] = ()
    target: str = ""
    rates: Rates | None = None

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in self.cores for cpu in core))

    def only(self, cpus: Collection[int]) -> Cluster | None:
        """The cluster as far as it lies in `cpus`; None if nothing of it does."""
        cores = tuple(left for core in self.cores if (left := tuple(cpu for cpu in core if cpu in cpus)))
        return replace(self, cores=cores) if cores else None


@dataclass(frozen=True)
class Link:
    """Handing over a value takes `latency` seconds and its bytes / `bandwidth`; in both directions."""

    source: str
    destination: str
    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


SHARED = Link("*", "*", 2e-6, 10e9)
"""Between clusters that share memory, where nothing better is known: waking a thread, and a read from another cache."""


@dataclass(frozen=True)
class Board:
    """`target` is a text of `stitch.target`; `excluded`: CPUs that exist, but not for this process; memory in bytes."""

    name: str
    target: str
    clusters: tuple[Cluster, ...]
    links: tuple[Link, ...] = ()
    memory: int = 0
    about: str = ""
    excluded: tuple[int, ...] = ()

    @cached_property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for c in self.clusters for cpu in c.cpus))

    @cached_property
    def nicknames(self) -> dict[str, tuple[int, ...]]:
        """`big` and `little`, CPUs of the highest and the lowest capacity, where there are two; clusters by name."""
        found = {c.name: c.cpus for c in self.clusters}
        capacities = sorted({c.capacity for c in self.clusters})
        if len(capacities) > 1:
            for name, capacity in ((BIG, capacities[-1]), (LITTLE, capacities[0])):
                some = (cpu for c in self.clusters if c.capacity == capacity for cpu in c.cpus)
                found.setdefault(name, tuple(sorted(some)))
        return found

    def only(self, cpus: Collection[int]) -> tuple[Cluster, ...]:
        """The clusters as far as they lie in `cpus`."""
        return tuple(left for c in self.clusters if (left := c.only(cpus)) is not None)

    def link(self, source: str, destination: str) -> Link:
        """What handing over costs between two clusters, or two sets of cores in one; the names are the clusters'."""
        for ends in ({source, destination}, {source, "*"}, {destination, "*"}, {"*"}):
            for link in self.links:
                if {link.source, link.destination} == ends:
                    return link
        return SHARED

    def __str__(self) -> str:
        """Its TOML text, from which `boardfile.parse` makes an equal board."""
        lines = _settings(self)
        for cluster in self.clusters:
            lines += ["", "[[clusters]]", *_settings(cluster)]
            lines += ["", "[clusters.rates]", *_settings(cluster.rates)] if cluster.rates else []
            for cache in cluster.caches:
                lines += ["", "[[clusters.caches]]", *_settings(cache)]
        for link in self.links:
            lines += ["", "[[links]]", *_settings(link)]
        return "\n".join(lines) + "\n"


def _settings(record: Board | Cluster | Rates | Cache | Link) -> list[str]:
    """`name = value` for the fields that are not records themselves, but for those that have their default value."""
    lines = []
    for field in fields(record):
        value = getattr(record, field.name)
        if value == field.default or field.name in ("clusters", "links", "caches", "rates"):
            continue
        match field.name:
            case "cores" if isinstance(value, tuple):
                text = json.dumps([render_cpus(core) for core in value])
            case "excluded":
                text = json.dumps(render_cpus(value))
            case _ if isinstance(value, str):  # TOML's strings are JSON's, but for a byte that JSON leaves as it is
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            case _:
                text = repr(value)
        lines.append(f"{field.name} = {text}")
    return lines


def render_cpus(cpus: Iterable[int]) -> str:
    """0-3,6: runs of consecutive numbers from low to high."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


LARGEST = 1 << 16  # no machine has more CPUs: a mistyped range shall not fill memory


def parse_cpus(text: str) -> tuple[int, ...]:
    """The numbers in a list such as 0-3,6, sorted. Raises ValueError; an empty text is an empty set."""
    found: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{part!r} is neither a CPU's number nor a range as 0-3")
        low, high = int(first), int(last or first)
        if high < low or high >= LARGEST:
            raise ValueError(f"the range {part!r} is empty" if high < low else f"there is no CPU {high}")
        found.update(range(low, high + 1))
    return tuple(sorted(found))
