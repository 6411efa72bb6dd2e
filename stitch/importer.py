"""ONNX models into graphs of primitives. Only `stitch.source`, this module and `stitch.backend` know onnx.

    graph = load("model.onnx")                                   # a path, the file's bytes, or an onnx.ModelProto
    graph = load("model.onnx", shapes={"x": ["batch", 3, 224, 224]})

Nodes are built on demand, from the outputs backwards, in the file's order where it is a possible one: whatever no
output needs is never looked at. An operator that the registry does not know is replaced by its function body, the
model's own or ONNX's; an `If` whose condition is known, by the branch that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stitch import contents, dtypes, evaluate
from stitch.errors import InvalidModel, StitchError, UnsupportedOperator
from stitch.graph import Builder, Graph, Node, Origin, Value
from stitch.inputs import Shapes, input_shapes
from stitch.ops import (  # each registers its operators
    activations,  # noqa: F401
    attention,  # noqa: F401
    constants,  # noqa: F401
    contractions,  # noqa: F401
    convolution,  # noqa: F401
    elementwise,  # noqa: F401
    indexing,  # noqa: F401
    logic,  # noqa: F401
    losses,  # noqa: F401
    movement,  # noqa: F401
    normalisations,  # noqa: F401
    pooling,  # noqa: F401
    quantisation,  # noqa: F401
    reductions,  # noqa: F401
    registry,
    resize,  # noqa: F401
    transposed,  # noqa: F401
)
from stitch.ops.primitives import Array
from stitch.ops.registry import Call
from stitch.source import (
    NoType,
    Source,
    array_of,
    body_of,
    check_text,
    complaint_about,
    declared_shape,
    dense_of,
    domain_of,
    element_type,
    graphs_of,
    mismatch_of,
    opsets_of,
    reads_of,
    unique,
)

if TYPE_CHECKING:
    import onnx

    from stitch.source import Attributes, Model

Results: TypeAlias = tuple[Value | None, ...]

_FOLDABLE = 1 << 20  # elements: larger values are not computed for an operator that asks for a constant
_DEPTH = 64  # functions and branches inside each other


def load(model: Model, shapes: Shapes | None = None, opened: list[Path] | None = None) -> Graph:
    """The graph of a model. `shapes` replaces the shapes of inputs by name; None in one is an unknown extent.
    `opened` receives the paths of the files with external data.

    Raises InvalidModel for what is no correct model, UnsupportedOperator for what is one but cannot be compiled.
    """
    source = Source.open(model)
    graph = _Importer(source).graph(shapes or {})
    if opened is not None:
        opened += source.folder.opened
    return graph


# ------------------------------------------------------------------ nodes


class _Constants(Mapping[Value, Array]):
    """The elements of values that follow from constants alone, computed when an operator asks for them."""

    def __init__(self, builder: Builder) -> None:
        self._nodes = builder.nodes
        self._producers: dict[Value, Node] = {}
        self._seen = 0
        self._found: dict[Value, Array | None] = {}

    def __getitem__(self, value: Value) -> Array:
        for node in self._nodes[self._seen :]:
            self._producers.update((v, node) for v in node.outputs)
        self._seen = len(self._nodes)
        waiting = [value]
        while waiting:
            v = waiting.pop()
            if v in self._found:
                continue
            made = self._producers.get(v)
            if made is None or made.prim == "host" or not (made.prim == "const" or _is_small(v)):
                self._found[v] = None
            elif missing := [i for i in made.inputs if i not in self._found]:
                waiting += [v, *missing]
            else:
                self._found[v] = _fold(made, [self._found[i] for i in made.inputs])
        array = self._found[value]
        if array is None:
            raise KeyError(value)
        return array

    def __iter__(self) -> Iterator[Value]:
        return iter([v for v, array in self._found.items() if array is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _is_small(value: Value) -> bool:
    size = value.size
    return isinstance(size, int) and size <= _FOLDABLE


def _fold(node: Node, inputs: Sequence[Array | None]) -> Array | None:
    arrays = [x for x in inputs if x is not None]
    if len(arrays) < len(inputs):
        return None
    try:
        return evaluate.apply(node, arrays, {})[0]
    except KeyError:  # an attribute holds a symbol
        return None


@dataclass(eq=False)
class _Scope:
    """The names of a graph, a branch or a function's body, and how far its nodes have been built."""

    nodes: Sequence[onnx.NodeProto]
    opsets: Mapping[str, int]
    parent: _Scope | None = None  # whose names are seen from here
    prefix: str = ""  # before the names of nodes
    origin: Origin | None = None  # of everything here, in the body of one of ONNX's own operators
    attributes: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)  # of the function that is called
    values: dict[str, Value | None] = field(default_factory=dict)
    sources: dict[str, Callable[[], Array]] = field(default_factory=dict)  # initializers, not read yet
    producers: dict[str, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)  # names that somebody reads
    built: set[int] = field(default_factory=set)
    active: dict[int, None] = field(default_factory=dict)  # nodes whose inputs are being built, outermost first

    def __post_init__(self) -> None:
        for i, node in enumerate(self.nodes):
            check_text(node.op_type, node.name, node.domain, *node.input, *node.output)
            for name in filter(None, node.output):
                # Models are patched by appending a second Constant of a name: the last one holds, as in onnxruntime.
                other = self.nodes[self.producers[name]].op_type if name in self.producers else "Constant"
                again = name in self.producers and (node.op_type, other) != ("Constant", "Constant")
                if again or name in self.values or name in self.sources:
                    raise InvalidModel(f"value {name!r} is defined twice", node=self.label(i))
                self.producers[name] = i

    def label(self, index: int) -> str:
        node = self.nodes[index]
        return self.prefix + (node.name or f"{node.op_type}_{index}")

    def owner(self, name: str) -> _Scope | None:
        scope: _Scope | None = self
        while scope and not (name in scope.values or name in scope.sources or name in scope.producers):
            scope = scope.parent
        return scope


class _Importer:
    def __init__(self, source: Source) -> None:
        proto = source.proto
        check_text(proto.graph.name, *(s for f in proto.functions for s in (f.domain, f.name, f.overload)))
        self.source = source
        self.builder = Builder(proto.graph.name or "graph")
        self.constants = _Constants(self.builder)
        self.functions = {(domain_of(f.domain), f.name, f.overload): f for f in proto.functions}
        self.depth = 0

    # -------------------------------------------------- graphs

    def graph(self, shapes: Shapes) -> Graph:
        proto = self.source.proto
        opsets = opsets_of(proto.opset_import)
        sources = self._initializers(proto.graph, self.source.lifted)
        inputs = unique([v for v in proto.graph.input if v.name not in sources], "input")
        typed = {v.name: self._input_dtype(v) for v in inputs}
        usable = {v.name: declared_shape(v) for v in inputs if isinstance(typed[v.name], np.dtype)}
        shaped, guards = input_shapes(usable, shapes)
        self.builder.guards += guards
        values: dict[str, Value | None] = {}
        for name, dtype in typed.items():
            if isinstance(dtype, str):
                sources[name] = _raiser(NoType(dtype))
            else:
                values[name] = self.builder.input(name, dtype, shaped[name])
        scope = _Scope(proto.graph.node, opsets, values=values, sources=sources)
        names = [v.name for v in unique(proto.graph.output, "output")]
        if not names:
            raise InvalidModel("the model has no outputs")
        try:
            found = self.builder.finish(self._outputs(scope, names))
            return replace(found, origins=tuple(Origin(scope.label(i), n.op_type) for i, n in enumerate(scope.nodes)))
        except NoType as problem:
            raise UnsupportedOperator("graph output", opset=opsets.get("", 0), dtype=problem.name) from None

    def _initializers(
        self, graph: onnx.GraphProto, lifted: Mapping[int, memoryview] | None = None
    ) -> dict[str, Callable[[], Array]]:
        folder = self.source.folder
        found: dict[str, Callable[[], Array]] = {}
        dense = [(t.name, partial(array_of, t, folder, (lifted or {}).get(i))) for i, t in enumerate(graph.initializer)]
        sparse = [(t.values.name, partial(dense_of, t, folder)) for t in graph.sparse_initializer]
        check_text(*(name for name, _ in dense + sparse))
        for name, read in dense + sparse:
            if name in found or not name:
                raise InvalidModel(f"initializer {name!r} is defined twice" if name else "an initializer has no name")
            found[name] = read
        return found

    def _input_dtype(self, value: onnx.ValueInfoProto) -> np.dtype | str:
        kind = value.type.WhichOneof("value")
        if kind is None:
            raise InvalidModel(f"input {value.name!r} has no type")
        if kind != "tensor_type":
            return str(kind).removesuffix("_type")
        try:
            return element_type(value.type.tensor_type.elem_type)
        except InvalidModel as problem:
            raise InvalidModel(f"input {value.name!r}: {problem.problem}") from None

    def _outputs(self, scope: _Scope, names: Sequence[str]) -> dict[str, Value]:
        """The values of these names, with what they need of the scope's nodes built."""
        live: set[int] = set()
        inside: set[int] = set()  # what only a branch of a node reads, and may turn out not to need
        waiting = [(name, live) for name in names]
        scope.read.update(names)
        while waiting:
            name, found = waiting.pop()
            index = scope.producers.get(name)
            if index is not None and index not in live and index not in found:
                found.add(index)
                node, reads = scope.nodes[index], [*reads_of(scope.nodes[index])]
                scope.read.update(reads)
                waiting += [(name, found if name in node.input else inside) for name in reads]
        for index in sorted(live):
            self._demand(scope, index)
        out = {}
        for name in names:
            value = self._value(scope, name)
            if value is None:
                raise InvalidModel(f"output {name!r} is not the output of any node, an input or an initializer")
            out[name] = value
        return out

    def _value(self, scope: _Scope, name: str) -> Value | None:
        """The value of a name. None for the empty one, an omitted argument, and one that is not defined."""
        owner = scope.owner(name) if name else None
        if owner is None:
            return None
        if name not in owner.values:
            if name in owner.sources:
                array = owner.sources[name]()
                self.builder.origin = Origin(name, "initializer")
                owner.values[name] = self.builder.const(array)
            else:
                self._demand(owner, owner.producers[name])
        return owner.values.get(name)

    def _demand(self, scope: _Scope, index: int) -> None:
        """Builds a node after those that it depends on."""
        waiting = [index]
        while waiting:
            i = waiting[-1]
            if i in scope.built:
                waiting.pop()
                continue
            needed = [scope.producers[name] for name in scope.nodes[i].input if name in scope.producers]
            missing = [j for j in needed if j not in scope.built]
            scope.active[i] = None
            for j in missing or ():
                self._check_acyclic(scope, j)
            if missing:
                waiting += reversed(missing)
                continue
            self._build(scope, i)
            scope.built.add(i)
            del scope.active[i]
            waiting.pop()

    def _check_acyclic(self, scope: _Scope, index: int) -> None:
        if index in scope.active:
            path = list(scope.active)
            cycle = [scope.label(i) for i in path[path.index(index) :]]
            raise InvalidModel(f"nodes depend on each other in a cycle: {', '.join(map(repr, cycle))}")

    # -------------------------------------------------- nodes

    def _build(self, scope: _Scope, index: int) -> None:
        node, label = scope.nodes[index], scope.label(index)
        domain = domain_of(node.domain)
        local = self.functions.get((domain, node.op_type, node.overload))
        opset = scope.opsets.get(domain, 1 if local is not None else None)
        if opset is None:
            problem = f"the model does not say which version of the operator set {domain or 'ai.onnx'} it uses"
            raise InvalidModel(f"{node.op_type}: {problem}", node=label)
        call = Call(
            node.op_type, label, opset, {}, tuple(n if n in scope.read else "" for n in node.output),
            domain=domain, constants=self.constants,
        )  # fmt: skip
        try:
            call = replace(call, inputs=self._arguments(scope, node, call))
            attributes = self._attributes(scope, node, call)
            if domain == registry.DOMAIN and opset > registry.NEWEST:
                raise call.unsupported(
                    f"operator sets are known up to {registry.NEWEST}; export the model for one of them"
                )
            if domain == registry.DOMAIN and (reason := mismatch_of(call)) is not None:
                raise call.invalid(reason)
            if domain == "" and node.op_type == "If":
                results = self._branch(scope, call, attributes)
            elif registry.lookup(node.op_type, opset, domain) is not None:
                plain = {name: a for name, a in attributes.items() if not graphs_of(a)}
                read = {name: self._attribute(a, call) for name, a in plain.items()}
                self.builder.origin = scope.origin or Origin(label, node.op_type, domain, opset)
                results = self._apply(replace(call, attrs=read), node)
            elif (function := local or body_of(node, call, attributes)) is not None:
                results = self._inline(scope, call, attributes, function, own=local is None)
            else:
                raise call.unsupported(_ADVICE.get(node.op_type, ""))
        except NoType as problem:
            raise UnsupportedOperator(
                call.operator, node=label, domain=domain, opset=opset, dtype=problem.name
            ) from None
        for i, name in enumerate(node.output):
            if name in scope.read and name and (i >= len(results) or results[i] is None):
                raise call.unsupported(f"its output {i}, {name!r}, is not computed")
        scope.values.update(zip(node.output, map(self._counted, results), strict=False))

    def _counted(self, value: Value | None) -> Value | None:
        """A few integers that follow from constants by way of floats, as in int(ceil(h / 2)), as a constant: what
        puts them together with symbols, to make a shape, looks no further back."""
        if value is None or value.contents is not None or not dtypes.is_integer(value.dtype):
            return value
        array = self.constants.get(value) if contents.fits(value.shape) else None
        return value if array is None else self.builder.const(array)

    def _apply(self, call: Call, node: onnx.NodeProto) -> Results:
        try:
            return registry.apply(self.builder, call)
        except StitchError:
            raise
        except Exception as problem:  # most likely an attribute that is missing or of another type
            reason = complaint_about(node, call) or f"{type(problem).__name__}: {problem}"
            raise call.invalid(reason) from problem

    def _arguments(self, scope: _Scope, node: onnx.NodeProto, call: Call) -> Results:
        values = [self._value(scope, name) for name in node.input]
        for name, value in zip(node.input, values, strict=True):
            if name and value is None and scope.owner(name) is None:
                raise call.invalid(f"it reads {name!r}, which nothing defines")
        while values and values[-1] is None:
            values.pop()
        return tuple(values)

    def _attributes(self, scope: _Scope, node: onnx.NodeProto, call: Call) -> Attributes:
        """A node's attributes by name, references to those of the function around it replaced."""
        found: dict[str, onnx.AttributeProto] = {}
        for a in node.attribute:
            if a.name in found:
                raise call.invalid(f"attribute {a.name!r} is given twice")
            if not a.ref_attr_name:
                found[a.name] = a
            elif a.ref_attr_name in scope.attributes:
                found[a.name] = scope.attributes[a.ref_attr_name]
        return found

    def _attribute(self, a: onnx.AttributeProto, call: Call) -> Any:
        folder = self.source.folder
        kind = a.AttributeType.Name(a.type)
        try:
            match kind:
                case "INT":
                    return a.i
                case "FLOAT":
                    return a.f
                case "STRING":
                    return a.s.decode("utf-8", "surrogateescape")
                case "INTS":
                    return tuple(a.ints)
                case "FLOATS":
                    return tuple(a.floats)
                case "STRINGS":
                    return tuple(s.decode("utf-8", "surrogateescape") for s in a.strings)
                case "TENSOR":
                    return array_of(a.t, folder)
                case "TENSORS":
                    return tuple(array_of(t, folder) for t in a.tensors)
                case "SPARSE_TENSOR":
                    return dense_of(a.sparse_tensor, folder)
        except InvalidModel as problem:
            raise call.invalid(problem.problem) from None
        raise call.unsupported(f"its attribute {a.name!r} of type {kind} is unknown")

    # -------------------------------------------------- graphs in nodes

    def _branch(self, scope: _Scope, call: Call, attributes: Attributes) -> Results:
        """The outputs of the branch that an If is known to take."""
        condition = call.inputs[0] if call.inputs else None
        if condition is None or not all(attributes[b].HasField("g") for b in _BRANCHES if b in attributes):
            raise call.invalid("it has no condition")
        array = call.constant(condition, "condition")
        if array.size != 1 or array.dtype != dtypes.BOOL:
            raise call.invalid("its condition is not a single bool")
        taken = attributes.get(_BRANCHES[0] if array.item() else _BRANCHES[1])
        if taken is None or len(taken.g.output) != len(call.outputs):
            raise call.invalid("a branch is missing, or has another number of outputs")
        inner = replace(
            scope, nodes=taken.g.node, parent=scope, values={}, sources=self._initializers(taken.g), producers={},
            read=set(), built=set(), active={},
        )  # fmt: skip
        wanted = [out.name for out, read in zip(taken.g.output, call.outputs, strict=True) if read]
        return self._nested(inner, wanted, [out.name for out in taken.g.output], call)

    def _inline(
        self, scope: _Scope, call: Call, attributes: Attributes, function: onnx.FunctionProto, own: bool
    ) -> Results:
        """The outputs of a function's body. `own`: it is the body of one of ONNX's own operators."""
        if len(call.inputs) > len(function.input) or len(call.outputs) > len(function.output):
            raise call.invalid("it has more inputs or outputs than its function")
        given = [*call.inputs, *[None] * (len(function.input) - len(call.inputs))]
        defaults = {a.name: a for a in function.attribute_proto}
        opsets = opsets_of(function.opset_import)
        inner = _Scope(
            function.node, {**scope.opsets, **opsets} if own else opsets, prefix=f"{call.node}/",
            attributes={**defaults, **attributes},
            origin=(scope.origin or Origin(call.node, call.operator, call.domain, call.opset)) if own else scope.origin,
            values=dict(zip(function.input, given, strict=True)),
        )  # fmt: skip
        wanted = [name for name, read in zip(function.output, call.outputs, strict=False) if read]
        return self._nested(inner, wanted, function.output, call)

    def _nested(self, inner: _Scope, wanted: Sequence[str], outputs: Iterable[str], call: Call) -> Results:
        if self.depth == _DEPTH:
            raise call.invalid(f"functions are nested more than {_DEPTH} deep, or without end")
        self.depth += 1
        found = self._outputs(inner, wanted)
        self.depth -= 1
        return tuple(found.get(name) for name in outputs)


_BRANCHES = ("then_branch", "else_branch")

_ADVICE = {
    "Loop": "unroll the loop when exporting",
    "Scan": "unroll the loop when exporting",
}


def _raiser(problem: Exception) -> Callable[[], Array]:
    def read() -> Array:
        raise problem

    return read
