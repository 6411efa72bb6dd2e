"""A stitched model cut between its kernels: parts that are stitched models themselves, and the wires between them.

    before    k0 k1 k2 k3 over (x, y) -> z                 cuts [2]
    after     k0 k1 over (x, y) -> v, w                    v, w: what k2 and k3 read of what k0 and k1 write
              k2 k3 over (v, w, y) -> z

Kernels, nodes and values are the very objects of the whole, so each part computes the same bits. A kernel may go to
any part that is not before those it reads from (`split`); `cut` is for parts that are consecutive. The only borders
that are none are those inside a value that several kernels write in pieces (a concat): see `borders`.

Symbols. A part's code needs the symbols in the shapes that it works on. Those of the model's inputs come with an array
without elements, whose shape they are; one that only a host step knew comes with a value that has it as a dim.

Conditions on shapes are checked by the first part if they are on the inputs' symbols alone; on others, where these
become known, or, if no native code runs there, in the next part with some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from stitch import dims, dtypes
from stitch.bundle import Bundle, Given, Made, Sizes, Source
from stitch.dims import Dim
from stitch.graph import Guard, Node, Value
from stitch.plan import Artifact, Port
from stitch.stitching.schedule import Kernel, Stitched


@dataclass(frozen=True, eq=False)
class Part:
    """`sources`: where each input of its graph comes from."""

    stitched: Stitched
    sources: tuple[Source, ...]


@dataclass(frozen=True, eq=False)
class Partition:
    """`results`: which part gives each of the model's outputs."""

    whole: Stitched
    parts: tuple[Part, ...]
    results: tuple[Made, ...]

    def bundle(self, assemble: Callable[[Stitched], Artifact], report: Mapping[str, Any]) -> Bundle:
        """The parts compiled, each by itself: constants that several parts read are in each of them, and kernels with
        equal programs are compiled once in each."""
        graph = self.whole.graph
        outputs = zip(graph.output_names, graph.outputs, strict=True)
        bundle = Bundle(
            tuple(Port(v.name, v.dtype.name, _texts(v.given)) for v in graph.inputs),
            tuple(Port(name, v.dtype.name, _texts(v.shape)) for name, v in outputs),
            tuple(assemble(part.stitched) for part in self.parts),
            tuple(part.sources for part in self.parts), self.results, report,
        )  # fmt: skip
        bundle.check()
        return bundle


def borders(stitched: Stitched) -> tuple[int, ...]:
    """The positions k, ascending, at which kernels [0, k) and [k, n) can be parted; any of them together."""
    first: dict[Value, int] = {}
    inside: set[int] = set()
    for k, kernel in enumerate(stitched.kernels):
        for v in kernel.writes():
            inside.update(range(first.setdefault(v, k) + 1, k + 1))
    return tuple(k for k in range(1, len(stitched.kernels)) if k not in inside)


def cut(stitched: Stitched, positions: Sequence[int]) -> Partition:
    """Parts of consecutive kernels: each of `positions` (ascending, of `borders`) is where another part begins.

    Raises ValueError for other positions."""
    allowed = borders(stitched)
    wrong = [k for k in positions if k not in allowed]
    if wrong or list(positions) != sorted(set(positions)):
        raise ValueError(f"no cuts: {list(positions)}; possible are {list(allowed)}, in ascending order")
    return split(stitched, [sum(k >= p for p in positions) for k in range(len(stitched.kernels))])


def split(stitched: Stitched, assignment: Sequence[int]) -> Partition:
    """Kernel k goes to part `assignment[k]`; parts are counted from 0 without a gap, and run in this order.

    Raises ValueError if a part would read what a later one writes, or a value's pieces are in several parts."""
    return _Splitter(stitched, assignment).partition()


class _Splitter:
    def __init__(self, stitched: Stitched, assignment: Sequence[int]) -> None:
        self.stitched, self.graph = stitched, stitched.graph
        self.assignment = tuple(assignment)
        self.count = max(self.assignment, default=0) + 1
        kernels = stitched.kernels
        if len(self.assignment) != len(kernels) or set(self.assignment) != set(range(self.count)):
            raise ValueError(f"{len(kernels)} kernels cannot be split as {list(self.assignment)}")
        self.members = [[k for k, p in zip(kernels, self.assignment, strict=True) if p == q] for q in range(self.count)]
        self.home: dict[Value, int] = {}
        for kernel, part in zip(kernels, self.assignment, strict=True):
            for v in kernel.writes():
                if self.home.setdefault(v, part) != part:
                    raise ValueError(f"{kernel.name} writes a piece of {v.name}, and so does a kernel of another part")
        for kernel, part in zip(kernels, self.assignment, strict=True):
            late = [v.name for v in kernel.reads() if self.home.get(v, 0) > part]
            if late:
                raise ValueError(f"{kernel.name} reads {', '.join(late)}, which a later part writes")
        self.binder: dict[str, int] = {}  # the part whose host steps make a symbol known
        for kernel, part in zip(kernels, self.assignment, strict=True):
            for name in _shown(kernel.writes()) if _is_host(kernel) else ():
                self.binder[name] = min(self.binder.get(name, part), part)
        self.axes: dict[str, tuple[int, int]] = {}  # where the model's inputs show a symbol
        for i, v in enumerate(self.graph.inputs):
            for axis, d in enumerate(v.given):
                if (symbol := dims.lone(d)) is not None:
                    self.axes.setdefault(symbol, (i, axis))

    def partition(self) -> Partition:
        inputs = [self._inputs(p) for p in range(self.count)]
        outputs: list[dict[Value, None]] = [{} for _ in range(self.count)]
        for v in self.graph.outputs:
            outputs[self.home[v]][v] = None
        for row in inputs:
            for v in row:
                if v in self.home:
                    outputs[self.home[v]][v] = None
        places = {v: Made(p, k) for p, row in enumerate(outputs) for k, v in enumerate(row)}
        parts = tuple(self._part(p, inputs[p], tuple(outputs[p]), places) for p in range(self.count))
        return Partition(self.stitched, parts, tuple(places[v] for v in self.graph.outputs))

    # -------------------------------------------------- what a part takes

    def _inputs(self, part: int) -> list[Value]:
        """Inputs of the model and values of earlier parts: those read, and those that show a symbol."""
        if part == 0:
            return list(self.graph.inputs)
        found = self._read(part)
        shown = _shown(found) | self._bound(part)
        for name in sorted(self._needed(part, found) - shown - set(self.axes)):
            if not any(name in _shown([v]) for v in found):
                found.append(self._showing(name, part))
        return found

    def _read(self, part: int) -> list[Value]:
        reads = dict.fromkeys(v for k in self.members[part] for v in k.reads())
        given = set(self.graph.inputs)
        return [v for v in reads if v in given or self.home.get(v, part) != part]

    def _showing(self, symbol: str, part: int) -> Value:
        """A value of an earlier part with a dim that is this symbol: what the host step returned, if nothing else."""
        found = next((v for v, home in self.home.items() if home < part and symbol in _shown([v])), None)
        if found is None:
            raise ValueError(f"part {part} needs the dim {symbol}, which no earlier part makes known")
        return found

    def _needed(self, part: int, inputs: Iterable[Value]) -> set[str]:
        """The symbols without which a part cannot run."""
        found = {s for v in inputs for d in (*v.shape, *v.given) for s in _names(d)}
        for n in self._nodes(part, inputs):
            found |= {s for v in n.outputs for d in v.shape for s in _names(d)} | set(_in_attribute(n.attrs))
        return found | {s for g in self._guards(part) for d in (g.left, g.right) for s in _names(d)}

    def _bound(self, part: int) -> set[str]:
        """Symbols that host steps of the part make known."""
        return {name for name, binder in self.binder.items() if binder == part}

    def _nodes(self, part: int, inputs: Iterable[Value]) -> list[Node]:
        """What its kernels compute, and look through on their way to what is in memory, in the graph's order."""
        stops = set(inputs)
        found = dict.fromkeys(n for k in self.members[part] for n in (*k.nodes, *((k.opaque,) if k.opaque else ())))
        waiting = [v for n in found for v in n.inputs]
        waiting += [v for k in self.members[part] for v in k.reads()]
        while waiting:
            v = waiting.pop()
            n = self.producers.get(v)
            if v not in stops and n is not None and n not in found:
                found[n] = None
                waiting += n.inputs
        return sorted(found, key=self.order.__getitem__)

    # -------------------------------------------------- the part

    def _part(self, part: int, inputs: list[Value], outputs: tuple[Value, ...], places: Mapping[Value, Made]) -> Part:
        nodes = self._nodes(part, inputs)
        number = {v: i for i, v in enumerate(self.graph.inputs)}
        sources: list[Source] = [Given(number[v]) if v in number else places[v] for v in inputs]
        missing = sorted(self._needed(part, inputs) - _shown(inputs) - self._bound(part))
        if missing:
            shape: tuple[Dim, ...] = (*map(dims.symbol, missing), 0)
            inputs = [*inputs, Value("sizes", dtypes.UINT8, shape)]
            sources.append(Sizes(tuple(self.axes[s] for s in missing)))
        names = dict(zip(self.graph.outputs, self.graph.output_names, strict=True))
        graph = replace(
            self.graph, name=f"{self.graph.name}.{part}", inputs=tuple(inputs), outputs=outputs,
            output_names=tuple(names.get(v, v.name) for v in outputs), nodes=tuple(nodes), guards=self._guards(part),
        )  # fmt: skip
        return Part(Stitched(graph, tuple(self.members[part])), tuple(sources))

    def _guards(self, part: int) -> tuple[Guard, ...]:
        found = [*self.graph.guards, *(self.extents if part == 0 else ())]
        return tuple(g for g in found if part in self._checked(g))

    def _checked(self, guard: Guard) -> set[int]:
        """The parts that check a condition."""
        names = _names(guard.left) | _names(guard.right)
        hidden = names - {s for v in self.graph.inputs for d in v.given for s in _names(d)}
        if not hidden:
            return {0}
        known = max(self.binder.get(s, self.count) for s in hidden)
        native = (p for p in range(known + 1, self.count) if not all(map(_is_host, self.members[p])))
        return {known, next(native, known)} if known < self.count else set()

    @cached_property
    def extents(self) -> list[Guard]:
        return self.graph.extents()

    @cached_property
    def producers(self) -> Mapping[Value, Node]:
        return self.graph.producers()

    @cached_property
    def order(self) -> Mapping[Node, int]:
        return {n: i for i, n in enumerate(self.graph.nodes)}


def _shown(values: Iterable[Value]) -> set[str]:
    """Symbols that are a whole dim of some of these, as given."""
    return {name for v in values for d in v.given if (name := dims.lone(d)) is not None}


def _names(d: Dim) -> frozenset[str]:
    return frozenset() if isinstance(d, int) else dims.symbols(d)


def _in_attribute(value: Any) -> Iterator[str]:
    match value:
        case dims.Expr():
            yield from dims.symbols(value)
        case tuple() | list():
            for x in value:
                yield from _in_attribute(x)
        case Mapping():
            for x in value.values():
                yield from _in_attribute(x)


def _is_host(kernel: Kernel) -> bool:
    return kernel.opaque is not None and kernel.opaque.prim == "host"


def _texts(shape: Sequence[Dim]) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d) for d in shape)
