"""Where the time of a compiled model goes, phase by phase.

    probe = Probe.of(graph, target, threads)
    times = probe.measure(arrays, seconds=0.2)      one number for each phase of each kernel
    works = probe.describe(arrays)                  and what each does: see `stitch.cost`

The entry is compiled with a reading of the processor's counter after each call of a kernel's phase, so a time is that
of the phase with all that its team waits for. The shortest of many runs counts: neighbours only ever add.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stitch import compiler
from stitch.codegen import assemble, machine
from stitch.codegen.kernels import Lowered
from stitch.codegen.sequence import sequence
from stitch.cost import LINE, Work
from stitch.graph import Graph
from stitch.plan import Artifact
from stitch.runtime.executable import Executable
from stitch.stitching.schedule import Kernel, Stitched
from stitch.target import Target

MOST = 1 << 16  # calls in one model
LEAST = 5  # runs that are timed at least

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sample:
    """One phase of a kernel."""

    kernel: Kernel
    phase: int
    work: Work
    seconds: float


@dataclass
class Probe:
    """A model whose entries write to `ticks`: one number at their start, and one after each call."""

    artifact: Artifact
    executable: Executable
    stitched: Stitched
    lowered: Mapping[str, Lowered]
    target: Target
    ticks: Array
    ends: list[int] = field(default_factory=lambda: [0])  # numbers of the first tick of each entry, and after the last
    wall: float = 0.0  # seconds of the shortest run that `measure` has seen, and how many runs it was
    runs: int = 0

    @staticmethod
    def of(graph: Graph, target: Target, threads: int) -> Probe:
        """Compiles a graph for this machine, which `target` must describe."""
        stitched = compiler.cut(graph, target)
        lowered = assemble.lower(stitched, target)
        ticks = np.zeros(MOST, np.int64)
        ends = [0]

        def emit(text: str) -> bytes:
            return machine.compile(_instrument(text, ticks.ctypes.data, ends, target), target)

        artifact = assemble.assemble(stitched, target, emit, {}, lowered)
        return Probe(artifact, Executable(artifact, threads), stitched, lowered, target, ticks, ends)

    def sizes(self, arrays: Sequence[Array]) -> dict[str, int]:
        """The symbols' values for these inputs."""
        return {self.artifact.symbols[s]: arrays[i].shape[axis] for s, i, axis in self.artifact.bindings}

    @property
    def kernels(self) -> list[Kernel]:
        """Those in native code."""
        return [k for k in self.stitched.kernels if k.name in self.lowered]

    def measure(self, arrays: Sequence[Array], seconds: float, outputs: bool = False, away: int = 0) -> list[float]:
        """The seconds of each phase of each kernel, in the order of `kernels`. `outputs`: into the same memory each
        time, as in a loop that reuses it, instead of new arrays. `away`: bytes that are read between two runs."""
        inputs = list(arrays)
        results = self.executable.run(inputs)
        own = results if outputs else None
        others = np.ones(away, np.uint8)  # zeros may all be one page
        rows: list[Array] = []
        walls: list[float] = []
        begin, first = time.perf_counter(), time.perf_counter_ns()
        while len(rows) < LEAST or time.perf_counter() - begin < seconds:
            others[::LINE].sum()
            start = time.perf_counter()
            self.executable.run(inputs, own)
            walls.append(time.perf_counter() - start)
            rows.append(self.ticks[: self.ends[-1]].copy())
        # The counter's rate: ticks between the starts of the first and the last run, and the time between them.
        start_of_last = time.perf_counter_ns() - int(walls[-1] * 1e9)
        rate = (rows[-1][0] - rows[0][0]) / max(start_of_last - first, 1) * 1e9
        spent = np.min(np.diff(np.array(rows), axis=1), axis=0) / rate
        between = {n - 1 for n in self.ends}  # differences across two entries: host work
        self.wall, self.runs = min(walls), len(rows)
        return [float(s) for k, s in enumerate(spent) if k not in between]

    def describe(self, arrays: Sequence[Array], outputs: bool = False, away: int = 0) -> list[tuple[Work, ...]]:
        """The work of each phase of each kernel, as `measure` with the same arguments finds it."""
        return works(self.stitched, self.lowered, self.sizes(arrays), self.target, outputs, away)

    def samples(self, arrays: Sequence[Array], seconds: float, outputs: bool = False, away: int = 0) -> list[Sample]:
        """Both together."""
        spent = iter(self.measure(arrays, seconds, outputs, away))
        found = [
            Sample(k, n, work, next(spent))
            for k, phases in zip(self.kernels, self.describe(arrays, outputs, away), strict=True)
            for n, work in enumerate(phases)
        ]
        assert next(spent, None) is None, "calls and kernels do not match"
        return found


def works(
    stitched: Stitched,
    lowered: Mapping[str, Lowered],
    sizes: Mapping[str, int],
    target: Target,
    reused: bool = False,
    away: float = 0.0,
) -> list[tuple[Work, ...]]:
    """What each native kernel's phases do for these sizes, in a model that runs again and again. `reused`: results are
    written to the same memory each time. `away`: bytes that others touch between two runs."""
    kernels = [lowered[k.name] for k in stitched.kernels if k.name in lowered]
    return sequence(kernels, sizes, target, stitched.graph.outputs, reused, away)


def family(kernel: Kernel) -> str:
    """What kind of kernel it is, in errors of prediction and in reports."""
    if kernel.opaque is not None:
        return "opaque"
    if kernel.chain is not None:
        return "chain"
    if any(p.contraction is not None for p in kernel.phases):
        return "contraction"
    return "reduction" if any(r.fold for g in kernel.groups for r in g.roots) else "elementwise"


def _instrument(text: str, address: int, ends: list[int], target: Target) -> str:
    """The module with a reading of the counter at the start of each entry and after each call in it."""
    counter = '"mrs $0, cntvct_el0", "=r"()' if target.triple.startswith("aarch64") else ""
    read = f"call i64 asm sideeffect {counter}" if counter else "call i64 @llvm.readcyclecounter()"
    out, inside = [], False
    for line in text.splitlines():
        out.append(line)
        if inside := (line.startswith("define i64 @stitch_entry_") or (inside and line != "}")):
            opened = line.startswith("entry:")
            if opened or line.lstrip().startswith("call void @stitch_"):
                n = ends[-1]
                out.append(f"  %tick{n} = {read}")
                out.append(f"  store volatile i64 %tick{n}, ptr inttoptr (i64 {address + 8 * n} to ptr)")
                ends[-1] += 1
        elif line == "}" and len(out) > 1 and ends[-1] > (ends[-2] if len(ends) > 1 else 0):
            ends.append(ends[-1])
    assert ends[-1] < MOST, "too many kernels"
    return "\n".join([*out, "" if counter else "declare i64 @llvm.readcyclecounter()", ""])
