"""How fast a chain could be on this machine: no engine can do without moving its bytes, nor without computing.

    limit = max(compulsory bytes / bandwidth, vector instructions / issue rate)

*Bandwidth* is that of numpy.copyto over as many bytes, read and written together, with as many processes as there are
threads: caches count as caches. A chain that reads much and writes little can be somewhat faster than a copy.

*Instructions* are those of the arithmetic that each node needs for an element, as `stitch.codegen.mathlib` would write
it; loads, stores, shuffles and loop control are not counted, so the limit is out of reach where they do not hide. What
the compiler can fuse across nodes, a multiplication and an addition that become one, is not counted either: a chain of
such pairs can be faster than its limit. Two rates are measured, of multiply-adds alone and of multiply-adds and
additions in turn, because processors have more units that can add than that can multiply.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import multiprocessing as mp
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from benchmarks.chains.case import Case, Dims
from benchmarks.pipe import processors
from stitch import target
from stitch.codegen import mathlib
from stitch.runtime import cpu

# ------------------------------------------------------------------ what a chain needs


@dataclass(frozen=True)
class Work:
    """Instructions for one lane: those that multiply or divide, and all."""

    multiplying: float = 0.0
    all: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.multiplying + other.multiplying, self.all + other.all)

    def __mul__(self, times: float) -> Work:
        return Work(self.multiplying * times, self.all * times)


class _Counter(mathlib.CountingBuilder):
    """Counts multiplications by themselves too."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplying = 0

    def _times(self, a: int, b: int) -> int:
        self.multiplying += 1
        return self._two(a, b)

    def fma(self, a: int, b: int, c: int) -> int:
        self.multiplying += 1
        return self._three(a, b, c)

    mul = div = _times


def _function(name: str) -> Work:
    function, counter = mathlib.FUNCTIONS[name], _Counter()
    function.build(counter, *[0] * function.arity)
    return Work(counter.multiplying, counter.count)


def _plain(all: int, multiplying: int = 0) -> Work:
    return Work(multiplying, all)


ADD, MUL = _plain(1), _plain(1, 1)
_NORMAL = _plain(5, 3)  # a sum; a difference and the sum of its squares; by gain and deviation, plus shift
_SOFTMAX = ADD + ADD + _function("exp") + ADD + MUL  # maximum, difference, exponential, sum, times 1 / sum
_GELU_ERF = _function("half_erf") + ADD + MUL  # x * (half_erf + 1 / 2)
_GELU_TANH = _plain(3, 3) + _function("tanh") + _plain(2, 2)

# For each element of the larger of first input and first output.
WORK: Mapping[str, Work] = {
    **dict.fromkeys(("Abs", "Add", "Cast", "Neg", "Relu", "ReduceMean", "ReduceSum", "Round", "Sub"), ADD),
    **dict.fromkeys(("Div", "Mul", "Reciprocal"), MUL),
    **dict.fromkeys(("Concat", "Shape", "Split", "Transpose"), Work()),
    **{name: _function(name.lower()) for name in ("Atan", "Cos", "Exp", "Log", "Sigmoid", "Sin", "Sinh", "Softplus")},
    **{name: _function(name.lower()) for name in ("Sqrt", "Tanh")},
    "ArgMax": _plain(3),  # compare, select the value, select its index
    "BatchNormalization": _plain(1, 1),
    "Clip": _plain(2),
    "DequantizeLinear": _plain(3, 1),  # to int32, to float, times scale with the zero point in one
    "GroupNormalization": _NORMAL,
    "HardSwish": _plain(4, 2),
    "InstanceNormalization": _NORMAL,
    "LayerNormalization": _NORMAL,
    "LogSoftmax": ADD + ADD + _function("exp") + ADD + ADD,
    "LpNormalization": _plain(2, 2),
    "NegativeLogLikelihoodLoss": Work(),  # one element of each row
    "OneHot": _plain(2),
    "QuantizeLinear": _plain(5, 1),  # times 1 / scale, round, two bounds, to bytes
    "RMSNormalization": _plain(3, 3),
    "Softmax": _SOFTMAX,
}


def work(model: onnx.ModelProto) -> Work:
    """The lanes' instructions of one inference, float16 and bfloat16 converted once on each side."""
    graph = shape_inference.infer_shapes(model).graph
    sizes = {v.name: _elements(v) for v in (*graph.input, *graph.value_info, *graph.output)}
    sizes |= {w.name: int(numpy_helper.to_array(w).size) for w in graph.initializer}
    total = Work()
    for node in graph.node:
        each = _GELU_TANH if _is_tanh(node) else _GELU_ERF if node.op_type == "Gelu" else WORK[node.op_type]
        size = max(sizes[node.input[0]], sizes.get(node.output[0], 0))
        total += each * size
        for name in node.output:
            sizes.setdefault(name, size)  # onnx infers no shape for some
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    for v in (*graph.input, *graph.output):
        if v.type.tensor_type.elem_type in halves:
            total += ADD * sizes[v.name]
    return total


def _elements(value: onnx.ValueInfoProto) -> int:
    return math.prod(d.dim_value for d in value.type.tensor_type.shape.dim)


def _is_tanh(node: onnx.NodeProto) -> bool:
    return any(a.name == "approximate" and helper.get_attribute_value(a) == b"tanh" for a in node.attribute)


# ------------------------------------------------------------------ what a machine gives


@dataclass(frozen=True)
class Machine:
    """Measured in processor time, so that neighbours disturb little. `copies`: bytes per second over total bytes,
    ascending; the rates are instructions per second and core."""

    threads: int
    lanes: int
    multiplying: float
    mixed: float
    copies: Sequence[tuple[int, float]]

    def bandwidth(self, size: int) -> float:
        """Between the two sizes measured next to it, linear in the logarithm of the size."""
        sizes = [s for s, _ in self.copies]
        k = bisect.bisect(sizes, size)
        if k in (0, len(sizes)):
            return self.copies[min(k, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.copies[k - 1 : k + 1]
        part = math.log(size / low) / math.log(high / low)
        return slow + part * (fast - slow)


@dataclass(frozen=True)
class Limit:
    """Seconds that one inference takes at least, by each of the two."""

    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute)

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.compute else "compute"


def limit(case: Case, dims: Dims, machine: Machine) -> Limit:
    size, needs = case.bytes(dims), work(case.model(dims))
    issue = max(needs.multiplying / machine.multiplying, needs.all / machine.mixed)
    return Limit(size / machine.bandwidth(size), issue / machine.lanes / machine.threads)


def measure(threads: int) -> Machine:
    """Takes some seconds, and the machine to itself."""
    here = cpu.host()
    lanes = target.from_host(here.triple, here.cpu, here.features).vector_bits // 32
    return Machine(threads, lanes, _rate(lanes, 12, 0), _rate(lanes, 7, 7), copies(threads))


# Sizes of the curve: bytes read and written together.
COPIED = [1 << k for k in range(15, 29)]
BURSTS, BURST_S = 5, 0.02


def copies(threads: int) -> list[tuple[int, float]]:
    """The best of some bursts for each size, by as many processes, each with its part of the bytes."""
    context = mp.get_context("fork")
    barrier = context.Barrier(threads)
    with context.Pool(threads, initializer=_meet, initargs=(barrier,)) as pool:
        found = pool.map(_copy, sorted(processors(threads)), chunksize=1)
    return [(size, sum(rates)) for size, rates in zip(COPIED, zip(*found, strict=True), strict=True)]


_barrier: Any = None


def _meet(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _copy(processor: int) -> list[float]:
    """Bytes per second of this process on that processor, for each size."""
    os.sched_setaffinity(0, {processor})
    rates = []
    for size in COPIED:
        x = np.ones(size // 2 // _barrier.parties, np.uint8)
        y = np.ones_like(x)
        empty = _burst(x[:0], y[:0], 1000)
        number = max(1, round(BURST_S / (_burst(x, y, 3) + 1e-9)))
        _barrier.wait()
        best = min(_burst(x, y, number) for _ in range(BURSTS))
        rates.append(2 * x.nbytes / (best - empty))
    return rates


def _burst(x: np.ndarray, y: np.ndarray, number: int) -> float:
    """Seconds of a copy, on average."""
    start = time.process_time()
    for _ in range(number):
        np.copyto(y, x)
    return (time.process_time() - start) / number


ROUNDS = 1 << 16


def _rate(lanes: int, multiplying: int, adding: int) -> float:
    """Vector instructions per second, of so many independent chains of multiply-adds, and of additions in turn.

    Enough chains to hide an instruction's latency, few enough for the registers."""
    library = cpu.Library(cpu.compile_ir(_loop(lanes, multiplying, adding)), ["issue"])
    issue = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64)(library["issue"])
    best = math.inf
    for _ in range(20):
        start = time.process_time()
        issue(ROUNDS)
        best = min(best, time.process_time() - start)
    return ROUNDS * (multiplying + adding) / best


def _loop(lanes: int, multiplying: int, adding: int) -> str:
    vector = f"<{lanes} x float>"
    chains = [f"m{k}" for k in range(multiplying)]
    for k in range(adding):
        chains.insert(2 * k + 1, f"a{k}")
    starts, steps, sums = "", "", ""
    for k, name in enumerate(chains):
        starts += f"  %{name} = phi {vector} [ splat (float {k + 1}.0), %entry ], [ %{name}.next, %loop ]\n"
        if name[0] == "m":
            steps += f"  %{name}.next = call {vector} @llvm.fma({vector} %{name}, {vector} %x, {vector} %x)\n"
        else:
            steps += f"  %{name}.next = fadd {vector} %{name}, %x\n"
        sums += f"  %s{k + 1} = fadd {vector} %s{k}, %{name}.next\n"
    here = cpu.host()
    features = ",".join(f"+{name}" for name, there in here.features.items() if there)
    return f"""
declare {vector} @llvm.fma({vector}, {vector}, {vector})

define float @issue(i64 %n) "target-cpu"="{here.cpu}" "target-features"="{features}" {{
entry:
  %one = sitofp i64 %n to float
  %first = insertelement {vector} poison, float %one, i32 0
  %x = shufflevector {vector} %first, {vector} poison, <{lanes} x i32> zeroinitializer
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
{starts}{steps}  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %out
out:
  %s0 = shufflevector {vector} %x, {vector} poison, <{lanes} x i32> zeroinitializer
{sums}  %result = extractelement {vector} %s{len(chains)}, i32 0
  ret float %result
}}
"""
