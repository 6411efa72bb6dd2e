"""Models on devices that the user names: what is decided, that it runs, and what is wrong with what was asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import stitch
from stitch import compiler, importer, knobs, placed
from stitch.api import CompiledModel
from stitch.codegen import machine
from stitch.cost import Rates
from stitch.decision import Decision
from stitch.devices import Device
from stitch.errors import (
    DeviceError,
    EmptyDevice,
    InputError,
    MemoryLimit,
    OverlappingDevices,
    StitchError,
    UnavailableCpus,
    UnknownDevice,
    UnsupportedOperator,
)
from stitch.pipelined import PinnedModel, PlacedModel
from stitch.topology import Board, Cluster, render_cpus

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU only")


def chain(layers: int = 6, width: int = 64) -> onnx.ModelProto:
    """Matmuls with a softmax behind each, over an open batch."""
    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for k in range(layers):
        w = random.standard_normal((width, width)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(w, f"w{k}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{k}"], [f"m{k}"]))
        value = f"s{k}" if k + 1 < layers else "y"
        nodes.append(helper.make_node("Softmax", [f"m{k}"], [value], axis=0))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", width]) for n in "xy"]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def devices() -> list[str]:
    return [f"cpu:{c}" for c in CPUS[:2]]


def feed(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(batch).standard_normal((batch, 64)).astype(np.float32)}


@two_cpus
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_placed_models_give_the_same_bits(objective: str) -> None:
    model = stitch.optimize(chain(), devices=devices(), objective=objective, sizes={"batch": 300}, cache=False)
    plain = stitch.optimize(chain(), cache=False)
    for batch in (300, 1, 77):
        (found,), (wanted,) = model.run(None, feed(batch)), plain.run(None, feed(batch))
        np.testing.assert_array_equal(found, wanted)


@two_cpus
def test_throughput_is_in_balanced_stages() -> None:
    model = stitch.optimize(
        chain(12, 256), devices=devices(), objective="throughput", sizes={"batch": 512}, cache=False
    )
    assert isinstance(model, PlacedModel)
    decision = model.explain()
    assert [s.cpus for s in decision.stages] in ([(CPUS[0],), (CPUS[1],)], [(CPUS[1],), (CPUS[0],)])
    first, second = (s.seconds for s in decision.stages)
    assert max(first, second) < 1.5 * min(first, second)
    assert decision.seconds == max(first, second)
    assert sum(s.kernels for s in decision.stages) == len(decision.assignment)
    text = str(decision)
    assert "the bottleneck" in text
    assert "everything on" in text
    assert "batch=512" in text
    results = list(model.stream([{"x": np.full((3, 256), float(k), np.float32)} for k in range(9)]))
    assert len(results) == 9


@two_cpus
def test_a_placed_model_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with knobs.using(cache_dir=tmp_path, cache_bytes=1 << 30):
        path = tmp_path / "chain.onnx"
        onnx.save(chain(), path)
        first = stitch.optimize(path, devices=devices(), objective="throughput")
        monkeypatch.setattr("stitch.compiler.compile_parts", None)
        again = stitch.optimize(path, devices=devices(), objective="throughput")
        assert isinstance(first, PlacedModel)
        assert isinstance(again, PlacedModel)
        assert again.explain() == first.explain()
        np.testing.assert_array_equal(again.run(None, feed(5))[0], first.run(None, feed(5))[0])


def test_a_decision_survives_as_text() -> None:
    model = stitch.optimize(chain(), devices=[f"cpu:{CPUS[0]}"], cache=False)
    assert isinstance(model, PlacedModel)
    decision = model.explain()
    assert len(decision.stages) == 1
    assert Decision.of_json(decision.to_json()) == decision


def test_the_null_device_computes_nothing() -> None:
    model = stitch.optimize(chain(), devices=["null"], cache=False)
    (y,) = model.run(None, feed(4))
    assert y.shape == (4, 64)
    assert not y.any()
    assert "kernel" in str(model.explain())


@two_cpus
def test_stages_on_one_device_have_cores_of_their_own() -> None:
    model = stitch.optimize(
        chain(12, 256), devices=f"cpu:{CPUS[0]},{CPUS[1]}", objective="throughput", sizes={"batch": 8}, cache=False
    )
    decision = model.explain()
    used = [cpu for s in decision.stages for cpu in s.cpus]
    assert len(used) == len(set(used)), decision
    assert [s.device for s in decision.stages] == [f"cpu:{render_cpus(s.cpus)}" for s in decision.stages]


def test_a_part_of_a_device_has_whole_cores() -> None:
    """Two CPUs of one core are not two cores."""
    target = machine.host()
    stitched = compiler.cut(importer.load(chain(8, 256)), target)
    cluster = Cluster("p", tuple((k, k + 4) for k in range(4)), 1024)
    board = Board("smt", str(target), (cluster,))
    decision = placed.decide(
        stitched, target, [Device("cpu", (cluster,))], board, "throughput", {"batch": 8}, Rates.of(target)
    )
    assert len(decision.stages) > 1
    for stage in decision.stages:
        assert {cpu % 4 for cpu in stage.cpus if cpu < 4} == {cpu % 4 for cpu in stage.cpus if cpu >= 4}
    assert sum(len(s.cpus) for s in decision.stages) == len({cpu for s in decision.stages for cpu in s.cpus})


def images() -> onnx.ModelProto:
    """Convolutions and a pooling over images of any size, which are empty where all symbols are 1."""
    random = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("v", (16, 3, 3, 3)), ("w", (8, 16, 3, 3)))
    ]
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["c", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "v"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, "p", "q"])
    graph = helper.make_graph(nodes, "images", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("sizes", [{}, {"n": 0}, {"n": 2, "h": 32, "v": 32}, {"n": 10**12, "h": 64, "v": 64}])
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_sizes_that_leave_nothing_are_placed_too(objective: str, sizes: dict[str, int]) -> None:
    model = stitch.optimize(images(), devices="cpu", objective=objective, sizes=sizes, cache=False)
    decision = model.explain()
    assert all(np.isfinite(s.seconds) and s.seconds >= 0 for s in decision.stages)
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype(np.float32)
    np.testing.assert_array_equal(model.run(None, {"x": x})[0], stitch.optimize(images()).run(None, {"x": x})[0])


@pytest.mark.parametrize("size", [-1, 2.5, "x", True])
@pytest.mark.parametrize("given", [{"devices": ["cpu"]}, {"objective": "memory", "memory": 1 << 30}])
def test_wrong_sizes(given: dict[str, Any], size: Any) -> None:
    with pytest.raises(StitchError, match="not a whole number"):
        stitch.optimize(chain(), sizes={"batch": size}, cache=False, **given)
    with pytest.raises(StitchError, match="no symbol 'rows'; its symbols are batch"):
        stitch.optimize(chain(), sizes={"rows": 3}, cache=False, **given)


@pytest.mark.parametrize("memory", [0, -1, "1GB", True, float("nan")])
def test_wrong_limits_of_memory(memory: Any) -> None:
    with pytest.raises(ValueError, match="bytes above zero"):
        stitch.optimize(chain(), objective="memory", memory=memory)


def test_devices_have_teams_of_their_own() -> None:
    with pytest.raises(ValueError, match="either devices or threads"):
        stitch.optimize(chain(), devices=["cpu"], threads=2)


def test_a_model_within_a_limit_stays_on_its_devices() -> None:
    model = stitch.optimize(
        chain(), devices=[f"cpu:{CPUS[-1]}"], objective="memory", memory=1e9, sizes={"batch": 4}, cache=False
    )
    assert isinstance(model, PinnedModel)
    assert [s.cpus for s in model.pipeline.stages] == [frozenset({CPUS[-1]})]
    assert "kernel" in str(model.explain())
    np.testing.assert_array_equal(
        model.run(None, feed(4))[0], stitch.optimize(chain(), cache=False).run(None, feed(4))[0]
    )
    model.close()


def test_memory_chooses_the_team() -> None:
    plenty = stitch.optimize(chain(), objective="memory", memory=1 << 30, sizes={"batch": 100}, threads=4, cache=False)
    assert plenty._executable.threads == 4
    with pytest.raises(MemoryLimit) as found:
        stitch.optimize(chain(), objective="memory", memory=1000, sizes={"batch": 100}, threads=4, cache=False)
    least = found.value.smallest["cpu"]
    assert least > 6 * 64 * 64 * 4, "the weights alone"
    fits = stitch.optimize(chain(), objective="memory", memory=least, sizes={"batch": 100}, threads=4, cache=False)
    assert isinstance(fits, CompiledModel)
    with pytest.raises(MemoryLimit):
        stitch.optimize(chain(), objective="memory", memory=least - 1, sizes={"batch": 100}, threads=4, cache=False)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["cpu:4711"], UnavailableCpus),
        ([f"cpu:{CPUS[0]}", f"cpu:{CPUS[0]}"], OverlappingDevices),
        (["gpu:0"], UnknownDevice),
        ([0], UnknownDevice),
        (5, UnknownDevice),
        (b"cpu", UnknownDevice),
        ([], EmptyDevice),
    ],
)
def test_wrong_devices(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        stitch.optimize(chain(), devices=given)


@pytest.mark.parametrize("beside", ["cpu", "onnxruntime"])
def test_nothing_goes_with_the_null_device(beside: str) -> None:
    with pytest.raises(DeviceError, match="nothing can be placed beside it") as found:
        stitch.optimize(chain(), devices=[beside, "null"])
    assert found.value.device == "null"


def pair() -> onnx.ModelProto:
    """The chain with what it has in the middle as a second output."""
    model = chain()
    model.graph.output.append(helper.make_tensor_value_info("s2", TensorProto.FLOAT, ["batch", 64]))
    return model


@two_cpus
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_placed_models_write_to_arrays_of_the_callers(objective: str) -> None:
    model = stitch.optimize(pair(), devices=devices(), objective=objective, sizes={"batch": 300}, cache=False)
    assert isinstance(model, PlacedModel)
    wanted = stitch.optimize(pair(), cache=False).run(None, feed(5))
    own = np.full((5, 64), np.nan, np.float32)
    for given in ([own, None], [None, own], [own, np.empty_like(own)]):
        results = model.run(None, feed(5), given)
        for got, expected, mine in zip(results, wanted, given, strict=True):
            assert mine is None or got is mine
            np.testing.assert_array_equal(got, expected)
    (named,) = model.run(["s2"], feed(5), [None, own])
    assert named is own
    for wrong, problem in (([own], "1 outputs are given"), ([own[:3], None], "but it will be"), ([5, None], "a int")):
        with pytest.raises(InputError, match=problem):
            model.run(None, feed(5), wrong)  # type: ignore[arg-type]


@two_cpus
@pytest.mark.parametrize("given", [False, True])
def test_placed_models_are_bound(given: bool) -> None:
    model = stitch.optimize(pair(), devices=devices(), objective="throughput", sizes={"batch": 300}, cache=False)
    assert isinstance(model, PlacedModel)
    plain, x = stitch.optimize(pair(), cache=False), feed(5)["x"].copy()
    own = [np.empty((5, 64), np.float32) for _ in range(2)] if given else None
    call = model.bind({"x": x}, own)
    first = call()
    for k in range(3):
        x[:] = feed(5)["x"] * k
        results = call()
        assert all(a is b for a, b in zip(results, own or first, strict=True))
        for got, expected in zip(results, plain.run(None, {"x": x}), strict=True):
            np.testing.assert_array_equal(got, expected)
    for wrong, problem in (
        (x.astype(np.float64), "cannot be bound"), (x.T.copy().T, "cannot be bound"), (x.tolist(), "cannot be bound"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=problem):
            model.bind({"x": wrong})
    with pytest.raises(InputError, match="overlaps input 'x'"):
        model.bind({"x": x}, [x, None])
    with pytest.raises(InputError, match="3 outputs are given"):
        model.bind({"x": x}, [None, None, None])


def test_wrong_objectives() -> None:
    with pytest.raises(ValueError, match="none of latency, throughput, memory"):
        stitch.optimize(chain(), objective="speed")
    with pytest.raises(ValueError, match="goes with a limit"):
        stitch.optimize(chain(), objective="memory")
    with pytest.raises(ValueError, match="goes with a limit"):
        stitch.optimize(chain(), memory=100)


def test_an_operator_that_is_not_supported_needs_a_delegate() -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, 4]) for n in "xy")
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Unknown", ["r"], ["u"], domain="com.example"),
        helper.make_node("Relu", ["u"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "odd", [x], [y])
    ids = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    with pytest.raises(UnsupportedOperator):
        stitch.optimize(helper.make_model(graph, opset_imports=ids), devices=["cpu"], cache=False)
