"""Measure the math library against float64: the largest error of each function over all float32 values.

    python -m benchmarks.ulp [NAME ...] [--stride N] [--jobs N] [--record]

With no name, every function and the two forms of GELU; with no stride, all 2^32 bit patterns (a minute or two for
each). Functions of two arguments are sampled. What is measured is the compiled code of this machine, after a look
whether it equals numpy's evaluation to the bit. The exit status is 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import llvmlite.binding as binding
import numpy as np
import numpy.typing as npt
from scipy import special

from benchmarks import results
from stitch.codegen import machine, mathlib, tables
from stitch.codegen.bits import NumpyBuilder
from stitch.codegen.emit_code import Writer
from stitch.codegen.emit_math import MachineMath, vector_isa
from stitch.codegen.emit_values import Operations, Value
from stitch.codegen.mathlib import FUNCTIONS
from stitch.codegen.polynomials import Builder, V
from stitch.dtypes import FLOAT32
from stitch.target import Target

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

CHUNK = 1 << 15  # its temporaries stay in the cache
SLICES = 32

# ------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Measured:
    """A function, what it should be, and how far from that it may be: `ulp`, or `absolute` if that is more."""

    build: Callable[..., Any]
    arity: int
    reference: Callable[..., Any]
    ulp: float
    absolute: float = 0.0


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
    "half_erf": lambda x: special.erf(x * np.sqrt(0.5)) / 2,
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


def gelu_erf(b: Builder[V], x: V) -> V:
    """x (half_erf(x) + 1 / 2), as it is compiled."""
    return b.mul(x, b.add(mathlib.half_erf(b, x), b.const(0.5)))


def gelu_tanh(b: Builder[V], x: V) -> V:
    """x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3)), as it is compiled."""
    cube = b.mul(b.mul(x, x), x)
    inner = b.mul(b.fma(cube, b.const(0.044714998453855515), x), b.const(1.5957691669464111))
    return b.mul(x, mathlib.sigmoid(b, inner))


def _gelu_tanh(x: Float64) -> Float64:
    value: Float64 = x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return value


MEASURED = {name: Measured(f.build, f.arity, REFERENCES[name], f.ulp) for name, f in FUNCTIONS.items()}
MEASURED |= {
    "gelu_erf": Measured(gelu_erf, 1, lambda x: x * special.ndtr(x), 4.0, 1e-7),
    "gelu_tanh": Measured(gelu_tanh, 1, _gelu_tanh, 4.0, 1e-7),
}

# ------------------------------------------------------------------ arguments

# Where ranges end and branches meet: each is measured with its neighbours, in both signs.
EDGES = [
    0.0, 2.0**-149, 2.0**-126, 2.0**-64, 2.0**-24, 2.0**-13, 0.1, 1 / 3, 0.5, 2 / 3, 0.70710677, np.pi / 4, 1.0,
    4 / 3, np.sqrt(2), np.pi / 2, 2.0, 3.0, np.pi, 3.92, 9.0, 10.0, 20.0, 87.3365, 88.02969, 88.72284, 89.4159,
    90.0, 103.972, 104.0, 126.0, 128.0, 149.0, 152.0, 2.0**18, 2.0**24, 2.0**30, 2.0**31, 2.0**40, 2.0**62,
    2.0**64, 2.0**84, 2.0**106, 2.0**127, 3.4028235e38, np.inf, np.nan,
]  # fmt: skip


BORDERS = [
    *(float(k + 0.5) * step for step in (tables.ERF_STEP, tables.HALF_ERF_STEP) for k in range(16)),
    *((2.0**e * (1 + k / 4) - 0.5) / tables.TANH_SCALE for e in range(-1, 4) for k in range(4)),
    *(2.0**e * (1 + k / 16) for e in (-127, -1, 0, 10) for k in range(16)),
]  # between the intervals of the tables


def near_edges(width: int = 64, borders: bool = False) -> Float32:
    """Every edge with the `width` floats on each side of it, in both signs."""
    bits = np.array(EDGES + (BORDERS if borders else []), np.float32).view(np.int32).astype(np.int64)
    around = (bits[:, None] + np.arange(-width, width + 1)[None, :]).ravel()
    around = np.clip(around, 0, 0x7FFFFFFF).astype(np.uint32)
    return np.concatenate([around, around | np.uint32(0x80000000)]).view(np.float32)


def unary_samples(stride: int, part: int, parts: int) -> Iterator[tuple[Float32]]:
    """All float32 bit patterns of a part, or every `stride`-th and the neighbourhoods of the edges."""
    if stride > 1 and part == 0:
        yield (near_edges(borders=True),)
    size = 2**32 // parts
    begin, end = -(-part * size // stride) * stride, (part + 1) * size
    for start in range(begin, end, CHUNK * stride):
        bits = np.arange(start, min(start + CHUNK * stride, end), stride, dtype=np.uint64)
        yield (bits.astype(np.uint32).view(np.float32),)


def binary_samples(stride: int, part: int, parts: int) -> Iterator[tuple[Float32, Float32]]:
    """Pairs: edges with edges, random bits, and pairs whose power is finite; fewer as `stride` grows."""
    if part == 0:
        edges, small = near_edges(1), np.arange(-40, 41, dtype=np.float32) * np.float32(0.5)
        for values in (edges, small):
            pairs = np.array(list(product(values, values)), np.float32)
            yield pairs[:, 0].copy(), pairs[:, 1].copy()
    generator = np.random.default_rng([1, part])
    for _ in range(max(1, 2**29 // (stride * CHUNK * parts))):
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


# ------------------------------------------------------------------ errors


@dataclass(frozen=True)
class Worst:
    """The largest error seen, in ulp of the result, and the arguments that gave it."""

    ulp: float
    arguments: tuple[float, ...]


def ulps(got: Float32, want: Float64) -> Float64:
    """Distance in units of float32 spacing at `want`; infinite where only one of the two is NaN or signs differ.

    Infinity counts as 2^128, the value that would follow the largest float.
    """
    distance = np.abs(got - want) / _spacing(want)
    odd = ~(distance < np.inf) | (np.signbit(got) != np.signbit(want))
    if odd.any():
        unlike = np.flatnonzero(odd & ~(np.isnan(got) & np.isnan(want)))
        distance[odd] = 0.0
        x, y = (np.clip(v[unlike].astype(np.float64), -(2.0**128), 2.0**128) for v in (got, want))
        away = np.where(np.signbit(x) == np.signbit(y), np.abs(x - y) / _spacing(y), np.inf)
        distance[unlike] = np.where(np.isnan(x) | np.isnan(y), np.inf, away)
    return distance


def _spacing(want: Float64) -> Float64:
    """Of the float32 values about `want`."""
    exponent = want.view(np.int64) & (0x7FF << 52)
    np.maximum(exponent, (1023 - 126) << 52, out=exponent)
    np.minimum(exponent, (1023 + 127) << 52, out=exponent)
    exponent -= 23 << 52
    spacing: Float64 = exponent.view(np.float64)
    return spacing


def measure(name: str, stride: int = 1, native: bool = False, part: int = 0, parts: int = 1) -> Worst:
    """The worst argument of the function `name`, evaluated by numpy or by compiled code."""
    row = MEASURED[name]
    samples: Iterator[tuple[Float32, ...]]
    samples = (unary_samples if row.arity == 1 else binary_samples)(stride, part, parts)
    run = compiled(name) if native else functools.partial(row.build, NumpyBuilder())
    worst = Worst(0.0, ())
    for arguments in samples:
        with np.errstate(all="ignore"):
            want = row.reference(*(a.astype(np.float64) for a in arguments))
            got = run(*arguments)
            error = ulps(got, want)
            if row.absolute:
                error = np.where(np.abs(got - want) <= row.absolute, 0.0, error)
        at = int(np.argmax(error))
        if error[at] > worst.ulp:
            worst = Worst(float(error[at]), tuple(float(a[at]) for a in arguments))
    return worst


# ------------------------------------------------------------------ compiled code


@functools.cache
def compiled(name: str, target: Target | None = None) -> Callable[..., Float32]:
    """The function as code for this machine, or for another whose code it runs; right where numpy is, to the bit."""
    row, target = MEASURED[name], target or machine.host()
    builder = binding.JITLibraryBuilder().add_current_process()
    builder.add_object_img(machine.compile(emitted(row.build, row.arity, target), target))
    builder.export_symbol("f")
    library = builder.link(_jit(), f"{name} for {target}")
    address = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (row.arity + 1), ctypes.c_int64)(library["f"])

    def run(*arguments: Float32) -> Float32:
        size = arguments[0].size
        padded = [np.concatenate([a, np.ones(-size % 64, np.float32)]) if size % 64 else a for a in arguments]
        out = np.empty_like(padded[0])
        address(*(a.ctypes.data for a in padded), out.ctypes.data, out.size)
        return out[:size]

    run.library = library  # type: ignore[attr-defined]  # it lives as long as the function
    sample = next(unary_samples(4099, 0, 1) if row.arity == 1 else binary_samples(1 << 20, 0, 1))
    with np.errstate(all="ignore"):
        if not np.array_equal(run(*sample), row.build(NumpyBuilder(), *sample), equal_nan=True):
            raise AssertionError(f"{name}: the code for {target} and numpy differ")
    return run


@functools.cache
def _jit() -> Any:
    machine.host()
    return binding.create_lljit_compiler()


def emitted(build: Callable[..., Any], arity: int, target: Target) -> str:
    """A module with void f(argument ..., result, count): a loop over vectors."""
    w = Writer()
    o = Operations(w, target.fma, vector_isa(target))
    o.width = target.vector_bits // 32
    vector = o.type(FLOAT32, True)

    def body(at: str | int, _: list[str]) -> list[str]:
        places = [w.pure(f"getelementptr float, ptr %p{k}, i64 {at}", str(at)) for k in range(arity + 1)]
        loads = [w.pure(f"load {vector}, ptr {p}, align 4", p) for p in places[:-1]]
        value = o.widen(build(MachineMath(o), *(Value(FLOAT32, (x,), True) for x in loads)))
        w.effect(f"store {vector} {value.parts[0]}, ptr {places[-1]}, align 4")
        return []

    w.repeat("0", "%n", o.width, [], body)
    parameters = ", ".join(f"ptr %p{k}" for k in range(arity + 1))
    bits = target.vector_bits
    attributes = f'nounwind "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
    return "\n".join([*o.declared.values(), f"define void @f({parameters}, i64 %n) {attributes} {{", w.text(), "}", ""])


# ------------------------------------------------------------------ the command


def _part(task: tuple[str, int, int]) -> Worst:
    name, stride, part = task
    return measure(name, stride, True, part, SLICES)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a row for each function, and say whether every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="functions to measure (default: all)")
    parser.add_argument("--stride", type=int, default=1, help="take every N-th float only (a prime is best)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--record", action="store_true", help="put the table into benchmarks/RESULTS.md")
    options = parser.parse_args(argv)
    names = options.name or list(MEASURED)
    if unknown := [name for name in names if name not in MEASURED]:
        parser.error(f"there is no function {unknown[0]!r}; there are {', '.join(MEASURED)}")
    broken = False
    lines = ["| function | operations | bound, ulp | largest error, ulp | at | |", "|---|--:|--:|--:|---|---|"]
    print("\n".join(lines))
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = {name: pool.map(_part, [(name, options.stride, k) for k in range(SLICES)]) for name in names}
        for name, parts in rows.items():
            row = MEASURED[name]
            worst = max(parts, key=lambda w: w.ulp)
            holds = worst.ulp <= row.ulp
            broken |= not holds
            where = ", ".join(f"{a!r}" for a in worst.arguments)
            cost = mathlib.count(row.build, row.arity)
            bound = f"{row.ulp:g}" + (f" or {row.absolute:g}" if row.absolute else "")
            lines.append(f"| {name} | {cost} | {bound} | {worst.ulp:.3f} | {where} | {'' if holds else 'BROKEN'} |")
            print(lines[-1], flush=True)
    if options.record:
        every = "all 2^32 floats" if options.stride == 1 else f"every {options.stride}-th float"
        notes = f"{every}, against float64; functions of two arguments are sampled."
        results.record("ulp", "Errors of the math library", f"{results.origin()}\n\n{notes}\n\n" + "\n".join(lines))
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
