"""A chain of operators: one ONNX graph, written down once with symbolic dims, that can be bound to numbers.

It makes its own inputs, the same in every process, so that they need not travel.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper, parser

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]
Dims = Mapping[str, int]

SIZES = ("small", "l3", "dram")
OPSET, IR_VERSION = 23, 10


@dataclass(frozen=True)
class Case:
    """A chain. `graph` is in onnx.parser's syntax without a name, its dims are the keys of each of `sizes`."""

    name: str
    graph: str
    sizes: Mapping[str, Dims]
    weights: tuple[str, ...] = ()  # inputs that a model has as initializers
    positive: tuple[str, ...] = ()  # inputs in [0.1, 1)
    below: str = ""  # the dim that bounds inputs of int64, which are class numbers
    symbolic: bool = False  # also measured with its dims left open, at many shapes

    @cached_property
    def open_model(self) -> onnx.ModelProto:
        """With symbols for dims, and weights as inputs."""
        return parser.parse_model(f'<ir_version: {IR_VERSION}, opset_import: ["": {OPSET}]> {self.name} {self.graph}')

    def model(self, dims: Dims) -> onnx.ModelProto:
        """With numbers for dims, and weights as initializers."""
        model = onnx.ModelProto()
        model.CopyFrom(self.open_model)
        graph = model.graph
        for value in (*graph.input, *graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_value = dims[dim.dim_param]
        inputs = list(graph.input)
        del graph.input[:]
        for value in inputs:
            if value.name in self.weights:
                graph.initializer.append(numpy_helper.from_array(self._draw(value), value.name))
            else:
                graph.input.append(value)
        return model

    def feed(self, dims: Dims) -> Feed:
        """The same numbers in every process."""
        return {value.name: self._draw(value, dims) for value in self.model(dims).graph.input}

    def open_feed(self, dims: Dims) -> Feed:
        """For `open_model`: weights too are fed."""
        model = self.model(dims)
        return self.feed(dims) | {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}

    def outputs(self, dims: Dims) -> list[Array]:
        """Arrays to write results into, their pages in memory."""
        return [np.ones(*_array(value)) for value in self.model(dims).graph.output]

    def bytes(self, dims: Dims) -> int:
        """Compulsory bytes: what is read and written if every input, weight and output is touched once."""
        model = self.model(dims)
        arrays = [_array(value) for value in (*model.graph.input, *model.graph.output)]
        weights = [numpy_helper.to_array(w) for w in model.graph.initializer if w.name in self.weights]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays) + sum(w.nbytes for w in weights)

    def typed(self, dtype: str) -> Case:
        """The same chain in float16 or bfloat16, with twice the elements along its first dim."""
        sizes = {
            size: {name: extent * (2 if k == 0 else 1) for k, (name, extent) in enumerate(dims.items())}
            for size, dims in self.sizes.items()
        }
        return replace(self, name=f"{self.name}_{dtype}", graph=re.sub(r"\bfloat\b", dtype, self.graph), sizes=sizes)

    def _draw(self, value: onnx.ValueInfoProto, dims: Dims | None = None) -> Array:
        shape, dtype = _array(value)
        rng = np.random.default_rng(zlib.crc32(f"{self.name} {value.name}".encode()))
        if dtype == np.bool_:
            return rng.random(shape) < 0.5
        if dtype == np.int64:
            assert dims is not None
            return rng.integers(0, dims[self.below], shape)
        if dtype.kind in "iu":
            bounds = np.iinfo(dtype)
            return rng.integers(bounds.min, bounds.max, shape, dtype, endpoint=True)
        if value.name in self.positive:
            return rng.uniform(0.1, 1.0, shape).astype(np.float32).astype(dtype)
        return rng.standard_normal(shape, np.float32).astype(dtype)


def _array(value: onnx.ValueInfoProto) -> tuple[tuple[int, ...], np.dtype[Any]]:
    kind = value.type.tensor_type
    return tuple(d.dim_value for d in kind.shape.dim), np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))


def sizes(names: str, *extents: Sequence[int]) -> dict[str, Dims]:
    """Dims by size, from their names and the numbers of each size."""
    return {size: dict(zip(names.split(), row, strict=True)) for size, row in zip(SIZES, extents, strict=True)}


def is_float(dtype: np.dtype[Any]) -> bool:
    """bfloat16 included, whose kind numpy does not know."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16
