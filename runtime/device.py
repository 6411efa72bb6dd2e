"""What a device is to the rest of stitch, and one that does nothing.

A device loads an artifact that was compiled for it. What it returns takes arrays in the host's memory and gives
arrays in the host's memory; inside, it keeps what it likes where it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from stitch.errors import ResourceError
from stitch.plan import Artifact, Port, np_dtype

# run(arrays, outputs): a result for each output; an array given in `outputs` is filled and returned.
Run = Callable[[list[np.ndarray], "Sequence[np.ndarray | None] | None"], list[np.ndarray]]

HOST = "host"


class Device(Protocol):
    """`spaces` are the memories that it can read. Only "host" can be read from here; a device that has another
    moves arrays itself."""

    @property
    def name(self) -> str: ...

    @property
    def spaces(self) -> tuple[str, ...]: ...

    def load(self, artifact: Artifact) -> Run: ...

    def transfer(self, array: np.ndarray, source: str, destination: str) -> np.ndarray:
        """An array with these contents in another memory; `array` itself if that is where it is."""
        ...


class Null:
    """A device that runs nothing: outputs of the right shape, all zero. For tests of what is above devices."""

    name = "null"
    spaces = (HOST,)

    def load(self, artifact: Artifact) -> Run:
        def run(arrays: list[np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> list[np.ndarray]:
            sizes = {
                str(artifact.inputs[i].shape[axis]): arrays[i].shape[axis] for _, i, axis in artifact.bindings[::-1]
            }
            given = outputs if outputs is not None else [None] * len(artifact.outputs)
            results = []
            for port, own in zip(artifact.outputs, given, strict=True):
                result = own if own is not None else np.empty(_shape(port, sizes), np_dtype(port.dtype))
                result[...] = 0
                results.append(result)
            return results

        return run

    def transfer(self, array: np.ndarray, source: str, destination: str) -> np.ndarray:
        return array


def _shape(port: Port, sizes: dict[str, int]) -> tuple[int, ...]:
    try:
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in port.shape)
    except KeyError as error:
        raise ResourceError("null", f"the null device cannot compute {error} for output {port.name!r}") from None
