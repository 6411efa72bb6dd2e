"""Attention and rotary embeddings, decomposed like everything else: the stitcher finds their shape by data flow."""

from __future__ import annotations

import math

import numpy as np

from stitch import dims, dtypes
from stitch.dims import Dim
from stitch.graph import Builder, Value
from stitch.ops.activations import shares
from stitch.ops.registry import Call, operator

PRECISIONS = {0: None, 1: dtypes.FLOAT32, 10: dtypes.FLOAT16, 11: dtypes.FLOAT64, 16: dtypes.BFLOAT16}

# Labels of the contractions: batch, heads of the keys, queries' heads per one of those, query, key, feature.
BATCH, HEAD, GROUP, QUERY, KEY, FEATURE = range(6)


@operator("Attention", since=23)
def attention(
    b: Builder, call: Call, q: Value, k: Value, v: Value, mask: Value | None = None, past_key: Value | None = None,
    past_value: Value | None = None, lengths: Value | None = None,
) -> tuple[Value | None, ...]:  # fmt: skip
    """softmax(q k' * scale + bias) v per head; heads of keys may be shared by a group of queries' heads.

    A query that may see no key at all gives zeros.
    """
    if (past_key is None) != (past_value is None) or (past_key is not None and lengths is not None):
        raise call.invalid("past_key and past_value belong together, and exclude nonpad_kv_seqlen")
    flat = q.rank == 3
    if flat:
        q = _heads(b, call, q, "q_num_heads")
        k, v = (_heads(b, call, x, "kv_num_heads") for x in (k, v))
    if not q.rank == k.rank == v.rank == 4:
        raise call.invalid("its operands must all have rank 3, or all rank 4")
    past: Dim = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = b.concat([past_key, k], 2), b.concat([past_value, v], 2)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    scale = call.attr("scale")
    q = b.mul(q, _inverse_square_root(b, width, q.dtype) if scale is None else scale)
    scores = raw = _scores(b, q, k)

    softcap = call.attr("softcap", 0.0)
    if softcap:
        scores = b.mul(b.unary("tanh", b.div(scores, softcap)), softcap)
    capped = scores
    mask = _padded(b, mask, keys, lengths is not None) if mask is not None else None
    if mask is not None:
        seen = mask.dtype == dtypes.BOOL
        scores = b.where(mask, scores, -math.inf) if seen else b.add(scores, b.cast(mask, scores.dtype))
    if (allowed := _allowed(b, call, past, queries, keys, lengths)) is not None:
        scores = b.where(allowed, scores, -math.inf)
    # Without those, each query sees the key at its own position, if there is one: the left window may end before it.
    blind = call.attr("left_window_size", -1) >= 0 and not dims.prove_le(past + queries, keys)
    weights = _softmax(b, call, scores, guarded=mask is not None or lengths is not None or blind)

    shown = {0: raw, 1: capped, 2: scores, 3: weights}.get(call.attr("qk_matmul_output_mode", 0))
    if shown is None:
        raise call.invalid("qk_matmul_output_mode is 0, 1, 2 or 3")
    wide = weights.dtype  # values may have a type of their own
    if v.dtype != wide:
        wide = dtypes.FLOAT64 if dtypes.FLOAT64 in (wide, v.dtype) else dtypes.FLOAT32
    y = b.cast(_weighted(b, b.cast(weights, wide), b.cast(v, wide)), weights.dtype)
    if flat:
        y = b.reshape(b.transpose(y, (0, 2, 1, 3)), (batch, queries, heads * v.shape[3]))
    return y, k, v, shown


def _heads(b: Builder, call: Call, x: Value, attribute: str) -> Value:
    """(batch, sequence, heads * width) as (batch, heads, sequence, width)."""
    count = call.attr(attribute)
    if x.rank != 3 or not isinstance(count, int) or count < 1:
        raise call.invalid(f"operands of rank 3 need {attribute}")
    batch, sequence, size = x.shape
    return b.transpose(b.reshape(x, (batch, sequence, count, size // count)), (0, 2, 1, 3))


def _inverse_square_root(b: Builder, width: Dim, dtype: np.dtype) -> Value:
    if isinstance(width, int):
        return b.const(1 / math.sqrt(width) if width else 0.0, dtype)
    return b.unary("rsqrt", b.cast(b.dims(width), dtype))


def _grouped(b: Builder, x: Value, heads: Dim) -> Value:
    """(batch, heads * group, ...) as (batch, heads, group, ...)."""
    return b.reshape(x, (x.shape[0], heads, x.shape[1] // heads, *x.shape[2:]))


def _scores(b: Builder, q: Value, k: Value) -> Value:
    if dims.prove_equal(q.shape[1], k.shape[1]):
        return b.contract(q, k, (BATCH, HEAD, QUERY, FEATURE), (BATCH, HEAD, KEY, FEATURE), (BATCH, HEAD, QUERY, KEY))
    y = b.contract(
        _grouped(b, q, k.shape[1]), k, (BATCH, HEAD, GROUP, QUERY, FEATURE), (BATCH, HEAD, KEY, FEATURE),
        (BATCH, HEAD, GROUP, QUERY, KEY),
    )  # fmt: skip
    return b.reshape(y, (*q.shape[:3], k.shape[2]))


def _weighted(b: Builder, weights: Value, v: Value) -> Value:
    if dims.prove_equal(weights.shape[1], v.shape[1]):
        operands = (BATCH, HEAD, QUERY, KEY), (BATCH, HEAD, KEY, FEATURE), (BATCH, HEAD, QUERY, FEATURE)
        return b.contract(weights, v, *operands)
    y = b.contract(
        _grouped(b, weights, v.shape[1]), v, (BATCH, HEAD, GROUP, QUERY, KEY), (BATCH, HEAD, KEY, FEATURE),
        (BATCH, HEAD, GROUP, QUERY, FEATURE),
    )  # fmt: skip
    return b.reshape(y, (*weights.shape[:3], v.shape[3]))


def _padded(b: Builder, mask: Value, keys: Dim, cached: bool) -> Value:
    """A mask that is shorter than the keys hides the rest of them: a cache has more. Elsewhere, that must be proved."""
    same = dims.prove_equal(mask.shape[-1], keys) if mask.rank else True
    if same or (same is None and not cached) or dims.prove_le(keys, mask.shape[-1]):
        return mask
    hidden = (*(0 for _ in mask.shape[1:]), keys - mask.shape[-1])
    if mask.dtype in (*dtypes.FLOATS, dtypes.BOOL):
        return b.pad(mask, [0] * mask.rank, hidden, False if mask.dtype == dtypes.BOOL else -math.inf)
    return b.pad(b.cast(mask, dtypes.FLOAT32), [0] * mask.rank, hidden, -math.inf)


def _allowed(b: Builder, call: Call, past: Dim, queries: Dim, keys: Dim, lengths: Value | None) -> Value | None:
    """Which keys (batch, 1, query, key) lie before the padding, behind the causal frontier and in the window."""
    if lengths is not None:
        lengths = b.reshape(lengths, (*lengths.shape, 1, 1, 1))
    offset = b.dims(past) if lengths is None else b.sub(lengths, b.dims(queries))
    row, column = b.iota((queries, 1), 0), b.iota((1, keys), 1)
    conditions = []
    if lengths is not None:
        conditions.append(b.lt(column, lengths))
    if call.attr("is_causal", 0):
        conditions.append(b.le(column, b.add(row, offset)))
    if (left := call.attr("left_window_size", -1)) >= 0:
        conditions.append(b.le(b.sub(b.add(row, offset), left), column))
    if (right := call.attr("right_window_size", -1)) >= 0:
        conditions.append(b.le(column, b.add(b.add(row, offset), right)))
    result = None
    for condition in conditions:
        result = condition if result is None else b.elementwise("and", result, condition)
    return result


def _softmax(b: Builder, call: Call, scores: Value, guarded: bool) -> Value:
    """Over the keys. `guarded`: a row may hold nothing but -inf, and is 0 then."""
    precision = call.attr("softmax_precision", 0)
    if precision not in PRECISIONS:
        raise call.invalid(f"softmax_precision {precision} is no floating-point type")
    wide = dtypes.compute(PRECISIONS[precision] or scores.dtype)
    x = b.cast(scores, dtypes.FLOAT64 if scores.dtype == dtypes.FLOAT64 else wide)
    top = b.reduce("reduce_max", x, [3], keepdims=True)
    if guarded:
        top = b.where(b.eq(top, -math.inf), 0, top)
    weights = b.unary("exp", b.sub(x, top))
    total = b.reduce("reduce_sum", weights, [3], keepdims=True)
    if guarded:
        total = b.where(b.eq(total, 0), 1, total)
    return b.cast(shares(b, weights, total), scores.dtype)


@operator("RotaryEmbedding", since=23)
def rotary_embedding(b: Builder, call: Call, x: Value, cos: Value, sin: Value, positions: Value | None = None) -> Value:
    """Pairs of features turned by an angle per position; a pair's halves lie apart, or, interleaved, side by side."""
    flat = x.rank == 3
    if flat:
        y = b.reshape(x, (*x.shape[:2], heads := call.attr("num_heads", 0) or 1, x.shape[2] // heads))
    elif x.rank == 4:
        y = b.transpose(x, (0, 2, 1, 3))
    else:
        raise call.invalid("its operand must have rank 3 or 4")
    batch, sequence, heads, width = y.shape
    turned = call.attr("rotary_embedding_dim", 0) or width
    half = turned // 2
    if positions is not None:
        cos, sin = (b.gather(table, [positions], [0]) for table in (cos, sin))
    cos, sin = (b.reshape(table, (batch, sequence, 1, half)) for table in (cos, sin))
    zeros, step = (0, 0, 0), (1, 1, 1, 2 if call.attr("interleaved", 0) else 1)
    second = 1 if step[3] == 2 else half
    first, other = (b.slice(y, (*zeros, at), (batch, sequence, heads, half), step) for at in (0, second))
    real = b.sub(b.mul(cos, first), b.mul(sin, other))
    imaginary = b.add(b.mul(sin, first), b.mul(cos, other))
    if step[3] == 2:
        pairs = [b.reshape(part, (*part.shape, 1)) for part in (real, imaginary)]
        parts = [b.reshape(b.concat(pairs, 4), (batch, sequence, heads, turned))]
    else:
        parts = [real, imaginary]
    if dims.prove_equal(turned, width) is not True:
        parts.append(b.slice(y, (*zeros, turned), (batch, sequence, heads, width - turned)))
    y = b.concat(parts, 3)
    return b.reshape(y, x.shape) if flat else b.transpose(y, (0, 2, 1, 3))
