"""Rebuilding a graph node by node under rules: the machinery of `stitch.simplify`.

`rewrite(graph, rules)` visits the nodes in order. A rule sees one proposed node (a `Step`) whose inputs are already
rewritten, and the `Rewriter`; it returns the value to use instead, or None. Whatever it emits goes through the rules
too, so a rule only has to make progress by one step, and must not undo another's. Every rule of a table is thus tried
once per node: a pass is linear in the graph.

Two things hold after any pass: equal nodes are one (the first's name and origin are kept), and no node is dead. A node
to which nothing happened is the same object as before, and so is a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from stitch import contents, dims, dtypes
from stitch.dims import Dim
from stitch.graph import Graph, Node, Origin, Shape, Value
from stitch.ops.primitives import PRIMITIVES, Array

_SMALL = 4096  # bytes: constants up to here are compared by their bytes, larger ones by a sample first


@dataclass(frozen=True, slots=True)
class Step:
    """A node that is about to be emitted."""

    prim: str
    inputs: tuple[Value, ...]
    attrs: Mapping[str, Any]
    dtype: np.dtype
    shape: Shape
    known: Array | None = None  # contents

    @property
    def x(self) -> Value:
        return self.inputs[0]


Rule: TypeAlias = Callable[["Rewriter", Step], Value | None]
Rules: TypeAlias = Mapping[str, Sequence[Rule]]  # by primitive


def for_each(prims: Iterable[str], *rules: Rule) -> Rules:
    return dict.fromkeys(prims, rules)


def merged(*tables: Rules) -> Rules:
    """One table: the rules of a primitive in the order of the tables."""
    out: dict[str, list[Rule]] = {}
    for table in tables:
        for prim, rules in table.items():
            out.setdefault(prim, []).extend(rules)
    return out


def rewrite(graph: Graph, rules: Rules, override: Mapping[Node, Callable[[Rewriter], Value]] | None = None) -> Graph:
    """The graph under the rules; `override` makes the values of some nodes in its own way."""
    r = Rewriter(graph, rules)
    for node in graph.nodes:
        r.visit(node, (override or {}).get(node))
    return r.finish()


class Rewriter:
    """The new graph as far as it is built. `emit` is the builder's `apply`, under rules."""

    def __init__(self, graph: Graph, rules: Rules) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.origin = Origin()
        self._rules = rules
        self._table: dict[Value, Value] = {v: v for v in graph.inputs}
        self._makers: dict[Value, Node] = {}
        self._seen: dict[Any, Value] = {}
        self._proposed: set[Any] = set()
        self._constants = Constants()
        self._names = {v.name for v in graph.inputs} | {v.name for n in graph.nodes for v in n.outputs}

    # -------------------------------------------------- looking

    def new(self, old: Value) -> Value:
        """What a value of the old graph has become."""
        return self._table[old]

    def maker(self, v: Value, prim: str = "") -> Node | None:
        """The node that makes `v`, if there is one, and of that primitive."""
        node = self._makers.get(v)
        return node if node is not None and (not prim or node.prim == prim) else None

    def array(self, v: Value) -> Array | None:
        """The elements of a constant."""
        node = self.maker(v, "const")
        return None if node is None else node.attrs["array"]

    def number(self, v: Value) -> Any:
        """The one number, a numpy scalar, that all elements of `v` are known to be; else None."""
        node = self.maker(v)
        while node is not None and node.prim in ("broadcast", "reshape"):
            node = self.maker(node.inputs[0])
        if node is None or node.prim != "const" or node.attrs["array"].size != 1:
            return None
        return node.attrs["array"].reshape(-1)[0]

    def seen(self, prim: str, *inputs: Value, **attrs: Any) -> bool:
        """Whether exactly this node is in the new graph already."""
        return self._key(prim, inputs, attrs) in self._seen

    # -------------------------------------------------- emitting

    def visit(self, node: Node, make: Callable[[Rewriter], Value] | None) -> None:
        self.origin = node.origin
        inputs = tuple([self._table[v] for v in node.inputs])
        if node.prim == "host":
            same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
            self._append(node if same else Node("host", inputs, node.outputs, node.attrs, node.origin))
            self._table.update((v, v) for v in node.outputs)
            return
        value = make(self) if make is not None else self._propose(node.prim, inputs, node.attrs, node)
        self._table[node.output] = value

    def emit(self, prim: str, *inputs: Value, **attrs: Any) -> Value:
        """The value of a primitive, as simple as the rules make it."""
        return self._propose(prim, inputs, attrs, None)

    def _propose(self, prim: str, inputs: tuple[Value, ...], attrs: Mapping[str, Any], old: Node | None) -> Value:
        row = PRIMITIVES[prim]
        if old is not None:
            dtype, shape = old.output.dtype, old.output.shape
        else:
            dtype, shape = row.dtype(attrs, *[v.dtype for v in inputs]), row.shape(attrs, *[v.shape for v in inputs])
        known = old.output.contents if old is not None else None
        step = Step(prim, inputs, attrs, dtype, tuple(shape), known)
        key = self._key(prim, inputs, attrs)
        if key is None or key not in self._proposed:  # else two rules undo each other: it stays as it is
            self._proposed.add(key)
            try:
                for rule in self._rules.get(prim, ()):
                    if (made := rule(self, step)) is not None:
                        return made
            finally:
                self._proposed.discard(key)
        found = self._seen.get(key) if prim != "const" else self._constants.find(attrs["array"])
        if found is None:
            found = self._make(step, old)
            if prim == "const":
                self._constants.keep(attrs["array"], found)
            else:
                self._seen[key] = found
        return found

    def _make(self, step: Step, old: Node | None) -> Value:
        prim, inputs, attrs = step.prim, step.inputs, step.attrs
        if old is not None and all(a is b for a, b in zip(inputs, old.inputs, strict=True)):
            node = old
        else:
            known = step.known
            if known is None and prim == "const":
                known = contents.of_array(attrs["array"])
            elif known is None and prim == "shape":
                known = np.empty(len(attrs["dims"]), object)
                known[:] = attrs["dims"]
                known = known.reshape(attrs["shape"])
            name = old.output.name if old is not None else self._fresh(prim)
            node = Node(prim, inputs, (Value(name, step.dtype, step.shape, known),), attrs, self.origin)
        self._append(node)
        return node.output

    def _append(self, node: Node) -> None:
        self.nodes.append(node)
        for v in node.outputs:
            self._makers[v] = node

    def _fresh(self, prim: str) -> str:
        name = f"{prim}.{len(self.nodes)}"
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    @staticmethod
    def _key(prim: str, inputs: tuple[Value, ...], attrs: Mapping[str, Any]) -> Any:
        """Numbers are told apart by their text: 0.0, -0.0, 0 and False are not one, and a NaN is."""
        if prim == "const":
            return None
        plain = (tuple, str, dims.Expr, np.dtype)
        return prim, inputs, *((k, v if isinstance(v, plain) else repr(v)) for k, v in attrs.items())

    # -------------------------------------------------- common things to emit

    def const(self, array: Any, dtype: np.dtype | None = None) -> Value:
        return self.emit("const", array=np.asarray(array, dtype))

    def dims(self, known: Array) -> Value:
        """An int64 value that holds dims."""
        array = contents.to_array(known, dtypes.INT64)
        if array is not None:
            return self.const(array)
        return self.emit("shape", dims=tuple(known.reshape(-1).tolist()), shape=known.shape)

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        return x if x.shape == tuple(shape) else self.emit("reshape", x, shape=tuple(shape))

    def broadcast(self, x: Value, shape: Sequence[Dim]) -> Value:
        return x if x.shape == tuple(shape) else self.emit("broadcast", x, shape=tuple(shape))

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        return x if tuple(perm) == tuple(range(x.rank)) else self.emit("transpose", x, perm=tuple(perm))

    def slice(self, x: Value, starts: Sequence[Dim], sizes: Sequence[Dim], steps: Sequence[int]) -> Value:
        return self.emit("slice", x, starts=tuple(starts), sizes=tuple(sizes), steps=tuple(steps))

    def uniform(self, number: Any, dtype: np.dtype, shape: Sequence[Dim]) -> Value:
        """A value all of whose elements are `number`."""
        return self.broadcast(self.const(number, dtype), shape)

    # -------------------------------------------------- the result

    def finish(self) -> Graph:
        old = self.graph
        outputs = tuple([self._table[v] for v in old.outputs])
        nodes = live(self.nodes, outputs, old)
        same = len(nodes) == len(old.nodes) and all(a is b for a, b in zip(nodes, old.nodes, strict=True))
        if same and all(a is b for a, b in zip(outputs, old.outputs, strict=True)):
            return old
        return Graph(old.name, old.inputs, outputs, old.output_names, tuple(nodes), old.guards)


def live(nodes: Sequence[Node], outputs: Sequence[Value], graph: Graph) -> list[Node]:
    """The nodes that an output needs. A host operator is also needed for the symbols in its outputs' shapes, which
    nothing else binds, if a guard or a shape speaks of them."""
    needed = set(outputs)
    bound = {s for v in graph.inputs for d in v.shape for s in dims.symbols(d)}
    data_dependent = any(n.prim == "host" for n in nodes)
    wanted: set[str] = set()
    if data_dependent:
        wanted.update(*(dims.symbols(d) - bound for g in graph.guards for d in (g.left, g.right)))
    kept: list[Node] = []
    for node in reversed(nodes):
        if not any(v in needed for v in node.outputs):
            if node.prim != "host":
                continue
            if not any(dims.symbols(d) & wanted for v in node.outputs for d in v.shape):
                continue
        needed.update(node.inputs)
        if data_dependent:
            shapes = [v.shape for v in (*node.inputs, *node.outputs)]
            tuples = [v for v in node.attrs.values() if isinstance(v, tuple)]
            for d in (d for t in (*shapes, *tuples) for d in t if isinstance(d, dims.Expr)):
                wanted |= dims.symbols(d) - bound
        kept.append(node)
    kept.reverse()
    return kept


class Constants:
    """Finds an equal constant. Large ones are compared in full only if dtype, shape and a sample agree."""

    def __init__(self) -> None:
        self._found: dict[Any, list[tuple[Array, Value]]] = {}

    def find(self, array: Array) -> Value | None:
        for other, value in self._found.get(self._key(array), ()):
            if array.nbytes <= _SMALL or _same_memory(array, other) or _same_bits(array, other):
                return value
        return None

    def keep(self, array: Array, value: Value) -> None:
        self._found.setdefault(self._key(array), []).append((array, value))

    @staticmethod
    def _key(array: Array) -> Any:
        if array.nbytes <= _SMALL:
            return array.dtype, array.shape, array.tobytes()
        # No reshape: of a transposed view it would be a copy.
        sample = array[np.unravel_index(np.linspace(0, array.size - 1, 16, dtype=np.int64), array.shape)]
        return array.dtype, array.shape, sample.tobytes()


def _same_memory(a: Array, b: Array) -> bool:
    return a.ctypes.data == b.ctypes.data and a.strides == b.strides


def _same_bits(a: Array, b: Array) -> bool:
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(a.view(bits), b.view(bits))
