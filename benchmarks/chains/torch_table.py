"""The operators over torch, each by the functional that has a kernel of its own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.chains.case import Array
from benchmarks.chains.program import Table

torch = import_module("torch")  # by name, for it is not there when types are checked
F = torch.nn.functional
Tensor = Any


def tensor(x: Array) -> Tensor:
    """Shares the array's memory. bfloat16 goes through int16, for torch does not know numpy's."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(y: Tensor) -> Array:
    if y.dtype == torch.bfloat16:
        return np.asarray(y.view(torch.int16)).view(ml_dtypes.bfloat16)
    return np.asarray(y)


def _one_hot(index: Tensor, depth: Sequence[int], off_on: Tensor, axis: int = -1) -> Tensor:
    return torch.where(index.unsqueeze(-1) == torch.arange(depth[0]), off_on[1], off_on[0])


def _dequantise(x: Tensor, scale: Any, zero: Any = 0, axis: int = 1) -> Tensor:
    if isinstance(scale, torch.Tensor):
        scale = scale.view([-1 if k == axis else 1 for k in range(x.ndim)])
    return (x.to(torch.float32) - zero) * scale


def _quantise(x: Tensor, scale: float, zero: Tensor) -> Tensor:
    bounds = torch.iinfo(zero.dtype)
    return torch.clamp(torch.round(x / scale) + zero, bounds.min, bounds.max).to(zero.dtype)


def _layer_norm(x: Tensor, gain: Tensor, shift: Tensor, axis: int = -1, epsilon: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[axis:], gain, shift, epsilon)


def _sum(x: Tensor, axes: Sequence[int], keepdims: int = 1) -> Tensor:
    return torch.sum(x, axes, bool(keepdims))


def _gather_shape(x: Tensor, start: int = 0, end: int | None = None) -> Sequence[int]:
    shape: Sequence[int] = x.shape[start:end]
    return shape


TABLE: Table = {
    "Abs": torch.abs,
    "Add": torch.add,
    "ArgMax": lambda x, axis, keepdims: torch.argmax(x, axis, bool(keepdims)),
    "Atan": torch.atan,
    "BatchNormalization": lambda x, gain, shift, mean, variance, epsilon: F.batch_norm(
        x, mean, variance, gain, shift, eps=epsilon
    ),
    "Cast": lambda x, to: x.to(getattr(torch, to)),
    "Clip": torch.clamp,
    "Concat": lambda *xs, axis: torch.cat(xs, axis),
    "Cos": torch.cos,
    "DequantizeLinear": _dequantise,
    "Div": torch.div,
    "Exp": torch.exp,
    "Gelu": F.gelu,
    "GroupNormalization": lambda x, gain, shift, num_groups, epsilon: F.group_norm(x, num_groups, gain, shift, epsilon),
    "HardSwish": F.hardswish,
    "InstanceNormalization": lambda x, gain, shift, epsilon: F.instance_norm(x, weight=gain, bias=shift, eps=epsilon),
    "LayerNormalization": _layer_norm,
    "Log": torch.log,
    "LogSoftmax": lambda x, axis: F.log_softmax(x, axis),
    "LpNormalization": lambda x, axis, p: F.normalize(x, p, axis),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "NegativeLogLikelihoodLoss": lambda log_p, target, reduction: F.nll_loss(log_p, target, reduction=reduction),
    "OneHot": _one_hot,
    "QuantizeLinear": _quantise,
    "RMSNormalization": lambda x, gain, axis, epsilon: F.rms_norm(x, x.shape[axis:], gain, epsilon),
    "Reciprocal": torch.reciprocal,
    "ReduceMean": lambda x, keepdims: torch.mean(x),
    "ReduceSum": _sum,
    "Relu": torch.relu,
    "Round": torch.round,
    "Shape": _gather_shape,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softmax": lambda x, axis: torch.softmax(x, axis),
    "Softplus": F.softplus,
    "Split": lambda x, axis, num_outputs: torch.chunk(x, num_outputs, axis),
    "Sqrt": torch.sqrt,
    "Sub": lambda x, y: x - y,
    "Swish": F.silu,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm: x.permute(perm).contiguous(),
}
