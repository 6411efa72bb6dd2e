"""Losses over classes: the negative log likelihood, and the cross entropy of a softmax."""

from __future__ import annotations

from stitch import dtypes
from stitch.graph import Builder, Value
from stitch.ops.registry import Call, operator


@operator("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood(b: Builder, call: Call, x: Value, target: Value, weight: Value | None = None) -> Value:
    return _reduced(b, call, b.unary("neg", _picked(b, x, target)), target, weight)


@operator("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy(
    b: Builder, call: Call, x: Value, target: Value, weight: Value | None = None
) -> tuple[Value | None, ...]:
    """Second output: the logarithms of the softmax over axis 1."""
    wide = b.cast(x, dtypes.compute(x.dtype))
    shifted = b.sub(wide, b.reduce("reduce_max", wide, [1], keepdims=True))
    log_total = b.unary("log", b.reduce("reduce_sum", b.unary("exp", shifted), [1], keepdims=True))
    losses = b.sub(b.reshape(log_total, target.shape), _picked(b, shifted, target))
    loss = _reduced(b, call, losses, target, weight)
    log_softmax = b.cast(b.sub(shifted, log_total), x.dtype) if any(call.outputs[1:]) else None
    return b.cast(loss, x.dtype), log_softmax


def _picked(b: Builder, x: Value, target: Value) -> Value:
    """x (N, C, d...) at the classes of target (N, d...)."""
    shape = b.broadcast_shape((x.shape[0], *x.shape[2:]), target.shape)
    axes = [b.iota(shape, i) for i in range(len(shape))]
    axes.insert(1, b.cast(b.broadcast(target, shape), dtypes.INT64))
    return b.gather(x, axes, range(x.rank))


def _reduced(b: Builder, call: Call, losses: Value, target: Value, weight: Value | None) -> Value:
    """Losses weighted by class, without those of ignore_index, then as they are, summed, or averaged by weight."""
    ignored = call.attr("ignore_index")
    weights = None
    if weight is not None:
        weights = b.cast(b.gather(weight, [b.cast(target, dtypes.INT64)], [0]), losses.dtype)
        losses = b.mul(losses, weights)
    if ignored is not None:
        skip = b.eq(target, ignored)
        weights = b.broadcast(b.const(1, losses.dtype), losses.shape) if weights is None else weights
        weights, losses = b.where(skip, 0, weights), b.where(skip, 0, losses)
    everything = range(losses.rank)
    match call.attr("reduction", "mean"):
        case "none":
            return losses
        case "sum":
            return b.reduce("reduce_sum", losses, everything)
        case "mean":
            if weights is None:
                return b.mean(losses, everything)
            return b.div(b.reduce("reduce_sum", losses, everything), b.reduce("reduce_sum", weights, everything))
        case other:
            raise call.invalid(f"reduction is {other!r}, not 'none', 'sum' or 'mean'")
