"""How long a phase of a kernel takes, from what it does: the cost model. docs/cost-model.md tells the reasons.

    time = dispatch + max(compute, memory) + OVERLAP · min(compute, memory)

    compute = Σ coefficient · count        of vector instructions by kind; see `Work`
    memory  = Σ coefficient · bytes        that come from the second cache, the third, and memory

All coefficients are seconds, and none is negative. `Rates.of` guesses them from a target; `python -m stitch calibrate`
fits them to this machine and keeps them, and `load` finds them again.

With k threads, compute is divided by what k workers make of the number of chunks, memory by k as far as the memory of
the machine serves them, and handing out the work is paid for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from stitch.errors import ResourceError
from stitch.target import Target

LINE = 64
"""Bytes of a cache line."""

OVERLAP = 0.3
"""Of the shorter of computing and waiting for memory, the share that is not hidden behind the longer."""

CHUNKS = 4
"""Chunks that a team makes for each worker."""

GUESSED_HZ = 3e9
"""Cycles per second of a core that nobody has measured."""


@dataclass(frozen=True)
class Work:
    """What one phase of a kernel does, all its tasks together. Counts are of vector instructions; bytes are those that
    come from beyond the first cache: from the second (`near`), the third (`far`, or
    `rim` if it is most of that away), and from `memory`."""

    tasks: float
    grain: float
    touched: float
    near: float
    far: float
    rim: float
    memory: float
    far_loose: float = 0.0  # of those bytes, what comes in pieces too short to be fetched ahead
    rim_loose: float = 0.0
    memory_loose: float = 0.0
    memory_stored: float = 0.0  # what goes back to memory, too
    fused: float = 0.0  # multiply-adds of contractions, in cycles
    tile_stores: float = 0.0  # vectors that leave a register tile
    tiles: float = 0.0  # register tiles
    simple: float = 0.0  # instructions of arithmetic that are independent of each other
    dear: float = 0.0  # those of functions such as exp, which wait for each other
    scalars: float = 0.0  # instructions outside of vector code
    loads: float = 0.0
    stores: float = 0.0
    gathers: float = 0.0  # elements that are loaded or stored one by one
    turned: float = 0.0  # vectors transposed in registers
    loops: float = 0.0  # loops entered
    folds: float = 0.0  # accumulators combined into one number

    COUNTS: ClassVar[tuple[str, ...]] = (
        "fused", "tile_stores", "tiles", "simple", "dear", "scalars", "loads", "stores", "gathers", "turned", "loops",
        "folds",
    )  # fmt: skip
    BYTES: ClassVar[tuple[str, ...]] = (
        "near", "far", "far_loose", "rim", "rim_loose", "memory_loose", "memory_stored", "memory",
    )  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Seconds for each count and byte of `Work`, for one thread of a machine. `dispatch`: of a phase; `wake`: to hand
    a phase to a team; `shared`: by how much memory serves all cores faster than one."""

    counts: tuple[float, ...]
    bytes: tuple[float, ...]
    dispatch: float
    wake: float
    shared: float
    fitted: bool = False

    def __post_init__(self) -> None:
        numbers = (*self.counts, *self.bytes, self.dispatch, self.wake)
        if len(self.counts) != len(Work.COUNTS) or len(self.bytes) != len(Work.BYTES):
            raise ValueError(f"there are {len(Work.COUNTS)} counts and {len(Work.BYTES)} kinds of bytes")
        if not all(math.isfinite(n) and n >= 0 for n in numbers) or not self.shared >= 1:
            raise ValueError("seconds are finite and not negative, and all cores are served no slower than one")

    @staticmethod
    def of(target: Target, hz: float = GUESSED_HZ) -> Rates:
        """What a core of this kind does if it issues two vector instructions a cycle (one of 512 bits counts twice
        where it does), and has the bandwidths of a common server; for machines that nobody has calibrated."""
        cycle = 1 / hz
        wide = 1.0 if target.vector_bits >= 512 else 0.5
        each = {
            "fused": wide, "tile_stores": 1.0, "tiles": 20.0, "simple": 0.5, "dear": 0.7, "scalars": 0.7, "loads": 0.5,
            "stores": 1.0, "gathers": 1.5, "turned": 4.0, "loops": 2.0, "folds": 12.0,
        }  # fmt: skip
        return Rates(
            tuple(each[name] * cycle for name in Work.COUNTS),
            (cycle / 48, cycle / 24, cycle / 24, cycle / 12, cycle / 12, 1 / 30e9, 1 / 30e9, 1 / 20e9),
            200 * cycle, 3e-6, 2.0,
        )  # fmt: skip

    def compute(self, work: Work) -> float:
        """Seconds of the instructions of one thread that does everything."""
        return _dot(self.counts, work, Work.COUNTS)

    def waiting(self, work: Work) -> float:
        """Seconds of the bytes, likewise."""
        return _dot(self.bytes, work, Work.BYTES)

    def seconds(self, work: Work, threads: int = 1) -> float:
        """The time of a phase by a team of so many threads."""
        compute, memory, extra = self.compute(work), self.waiting(work), self.dispatch
        workers = parallel(work, threads)
        if workers > 1:
            compute /= workers
            own = _dot(self.bytes[:-1], work, Work.BYTES[:-1])
            memory = own / workers + (memory - own) / min(workers, self.shared)
            extra += self.wake
        longer, shorter = max(compute, memory), min(compute, memory)
        return extra + longer + OVERLAP * shorter

    def core(self, work: Work, beside: int) -> float:
        """The time of all of a phase on one core, while so many of them are at work on it, each on its part: as
        `seconds`, without handing it out."""
        compute, memory = self.compute(work), self.waiting(work)
        own = _dot(self.bytes[:-1], work, Work.BYTES[:-1])
        memory = own + (memory - own) * beside / min(beside, self.shared)
        return max(compute, memory) + OVERLAP * min(compute, memory)

    def total(self, works: Sequence[Work], threads: int = 1) -> float:
        """The time of phases that run one after the other."""
        return sum(self.seconds(w, threads) for w in works)

    def slower(self, factor: float) -> Rates:
        """Those of a core that gets only 1 / `factor` of its time."""
        counts, moved = tuple(c * factor for c in self.counts), tuple(b * factor for b in self.bytes)
        return replace(self, counts=counts, bytes=moved, dispatch=self.dispatch * factor)


def _dot(rates: Sequence[float], work: Work, names: Sequence[str]) -> float:
    return float(sum(c * getattr(work, name) for c, name in zip(rates, names, strict=True)))


def parallel(work: Work, threads: int) -> float:
    """How much faster a team is than one thread, if all chunks take equally long and computing is all there is."""
    chunks = min(max(work.tasks // max(work.grain, 1.0), 1.0), work.tasks, float(CHUNKS * threads))
    if threads == 1 or chunks <= 1:
        return 1.0
    return chunks / math.ceil(chunks / threads)


# -------------------------------------------------- what is kept


def file_name(target: Target) -> str:
    """One for each kind of machine."""
    return f"rates-{hashlib.sha256(str(target).encode()).hexdigest()[:16]}.json"


def save(rates: Rates, target: Target, path: Path) -> None:
    """Writes a calibration as a whole or not at all. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"target": str(target), "names": _names(), **asdict(rates)}, indent=1))
    part.replace(path)


def load(path: Path, target: Target) -> Rates | None:
    """The calibration in a file; None if there is none, or it is of another machine. Raises ResourceError."""
    try:
        text = path.read_text()
    except OSError:
        return None
    try:
        found: Mapping[str, object] = json.loads(text)
        values = dict(found)
        if values.pop("names") != _names():
            return None  # of a version that counted something else
        if values.pop("target") != str(target):
            return None
        return Rates(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        advice = "delete it, or run `python -m stitch calibrate` again"
        raise ResourceError(str(path), f"{path} is no calibration: {problem}", advice) from None


def known(target: Target, folder: Path | None) -> Rates:
    """The calibration of a machine that is kept in the cache directory, or a guess. Raises ResourceError."""
    found = load(folder / file_name(target), target) if folder is not None else None
    return found if found is not None else Rates.of(target)


def _names() -> list[str]:
    return [*Work.COUNTS, *Work.BYTES]
