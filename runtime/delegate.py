"""Other runtimes as devices, for parts of a model that stitch cannot compile.

A delegate takes a part as an ONNX file's bytes. onnxruntime is one, if it is installed: it is imported here and
nowhere else, when a part is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from stitch.errors import InputError, MissingRuntime, ResourceError, StitchError, WrongDtype, WrongRank, WrongShape
from stitch.plan import Port
from stitch.runtime.device import Run

Session = Callable[[Mapping[str, Any]], Sequence[Any]]
"""The outputs, in order, for inputs by name."""


class Delegate(Protocol):
    @property
    def name(self) -> str: ...

    def load(self, model: bytes, outputs: Sequence[str]) -> Session:
        """Raises ResourceError if there is no such runtime here, or it does not take the model."""
        ...


class OnnxRuntime:
    """`threads`: as many as one run may use; None: its own choice."""

    name = "onnxruntime"

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    @property
    def version(self) -> str:
        """Of what is installed; "" if nothing is."""
        try:
            return metadata.version("onnxruntime")
        except metadata.PackageNotFoundError:
            return ""

    def load(self, model: bytes, outputs: Sequence[str]) -> Session:
        try:
            import onnxruntime
        except ImportError as problem:
            advice = "install it with `pip install onnxruntime`, or replace the operators that stitch lacks"
            raise MissingRuntime("onnxruntime", "onnxruntime is not installed", advice) from problem
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # its exceptions have no common base but this
            raise ResourceError("onnxruntime", f"onnxruntime does not take the part: {_short(problem)}") from problem
        names = list(outputs)

        def run(feeds: Mapping[str, Any]) -> Sequence[Any]:
            return session.run(names, dict(feeds))  # type: ignore[no-any-return]

        return run


def runner(session: Session, inputs: Sequence[Port | str], name: str) -> Run:
    """What a stage of a pipeline runs: inputs in order, checked where a port says what they are (a name alone: not).

    Results never share memory with inputs, whose arrays are used again."""
    names = [port if isinstance(port, str) else port.name for port in inputs]

    def run(arrays: list[np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> list[np.ndarray]:
        for port, array in zip(inputs, arrays, strict=True):
            if isinstance(port, Port):
                _check(port, array)
        try:
            found = session(dict(zip(names, arrays, strict=True)))
        except StitchError:
            raise
        except Exception as problem:
            raise InputError(None, f"{name} failed: {_short(problem)}") from problem
        results = [_own(x, arrays) for x in found]
        for k, own in enumerate(outputs or ()):
            if own is not None:
                own[...] = results[k]
                results[k] = own
        return results

    return run


def _own(result: Any, arrays: Sequence[Any]) -> Any:
    """Sequences and the like, which only delegates pass on, are left as they are."""
    if isinstance(result, np.generic):
        return np.asarray(result)
    if not isinstance(result, np.ndarray):
        return result
    shared = any(isinstance(a, np.ndarray) and np.may_share_memory(result, a) for a in arrays)
    return result.copy() if shared else np.asarray(result, order="C")


def _check(port: Port, array: np.ndarray) -> None:
    if port.dtype != "object" and array.dtype.name != port.dtype:
        raise WrongDtype(port.name, given=array.dtype.name, expected=port.dtype)
    if array.ndim != len(port.shape):
        raise WrongRank(port.name, given=array.shape, expected=port.shape)
    for axis, (size, dim) in enumerate(zip(array.shape, port.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise WrongShape(port.name, axis=axis, given=size, expected=dim)


def _short(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
