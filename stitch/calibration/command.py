"""`stitch calibrate`: times this machine, and keeps what the cost model is to know of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from stitch import calibration, cost, knobs
from stitch.codegen import machine
from stitch.cost import Rates, Work
from stitch.errors import ResourceError
from stitch.target import Target

PLACES = {
    "near": "a byte from the second cache",
    "far": "from the third",
    "far_loose": "  more, in short pieces",
    "rim": "from the rest of the third",
    "rim_loose": "  more, in short pieces",
    "memory_loose": "from memory in short pieces, more than",
    "memory_stored": "back to memory",
    "memory": "from memory",
}
"""What kinds of bytes are called."""


def run(output: str | None, show: bool) -> None:
    """Measures, keeps and prints; or only prints what is known. Raises ResourceError."""
    target = machine.host()
    path = Path(output) if output else place(target)
    if show:
        print(describe(cost.known(target, knobs.current().cache_dir), target))
        return
    if path is None:
        raise ResourceError("cache", "there is no cache directory", "set STITCH_CACHE_DIR, or give --output FILE")
    start = time.perf_counter()
    rates = calibration.calibrate(target, lambda name: print(f"  {name}", file=sys.stderr))
    cost.save(rates, target, path)
    print(f"{describe(rates, target)}\n{time.perf_counter() - start:.0f} s; kept in {path}")


def place(target: Target) -> Path | None:
    """Where the calibration of a machine is kept; None without a cache directory."""
    folder = knobs.current().cache_dir
    return None if folder is None else folder / cost.file_name(target)


def describe(rates: Rates, target: Target) -> str:
    """A table: what each thing costs."""
    names = {"fused": "cycle of a contraction", "dear": "instruction of a function", "turned": "vector transposed"}
    lines = [f"{target.cpu}, {target.cores} cores: " + ("fitted" if rates.fitted else "guessed, not calibrated")]
    lines += [f"  {c * 1e9:8.3f} ns  {names.get(n, n)}" for n, c in zip(Work.COUNTS, rates.counts, strict=True)]
    lines += [f"  {c * 1e12:8.2f} ps  {PLACES[n]}" for n, c in zip(Work.BYTES, rates.bytes, strict=True)]
    lines.append(f"  {rates.dispatch * 1e9:8.0f} ns  a phase, and {rates.wake * 1e9:.0f} more for a team")
    lines.append(f"  {rates.shared:8.2f}     times as fast memory serves all cores")
    return "\n".join(lines)
