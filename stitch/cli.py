"""The command `stitch`.

    stitch explain MODEL [--size batch=1 ...] [--kernel k3] [--json]    what was stitched, and why
    stitch compile MODEL [--no-cache]                                   fill the cache, and how long that takes
    stitch run MODEL [--size batch=2 ...] [--runs 20]                   run on random inputs
    stitch stream MODEL [--items N] [--devices cpu:0 --devices cpu:1]   the same, many at a time, in stages
    stitch show MODEL graph|schedule|loops                              what the compiler's stages make of it
    stitch calibrate [--show]                                           time this machine, for predictions
    stitch simulate MODEL [--board kirin970] [--svg out.svg]            a pipeline on a board that is not here
    stitch operators                                                    which operators are supported
    stitch knobs                                                        the tuning switches

Whatever is wrong with the model or the arguments is one line on stderr, and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stitch import __version__, cli_stream, dims, knobs
from stitch.errors import ResourceError, StitchError
from stitch.simulate import command as simulate
from stitch.sizes import checked

if TYPE_CHECKING:
    from stitch.api import CompiledModel
    from stitch.model import RunnableModel

OTHERWISE = 1  # the extent of a symbol that --size does not name


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        args.command(args)
    except BrokenPipeError:  # as in `stitch explain | head`
        sys.stderr.close()
    except (StitchError, OSError) as problem:
        print(f"stitch: {problem}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("stitch", description="A compiler for ONNX models.")
    parser.add_argument("--version", action="version", version=f"stitch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    explain = commands.add_parser("explain", help="show what was stitched, and why")
    explain.add_argument("--kernel", metavar="NAME", help="one kernel in detail")
    explain.add_argument("--json", action="store_true", help="for programs")
    compile = commands.add_parser("compile", help="compile into the cache, and say how long that takes")
    run = commands.add_parser("run", help="run on random inputs, and say what comes out and how long it takes")
    run.add_argument("--runs", type=cli_stream.positive, default=10, metavar="N", help="how often (default 10)")
    show = commands.add_parser("show", help="print what a stage of the compiler makes of a model")
    stream = cli_stream.add(commands)
    given = ((explain, _explain), (compile, _compile), (run, _run), (stream, _stream), (show, _show))
    for command, function in given:
        command.add_argument("model", metavar="MODEL", help="path of an ONNX file")
        command.add_argument(
            "--target", type=_target, help="the machine to compile for, as in stitch.target; this one by default"
        )
        if command is show:
            command.add_argument("stage", choices=("graph", "schedule", "loops"))
            command.set_defaults(command=function)
            continue
        command.add_argument("--no-cache", dest="cache", action="store_false", help="neither read nor fill the cache")
        command.set_defaults(command=function)
    simulated = commands.add_parser("simulate", help="place a model on a described board, and simulate it")
    simulated.add_argument("model", metavar="MODEL", help="path of an ONNX file")
    simulate.add(simulated)
    simulated.set_defaults(command=simulate.run)
    for command in (explain, run, stream, simulated):
        command.add_argument(
            "--size", action="append", default=[], type=_size, metavar="NAME=N", help="extent of a symbolic dim"
        )
    calibrate = commands.add_parser("calibrate", help="time this machine for the cost model, in half a minute")
    calibrate.add_argument("--output", metavar="FILE", help="keep it there instead of in the cache directory")
    calibrate.add_argument("--show", action="store_true", help="print what is known, and measure nothing")
    calibrate.set_defaults(command=_calibrate)
    commands.add_parser("operators", help="list the supported operators").set_defaults(command=_operators)
    commands.add_parser("knobs", help="list the tuning switches").set_defaults(command=_knobs)
    return parser


def _size(text: str) -> tuple[str, int]:
    name, _, value = text.rpartition("=")
    if not name or not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not like batch=2")
    return name, int(value)


def _target(text: str) -> str:
    from stitch import target

    try:
        target.parse(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return text


def _load(args: argparse.Namespace) -> CompiledModel:
    from stitch.api import optimize

    return optimize(Path(args.model), target=args.target, cache=args.cache)


# ------------------------------------------------------------------ commands


def _explain(args: argparse.Namespace) -> None:
    found = _load(args).explain()
    found = found.at(**dict(args.size)) if args.size else found
    if args.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        print(found.kernel(args.kernel) if args.kernel else found)


def _compile(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    model = _load(args)
    took = time.perf_counter() - start
    artifact = model.artifact
    constants = memoryview(artifact.constants).nbytes
    print(f"compiled, or found in the cache, in {took:.2f} s")
    print(f"{len(artifact.code) / 1e3:.0f} kB of code, {constants / 1e6:.1f} MB of constants, for {artifact.target}")
    if args.cache and knobs.current().cache_dir is not None:
        start = time.perf_counter()
        _load(args)
        print(f"loaded from {knobs.current().cache_dir} in {1e3 * (time.perf_counter() - start):.0f} ms")


def _run(args: argparse.Namespace) -> None:
    model = _load(args)
    feeds = random_feeds(model, dict(args.size))
    start = time.perf_counter()
    results = model.run(None, feeds)
    first = time.perf_counter() - start
    times = []
    for _ in range(args.runs):
        start = time.perf_counter()
        model.run(None, feeds)
        times.append(time.perf_counter() - start)
    for port in model.inputs:
        print(f"in   {port.name}: {port.dtype.name}{list(feeds[port.name].shape)}")
    for port, result in zip(model.outputs, results, strict=True):
        print(f"out  {port.name}: {port.dtype.name}{list(result.shape)}{_range(result)}")
    middle = f", then {1e3 * statistics.median(times):.3g} ms, the median of {len(times)}" if times else ""
    print(f"{1e3 * first:.3g} ms the first time{middle}")


def _stream(args: argparse.Namespace) -> None:
    if not args.devices:
        whole = _load(args)
        cli_stream.stream(whole, random_feeds(whole, dict(args.size)), args.items, args.depth)
        return
    from stitch.api import optimize

    model = optimize(
        Path(args.model), target=args.target, cache=args.cache, devices=args.devices, objective="throughput",
        sizes=dict(args.size),
    )  # fmt: skip
    print(model.explain())
    cli_stream.stream(model, random_feeds(model, dict(args.size)), args.items, args.depth)


def _show(args: argparse.Namespace) -> None:
    """The graph of primitives, simplified; the kernels, groups and placements; the loop programs, equal ones once."""
    from stitch import importer, target, text
    from stitch.codegen import kernels, loop_text
    from stitch.simplify import simplify
    from stitch.stitching import schedule
    from stitch.stitching.stitch import stitch
    from stitch.stitching.trace import Flow

    graph = simplify(importer.load(Path(args.model)))
    if args.stage == "graph":
        print(text.render(graph), end="")
        return
    machine = target.parse(args.target or knobs.current().target or "host")
    now = knobs.current()
    stitched = stitch(graph, (now.l2_bytes or machine.l2_bytes) // 2, now.schemes, now.merging)
    if args.stage == "schedule":
        print(schedule.render(stitched), end="")
        return
    computed = {v for k in stitched.kernels for n in k.nodes for v in n.outputs}
    flow = Flow(stitched.graph, computed | set(stitched.graph.outputs))
    users: dict[str, list[str]] = {}
    for k in stitched.kernels:
        if k.opaque is None or k.opaque.prim != "host":
            users.setdefault(loop_text.render(kernels.lower(k, flow, machine).program), []).append(k.name)
    for program, names in users.items():
        print(f"{', '.join(names)}:\n{program}")


def _calibrate(args: argparse.Namespace) -> None:
    from stitch.calibration import command

    command.run(args.output, args.show)


def _operators(args: argparse.Namespace) -> None:
    import_module("stitch.importer")  # which registers all of them
    from stitch.ops import registry

    found = registry.names()
    for domain, name, opsets in found:
        print(f"{domain + '.' if domain else ''}{name}  {', '.join(map(str, opsets))}")
    print(f"{len(found)} operators, each with the opsets from which on it is written anew; others are supported where")
    print("ONNX defines them by these, or the model brings a function for them")


def _knobs(args: argparse.Namespace) -> None:
    print(knobs.describe())


# ------------------------------------------------------------------ inputs and outputs


def random_feeds(model: RunnableModel, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Arrays for a model's inputs: normal floats, integers that are 0 or 1. Raises StitchError."""
    shapes = {port.name: [dims.parse(d) if isinstance(d, str) else d for d in port.shape] for port in model.inputs}
    known = sorted({s for shape in shapes.values() for d in shape for s in dims.symbols(d)})
    sizes = checked(sizes, known)
    rng = np.random.default_rng(0)
    values = {s: sizes.get(s, OTHERWISE) for s in known}
    feeds = {}
    for port in model.inputs:
        shape = [dims.evaluate(d, values) for d in shapes[port.name]]
        if min(shape, default=0) < 0:
            raise StitchError(f"the shape of input {port.name!r} would be {tuple(shape)}", advice="choose other sizes")
        whole = port.dtype.kind in "iub"
        try:
            array = rng.integers(0, 2, shape) if whole else rng.standard_normal(shape)
            feeds[port.name] = np.asarray(array).astype(port.dtype)
        except (MemoryError, ValueError, OverflowError):  # numpy's ways to say so
            problem = f"no memory for input {port.name!r} of the shape {tuple(shape)}"
            raise ResourceError("memory", problem, "choose smaller sizes") from None
    return feeds


def _range(array: np.ndarray) -> str:
    if not array.size or array.dtype.kind not in "fiu":
        return ""
    return f"  from {array.min():.4g} to {array.max():.4g}, mean {array.mean(dtype=np.float64):.4g}"
