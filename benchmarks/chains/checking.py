"""When an output is right: how far it may be from the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.chains.case import Array, is_float

# As a part of the largest number of the output. A chain in half precision rounds after every operator in some engines.
ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
TIES = 1e-3  # of an output's whole numbers, which may be rounded to the other side
CHUNK = 1 << 20  # elements that are compared at once


def error(got: Sequence[Array], want: Sequence[Array], like: Sequence[Array]) -> float:
    """The largest error as a part of what is allowed: right up to 1. `like` has the types and shapes to be met.

    A few whole numbers may be off by one, where an engine rounds a tie, or what is almost one, to the other side."""
    return max(_error(*three) for three in zip(got, want, like, strict=True))


def _error(got: Array, want: Array, like: Array) -> float:
    if got.shape != like.shape or got.dtype != like.dtype:
        return math.inf
    a, b = got.reshape(-1), want.reshape(-1)
    worst = largest = 0.0
    apart = 0
    for start in range(0, a.size, CHUNK):
        part, expected = (v[start : start + CHUNK].astype(np.float64) for v in (a, b))
        off = np.abs(part - expected)
        worst = max(worst, math.inf if np.isnan(off).any() else float(off.max()))
        largest = max(largest, float(np.abs(expected).max()))
        apart += int(np.count_nonzero(off))
    if not is_float(got.dtype) and apart > math.ceil(TIES * a.size):
        return math.inf
    allowed = ALLOWED[got.dtype.name] * largest if is_float(got.dtype) else 1.0
    return worst / allowed if allowed else (0.0 if worst == 0 else math.inf)
