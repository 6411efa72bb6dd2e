"""The operators over numpy, and over jax.numpy, which is the same but for a few names.

Over numpy in float64 this is the oracle of all engines. It follows ONNX's specification, and shares nothing with
stitch, whose own meaning of the operators is stated elsewhere. Under jax.jit, XLA sees what a user would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.chains.case import Array, is_float
from benchmarks.chains.program import Program, Table

Value = Any  # an array of the library


def oracle(program: Program, feed: dict[str, Array]) -> list[Array]:
    """Outputs in float64, or whole numbers, for inputs of whatever type, computed in float64 throughout."""
    from scipy import special

    function = program.bind(table(np, special.erf, wide=np.float64), _doubled)
    with np.errstate(all="ignore"):
        return [np.asarray(y) for y in function(*(_doubled(feed[name]) for name in program.inputs))]


def _doubled(x: Array) -> Array:
    return x.astype(np.float64) if is_float(x.dtype) else x


def table(xp: Any, erf: Callable[[Value], Value], wide: Any) -> Table:
    """`xp`: numpy or jax.numpy. `wide`: what sums are computed in; with float64, all results are."""

    def real(name: str) -> Any:
        return wide if wide == np.float64 and "float" in name else name

    def sigmoid(x: Value) -> Value:
        return 1 / (1 + xp.exp(-x))

    def gelu(x: Value, approximate: str = "none") -> Value:
        if approximate == "tanh":
            return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))

    def softmax(x: Value, axis: int = -1) -> Value:
        e = xp.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    def log_softmax(x: Value, axis: int = -1) -> Value:
        low = x - x.max(axis, keepdims=True)
        return low - xp.log(xp.exp(low).sum(axis, keepdims=True))

    def normal(x: Value, axes: tuple[int, ...], epsilon: float) -> Value:
        x = x.astype(wide)
        centred = x - x.mean(axes, keepdims=True)
        return centred / xp.sqrt((centred * centred).mean(axes, keepdims=True) + epsilon)

    def layer_norm(x: Value, gain: Value, shift: Value, axis: int = -1, epsilon: float = 1e-5) -> Value:
        return normal(x, tuple(range(axis % x.ndim, x.ndim)), epsilon).astype(x.dtype) * gain + shift

    def rms_norm(x: Value, gain: Value, axis: int = -1, epsilon: float = 1e-5) -> Value:
        y = x.astype(wide)
        return (y / xp.sqrt((y * y).mean(axis, keepdims=True) + epsilon)).astype(x.dtype) * gain

    def group_norm(x: Value, gain: Value, shift: Value, num_groups: int, epsilon: float = 1e-5) -> Value:
        groups = x.reshape(x.shape[0], num_groups, -1)
        return normal(groups, (2,), epsilon).reshape(x.shape) * channels(gain, x) + channels(shift, x)

    def instance_norm(x: Value, gain: Value, shift: Value, epsilon: float = 1e-5) -> Value:
        return group_norm(x, gain, shift, x.shape[1], epsilon)

    def batch_norm(x: Value, gain: Value, shift: Value, mean: Value, variance: Value, epsilon: float = 1e-5) -> Value:
        factor = gain / xp.sqrt(variance + epsilon)
        return (x - channels(mean, x)) * channels(factor, x) + channels(shift, x)

    def channels(v: Value, x: Value, axis: int = 1) -> Value:
        return v.reshape([-1 if k == axis else 1 for k in range(x.ndim)]) if np.ndim(v) == 1 else v

    def unit(x: Value, axis: int = -1, p: int = 2) -> Value:
        return x / xp.sqrt((x * x).sum(axis, keepdims=True))

    def one_hot(index: Value, depth: Sequence[int], off_on: Value, axis: int = -1) -> Value:
        return xp.where(index[..., None] == xp.arange(depth[0]), off_on[1], off_on[0])

    def nll(log_p: Value, target: Value, reduction: str = "mean") -> Value:
        return -xp.take_along_axis(log_p, target[:, None], 1).mean()

    def dequantise(x: Value, scale: Value, zero: Value = 0, axis: int = 1) -> Value:
        return (x.astype(wide) - channels(zero, x, axis)) * channels(scale, x, axis)

    def quantise(x: Value, scale: Value, zero: Value) -> Value:
        bounds = np.iinfo(zero.dtype)
        return xp.clip(xp.round(x / scale) + zero, bounds.min, bounds.max).astype(zero.dtype)

    def total(x: Value, axes: Sequence[int] | None = None, keepdims: int = 1) -> Value:
        return x.sum(None if axes is None else tuple(axes), keepdims=bool(keepdims))

    def mean(x: Value, axes: Sequence[int] | None = None, keepdims: int = 1) -> Value:
        return x.mean(None if axes is None else tuple(axes), keepdims=bool(keepdims))

    return {
        "Abs": xp.abs,
        "Add": lambda x, y: x + y,
        "ArgMax": lambda x, axis, keepdims: xp.argmax(x, axis, keepdims=bool(keepdims)),
        "Atan": xp.arctan,
        "BatchNormalization": batch_norm,
        "Cast": lambda x, to: x.astype(real(to)),
        "Clip": xp.clip,
        "Concat": lambda *xs, axis: xp.concatenate(xs, axis),
        "Cos": xp.cos,
        "DequantizeLinear": dequantise,
        "Div": lambda x, y: x / y,
        "Exp": xp.exp,
        "Gelu": gelu,
        "GroupNormalization": group_norm,
        "HardSwish": lambda x: x * xp.clip(x / 6 + 0.5, 0, 1),
        "InstanceNormalization": instance_norm,
        "LayerNormalization": layer_norm,
        "Log": xp.log,
        "LogSoftmax": log_softmax,
        "LpNormalization": unit,
        "Mul": lambda x, y: x * y,
        "Neg": lambda x: -x,
        "NegativeLogLikelihoodLoss": nll,
        "OneHot": one_hot,
        "QuantizeLinear": quantise,
        "RMSNormalization": rms_norm,
        "Reciprocal": lambda x: 1 / x,
        "ReduceMean": mean,
        "ReduceSum": total,
        "Relu": lambda x: xp.maximum(x, 0),
        "Round": xp.round,
        "Shape": lambda x, start=0, end=None: x.shape[start:end],
        "Sigmoid": sigmoid,
        "Sin": xp.sin,
        "Sinh": xp.sinh,
        "Softmax": softmax,
        "Softplus": lambda x: xp.logaddexp(x, 0),
        "Split": lambda x, axis, num_outputs: xp.split(x, num_outputs, axis),
        "Sqrt": xp.sqrt,
        "Sub": lambda x, y: x - y,
        "Swish": lambda x: x * sigmoid(x),
        "Tanh": xp.tanh,
        "Transpose": lambda x, perm: xp.transpose(x, perm),
    }
