"""The chains: each is one ONNX graph, written down once with symbolic dims, and bound to three sizes.

    small   100 to 400 KB, in the caches of one core
    l3      4 to 12 MB, in a shared cache
    dram    64 MB and more, mostly above 96 MB: every byte comes from memory

A size counts the bytes that have to move: each input read once, each output written once. Operators are those that an
exporter writes for opset 23, fused ones such as LayerNormalization and Gelu included, so that an engine with a kernel
for them may use it. Weights are initializers, and dims are numbers, so that nobody pays for what is not known.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from benchmarks.chains.case import Case, sizes
from benchmarks.chains.images import MAPS, VISION
from benchmarks.chains.transformer import TRANSFORMER

_SQUARE = sizes("n m", (128, 128), (1024, 1024), (4096, 4096))
_FLAT = sizes("n", (16384,), (1 << 20,), (1 << 24,))

# ------------------------------------------------------------------ reductions over other axes

REDUCTIONS = (
    Case(
        "softmax_middle",
        """(float[b,c,n] x) => (float[b,c,n] y) {
            y = Softmax<axis = 1>(x)
        }""",
        sizes("b c n", (2, 32, 256), (4, 32, 8192), (4, 64, 65536)),
    ),
    Case(
        "softmax_first",
        """(float[n,m] x) => (float[n,m] y) {
            y = Softmax<axis = 0>(x)
        }""",
        _SQUARE,
    ),
    Case(
        "softmax_short_rows",
        """(float[n,c] x) => (float[n,c] y) {
            y = Softmax<axis = -1>(x)
        }""",
        sizes("n c", (2048, 10), (100_000, 10), (1_600_000, 10)),
    ),
    Case(
        "log_softmax_nll",
        """(float[n,c] x, int64[n] target) => (float loss) {
            log_p = LogSoftmax<axis = -1>(x)
            loss = NegativeLogLikelihoodLoss<reduction = "mean">(log_p, target)
        }""",
        sizes("n c", (64, 1000), (64, 32000), (1024, 32000)),
        below="c",
    ),
    Case(
        "sinkhorn",
        """(float[n,m] x) => (float[n,m] y) <int64[1] rows = {1}, int64[1] columns = {0}> {
            row_sums = ReduceSum<keepdims = 1>(x, rows)
            by_row = Div(x, row_sums)
            column_sums = ReduceSum<keepdims = 1>(by_row, columns)
            y = Div(by_row, column_sums)
        }""",
        _SQUARE,
        positive=("x",),
    ),
    Case(
        "cosine_similarity",
        """(float[n,d] x, float[n,d] z) => (float[n] y) <int64[1] last = {-1}> {
            x_unit = LpNormalization<axis = -1, p = 2>(x)
            z_unit = LpNormalization<axis = -1, p = 2>(z)
            product = Mul(x_unit, z_unit)
            y = ReduceSum<keepdims = 0>(product, last)
        }""",
        sizes("n d", (64, 384), (2048, 384), (40_000, 384)),
    ),
    Case(
        "mean_variance",
        """(float[n,m] x) => (float mean, float variance) {
            mean = ReduceMean<keepdims = 0>(x)
            centred = Sub(x, mean)
            squares = Mul(centred, centred)
            variance = ReduceMean<keepdims = 0>(squares)
        }""",
        sizes("n m", (64, 1024), (2048, 1024), (32768, 1024)),
        positive=("x",),
    ),
    Case(
        "column_sums",
        """(float[n,m] x) => (float[m] y) <int64[1] rows = {0}> {
            y = ReduceSum<keepdims = 0>(x, rows)
        }""",
        sizes("n m", (64, 1024), (2048, 1024), (32768, 1024)),
    ),
    Case(
        "argmax_one_hot",
        """(float[n,c] x) => (float[n,c] y) <float[2] off_on = {0, 1}> {
            best = ArgMax<axis = -1, keepdims = 0>(x)
            depth = Shape<start = 1, end = 2>(x)
            y = OneHot<axis = -1>(best, depth, off_on)
        }""",
        sizes("n c", (160, 128), (8192, 128), (131072, 128)),
    ),
)

# ------------------------------------------------------------------ one element at a time

ELEMENTWISE = (
    Case(
        "residual_relu",
        """(float[n] x, float[n] skip) => (float[n] y) {
            total = Add(x, skip)
            y = Relu(total)
        }""",
        _FLAT,
    ),
    Case(
        "transcendentals",
        """(float[n] x) => (float[n] y) {
            v1 = Sigmoid(x)
            v2 = Log(v1)
            v3 = Neg(v2)
            v4 = Sqrt(v3)
            v5 = Tanh(v4)
            v6 = Exp(v5)
            v7 = Sin(v6)
            v8 = Abs(v7)
            v9 = Softplus(v8)
            v10 = Sinh(v9)
            v11 = Cos(v10)
            v12 = Mul(v11, x)
            v13 = Sigmoid(v12)
            v14 = Exp(v13)
            v15 = Reciprocal(v14)
            v16 = Atan(v15)
            v17 = Add(v16, x)
            v18 = Tanh(v17)
            v19 = Mul(v18, v16)
            y = Sub(v19, x)
        }""",
        _FLAT,
    ),
    Case(
        "adam",
        """(float[n] p, float[n] g, float[n] m, float[n] v) => (float[n] p_new, float[n] m_new, float[n] v_new)
            <float beta1 = {0.9}, float rest1 = {0.1}, float beta2 = {0.999}, float rest2 = {0.001},
             float correct1 = {2.0}, float correct2 = {50.0}, float epsilon = {1e-8}, float rate = {1e-3}> {
            m_kept = Mul(m, beta1)
            m_added = Mul(g, rest1)
            m_new = Add(m_kept, m_added)
            v_kept = Mul(v, beta2)
            g_square = Mul(g, g)
            v_added = Mul(g_square, rest2)
            v_new = Add(v_kept, v_added)
            m_hat = Mul(m_new, correct1)
            v_hat = Mul(v_new, correct2)
            root = Sqrt(v_hat)
            below = Add(root, epsilon)
            step = Div(m_hat, below)
            change = Mul(step, rate)
            p_new = Sub(p, change)
        }""",
        sizes("n", (8192,), (1 << 18,), (1 << 22,)),
        positive=("v",),
    ),
    Case(
        "bce_mean",
        """(float[n] x, float[n] target) => (float loss) {
            high = Relu(x)
            product = Mul(x, target)
            linear = Sub(high, product)
            size = Abs(x)
            minus = Neg(size)
            rest = Softplus(minus)
            each = Add(linear, rest)
            loss = ReduceMean<keepdims = 0>(each)
        }""",
        _FLAT,
        positive=("target",),
    ),
    Case(
        "focal_loss",
        """(float[n] x, float[n] target) => (float loss) <float one = {1}, float alpha = {0.25}, float rest = {0.5}> {
            p = Sigmoid(x)
            high = Relu(x)
            product = Mul(x, target)
            linear = Sub(high, product)
            size = Abs(x)
            minus = Neg(size)
            tail = Softplus(minus)
            entropy = Add(linear, tail)
            q = Sub(one, p)
            other = Sub(one, target)
            p_hit = Mul(p, target)
            q_hit = Mul(q, other)
            hit = Add(p_hit, q_hit)
            miss = Sub(one, hit)
            focus = Mul(miss, miss)
            weight_part = Mul(target, rest)
            other_part = Sub(one, alpha)
            weight = Sub(other_part, weight_part)
            focused = Mul(focus, entropy)
            each = Mul(weight, focused)
            loss = ReduceMean<keepdims = 0>(each)
        }""",
        _FLAT,
        positive=("target",),
    ),
    Case(
        "qdq_swish",
        """(int8[n] x) => (int8[n] y)
            <float scale = {0.05}, int8 zero = {3}, float scale_out = {0.04}, int8 zero_out = {-121}> {
            real = DequantizeLinear(x, scale, zero)
            open = Sigmoid(real)
            swish = Mul(real, open)
            y = QuantizeLinear(swish, scale_out, zero_out)
        }""",
        sizes("n", (1 << 16,), (1 << 22,), (1 << 26,)),
    ),
    Case(
        "qdq_channels",
        """(int8[n,c,h,w] x, float[n,c,h,w] skip, float[c] scale) => (int8[n,c,h,w] y)
            <float scale_out = {0.05}, int8 zero_out = {-128}> {
            real = DequantizeLinear<axis = 1>(x, scale)
            total = Add(real, skip)
            active = Relu(total)
            y = QuantizeLinear(active, scale_out, zero_out)
        }""",
        MAPS,
        weights=("scale",),
        positive=("scale",),
    ),
)

CASES: tuple[Case, ...] = (*TRANSFORMER, *REDUCTIONS, *VISION, *ELEMENTWISE)


def chosen(patterns: Sequence[str]) -> list[Case]:
    """The cases whose name one of the patterns matches; all of them for none."""
    return [c for c in CASES if not patterns or any(fnmatch.fnmatch(c.name, p) for p in patterns)]
