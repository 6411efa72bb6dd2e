"""What a model is predicted to take, for the objective "memory", beside what the runtime then asks for."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import stitch
from stitch.api import CompiledModel
from stitch.errors import MemoryLimit
from stitch.limits import bytes_of
from stitch.ops import host
from stitch.runtime import memory

MB = 1 << 20


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype(np.float32), name)


def make(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int | str], weights: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(list(nodes), "made", [x], infos, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def network() -> onnx.ModelProto:
    """Convolutions whose results are needed again, so that several live at once; and scratch of each thread."""
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Softmax", ["c"], ["d"], axis=1),
        helper.make_node("Conv", ["d", "w"], ["e"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["e", "b"], ["y"]),
    ]
    return make(nodes, ["n", 16, 96, 96], [weight("v", 32, 16, 3, 3), weight("w", 32, 32, 3, 3)])


def sorting() -> onnx.ModelProto:
    """A sort, which numpy does, between two pieces of native code."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("TopK", ["a", "k"], ["b", "i"], axis=1),
        helper.make_node("MatMul", ["b", "w"], ["c"]),
        helper.make_node("Softmax", ["c"], ["y"], axis=1),
    ]
    k = numpy_helper.from_array(np.array([512], np.int64), "k")
    return make(nodes, ["n", 512], [weight("w", 512, 512), k])


def taken(model: CompiledModel, feeds: dict[str, np.ndarray]) -> int:
    """Bytes that the runtime asked for in two runs, without what is added to align blocks, and what it was given."""
    sizes: list[int] = []
    real = memory._mapped

    def mapped(size: int) -> object:
        sizes.append(size)
        return real(size)

    with mock.patch.object(memory, "_mapped", mapped):
        model.run(None, feeds)
        tracemalloc.start()
        model.run(None, feeds)
        small = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    executable = model._executable
    arenas = [frame.arena for frame in executable._frames.free]
    mine = sum(a.capacity for a in arenas)
    for arena in arenas:
        if arena.capacity >= memory.HUGE:
            sizes.remove(arena.capacity + memory.HUGE)
    return mine + sum(sizes) + small + executable._constants.nbytes + sum(x.nbytes for x in feeds.values())


def temporaries(x: np.ndarray) -> int:
    """What numpy takes for itself while it sorts, which nobody promises to count."""
    tracemalloc.start()
    results = host.topk({"axis": 1, "largest": True}, x, np.array([x.shape[1]]))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most - sum(r.nbytes for r in results)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("build", "shape"), [(network, (4, 16, 96, 96)), (sorting, (700, 512))])
def test_predicted_is_what_is_taken(build: Callable[[], onnx.ModelProto], shape: tuple[int, ...], threads: int) -> None:
    sizes = {"n": shape[0]}
    model = stitch.optimize(build(), objective="memory", memory=1e9, sizes=sizes, threads=threads, cache=False)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    predicted, found = bytes_of(model.artifact, sizes, threads), taken(model, {"x": x})
    found -= temporaries(x) if build is sorting else 0
    assert predicted > 5 * MB
    assert 0.97 * predicted <= found <= 1.03 * predicted + 0.1 * MB, (predicted, found)


def test_a_limit_counts_what_numpy_is_given() -> None:
    """Each step alone would fit."""
    model = stitch.optimize(sorting(), cache=False)
    native = bytes_of(model.artifact, {"n": 700}, 1) - 2 * 700 * 512 * 4  # without what goes to the sort and comes back
    with pytest.raises(MemoryLimit):
        stitch.optimize(sorting(), objective="memory", memory=native, sizes={"n": 700}, cache=False)
