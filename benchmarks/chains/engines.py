"""The engines: each takes a model and its inputs, and gives a call that runs it, the way its users get speed from it.

Where an engine can write into arrays of the caller, it does, so that it never pays for fresh pages; torch and jax
cannot, and get an allocator instead that keeps its pages (see `worker.environment`). Every engine's package is imported
by its loader, so that those which are not installed are missing only when they are asked for; and by name, since they
are not there when types are checked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import onnx
from onnx import helper

from benchmarks.chains import elementwise, numpy_like
from benchmarks.chains.case import Array, Feed
from benchmarks.chains.program import translate


@dataclass(frozen=True)
class Session:
    """A loaded model with its inputs. `run` returns when the results are there."""

    run: Callable[[], object]
    results: Callable[[], list[Array]]  # of the last run


@dataclass(frozen=True)
class Job:
    """What a session is made for. `outputs` are for those who can write there. All arrays begin on a cache line."""

    model: onnx.ModelProto
    feed: Feed
    outputs: list[Array]
    threads: int


class Unavailable(Exception):
    """Why an engine does not do this."""


def stitch(job: Job) -> Session:
    """A call bound to the caller's arrays."""
    from stitch import optimize

    compiled = optimize(job.model.SerializeToString(), threads=job.threads)
    return Session(compiled.bind(job.feed, job.outputs), lambda: job.outputs)


def onnxruntime(job: Job, optimised: bool = True) -> Session:
    """An IO binding to the caller's arrays."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(job.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()

    def kind(array: Array) -> int:
        return int(helper.np_dtype_to_tensor_dtype(array.dtype))

    for name, x in job.feed.items():
        binding.bind_input(name, "cpu", 0, kind(x), x.shape, x.ctypes.data)
    for output, y in zip(job.model.graph.output, job.outputs, strict=True):
        binding.bind_output(output.name, "cpu", 0, kind(y), y.shape, y.ctypes.data)
    return Session(lambda: session.run_with_iobinding(binding), lambda: job.outputs)


def onnxruntime_plain(job: Job) -> Session:
    """The same with graph optimisations off: a kernel for each node."""
    return onnxruntime(job, optimised=False)


def openvino(job: Job) -> Session:
    """An infer request whose tensors share the caller's arrays; float32 stays float32."""
    ov = import_module("openvino")

    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "ENABLE_CPU_PINNING": False,  # the process has its processors already
    }
    compiled = core.compile_model(core.read_model(job.model.SerializeToString()), "CPU", settings)
    request = compiled.create_infer_request()
    kept = []  # the request does not keep the arrays
    for port, array in [
        *((port, job.feed[port.any_name]) for port in compiled.inputs),
        *zip(compiled.outputs, job.outputs, strict=True),
    ]:
        raw = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        tensor = ov.Tensor(raw, list(array.shape), port.element_type)
        kept.append(tensor)
        request.set_tensor(port, tensor)
    return Session(request.infer, lambda: job.outputs if kept else [])


def torch(job: Job) -> Session:
    """Eager, in inference mode, each operator by the functional made for it."""
    return _torch(job, compiled=False)


def torch_compile(job: Job) -> Session:
    """The same function through torch.compile: inductor, which writes C++."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unavailable("no C++ compiler")
    return _torch(job, compiled=True)


def _torch(job: Job, compiled: bool) -> Session:
    from benchmarks.chains import torch_table

    torch = import_module("torch")
    torch.set_num_threads(job.threads)
    torch.inference_mode().__enter__()  # for good: the process does nothing else
    program = translate(job.model)
    function = program.bind(torch_table.TABLE, torch_table.tensor)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False, fullgraph=True)
    arguments = [torch_table.tensor(job.feed[name]) for name in program.inputs]
    last: list[Any] = []

    def run() -> None:
        last[:] = function(*arguments)

    run()
    return Session(run, lambda: [torch_table.array(y) for y in last])


def jax(job: Job) -> Session:
    """jax.jit on arrays that are already its own."""
    jax, jnp, special = map(import_module, ("jax", "jax.numpy", "jax.scipy.special"))
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # nobody would gain by not waiting
    program = translate(job.model)
    function = jax.jit(program.bind(numpy_like.table(jnp, special.erf, wide=np.float32), jnp.asarray))
    arguments = [jax.device_put(job.feed[name]) for name in program.inputs]
    last: list[Any] = []

    def run() -> None:
        last[:] = jax.block_until_ready(function(*arguments))

    run()
    return Session(run, lambda: [np.asarray(y) for y in last])


def numexpr(job: Job) -> Session:
    """An expression for each output, where all is elementwise."""
    numexpr = import_module("numexpr")
    numexpr.set_num_threads(job.threads)
    program = _elementwise(job)
    texts = elementwise.expressions(program)

    def run() -> None:
        for text, y in zip(texts, job.outputs, strict=True):
            numexpr.evaluate(text, job.feed, {}, out=y)

    run()
    return Session(run, lambda: job.outputs)


def numba(job: Job) -> Session:
    """One loop, where all is elementwise."""
    numba = import_module("numba")
    program = _elementwise(job)
    function = elementwise.loop(program)
    compiled = numba.njit(function, parallel=job.threads > 1, error_model="numpy")
    numba.set_num_threads(job.threads)
    arguments = [*(job.feed[name].reshape(-1) for name in program.inputs), *(y.reshape(-1) for y in job.outputs)]
    compiled(*arguments)
    return Session(lambda: compiled(*arguments), lambda: job.outputs)


def _elementwise(job: Job) -> Any:
    program = translate(job.model)
    arrays = [*job.feed.values(), *job.outputs]
    if len({x.shape for x in arrays}) > 1 or program.constants:
        raise Unavailable("not elementwise over arrays of one shape")
    if any(x.dtype != np.float32 for x in arrays):
        raise Unavailable("not float32")
    return program


Loader = Callable[[Job], Session]

# By the name in tables: how it is loaded, and the module that it comes from.
ENGINES: dict[str, tuple[Loader, str]] = {
    "stitch": (stitch, "stitch"),
    "onnxruntime": (onnxruntime, "onnxruntime"),
    "onnxruntime-plain": (onnxruntime_plain, "onnxruntime"),
    "openvino": (openvino, "openvino"),
    "torch": (torch, "torch"),
    "torch.compile": (torch_compile, "torch"),
    "jax": (jax, "jax"),
    "numexpr": (numexpr, "numexpr"),
    "numba": (numba, "numba"),
}
