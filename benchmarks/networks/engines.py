"""The engines on a whole network: each loads a file, and runs arrays that are given anew with every call.

That is how a network is used from Python, and none of them is told more than that: dims that the file leaves open stay
open, and nothing is bound to arrays (chains do that, see `benchmarks.chains.engines`). Packages are imported by their
loaders, by name where they are not there when types are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]
Loader = Callable[[Path, int, Path | None], "Session"]


@dataclass(frozen=True)
class Session:
    """A loaded network. `run` gives the outputs in the model's order; they may be overwritten by the next run."""

    inputs: frozenset[str]
    run: Callable[[Feed], Sequence[Array]]

    def taken(self, feed: Feed) -> Feed:
        """Those arrays that the network takes, with dtypes that are this process's own."""
        return {name: np.array(x, np.dtype(x.dtype.name)) for name, x in feed.items() if name in self.inputs}


def stitch(path: Path, threads: int, cache: Path | None) -> Session:
    """Keeps compiled code in STITCH_CACHE_DIR, so `cache` says nothing new."""
    from stitch import optimize

    model = optimize(path, threads=threads)
    return Session(frozenset(p.name for p in model.inputs), lambda feed: model.run(None, feed))


def onnxruntime(path: Path, threads: int, cache: Path | None) -> Session:
    """Default optimisations. It keeps nothing."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Session(frozenset(i.name for i in session.get_inputs()), lambda feed: session.run(None, feed))


def openvino(path: Path, threads: int, cache: Path | None) -> Session:
    """Float32 stays float32; inputs and outputs are shared rather than copied."""
    ov = import_module("openvino")

    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # the process has its processors already
    }
    if cache is not None:
        settings["CACHE_DIR"] = str(cache)
    compiled = ov.Core().compile_model(str(path), "CPU", settings)
    request, outputs = compiled.create_infer_request(), list(compiled.outputs)

    def run(feed: Feed) -> Sequence[Array]:
        found = request.infer(feed, share_inputs=True, share_outputs=True)
        return [found[port] for port in outputs]

    return Session(frozenset(name for port in compiled.inputs for name in port.names), run)


ENGINES: dict[str, Loader] = {"stitch": stitch, "onnxruntime": onnxruntime, "openvino": openvino}
