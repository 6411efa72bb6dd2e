"""A run that is bound to the memory of certain arrays, for those who run the same arrays again and again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stitch.bundle import Bundle
from stitch.errors import InputError
from stitch.plan import Artifact
from stitch.runtime.memory import address_of


class Bound:
    """`call()` runs on what is in the inputs now, and returns the list of outputs, always the same.

    The arrays live as long as this. It may be called from several threads, one of which runs at a time; but as each
    run writes the same outputs, those threads must agree on who reads them when.
    """

    # Python looks for `__call__` in the class, which refers it to the object, where most have a builtin function. A
    # method in between would take as long again.
    __slots__ = ("__call__", "__weakref__", "outputs")
    outputs: list[np.ndarray]  # those that each call makes are None before the first

    if TYPE_CHECKING:

        def __call__(self) -> list[np.ndarray]: ...

    def __init__(self, call: Callable[[], list[np.ndarray]], outputs: list[np.ndarray]) -> None:
        self.__call__ = call  # type: ignore[method-assign]
        self.outputs = outputs


def bind_steps(run: Callable[[], list[np.ndarray]], own: Sequence[np.ndarray | None]) -> Bound:
    """For a run that is more than one native call, and makes the outputs that are not the caller's own."""
    outputs: list[Any] = list(own)
    locks: dict[int, threading.Lock] = {}  # by process: in a child after fork, nobody would open the parent's

    def call() -> list[np.ndarray]:
        with locks.setdefault(os.getpid(), threading.Lock()):
            outputs[:] = run()
        return outputs

    return Bound(call, outputs)


def check_memory(
    model: Artifact | Bundle, given: Sequence[object], arrays: Sequence[np.ndarray], own: Sequence[np.ndarray | None]
) -> None:
    """See that inputs can be read where they are (`arrays` is what runs would read), and that no output overlaps."""
    for port, item, array in zip(model.inputs, given, arrays, strict=True):
        if not isinstance(item, np.ndarray) or address_of(item) != address_of(array):
            advice = "give a numpy array that is contiguous, aligned and of the model's dtype"
            raise InputError(port.name, f"input {port.name!r} cannot be bound, only copied", advice)
    taken = [(f"input {port.name!r}", array) for port, array in zip(model.inputs, arrays, strict=True)]
    for port, output in zip(model.outputs, own, strict=True):
        if output is None:
            continue
        for name, array in taken:
            if np.may_share_memory(output, array):  # which compares where they begin and end
                raise InputError(port.name, f"the array given for output {port.name!r} overlaps {name}")
        taken.append((f"output {port.name!r}", output))
