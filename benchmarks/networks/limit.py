"""How fast a network could be on this machine.

    limit = max(arithmetic of matrix products and convolutions / multiply-add peak, compulsory bytes / bandwidth)

The peak and the bandwidth are those that `benchmarks.chains.limit` measures. The arithmetic is that of the model as it
is imported, by the definition of a product: nothing for elementwise operators, and no shortcut such as Winograd's. The
bytes are those of weights, inputs and outputs, once each; of a table of which only some rows are gathered, those rows.
What depends on data is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chains.limit import Limit, Machine
from benchmarks.networks.cases import Feed
from benchmarks.networks.report import threads
from stitch import dims, importer
from stitch.dims import Dim
from stitch.errors import StitchError
from stitch.graph import Graph, Node, Value

CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Work:
    """What one inference needs, term by term, in the model's dims. A multiplication and an addition are two
    operations."""

    operations: Sequence[Dim]
    bytes: Sequence[Dim]
    inputs: Sequence[Value]

    def at(self, feed: Feed) -> tuple[int, int]:
        """Operations and bytes for these arrays, without terms with a dim that only a run can tell."""
        sizes: dict[str, int] = {}
        for v in self.inputs:
            for shape in (v.given, v.shape):
                for d, n in zip(shape, feed[v.name].shape, strict=True):
                    if (symbol := dims.lone(d)) is not None:
                        sizes[symbol] = n
        operations, size = (
            sum(dims.evaluate(d, sizes) for d in terms if dims.symbols(d) <= sizes.keys())
            for terms in (self.operations, self.bytes)
        )
        return operations, size

    def limit(self, feed: Feed, machine: Machine) -> Limit:
        operations, size = self.at(feed)
        return Limit(size / machine.bandwidth(size), operations / peak(machine))


def peak(machine: Machine) -> float:
    """Operations per second of all threads, in nothing but multiply-adds."""
    return 2.0 * machine.lanes * machine.multiplying * machine.threads


def described(machine: Machine) -> str:
    large = 1 << 27
    return (
        f"{threads(machine.threads)}: {peak(machine) / 1e9:.0f} GFLOP/s; copying {large >> 20} MiB at "
        f"{machine.bandwidth(large) / 1e9:.0f} GB/s"
    )


def work(path: Path) -> Work | None:
    """None for a model that stitch cannot import."""
    try:
        return needed(importer.load(path))
    except StitchError:
        return None


def needed(graph: Graph) -> Work:
    moved = (*graph.inputs, *dict.fromkeys(graph.outputs), *_weights(graph))
    return Work([_operations(n) for n in graph.nodes], [v.bytes for v in moved], graph.inputs)


def _operations(node: Node) -> Dim:
    if node.prim == "contract":
        a, b = node.inputs
        labels = zip((*node.attrs["a"], *node.attrs["b"]), (*a.shape, *b.shape), strict=True)
        return 2 * dims.product(dict(labels).values())
    # A depthwise convolution is products of windows, and their sum.
    if node.prim == "mul" and node.origin.operator in CONVOLUTIONS:
        return 2 * node.output.size
    return 0


def _weights(graph: Graph) -> Iterator[Value]:
    """What is read of constants: all of one, or the rows that are gathered from it."""
    users = graph.users()
    for node in graph.nodes:
        if node.prim == "const":
            gathers = [n for n in users[node.output] if n.prim == "gather" and n.inputs[0] is node.output]
            if len(gathers) == len(users[node.output]):
                yield from (n.output for n in gathers)
            else:
                yield node.output
