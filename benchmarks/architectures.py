"""Real architectures at real size, built with onnx.helper: no download, no other framework.

    distilbert()     6 layers of 768, 12 heads, 66 million parameters; symbolic batch and seq
    bert_base()      12 layers
    mobilenet()      convolutions, depthwise convolutions, ReLU6, a classifier; symbolic batch
    norm_gelu()      layer norm and GELU over rows of 768, for looking at

    python -m benchmarks.architectures NAME FILE      writes one of them

Nodes are those that exporters write: GELU as its five operators, shapes computed from shapes. Weights are random but
seeded, scaled so that values keep their size from layer to layer; gains and biases are not 1 and 0, so that an answer
computed without one of them is wrong, and visibly so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
OPSET = 17


class _Writer:
    """Collects nodes and weights; every method returns the name of a result."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.known: dict[tuple[str, bytes], str] = {}
        self.prefix = ""

    def weight(self, name: str, array: Array) -> str:
        name = f"{self.prefix}{name}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def const(self, value: float) -> str:
        return self._shared(np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self._shared(np.array(values, np.int64))

    def index(self, value: int) -> str:
        return self._shared(np.array(value, np.int64))

    def _shared(self, array: Array) -> str:
        key = (f"{array.dtype}{array.shape}", array.tobytes())
        if key not in self.known:
            self.known[key] = f"c{len(self.known)}"
            self.initializers.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]

    def normal(self, name: str, shape: Sequence[int], scale: float) -> str:
        return self.weight(name, self.rng.standard_normal(shape, np.float32) * np.float32(scale))

    def around(self, name: str, n: int, centre: float, spread: float) -> str:
        return self.weight(name, (centre + spread * self.rng.standard_normal(n)).astype(np.float32))

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.prefix}{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def model(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], results: Sequence[tuple[str, onnx.ValueInfoProto]]
    ) -> onnx.ModelProto:
        self.prefix = ""
        for made, declared in results:
            self.nodes.append(helper.make_node("Identity", [made], [declared.name], name=f"to_{declared.name}"))
        graph = helper.make_graph(self.nodes, name, inputs, [d for _, d in results], self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


# ------------------------------------------------------------------ encoders


def distilbert() -> onnx.ModelProto:
    return encoder("distilbert", layers=6)


def bert_base() -> onnx.ModelProto:
    return encoder("bert_base", layers=12)


def encoder(
    name: str, layers: int, width: int = 768, heads: int = 12, vocabulary: int = 30522, positions: int = 512
) -> onnx.ModelProto:
    """A transformer encoder over token ids with a mask: `last_hidden_state[batch, seq, width]`."""
    w = _Writer(seed=layers)
    shape = ["batch", "seq"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, shape) for n in ("input_ids", "attention_mask")]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*shape, width])
    w.prefix = "embeddings/"
    x = w.node("Gather", w.normal("words", (vocabulary, width), 0.7), "input_ids")
    seq = w.node("Unsqueeze", w.node("Gather", w.node("Shape", "input_ids"), w.index(1)), w.ints(0))
    ids = w.weight("position_ids", np.arange(positions, dtype=np.int64)[None])
    ids = w.node("Slice", ids, w.ints(0), seq, w.ints(1))
    x = w.node("Add", x, w.node("Gather", w.normal("positions", (positions, width), 0.7), ids))
    x = _layer_norm(w, x, width)
    w.prefix = "mask/"
    mask = w.node("Cast", w.node("Unsqueeze", "attention_mask", w.ints(1, 2)), to=TensorProto.FLOAT)
    mask = w.node("Mul", w.node("Sub", w.const(1.0), mask), w.const(-10000.0))
    for layer in range(layers):
        w.prefix = f"layer{layer}/"
        x = _layer_norm(w, w.node("Add", _attention(w, x, mask, width, heads), x), width, "attention_norm")
        x = _layer_norm(w, w.node("Add", _feed_forward(w, x, width), x), width, "output_norm")
    return w.model(name, inputs, [(x, output)])


def _linear(w: _Writer, x: str, name: str, n: int, m: int, gain: float = 1.0) -> str:
    y = w.node("MatMul", x, w.normal(f"{name}.weight", (n, m), gain / n**0.5))
    return w.node("Add", w.around(f"{name}.bias", m, 0, 0.1), y)


def _layer_norm(w: _Writer, x: str, width: int, name: str = "norm") -> str:
    gain, bias = w.around(f"{name}.weight", width, 1, 0.1), w.around(f"{name}.bias", width, 0, 0.1)
    return w.node("LayerNormalization", x, gain, bias, axis=-1, epsilon=1e-12)


def _attention(w: _Writer, x: str, mask: str, width: int, heads: int) -> str:
    size = width // heads
    shape = w.node("Shape", x)
    outer = [w.node("Unsqueeze", w.node("Gather", shape, w.index(axis)), w.ints(0)) for axis in (0, 1)]
    split = w.node("Concat", *outer, w.ints(heads), w.ints(size), axis=0)

    def project(name: str, order: Sequence[int]) -> str:
        y = w.node("Reshape", _linear(w, x, name, width, width), split)
        return w.node("Transpose", y, perm=order)

    q, k, v = project("q", (0, 2, 1, 3)), project("k", (0, 2, 3, 1)), project("v", (0, 2, 1, 3))
    scores = w.node("Div", w.node("MatMul", q, k), w.const(size**0.5))
    weights = w.node("Softmax", w.node("Add", scores, mask), axis=-1)
    y = w.node("Transpose", w.node("MatMul", weights, v), perm=(0, 2, 1, 3))
    merged = w.node("Concat", *outer, w.ints(width), axis=0)
    return _linear(w, w.node("Reshape", y, merged), "attention_out", width, width)


def _feed_forward(w: _Writer, x: str, width: int) -> str:
    return _linear(w, gelu(w, _linear(w, x, "up", width, 4 * width)), "down", 4 * width, width)


def gelu(w: _Writer, x: str) -> str:
    """x/2 · (1 + erf(x/√2)), as PyTorch exports it."""
    inner = w.node("Add", w.node("Erf", w.node("Div", x, w.const(2**0.5))), w.const(1.0))
    return w.node("Mul", w.node("Mul", x, inner), w.const(0.5))


# ------------------------------------------------------------------ convolutions


def mobilenet(
    size: int = 224, stem: int = 32, blocks: Sequence[tuple[int, int, int, int]] = ((1, 16, 1, 1), (6, 24, 2, 2),
    (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)), head: int = 1280, classes: int = 1000,
) -> onnx.ModelProto:  # fmt: skip
    """MobileNet v2: blocks are (expansion, channels, repeats, stride of the first). Its normalisations are folded into
    the convolutions, as exporters do."""
    w = _Writer(seed=size)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, size, size])
    output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", classes])
    x = _relu6(w, _conv(w, "image", "stem", 3, stem, 3, 2))
    channels = stem
    for k, (expansion, width, repeats, stride) in enumerate(blocks):
        for r in range(repeats):
            w.prefix = f"block{k}.{r}/"
            x, channels = _inverted_residual(w, x, channels, width, expansion, stride if r == 0 else 1), width
    w.prefix = "head/"
    x = _relu6(w, _conv(w, x, "head", channels, head, 1, 1))
    x = w.node("Flatten", w.node("GlobalAveragePool", x), axis=1)
    weight, bias = (
        w.normal("classifier.weight", (classes, head), head**-0.5),
        w.around("classifier.bias", classes, 0, 0.1),
    )
    return w.model("mobilenet", [image], [(w.node("Gemm", x, weight, bias, transB=1), output)])


def _inverted_residual(w: _Writer, x: str, channels: int, width: int, expansion: int, stride: int) -> str:
    inner = channels * expansion
    y = _relu6(w, _conv(w, x, "expand", channels, inner, 1, 1)) if expansion > 1 else x
    y = _relu6(w, _conv(w, y, "depthwise", inner, inner, 3, stride, groups=inner))
    y = _conv(w, y, "project", inner, width, 1, 1)
    return w.node("Add", x, y) if stride == 1 and channels == width else y


def _conv(w: _Writer, x: str, name: str, n: int, m: int, kernel: int, stride: int, groups: int = 1) -> str:
    weight = w.normal(f"{name}.weight", (m, n // groups, kernel, kernel), (2 / (n // groups * kernel**2)) ** 0.5)
    pads = [kernel // 2] * 4
    return w.node("Conv", x, weight, w.around(f"{name}.bias", m, 0, 0.1), kernel_shape=[kernel] * 2,
                  strides=[stride] * 2, pads=pads, group=groups)  # fmt: skip


def _relu6(w: _Writer, x: str) -> str:
    return w.node("Clip", x, w.const(0.0), w.const(6.0))


def norm_gelu() -> onnx.ModelProto:
    w = _Writer(seed=0)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 768]) for n in "xy")
    return w.model("norm_gelu", [x], [(gelu(w, _layer_norm(w, "x", 768)), y)])


MODELS = {"distilbert": distilbert, "bert_base": bert_base, "mobilenet": mobilenet, "norm_gelu": norm_gelu}


def parameters(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer)


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.architectures")
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    args.file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(MODELS[args.name](), args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
