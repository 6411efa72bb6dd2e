"""Values, nodes, graphs, and the builder that makes them.

A graph is a frozen list of nodes in an order of computation. A node applies one primitive (`stitch.ops.primitives`);
it has one output unless it is a host operator. Dtypes and shapes are never stated: they follow from the primitive's
row. The builder broadcasts, promotes Python numbers, evaluates shape arithmetic (`stitch.contents`), and collects as
*guards* the equalities between dims that it had to assume.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stitch import contents, dims, dtypes
from stitch.dims import Dim
from stitch.ops.primitives import PRIMITIVES, Array

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Origin:
    """The ONNX node that a node was made for; what errors and `explain()` speak of."""

    node: str = ""
    operator: str = ""
    domain: str = ""
    opset: int = 0


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor. Identity is by object. `contents`: its elements as Dims, where they are known. `declared`: an input's
    shape in the model's own symbols, where a guard made one of them equal to something else."""

    name: str
    dtype: np.dtype
    shape: Shape
    contents: Array | None = field(default=None, repr=False)
    declared: Shape | None = field(default=None, repr=False)

    @property
    def given(self) -> Shape:
        """An input's shape as the model has it."""
        return self.declared if self.declared is not None else self.shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> Dim:
        return dims.product(self.shape)

    @property
    def bytes(self) -> Dim:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Node:
    """`outputs = prim(*inputs, **attrs)`."""

    prim: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Any]
    origin: Origin = Origin()

    @property
    def output(self) -> Value:
        return self.outputs[0]


@dataclass(frozen=True)
class Guard:
    """`left == right` must hold at run time; `where` says in the user's names who needs it."""

    left: Dim
    right: Dim
    where: str


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order; `outputs` may name inputs or constants, and repeat."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    output_names: tuple[str, ...]
    nodes: tuple[Node, ...]
    guards: tuple[Guard, ...] = ()
    origins: tuple[Origin, ...] = ()  # of an imported graph: every node of the model, used or not

    def check(self) -> None:
        """Raises AssertionError unless every value is defined once, before its uses, and typed by its primitive."""
        defined = set(self.inputs)
        for node in self.nodes:
            assert node.prim in PRIMITIVES, node.prim
            assert all(v in defined for v in node.inputs), f"{node.prim} reads an undefined value"
            assert not any(v in defined for v in node.outputs), f"{node.output.name} is defined twice"
            if node.prim != "host":
                row = PRIMITIVES[node.prim]
                shape = tuple(row.shape(node.attrs, *(v.shape for v in node.inputs)))
                same = all(dims.prove_equal(a, b) is not False for a, b in zip(shape, node.output.shape, strict=True))
                assert same, f"{node.prim}: {shape} is not {node.output.shape}"
            defined.update(node.outputs)
        assert all(v in defined for v in self.outputs), "an output is not defined"
        assert len(self.outputs) == len(self.output_names)

    def extents(self) -> list[Guard]:
        """Guards that no extent is negative, where that is not certain: a window may be larger than what it slides
        over."""
        found: dict[Dim, Guard] = {}
        for n in self.nodes:
            for d in (d for v in n.outputs for d in v.shape):
                if isinstance(d, int) or d in found:
                    continue
                low = dims.bounds(d)[0]
                if low is None or low < 0:
                    found[d] = Guard(dims.dim_min(d, 0), 0, f"{n.origin.operator or n.prim} {n.origin.node!r}")
        return [g for g in found.values() if g.left != 0]

    def producers(self) -> dict[Value, Node]:
        return {v: n for n in self.nodes for v in n.outputs}

    def users(self) -> dict[Value, list[Node]]:
        """Each value's users, one entry per use; graph outputs are not uses."""
        out: dict[Value, list[Node]] = {v: [] for v in self.inputs}
        for node in self.nodes:
            for v in node.outputs:
                out[v] = []
            for v in node.inputs:
                out[v].append(node)
        return out


Operand = Value | int | float | bool


class Builder:
    """Appends nodes and returns their values. All shapes may be symbolic."""

    def __init__(self, name: str = "graph") -> None:
        self.name = name
        self.origin = Origin()
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []
        self.guards: list[Guard] = []
        self._aliases: dict[str, Dim] = {}
        self._names: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._counter = 0

    # -------------------------------------------------- values

    def input(self, name: str, dtype: np.dtype, shape: Sequence[Dim]) -> Value:
        value = Value(name, dtype, tuple(shape))
        self._names.add(name)
        self.inputs.append(value)
        return value

    def const(self, array: Any, dtype: np.dtype | None = None) -> Value:
        """A constant; equal small constants are one value."""
        array = np.asarray(array, dtype)
        key = (array.dtype.name, array.shape, array.tobytes()) if array.size <= contents.LIMIT else None
        if key is not None and key in self._constants:
            return self._constants[key]
        value = self._emit("const", (), {"array": array}, array.dtype, array.shape, contents.of_array(array))
        if key is not None:
            self._constants[key] = value
        return value

    def dims(self, values: Sequence[Dim] | Dim) -> Value:
        """An int64 value holding dims: rank 1 for a sequence, rank 0 for a single one."""
        scalar = not isinstance(values, Sequence)
        flat: list[Any] = [values] if scalar else list(values)  # type: ignore[arg-type]
        array = np.empty(len(flat), object)
        array[:] = flat
        return self._known(array.reshape(()) if scalar else array, dtypes.INT64)

    def fresh(self, hint: str) -> Dim:
        """A symbol that no input defines: the extent of a data-dependent result, bound when it is computed."""
        self._counter += 1
        return dims.symbol(f"{hint}.{self._counter}")

    def fresh_name(self, hint: str) -> str:
        name = hint
        while name in self._names or not name:
            self._counter += 1
            name = f"{hint}.{self._counter}"
        self._names.add(name)
        return name

    # -------------------------------------------------- dims

    def resolve(self, d: Dim) -> Dim:
        """`d` with every symbol replaced that a guard made equal to something else."""
        return dims.substitute(d, self._aliases) if self._aliases and not isinstance(d, int) else d

    def unify(self, a: Dim, b: Dim, where: str = "") -> Dim:
        """One dim for two that must be equal at run time; assumes it by a guard if it cannot be proved.

        Raises ValueError if they are provably different.
        """
        a, b = self.resolve(a), self.resolve(b)
        answer = dims.prove_equal(a, b)
        if answer is None:
            self.guards.append(Guard(a, b, where or self._where()))
            for symbol, other in ((a, b), (b, a)):
                if (name := dims.lone(symbol)) is not None and name not in dims.symbols(other):
                    self._aliases = {k: dims.substitute(v, {name: other}) for k, v in self._aliases.items()}
                    self._aliases[name] = other
                    return other
        elif answer is False:
            raise ValueError(f"dims {a} and {b} differ")
        return b if isinstance(b, int) else a

    def broadcast_shape(self, *shapes: Shape) -> Shape:
        """Numpy's broadcasting. Two unproved extents are taken as equal (a guard), never as a maximum."""
        rank = max((len(s) for s in shapes), default=0)
        out: list[Dim] = [1] * rank
        for s in shapes:
            for i, d in enumerate(s, rank - len(s)):
                if out[i] == 1:
                    out[i] = self.resolve(d)
                elif d != 1:
                    out[i] = self.unify(out[i], d)
        return tuple(out)

    def _where(self) -> str:
        return f"{self.origin.operator} {self.origin.node!r}" if self.origin.operator else "the graph"

    # -------------------------------------------------- nodes

    def apply(self, prim: str, *inputs: Value, **attrs: Any) -> Value:
        """One primitive; its inputs must already fit (see the row). Known contents are evaluated, not emitted."""
        row = PRIMITIVES[prim]
        attrs = {k: self._resolved(v) for k, v in attrs.items()}
        dtype = row.dtype(attrs, *(v.dtype for v in inputs))
        shape = tuple(self.resolve(d) for d in row.shape(attrs, *(v.shape for v in inputs)))
        if any(isinstance(d, int) and d < 0 for d in shape):
            raise ValueError(f"an extent would be negative, in the shape ({', '.join(map(str, shape))})")
        known = None
        if inputs and all(v.contents is not None for v in inputs) and contents.fits(shape):
            known = contents.evaluate(prim, attrs, [v.contents for v in inputs if v.contents is not None], dtype)
            if known is not None and not dtypes.is_float(dtype):
                return self._known(known, dtype)
        return self._emit(prim, inputs, attrs, dtype, shape, known)

    def host(
        self, function: str, inputs: Sequence[Value], outputs: Sequence[tuple[np.dtype, Shape]], **attrs: Any
    ) -> tuple[Value, ...]:
        """A host operator: `stitch.ops.host.FUNCTIONS[function](attrs, *arrays)` returns a tuple of arrays."""
        values = tuple(Value(self.fresh_name(function), d, tuple(s)) for d, s in outputs)
        types = {"dtypes": tuple(d for d, _ in outputs), "shapes": tuple(s for _, s in outputs)}
        attrs = {**attrs, "function": function, **types}
        self.nodes.append(Node("host", tuple(inputs), values, attrs, self.origin))
        return values

    def _emit(
        self, prim: str, inputs: Sequence[Value], attrs: Mapping[str, Any], dtype: np.dtype, shape: Shape,
        known: Array | None,
    ) -> Value:  # fmt: skip
        value = Value(self.fresh_name(f"{prim}.{len(self.nodes)}"), dtype, tuple(shape), known)
        self.nodes.append(Node(prim, tuple(inputs), (value,), dict(attrs), self.origin))
        return value

    def _known(self, known: Array, dtype: np.dtype) -> Value:
        array = contents.to_array(known, dtype)
        if array is not None:
            return self.const(array)
        attrs = {"dims": tuple(known.reshape(-1).tolist()), "shape": known.shape}
        if dtype == dtypes.INT64:
            return self._emit("shape", (), attrs, dtype, known.shape, known)
        wide = self._emit("shape", (), attrs, dtypes.INT64, known.shape, None)
        return self._emit("cast", (wide,), {"dtype": dtype}, dtype, known.shape, known)

    def _resolved(self, v: Any) -> Any:
        if isinstance(v, tuple):
            return tuple(self._resolved(x) for x in v)
        return self.resolve(v) if isinstance(v, dims.Expr) else v

    # -------------------------------------------------- elementwise, with broadcasting and promotion

    def elementwise(self, prim: str, *operands: Operand) -> Value:
        """Applies an elementwise primitive to values and numbers; numbers take the dtype of the values."""
        like = next(v.dtype for v in reversed(operands) if isinstance(v, Value))
        values = [v if isinstance(v, Value) else self.const(v, like) for v in operands]
        shape = self.broadcast_shape(*(v.shape for v in values))
        return self.apply(prim, *(self.broadcast(v, shape) for v in values))

    def unary(self, prim: str, x: Value) -> Value:
        return self.apply(prim, x)

    def add(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("add", x, y)

    def sub(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("sub", x, y)

    def mul(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("mul", x, y)

    def div(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("div", x, y)

    def min(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("min", x, y)

    def max(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("max", x, y)

    def pow(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("pow", x, y)

    def eq(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("eq", x, y)

    def ne(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("ne", x, y)

    def lt(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("lt", x, y)

    def le(self, x: Operand, y: Operand) -> Value:
        return self.elementwise("le", x, y)

    def where(self, c: Value, x: Operand, y: Operand) -> Value:
        if not isinstance(x, Value) and not isinstance(y, Value):
            raise TypeError("where needs a value to take its dtype from")
        return self.elementwise("where", c, x, y)

    def cast(self, x: Value, dtype: np.dtype) -> Value:
        return x if x.dtype == dtype else self.apply("cast", x, dtype=dtype)

    # -------------------------------------------------- reductions

    def reduce(self, prim: str, x: Value, axes: Iterable[int], keepdims: bool = False) -> Value:
        """`prim` in reduce_{sum,prod,max,min}; negative axes count from the end; no axes: x itself."""
        where = tuple(sorted({a % x.rank for a in axes})) if x.rank else ()
        if not where:
            return x
        y = self.apply(prim, x, axes=where)
        return self.reshape(y, [1 if i in where else d for i, d in enumerate(x.shape)]) if keepdims else y

    def mean(self, x: Value, axes: Iterable[int], keepdims: bool = False) -> Value:
        axes = [a % x.rank for a in axes] if x.rank else []
        n = self.cast(self.dims(dims.product([x.shape[a] for a in set(axes)])), x.dtype)
        return self.div(self.reduce("reduce_sum", x, axes, keepdims), n)

    # -------------------------------------------------- movement

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """Same elements, new shape. Raises ValueError if the sizes provably differ; else a guard if unproved."""
        shape = tuple(self.resolve(d) for d in shape)
        if shape == x.shape or shape == tuple(self.resolve(d) for d in x.shape):
            return x
        if dims.factor_segments(x.shape, shape) is None:
            self.unify(dims.product(x.shape), dims.product(shape))
        return self.apply("reshape", x, shape=shape)

    def broadcast(self, x: Value, shape: Sequence[Dim]) -> Value:
        shape = tuple(self.resolve(d) for d in shape)
        same = x.shape == shape or tuple(self.resolve(d) for d in x.shape) == shape
        return x if same else self.apply("broadcast", x, shape=shape)

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        perm = tuple(p % x.rank for p in perm)
        return x if perm == tuple(range(x.rank)) else self.apply("transpose", x, perm=perm)

    def slice(self, x: Value, starts: Sequence[Dim], sizes: Sequence[Dim], steps: Sequence[int] | None = None) -> Value:
        """x[start + step * i] for i < size on every axis; the caller has clamped all three."""
        steps = tuple(steps) if steps is not None else (1,) * x.rank
        if all(s == 0 and t == 1 and n == d for s, t, n, d in zip(starts, steps, sizes, x.shape, strict=True)):
            return x
        return self.apply("slice", x, starts=tuple(starts), sizes=tuple(sizes), steps=steps)

    def pad(self, x: Value, lo: Sequence[Dim], hi: Sequence[Dim], value: float | int | bool = 0) -> Value:
        """Constant padding; lo and hi are not negative."""
        if all(d == 0 for d in (*lo, *hi)):
            return x
        return self.apply("pad", x, lo=tuple(lo), hi=tuple(hi), value=value)

    def concat(self, xs: Sequence[Value], axis: int) -> Value:
        axis = axis % xs[0].rank
        for x in xs[1:]:
            for i, (a, b) in enumerate(zip(xs[0].shape, x.shape, strict=True)):
                if i != axis:
                    self.unify(a, b)
        return xs[0] if len(xs) == 1 else self.apply("concat", *xs, axis=axis)

    def gather(self, data: Value, indices: Sequence[Value], axes: Sequence[int]) -> Value:
        """data at integer indices on `axes` (one value of indices each, of equal shape): (*index shape, *rest)."""
        return self.apply("gather", data, *indices, axes=tuple(a % data.rank for a in axes))

    def iota(self, shape: Sequence[Dim], axis: int) -> Value:
        """int64 values that count along one axis."""
        return self.apply("iota", shape=tuple(shape), axis=axis % len(shape))

    def window(
        self, x: Value, axes: Sequence[int], sizes: Sequence[Dim], strides: Sequence[int], dilations: Sequence[int]
    ) -> Value:
        """Sliding windows: x's axes become positions, and the window's axes are appended."""
        attrs = {"axes": axes, "sizes": sizes, "strides": strides, "dilations": dilations}
        return self.apply("window", x, **{name: tuple(v) for name, v in attrs.items()})

    def contract(
        self, a: Value, b: Value, a_labels: Sequence[int], b_labels: Sequence[int], out: Sequence[int]
    ) -> Value:
        """Einstein summation of two values; equal labels must have equal extents."""
        extent = dict(zip(a_labels, a.shape, strict=True))
        for label, d in zip(b_labels, b.shape, strict=True):
            if label in extent:
                self.unify(extent[label], d)
        return self.apply("contract", a, b, a=tuple(a_labels), b=tuple(b_labels), out=tuple(out))

    # -------------------------------------------------- the graph

    def finish(self, outputs: Mapping[str, Value]) -> Graph:
        """The graph of everything built, with aliased symbols replaced throughout."""
        nodes, table = self.nodes, {v: v for v in self.inputs}
        if self._aliases:
            nodes = []
            table = {v: replace(v, shape=self._resolved(v.shape), declared=v.shape) for v in self.inputs}
            for n in self.nodes:
                for v in n.outputs:
                    table[v] = replace(v, shape=tuple(self.resolve(d) for d in v.shape))
                attrs = {k: self._resolved(v) for k, v in n.attrs.items()}
                ins, outs = (tuple(table[v] for v in vs) for vs in (n.inputs, n.outputs))
                nodes.append(replace(n, inputs=ins, outputs=outs, attrs=attrs))
        outs = tuple(table.get(v, v) for v in outputs.values())
        inputs = tuple(table[v] for v in self.inputs)
        return Graph(self.name, inputs, outs, tuple(outputs), tuple(nodes), tuple(self.guards))
