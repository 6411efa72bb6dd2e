"""What all models that can be run have in common: inputs and outputs by name, calls, and streams."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from stitch.errors import InvalidModel, MissingInput, UnknownInput
from stitch.plan import Port
from stitch.runtime.pipeline import Pipeline, as_arrays
from stitch.runtime.stream import Stream

Feed: TypeAlias = "Mapping[str, np.ndarray] | tuple[np.ndarray, ...] | np.ndarray"
"""One item of a stream: arrays by name, or in the order of the inputs; the array, if there is only one input."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: `shape` has ints and the names of symbols (or expressions of them)."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]


class RunnableModel(ABC):
    """Runs may overlap in time, from any number of threads."""

    def __init__(self, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self._ports = tuple(inputs), tuple(outputs)
        self._names = tuple(p.name for p in inputs)
        self._outputs = {p.name: k for k, p in enumerate(outputs)}
        self._count = len(self._names)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(_tensor(p) for p in self._ports[0])

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(_tensor(p) for p in self._ports[1])

    @abstractmethod
    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs (None: all) for arrays by input name, as onnxruntime's `run`. Raises InputError."""

    def __call__(self, *args: np.ndarray, **kwargs: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """Inputs by position or by name; the output, or a list of them if there are several."""
        feeds = self._by_name(args)
        for name in kwargs:
            if name in feeds:
                raise TypeError(f"input {name!r} is given twice")
        results = self.run(None, feeds | kwargs)
        return results[0] if len(results) == 1 else results

    def stream(self, items: Iterable[Feed], *, depth: int = 2, reuse: bool = False) -> Stream[Feed, list[np.ndarray]]:
        """All outputs for each item (see `Feed`), in order, while further ones are being worked on.

        depth   at most depth x stages items are pulled from `items` before their results are asked for
        reuse   a result's arrays are valid only until the next result is asked for, and no new ones are allocated

        An item's arrays must not be changed before its result is there. Raises StreamError, with the position of the
        item and the error as its cause, after the results of all items before it. Nothing is left behind when the
        stream is closed, or not referred to any more."""
        return self._pipeline().stream(items, self._arrays, list, depth, reuse)

    @abstractmethod
    def explain(self) -> Any:
        """What runs where, and why; `str` of it is for people."""

    @abstractmethod
    def _pipeline(self) -> Pipeline:
        """What streams go through."""

    def _arrays(self, item: Any) -> list[np.ndarray]:
        """The inputs of an item, in order."""
        if isinstance(item, Mapping):
            return as_arrays(self._in_order(item))
        return as_arrays(self._in_order(self._by_name(item if isinstance(item, tuple) else (item,))))

    def _by_name(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        if len(arrays) > self._count:
            raise UnknownInput(f"argument {self._count + 1}", inputs=self._names)
        return dict(zip(self._names, arrays, strict=False))

    def _in_order(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            arrays = [feeds[name] for name in self._names]
        except KeyError as missing:
            raise MissingInput(missing.args[0], inputs=self._names) from None
        if len(feeds) != self._count:
            extra = next(name for name in feeds if name not in self._names)
            raise UnknownInput(extra, inputs=self._names)
        return arrays

    def _position(self, name: str) -> int:
        if name not in self._outputs:
            known = ", ".join(map(repr, self._outputs))
            raise InvalidModel(f"the model has no output {name!r}", advice=f"its outputs are {known}")
        return self._outputs[name]


def _tensor(port: Port) -> Tensor:
    return Tensor(port.name, np.dtype(port.dtype), port.shape)
