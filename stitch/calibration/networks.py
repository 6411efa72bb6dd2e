"""Networks for a calibration: the kernels that common networks are made of, in sizes that no one model has.

None of them computes anything useful. Weights are random; each network has one input, named x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stitch import dims, dtypes
from stitch.dims import Dim
from stitch.graph import Builder, Graph, Value
from stitch.ops.convolution import Taps, channels_last, convolve

N = dims.symbol("n")

AWAY = (0.0, 0.1, 0.6, 3.0)
"""So much of the last cache is used by others, where what a kernel reads and writes is to be found anywhere."""


@dataclass(frozen=True)
class Network:
    """A graph and the shapes of x that it is measured with. `away`: what others touch between two runs, in sizes of
    the last cache."""

    name: str
    graph: Graph
    shapes: tuple[tuple[int, ...], ...]
    away: tuple[float, ...] = (0.0,)


class _Layers:
    """Layers on a builder; every weight is different."""

    def __init__(self, name: str) -> None:
        self.b = Builder(name)
        self.random = np.random.default_rng(0)

    def weight(self, *shape: int) -> Value:
        scale = max(math.prod(shape[:-1]), 1) ** -0.5
        return self.b.const(self.random.standard_normal(shape, np.float32) * np.float32(scale))

    def linear(self, x: Value, columns: int) -> Value:
        rows = _number(x.shape[-1])
        labels = list(range(x.rank))
        y = self.b.contract(x, self.weight(rows, columns), labels, [x.rank - 1, 99], [*labels[:-1], 99])
        return self.b.add(y, self.weight(columns))

    def norm(self, x: Value) -> Value:
        b, width = self.b, _number(x.shape[-1])
        centred = b.sub(x, b.mean(x, [-1], True))
        variance = b.mean(b.mul(centred, centred), [-1], True)
        scaled = b.mul(centred, b.unary("rsqrt", b.add(variance, 1e-5)))
        return b.add(b.mul(scaled, self.weight(width)), self.weight(width))

    def rms(self, x: Value) -> Value:
        b = self.b
        scale = b.unary("rsqrt", b.add(b.mean(b.mul(x, x), [-1], True), 1e-6))
        return b.mul(b.mul(x, scale), self.weight(_number(x.shape[-1])))

    def gelu(self, x: Value) -> Value:
        b = self.b
        return b.mul(b.mul(x, 0.5), b.add(b.unary("erf", b.mul(x, 0.7071067811865476)), 1.0))

    def relu(self, x: Value) -> Value:
        return self.b.max(x, 0.0)

    def relu6(self, x: Value) -> Value:
        return self.b.min(self.b.max(x, 0.0), 6.0)

    def swish(self, x: Value) -> Value:
        return self.b.mul(x, self.b.unary("sigmoid", x))

    def softmax(self, x: Value, axis: int = -1) -> Value:
        e = self.b.unary("exp", self.b.sub(x, self.b.reduce("reduce_max", x, [axis], True)))
        return self.b.div(e, self.b.reduce("reduce_sum", e, [axis], True))

    def convolution(self, x: Value, channels: int, size: int = 1, stride: int = 1, alone: bool = False) -> Value:
        """x: [n, h, w, c]; `alone`: each channel by itself. Padded so that a stride of 1 keeps the size."""
        inner = _number(x.shape[-1])
        low, high = (size - 1) // 2, size // 2
        taps = Taps((size, size), (stride, stride), (1, 1), (low, low), (high, high))
        w = self.weight(channels, 1 if alone else inner, size, size)
        return self.b.add(convolve(self.b, x, w, taps, inner if alone else 1), self.weight(channels))

    def pool(self, x: Value, size: int, stride: int) -> Value:
        padded = self.b.pad(x, [0, 0, 0, 0], [0, size - 1, size - 1, 0])
        windows = self.b.window(padded, [1, 2], [size, size], [stride, stride], [1, 1])
        return self.b.reduce("reduce_max", windows, [4, 5])

    def attention(self, x: Value, heads: int) -> Value:
        """x: [n, tokens, width]"""
        b, (n, tokens, wide) = self.b, x.shape
        width = _number(wide)
        parts = []
        for _ in range(3):
            y = b.reshape(self.linear(x, width), (n, tokens, heads, width // heads))
            parts.append(b.transpose(y, (0, 2, 1, 3)))
        q, k, v = parts
        scores = b.mul(b.contract(q, k, [0, 1, 2, 3], [0, 1, 4, 3], [0, 1, 2, 4]), (width // heads) ** -0.5)
        mixed = b.contract(self.softmax(scores), v, [0, 1, 2, 4], [0, 1, 4, 3], [0, 1, 2, 3])
        return self.linear(b.reshape(b.transpose(mixed, (0, 2, 1, 3)), (n, tokens, width)), width)


def _number(d: Dim) -> int:
    assert isinstance(d, int)
    return d


Made = tuple[Value, _Layers]


def residual(channels: Sequence[int], size: int, kernel: int) -> Made:
    """As ResNet: a first layer, a pool, then blocks of three convolutions, halving the image between."""
    net = _Layers(f"residual {channels} {size}")
    x = net.b.input("x", dtypes.FLOAT32, (N, 3, size, size))
    y = net.pool(net.relu(net.convolution(channels_last(net.b, x), channels[0], kernel, 2)), 3, 2)
    for k, c in enumerate(channels):
        stride = 1 if k == 0 else 2
        short = net.convolution(y, 2 * c, 1, stride)
        inner = net.relu(net.convolution(net.relu(net.convolution(y, c)), c, 3, stride))
        y = net.relu(net.b.add(net.convolution(inner, 2 * c), short))
        inner = net.relu(net.convolution(net.relu(net.convolution(y, c)), c, 3))
        y = net.relu(net.b.add(net.convolution(inner, 2 * c), y))
    return net.linear(net.b.mean(y, [1, 2]), 500), net


def mobile(channels: Sequence[int], size: int, window: int, swish: bool) -> tuple[Value, _Layers]:
    """As MobileNet and EfficientNet: wide, by windows of each channel, narrow again; the latter with a gate."""
    net = _Layers(f"mobile {channels} {size} {window}")
    x = net.b.input("x", dtypes.FLOAT32, (N, 3, size, size))
    act: Callable[[Value], Value] = net.swish if swish else net.relu6
    y = act(net.convolution(channels_last(net.b, x), channels[0], 3, 2))
    for c in channels:
        for stride in (2, 1):
            before = y
            y = act(net.convolution(y, 4 * c))
            y = act(net.convolution(y, 4 * c, window, stride, alone=True))
            if swish:
                gate = net.swish(net.linear(net.b.mean(y, [1, 2]), c))
                gate = net.b.unary("sigmoid", net.linear(gate, 4 * c))
                y = net.b.mul(y, net.b.reshape(gate, (N, 1, 1, 4 * c)))
            y = net.convolution(y, c)
            y = net.b.add(y, before) if stride == 1 else y
    return net.b.mean(net.relu(net.convolution(y, 700)), [1, 2]), net


def transformer(width: int, heads: int, tokens: Dim, plain: bool, words: int = 0) -> tuple[Value, _Layers]:
    """As BERT or ViT (`plain`), or as Llama: root mean squares and gates."""
    net = _Layers(f"transformer {width} {tokens}")
    y = net.b.input("x", dtypes.FLOAT32, (N, tokens, width))
    for _ in range(2):
        norm = net.norm if plain else net.rms
        y = net.b.add(y, net.attention(norm(y), heads))
        z = norm(y)
        if plain:
            z = net.linear(net.gelu(net.linear(z, 4 * width)), width)
        else:
            z = net.linear(net.b.mul(net.swish(net.linear(z, 3 * width)), net.linear(z, 3 * width)), width)
        y = net.b.add(y, z)
    return (net.linear(net.norm(y), words) if words else net.norm(y)), net


WIDTH = 384


def rows(kind: int) -> tuple[dict[str, Value], _Layers]:
    """Chains that begin and end in memory, with little arithmetic and with much, along rows, columns and neither."""
    net = _Layers(f"rows {kind}")
    b = net.b
    wide = kind not in (0, 2, 4)
    x = b.input("x", dtypes.FLOAT32, (N, WIDTH if wide else dims.symbol("s")))
    heads = [b.reshape(x, (N, WIDTH // n, n)) for n in (64, 24)] if wide else []
    half = b.slice(x, [0, 128], [N, 256]) if wide else x
    found: list[Callable[[], list[Value]]] = [
        lambda: [b.mul(x, 0.125), net.softmax(x, 0)],
        lambda: [net.norm(x), net.softmax(x)],
        lambda: [b.unary("tanh", b.mul(x, x)), b.transpose(b.mul(x, 2.0), (1, 0))],
        lambda: [net.gelu(net.norm(x)), b.concat([x, b.mul(x, -1.0)], 1)],
        lambda: [net.softmax(x, 0), b.reduce("reduce_sum", x, [0])],
        lambda: [net.rms(x), b.add(x, net.weight(WIDTH)), b.transpose(heads[0], (1, 0, 2))],
        lambda: [b.transpose(heads[0], (1, 2, 0)), b.transpose(b.mul(heads[1], 2.0), (1, 0, 2)), b.max(x, 0.0)],
        lambda: [b.concat([half, x], 1), b.transpose(b.mul(heads[1], 2.0), (1, 2, 0)), b.max(half, 0.0)],
    ]
    return {f"y{k}": y for k, y in enumerate(found[kind]())}, net


def images(channels: int, size: int) -> Made:
    """What is around the convolutions: norms over channels that are not last, shuffled channels, pools, a gate."""
    net = _Layers(f"images {channels} {size}")
    b = net.b
    x = b.input("x", dtypes.FLOAT32, (N, channels, size, size))
    tokens = b.transpose(b.reshape(x, (N, channels, size * size)), (0, 2, 1))
    y = b.reshape(net.linear(net.norm(tokens), channels), (N, size, size, channels))
    halves = b.transpose(b.reshape(net.relu(y), (N, size, size, 2, channels // 2)), (0, 1, 2, 4, 3))
    y = net.convolution(b.reshape(halves, (N, size, size, channels)), channels, 3, 1, alone=True)
    y = net.pool(net.convolution(y, channels), 3, 2)
    y = net.pool(net.convolution(y, channels), 3, 1)
    y = b.concat([net.convolution(y, 40), net.pool(y, 5, 1)], 3)
    last = _number(y.shape[-1])
    return b.transpose(net.norm(b.reshape(y, (N, size // 2 * (size // 2), last))), (0, 2, 1)), net


def all_networks() -> Iterator[Network]:
    """One at a time, since their weights take memory."""

    def made(parts: tuple[Value, _Layers], *shapes: tuple[int, ...]) -> Network:
        y, net = parts
        return Network(net.b.name, net.b.finish({"y": y}), shapes)

    for kind in range(8):
        outputs, net = rows(kind)
        tall = ((1500, 1100), (150, 500), (90, 40)) if kind in (0, 2, 4) else ((3000, WIDTH), (200, WIDTH), (60, WIDTH))
        yield Network(net.b.name, net.b.finish(outputs), tall, AWAY)

    yield made(residual((48, 96, 192), 160, 7), (1, 3, 160, 160), (2, 3, 160, 160))
    yield made(residual((64, 160, 320), 128, 3), (1, 3, 128, 128))
    yield made(residual((24, 80), 200, 5), (1, 3, 200, 200))
    yield made(images(96, 48), (1, 96, 48, 48))
    yield made(images(56, 80), (1, 56, 80, 80), (2, 56, 80, 80))
    yield made(mobile((16, 40, 96), 192, 3, False), (1, 3, 192, 192), (3, 3, 192, 192))
    yield made(mobile((20, 48, 112), 160, 5, True), (1, 3, 160, 160))
    yield made(mobile((32, 72), 256, 3, True), (1, 3, 256, 256))
    yield made(mobile((48, 120), 112, 7, False), (1, 3, 112, 112))
    yield made(transformer(320, 5, 150, True, 500), (1, 150, 320), (2, 150, 320))
    yield made(transformer(640, 10, dims.symbol("s"), True), (1, 100, 640), (1, 31, 640))
    yield made(transformer(448, 7, dims.symbol("s"), False, 8000), (1, 1, 448), (1, 80, 448), (1, 7, 448))
    yield made(transformer(192, 3, dims.symbol("s"), True), (1, 700, 192), (8, 49, 192))
