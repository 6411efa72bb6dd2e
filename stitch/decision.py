"""What was decided on where a model runs, as `explain()` of a placed model gives it. It is kept with the code, so that
a model from the cache needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Objective = Literal["latency", "throughput", "memory"]


@dataclass(frozen=True)
class Stage:
    """Kernels `first` to `last` of the order in which they run, `kernels` of them, on these CPUs; predicted seconds."""

    device: str
    cpus: tuple[int, ...]
    first: str
    last: str
    kernels: int
    seconds: float


@dataclass(frozen=True)
class Decision:
    """`seconds`: from an input to its result for latency, between two results for throughput. `exact`: no other
    placement is better, if the predictions are right. `alternatives`: what else there was, in the same seconds."""

    objective: Objective
    stages: tuple[Stage, ...]
    assignment: tuple[int, ...]
    seconds: float
    exact: bool
    alternatives: tuple[tuple[str, float], ...]
    sizes: Mapping[str, int]
    fitted: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str) -> Decision:
        found = json.loads(text)
        found["stages"] = tuple(Stage(**{**s, "cpus": tuple(s["cpus"])}) for s in found["stages"])
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
        for k, s in enumerate(self.stages):
            mark = "  the bottleneck" if self.objective == "throughput" and s.seconds == slowest else ""
            runs = f"{s.first} to {s.last}, {s.kernels} kernels"
            lines.append(f"  stage {k}  {s.device:<12} {runs}  {1e3 * s.seconds:.4g} ms{mark}")
        what = "between two results" if self.objective == "throughput" else "from input to result"
        proof = "no placement has less" if self.exact else "there may be a better one"
        lines.append(f"  {1e3 * self.seconds:.4g} ms {what}: {proof}")
        lines += [f"    instead of {1e3 * s:.4g} ms: {name}" for name, s in self.alternatives]
        return "\n".join(lines)
