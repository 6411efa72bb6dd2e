"""Models that once came out wrong, hung or crashed, each as small as it gets. References by hand, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import stitch
from stitch.errors import InvalidModel, SymbolConflict, WrongShape

Array = np.ndarray[Any, Any]
node = helper.make_node
X = np.random.default_rng(5).standard_normal((3, 9)).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def run(
    nodes: list[Any], shape: Sequence[int | str], names: list[str], constants: Mapping[str, Array], x: Array
) -> list[Array]:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in names],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    outputs: list[Array] = stitch.optimize(model, cache=False).run(None, {"x": x})
    return outputs


@pytest.mark.parametrize("shape", [(1, 8), ("n", "m")])
def test_padding_of_an_axis_of_one_that_is_in_a_tile(shape: Sequence[int | str]) -> None:
    """The offset was dropped from the tile's index, and the axis was not."""
    x = X[:1, :8]
    nodes = [node("Exp", ["x"], ["h"]), node("Softmax", ["h"], ["c"], axis=-1), node("Pad", ["h", "p"], ["y"])]
    y, c = run(nodes, shape, ["y", "c"], {"p": ints(1, 0, 0, 0)}, x)
    np.testing.assert_allclose(y, np.pad(np.exp(x), ((1, 0), (0, 0))), rtol=1e-5)
    e = np.exp(np.exp(x) - np.exp(x).max())
    np.testing.assert_allclose(c, e / e.sum(), rtol=1e-5)


def test_padding_of_the_last_axis_of_one() -> None:
    x = X[:, :, None]
    nodes = [
        node("Exp", ["x"], ["h"]), node("ReduceSum", ["h", "a"], ["s"]), node("Div", ["h", "s"], ["c"]),
        node("Pad", ["h", "p"], ["y"]),
    ]  # fmt: skip
    y, c = run(nodes, ("n", "m", 1), ["y", "c"], {"p": ints(0, 0, 1, 0, 0, 1), "a": ints(1)}, x)
    np.testing.assert_allclose(y, np.pad(np.exp(x), ((0, 0), (0, 0), (1, 1))), rtol=1e-5)
    np.testing.assert_allclose(c, np.exp(x) / np.exp(x).sum(1, keepdims=True), rtol=1e-5)


def test_a_position_that_may_lie_beyond_a_symbolic_axis() -> None:
    """Not knowing whether it does was taken for knowing that it does not: a read outside the input."""
    y, = run([node("Tile", ["x", "r"], ["t"]), node("Pad", ["t", "p"], ["y"], mode="edge")], ("n",), ["y"],
             {"p": ints(0, 1), "r": ints(2)}, X[0, :4])  # fmt: skip
    np.testing.assert_array_equal(y, np.pad(np.tile(X[0, :4], 2), (0, 1), mode="edge"))
    nodes = [node("Transpose", ["x"], ["t"], perm=[1, 0]), node("Reshape", ["t", "s"], ["r"])]
    (y,) = run([*nodes, node("Gather", ["r", "i"], ["y"])], ("n", "m"), ["y"], {"s": ints(-1), "i": ints(5)}, X)
    np.testing.assert_array_equal(y, X.T.reshape(-1)[[5]])


def test_a_guarded_constant_is_not_laid_out_from_outside_of_it() -> None:
    nodes = [
        node("Gather", ["x", "i"], ["g"]), node("Pad", ["g", "p", "v"], ["q"]),
        node("Slice", ["q", "a", "b", "z", "s"], ["y"]),
    ]  # fmt: skip
    constants = {
        "i": ints(2, -2, -3, 1, -1), "p": ints(1, 1), "v": np.array(1.5, np.float32), "a": ints(-1), "b": ints(0),
        "z": ints(0), "s": ints(-1),
    }  # fmt: skip
    for _ in range(3):
        (y,) = run(nodes, [3], ["y"], constants, np.array([3, 4, 5], np.float32))
        np.testing.assert_array_equal(y, [1.5, 5, 4, 3, 4, 5])


@pytest.mark.parametrize("shape", [[1], ["n"]])
def test_a_slice_backwards_from_before_the_first_element(shape: Sequence[int | str]) -> None:
    """ONNX, unlike numpy, starts at the first element then."""
    constants = {"a": ints(-2), "b": ints(-100), "z": ints(0), "s": ints(-3)}
    (y,) = run([node("Slice", ["x", "a", "b", "z", "s"], ["y"])], shape, ["y"], constants, X[0, :1])
    np.testing.assert_array_equal(y, X[0, :1])


def test_diamonds_take_linear_time() -> None:
    """Shared expressions were walked once per path: 2^60 of them here."""
    nodes, last, want = [], "x", X
    for k in range(60):
        nodes += [node("Neg", [last], [f"a{k}"]), node("Abs", [last], [f"b{k}"])]
        nodes += [node("Max", [f"a{k}", f"b{k}"], [f"v{k}"]), node("Tanh", [f"v{k}"], [f"w{k}"])]
        last, want = f"w{k}", np.tanh(np.maximum(-want, np.abs(want)))
    (y,) = run(nodes, ("n", "m"), [last], {}, X)
    np.testing.assert_allclose(y, want, rtol=1e-4)


def test_long_chains_do_not_exhaust_the_stack() -> None:
    nodes, last, want = [], "x", X
    for k in range(500):
        nodes += [node(["Tanh", "Neg"][k % 2], [last], [f"v{k}"])]
        last, want = f"v{k}", np.tanh(want) if k % 2 == 0 else -want
    (y,) = run(nodes, ("n", "m"), [last], {}, X)
    np.testing.assert_allclose(y, want, rtol=1e-4)


def test_transposes_that_two_rules_send_back_and_forth() -> None:
    """Sinking undid itself where both orders of a value were there already, until the stack was exhausted."""
    weights = np.random.default_rng(1).standard_normal((5, 10, 3, 3)).astype(np.float32)
    x = np.random.default_rng(2).standard_normal((1, 5, 8, 9)).astype(np.float32)
    nodes = [
        node("Relu", ["x"], ["r"]), node("Concat", ["x", "r"], ["both"], axis=1),
        node("Conv", ["both", "w"], ["c"], pads=[1, 1, 1, 1]), node("Concat", ["c", "both"], ["y"], axis=1),
    ]  # fmt: skip
    (y,) = run(nodes, (1, 5, 8, 9), ["y"], {"w": weights}, x)
    both = np.concatenate([x, np.maximum(x, 0)], 1)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(both, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    want = np.einsum("nchwij,kcij->nkhw", windows, weights)
    np.testing.assert_allclose(y, np.concatenate([want, both], 1), rtol=1e-4, atol=1e-4)


def test_a_constant_that_is_added_to_a_transpose() -> None:
    """Likewise, with a constant, which costs nothing to transpose, over and over."""
    rng = np.random.default_rng(1)
    w, c, m = (rng.standard_normal(s).astype(np.float32) for s in ((8, 2, 3), (1, 8, 1, 7), (7, 7)))
    x = rng.standard_normal((1, 8, 7)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w"], ["a"], group=4, pads=[1, 1]), node("Unsqueeze", ["a", "two"], ["b"]),
        node("Add", ["c", "b"], ["d"]), node("MatMul", ["d", "m"], ["z"]),
    ]  # fmt: skip
    b, z = run(nodes, (1, 8, 7), ["b", "z"], {"w": w, "c": c, "m": m, "two": ints(2)}, x)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1))), 3, 2)
    groups = np.repeat(np.arange(4), 2)
    want = np.stack([np.einsum("nclk,ck->nl", windows[:, 2 * g : 2 * g + 2], w[k]) for k, g in enumerate(groups)], 1)
    np.testing.assert_allclose(b, want[:, :, None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(z, (want[:, :, None] + c) @ m, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [[2.5, 1], [-1, 1], ["", 1], [True, 1], 5, "ab"])
def test_shapes_given_by_the_user_are_checked(given: Any) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])
    graph = helper.make_graph([node("Neg", ["x"], ["y"])], "g", [value], [value.__class__(name="y", type=value.type)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(stitch.errors.InputError, match="the shape given for input 'x'"):
        stitch.optimize(model, cache=False, shapes={"x": given})


def test_what_the_code_generator_lacks_is_refused_by_name() -> None:
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n"])
    target = helper.make_tensor_value_info("y", TensorProto.INT16, ["n"])
    graph = helper.make_graph([node("BitCast", ["x"], ["y"], "bits", to=TensorProto.INT16)], "g", [source], [target])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)])
    with pytest.raises(stitch.errors.UnsupportedOperator, match=r"BitCast.*'bits'"):
        stitch.optimize(model, cache=False)


def test_a_variance_over_channels_of_an_image_of_any_size() -> None:
    """Its sum was cut into parts together with the mean's, which is there only after all of these."""
    x = np.random.default_rng(1).standard_normal((2, 33, 14, 32)).astype(np.float32)
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("LayerNormalization", ["t", "one", "one"], ["l"]),
        node("Transpose", ["l"], ["u"], perm=[0, 3, 1, 2]), node("Conv", ["u", "w"], ["y"], pads=[1, 0, 1, 1]),
    ]  # fmt: skip
    w = np.zeros((2, 33, 3, 2), np.float32)
    w[:, 5, 1, 0] = 1
    (y,) = run(nodes, ("n", 33, "h", 32), ["y"], {"one": np.ones(33, np.float32), "w": w}, x)
    want = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y[:, 0], want[:, 5] + 1, rtol=1e-4, atol=1e-4)


def test_what_is_shared_beside_a_transpose() -> None:
    """The transpose put a loop around each of two parts, and the second one saw the first one's last number only."""
    x = np.random.default_rng(1).standard_normal((1, 4, 28, 32)).astype(np.float32)
    w = np.random.default_rng(2).standard_normal((4, 4, 1, 1)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "x"], ["s"]), node("Sub", ["s", "one"], ["d"]),
        node("Concat", ["s", "x"], ["y"], axis=1),
    ]  # fmt: skip
    d, y = run(nodes, x.shape, ["d", "y"], {"w": w, "one": np.ones(1, np.float32)}, x)
    want = np.einsum("oc,nchw->nohw", w[:, :, 0, 0], x) + x
    np.testing.assert_allclose(d, want - 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, np.concatenate([want, x], 1), rtol=1e-5, atol=1e-5)


def test_padding_of_a_map_whose_pixels_were_in_one_row() -> None:
    """A place before the first row was less than a row's length, and so was taken for a place in it."""
    x = np.random.default_rng(1).standard_normal((2, 4, 5, 7)).astype(np.float32)
    nodes = [
        node("Resize", ["x", "", "scales"], ["r"], mode="nearest", coordinate_transformation_mode="asymmetric",
             nearest_mode="floor"),
        node("Reshape", ["r", "groups"], ["g"]), node("Transpose", ["g"], ["t"], perm=[0, 2, 1, 3]),
        node("Shape", ["r"], ["s"]), node("Reshape", ["t", "s"], ["u"]), node("Pad", ["u", "p"], ["y"]),
    ]  # fmt: skip
    constants = {
        "scales": np.array([1, 1, 3, 3], np.float32), "groups": ints(0, 2, 2, -1), "p": ints(0, 0, 3, 1, 0, 0, 3, 1),
    }  # fmt: skip
    (y,) = run(nodes, ("n", 4, "h", "w"), ["y"], constants, x)
    want = x[:, [0, 2, 1, 3]].repeat(3, 2).repeat(3, 3)
    np.testing.assert_array_equal(y, np.pad(want, ((0, 0), (0, 0), (3, 3), (1, 1))))


@pytest.mark.parametrize("shape", [(1, 2, 3, 8), ("n", 2, 3, 8)])
@pytest.mark.parametrize("operator", ["Conv", "MaxPool", "AveragePool"])
def test_a_window_larger_than_the_map_is_refused_by_name(operator: str, shape: Sequence[int | str]) -> None:
    """Such a model was compiled, or numpy's complaint about its constants was all that was said."""
    inputs = ["x", "w", "b"] if operator == "Conv" else ["x"]
    nodes = [
        node(operator, inputs, ["c"], name="the window", kernel_shape=[5, 5]), node("Sigmoid", ["c"], ["y"]),
    ]  # fmt: skip
    constants = {"w": np.ones((3, 2, 5, 5), np.float32), "b": np.ones(3, np.float32)}
    with pytest.raises(InvalidModel, match=r"the window.* negative, in the shape \(.*, -1, 4,"):
        run(nodes, shape, ["y"], constants, np.zeros((1, 2, 3, 8), np.float32))


def test_one_known_index_of_a_symbolic_axis_is_scattered_to() -> None:
    """-2 of an open axis is a vector of one expression, which no kernel wrote."""
    nodes = [node("ScatterElements", ["x", "i", "u"], ["y"], axis=0, reduction="add")]
    (y,) = run(nodes, ("n",), ["y"], {"i": ints(-2), "u": np.array([3], np.float32)}, X[0])
    expected = X[0].copy()
    expected[-2] += 3
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("name", ["batch size", "0n", "a`b", "%", "größe"])
def test_symbols_of_any_name(name: str) -> None:
    """Names that are written in quotes were never bound, and never found to be two extents."""
    nodes = [node("Softmax", ["x"], ["s"]), node("Concat", ["s", "z"], ["y"], axis=0)]
    inputs = [helper.make_tensor_value_info(i, TensorProto.FLOAT, (name, 9)) for i in "xz"]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = stitch.optimize(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), cache=False)
    (y,) = model.run(None, {"x": X, "z": X})
    np.testing.assert_array_equal(y[3:], X)
    with pytest.raises(SymbolConflict):
        model.run(None, {"x": X, "z": X[:2]})
    assert model.explain().at(**{name: 3}).to_dict()["bytes"]["walked"] == 4 * 9 * (3 + 3 + 6)


def test_an_attention_window_that_ends_before_the_keys_do() -> None:
    """Queries that see no key give zeros, not 0 / 0."""
    q, k = (np.random.default_rng(s).standard_normal((1, 1, n, 4)).astype(np.float32) for s, n in ((0, 5), (1, 2)))
    inputs = [helper.make_tensor_value_info("q", TensorProto.FLOAT, (1, 1, "n", 4))]
    graph = helper.make_graph(
        [node("Attention", ["q", "k", "k"], ["y"], left_window_size=1)], "g", inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [numpy_helper.from_array(k, "k")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    (y,) = stitch.optimize(model, cache=False).run(None, {"q": q})
    scores = np.exp(q[0, 0] @ k[0, 0].T / 2) * (np.arange(5)[:, None] - 1 <= np.arange(2))
    expected = scores[:3] / scores[:3].sum(1, keepdims=True) @ k[0, 0]
    np.testing.assert_allclose(y[0, 0], np.concatenate([expected, np.zeros((2, 4))]), rtol=1e-5, atol=1e-6)


def test_a_thousand_elementwise_operators_in_a_row() -> None:
    """Expressions were walked by recursion, each level of which took one of Python's thousand."""
    nodes = [node("Sigmoid", [f"v{i}" if i else "x"], [f"v{i + 1}"]) for i in range(1100)]
    (y,) = run(nodes, (3, 9), ["v1100"], {}, X)
    np.testing.assert_allclose(y, 0.6590461, rtol=1e-5)  # the fixed point


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_what_lies_outside_of_an_image_is_zero_whatever_lies_at_its_edge(mode: str) -> None:
    """The pixel at the edge was read instead, times zero: not a number where it is infinite."""
    x = np.full((1, 1, 4, 4), np.inf, np.float32)
    grid = np.array([[[[-4, 0], [4, 4], [0, -4]]]], np.float32)
    (y,) = run([node("GridSample", ["x", "g"], ["y"], mode=mode)], (1, 1, "h", "w"), ["y"], {"g": grid}, x)
    np.testing.assert_array_equal(y, np.zeros((1, 1, 1, 3)))
    offset = np.full((1, 8, 2, 2), 9, np.float32)
    weight = np.ones((1, 1, 2, 2), np.float32)
    nodes = [node("DeformConv", ["x", "k", "o"], ["y"], kernel_shape=[2, 2])]
    (y,) = run(nodes, (1, 1, 4, 4), ["y"], {"k": weight, "o": offset}, x)
    np.testing.assert_array_equal(y, np.zeros((1, 1, 2, 2)))


def test_extents_that_no_array_can_have() -> None:
    """A zero broadcast to them was more than numpy can view; and their product, in 64 bits, was nothing at all."""
    for shape in ((2**62, 2**62), (2**32, 2**32)):
        with pytest.raises(WrongShape):
            run([node("Relu", ["x"], ["r"]), node("Add", ["r", "one"], ["y"])], shape, ["y"],
                {"one": np.ones(1, np.float32)}, X)  # fmt: skip
