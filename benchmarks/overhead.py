"""What a call costs apart from the work in it.

    python -m benchmarks.overhead [--record]

A Relu of 16 floats, compiled from ONNX, bound to the caller's arrays with `CompiledModel.bind`, and through
`CompiledModel.run` with the caller's arrays and with new ones; chains of Add and Mul of 16 floats, compiled with no
scheme allowed that could stitch them, so that each further operator is a further kernel; beside them onnxruntime, if it
is installed. Then what the parts cost, on artifacts written by hand: the executable without the API, each further call,
an empty parallel region. Last, that a run in the steady state with the caller's arrays keeps no memory: not Python's
(tracemalloc), nor the process's (its resident pages).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import stitch
from benchmarks import results
from stitch import knobs
from stitch.plan import Artifact, NativeStep, Port, Slot
from stitch.runtime import cpu
from stitch.runtime.executable import Executable

KERNEL = """
define internal void @relu(ptr %dims, ptr %slots) noinline {
entry:
  %n = load i64, ptr %dims
  %x = load ptr, ptr %slots
  %y_at = getelementptr ptr, ptr %slots, i64 1
  %y = load ptr, ptr %y_at
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %body]
  %more = icmp slt i64 %i, %n
  br i1 %more, label %body, label %out
body:
  %p = getelementptr float, ptr %x, i64 %i
  %q = getelementptr float, ptr %y, i64 %i
  %v = load float, ptr %p
  %positive = fcmp ogt float %v, 0.0
  %r = select i1 %positive, float %v, float 0.0
  store float %r, ptr %q
  %next = add i64 %i, 1
  br label %loop
out:
  ret void
}

define void @layout(ptr %dims, ptr %out) {
  %n = load i64, ptr %dims
  store i64 4096, ptr %out
  %d = getelementptr i64, ptr %out, i64 1
  store i64 %n, ptr %d
  ret void
}
"""
REGION = """
declare void @stitch_parallel(ptr, ptr, ptr, i64, i64)

define internal void @nothing(ptr %args, i64 %begin, i64 %end, i64 %worker) {
  ret void
}

define void @regions(ptr %team, i64 %count) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  call void @stitch_parallel(ptr %team, ptr @nothing, ptr null, i64 2, i64 1)
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %out
out:
  ret void
}
"""


def relu(kernels: int) -> Artifact:
    calls = "  call void @relu(ptr %dims, ptr %slots)\n" * kernels
    entry = f"define i64 @entry(ptr %team, ptr %dims, ptr %slots, ptr %arena) {{\n{calls}  ret i64 0\n}}\n"
    return Artifact(
        target="",
        symbols=("n",),
        inputs=(Port("x", "float32", ("n",)),),
        outputs=(Port("y", "float32", ("n",)),),
        slots=(Slot("float32", 1, "input"), Slot("float32", 1, "output")),
        bindings=((0, 0, 0),),
        steps=(NativeStep("entry", "layout", (1,)),),
        code=cpu.compile_ir(KERNEL + entry),
    )


def microseconds(call: Callable[[], object], repeat: int = 60, number: int = 1000) -> float:
    """The best of several averages: what the neighbours on this machine do should not count."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        for _ in range(number):
            call()
        best = min(best, (time.perf_counter() - start) / number)
    return best * 1e6


def region(size: int) -> float:
    library = cpu.Library(cpu.compile_ir(REGION), ["regions"], cpu.support())
    regions = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(library["regions"])
    team = cpu.team(size)
    address = team.address if team else None
    return microseconds(lambda: regions(address, 100), number=20) / 100


# ------------------------------------------------------------------ models


def model(operators: list[str]) -> bytes:
    """A chain of operators on x of n floats; binary ones take b as their second operand."""
    import onnx
    from onnx import helper

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"])

    last = len(operators) - 1
    nodes = [
        helper.make_node(
            operator,
            [f"v{k - 1}" if k else "x", *(["b"] if operator != "Relu" else [])],
            ["y" if k == last else f"v{k}"],
        )
        for k, operator in enumerate(operators)
    ]
    inputs = [value("x"), *([value("b")] if set(operators) != {"Relu"} else [])]
    graph = helper.make_graph(nodes, "chain", inputs, [value("y")])
    opset = helper.make_opsetid("", 20)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())


def chain(length: int) -> bytes:
    return model([("Add", "Mul")[k % 2] for k in range(length)])


def kernels(compiled: stitch.CompiledModel) -> int:
    return len(compiled.explain().to_dict()["kernels"])


def session(text: bytes) -> Any:
    """onnxruntime's, or None."""
    try:
        import onnxruntime as ort
    except ImportError:
        return None
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # it would not use more for 16 elements
    options.log_severity_level = 3
    return ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])


def bound(peer: Any, feed: dict[str, np.ndarray], y: np.ndarray) -> Callable[[], object]:
    """A run of onnxruntime with inputs and outputs bound to the caller's arrays, its way without allocation."""
    binding = peer.io_binding()
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return lambda: peer.run_with_iobinding(binding)


# ------------------------------------------------------------------ memory


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept(call: Callable[[], object], number: int) -> tuple[int, int, int]:
    """Bytes that so many calls have kept: Python's, and the process's; and the most that Python had in between."""
    for _ in range(100):
        call()
    gc.collect()
    before = resident()
    for _ in range(number):
        call()
    grown = resident() - before
    tracemalloc.start()
    try:
        base = 0
        for turn in range(number + 100):
            call()
            if turn == 99:  # by now, everything that is made once and kept was made under observation
                tracemalloc.reset_peak()
                base = tracemalloc.get_traced_memory()[0]
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return now - base, grown, peak - base


# ------------------------------------------------------------------ the table


def calls() -> list[tuple[str, float, float | None]]:
    """What, stitch's microseconds, onnxruntime's."""
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    y, b = np.empty_like(x), np.full_like(x, 0.5)
    relu_text = model(["Relu"])
    one = stitch.optimize(relu_text, cache=False)
    feed, outputs = {"x": x}, [y]
    one.run(None, feed, outputs)
    assert np.array_equal(y, np.maximum(x, 0))
    peer = session(relu_text)
    rows: list[tuple[str, float, float | None]] = []
    theirs = microseconds(bound(peer, feed, y)) if peer else None
    rows.append(("bound call", microseconds(one.bind(feed, outputs)), theirs))
    own = microseconds(lambda: one.run(None, feed, outputs))
    rows.append(("run, own outputs", own, theirs))
    new = microseconds(lambda: one.run(None, feed))
    rows.append(("run, new outputs", new, microseconds(lambda: peer.run(None, feed)) if peer else None))
    both = {"x": x, "b": b}
    times: dict[int, tuple[float, float | None]] = {}
    for length in (1, 65):
        with knobs.using(schemes="independent"):
            compiled = stitch.optimize(chain(length), cache=False)
        assert kernels(compiled) == length, f"{kernels(compiled)} kernels"
        other = session(chain(length))
        theirs = microseconds(bound(other, both, y), number=100) if other else None
        times[length] = microseconds(lambda c=compiled: c.run(None, both, outputs), number=200), theirs  # type: ignore[misc]
        if other:
            want = other.run(None, both)[0]
            assert np.array_equal(compiled.run(None, both)[0], want)
    (ours_1, theirs_1), (ours_n, theirs_n) = times[1], times[65]
    more = (theirs_n - theirs_1) / 64 if theirs_1 and theirs_n else None
    rows.append(("each further kernel, its work included", (ours_n - ours_1) / 64, more))
    return rows


def parts() -> list[tuple[str, float, float | None]]:
    """The same by hand: the executable without the API around it."""
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    inputs, outputs = [x], [np.empty_like(x)]
    one, many = Executable(relu(1)), Executable(relu(65))
    single = microseconds(lambda: one.run(inputs, outputs))
    rows: list[tuple[str, float, float | None]] = [("executable by itself, own outputs", single, None)]
    more = (microseconds(lambda: many.run(inputs, outputs)) - single) / 64
    rows.append(("each further call of a scalar loop over 16", more, None))
    for size in sorted({2, one.threads}):
        if size > 1:
            rows.append((f"empty region, team of {size}", region(size), None))
    return rows


def memory() -> list[tuple[str, tuple[int, int, int]]]:
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    large = np.linspace(-1, 1, 1 << 20, dtype=np.float32)
    with knobs.using(schemes="independent"):
        several = stitch.optimize(chain(5), cache=False)
    one = stitch.optimize(model(["Relu"]), cache=False)
    found = []
    for label, compiled, array in (("one kernel, 16 floats", one, x), ("five kernels, 2²⁰ floats", several, large)):
        feed = {p.name: array for p in compiled.inputs}
        outputs: list[np.ndarray | None] = [np.empty_like(array)]
        number = 10_000 if array.size < 100 else 300
        found.append((f"{label}, {number} runs", kept(lambda c=compiled, f=feed, o=outputs: c.run(None, f, o), number)))  # type: ignore[misc]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    args = parser.parse_args()
    lines = ["| 16 floats, best of several averages | stitch us | onnxruntime us |", "|---|---:|---:|"]
    rows = calls()
    for label, ours, theirs in [*rows, *parts()]:
        lines.append(f"| {label} | {ours:.3f} | {'' if theirs is None else f'{theirs:.3f}'} |")
    times = [ours for _, ours, _ in rows]
    met = {
        "a bound call below 0.3 us": times[0] < 0.3,
        "run with own outputs below 1 us": times[1] < 1,
        "a further kernel below 0.5 us": times[3] < 0.5,
    }
    lines += ["", "| own outputs | Python keeps | in between | resident grows |", "|---|---:|---:|---:|"]
    clean = True
    for label, (net, grown, peak) in memory():
        lines.append(f"| {label} | {net} bytes | {peak} bytes | {grown} bytes |")
        clean = clean and net <= 0 and grown <= 0
    met["nothing kept"] = clean
    aims = "; ".join(f"{aim}: {'met' if good else 'MISSED'}" for aim, good in met.items())
    text = "\n".join([*lines, "", f"Aims: {aims}."])
    print(text)
    if args.record:
        notes = (
            "onnxruntime with own outputs: `run_with_iobinding`, its arrays bound beforehand. A further kernel: the "
            "difference between chains of 1 and 65 Adds and Muls, which `STITCH_SCHEMES=independent` keeps apart; the "
            "outputs are compared."
        )
        results.record("overhead", "What a call costs", f"{results.origin()}\n\n{notes}\n\n{text}")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
