"""A model cut into regions: those that stitch compiles, and those that another runtime has to run.

    before    MatMul -> Gelu -> LSTM -> Add -> LSTM -> Softmax        LSTM: no operator that stitch has
    after     (MatMul Gelu) (LSTM) (Add) (LSTM) (Softmax)             each an ONNX model of its own, in order

Nodes are sorted in the order of data: a region takes every node of its kind that is ready, and what becomes ready by
that, before one of the other kind begins. So regions are as large as they can be, each follows from earlier ones, and
there are as few of them as possible.

What follows from constants and shapes alone (the target of a Reshape, say) is no region's: each that reads it computes
it again, so that a region knows its shapes rather than being handed them as data.

This module knows onnx, as it takes apart the models that the importer refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import onnx

from stitch import importer
from stitch.errors import InvalidModel, ResourceError, UnknownInput, UnsupportedOperator
from stitch.inputs import Shapes
from stitch.plan import Port
from stitch.source import Source, declared_shape, domain_of, element_type, graphs_of

Kind = Literal["stitch", "delegate"]

UNSUPPORTED, UNTYPED, WHOLE, FASTER = "unsupported_operator", "unknown_rank", "unknown_type", "faster"
REASONS: Mapping[str, str] = {
    UNSUPPORTED: "stitch does not support the operator, or this variant of it",
    UNTYPED: "it reads what a delegated node makes, and nothing says of which rank that is",
    FASTER: "it was measured to be faster there",
    WHOLE: "nothing says of which type a value is that would pass from one region to another",
}


@dataclass(frozen=True)
class Reason:
    """`code`: one of REASONS; `text`: what exactly."""

    code: str
    text: str


@dataclass(frozen=True, eq=False)
class Region:
    """`nodes`: names of the nodes that it was made for, without what it computes again."""

    kind: Kind
    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Delegation:
    """Regions in order; `reasons` by node, for those that are delegated; `loose`: inputs of whose shapes nothing is
    known."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    regions: tuple[Region, ...]
    reasons: Mapping[str, Reason]
    loose: frozenset[str] = frozenset()


def open_model(model: Any, shapes: Shapes | None = None) -> onnx.ModelProto:
    """The model with external data read and every node named, as the importer names it. Raises InvalidModel."""
    if isinstance(model, onnx.ModelProto | bytes):
        source = Source.open(model)
        proto = onnx.ModelProto()
        proto.CopyFrom(source.proto if isinstance(model, onnx.ModelProto) else onnx.load_from_string(model))
    else:
        Source.open(model)  # which says what is wrong with the file
        proto = onnx.load(str(model))
    taken: set[str] = set()
    for i, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
        while node.name in taken:  # which ONNX allows
            node.name += f".{i}"
        taken.add(node.name)
    _reshape({v.name: v for v in proto.graph.input}, shapes or {})
    return proto


def _reshape(inputs: Mapping[str, onnx.ValueInfoProto], shapes: Shapes) -> None:
    """Other dims for inputs, as `stitch.inputs` understands them."""
    for name, shape in shapes.items():
        if name not in inputs:
            raise UnknownInput(name, inputs=inputs)
        tensor = inputs[name].type.tensor_type
        if tensor.HasField("shape") and len(tensor.shape.dim) != len(shape):
            problem = (
                f"input {name!r} has rank {len(tensor.shape.dim)}, but the shape given for it has rank {len(shape)}"
            )
            raise InvalidModel(problem, advice="give one extent, name or None for each axis")
        tensor.shape.ClearField("dim")
        for dim in shape:
            if isinstance(dim, int):
                tensor.shape.dim.add().dim_value = dim
            else:
                tensor.shape.dim.add().dim_param = dim or ""


class Cutter:
    """Regions for what is marked so far. Mark more with `refuse` until every region compiles."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto, self.graph = proto, proto.graph
        self.nodes = _live(proto.graph)
        self.reasons: dict[str, Reason] = {}
        self.weights = {t.name: t for t in self.graph.initializer}
        self.sparse = {t.values.name: t for t in self.graph.sparse_initializer}
        self.given = [v for v in self.graph.input if v.name not in self.weights and v.name not in self.sparse]
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.types = _types(proto)

    def refuse(self, error: UnsupportedOperator) -> bool:
        """Marks the nodes that an error is about; False if all of them are marked already."""
        own = [n for n in self.nodes if error.node == n.name or error.node.startswith(f"{n.name}/")]
        longest = max((len(n.name) for n in own), default=0)
        found = [n for n in own if len(n.name) == longest]
        # Inside a branch, nodes are called after their place there: any node with a branch may be meant.
        found = found or [n for n in self.nodes if any(a.HasField("g") for a in n.attribute)] or self.nodes
        fresh = [n for n in found if n.name not in self.reasons]
        kind = f" for {error.dtype}" if error.dtype else ""
        why = Reason(UNSUPPORTED, f"operator {error.operator} ({error.domain}, opset {error.opset}){kind}")
        for n in fresh:
            self.reasons[n.name] = why
        if fresh and error.dtype is None:  # most likely others with the operator are refused as well
            same = {(n.op_type, n.domain) for n in fresh}
            for n in self.nodes:
                if (n.op_type, n.domain) in same and n.name not in self.reasons and not _known(self.proto, n):
                    self.reasons[n.name] = why
        return bool(fresh)

    def marked(self, reasons: Mapping[str, Reason]) -> Cutter:
        """Another one, for the same model, in which these nodes are marked as well, if they are not yet."""
        other = copy(self)
        other.reasons = {**{n.name: reasons[n.name] for n in self.nodes if n.name in reasons}, **self.reasons}
        return other

    def cut(self) -> Delegation:
        """Raises InvalidModel for a cyclic graph."""
        while True:
            orders = [self._ordered(first) for first in ("stitch", "delegate")]
            regions = self._regions(min(orders, key=len))
            if self._typed(regions):
                break
        inputs = tuple(_port(v) for v in self.given)
        outputs = tuple(_port(self.types.get(v.name, v)) for v in self.graph.output)
        loose = frozenset(v.name for v in self.given if not _ranked(v))
        return Delegation(inputs, outputs, tuple(regions), dict(self.reasons), loose)

    # -------------------------------------------------- regions

    @cached_property
    def _sources(self) -> set[str]:
        return {v.name for v in self.given} | set(self.weights) | set(self.sparse)

    def _free(self) -> set[str]:
        """Names of nodes that follow from constants and shapes: each region computes them by itself."""
        known = set(self.weights) | set(self.sparse)
        found: set[str] = set()
        for node in self.nodes:
            if node.name in self.reasons or any(a.HasField("g") or len(a.graphs) for a in node.attribute):
                continue
            constant = node.op_type == "Constant" and not node.input
            shape = node.op_type in ("Shape", "Size") and domain_of(node.domain) == ""
            if constant or shape or (node.input and all(name in known for name in node.input if name)):
                found.add(node.name)
                known.update(node.output)
        return found

    def _ordered(self, first: Kind) -> list[tuple[Kind, list[onnx.NodeProto]]]:
        """The nodes by region, when one of this kind comes first."""
        free = self._free()
        waiting = [n for n in self.nodes if n.name not in free]
        ready = self._sources | {name for n in self.nodes if n.name in free for name in n.output}
        made: list[tuple[Kind, list[onnx.NodeProto]]] = []
        kind = first
        idle = 0
        while waiting and idle < 2:
            taken = []
            rest = []
            for node in waiting:  # in an order of data, so one pass is enough
                of: Kind = "delegate" if node.name in self.reasons else "stitch"
                if of == kind and all(name in ready for name in self._reads(node, free)):
                    taken.append(node)
                    ready.update(node.output)
                else:
                    rest.append(node)
            if taken:
                made.append((kind, taken))
            idle = 0 if taken else idle + 1
            waiting, kind = rest, "delegate" if kind == "stitch" else "stitch"
        if waiting:
            raise InvalidModel(f"nodes depend on each other in a cycle, {waiting[0].name!r} among them")
        return made or [("stitch", [])]

    def _reads(self, node: onnx.NodeProto, free: set[str]) -> Iterator[str]:
        """Names that a node reads from outside, and those that free nodes before it do."""
        seen: set[str] = set()
        stack = [*_outer_reads(node)]
        while stack:
            name = stack.pop()
            if name in seen or not (name in self.maker or name in self._sources):
                continue  # a name inside one of its branches
            seen.add(name)
            yield name
            if name in self.maker and self.maker[name].name in free:
                stack += _outer_reads(self.maker[name])

    def _regions(self, order: Sequence[tuple[Kind, list[onnx.NodeProto]]]) -> list[Region]:
        free = self._free()
        wanted = {v.name for v in self.graph.output}
        home = {name: k for k, (_, nodes) in enumerate(order) for n in nodes for name in n.output if name}
        needs: list[dict[str, None]] = []
        last = len(order) - 1
        for k, (_, nodes) in enumerate(order):
            reads = dict.fromkeys(name for n in nodes for name in self._reads(n, free))
            for name in (v.name for v in self.graph.output):  # those that no region makes are the last one's
                if k == last and name not in home and name not in {v.name for v in self.given}:
                    reads[name] = None
                    if name in self.maker:
                        reads |= dict.fromkeys(self._reads(self.maker[name], free))
            needs.append(reads)
        regions = []
        for k, (kind, nodes) in enumerate(order):
            own = {n.name for n in nodes}
            again = {self.maker[name].name for name in needs[k] if name in self.maker} & free
            inside = [n for n in self.nodes if n.name in own or n.name in again]
            made = {name for n in inside for name in n.output}
            inputs = [name for name in needs[k] if name not in made and name not in self.weights]
            inputs = [name for name in inputs if name not in self.sparse]
            later = {name for row in needs[k + 1 :] for name in row}
            outputs = [name for n in nodes for name in n.output if name in wanted or name in later]
            if k == last:
                outputs += [v.name for v in self.graph.output if v.name in needs[k] and v.name not in home]
            used = [name for name in needs[k] if name in self.weights or name in self.sparse]
            model = self._model(f"{self.graph.name}.{k}", inside, inputs, outputs, used, kind)
            names = tuple(n.name for n in nodes)
            regions.append(Region(kind, model, tuple(inputs), tuple(dict.fromkeys(outputs)), names))
        return regions

    def _model(
        self, name: str, nodes: Iterable[onnx.NodeProto], inputs: Iterable[str], outputs: Iterable[str],
        weights: Iterable[str], kind: Kind,
    ) -> onnx.ModelProto:  # fmt: skip
        model = onnx.ModelProto(ir_version=self.proto.ir_version)
        model.opset_import.extend(self.proto.opset_import)
        model.functions.extend(self.proto.functions)
        graph = model.graph
        graph.name = name
        graph.node.extend(nodes)
        for value in inputs:
            info = graph.input.add()
            if value in self.types:
                info.CopyFrom(self.types[value])
            info.name = value
            inferred = value not in {v.name for v in self.given}
            if kind == "delegate" and inferred and info.type.HasField("tensor_type"):
                info.type.tensor_type.ClearField("shape")  # what was inferred is no promise
        for value in dict.fromkeys(outputs):
            graph.output.add().name = value
        for value in weights:
            if value in self.weights:
                graph.initializer.add().CopyFrom(self.weights[value])
            else:
                graph.sparse_initializer.add().CopyFrom(self.sparse[value])
        return model

    def _typed(self, regions: Sequence[Region]) -> bool:
        """Whether all that passes between regions is typed well enough; if not, more nodes are delegated."""
        fresh: dict[str, Reason] = {}
        for region in regions:
            for name in region.inputs:
                if name not in self.types or self.types[name].type.WhichOneof("value") is None:
                    fresh |= {n.name: Reason(WHOLE, f"value {name!r}") for n in self.nodes}
                elif region.kind == "stitch" and not _ranked(self.types[name]):
                    readers = [n for n in region.model.graph.node if name in _outer_reads(n)]
                    fresh |= {n.name: Reason(UNTYPED, f"value {name!r}") for n in readers}
        before = len(self.reasons)
        for node, reason in fresh.items():
            self.reasons.setdefault(node, reason)
        return len(self.reasons) == before


def supported(proto: onnx.ModelProto) -> UnsupportedOperator | None:
    """What the importer has against a model, if it is that an operator is not supported."""
    try:
        importer.load(proto)
    except UnsupportedOperator as refusal:
        return refusal
    return None


def _known(proto: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether stitch has the operator by itself, so that it is a variant of it that was refused."""
    from stitch.ops import registry

    opsets = {domain_of(i.domain): i.version for i in proto.opset_import}
    domain = domain_of(node.domain)
    return registry.lookup(node.op_type, opsets.get(domain, 1), domain) is not None


def _outer_reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, with those in its branches that come from outside of them. Models do use a name
    inside that means something else outside."""
    yield from node.input
    for a in node.attribute:
        for graph in graphs_of(a):
            own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            own |= {t.values.name for t in graph.sparse_initializer} | {name for n in graph.node for name in n.output}
            for name in (*(v.name for v in graph.output), *(x for n in graph.node for x in _outer_reads(n))):
                if name not in own:
                    yield name


def _live(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that outputs need, in an order of data."""
    maker = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    state: dict[int, bool] = {}  # False: on the way, True: done
    order: list[int] = []
    stack = [maker[v.name] for v in reversed(graph.output) if v.name in maker]
    while stack:
        k = stack[-1]
        missing = [maker[n] for n in _outer_reads(graph.node[k]) if n in maker and not state.get(maker[n], False)]
        if k in state or not missing:
            stack.pop()
            if not state.get(k, False):
                if missing:
                    raise InvalidModel(f"nodes depend on each other in a cycle, {graph.node[k].name!r} among them")
                state[k] = True
                order.append(k)
        else:
            state[k] = False
            stack += [m for m in missing if m != k]
    return [graph.node[k] for k in order]


def _types(proto: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """What is known of the values of the main graph."""
    try:
        found = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError) as problem:
        if isinstance(problem, ValueError):  # a message of more than 2 GB
            raise ResourceError("memory", f"the model is too large to be taken apart: {problem}") from None
        found = proto.graph
    rows = [*proto.graph.value_info, *proto.graph.output, *found.value_info, *found.output, *proto.graph.input]
    return {v.name: v for v in rows if v.type.WhichOneof("value") is not None}


def _ranked(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.WhichOneof("value")
    return bool(kind == "tensor_type" and value.type.tensor_type.HasField("shape"))


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    code = tensor.elem_type
    dtype = element_type(code) if code else "object"
    if isinstance(dtype, str) and code:  # strings, and numbers that stitch has no type for, as numpy calls them
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(code).name)
    shape = declared_shape(value) or ()
    named = tuple(d if d not in (None, "") else f"{value.name}_{k}" for k, d in enumerate(shape))
    return Port(value.name, dtype if isinstance(dtype, str) else dtype.name, named)
