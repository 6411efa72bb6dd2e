"""A machine to compile for: its instruction set, its vectors, its cores and its caches.

    parse("avx2")             a short name: see `NAMES`
    parse("host")             this machine, as far as the standard library can tell
    parse(str(target))        any target: its text is complete, and stable enough to be part of a cache key

The text is  triple/cpu/vector bits/features;cores=2;l1=32768;l2=1048576;l3=33554432  where features are LLVM's,
separated by commas. Every part after the cpu may be left out, and so may ";name=value" settings.

What code generation asks (`fma`, `masked`, `f16c`, `vector_registers`) follows from the features, so that a target
cannot contradict itself. This module knows no compiler: `from_host` takes the facts that LLVM found, and `detect`
makes do with /proc/cpuinfo.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

WIDTHS = (128, 256, 512)
X86 = ("x86_64", "amd64")
ARM = ("aarch64", "arm64")

V2 = ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt")
V3 = (*V2, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# The features that generated code could use. LLVM's cpu name implies most of them, but a hypervisor may hide some,
# so those that are missing are named as well.
RELEVANT = {
    **dict.fromkeys(
        X86,
        (*V4, "avx512vnni", "avx512bf16", "avx512fp16", "avx512vbmi", "avx512vbmi2", "avx512bitalg",
         "avx512vpopcntdq", "avx512ifma", "avxvnni", "gfni", "fma4", "xop", "adx", "tbm"),
    ),
    **dict.fromkeys(ARM, ("neon", "fullfp16", "bf16", "dotprod", "i8mm", "lse", "sve", "sve2")),
}  # fmt: skip

# Names in /proc/cpuinfo that are not LLVM's.
_KERNEL_NAMES = {
    "sse4_1": "sse4.1", "sse4_2": "sse4.2", "pni": "sse3", "abm": "lzcnt", "bmi1": "bmi", "asimd": "neon",
    "asimdhp": "fullfp16", "asimddp": "dotprod", "atomics": "lse", "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16", "avx512_fp16": "avx512fp16", "avx512_vbmi2": "avx512vbmi2",
    "avx512_bitalg": "avx512bitalg", "avx512_vpopcntdq": "avx512vpopcntdq", "avx_vnni": "avxvnni",
}  # fmt: skip


class Caches(NamedTuple):
    """Bytes of the data caches that one core sees; 0 where there is none."""

    l1: int = 32 << 10
    l2: int = 1 << 20
    l3: int = 16 << 20


@dataclass(frozen=True)
class Target:
    """`cpu` and `features` are LLVM's; `cores` are those that may be used, not those that exist."""

    triple: str
    cpu: str
    features: tuple[str, ...] = ()
    vector_bits: int = 128
    cores: int = 1
    l1_bytes: int = Caches().l1
    l2_bytes: int = Caches().l2
    l3_bytes: int = Caches().l3

    def __post_init__(self) -> None:
        if self.vector_bits not in WIDTHS:
            raise ValueError(f"vectors of {self.vector_bits} bits are not supported; there are {_words(WIDTHS)}")
        for feature in self.features:
            if feature[:1] not in ("+", "-") or set(feature) & set(",;/ "):
                raise ValueError(f"{feature!r} is not a feature; write +name or -name")
        if min(self.cores, self.l1_bytes) < 1 or min(self.l2_bytes, self.l3_bytes) < 0:
            raise ValueError("a target has at least one core and a first-level cache, and no negative sizes")
        if any(not part or set(part) & set("/; ") for part in (self.triple, self.cpu)):
            raise ValueError(f"{self.triple!r} and {self.cpu!r} must be a triple and a cpu as LLVM calls them")
        if self.is_x86 and self.vector_bits > self._widest:
            raise ValueError(f"vectors of {self.vector_bits} bits need avx2 (256) or avx512f, avx512vl (512)")

    @property
    def arch(self) -> str:
        """The first part of the triple."""
        return self.triple.split("-")[0]

    @property
    def is_x86(self) -> bool:
        return self.arch in X86

    def has(self, feature: str) -> bool:
        """Whether the features name it; what the cpu's name alone implies does not count."""
        return f"+{feature}" in self._present

    @cached_property
    def _present(self) -> frozenset[str]:
        return frozenset(self.features)

    @property
    def _widest(self) -> int:
        if self.has("avx512f") and self.has("avx512vl"):
            return 512
        return 256 if self.has("avx2") else 128

    @property
    def vector_registers(self) -> int:
        """AVX-512 has 32 of every width."""
        return 16 if self.is_x86 and self._widest < 512 else 32

    @property
    def fma(self) -> bool:
        """Whether a fused multiply-add is one instruction."""
        if self.is_x86:
            return self.has("fma") or self.has("avx512f")
        return self.arch in ARM

    @property
    def masked(self) -> bool:
        """Whether masked loads and stores of 32 and 64 bit elements are cheap."""
        return self.is_x86 and self._widest >= 256

    @property
    def f16c(self) -> bool:
        """Whether vectors of float16 become float32, and back, in one instruction."""
        if self.is_x86:
            return self.has("f16c") or self.has("avx512f")
        return self.arch in ARM

    def lanes(self, dtype: np.dtype) -> int:
        """Elements of `dtype`, as stored, in one vector."""
        return self.vector_bits // (8 * dtype.itemsize)

    def __str__(self) -> str:
        head = f"{self.triple}/{self.cpu}/{self.vector_bits}/{','.join(self.features)}"
        return f"{head};cores={self.cores};l1={self.l1_bytes};l2={self.l2_bytes};l3={self.l3_bytes}"


def _named(triple: str, cpu: str, features: Iterable[str], bits: int) -> Target:
    return Target(triple, cpu, tuple(f"+{name}" for name in features), bits)


NAMES = {
    "sse2": _named("x86_64-unknown-linux-gnu", "x86-64", ("sse2",), 128),
    "avx2": _named("x86_64-unknown-linux-gnu", "x86-64-v3", V3, 256),
    "avx512": _named("x86_64-unknown-linux-gnu", "x86-64-v4", V4, 512),
    "neon": _named("aarch64-unknown-linux-gnu", "generic", ("neon",), 128),
}


def parse(text: str) -> Target:
    """The target that `text` describes: a short name, or what `str` gives, or either followed by settings."""
    head, *settings = text.strip().split(";")
    if head == "host":
        target = detect()
    elif head in NAMES:
        target = NAMES[head]
    elif "/" in head:
        target = _described(head)
    else:
        known = _words([*NAMES, "host"])
        raise ValueError(f"there is no target {head!r}; use {known}, or triple/cpu/bits/features as str(target) prints")
    for setting in settings:
        name, _, value = setting.partition("=")
        number = _whole(value, setting)
        match name:
            case "cores":
                target = replace(target, cores=number)
            case "l1":
                target = replace(target, l1_bytes=number)
            case "l2":
                target = replace(target, l2_bytes=number)
            case "l3":
                target = replace(target, l3_bytes=number)
            case _:
                raise ValueError(f"{setting!r} is not a setting of a target; there are cores, l1, l2, l3, as cores=4")
    return target


def _described(head: str) -> Target:
    parts = head.split("/")
    if len(parts) > 4:
        raise ValueError(f"{head!r} has too many parts; a target is triple/cpu/bits/features")
    triple, cpu, bits, features = [*parts, *[""] * (4 - len(parts))]
    width = _whole(bits, head) if bits else 128
    return Target(triple, cpu, tuple(features.split(",")) if features else (), width)


def _whole(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} in {where!r} is not a whole number") from None


def _words(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


# -- This machine ----------------------------------------------------------------------------------


def from_host(
    triple: str,
    cpu: str,
    features: Mapping[str, bool],
    cores: int | None = None,
    caches: Caches | None = None,
) -> Target:
    """A target from raw facts: LLVM's triple, cpu name and features (True if present). The rest is read if None."""
    arch = triple.split("-")[0]
    named = tuple(("+" if features[name] else "-") + name for name in RELEVANT.get(arch, ()) if name in features)
    target = Target(triple, cpu, named, 128, cores or count_cores())
    if target.is_x86:
        target = replace(target, vector_bits=target._widest)
    sizes = caches or read_caches()
    return replace(target, l1_bytes=sizes.l1, l2_bytes=sizes.l2, l3_bytes=sizes.l3)


def detect(cpuinfo: Path = Path("/proc/cpuinfo")) -> Target:
    """This machine without LLVM's help: the cpu is called by its level, so tuning is generic."""
    machine = platform.machine().lower()
    flags: set[str] = set()
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = {_KERNEL_NAMES.get(flag, flag) for flag in value.split()}
                break
    except OSError:
        pass
    arch = "x86_64" if machine in X86 else "aarch64" if machine in ARM else machine or "unknown"
    system = {"linux": "unknown-linux-gnu", "darwin": "apple-darwin", "windows": "pc-windows-msvc"}
    triple = f"{arch}-{system.get(platform.system().lower(), 'unknown-unknown')}"
    cpu = "generic"
    if arch == "x86_64":
        levels = {"x86-64-v4": V4, "x86-64-v3": V3, "x86-64-v2": V2}
        cpu = next((name for name, needs in levels.items() if flags.issuperset(needs)), "x86-64")
    return from_host(triple, cpu, {name: name in flags for name in RELEVANT.get(arch, ())})


def count_cores(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: its affinity, and its control group's quota rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, cpu_quota(groups, membership))))


def cpu_quota(groups: Path, membership: Path) -> float:
    """The smallest quota, in cores, of the control groups around this process; infinite if there is none."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    smallest = math.inf
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            roots = [groups, groups / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [f for f in sorted(groups.glob("*cpu*")) if "cpu" in f.name.split(",")]
        else:
            continue
        for root in roots:
            inside = _visible(root, [part for part in path.split("/") if part not in ("", "..")])
            for folder in (inside, *inside.parents):
                smallest = min(smallest, _quota_of(root / folder))
    return smallest


def _visible(root: Path, parts: Sequence[str]) -> Path:
    """The path of a group below `root`. In a container it may be the host's, of which only the end, or nothing, is
    there: then the container's own groups are the ones that count."""
    ends = (Path(*parts[k:]) for k in range(len(parts)))
    return next((end for end in ends if (root / end).is_dir()), Path(*parts))


def _quota_of(folder: Path) -> float:
    try:  # version 2: "max 100000" or "150000 100000"
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:  # version 1: -1 is no limit
        microseconds = int((folder / "cpu.cfs_quota_us").read_text())
        return microseconds / int((folder / "cpu.cfs_period_us").read_text()) if microseconds > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def read_caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> Caches:
    """The sizes of the data and unified caches, or the defaults where the machine does not say."""
    found: dict[str, int] = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:].upper(), 1)
            if kind != "Instruction" and level in "123":
                found[f"l{level}"] = int(size.rstrip("KkMmGg")) * scale
        except (OSError, ValueError):
            continue
    if "l1" not in found:
        return Caches()
    return Caches(found["l1"], found.get("l2", 0), found.get("l3", 0))
