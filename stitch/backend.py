"""stitch behind `onnx.backend`, ONNX's interface for whatever runs its models.

    import stitch.backend as backend
    outputs = backend.prepare(model, "CPU").run([x])
    onnx.backend.test.BackendTest(backend, __name__)       # ONNX's own suite

Importing this module imports onnx; `import stitch` does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.backend.base import Backend, BackendRep, Device, DeviceType, namedtupledict

from stitch.api import CompiledModel, Shapes, optimize
from stitch.errors import UnsupportedOperator

Array = np.ndarray[Any, Any]


class StitchRep(BackendRep):
    """A compiled model that takes its inputs by position."""

    def __init__(self, model: CompiledModel) -> None:
        self.model = model
        self._names = [t.name for t in model.inputs]
        self._result = namedtupledict("Outputs", [t.name for t in model.outputs])

    def run(self, inputs: Any, **_: Any) -> tuple[Array, ...]:
        """The outputs for inputs by position or by name (or a single array); a tuple that names also index."""
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        else:
            given = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
            if len(given) != len(self._names):
                raise ValueError(f"{len(given)} inputs are given, but the model has {len(self._names)}")
            feeds = dict(zip(self._names, given, strict=True))
        results: tuple[Array, ...] = self._result(*self.model.run(None, feeds))
        return results


class StitchBackend(Backend):
    """The interface that onnx.backend asks for, as class methods; the module's functions are these."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **options: Any) -> bool:
        """True if the model can be compiled for the device."""
        if not cls.supports_device(device):
            return False
        try:
            cls.prepare(model, device, **options)
        except UnsupportedOperator:
            return False
        return True

    @classmethod
    def prepare(
        cls, model: onnx.ModelProto, device: str = "CPU", *, shapes: Shapes | None = None,
        threads: int | None = None, cache: bool = False, **_: Any,
    ) -> StitchRep:  # fmt: skip
        """The model, compiled; the options are `stitch.optimize`'s. Raises what `optimize` does."""
        if not cls.supports_device(device):
            raise ValueError(f"stitch.backend has no device {device!r}; it has 'CPU'")
        return StitchRep(optimize(model, threads=threads, cache=cache, shapes=shapes))

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **options: Any) -> tuple[Array, ...]:
        return cls.prepare(model, device, **options).run(inputs)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU",
        outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None = None, **options: Any,
    ) -> tuple[Array, ...]:  # fmt: skip
        """One node's outputs. `opset_version` says which version of the operator; by default onnx's newest."""
        opset = options.pop("opset_version", onnx.defs.onnx_opset_version())
        by_name = isinstance(inputs, Mapping)
        given = dict(inputs) if by_name else dict(zip(filter(None, node.input), inputs, strict=True))
        arrays = {name: np.asarray(x) for name, x in given.items()}
        infos = [_info(name, x.dtype, x.shape) for name, x in arrays.items()]
        kinds = outputs_info if outputs_info is not None else [None] * len(node.output)
        named = [(name, kind) for name, kind in zip(node.output, kinds, strict=True) if name]
        results = [_info(name, *kind) if kind else onnx.ValueInfoProto(name=name) for name, kind in named]
        graph = helper.make_graph([node], node.op_type or "node", infos, results)
        opsets = [helper.make_opsetid("", opset)]
        if node.domain:
            opsets.append(helper.make_opsetid(node.domain, options.pop("domain_version", 1)))
        return cls.run_model(helper.make_model(graph, opset_imports=opsets), arrays, device, **options)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """True for "CPU" (and "CPU:0")."""
        try:
            parsed = Device(device)
        except (AttributeError, ValueError):
            return False
        return bool(parsed.type == DeviceType.CPU and parsed.device_id == 0)


def _info(name: str, dtype: np.dtype, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


is_compatible = StitchBackend.is_compatible
prepare = StitchBackend.prepare
run_model = StitchBackend.run_model
run_node = StitchBackend.run_node
supports_device = StitchBackend.supports_device
