"""Where the time of a model goes, kernel by kernel.

    python -m benchmarks.profile NAME|PATH [--threads N] [--top K] [--lines L] [--size DIM=N ...] [--peer]

NAME is one that `benchmarks.latency` knows. The model is compiled as always, except that the entry notes the
processor's counter after each kernel call; so a time is that of one phase of a kernel, the waiting of its team
included. Kernels with the same program are added up. For each of the slowest, what it computes, its share, how much it
computes and walks per second, and the beginning of its loop program. --peer: onnxruntime's own profile beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import models
from benchmarks.networks.cases import Feed, image, networks
from stitch import dims, importer
from stitch.api import _target
from stitch.codegen.loop_text import render
from stitch.dims import Dim
from stitch.measure import Probe
from stitch.plan import HostStep
from stitch.runtime import host
from stitch.stitching.schedule import Kernel

SECONDS = 2.0


@dataclass
class Cost:
    """What the kernels with one program have taken together, per run."""

    text: str
    kernels: list[Kernel] = field(default_factory=list)
    seconds: float = 0.0
    phases: list[float] = field(default_factory=list)
    operations: float = 0.0
    bytes: float = 0.0


def compiled(path: str | Path, threads: int) -> Probe:
    return Probe.of(importer.load(path), _target(None), threads)


def costs(c: Probe, feed: Feed) -> tuple[list[Cost], float, dict[str, float]]:
    """The costs of all programs, the largest first, the seconds of a run, and those of host functions."""
    run_host = host.call
    hosted: dict[str, list[float]] = {}

    def timed(step: HostStep, *rest: Any) -> Any:
        start = time.perf_counter()
        try:
            return run_host(step, *rest)
        finally:
            hosted.setdefault(step.function, []).append(time.perf_counter() - start)

    arrays = [feed[p.name] for p in c.artifact.inputs]
    with mock.patch.object(host, "call", timed):
        calls = iter(c.measure(arrays, SECONDS))
    sizes = c.sizes(arrays)
    found: dict[str, Cost] = {}
    for kernel in c.kernels:
        program = c.lowered[kernel.name].program
        text = render(program)
        cost = found.setdefault(text, Cost(text, phases=[0.0] * len(program.phases)))
        cost.kernels.append(kernel)
        for number in range(len(program.phases)):
            spent = next(calls)
            cost.seconds += spent
            cost.phases[number] += spent
        cost.operations += sum(
            2.0 * _value(dims.product(a.extent for a in (*k.batch, *k.rows, *k.columns, *k.summed)), sizes)
            for p in kernel.phases
            if (k := p.contraction) is not None
        )
        cost.bytes += sum(_value(v.bytes, sizes) for v in (*kernel.reads(), *kernel.writes()))
    assert next(calls, None) is None, "calls and kernels do not match"
    spent_there = {name: min(s) * len(s) / (c.runs + 1) for name, s in hosted.items()}
    return sorted(found.values(), key=lambda cost: -cost.seconds), c.wall, spent_there


def _value(d: Dim, sizes: Mapping[str, int]) -> float:
    try:
        return float(dims.evaluate(d, sizes))
    except (KeyError, NameError):
        return float("nan")


def describe(cost: Cost, total: float, lines: int) -> str:
    k = cost.kernels[0]
    prims = ", ".join(f"{n} {p}" if n > 1 else p for p, n in Counter(n.prim for n in k.nodes).items())
    origins = list(dict.fromkeys(f"{n.origin.operator} {n.origin.node!r}" for n in k.nodes if n.origin.operator))
    of = f", the first of them {k.name}" if len(cost.kernels) > 1 else f", {k.name}"
    rates = [f"{cost.operations / cost.seconds * 1e-9:.1f} GFLOP/s in contractions"] if cost.operations else []
    rates += [f"{cost.bytes / cost.seconds * 1e-9:.1f} GB/s of arguments"]
    times = f"{1e3 * cost.seconds:.3f} ms, {100 * cost.seconds / total:.1f} %"
    phases = f"; phases {', '.join(f'{1e3 * s:.3f}' for s in cost.phases)} ms" if len(cost.phases) > 1 else ""
    out = [f"{times}: {len(cost.kernels)} kernels{of}; {'; '.join(rates)}{phases}", f"    {prims}"]
    out.append(f"    {'; '.join(origins[:6])}{f'; and {len(origins) - 6} more' if len(origins) > 6 else ''}")
    program = cost.text.splitlines()
    out += [f"    | {line}" for line in program[:lines]]
    if lines and len(program) > lines:
        out.append(f"    | ... {len(program) - lines} more lines")
    return "\n".join(out)


def peer(path: str | Path, feed: Feed, threads: int, top: int) -> str:
    """onnxruntime's milliseconds per run, by operator and by node."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {i.name: feed[i.name] for i in session.get_inputs() if i.name in feed}
        for _ in range(30):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[tuple[str, str], list[float]] = {}
    for e in events:
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time"):
            name = e["name"].removesuffix("_kernel_time")
            spent.setdefault((e["args"]["op_name"], name), []).append(e["dur"] / 1e3)
    nodes = {key: min(ms) for key, ms in spent.items()}
    total = sum(nodes.values())
    by_operator: Counter[str] = Counter()
    for (operator, _), ms in nodes.items():
        by_operator[operator] += ms  # type: ignore[assignment]
    count = Counter(operator for operator, _ in nodes)
    lines = [f"onnxruntime: {total:.3f} ms in {len(nodes)} nodes"]
    lines += [f"  {ms:9.3f} ms  {count[o]:3d} {o}" for o, ms in by_operator.most_common(top)]
    slowest = sorted(nodes.items(), key=lambda item: -item[1])[:top]
    return "\n".join([*lines, "slowest nodes:", *(f"  {ms:9.3f} ms  {o} {n}" for (o, n), ms in slowest)])


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("model", help="a name that benchmarks.latency knows, or a path")
    reader.add_argument("--threads", type=int, default=1)
    reader.add_argument("--top", type=int, default=8)
    reader.add_argument("--lines", type=int, default=30, help="of each loop program (default 30)")
    reader.add_argument("--size", action="append", default=[], metavar="DIM=N", help="of an exported model or a path")
    reader.add_argument("--match", default="", help="only kernels whose primitives or nodes match this expression")
    reader.add_argument("--peer", action="store_true", help="onnxruntime's profile too")
    asked = reader.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: asked.threads]))
    sizes = {name: int(value) for name, value in (s.split("=") for s in asked.size)}
    with tempfile.TemporaryDirectory() as folder:
        path, feed = subject(asked.model, sizes, Path(folder))
        _profile(asked, path, feed)


def _profile(asked: argparse.Namespace, path: str | Path, feed: Feed) -> None:
    c = compiled(path, asked.threads)
    found, wall, hosted = costs(c, feed)
    total = sum(cost.seconds for cost in found)
    count = sum(len(cost.kernels) for cost in found)
    print(
        f"{Path(path).stem}: {1e3 * wall:.3f} ms a run, {1e3 * total:.3f} ms of it in {count} kernels of "
        f"{len(found)} programs, {asked.threads} threads\n"
    )
    if hosted:
        steps = ", ".join(f"{name} {1e3 * s:.3f}" for name, s in sorted(hosted.items(), key=lambda item: -item[1]))
        print(f"host steps, in numpy: {1e3 * sum(hosted.values()):.3f} ms: {steps}\n")
    wanted = [x for x in found if not asked.match or re.search(asked.match, describe(x, total, 0))]
    for cost in wanted[: asked.top]:
        print(describe(cost, total, asked.lines) + "\n")
    rest = wanted[asked.top :]
    if rest:
        print(f"{1e3 * sum(cost.seconds for cost in rest):.3f} ms in {len(rest)} other programs\n")
    if asked.peer:
        print(peer(path, feed, asked.threads, 12))


def subject(name: str, sizes: Mapping[str, int], folder: Path) -> tuple[str | Path, Feed]:
    root = models.exports()
    if root is not None and (root / f"{name}.json").exists():
        spec = json.loads((root / f"{name}.json").read_text())
        return root / spec["file"], models.make_feed(spec, {**spec["dims"], **sizes})
    if Path(name).is_file():
        return name, image(Path(name), sizes)
    case = next(networks([name], folder), None)
    if case is None:
        raise SystemExit(f"there is no model {name!r}: `python -m benchmarks` lists them")
    return case.path, case.feed


if __name__ == "__main__":
    main()
