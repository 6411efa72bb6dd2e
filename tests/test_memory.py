"""What compiling costs in memory: weights are in the model's file and in the artifact, and nowhere else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from stitch.weights import map_file, release, view

MB = 1 << 20
LAYERS, SIZE = 16, 1024  # of 4 MB each

LOAD = """
import re, sys
import numpy as np
import onnx, stitch, stitch.compiler
def status(name):
    return int(re.search(rf"{name}:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
warm, path, *_ = sys.argv[1:]
x = np.ones((3, 1024), np.float32)
stitch.optimize(warm).run(None, {"x": x})
before = status("VmRSS")
model = stitch.optimize(path)
y, = model.run(None, {"x": x})
print(status("VmHWM") - before, y[0, 0])
"""

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")


def _chain(path: Path, layers: int, transposed: bool) -> float:
    """A model of matrix products with weights 2 / SIZE, and what every element becomes that starts from 1."""
    nodes, weights, last = [], [], "x"
    for k in range(layers):
        weights.append(numpy_helper.from_array(np.full((SIZE, SIZE), 2 / SIZE, np.float32), "w" * (k + 1)))
        nodes.append(helper.make_node("Gemm", [last, weights[-1].name], [f"y{k}"], transB=int(transposed)))
        last = f"y{k}"
    shape = [None, SIZE]
    infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("x", last)]
    graph = helper.make_graph(nodes, "chain", infos[:1], infos[1:], weights)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())
    return float(2**layers)


@linux
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_in_memory_once(tmp_path: Path, transposed: bool) -> None:
    """Names of all lengths put the weights at all addresses."""
    _chain(tmp_path / "warm.onnx", 1, transposed)
    expected = _chain(tmp_path / "m.onnx", LAYERS, transposed)
    names = [str(tmp_path / n) for n in ("warm.onnx", "m.onnx")]
    environment = {"STITCH_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin", "STITCH_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, *names]
    cold = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, y = map(float, cold.stdout.split())
    assert y == pytest.approx(expected, rel=1e-4)
    assert grown < 1.4 * LAYERS * SIZE * SIZE * 4 / MB


@linux
def test_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    whole = np.arange(2 * MB, dtype=np.uint8)
    whole.tofile(path)

    def resident() -> int:
        entries = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
        return sum(int(m[1]) for e in entries if str(path) in e and (m := re.search(r"Rss:\s*(\d+) kB", e)))

    mapped = map_file(path, "a file")
    first = view(mapped[1 : 1 + MB], np.dtype(np.float32), (MB // 4,), "first")
    second = view(mapped[1 + MB : 2 * MB - 3], np.dtype(np.float32), (MB // 4 - 1,), "second")
    for array in (first, second):
        assert not array.flags.aligned
        array.copy()
    assert resident() >= 2 * MB // 1024
    release(first.reshape(512, -1).T)
    assert resident() <= 1100  # none, where all of it was one huge page
    release(second)
    assert resident() <= 100
    np.testing.assert_array_equal(first.view(np.uint8), whole[1 : 1 + MB])
    np.testing.assert_array_equal(second.view(np.uint8), whole[1 + MB : -3])


def test_arrays_of_our_own_are_kept() -> None:
    """Their memory would come again as zeros."""
    array = np.full(MB, 7)
    for each in (array, array[3:], array.reshape(1024, -1).T, np.frombuffer(bytes(64), np.int8), np.array(3)):
        before = each.copy()
        release(each)
        np.testing.assert_array_equal(each, before)
