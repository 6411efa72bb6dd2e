"""ONNX's own backend node cases, run on the operators alone: no importer, no compiler, numpy as the engine.

    for case in cases({"Relu", "Softmax"}):     # the cases all of whose nodes are of these types
        assert run_case(case) == "pass"

`run_case` returns "pass" or "unsupported: why", and raises AssertionError where an output differs.
"""

import functools
import importlib
import pkgutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import stitch.ops
from stitch import dtypes
from stitch.dims import evaluate as evaluate_dim
from stitch.dims import symbol, symbols
from stitch.errors import UnsupportedOperator
from stitch.evaluate import bind, evaluate
from stitch.graph import Builder, Graph, Origin, Value
from stitch.ops import registry
from stitch.ops.primitives import Array

RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}


def register_operators() -> None:
    """Imports every module of operators."""
    for module in pkgutil.iter_modules(stitch.ops.__path__):
        importlib.import_module(f"stitch.ops.{module.name}")


@functools.cache
def all_cases() -> tuple[Any, ...]:
    """Every node case of the installed onnx, as onnx.backend.test.case.test_case.TestCase."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        return tuple(sorted(load_model_tests(kind="node"), key=lambda case: case.name))


def operators_of(case: Any) -> set[str]:
    """The operators that a case needs, prefixed by their domain unless it is ONNX's; constants do not count."""
    nodes = case.model.graph.node
    return {f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes} - {"Constant"}


def cases(operators: Collection[str] | None = None, expanded: bool = True) -> list[Any]:
    """The cases all of whose nodes are of these types (None: of any); `expanded`: also functions' bodies."""
    wanted = all_cases() if expanded else [c for c in all_cases() if "_expanded" not in c.name]
    return [c for c in wanted if operators is None or (operators_of(c) and operators_of(c) <= set(operators))]


def run_case(case: Any, symbolic: bool = False) -> str:
    """Builds and evaluates a case and compares; inputs that must be constants become constants.

    `symbolic`: the graph is built for extents that are symbols, where the case has more than 1.
    """
    register_operators()
    reason = _why_not(case)
    if reason:
        return f"unsupported: {reason}"
    for inputs, expected in case.data_sets:
        arrays = [_array(x) for x in inputs]
        graph: Graph | None = None
        for baked in _bakings(arrays):
            try:
                graph = build(case.model, arrays, baked, symbolic)
                break
            except UnsupportedOperator as refusal:
                reason = str(refusal)
                if "constant" not in reason:
                    break
        if graph is None:
            return f"unsupported: {reason}"
        graph.check()
        feeds = {i.name: a for i, a in zip(case.model.graph.input, arrays, strict=False)}
        if broken := broken_guards(graph, feeds):
            return f"unsupported: it takes {broken} for granted"
        check_outputs(evaluate(graph, feeds), [_array(x) for x in expected], case.rtol)
    return "pass"


def build(
    model: onnx.ModelProto, arrays: Sequence[Array], baked: Collection[int] = (), symbolic: bool = False
) -> Graph:
    """The graph of a model whose inputs have the shapes of `arrays`; those at `baked` become constants.

    `symbolic`: equal extents above 1 become the same symbol.
    """
    b = Builder(model.graph.name)
    opsets = {o.domain: o.version for o in model.opset_import}
    values: dict[str, Value | None] = {"": None}
    constants: dict[Value, Array] = {}

    def constant(name: str, array: Array) -> None:
        values[name] = value = b.const(array)
        constants[value] = array

    for position, (info, array) in enumerate(zip(model.graph.input, arrays, strict=False)):
        if position in baked:
            constant(info.name, array)
        else:
            shape = [symbol(f"s{n}") if symbolic and n > 1 else n for n in array.shape]
            values[info.name] = b.input(info.name, array.dtype, shape)
    for tensor in model.graph.initializer:
        constant(tensor.name, numpy_helper.to_array(tensor))
    for node in model.graph.node:
        if node.op_type == "Constant" and not node.domain:
            constant(node.output[0], _constant_of(node))
            continue
        b.origin = Origin(node.name or node.output[0], node.op_type, node.domain, opsets.get(node.domain, 1))
        call = registry.Call(
            node.op_type, b.origin.node, b.origin.opset, _attributes(node), tuple(node.output),
            tuple(values[name] for name in node.input), node.domain, constants,
        )  # fmt: skip
        for name, value in zip(node.output, registry.apply(b, call), strict=False):
            if name:
                assert value is not None, f"{node.op_type} did not make its output {name}"
                values[name] = value
    outputs = {o.name: values[o.name] for o in model.graph.output}
    return b.finish({name: value for name, value in outputs.items() if value is not None})


def broken_guards(graph: Graph, feeds: Mapping[str, Array]) -> str:
    """Equalities that the graph assumes and that do not hold for these inputs, where inputs alone decide."""
    env: dict[str, int] = {}
    for v in graph.inputs:
        bind(v.shape, feeds[v.name].shape, env)
    known = [g for g in graph.guards if symbols(g.left) | symbols(g.right) <= set(env)]
    return ", ".join(f"{g.left} == {g.right}" for g in known if evaluate_dim(g.left, env) != evaluate_dim(g.right, env))


def check_outputs(actual: Sequence[Array], expected: Sequence[Array], rtol: float = 1e-3) -> None:
    """Same dtypes and shapes; integers and booleans equal, floats within ONNX's tolerance (or two ulp)."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, f"shape {a.shape} instead of {e.shape}"
        assert a.dtype == e.dtype, f"dtype {a.dtype} instead of {e.dtype}"
        if dtypes.is_float(e.dtype):
            floor = {dtypes.BFLOAT16: 2.0**-6, dtypes.FLOAT16: 2.0**-9}.get(e.dtype, 1e-3)
            np.testing.assert_allclose(a.astype(np.float64), e.astype(np.float64), rtol=max(rtol, floor), atol=1e-5)
        else:
            np.testing.assert_array_equal(a, e)


def _why_not(case: Any) -> str:
    """Why a case cannot be built at all, or nothing."""
    opsets = {o.domain: o.version for o in case.model.opset_import}
    for node in case.model.graph.node:
        if node.op_type in RANDOM:
            return f"{node.op_type} is random"
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            return f"{node.op_type} holds a graph"
        known = node.op_type == "Constant" or registry.lookup(node.op_type, opsets.get(node.domain, 1), node.domain)
        if not known:
            return f"operator {node.op_type} is not registered"
    for info in (*case.model.graph.input, *case.model.graph.output):
        if info.type.WhichOneof("value") != "tensor_type":
            return f"{info.name} is not a tensor"
        if _dtype(info.type.tensor_type.elem_type) not in dtypes.ALL:
            return f"no dtype {onnx.TensorProto.DataType.Name(info.type.tensor_type.elem_type).lower()}"
    return ""


def _bakings(arrays: Sequence[Array]) -> list[tuple[int, ...]]:
    """Which inputs to take as constants, at each attempt: none, short integer vectors, all short vectors."""
    short = [i for i, a in enumerate(arrays) if a.ndim <= 1]
    whole = [i for i in short if dtypes.is_integer(arrays[i].dtype)]
    return [(), tuple(whole), tuple(short), tuple(range(len(arrays)))]


def _dtype(element_type: int) -> np.dtype | None:
    if element_type == onnx.TensorProto.STRING:
        return None
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type))


def _array(item: Any) -> Array:
    return numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else np.asarray(item)


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {a.name: _attribute(onnx.helper.get_attribute_value(a)) for a in node.attribute}


def _attribute(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_attribute(v) for v in value)
    return value


def _constant_of(node: onnx.NodeProto) -> Array:
    (attribute,) = node.attribute
    value = _attribute(onnx.helper.get_attribute_value(attribute))
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return np.asarray(value, kinds.get(attribute.name))
