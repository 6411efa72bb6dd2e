"""The importer: what it accepts, what it makes of it, and in which words it refuses the rest."""

import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stitch import dims
from stitch.errors import InvalidModel, UnknownInput, UnsupportedOperator
from stitch.evaluate import evaluate
from stitch.graph import Graph
from stitch.importer import load
from stitch.inputs import Shapes, input_shapes
from stitch.ops import registry
from stitch.weights import Folder, lift
from tests.real_models import Case, case, parametrize

Array = np.ndarray[Any, Any]
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
node = helper.make_node


def value(name: str, shape: Sequence[int | str | None] | None = (2, 3), kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def tensor(name: str, array: object, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(array, dtype), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[str] = ("y",),
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = 18,
    **fields: Any,
) -> onnx.ModelProto:
    inputs = inputs or [value("x")]
    graph = helper.make_graph(nodes, "test", inputs, [value(o, None) for o in outputs], initializers)
    fields.setdefault("opset_imports", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, **fields)


def run(graph: Graph, **feeds: Array) -> list[Array]:
    graph.check()
    return evaluate(graph, feeds)


X = np.arange(6, dtype=np.float32).reshape(2, 3)
ROW = np.array([1, 2, 3], np.float32)
RELU = [node("Relu", ["x"], ["y"], name="act")]

# ------------------------------------------------------------------ where models come from


def test_path_bytes_and_proto_are_the_same(tmp_path: Path) -> None:
    proto = model([node("Add", ["x", "w"], ["y"])], initializers=[tensor("w", [1, 2, 3])])
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    before = proto.SerializeToString()
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), proto):
        graph = load(source)  # type: ignore[arg-type]
        assert graph.name == "test"
        assert [v.name for v in graph.inputs] == ["x"]
        assert graph.output_names == ("y",)
        np.testing.assert_array_equal(run(graph, x=X)[0], X + ROW)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"this is a text file, not a model\n" * 9, "is not an ONNX file"),
        (bytes(range(256)) * 20, "is not an ONNX file"),
        (model(RELU).SerializeToString()[:-7], "is not an ONNX file"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "has no graph"),
    ],
    ids=["empty", "text", "random", "truncated", "no graph"],
)
def test_damaged(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    for source in (data, tmp_path / "m.onnx"):
        with pytest.raises(InvalidModel, match=words):
            load(source)


def test_every_truncation_and_flipped_byte_is_a_clear_error() -> None:
    data = model([node("Add", ["x", "w"], ["y"])], initializers=[tensor("w", np.ones((40, 40)))]).SerializeToString()
    rng = np.random.default_rng(0)
    for cut in rng.integers(1, len(data), 40):
        with pytest.raises(InvalidModel):
            load(data[:cut])
    for at in [*range(60), *range(len(data) - 120, len(data))]:
        broken = bytearray(data)
        broken[at] ^= int(rng.integers(1, 256))
        with suppress(InvalidModel, UnsupportedOperator):
            load(bytes(broken))


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="does not exist"):
        load(tmp_path / "none.onnx")
    with pytest.raises(InvalidModel, match="is a directory"):
        load(tmp_path)
    with pytest.raises(TypeError, match="a model is a path"):
        load(3)  # type: ignore[arg-type]


def test_import_is_lazy_and_silent() -> None:
    code = "import sys, stitch.importer; assert 'onnx' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


# ------------------------------------------------------------------ weights


def test_large_weights_are_not_copied(tmp_path: Path) -> None:
    weights = [tensor(f"w{i}" * (i + 1), np.full((64, 64), i)) for i in range(8)]
    names = [w.name for w in weights]
    proto = model([node("Add", [a, b], [f"s{i}"]) for i, (a, b) in enumerate(zip(["x", *names], names, strict=False))],
                  [value("x", [64, 64])], [f"s{i}" for i in range(8)], weights)  # fmt: skip
    data = proto.SerializeToString()
    skeleton, lifted = lift(memoryview(data))
    assert sorted(lifted) == [*range(8)]
    assert len(skeleton) < 3000
    (tmp_path / "m.onnx").write_bytes(data)
    results = [run(load(source), x=np.ones((64, 64), np.float32)) for source in (proto, data, tmp_path / "m.onnx")]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
     ml_dtypes.bfloat16],
)  # fmt: skip
@pytest.mark.parametrize("raw", [True, False])
def test_dtypes(dtype: Any, raw: bool) -> None:
    array = np.array([[0, 1], [1, 0]], dtype)
    t = numpy_helper.from_array(array, "w")
    if not raw:
        flat = array.reshape(-1).tolist()
        if array.dtype.itemsize == 2 and array.dtype.kind in "fV":  # halves are stored as bits
            flat = array.view(np.uint16).reshape(-1).tolist()
        t = TensorProto(name="w", data_type=t.data_type, dims=t.dims)
        fields = {"float32": t.float_data, "float64": t.double_data, "int64": t.int64_data,
                  "uint32": t.uint64_data, "uint64": t.uint64_data}  # fmt: skip
        fields.get(array.dtype.name, t.int32_data).extend(flat if array.dtype.kind == "f" else map(int, flat))
    graph = load(model([node("Identity", ["w"], ["y"])], initializers=[t]))
    (y,) = run(graph, x=X)
    assert y.dtype == array.dtype
    np.testing.assert_array_equal(y, array)


def test_wrong_sizes_and_types() -> None:
    short = TensorProto(name="w", data_type=FLOAT, dims=[2, 3], raw_data=b"\0" * 20)
    few = TensorProto(name="w", data_type=FLOAT, dims=[2, 3], float_data=[1.0])
    strange = TensorProto(name="w", data_type=99, dims=[1], raw_data=b"\0" * 4)
    none = TensorProto(name="w", dims=[1])
    negative = TensorProto(name="w", data_type=FLOAT, dims=[-1], float_data=[1.0])
    for bad, words in [(short, "20 bytes"), (few, "cannot be read"), (strange, "element type 99"),
                       (none, "element type is missing"), (negative, "negative dimension")]:  # fmt: skip
        with pytest.raises(InvalidModel, match=words):
            load(model([node("Add", ["x", "w"], ["y"])], initializers=[bad]))


def test_types_that_stitch_does_not_have_are_refused_where_they_are_used() -> None:
    text = TensorProto(name="w", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])
    f8 = helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [1], [1.0])
    for t, name in [(text, "string"), (f8, "float8e4m3fn")]:
        load(model(RELU, initializers=[t]))
        with pytest.raises(UnsupportedOperator, match=f"Identity .*of node 'copy' is not supported for {name}"):
            load(model([node("Identity", ["w"], ["y"], name="copy")], initializers=[t]))
    inputs = [value("x"), value("s", [1], TensorProto.STRING)]
    assert [v.name for v in load(model(RELU, inputs)).inputs] == ["x"]
    with pytest.raises(UnsupportedOperator, match="string"):
        load(model([node("Identity", ["s"], ["y"])], inputs))


def test_sparse_initializer() -> None:
    proto = model([node("Add", ["x", "w"], ["y"])])
    for indices in ([1, 5], [[0, 1], [1, 2]]):
        del proto.graph.sparse_initializer[:]
        values, at = tensor("w", [7, 8]), tensor("", indices, np.int64)
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [2, 3]))
        np.testing.assert_array_equal(run(load(proto), x=X)[0], X + np.array([[0, 7, 0], [0, 0, 8]]))
    proto.graph.sparse_initializer[0].indices.CopyFrom(tensor("", [1, 6], np.int64))
    with pytest.raises(InvalidModel, match="out of range"):
        load(proto)


def test_initializers_that_are_listed_as_inputs() -> None:
    inputs = [value("x"), value("w", [3])]
    proto = model([node("Add", ["x", "w"], ["y"])], inputs, ("y",), [tensor("w", ROW)], opset=8, ir_version=3)
    graph = load(proto)
    assert [v.name for v in graph.inputs] == ["x"]
    np.testing.assert_array_equal(run(graph, x=X)[0], X + ROW)


# ------------------------------------------------------------------ external data


def external(folder: Path, location: str = "w.bin", **entries: object) -> Path:
    """A model in `folder` whose weight is said to be in `location`."""
    w = TensorProto(name="w", data_type=FLOAT, dims=[64, 64], data_location=TensorProto.EXTERNAL)
    for key, text in {"location": location, **entries}.items():
        w.external_data.add(key=key, value=str(text))
    path = folder / "m.onnx"
    path.write_bytes(model([node("Add", ["x", "w"], ["y"])], [value("x", [64, 64])], ("y",), [w]).SerializeToString())
    return path


W = np.arange(4096, dtype=np.float32).reshape(64, 64)


def constants(graph: Graph) -> list[Array]:
    return [n.attrs["array"] for n in graph.nodes if n.prim == "const"]


def base(array: Array) -> object:
    """What the memory of an array belongs to in the end."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner


def test_external_data_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 4096 + W.tobytes())
    (w,) = constants(load(external(tmp_path, offset=4096, length=W.nbytes)))
    np.testing.assert_array_equal(w, W)
    assert isinstance(base(w), memoryview)
    assert not w.flags.writeable
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    np.testing.assert_array_equal(constants(load(external(tmp_path)))[0], W)


def test_external_data_at_an_odd_offset(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 3 + W.tobytes())
    (w,) = constants(load(external(tmp_path, offset=3)))
    np.testing.assert_array_equal(w, W)
    assert w.flags.aligned


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "..\\w.bin", "C:\\w.bin", "", "w\0.bin"]
)
def test_external_data_does_not_escape_by_name(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (tmp_path / "inner").mkdir()
    with pytest.raises(InvalidModel, match="not inside the model's folder"):
        load(external(tmp_path / "inner", location))


def test_external_data_does_not_escape_by_links(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (inner / "w.bin").symlink_to(tmp_path / "w.bin")
    (inner / "up").symlink_to(tmp_path)
    for location in ("w.bin", "up/w.bin"):
        with pytest.raises(InvalidModel, match="not inside the model's folder"):
            load(external(inner, location))
    (inner / "real.bin").write_bytes(W.tobytes())
    (inner / "near.bin").symlink_to("real.bin")
    load(external(inner, "near.bin"))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"offset": 1}, "which has 16384 bytes"),
        ({"offset": -4}, "the offset '-4'"),
        ({"offset": "x"}, "the offset 'x'"),
        ({"length": 4}, "has length 4"),
        ({"offset": 10**30}, "which has 16384 bytes"),
        ({"location": "missing.bin"}, "does not exist"),
        ({"location": "sub"}, "is not a file"),
    ],
)
def test_external_data_that_is_not_there(entries: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (tmp_path / "sub").mkdir()
    with pytest.raises(InvalidModel, match=words):
        load(external(tmp_path, **entries))


def test_external_data_needs_a_path(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    with pytest.raises(InvalidModel, match="give the model as a path"):
        load(external(tmp_path).read_bytes())


def test_external_data_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    monkeypatch.chdir(tmp_path)
    assert len(constants(load(os.path.basename(external(tmp_path))))) == 1
    with pytest.raises(InvalidModel, match="external file"):
        Folder(None).read({"location": "w.bin"}, 4, "tensor 'w'")


# ------------------------------------------------------------------ the shapes of inputs


def shapes_of(inputs: Shapes, given: Shapes | None = None) -> tuple[dict[str, str], list[str]]:
    shapes, guards = input_shapes(inputs, given or {})
    return {k: ", ".join(map(str, v)) for k, v in shapes.items()}, [f"{g.left} == {g.right}" for g in guards]


def test_names_of_unknown_extents() -> None:
    assert shapes_of({"x": [None, 3, -1], "y": ["", "x_0", "?"]}) == ({"x": "x_0_, 3, x_2", "y": "y_0, x_0, y_2"}, [])


def test_expressions_over_known_symbols() -> None:
    inputs: Shapes = {"ids": ["b", "seq"], "past": ["b", "past"], "mask": ["b", "past+seq"]}
    assert shapes_of(inputs) == ({"ids": "b, seq", "past": "b, past", "mask": "b, past + seq"}, [])


def test_expressions_are_solved() -> None:
    assert shapes_of({"x": ["2*n"], "y": ["n+1"]}) == ({"x": "x_0", "y": "(x_0 // 2) + 1"}, ["x_0 == 2*(x_0 // 2)"])
    assert shapes_of({"x": ["n+1"]}) == ({"x": "x_0"}, ["x_0 == max(0, x_0 - 1) + 1"])
    shapes, guards = shapes_of({"ids": ["seq"], "mask": ["past+seq"], "more": ["past"]})
    assert (shapes["mask"], guards) == ("past + seq", [])
    shapes, guards = shapes_of({"ids": ["seq"], "mask": ["past+seq"]})
    assert shapes == {"ids": "seq", "mask": "mask_0"}
    assert guards == ["mask_0 == seq + max(0, mask_0 - seq)"]


def test_a_name_that_looks_like_an_expression() -> None:
    assert shapes_of({"x": ["batch-size"], "y": ["batch-size"]}) == ({"x": "x_0", "y": "x_0"}, [])


def test_names_with_spaces() -> None:
    graph = load(model([node("Add", ["x", "z"], ["y"])], [value("x", ["batch size", 3]), value("z", ["m", 3])]))
    assert [str(g.left) for g in graph.guards] == ["`batch size`"]
    np.testing.assert_array_equal(run(graph, x=X, z=X)[0], X + X)


def test_given_shapes() -> None:
    inputs: Shapes = {"x": ["b", 224], "y": ["b"]}
    assert shapes_of(inputs, {"x": [4, "w"]})[0] == {"x": "4, w", "y": "4"}
    assert shapes_of(inputs, {"x": ["n", None]})[0] == {"x": "n, x_1", "y": "n"}
    with pytest.raises(UnknownInput, match="did you mean 'data'"):
        shapes_of({"data": [1]}, {"date": [1]})
    with pytest.raises(InvalidModel, match="rank 2, but the shape given for it has rank 1"):
        shapes_of(inputs, {"x": [1]})


def test_inputs_without_shape() -> None:
    proto = model(RELU, [value("x", None)])
    with pytest.raises(InvalidModel, match=r"input 'x' has no shape; give one: shapes=\{'x': \[...\]\}"):
        load(proto)
    graph = load(proto, shapes={"x": ["n", 3]})
    assert graph.inputs[0].shape == (dims.symbol("n"), 3)
    np.testing.assert_array_equal(run(graph, x=X)[0], X)


# ------------------------------------------------------------------ graphs


def test_extents_by_way_of_floats() -> None:
    """As in reshape(x, [batch, 2 * int(ceil(h / 2))]): one extent is a symbol, the other follows from numbers."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Gather", ["s", "one"], ["h"]),
        node("Cast", ["h"], ["f"], to=FLOAT),
        node("Div", ["f", "two"], ["q"]),
        node("Ceil", ["q"], ["c"]),
        node("Cast", ["c"], ["i"], to=INT64),
        node("Concat", ["n", "i", "minus"], ["shape"], axis=0),
        node("Reshape", ["x", "shape"], ["y"]),
    ]
    numbers = [("zero", [0]), ("one", [1]), ("minus", [-1])]
    fixed = [*(tensor(k, v, np.int64) for k, v in numbers), tensor("two", [2])]
    graph = load(model(nodes, [value("x", ("n", 3, 4))], initializers=fixed))
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (y,) = run(graph, x=x)
    np.testing.assert_array_equal(y, x.reshape(2, 2, 6))


def test_nodes_out_of_order_and_dead_nodes() -> None:
    nodes = [
        node("Add", ["b", "a"], ["y"]),
        node("Relu", ["x"], ["a"]),
        node("NoSuchOperator", ["x"], ["dead"], domain="nowhere"),
        node("Neg", ["a"], ["b"]),
    ]
    np.testing.assert_array_equal(run(load(model(nodes)), x=X)[0], np.zeros((2, 3)))


def test_a_long_chain_backwards() -> None:
    nodes = [node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(3000)]
    proto = model([*reversed(nodes)], [value("v0")], ["v3000"])
    np.testing.assert_array_equal(run(load(proto), v0=X)[0], X)


def test_cycle() -> None:
    nodes = [node("Add", ["x", "c"], ["a"], name="one"), node("Relu", ["a"], ["c"], name="two"),
             node("Relu", ["c"], ["y"], name="three")]  # fmt: skip
    with pytest.raises(InvalidModel, match="in a cycle: 'one', 'two'"):
        load(model(nodes))


def broken(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    proto = model(RELU, initializers=[tensor("w", [1])])
    change(proto)
    return proto


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (model(RELU, outputs=["z"]), "output 'z' is not"),
        (broken(lambda m: m.graph.output.pop()), "no outputs"),
        (model([node("Relu", ["nothing"], ["y"], name="act")]), "node 'act': Relu: it reads 'nothing'"),
        (model([*RELU, node("Neg", ["x"], ["y"], name="second")]), "node 'second': value 'y' is defined twice"),
        (model([node("Relu", ["x"], ["x"])], outputs=["x"]), "value 'x' is defined twice"),
        (model(RELU, [value("x"), value("x")]), "input 'x' is listed twice"),
        (model(RELU, outputs=["y", "y"]), "output 'y' is listed twice"),
        (broken(lambda m: m.graph.initializer.append(tensor("w", [1]))), "initializer 'w' is defined twice"),
        (model(RELU, opset_imports=[helper.make_opsetid("com.microsoft", 1)]), "operator set ai.onnx"),
        (model([node("Foo", ["x"], ["y"], name="f", domain="d")]), "node 'f': Foo: .* operator set d it uses"),
        (model(RELU, [value("x", kind=77)]), "input 'x': there is no element type 77"),
        (broken(lambda m: m.graph.input[0].ClearField("type")), "input 'x' has no type"),
        (model([node("Add", ["x"], ["y"], name="sum")]), "node 'sum': Add: "),
        (model([node("Transpose", ["x"], ["y"], name="t", perm="oops")]), "node 't': Transpose: "),
        (model([node("Concat", ["x", "x"], ["y"], name="c")]), "node 'c': Concat: "),
    ],
)
def test_contradictions(proto: onnx.ModelProto, words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        load(proto)


def test_operator_sets_of_the_future() -> None:
    assert onnx.defs.onnx_opset_version() <= registry.NEWEST, "read what is new, then raise NEWEST"
    load(model(RELU, opset=registry.NEWEST))
    with pytest.raises(UnsupportedOperator, match=r"opset 29.*of node 'act'.*known up to 28"):
        load(model(RELU, opset=registry.NEWEST + 1))


MIXED = "must have one type, but are float32 and"


@pytest.mark.parametrize(
    ("nodes", "other", "words"),
    [
        (node("Add", ["x", "w"], ["y"], name="n"), np.int64, f"node 'n': Add: its inputs 0 and 1 {MIXED} int64"),
        (node("Max", ["x", "x", "w"], ["y"], name="n"), np.float16, f"Max: its inputs 0 and 2 {MIXED} float16"),
        (node("Concat", ["x", "w"], ["y"], axis=0), np.float64, f"inputs 0 and 1 {MIXED} float64"),
        (node("MatMul", ["x", "w"], ["y"]), np.float64, f"inputs 0 and 1 {MIXED} float64"),
        (node("Clip", ["x", "", "w"], ["y"]), np.float64, f"inputs 0 and 2 {MIXED} float64"),
        (node("Where", ["c", "x", "w"], ["y"]), np.float64, f"inputs 1 and 2 {MIXED} float64"),
        (node("Where", ["x", "x", "x"], ["y"]), bool, "its input 0 is float32, but must be bool"),
        (node("Gather", ["x", "x"], ["y"]), bool, "its input 1 is float32, but must be an integer"),
        (node("And", ["x", "x"], ["y"]), bool, "its input 0 is float32, but must be bool"),
        (node("Exp", ["w"], ["y"]), np.uint8, "its input 0 is uint8, but must be a float"),
        (node("CumSum", ["w", "a"], ["y"]), bool, "its input 0 is bool, but must be a float or an integer"),
    ],
)
def test_types_that_do_not_go_together(nodes: onnx.NodeProto, other: Any, words: str) -> None:
    constants = [tensor("w", np.ones((3, 3)), other), tensor("c", np.ones((2, 3)), bool), tensor("a", 0, np.int64)]
    with pytest.raises(InvalidModel, match=words):
        load(model([nodes], initializers=constants))


def test_types_of_their_own_that_inputs_may_have() -> None:
    q, v = (np.random.default_rng(0).standard_normal((1, 1, n, 4)).astype(d) for n, d in ((2, "f4"), (3, "f8")))
    nodes = [node("Attention", ["q", "k", "v"], ["a"]), node("Pow", ["a", "two"], ["y"])]
    constants = [tensor("k", q), tensor("v", v[:, :, :2], np.float64), tensor("two", 2, np.int32)]
    graph = load(model(nodes, [value("q", (1, 1, 2, 4))], initializers=constants, opset=23))
    scores = np.exp(q[0, 0] @ q[0, 0].T / 2)
    expected = (scores / scores.sum(1, keepdims=True) @ v[0, 0, :2]) ** 2
    (y,) = run(graph, q=q)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y[0, 0], expected, rtol=1e-5)


def test_the_last_constant_of_a_name_holds() -> None:
    nodes = [node("Constant", [], ["c"], value_float=1.0), node("Add", ["x", "c"], ["y"]),
             node("Constant", [], ["c"], value_float=5.0)]  # fmt: skip
    np.testing.assert_array_equal(run(load(model(nodes)), x=X)[0], X + 5)


def test_unsupported_operators_are_named() -> None:
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    proto = model([node("Foo", ["x"], ["y"], name="foo", domain="com.microsoft")], opset_imports=imports)
    with pytest.raises(UnsupportedOperator, match=r"operator Foo \(com.microsoft, opset 1\) of node 'foo'") as caught:
        load(proto)
    assert (caught.value.operator, caught.value.opset, caught.value.domain) == ("Foo", 1, "com.microsoft")
    with pytest.raises(UnsupportedOperator, match="of node 'SequenceConstruct_0'"):
        load(model([node("SequenceConstruct", ["x"], ["y"])]))


def test_every_module_of_operators_is_imported() -> None:
    from stitch import importer, ops

    names = {m.name for m in pkgutil.iter_modules(ops.__path__)} - {"host", "primitives"}
    assert names <= set(vars(importer)), "import it in stitch/importer.py"


def test_origins_and_domains() -> None:
    graph = load(model([node("Neg", ["x"], ["y"], domain="ai.onnx")]))
    assert [(n.prim, n.origin.node, n.origin.operator, n.origin.opset) for n in graph.nodes] == [
        ("neg", "Neg_0", "Neg", 18)
    ]


# ------------------------------------------------------------------ branches


def branch(name: str, operator: str, source: str = "x") -> onnx.GraphProto:
    return helper.make_graph([node(operator, [source], [name])], name, [], [value(name, None)])


def choice(condition: Sequence[onnx.NodeProto], **fields: Any) -> onnx.ModelProto:
    chosen = node(
        "If", ["c"], ["y"], name="if", then_branch=branch("a", "Neg"), else_branch=branch("b", "NoSuchOperator")
    )
    return model([*condition, chosen], **fields)


def test_if_with_a_known_condition() -> None:
    for proto in (
        choice([], initializers=[tensor("c", True, np.bool_)]),
        choice([node("Shape", ["x"], ["s"]), node("Size", ["s"], ["n"]), node("Constant", [], ["two"], value_int=2),
                node("Equal", ["n", "two"], ["c"])]),
        choice([node("Not", ["d"], ["c"])], initializers=[tensor("d", False, np.bool_)]),
    ):  # fmt: skip
        np.testing.assert_array_equal(run(load(proto), x=X)[0], -X)


def test_if_with_an_unknown_condition() -> None:
    with pytest.raises(UnsupportedOperator, match=r"operator If \(ai.onnx, opset 18\) of node 'if'.*condition"):
        load(choice([], inputs=[value("x"), value("c", [], BOOL)]))


def test_branches_see_values_that_are_not_built_yet() -> None:
    chosen = node("If", ["c"], ["y"], then_branch=branch("a", "Neg", "later"), else_branch=branch("b", "Neg", "never"))
    nodes = [chosen, node("Relu", ["x"], ["later"]), node("NoSuchOperator", ["x"], ["never"])]
    proto = model(nodes, initializers=[tensor("c", True, np.bool_)])
    np.testing.assert_array_equal(run(load(proto), x=X)[0], -X)


def test_a_cycle_through_a_branch() -> None:
    chosen = node("If", ["c"], ["z"], name="if", then_branch=branch("a", "Neg", "y"), else_branch=branch("b", "Neg"))
    with pytest.raises(InvalidModel, match="in a cycle"):
        load(model([chosen, node("Relu", ["z"], ["y"])], initializers=[tensor("c", True, np.bool_)]))


# ------------------------------------------------------------------ functions


def with_functions(nodes: Sequence[onnx.NodeProto], *functions: onnx.FunctionProto) -> onnx.ModelProto:
    return model(nodes, functions=functions, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("my", 1)])


def function(
    name: str, nodes: Sequence[onnx.NodeProto], attributes: Sequence[str] = (), **fields: Any
) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 13), helper.make_opsetid("my", 1)]
    return helper.make_function("my", name, ["a", "b"], ["out"], nodes, imports, attributes, **fields)


def refer(n: onnx.NodeProto, name: str, kind: int, to: str) -> onnx.NodeProto:
    n.attribute.append(onnx.AttributeProto(name=name, type=kind, ref_attr_name=to))  # type: ignore[arg-type]
    return n


def test_functions_with_attributes_and_optional_inputs() -> None:
    inner = function("Inner", [refer(node("LeakyRelu", ["a"], ["out"]), "alpha", onnx.AttributeProto.FLOAT, "slope")],
                     attribute_protos=[helper.make_attribute("slope", 0.5)])  # fmt: skip
    outer = function("Outer", [
        refer(node("Inner", ["a"], ["t"], domain="my"), "slope", onnx.AttributeProto.FLOAT, "s"),
        node("Neg", ["t"], ["out"]),
        node("NoSuchOperator", ["b"], ["unused"]),
    ], ["s"])  # fmt: skip
    x = -X
    slopes: list[tuple[dict[str, Any], float]] = [({"s": 0.25}, 0.25), ({}, 0.5)]
    for given, slope in slopes:
        graph = load(with_functions([node("Outer", ["x"], ["y"], name="f", domain="my", **given)], inner, outer))
        np.testing.assert_array_equal(run(graph, x=x)[0], -(x * np.float32(slope)))
        assert {n.origin.node.split("/")[0] for n in graph.nodes} == {"f"}


def test_functions_without_end() -> None:
    again = function("Again", [node("Again", ["a"], ["out"], domain="my")])
    with pytest.raises(InvalidModel, match="without end"):
        load(with_functions([node("Again", ["x"], ["y"], domain="my")], again))


def test_errors_in_functions_name_the_way() -> None:
    bad = function("Bad", [node("Foo", ["a"], ["out"], name="deep", domain="my")])
    with pytest.raises(UnsupportedOperator, match=r"operator Foo .* of node 'f/deep'"):
        load(with_functions([node("Bad", ["x"], ["y"], name="f", domain="my")], bad))
    with pytest.raises(InvalidModel, match="more inputs or outputs"):
        load(with_functions([node("Bad", ["x", "x", "x"], ["y"], name="f", domain="my")], bad))


def test_operators_of_onnx_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    from stitch.ops import registry

    known = registry.lookup
    hidden = {"MeanVarianceNormalization", "Celu", "Softmax", "Clip", "LayerNormalization"}
    monkeypatch.setattr(
        registry, "lookup", lambda name, opset, domain="": None if name in hidden else known(name, opset, domain)
    )
    x = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)
    for n, want in [
        (
            node("Celu", ["x"], ["y"], name="n", alpha=0.5),
            np.maximum(x, 0) + np.minimum(0, 0.5 * (np.exp(x / 0.5) - 1)),
        ),
        (node("Softmax", ["x"], ["y"], name="n", axis=0), np.exp(x) / np.exp(x).sum(0)),
        (node("MeanVarianceNormalization", ["x"], ["y"], name="n", axes=[0]), (x - x.mean(0)) / x.std(0)),
        (node("Clip", ["x", "", "hi"], ["y"], name="n"), np.minimum(x, 1)),
    ]:
        graph = load(model([n], initializers=[tensor("hi", 1)]))
        np.testing.assert_allclose(run(graph, x=x)[0], want, rtol=1e-5)
        assert {v.origin.operator for v in graph.nodes} <= {n.op_type, "initializer"}


# ------------------------------------------------------------------ real models

SLOW_IN_NUMPY = ("dnsmos_p835.0", "dnsmos_p835.1")  # 13 s each


@parametrize()
def test_real_models(case: Case) -> None:
    """Right, or refused by name; numpy is the oracle, so that nothing but the import is tested here."""
    label = f"{case.name}.{case.feed_index}"
    if case.name in REFUSED:
        with pytest.raises(UnsupportedOperator) as caught:
            load(case.path)
        assert caught.value.operator in REFUSED[case.name]
        return
    graph = load(case.path)
    graph.check()
    if label in SLOW_IN_NUMPY:
        return
    outputs = dict(zip(graph.output_names, evaluate(graph, case.feed()), strict=True))
    if label == "lighterglue.1":
        # onnxruntime's Sigmoid is 0 below -18, and its logarithm -inf: the reference lacks a match of weight 1e-11.
        rows = outputs["scores"] > 1e-9
        (matches, _) = case.expected()
        np.testing.assert_array_equal(outputs["matches"][rows], matches.array[rows])
        outputs["matches"] = matches.array
    errors = case.errors(outputs)
    assert max(errors.values()) <= 1, errors


REFUSED: dict[str, tuple[str, ...]] = {
    "silero_vad": ("If", "LSTM"),
    "gtcrn_simple": ("GRU",),
    "qs_lstm": ("Loop",),
    "scan_1": ("Scan",),
    "hand_lstm": ("LSTM",),
    "genai_tiny_gpt2": ("EmbedLayerNormalization",),
}


def test_the_rule_for_outputs() -> None:
    c = case("deeplab_v3")
    (expected,) = c.expected()
    assert expected.step == (1, 4, 4, 1)
    full = np.zeros((1, 257, 257, 21), np.float32)
    full[:, ::4, ::4, :] = expected.array
    assert expected.error(full) == 0
    assert expected.error(full * np.float32(1.01)) > 1
    assert expected.error(full.astype(np.float64)) == float("inf")
