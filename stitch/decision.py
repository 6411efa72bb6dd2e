"""What was decided on where a model runs, as `explain()` of a placed model gives it. It is kept with the code, so that
a model from the cache needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

Objective = Literal["latency", "throughput", "memory"]

SHOWN = 10
"""Phases that are shown one by one."""


@dataclass(frozen=True)
class Stage:
    """Kernels `first` to `last` of the order in which they run, `kernels` of them, on these CPUs; predicted seconds.
    `helpers`: CPUs of other devices that some of its work is shared out to."""

    device: str
    cpus: tuple[int, ...]
    first: str
    last: str
    kernels: int
    seconds: float
    helpers: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Phase:
    """A phase of a kernel in a stage with helpers: the `way` in which it could be cut, the pieces that each device
    gets, its predicted seconds, and those on each device `alone`."""

    kernel: str
    number: int
    way: str
    pieces: tuple[int, ...]
    seconds: float
    alone: tuple[float, ...]

    @property
    def shared(self) -> bool:
        return sum(n > 0 for n in self.pieces) > 1


@dataclass(frozen=True)
class Assignment:
    """What compiling in parts has to know: the part of each kernel, what is noted in the report, and the tables by
    which phases are shared out (`stitch.codegen.assemble.Tables`)."""

    parts: Sequence[int]
    notes: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """`seconds`: from an input to its result for latency, between two results for throughput. `exact`: no other
    placement is better, if the predictions are right. `alternatives`: what else there was, in the same seconds.
    `devices`: what `phases`, those of stages with helpers, have pieces on. `idle`: those that have nothing to do."""

    objective: Objective
    stages: tuple[Stage, ...]
    assignment: tuple[int, ...]
    seconds: float
    exact: bool
    alternatives: tuple[tuple[str, float], ...]
    sizes: Mapping[str, int]
    fitted: bool
    devices: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()
    idle: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str) -> Decision:
        found = json.loads(text)
        found["stages"] = tuple(
            Stage(**{**s, "cpus": tuple(s["cpus"]), "helpers": tuple(map(tuple, s["helpers"]))})
            for s in found["stages"]
        )
        found["phases"] = tuple(
            Phase(**{**p, "pieces": tuple(p["pieces"]), "alone": tuple(p["alone"])}) for p in found["phases"]
        )
        found["devices"], found["idle"] = tuple(found["devices"]), tuple(found["idle"])
        found["assignment"] = tuple(found["assignment"])
        found["alternatives"] = tuple((name, seconds) for name, seconds in found["alternatives"])
        return Decision(**found)

    def __str__(self) -> str:
        known = "calibrated" if self.fitted else "guessed: run `python -m stitch calibrate`"
        sizes = ", ".join(f"{name}={n}" for name, n in self.sizes.items())
        lines = [
            f"placed for {self.objective}" + (f" at {sizes}" if sizes else "") + f"; times are predicted ({known})"
        ]
        slowest = max((s.seconds for s in self.stages), default=0.0)
        width = max([12, *(len(s.device) for s in self.stages)])
        for k, s in enumerate(self.stages):
            mark = "  the bottleneck" if self.objective == "throughput" and s.seconds == slowest else ""
            runs = f"{s.first} to {s.last}, {s.kernels} kernels"
            lines.append(f"  stage {k}  {s.device:<{width}} {runs}  {1e3 * s.seconds:.4g} ms{mark}")
        lines += [f"  nothing     {', '.join(self.idle)}"] if self.idle else []
        lines += self._phases()
        what = "between two results" if self.objective == "throughput" else "from input to result"
        proof = "no placement has less" if self.exact else "there may be a better one"
        lines.append(f"  {1e3 * self.seconds:.4g} ms {what}: {proof}")
        lines += [f"    instead of {1e3 * s:.4g} ms: {name}" for name, s in self.alternatives]
        return "\n".join(lines)

    def _phases(self) -> list[str]:
        """The phases that devices share, those first that would take longest alone."""
        some = sorted((p for p in self.phases if p.shared), key=lambda p: -min(p.alone))
        if not some:
            return []
        lines = [f"  {len(some)} of {len(self.phases)} phases are shared out, in pieces:"]
        width = max(len(self._name(p)) for p in some[:SHOWN])
        for p in some[:SHOWN]:
            parts = ", ".join(f"{d} {n}" for d, n in zip(self.devices, p.pieces, strict=True))
            alone = ", ".join(f"{d} {1e3 * s:.4g}" for d, s in zip(self.devices, p.alone, strict=True))
            lines.append(f"    {self._name(p):<{width}}  {p.way:<7}  {parts}: {1e3 * p.seconds:.4g} ms; alone {alone}")
        if len(some) > SHOWN:
            rest = some[SHOWN:]
            lines.append(f"    and {len(rest)} more: {1e3 * sum(p.seconds for p in rest):.4g} ms")
        return lines

    def _name(self, phase: Phase) -> str:
        several = sum(p.kernel == phase.kernel for p in self.phases) > 1
        return f"{phase.kernel}.{phase.number}" if several else phase.kernel
