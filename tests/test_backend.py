"""stitch behind onnx.backend, and a part of ONNX's own suite (all of it: python -m benchmarks.nodes)."""

import functools
import unittest
import zlib
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import TensorProto, helper

import stitch.backend as backend
from benchmarks import nodes
from stitch.errors import UnknownInput, UnsupportedOperator

ONE_IN = 7
ONE_IN_SYMBOLIC = 14

ONCE_WRONG = [
    "pytorch-converted/test_Conv3d_dilated_strided",
    "pytorch-converted/test_Conv3d_groups",
    "pytorch-converted/test_Conv3d_stride_padding",
    "test_adam",
    "test_affine_grid_2d_expanded",
    "test_affine_grid_3d_align_corners_expanded",
    "test_ai_onnx_ml_binarizer",
    "test_attention_24_qk_matmul_output_mode3_softmax_precision",
    "test_attention_4d_attn_mask_causal_bf16_expanded",
    "test_attention_4d_causal_fp16",
    "test_attention_4d_gqa_causal_nonpad_decode_fp16",
    "test_bitcast_bool_to_uint8",
    "test_bitshift_right_int32_negative_shift",
    "test_bitshift_right_int8_shift_ge_width",
    "test_einsum_batch_matmul_bfloat16",
    "test_flexattention",
    "test_flexattention_fp16",
    "test_flexattention_relative_positional",
    "test_scatter_elements_with_duplicate_indices",
    "test_scatter_elements_with_reduction_mul",
    "test_scatter_without_axis",
    "test_tensorscatter_circular",
]
ONCE_WRONG_SYMBOLIC = [
    "test_resize_downsample_sizes_linear_antialias",
    "test_resize_downsample_sizes_cubic_antialias",
    "test_cast_FLOAT8E4M3FN_to_FLOAT",
]


@functools.cache
def cases() -> dict[str, Any]:
    return {nodes.key(c): c for c in nodes.cases()}


@functools.cache
def stored() -> dict[str, nodes.Result]:
    return nodes.read_list()


def chosen(one_in: int, always: list[str]) -> list[str]:
    """One in so many cases, by a hash of its name, so that another case does not change the choice."""
    picked = (n for n in cases() if zlib.crc32(n.encode()) % one_in == 0)
    return sorted({*picked, *(n for n in always if n in cases())})


def test_the_list_is_complete_and_has_nothing_wrong() -> None:
    if onnx.__version__ != nodes.list_version():
        pytest.skip("benchmarks/nodes.txt is for another version of onnx")
    assert set(stored()) == set(cases())
    assert not [n for n, r in stored().items() if r.state == "wrong"]
    assert sum(r.state == "pass" for r in stored().values()) >= 1400


@pytest.mark.parametrize("name", chosen(ONE_IN, ONCE_WRONG))
def test_case(name: str) -> None:
    result = nodes.run(cases()[name])
    if name in stored() and onnx.__version__ == nodes.list_version():
        assert result.state == stored()[name].state, str(result)
    else:
        assert result.state != "wrong", str(result)


@pytest.mark.parametrize("name", chosen(ONE_IN_SYMBOLIC, ONCE_WRONG_SYMBOLIC))
def test_case_with_symbols(name: str) -> None:
    result = nodes.run(cases()[name], symbolic=True)
    assert result.state != "wrong", str(result)


# ------------------------------------------------------------------ the interface


def model() -> onnx.ModelProto:
    """y = a - b, z = relu(y)."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Sub", ["a", "b"], ["y"]), helper.make_node("Relu", ["y"], ["z"])], "graph",
        [info("a", TensorProto.FLOAT, [2, 3]), info("b", TensorProto.FLOAT, [2, 3])],
        [info("y", TensorProto.FLOAT, [2, 3]), info("z", TensorProto.FLOAT, [2, 3])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.full((2, 3), 2, np.float32)


def test_a_model_takes_inputs_by_position_and_by_name() -> None:
    prepared = backend.prepare(model())
    for outputs in (prepared.run([A, B]), prepared.run({"b": B, "a": A}), backend.run_model(model(), (A, B))):
        y, z = outputs
        np.testing.assert_array_equal(y, A - B)
        np.testing.assert_array_equal(z, np.maximum(A - B, 0))
    named: Any = prepared.run([A, B])
    np.testing.assert_array_equal(named["z"], np.maximum(A - B, 0))


def test_wrong_inputs_are_refused() -> None:
    prepared = backend.prepare(model())
    with pytest.raises(ValueError, match="3 inputs are given, but the model has 2"):
        prepared.run([A, B, A])
    with pytest.raises(UnknownInput, match="'c'"):
        prepared.run({"a": A, "b": B, "c": A})


def test_one_node() -> None:
    (y,) = backend.run_node(helper.make_node("Transpose", ["x"], ["y"]), [A])
    np.testing.assert_array_equal(y, A.T)
    (y,) = backend.run_node(helper.make_node("Softmax", ["x"], ["y"], axis=0), {"x": A}, opset_version=13)
    np.testing.assert_allclose(y.sum(0), 1, rtol=1e-6)
    known = [(np.dtype(np.float32), (2, 3))]
    (y,) = backend.run_node(helper.make_node("Clip", ["x", "", "m"], ["y"]), [A, np.float32(2)], outputs_info=known)
    np.testing.assert_array_equal(y, np.minimum(A, 2))


def test_devices() -> None:
    assert backend.supports_device("CPU")
    assert not backend.supports_device("CUDA")
    assert not backend.supports_device("CPU:1")
    assert not backend.supports_device("toaster")
    with pytest.raises(ValueError, match="CUDA"):
        backend.prepare(model(), "CUDA")


def test_compatibility() -> None:
    assert backend.is_compatible(model())
    assert not backend.is_compatible(model(), "CUDA")
    text = helper.make_tensor_value_info("s", TensorProto.STRING, [1])
    graph = helper.make_graph([helper.make_node("StringConcat", ["s", "s"], ["t"])], "graph", [text], [text])
    graph.output[0].name = "t"
    strings = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    assert not backend.is_compatible(strings)
    with pytest.raises(UnsupportedOperator, match="StringConcat"):
        backend.prepare(strings)


def test_the_suite_of_onnx_runs_on_it() -> None:
    suite = onnx.backend.test.BackendTest(backend.StitchBackend, __name__)
    suite.include("^test_softmax_axis_[01]_cpu$")
    found = unittest.TestResult()
    suite.test_suite.run(found)
    assert found.testsRun > 0
    assert found.wasSuccessful(), found.failures + found.errors


def test_a_case_that_kills_its_process_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    monkeypatch.setattr(nodes, "run", lambda case, symbolic: os.kill(os.getpid(), signal.SIGKILL))
    two = [cases()["test_relu"], cases()["test_abs"]]
    found = dict(nodes.run_all(two, 1, False))
    assert {n: r.state for n, r in found.items()} == {"test_relu": "wrong", "test_abs": "wrong"}
    assert "status -9" in found["test_relu"].reason


def test_a_case_that_hangs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(nodes, "run", lambda case, symbolic: time.sleep(60))
    found = dict(nodes.run_all([cases()["test_relu"]], 1, False, timeout=0.2))
    assert "timeout" in found["test_relu"].reason
