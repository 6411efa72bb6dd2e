"""Models that stitch compiles in part. ONNX's own evaluator, in numpy, stands for another runtime."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from stitch import api
from stitch.delegated import DelegatedModel
from stitch.delegation import UNSUPPORTED, UNTYPED, WHOLE
from stitch.errors import (
    InputError,
    InvalidModel,
    MissingInput,
    ResourceError,
    StreamError,
    UnknownInput,
    UnsupportedOperator,
    WrongDtype,
    WrongRank,
    WrongShape,
)
from stitch.runtime.delegate import OnnxRuntime, runner
from tests import real_models
from tests.real_models import Case

Model = onnx.ModelProto


class Odd(OpRun):
    """com.example.Odd: an operator that nobody has."""

    op_domain = "com.example"

    def _run(self, x: Any, **_: Any) -> tuple[Any, ...]:
        return (x * 3 + 1,)


class Numpy:
    """Counts the parts that it was given."""

    name = "numpy"

    def __init__(self) -> None:
        self.parts: list[Model] = []

    def load(self, model: bytes, outputs: Sequence[str]) -> Any:
        self.parts.append(onnx.load_from_string(model))
        evaluator = ReferenceEvaluator(self.parts[-1], new_ops=[Odd])

        def run(feeds: Mapping[str, Any]) -> list[Any]:
            found: Any = evaluator.run(list(outputs), dict(feeds))
            return list(found)

        return run


def info(name: str, shape: Any = ("n", 4), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def make(nodes: Any, inputs: Any, outputs: Any, weights: Any = (), opset: int = 17) -> Model:
    graph = helper.make_graph(list(nodes), "made", list(inputs), list(outputs), list(weights))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def node(kind: str, reads: Sequence[str], writes: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    domain = "com.example" if kind == "Odd" else ""
    return helper.make_node(kind, reads, writes, domain=domain, **attributes)


def split(model: Model) -> tuple[DelegatedModel, Numpy]:
    numpy = Numpy()
    return api.delegated(model, numpy, cache=False, threads=1), numpy


def agree(model: Model, feeds: dict[str, Any]) -> tuple[DelegatedModel, Numpy]:
    made, numpy = split(model)
    wanted = ReferenceEvaluator(model, new_ops=[Odd]).run(None, feeds)
    for _ in range(2):
        for got, want in zip(made.run(None, feeds), wanted, strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    return made, numpy


def x(rows: int = 3, columns: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def devices(model: DelegatedModel) -> list[tuple[str, int]]:
    return [(device, len(nodes)) for device, nodes in model.division.regions]


def codes(model: DelegatedModel) -> dict[str, str]:
    return {node: code for node, code, _ in model.division.reasons}


# ------------------------------------------------------------------ regions


def test_one_operator_in_the_middle() -> None:
    nodes = [
        node("Exp", ["x"], ["a"]), node("Sin", ["a"], ["b"]), node("Odd", ["b"], ["c"], name="odd"),
        node("Add", ["c", "a"], ["d"]), node("Tanh", ["d"], ["y"]),
    ]  # fmt: skip
    model = make(nodes, [info("x")], [info("y")])
    model.graph.value_info.append(info("c"))
    made, numpy = agree(model, {"x": x()})
    assert devices(made) == [("stitch", 2), ("numpy", 1), ("stitch", 2)]
    assert [len(p.graph.input) for p in numpy.parts] == [1]
    assert codes(made) == {"odd": UNSUPPORTED}
    text = str(made.explain())
    assert "region 1 on numpy: odd" in text
    assert "operator Odd (com.example, opset 1): stitch does not support" in text
    assert made.explain().to_dict()["reasons"][0]["code"] == UNSUPPORTED
    assert [t.shape for t in made.inputs] == [("n", 4)]
    for rows in (1, 7):
        wanted: Any = ReferenceEvaluator(model, new_ops=[Odd]).run(None, {"x": x(rows)})
        np.testing.assert_allclose(made(x(rows)), wanted[0], rtol=1e-5)


def test_regions_are_as_few_as_can_be() -> None:
    """Two branches with an unknown operator each: one region before, one for both of them, one after."""
    nodes = [
        node("Exp", ["x"], ["a"]), node("Odd", ["a"], ["b"]), node("Sin", ["x"], ["c"]), node("Odd", ["c"], ["d"]),
        node("Add", ["b", "d"], ["y"]),
    ]  # fmt: skip
    model = make(nodes, [info("x")], [info("y")])
    model.graph.value_info.extend([info("b"), info("d")])
    made, _ = agree(model, {"x": x()})
    assert devices(made) == [("stitch", 2), ("numpy", 2), ("stitch", 1)]


def test_shapes_are_computed_where_they_are_read() -> None:
    """The target of the Reshape follows from a shape, and would be data if a region handed it to another."""
    nodes = [
        node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"]),
        node("Concat", ["n", "rest"], ["target"], axis=0),
        node("Odd", ["x"], ["a"]), node("Reshape", ["a", "target"], ["y"]),
    ]  # fmt: skip
    weights = [
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("rest", TensorProto.INT64, [2], [2, 2]),
    ]
    model = make(nodes, [info("x")], [info("y", ("n", 2, 2))], weights)
    model.graph.value_info.append(info("a"))
    made, numpy = agree(model, {"x": x(5)})
    assert devices(made) == [("numpy", 1), ("stitch", 1)]
    assert [n.op_type for n in numpy.parts[0].graph.node] == ["Odd"]


def test_what_nothing_is_known_of_is_delegated_too() -> None:
    model = make(
        [node("Odd", ["x"], ["a"]), node("Exp", ["a"], ["b"]), node("Exp", ["b"], ["y"])], [info("x")], [info("y")]
    )
    made, _ = agree(model, {"x": x()})
    assert [device for device, _ in devices(made)] == ["numpy"]
    assert set(codes(made).values()) <= {UNSUPPORTED, WHOLE, UNTYPED}
    loose = info("a")
    loose.type.tensor_type.ClearField("shape")
    model.graph.value_info.append(loose)
    made, _ = agree(model, {"x": x()})
    assert codes(made)["Exp_1"] == UNTYPED
    assert devices(made)[0][0] == "numpy"


def branch(name: str, kind: str) -> onnx.GraphProto:
    """Reads `a` and the weight from outside; its own `b` is another one than that outside."""
    return helper.make_graph([node(kind, ["a"], ["b"]), node("Mul", ["b", "w"], [name])], name, [], [info(name)])


def test_branches_that_read_from_outside() -> None:
    nodes = [
        node("Exp", ["x"], ["a"]), node("Sin", ["x"], ["b"]),
        node("If", ["c"], ["d"], then_branch=branch("t", "Sin"), else_branch=branch("e", "Cos"), name="if"),
        node("Add", ["d", "b"], ["y"]),
    ]  # fmt: skip
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    model = make(nodes, [info("x"), info("c", (), TensorProto.BOOL)], [info("y")], [weight])
    for c in (True, False):
        made, numpy = agree(model, {"x": x(), "c": np.array(c)})
        assert devices(made) == [("stitch", 2), ("numpy", 1), ("stitch", 1)]
        assert {i.name for i in numpy.parts[0].graph.input} == {"a", "c"}
        assert [t.name for t in numpy.parts[0].graph.initializer] == ["w"]


def test_outputs_that_no_region_makes() -> None:
    """An input, a weight, a shape, and what two regions read."""
    nodes = [node("Odd", ["x"], ["a"]), node("Shape", ["x"], ["s"]), node("Exp", ["a"], ["y"])]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    outputs = [info("y"), info("w", (2,)), info("a"), info("s", (2,), TensorProto.INT64)]
    agree(make(nodes, [info("x")], outputs, [weight]), {"x": x()})
    model = make(nodes, [info("x")], [*outputs, info("x")], [weight])
    made, _ = split(model)
    feed = x()
    results = made.run(None, {"x": feed})
    np.testing.assert_array_equal(results[-1], feed)
    assert not np.shares_memory(results[-1], feed)


def test_a_model_that_needs_no_delegate() -> None:
    made, numpy = agree(make([node("Exp", ["x"], ["y"])], [info("x")], [info("y")]), {"x": x()})
    assert devices(made) == [("stitch", 1)]
    assert not numpy.parts


KINDS = ["Exp", "Odd", "Sin", "Add", "Tanh", "Odd"]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_any_graph(steps: list[tuple[str, int, int]]) -> None:
    names, nodes = ["x"], []
    for k, (kind, a, b) in enumerate(steps):
        reads = [names[a % len(names)], names[b % len(names)]][: 2 if kind == "Add" else 1]
        nodes.append(node("Tanh", reads[:1], [f"t{k}"]))  # or numbers grow without end
        nodes.append(node(kind, [f"t{k}", *reads[1:]], [f"v{k}"]))
        names.append(f"v{k}")
    model = make(nodes, [info("x")], [info(n) for n in names[-2:] if n != "x"])
    model.graph.value_info.extend(info(n) for n in names[1:-2])
    made, _ = agree(model, {"x": x(2)})
    kinds = [device for device, _ in devices(made)]
    assert all(a != b for a, b in pairwise(kinds))


def test_nodes_of_one_name() -> None:
    nodes = [
        node("Exp", ["x"], ["a"], name="n"),
        node("Odd", ["a"], ["b"], name="n"),
        node("Sin", ["b"], ["y"], name="n"),
    ]
    model = make(nodes, [info("x")], [info("y")])
    model.graph.value_info.append(info("b"))
    made, _ = agree(model, {"x": x()})
    assert devices(made) == [("stitch", 1), ("numpy", 1), ("stitch", 1)]


def test_inputs_of_which_nothing_is_known() -> None:
    loose = info("x")
    loose.type.tensor_type.ClearField("shape")
    made, _ = agree(make([node("Exp", ["x"], ["y"])], [loose], [info("y")]), {"x": x()})
    assert codes(made) == {"Exp_0": UNTYPED}
    made = api.delegated(
        make([node("Exp", ["x"], ["y"])], [loose], [info("y")]), Numpy(), cache=False, shapes={"x": ["n", 4]}
    )
    assert devices(made) == [("stitch", 1)]
    with pytest.raises(InvalidModel, match="rank 2, but"):
        api.delegated(odd(), Numpy(), cache=False, shapes={"x": [1]})
    with pytest.raises(UnknownInput):
        api.delegated(odd(), Numpy(), cache=False, shapes={"z": [1]})


# ------------------------------------------------------------------ running


def odd() -> Model:
    return make([node("Odd", ["x"], ["y"])], [info("x", (3, 4))], [info("y", (3, 4))])


def test_wrong_inputs() -> None:
    made, _ = split(odd())
    with pytest.raises(MissingInput):
        made.run(None, {})
    for wrong, error in ((x().astype(np.float64), WrongDtype), (x()[0], WrongRank), (x(5), WrongShape)):
        with pytest.raises(error, match="'x'"):
            made.run(None, {"x": wrong})
    with pytest.raises(StreamError, match="input 1 of"):
        list(made.stream([x(), x(5)]))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(TensorProto.STRING, object), (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn), (TensorProto.COMPLEX64, "c8")],
)
def test_inputs_of_types_that_only_the_delegate_has(kind: int, dtype: Any) -> None:
    """Of strings it was said that `.astype('string')` would do, and asking for the inputs' types failed."""
    nodes = [node("Concat", ["s", "s"], ["y"], axis=0), node("Relu", ["x"], ["z"])]
    model = api.delegated(
        make(nodes, [info("s", ("n",), kind), info("x")], [info("y", None, kind), info("z")]), Numpy()
    )
    assert model.inputs[0].dtype == np.dtype(dtype)
    s, x = np.array([1, 2]).astype(dtype), np.full((2, 4), -1, np.float32)
    y, z = model.run(None, {"s": s, "x": x})
    assert y.tolist() == [*s.tolist(), *s.tolist()]
    np.testing.assert_array_equal(z, np.zeros((2, 4)))


def test_streams_through_regions() -> None:
    nodes = [node("Exp", ["x"], ["a"]), node("Odd", ["a"], ["b"]), node("Identity", ["b"], ["y"])]
    model = make(nodes, [info("x")], [info("y")])
    model.graph.value_info.append(info("b"))
    made, _ = split(model)
    items = [x(1 + k % 3) + k / 50 for k in range(30)]
    for got, item in zip(made.stream(items), items, strict=True):
        np.testing.assert_allclose(got[0], np.exp(item) * 3 + 1, rtol=1e-5)


def test_results_of_a_delegate_are_its_own() -> None:
    run = runner(lambda feeds: [feeds["x"], feeds["x"][::2], np.float32(3)], ["x"], "a test")
    given = np.arange(6, dtype=np.float32)
    same, half, number = run([given], None)
    assert not np.shares_memory(same, given)
    assert not np.shares_memory(half, given)
    assert number.shape == ()
    own = np.zeros(6, np.float32)
    assert run([given], [own, None, None])[0] is own
    assert own.tolist() == given.tolist()


def test_a_delegate_that_fails() -> None:
    def fails(feeds: Any) -> Any:
        raise RuntimeError("out of range\nwith a long trace")

    with pytest.raises(InputError, match=r"^region 1 on numpy failed: out of range$"):
        runner(fails, ["x"], "region 1 on numpy")([x()], None)


def test_refusals_without_a_way_out() -> None:
    """A delegate is no help where no node is to blame any more."""

    def refuse(_: Any) -> Any:
        raise UnsupportedOperator("Exp", node="Exp_0", opset=17, dtype="float32")

    from stitch.delegated import compile as compile_delegated

    made = compile_delegated(make([node("Exp", ["x"], ["y"])], [info("x")], [info("y")]), refuse, Numpy())
    assert devices(made) == [("numpy", 1)]


def test_onnxruntime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError, match=r"onnxruntime is not installed; install it with `pip install onnxruntime`"):
        api.delegated(odd(), cache=False)


def test_onnxruntime_that_does_not_take_a_part() -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ResourceError, match=r"onnxruntime does not take the part: .*Odd"):
        api.delegated(odd(), OnnxRuntime(), cache=False)


# ------------------------------------------------------------------ real models


@real_models.parametrize("silero_vad", "gtcrn_simple", "qs_lstm", "scan_1", "hand_lstm")
def test_shared_models_that_stitch_refuses(case: Case) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(UnsupportedOperator):
        api.optimize(case.path, cache=False)
    model = api.delegated(case.path, cache=False)
    feed = case.feed()
    results = model.run(None, feed)
    errors = case.errors(dict(zip([t.name for t in model.outputs], results, strict=True)))
    assert max(errors.values()) <= 1, errors
    assert {device for device, _ in model.division.regions} >= {"onnxruntime"}
    again = next(iter(model.stream([feed])))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(results, again, strict=True))
