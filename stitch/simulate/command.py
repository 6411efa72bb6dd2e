"""`stitch simulate MODEL --board kirin970`: where a model's kernels would run on a described board, and how fast.

Nothing is compiled or run: kernels are the stitcher's, their times follow from the board's rates, and the pipeline is
simulated with its queues.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stitch.errors import StitchError

if TYPE_CHECKING:
    from stitch.placement.problem import Pipeline, Problem
    from stitch.simulate.events import Run
    from stitch.simulate.model import Loaded
    from stitch.stitching.schedule import Stitched
    from stitch.topology import Board

OTHERWISE = 1  # the extent of a symbol that --size does not name
SHOWN = 8  # inputs in the picture, and kernels that are told of one by one


def add(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, but for the model and --size."""
    parser.add_argument(
        "--board", default="kirin970", metavar="NAME", help="a described board, or board.toml (default: kirin970)"
    )
    parser.add_argument("--objective", choices=("throughput", "latency"), default="throughput")
    parser.add_argument("--inputs", type=_count, default=100, metavar="N", help="how many go through (default 100)")
    parser.add_argument("--queue", type=_count, default=2, metavar="N", help="room between two stages (default 2)")
    parser.add_argument("--jitter", type=_share, default=0.0, metavar="S", help="times vary by exp(N(0, S))")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture of the first inputs")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 10")
    return value


def run(args: argparse.Namespace) -> None:
    from stitch import boardfile
    from stitch.simulate.model import problem_of, sizes_of

    if args.objective == "latency" and args.svg is not None:
        raise StitchError("a picture shows the stages of a pipeline", "leave out --svg, or --objective latency")
    board = boardfile.load(args.board)
    stitched = stitch_for(Path(args.model), board)
    sizes = sizes_of(stitched, dict(args.size))
    try:
        loaded = problem_of(stitched, board, sizes)
    except ValueError as problem:  # rates that nobody knows
        raise StitchError(f"the board {args.board!r} cannot be simulated: {problem}") from None
    print(f"{len(loaded.work)} kernels on {board.about or board.name}; {_total(loaded.work)}")
    _print_alone(loaded.problem)
    if args.objective == "latency":
        _one_input(stitched, loaded, board, sizes)
        return
    _pipeline(args, loaded.problem, board)


def _one_input(stitched: Stitched, loaded: Loaded, board: Board, sizes: Mapping[str, int]) -> None:
    """A device for each kernel, the fastest with the help of the others."""
    from stitch.placement import latency, sharing
    from stitch.simulate.team import team_of

    team = team_of(stitched, loaded, board, sizes)
    names = [k.name for k in stitched.kernels]
    without = latency.place(loaded.problem)
    found = latency.place(sharing.help_out(loaded.problem, team.lead, [team.saved(name) for name in names]))
    counts = [found.devices.count(d) for d in range(len(board.clusters))]
    where = ", ".join(f"{n} on {c.name}" for n, c in zip(counts, board.clusters, strict=True))
    kind = "no placement takes less" if found.exact else "found by a beam: there may be better ones"
    print(f"one input: {1e3 * found.seconds:.4g} ms, kernels {where} ({kind})")
    shared = [p for p in team.phases(names) if p.shared and found.devices[names.index(p.kernel)] == team.lead]
    if shared:
        print(f"{len(shared)} of them shared by clusters; {1e3 * without.seconds:.4g} ms without that")
        for p in sorted(shared, key=lambda p: -min(p.alone))[:SHOWN]:
            parts = ", ".join(f"{c.name} {n}" for c, n in zip(board.clusters, p.pieces, strict=True))
            alone = ", ".join(f"{c.name} {1e3 * s:.4g}" for c, s in zip(board.clusters, p.alone, strict=True))
            print(f"    {p.kernel:<5}  {p.way:<7}  {parts}: {1e3 * p.seconds:.4g} ms; alone {alone}")


def stitch_for(model: Path, board: Board) -> Stitched:
    """The kernels that a model would have on a board. Raises StitchError."""
    from stitch import importer, knobs, target
    from stitch.simplify import simplify
    from stitch.stitching.stitch import stitch

    now = knobs.current()
    machine = target.parse(board.target)
    return stitch(simplify(importer.load(model)), (now.l2_bytes or machine.l2_bytes) // 2, now.schemes, now.merging)


def _total(work: Sequence[object]) -> str:
    from stitch.simulate.work import Work

    total = sum((w for w in work if isinstance(w, Work)), Work(kernels=0))
    arithmetic = (
        f"{total.contraction / 1e9:.3g} Gflop in contractions, {total.elementwise / 1e9:.3g} G other operations"
    )
    return f"{arithmetic}, {total.bytes / 1e6:.4g} MB"


def _print_alone(problem: Problem) -> None:
    for d, device in enumerate(problem.devices):
        seconds = sum(item.seconds[d][-1] for item in problem.items)
        rate = f", {1 / seconds:.3g}/s" if seconds else ""
        print(f"{f'{device.cores}x{device.name}':>12}  {1e3 * seconds:8.4g} ms{rate}")


def _pipeline(args: argparse.Namespace, problem: Problem, board: Board) -> None:
    from stitch.placement import pipeit, throughput
    from stitch.simulate import events, gantt

    if not problem.items:
        raise StitchError("the model has no kernels, so there is nothing to place")
    best, other = throughput.place(problem), pipeit.place(problem)
    done = events.run(best.seconds, args.inputs, queue=args.queue, jitter=args.jitter)
    _print_stages(problem, best, done)
    print(f"{done.throughput:.4g} results/s, {1e3 * done.latency:.4g} ms from an input to its result")
    share = best.bottleneck / other.bottleneck if other.bottleneck else 1.0
    print(f"Pipe-it's heuristic: {len(other.stages)} stages, {100 * share:.1f} % of this throughput")
    names = [f"{k} {s.cores}x{problem.devices[s.device].name}" for k, s in enumerate(best.stages)]
    first = events.run(best.seconds, min(args.inputs, SHOWN), queue=args.queue, jitter=args.jitter)
    print(gantt.text(first, names), end="")
    if args.svg is not None:
        title = f"{Path(args.model).stem} on {board.name}: {done.throughput:.3g} results/s"
        args.svg.write_text(gantt.svg(first, names, title), encoding="utf-8")
        print(f"picture: {args.svg}")


def _print_stages(problem: Problem, pipeline: Pipeline, done: Run) -> None:
    slowest = pipeline.seconds.index(pipeline.bottleneck)
    rows = zip(pipeline.stages, pipeline.seconds, done.utilisation(), strict=True)
    for k, (stage, seconds, busy) in enumerate(rows):
        first, last = problem.items[stage.begin].name, problem.items[stage.end - 1].name
        cores = f"{stage.cores}x{problem.devices[stage.device].name}"
        mark = "  the slowest" if k == slowest else ""
        print(
            f"stage {k:2}  {cores:8}  {first:>6} to {last:<6}  {1e3 * seconds:8.4g} ms  {100 * busy:3.0f} % busy{mark}"
        )
