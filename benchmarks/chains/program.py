"""An ONNX graph as a Python function over an array library, written out as source, one line for each node:

    def chain(x, skip):
        total = Add(x, skip)
        normal = LayerNormalization(total, gain, shift, axis=-1, epsilon=1e-05)
        y = Gelu(normal)
        return [y]

What the names of operators mean is a table, one for each library (`numpy_like`, `torch_table`). Source rather than an
interpreter, because it costs nothing to run, and because torch.compile and jax.jit trace it like a user's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper, numpy_helper

from benchmarks.chains.case import Array

Table = Mapping[str, Callable[..., Any]]


class MissingOperator(Exception):
    """The table has no such operator."""


@dataclass(frozen=True)
class Line:
    """A node. Arguments are names of values, or literals."""

    op: str
    arguments: tuple[str, ...]
    attributes: Mapping[str, Any]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """`constants` are those that are no literals: int64 and single floats are, for they say how, not what."""

    inputs: tuple[str, ...]
    lines: tuple[Line, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Array]

    def source(self) -> str:
        body = []
        for line in self.lines:
            given = [*line.arguments, *(f"{name}={value!r}" for name, value in line.attributes.items())]
            body.append(f"    {', '.join(line.results)} = {line.op}({', '.join(given)})\n")
        return f"def chain({', '.join(self.inputs)}):\n{''.join(body)}    return [{', '.join(self.outputs)}]\n"

    def bind(self, table: Table, convert: Callable[[Array], Any]) -> Callable[..., list[Any]]:
        """A function of the inputs in order. Raises MissingOperator."""
        if missing := sorted({line.op for line in self.lines} - set(table)):
            raise MissingOperator(f"no {', '.join(missing)}")
        return define(self.source(), {**table, **{name: convert(c) for name, c in self.constants.items()}})


def define(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function `chain` of a source."""
    exec(compile(source, "<chain>", "exec"), names)
    function: Callable[..., Any] = names["chain"]
    return function


def translate(model: onnx.ModelProto) -> Program:
    graph = model.graph
    constants, literals = {}, {}
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and not array.ndim:
            literals[tensor.name] = repr(float(array))
        elif array.dtype == "int64":
            literals[tensor.name] = repr(tuple(array.tolist()) if array.ndim else int(array))
        else:
            constants[tensor.name] = array
    lines = [
        Line(
            node.op_type,
            tuple(literals.get(name, name or "None") for name in node.input),
            {a.name: _attribute(node, a) for a in node.attribute},
            tuple(node.output),
        )
        for node in graph.node
    ]
    outputs = tuple(o.name for o in graph.output)
    return Program(tuple(i.name for i in graph.input), tuple(_joined(lines, outputs)), outputs, constants)


def _attribute(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if node.op_type == "Cast":
        return helper.tensor_dtype_to_np_dtype(value).name  # all libraries know types by numpy's names
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if attribute.ints else value


def _joined(lines: list[Line], outputs: tuple[str, ...]) -> list[Line]:
    """x * sigmoid(x) as the Swish that every library has, if nobody else wants the sigmoid."""
    makers = {result: line for line in lines for result in line.results}
    used = [name for line in lines for name in line.arguments] + list(outputs)
    out = list(lines)
    for k, line in enumerate(lines):
        if line.op != "Mul":
            continue
        for x, gate in (line.arguments, line.arguments[::-1]):
            maker = makers.get(gate)
            if maker and maker.op == "Sigmoid" and maker.arguments == (x,) and used.count(gate) == 1:
                out[k] = Line("Swish", (x,), {}, line.results)
                out.remove(maker)
                return _joined(out, outputs)
    return out
