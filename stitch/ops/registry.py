"""ONNX operators by name and opset: one decorated function each, written in primitives.

    @operator("Softmax", since=13)
    def softmax(b: Builder, call: Call, x: Value) -> Value: ...

The function receives the builder, the call (attributes, opset) and one argument per ONNX input (None for an omitted
optional one; trailing omitted inputs take the parameter's default). It returns a value, or a tuple of values in the
order of ONNX's outputs (None for one that is never asked for). What it cannot do it refuses with
`raise call.unsupported(advice)`; what contradicts ONNX's specification with `raise call.invalid(problem)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from stitch import contents, dtypes
from stitch.dims import Dim
from stitch.errors import InvalidModel, UnsupportedOperator
from stitch.graph import Builder, Value
from stitch.ops.primitives import Array

Result = Value | tuple[Value | None, ...]
Function = Callable[..., Result]
F = TypeVar("F", bound=Function)

_OPERATORS: dict[tuple[str, str], dict[int, Function | None]] = {}
DOMAIN = ""
NEWEST = 28  # of ONNX's operator sets: what a later one says has not been read

ELEMENT_TYPES: Mapping[int, np.dtype] = {
    1: dtypes.FLOAT32, 2: dtypes.UINT8, 3: dtypes.INT8, 4: dtypes.UINT16, 5: dtypes.INT16, 6: dtypes.INT32,
    7: dtypes.INT64, 9: dtypes.BOOL, 10: dtypes.FLOAT16, 11: dtypes.FLOAT64, 12: dtypes.UINT32, 13: dtypes.UINT64,
    16: dtypes.BFLOAT16,
}  # fmt: skip
"""ONNX's TensorProto.DataType, where stitch has the type."""


@dataclass(frozen=True)
class Call:
    """One ONNX node as an operator's function sees it. `attrs` hold ints, floats, strings, tuples and arrays."""

    operator: str
    node: str
    opset: int
    attrs: Mapping[str, Any]
    outputs: tuple[str, ...] = ("",)  # "" for an output that nobody reads
    inputs: tuple[Value | None, ...] = ()
    domain: str = DOMAIN
    constants: Mapping[Value, Array] = field(default_factory=dict)

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attrs.get(name, default)

    def constant(self, value: Value, what: str) -> Array:
        """The elements of `value`, which this operator needs at compile time. Raises UnsupportedOperator."""
        if (array := self.known(value)) is not None:
            return array
        raise self.unsupported(f"its {what} must be a constant; fold the model's constants first")

    def known(self, value: Value) -> Array | None:
        """The elements of `value` if they are known at compile time and hold no symbol."""
        if value in self.constants:
            return self.constants[value]
        return None if value.contents is None else contents.to_array(value.contents, value.dtype)

    def dims(self, value: Value, what: str) -> tuple[Dim, ...]:
        """The elements of an integer vector (or scalar) as Dims, possibly symbolic. Raises UnsupportedOperator."""
        if value.contents is not None:
            return tuple(value.contents.reshape(-1).tolist())
        if value in self.constants:
            return tuple(int(x) for x in self.constants[value].reshape(-1))
        raise self.unsupported(f"its {what} must follow from constants and input shapes, not from input data")

    def ints(self, value: Value, what: str) -> list[int]:
        """The elements of an integer value that must be numbers. Raises UnsupportedOperator."""
        out = []
        for d in self.dims(value, what):
            if not isinstance(d, int):
                raise self.unsupported(f"its {what} must be numbers, not depend on symbolic dims")
            out.append(int(d))
        return out

    def element_type(self, name: str, default: np.dtype | None = None) -> np.dtype:
        """The attribute `name`: a TensorProto.DataType, before opset 6 its name. Raises UnsupportedOperator."""
        to = self.attr(name)
        if to is None and default is not None:
            return default
        names = {"FLOAT": dtypes.FLOAT32, "DOUBLE": dtypes.FLOAT64, **{d.name.upper(): d for d in dtypes.ALL}}
        dtype = names.get(to.upper()) if isinstance(to, str) else ELEMENT_TYPES.get(to)
        if dtype is None:
            raise self.unsupported(f"element type {to} is not among {', '.join(d.name for d in dtypes.ALL)}")
        return dtype

    def unsupported(self, advice: str = "", dtype: np.dtype | None = None) -> UnsupportedOperator:
        extra = {"advice": advice} if advice else {}
        return UnsupportedOperator(
            self.operator, node=self.node, domain=self.domain, opset=self.opset,
            dtype=dtype.name if dtype is not None else None, **extra,
        )  # fmt: skip

    def invalid(self, problem: str) -> InvalidModel:
        return InvalidModel(f"{self.operator}: {problem}", node=self.node)


def operator(name: str, since: int = 1, until: int | None = None, domain: str = DOMAIN) -> Callable[[F], F]:
    """Registers a function for an operator from opset `since` on (to `until`, or the next registered version)."""

    def register(fn: F) -> F:
        versions = _OPERATORS.setdefault((domain, name), {})
        if since in versions and versions[since] is not None:
            raise ValueError(f"{name} since opset {since} is registered twice")
        versions[since] = fn
        if until is not None:
            versions.setdefault(until + 1, None)
        return fn

    return register


def lookup(name: str, opset: int, domain: str = DOMAIN) -> Function | None:
    """The function for an operator at an opset, or None."""
    versions = _OPERATORS.get((domain, name), {})
    known = [v for v in versions if v <= opset]
    return versions[max(known)] if known else None


def names() -> list[tuple[str, str, tuple[int, ...]]]:
    """(domain, operator, opsets at which a function starts), sorted: the coverage list."""
    return sorted((d, n, tuple(sorted(v for v, f in fs.items() if f))) for (d, n), fs in _OPERATORS.items())


def apply(b: Builder, call: Call) -> tuple[Value | None, ...]:
    """Builds one ONNX node. Raises UnsupportedOperator or InvalidModel, naming the node."""
    fn = lookup(call.operator, call.opset, call.domain)
    if fn is None:
        raise call.unsupported()
    try:
        inspect.signature(fn).bind(b, call, *call.inputs)
    except TypeError:
        raise call.invalid(f"{len(call.inputs)} inputs do not fit") from None
    try:
        result = fn(b, call, *call.inputs)
    except ValueError as problem:  # provably different dims, axes out of range
        raise call.invalid(str(problem)) from problem
    return result if isinstance(result, tuple) else (result,)


def axis_of(axis: int, rank: int) -> int:
    """A possibly negative axis as a non-negative one. Raises ValueError if out of range."""
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} is out of range for rank {rank}")
    return axis % max(rank, 1)


def axes_of(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(sorted({axis_of(int(a), rank) for a in axes}))
