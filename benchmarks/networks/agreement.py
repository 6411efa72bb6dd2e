"""Whether engines agree, before anything is timed. No engine is the judge: one that nobody agrees with is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def difference(ours: Sequence[Array], theirs: Sequence[Array], noise: float) -> float:
    """The largest error as a part of what is allowed: a thousandth of the largest number of that output, and noise."""
    if len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if b.dtype.kind != "f":
            if not np.array_equal(a, b):
                return math.inf
            continue
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            return math.inf
        if finite.any():
            allowed = 1e-3 * float(np.abs(b[finite]).max()) + 10 * noise
            off = float(np.abs(a[finite].astype(np.float64) - b[finite]).max())
            worst = max(worst, off / allowed if allowed else (0.0 if off == 0 else math.inf))
    return worst


def disputed(outputs: Mapping[str, Sequence[Array]], noise: float) -> dict[str, str]:
    """The engines that agree with no other, and how far they are off. One alone cannot be disputed."""
    nearest = dict.fromkeys(outputs, math.inf)
    for one, other in combinations(outputs, 2):
        error = difference(outputs[one], outputs[other], noise)
        nearest[one], nearest[other] = min(nearest[one], error), min(nearest[other], error)
    if len(outputs) < 2:
        return {}
    others = "the other" if len(outputs) == 2 else "all others"
    return {
        engine: f"outputs differ from those of {others}: {error:.3g} of what is allowed"
        for engine, error in nearest.items()
        if not error <= 1
    }
