"""Least squares with coefficients that are not negative."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def nonnegative(a: Array, b: Array) -> Array:
    """x >= 0 that makes |a x - b| least: the active-set method of Lawson and Hanson ("Solving Least Squares Problems",
    1974, chapter 23). a: [m, n]; b: [m]. Columns are scaled first, so that units do not matter."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    x: Array = _active_set(a / scale, b) / scale
    return x


def _active_set(a: Array, b: Array) -> Array:
    n = a.shape[1]
    free = np.zeros(n, bool)  # coefficients that are not held at zero
    x = np.zeros(n)
    tolerance = 1e-12 * float(np.abs(a.T @ b).max(initial=0.0))
    for _ in range(3 * n):
        gradient = a.T @ (b - a @ x)
        if free.all() or gradient[~free].max() <= tolerance:
            break
        free[np.argmax(np.where(free, -np.inf, gradient))] = True
        while True:
            best = np.zeros(n)
            best[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            low = free & (best <= 0)
            if not low.any():
                break
            step = float((x[low] / (x[low] - best[low])).min())  # as far as all stay positive
            x = x + step * (best - x)
            free &= x > 1e-15 * max(float(x.max()), 1e-300)
            x[~free] = 0.0
        x = best
    return x
