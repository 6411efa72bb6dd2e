"""Graphs written by hand: the shapes that real networks are made of, with symbolic batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stitch import dims, dtypes
from stitch.dims import Dim
from stitch.graph import Builder, Graph, Value

F32 = dtypes.FLOAT32
N, S = dims.symbol("n"), dims.symbol("s")


def _weights(b: Builder, *shape: int, seed: int = 0) -> Value:
    scale = 1 / np.sqrt(shape[0])
    return b.const((np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32))


def _softmax(b: Builder, x: Value, axis: int = -1) -> Value:
    e = b.unary("exp", b.sub(x, b.reduce("reduce_max", x, [axis], True)))
    return b.div(e, b.reduce("reduce_sum", e, [axis], True))


def _normalise(b: Builder, x: Value, axes: list[int]) -> Value:
    centred = b.sub(x, b.mean(x, axes, True))
    variance = b.mean(b.mul(centred, centred), axes, True)
    return b.mul(centred, b.unary("rsqrt", b.add(variance, 1e-5)))


def _gelu(b: Builder, x: Value) -> Value:
    return b.mul(b.mul(x, 0.5), b.add(b.unary("erf", b.mul(x, 0.7071067811865476)), 1.0))


def _linear(b: Builder, x: Value, columns: int, seed: int = 0) -> Value:
    width = x.shape[-1]
    assert isinstance(width, int)
    labels = list(range(x.rank))
    y = b.contract(x, _weights(b, width, columns, seed=seed), labels, [x.rank - 1, 99], [*labels[:-1], 99])
    return b.add(y, _weights(b, columns, seed=seed))


def _convolve(b: Builder, x: Value, channels: int, size: int, seed: int = 0) -> Value:
    """NCHW, stride 1, padded to the same size."""
    c = x.shape[1]
    assert isinstance(c, int)
    lo = (size - 1) // 2
    padded = b.pad(x, [0, 0, lo, lo], [0, 0, size - 1 - lo, size - 1 - lo])
    seen = b.window(padded, [2, 3], [size, size], [1, 1], [1, 1])
    w = b.const(_weights_array(channels, c, size, seed))
    return b.contract(seen, w, [0, 1, 2, 3, 4, 5], [9, 1, 4, 5], [0, 9, 2, 3])


def _weights_array(channels: int, c: int, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, channels, c, size])
    weights: np.ndarray = rng.standard_normal((channels, c, size, size)) / np.sqrt(c * size * size)
    return weights.astype(np.float32)


def softmax(b: Builder) -> Value:
    return _softmax(b, b.input("x", F32, (N, 64)))


def softmax_over_columns(b: Builder) -> Value:
    return _softmax(b, b.input("x", F32, (N, 64, 48)), 1)


def layer_norm_gelu(b: Builder) -> Value:
    x, y = b.input("x", F32, (N, 96)), b.input("y", F32, (N, 96))
    normed = _normalise(b, b.add(x, y), [-1])
    return _gelu(b, b.add(b.mul(normed, _weights(b, 96)), _weights(b, 96, seed=1)))


def rms_norm(b: Builder) -> Value:
    x = b.input("x", F32, (N, S, 80))
    square = b.mean(b.mul(x, x), [-1], True)
    return b.mul(b.mul(x, b.unary("rsqrt", b.add(square, 1e-6))), _weights(b, 80))


def group_norm(b: Builder) -> Value:
    """Eight channels in two groups, through a reshape and back."""
    x = b.input("x", F32, (N, 8, 6, 6))
    y = b.reshape(_normalise(b, b.reshape(x, (N, 2, 144)), [-1]), (N, 8, 6, 6))
    return b.mul(y, b.reshape(_weights(b, 8), (8, 1, 1)))


def two_axes(b: Builder) -> Value:
    """A normalisation over rows, then one over columns: the second needs all of the first."""
    x = b.input("x", F32, (S, N))
    return _normalise(b, _normalise(b, x, [1]), [0])


def full_reduction(b: Builder) -> Value:
    x = b.input("x", F32, (N, S))
    return b.reduce("reduce_sum", b.mul(x, x), [0, 1])


def argmax(b: Builder) -> Value:
    return b.apply("argmax", b.mul(b.input("x", F32, (N, 100)), 2.0), axis=1, last=0)


def batch_norm(b: Builder) -> Value:
    x = b.input("x", F32, (N, 16, 9, 9))
    wide = [b.reshape(_weights(b, 16, seed=k), (16, 1, 1)) for k in range(2)]
    return b.max(b.add(b.mul(x, wide[0]), wide[1]), 0.0)


def movement_chain(b: Builder) -> Value:
    x = b.input("x", F32, (N, 12, 10))
    y = b.mul(b.transpose(x, (0, 2, 1)), 2.0)
    y = b.slice(y, [0, 1, 2], [N, 8, 9])
    y = b.add(b.transpose(y, (1, 0, 2)), 1.0)
    return b.unary("tanh", b.slice(y, [7, 0, 0], [8, N, 9], [-1, 1, 1]))


def concat(b: Builder) -> Value:
    x, y = b.input("x", F32, (N, 10)), b.input("y", F32, (N, 7))
    return b.mul(b.concat([b.unary("exp", x), b.mul(y, 2.0), x], 1), _weights(b, 27))


def residual(b: Builder) -> Value:
    x = b.input("x", F32, (N, 64))
    return b.add(x, _linear(b, _gelu(b, _linear(b, _normalise(b, x, [-1]), 128)), 64, seed=1))


def linear_gelu(b: Builder) -> Value:
    return _gelu(b, _linear(b, b.input("x", F32, (N, 40)), 56))


def attention(b: Builder) -> Value:
    shape: tuple[Dim, ...] = (N, 4, S, 16)
    q, k, v = (b.input(name, F32, shape) for name in "qkv")
    scores = b.mul(b.contract(q, k, [0, 1, 2, 3], [0, 1, 4, 3], [0, 1, 2, 4]), 0.25)
    return b.contract(_softmax(b, scores), v, [0, 1, 2, 4], [0, 1, 4, 3], [0, 1, 2, 3])


def embedding(b: Builder) -> Value:
    ids = b.input("ids", dtypes.INT64, (N, S))
    return _normalise(b, b.gather(_weights(b, 50, 32), [ids], [0]), [-1])


def pad_pool(b: Builder) -> Value:
    x = b.pad(b.input("x", F32, (N, 5, 11, 11)), [0, 0, 1, 1], [0, 0, 1, 1], -np.inf)
    return b.reduce("reduce_max", b.window(x, [2, 3], [3, 3], [2, 2], [1, 1]), [-1, -2])


def scatter(b: Builder) -> Value:
    x = b.input("x", F32, (20, 6))
    where = b.input("where", dtypes.INT64, (N,))
    y = b.apply("scatter", b.mul(x, 2.0), b.input("y", F32, (N, 6)), where, axes=(0,), op="add")
    return b.unary("tanh", y)


def transformer_block(b: Builder) -> Value:
    x = b.input("x", F32, (N, S, 64))
    y = _normalise(b, x, [-1])
    heads = [b.transpose(b.reshape(_linear(b, y, 64, seed=k), (N, S, 4, 16)), (0, 2, 1, 3)) for k in range(3)]
    scores = b.mul(b.contract(heads[0], heads[1], [0, 1, 2, 3], [0, 1, 4, 3], [0, 1, 2, 4]), 0.25)
    mixed = b.contract(_softmax(b, scores), heads[2], [0, 1, 2, 4], [0, 1, 4, 3], [0, 1, 2, 3])
    mixed = b.reshape(b.transpose(mixed, (0, 2, 1, 3)), (N, S, 64))
    x = b.add(x, _linear(b, mixed, 64, seed=4))
    return b.add(x, _linear(b, _gelu(b, _linear(b, _normalise(b, x, [-1]), 128, seed=5)), 64, seed=6))


def small_cnn(b: Builder) -> Value:
    x = b.input("x", F32, (N, 3, 16, 16))
    y = b.max(b.add(_convolve(b, x, 8, 3), b.reshape(_weights(b, 8), (8, 1, 1))), 0.0)
    y = b.reduce("reduce_max", b.window(y, [2, 3], [2, 2], [2, 2], [1, 1]), [-1, -2])
    y = b.max(_convolve(b, y, 12, 3, seed=1), 0.0)
    return _softmax(b, _linear(b, b.mean(y, [2, 3]), 10))


GRAPHS: dict[str, Callable[[Builder], Value]] = {
    fn.__name__: fn
    for fn in (
        softmax, softmax_over_columns, layer_norm_gelu, rms_norm, group_norm, two_axes, full_reduction, argmax,
        batch_norm, movement_chain, concat, residual, linear_gelu, attention, embedding, pad_pool, scatter,
        transformer_block, small_cnn,
    )
}  # fmt: skip


def graph(name: str) -> Graph:
    b = Builder(name)
    return b.finish({"out": GRAPHS[name](b)})


def feeds(name: str, n: int = 5, s: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for v in graph(name).inputs:
        shape = tuple(dims.evaluate(d, {"n": n, "s": s}) for d in v.shape)
        floats = v.dtype == F32
        out[v.name] = rng.standard_normal(shape).astype(np.float32) if floats else rng.integers(0, 20, shape)
    return out
