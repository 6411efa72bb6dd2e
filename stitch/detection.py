"""The machine that this runs on as a `Board`, from what Linux says in sysfs; all folders are arguments.

Cores are of one cluster if they have the same capacity (within a tenth: the best cores of one kind differ a little) and
share their last cache, or, where no cache is listed, if the kernel calls them a cluster. Names are big and little where
capacities differ, else cpu. Only what the affinity mask allows is part of the board. What sysfs does not tell - peak
rates, bandwidths - stays 0, not known: `stitch calibrate` measures it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from stitch import target as targets
from stitch.target import Target
from stitch.topology import BIG, LITTLE, Board, Cache, Cluster, parse_cpus

FOLDER = Path("/sys/devices/system/cpu")
ALIKE = 0.9  # capacities whose ratio is above this are those of one kind of core


def detect(folder: Path = FOLDER, allowed: Collection[int] | None = None, isa: Target | None = None) -> Board:
    """The board of this machine. `allowed`: None for the process's affinity mask; `isa`: None for what
    `target.detect` finds. A machine without sysfs is one cluster of the CPUs allowed."""
    if allowed is None:
        allowed = _affinity()
    online = _cpus(folder / "online") or tuple(allowed)
    found = [_read(folder, cpu) for cpu in online if cpu in allowed]
    if not found:  # a tree of other CPUs than those allowed: then nothing is known of these
        found = [_Cpu(cpu, (cpu,), "", 1024, 0.0, (), (cpu,)) for cpu in sorted(allowed)]
    machine = isa or targets.detect()
    return Board(
        "host", str(machine), _clusters(found),
        excluded=tuple(cpu for cpu in online if cpu not in allowed),
    )  # fmt: skip


def _affinity() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


@dataclass(frozen=True)
class _Cpu:
    """What sysfs says of one CPU. `core`: those of its physical core; `sharing`: those that share its last cache."""

    number: int
    core: tuple[int, ...]
    kind: str
    capacity: int
    hertz: float
    caches: tuple[tuple[int, int, tuple[int, ...]], ...]  # level, bytes, shared by
    sharing: tuple[int, ...]


def _read(folder: Path, number: int) -> _Cpu:
    own = folder / f"cpu{number}"
    core = _cpus(own / "topology" / "core_cpus_list") or _cpus(own / "topology" / "thread_siblings_list") or (number,)
    caches = _caches(own / "cache")
    last = max(caches, default=None)
    sharing = last[2] if last else _cpus(own / "topology" / "cluster_cpus_list")
    package = _text(own / "topology" / "physical_package_id")
    if set(sharing) <= set(core):  # private to a core: no reason to be a cluster of one's own
        sharing = ()
    return _Cpu(
        number, core, f"{_hybrid(folder, number)} {package}", _number(own / "cpu_capacity", 1024),
        1e3 * _number(own / "cpufreq" / "cpuinfo_max_freq", 0), caches, sharing,
    )  # fmt: skip


def _hybrid(folder: Path, number: int) -> str:
    """Which kind of core an x86 with two kinds says that it is."""
    for name in ("cpu_core", "cpu_atom"):
        if number in _cpus(folder.parent.parent / name / "cpus"):
            return name
    return ""


def _caches(folder: Path) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    found = []
    for index in sorted(folder.glob("index*")):
        level, size, kind = _number(index / "level", 0), _text(index / "size"), _text(index / "type")
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:].upper(), 1)
        digits = size.rstrip("KkMmGg")
        if level > 0 and digits.isdecimal() and kind != "Instruction":
            found.append((level, int(digits) * scale, _cpus(index / "shared_cpu_list")))
    return tuple(found)


def _clusters(cpus: list[_Cpu]) -> tuple[Cluster, ...]:
    """The fastest first."""
    kinds = _kinds(cpus)
    there = {cpu.number for cpu in cpus}
    of = {cpu.number: tuple(sorted({*cpu.core, cpu.number} & there)) for cpu in cpus}
    groups: dict[tuple[int, str, tuple[int, ...]], list[_Cpu]] = {}
    for cpu in cpus:
        groups.setdefault((kinds[cpu.number], cpu.kind, cpu.sharing), []).append(cpu)
    if len({capacity for capacity, _, _ in groups}) > 1:
        slowest, fastest = min(kinds.values()), max(kinds.values())
        names = {slowest: LITTLE, fastest: BIG}
    else:
        names = dict.fromkeys(kinds.values(), "cpu")
    ordered = sorted(groups, key=lambda key: (-key[0], groups[key][0].number))
    wanted = [names.get(capacity, "middle") for capacity, _, _ in ordered]
    return tuple(
        _cluster(name if wanted.count(name) == 1 else f"{name}{wanted[:k].count(name)}", key[0], groups[key], of)
        for k, (name, key) in enumerate(zip(wanted, ordered, strict=True))
    )


def _kinds(cpus: list[_Cpu]) -> dict[int, int]:
    """The capacity of each CPU's kind: that of the fastest core of the kind."""
    found: dict[int, int] = {}
    known: list[tuple[int, str]] = []  # the capacity, and what x86 calls the kind
    for cpu in sorted(cpus, key=lambda c: (-c.capacity, c.number)):
        hybrid = cpu.kind.split(" ")[0]
        same = [c for c, h in known if h == hybrid and (hybrid or cpu.capacity > ALIKE * c)]
        if not same:
            known.append((cpu.capacity, hybrid))
        found[cpu.number] = same[-1] if same else cpu.capacity
    return found


def _cluster(name: str, capacity: int, cpus: list[_Cpu], of: Mapping[int, tuple[int, ...]]) -> Cluster:
    """`of`: the physical core of each CPU of the machine."""
    caches = tuple(
        Cache(level, size, len({of[number] for number in shared if number in of}) or 1)
        for level, size, shared in cpus[0].caches
    )
    cores = sorted({of[cpu.number] for cpu in cpus})
    return Cluster(name, tuple(cores), capacity, max(cpu.hertz for cpu in cpus), caches=caches)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path, otherwise: int) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else otherwise


def _cpus(path: Path) -> tuple[int, ...]:
    try:
        return parse_cpus(_text(path))
    except ValueError:
        return ()
