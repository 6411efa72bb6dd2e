"""An ONNX model as it lies in memory: the file, its tensors, and what ONNX itself says of an operator."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stitch import dtypes
from stitch.errors import InvalidModel
from stitch.graph import Value
from stitch.inputs import Shape
from stitch.ops.primitives import Array
from stitch.ops.registry import ELEMENT_TYPES, Call
from stitch.weights import Folder, lift, map_file, view

if TYPE_CHECKING:
    import onnx

    Model: TypeAlias = str | os.PathLike[str] | bytes | onnx.ModelProto
    Attributes: TypeAlias = Mapping[str, onnx.AttributeProto]


@dataclass(frozen=True)
class Source:
    """A parsed model, its large initializers by index (`lifted`), and the folder with its external data."""

    proto: onnx.ModelProto
    lifted: Mapping[int, memoryview]
    folder: Folder

    @staticmethod
    def open(model: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Source:
        import onnx

        if isinstance(model, onnx.ModelProto):
            return Source(_with_graph(model, "the model"), {}, Folder(None))
        if isinstance(model, bytes | bytearray | memoryview):
            return _parse(memoryview(bytes(model)), "the model", Folder(None))  # no copy of what is bytes
        if not isinstance(model, str | os.PathLike):
            raise TypeError(f"a model is a path, bytes, or an onnx.ModelProto, not {type(model).__name__}")
        path = Path(model)
        return _parse(map_file(path, "the model"), f"the model {str(path)!r}", Folder(path.absolute().parent))


def _parse(data: memoryview, what: str, folder: Folder) -> Source:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not len(data):
        raise InvalidModel(f"{what} is empty", advice="get the file again")
    skeleton, lifted = lift(data)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(bytes(skeleton))
    except (DecodeError, ValueError):
        raise InvalidModel(f"{what} is not an ONNX file, or is damaged", advice="get the file again") from None
    return Source(_with_graph(proto, what), lifted, folder)


def _with_graph(proto: onnx.ModelProto, what: str) -> onnx.ModelProto:
    if not proto.HasField("graph"):
        raise InvalidModel(f"{what} has no graph, so it is not an ONNX model", advice="check the file")
    return proto


def domain_of(name: str) -> str:
    return "" if name == "ai.onnx" else name


def check_text(*names: object) -> None:
    """Protobuf hands out bytes in place of a string that is not UTF-8."""
    for name in names:
        if not isinstance(name, str):
            raise InvalidModel(f"{name!r} stands where a name should", advice="get the file again")


def opsets_of(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    imports = list(imports)
    check_text(*(i.domain for i in imports))
    return {domain_of(i.domain): i.version for i in imports}


def unique(values: Iterable[onnx.ValueInfoProto], what: str) -> list[onnx.ValueInfoProto]:
    found: dict[str, onnx.ValueInfoProto] = {}
    for v in values:
        check_text(v.name)
        if v.name in found or not v.name:
            raise InvalidModel(f"{what} {v.name!r} is listed twice" if v.name else f"an {what} has no name")
        found[v.name] = v
    return [*found.values()]


def graphs_of(a: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [*([a.g] if a.HasField("g") else []), *a.graphs]


def reads_of(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, with all those in its branches."""
    yield from node.input
    for a in node.attribute:
        for graph in graphs_of(a):
            yield from (v.name for v in graph.output)
            for inner in graph.node:
                yield from reads_of(inner)


# ------------------------------------------------------------------ tensors


def element_type(code: int) -> np.dtype | str:
    """The dtype of a TensorProto.DataType, or the name of one that stitch has no type for. Raises InvalidModel."""
    import onnx

    if code in ELEMENT_TYPES:
        return ELEMENT_TYPES[code]
    try:
        name = onnx.TensorProto.DataType.Name(code)
    except ValueError:
        raise InvalidModel(f"there is no element type {code}") from None
    if code == onnx.TensorProto.UNDEFINED:
        raise InvalidModel("an element type is missing")
    return str(name).lower()


_CODES: dict[np.dtype, int] = {dtype: code for code, dtype in ELEMENT_TYPES.items()}


class NoType(Exception):
    """A tensor has the element type `name`, which stitch does not have."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def array_of(tensor: onnx.TensorProto, folder: Folder, lifted: memoryview | None = None) -> Array:
    """The elements of a tensor, without a copy where possible. Raises InvalidModel or NoType."""
    from onnx import numpy_helper

    what = f"tensor {tensor.name!r}" if tensor.name else "a tensor without a name"
    dtype = element_type(tensor.data_type)
    if isinstance(dtype, str):
        raise NoType(dtype)
    shape = tuple(tensor.dims)
    if any(d < 0 for d in shape) or tensor.HasField("segment"):
        raise InvalidModel(f"{what} has a negative dimension or a segment")
    if tensor.data_location == tensor.EXTERNAL:
        entries = {e.key: e.value for e in tensor.external_data}
        size = dtype.itemsize
        for d in shape:
            size *= d
        return view(folder.read(entries, size, what), dtype, shape, what)
    if lifted is not None:
        return view(lifted, dtype, shape, what)
    if tensor.HasField("raw_data"):
        return view(tensor.raw_data, dtype, shape, what)
    try:
        array: Array = np.asarray(numpy_helper.to_array(tensor))
        return array.view(dtype) if dtype == dtypes.BFLOAT16 else array.astype(dtype, copy=False)
    except (ValueError, TypeError, OverflowError) as problem:
        raise InvalidModel(f"{what} cannot be read: {problem}") from None


def dense_of(sparse: onnx.SparseTensorProto, folder: Folder) -> Array:
    """A sparse tensor with its zeros."""
    values, indices = array_of(sparse.values, folder), array_of(sparse.indices, folder)
    shape = tuple(sparse.dims)
    out = np.zeros(shape, values.dtype)
    try:
        flat = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
        if flat.size and not 0 <= flat.min() <= flat.max() < out.size:
            raise ValueError("an index is out of range")
        out.reshape(-1)[flat] = values
    except (ValueError, IndexError, TypeError) as problem:
        raise InvalidModel(f"sparse tensor {sparse.values.name!r} cannot be read: {problem}") from None
    return out


def declared_shape(value: onnx.ValueInfoProto) -> Shape | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    fields = [(d.WhichOneof("value"), d) for d in tensor.shape.dim]
    check_text(*(d.dim_param for kind, d in fields if kind == "dim_param"))
    return [d.dim_value if kind == "dim_value" else d.dim_param if kind == "dim_param" else None for kind, d in fields]


# ------------------------------------------------------------------ what ONNX knows of an operator


def body_of(node: onnx.NodeProto, call: Call, attributes: Attributes) -> onnx.FunctionProto | None:
    """The body that ONNX gives for an operator, if it does."""
    import onnx

    try:
        schema: Any = onnx.defs.get_schema(call.operator, call.opset, call.domain)
    except onnx.defs.SchemaError:
        return None
    body = b""
    if versions := [v for v in schema.function_opset_versions if v <= call.opset]:
        body = schema.get_function_with_opset_version(max(versions))
    elif versions := [v for v in schema.context_dependent_function_opset_versions if v <= call.opset]:
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        del plain.attribute[:]
        for name, a in attributes.items():
            plain.attribute.add().CopyFrom(a)
            plain.attribute[-1].name = name
        types = [_type(v).SerializeToString() for v in call.inputs]
        text = plain.SerializeToString()
        body = schema.get_context_dependent_function_with_opset_version(max(versions), text, types)
    return onnx.FunctionProto.FromString(body) if body else None


def _type(value: Value | None) -> onnx.TypeProto:
    from onnx import helper

    if value is None:
        return helper.make_tensor_type_proto(0, None)
    shape = [d if isinstance(d, int) else str(d) for d in value.shape]
    return helper.make_tensor_type_proto(_CODES[value.dtype], shape)


def mismatch_of(call: Call) -> str | None:
    """What is wrong with the types of a call's inputs, by ONNX's schema of the operator: two that must be the same and
    are not, or one of a kind (bool, integer, float) that the operator is not defined for."""
    formal = _formal_inputs(call.operator, call.opset, call.domain)
    seen: dict[str, tuple[int, np.dtype]] = {}
    for k, value in enumerate(call.inputs[: formal.count]):
        if value is None:
            continue
        name, kinds = formal.at(k)
        if kinds and _kind(value.dtype) not in kinds:
            return f"its input {k} is {value.dtype.name}, but must be {' or '.join(sorted(kinds))}"
        other, dtype = seen.setdefault(name, (k, value.dtype))
        if dtype != value.dtype:
            return f"its inputs {other} and {k} must have one type, but are {dtype.name} and {value.dtype.name}"
    return None


@dataclass(frozen=True)
class _Formal:
    """The type of each formal input, and of which kinds it may be; the last one stands for all that follow."""

    inputs: tuple[tuple[str, frozenset[str]], ...] = ()
    variadic: bool = False

    @property
    def count(self) -> int | None:
        return None if self.variadic else len(self.inputs)

    def at(self, k: int) -> tuple[str, frozenset[str]]:
        return self.inputs[min(k, len(self.inputs) - 1)]


@cache
def _formal_inputs(operator: str, opset: int, domain: str) -> _Formal:
    import onnx

    try:
        schema: Any = onnx.defs.get_schema(operator, opset, domain)
    except (onnx.defs.SchemaError, TypeError):  # it is not ONNX's; a number beyond those of C
        return _Formal()
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    inputs = tuple((i.type_str, _kinds(allowed.get(i.type_str, [i.type_str]))) for i in schema.inputs)
    variadic = any(i.option == onnx.defs.OpSchema.FormalParameterOption.Variadic for i in schema.inputs)
    return _Formal(inputs, variadic and all(i.is_homogeneous for i in schema.inputs))


def _kinds(names: Iterable[str]) -> frozenset[str]:
    """Of types as ONNX writes them: tensor(float16), tensor(bool)."""
    found = set()
    for name in names:
        inner = name.removeprefix("tensor(").removesuffix(")")
        found |= {k for prefix, k in _PREFIXES.items() if inner.startswith(prefix)}
    return frozenset(found)


_PREFIXES = {"bool": "bool", "int": "an integer", "uint": "an integer", "float": "a float", "double": "a float",
             "bfloat": "a float"}  # fmt: skip


def _kind(dtype: np.dtype) -> str:
    return "bool" if dtype == dtypes.BOOL else "a float" if dtypes.is_float(dtype) else "an integer"


def complaint_about(node: onnx.NodeProto, call: Call) -> str | None:
    """What ONNX's checker has against a node."""
    import onnx

    context = onnx.checker.C.CheckerContext()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {call.domain: call.opset}
    try:
        onnx.checker.check_node(node, context)
    except onnx.checker.ValidationError as problem:
        return str(problem).split("\n")[0].strip()
    return None
