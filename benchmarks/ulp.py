"""Measure the math library against float64: the largest error of each function over all float32 values.

    python -m benchmarks.ulp [name ...] [--stride N]

With no name, every function; with no stride, all 2^32 bit patterns (minutes for each). Functions of two arguments are
sampled. The exit status is 1 if a bound stated in `FUNCTIONS` does not hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from stitch.codegen.bits import evaluate
from stitch.codegen.mathlib import FUNCTIONS

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

CHUNK = 1 << 17  # its temporaries stay in the cache

REFERENCES: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "softplus": lambda x: np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))),
    "erf": special.erf,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "pow": np.power,
}

# Where ranges end and branches meet: each is measured with its neighbours, in both signs.
EDGES = [
    0.0, 2.0**-149, 2.0**-126, 2.0**-64, 2.0**-24, 2.0**-13, 0.1, 1 / 3, 0.5, 2 / 3, 0.70710677, np.pi / 4, 1.0,
    4 / 3, np.sqrt(2), np.pi / 2, 2.0, 3.0, np.pi, 3.92, 9.0, 10.0, 20.0, 87.3365, 88.02969, 88.72284, 89.4159,
    90.0, 103.972, 104.0, 126.0, 128.0, 149.0, 152.0, 2.0**18, 2.0**24, 2.0**30, 2.0**31, 2.0**40, 2.0**62,
    2.0**64, 2.0**84, 2.0**106, 2.0**127, 3.4028235e38, np.inf, np.nan,
]  # fmt: skip


@dataclass(frozen=True)
class Worst:
    """The largest error seen, in ulp of the result, and the arguments that gave it."""

    ulp: float
    arguments: tuple[float, ...]


def ulps(got: Float32, want: Float64) -> Float64:
    """Distance in units of float32 spacing at `want`; infinite where only one of the two is NaN or signs differ.

    Infinity counts as 2^128, the value that would follow the largest float.
    """
    top = 2.0**128
    x, y = np.clip(got.astype(np.float64), -top, top), np.clip(want, -top, top)
    exponent = np.frexp(y)[1].astype(np.int32)
    spacing = np.ldexp(1.0, np.clip(exponent, -125, 128) - 24)
    distance = np.abs(x - y) / spacing
    distance = np.where(np.isnan(x) & np.isnan(y), 0.0, np.where(np.isnan(distance), np.inf, distance))
    opposite = (np.signbit(x) != np.signbit(y)) & ~np.isnan(y)
    return np.where(opposite, np.inf, distance)


def near_edges(width: int = 64) -> Float32:
    """Every edge with the `width` floats on each side of it, in both signs."""
    bits = np.array(EDGES, np.float32).view(np.int32).astype(np.int64)
    around = (bits[:, None] + np.arange(-width, width + 1)[None, :]).ravel()
    around = np.clip(around, 0, 0x7FFFFFFF).astype(np.uint32)
    return np.concatenate([around, around | np.uint32(0x80000000)]).view(np.float32)


def unary_samples(stride: int) -> Iterator[tuple[Float32]]:
    """All float32 bit patterns, or every `stride`-th and the neighbourhoods of the edges."""
    if stride > 1:
        yield (near_edges(),)
    for start in range(0, 2**32, CHUNK * stride):
        bits = np.arange(start, min(start + CHUNK * stride, 2**32), stride, dtype=np.uint64)
        yield (bits.astype(np.uint32).view(np.float32),)


def binary_samples(stride: int) -> Iterator[tuple[Float32, Float32]]:
    """Pairs: edges with edges, random bits, and pairs whose power is finite; fewer as `stride` grows."""
    edges = near_edges(1)
    pairs = np.array(list(product(edges, edges)), np.float32)
    yield pairs[:, 0].copy(), pairs[:, 1].copy()
    small = np.arange(-40, 41, dtype=np.float32) * np.float32(0.5)
    pairs = np.array(list(product(small, small)), np.float32)
    yield pairs[:, 0].copy(), pairs[:, 1].copy()
    generator = np.random.default_rng(1)
    for _ in range(max(1, 2**29 // (stride * CHUNK))):
        bits = generator.integers(0, 2**32, (2, CHUNK), np.uint32).view(np.float32)
        yield bits[0], bits[1]
        x = np.abs(bits[0])
        with np.errstate(all="ignore"):
            y = generator.uniform(-150.0, 129.0, CHUNK) / np.log2(x.astype(np.float64))
        yield x, y.astype(np.float32)
        x = generator.uniform(0.5, 2.0, CHUNK).astype(np.float32)
        with np.errstate(all="ignore"):
            y = generator.uniform(-150.0, 129.0, CHUNK) / np.log2(x.astype(np.float64))
        yield x, y.astype(np.float32)


def measure(name: str, stride: int = 1) -> Worst:
    """The worst argument of the function `name`."""
    samples: Iterator[tuple[Float32, ...]]
    samples = unary_samples(stride) if FUNCTIONS[name].arity == 1 else binary_samples(stride)
    worst = Worst(0.0, ())
    for arguments in samples:
        with np.errstate(all="ignore"):
            want = REFERENCES[name](*(a.astype(np.float64) for a in arguments))
            error = ulps(evaluate(name, *arguments), want)
        at = int(np.argmax(error))
        if error[at] > worst.ulp:
            worst = Worst(float(error[at]), tuple(float(a[at]) for a in arguments))
    return worst


def main(argv: list[str] | None = None) -> int:
    """Measure, print a row for each function, and say whether every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="functions to measure (default: all)")
    parser.add_argument("--stride", type=int, default=1, help="take every N-th float only (a prime is best)")
    options = parser.parse_args(argv)
    broken = False
    print(f"{'function':9} {'cost':>4} {'bound':>5} {'max ulp':>8}  at")
    for name in options.name or FUNCTIONS:
        function = FUNCTIONS[name]
        worst = measure(name, options.stride)
        broken |= worst.ulp > function.ulp
        verdict = "" if worst.ulp <= function.ulp else "  BROKEN"
        where = ", ".join(f"{a!r}" for a in worst.arguments)
        print(f"{name:9} {function.cost:4} {function.ulp:5.1f} {worst.ulp:8.4f}  {where}{verdict}", flush=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
