"""What a call costs apart from the work in it: python -m benchmarks.overhead

A Relu of 16 floats, and the same with more kernels in the artifact, with the caller's arrays and with new ones;
an empty parallel region; beside them onnxruntime, if it is installed.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import numpy as np

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


def microseconds(call: Callable[[], object], repeat: int = 15, number: int = 4000) -> float:
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
    return microseconds(lambda: regions(address, 1000), number=20) / 1000


def onnxruntime_relu(x: np.ndarray) -> float | None:
    try:
        import onnx
        import onnxruntime as ort
    except ImportError:
        return None
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [value("x", onnx.TensorProto.FLOAT, ["n"])],
        [value("y", onnx.TensorProto.FLOAT, ["n"])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return microseconds(lambda: session.run(None, {"x": x}))


def main() -> None:
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    y = np.empty_like(x)
    one = Executable(relu(1))
    many = Executable(relu(65))
    inputs, outputs = [x], [y]
    single = microseconds(lambda: one.run(inputs, outputs))
    assert np.array_equal(y, np.maximum(x, 0))
    print(f"run, own outputs       {single:6.2f} us")
    print(f"run, new outputs       {microseconds(lambda: one.run(inputs)):6.2f} us")
    more = (microseconds(lambda: many.run(inputs, outputs)) - single) / 64
    print(f"each further kernel    {more:6.3f} us, its work included")
    for size in sorted({2, one.threads}):
        if size > 1:
            print(f"empty region, team of {size} {region(size):5.2f} us")
    theirs = onnxruntime_relu(x)
    if theirs is not None:
        print(f"onnxruntime            {theirs:6.2f} us, new outputs")


if __name__ == "__main__":
    main()
