"""The five networks whose throughput on the clusters of a Kirin 970 was published, as kernels with their work.

Architectures are those of the models in the onnx package, whose weights were taken out (they get other numbers here:
work does not depend on them); MobileNet v1 is written down below. Throughputs in images/s on 4 cores each are from
"Neural Network Inference on Mobile SoCs", IEEE Design & Test 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.models import light
from stitch import importer, knobs, target
from stitch.simplify import simplify
from stitch.simulate.work import Work, work_of
from stitch.stitching.schedule import Stitched
from stitch.stitching.stitch import stitch

PUBLISHED = {  # images/s on 4 Cortex-A53, on 4 Cortex-A73
    "AlexNet": (2.2, 7.6),
    "GoogLeNet": (3.0, 7.1),
    "MobileNet": (6.5, 17.7),
    "ResNet50": (1.5, 2.8),
    "SqueezeNet": (6.8, 15.7),
}
LIGHT = {
    "AlexNet": "bvlc_alexnet", "GoogLeNet": "inception_v1", "ResNet50": "resnet50", "SqueezeNet": "squeezenet",
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    name: str
    stitched: Stitched
    work: tuple[Work, ...]  # by kernel

    @property
    def total(self) -> Work:
        out = Work(kernels=0)
        for work in self.work:
            out = out + work
        return out


def networks(machine: target.Target) -> Iterator[Network]:
    """All five, stitched for a machine; without Winograd's algorithm, which the published runs are taken not to use."""
    with knobs.using(winograd=False):
        for name in PUBLISHED:
            model = (
                mobilenet() if name == "MobileNet" else with_weights(onnx.load(light() / f"light_{LIGHT[name]}.onnx"))
            )
            stitched = stitch(simplify(importer.load(model)), machine.l2_bytes // 2)
            constants = [n.output for n in stitched.graph.nodes if n.prim == "const"]
            yield Network(name, stitched, tuple(work_of(k, {}, constants) for k in stitched.kernels))


def _numbers(shape: Any) -> np.ndarray:
    """Weights that are not all equal: those could be simplified away."""
    count = int(np.prod(shape))
    return (np.arange(count, dtype=np.float32) % 251 / 251 + 0.5).reshape(shape)


def with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A light model with an array in the place of each constant of one repeated number."""
    graph = model.graph
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in shapes:
            graph.initializer.append(numpy_helper.from_array(_numbers(shapes[node.input[0]]), node.output[0]))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    return model


def mobilenet() -> onnx.ModelProto:
    """MobileNet v1 at 224 x 224, its batch norms folded into the convolutions."""
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    blocks = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]

    def convolution(x: str, shape: tuple[int, int, int, int], stride: int, group: int = 1) -> str:
        name = f"c{len(nodes)}"
        weights.append(numpy_helper.from_array(_numbers(shape), f"{name}.w"))
        weights.append(numpy_helper.from_array(_numbers(shape[:1]), f"{name}.b"))
        pad = shape[2] // 2
        settings: dict[str, Any] = {"strides": [stride] * 2, "pads": [pad] * 4, "group": group}
        nodes.append(helper.make_node("Conv", [x, f"{name}.w", f"{name}.b"], [name], name, **settings))
        nodes.append(helper.make_node("Relu", [name], [f"{name}.r"], f"{name}.r"))
        return f"{name}.r"

    x = convolution("x", (32, 3, 3, 3), 2)
    for before, after, stride in blocks:
        x = convolution(x, (before, 1, 3, 3), stride, group=before)
        x = convolution(x, (after, before, 1, 1), 1)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pool"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pool"], ["flat"], "flat"))
    weights.append(numpy_helper.from_array(_numbers((1000, 1024)), "fc.w"))
    weights.append(numpy_helper.from_array(_numbers((1000,)), "fc.b"))
    nodes.append(helper.make_node("Gemm", ["flat", "fc.w", "fc.b"], ["y"], "fc", transB=1))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 224, 224])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1000])]
    graph = helper.make_graph(nodes, "mobilenet_v1", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
