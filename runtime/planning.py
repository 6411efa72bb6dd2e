"""What a run needs to know of the shapes of its inputs, worked out once for each combination of them.

A `Planner` binds the symbols, sees that all conditions hold, and asks the code's own layouts about sizes: a `Plan`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from stitch.errors import ConstraintViolated, InputError, SymbolConflict, WrongShape
from stitch.plan import Artifact, Guard, HostStep, NativeStep
from stitch.runtime import calls
from stitch.runtime.cpu import Library
from stitch.runtime.memory import LENT_FROM, address_of, bytes_of
from stitch.runtime.threads import Team

Shape = tuple[int, ...]
_Layout = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_size_t)


@dataclass(frozen=True)
class Sizes:
    """What the layout of a native step says."""

    arena: int
    writes: tuple[Shape, ...]


@dataclass(eq=False)
class Plan:
    """What follows from the shapes of the inputs."""

    dims: np.ndarray  # a value for each symbol that is bound by the inputs, then the size of the team
    sizes: dict[int, Sizes]  # for the steps before the first that binds symbols
    results: list[tuple[Shape, np.dtype, bool]]  # shape, dtype, whether it is large; of all outputs, if they are known
    record: np.ndarray  # what `calls` wants to know, if one native call is all there is
    arena: int
    shapes: list[np.ndarray] = field(default_factory=list)  # that `record` points to
    used: bool = True  # since eviction looked last


class Planner:
    """`dtypes` has the very objects that arrays are expected to have, one for each slot."""

    def __init__(
        self, artifact: Artifact, dtypes: Sequence[np.dtype], library: Library | None, team: Team | None, threads: int
    ) -> None:
        self._artifact = artifact
        self._dtypes = dtypes
        self._team = team.address if team else 0
        self._threads = threads
        native = [step for step in artifact.steps if isinstance(step, NativeStep)]
        self._addresses = {
            name: library[name] for step in native for name in (step.entry, step.layout) if library and name
        }
        self._layouts = {step.layout: _Layout(self._addresses[step.layout]) for step in native}
        entries = [step for step in native if step.entry]
        # Whether one native call is all there is.
        self.single = len(entries) == 1 and len(native) == len(artifact.steps) and entries[0] is native[-1]

    def plan(self, shapes: tuple[Shape, ...]) -> Plan:
        """Bind the symbols and see that all conditions hold."""
        artifact = self._artifact
        dims = np.zeros(len(artifact.symbols) + 1, np.int64)
        dims[-1] = self._threads
        places: dict[str, tuple[int, int]] = {}
        for symbol, input, axis in artifact.bindings:
            text = str(artifact.inputs[input].shape[axis])  # the symbol's name, in quotes where it needs them
            if text not in places:
                places[text] = input, axis
                dims[symbol] = shapes[input][axis]
        for input, port in enumerate(artifact.inputs):
            for axis, dim in enumerate(port.shape):
                if isinstance(dim, str) and dim in places:
                    other_input, other_axis = places[dim]
                    if shapes[input][axis] != shapes[other_input][other_axis]:
                        raise SymbolConflict(
                            port.name, axis=axis, symbol=dim, given=shapes[input][axis],
                            other_input=artifact.inputs[other_input].name, other_axis=other_axis,
                            other=shapes[other_input][other_axis],
                        )  # fmt: skip
        sizes = {}
        known: dict[int, Shape] = {}
        for number, step in enumerate(artifact.steps):
            if isinstance(step, HostStep):
                if step.binds:
                    break
                continue
            sizes[number] = self.sizes(step, dims, shapes)
            known |= dict(zip(step.writes, sizes[number].writes, strict=True))
        return self._describe(dims, sizes, shapes, known)

    def _describe(
        self, dims: np.ndarray, sizes: dict[int, Sizes], shapes: tuple[Shape, ...], known: dict[int, Shape]
    ) -> Plan:
        artifact = self._artifact
        count = len(artifact.inputs) + len(artifact.outputs)
        record = calls.new_record(count)
        record[calls.TEAM] = self._team
        record[calls.DIMS] = address_of(dims)
        plan = Plan(dims, sizes, [], record, max((size.arena for size in sizes.values()), default=0))
        if not self.single:
            return plan
        step = artifact.steps[-1]
        assert isinstance(step, NativeStep)
        record[calls.ENTRY] = self._addresses[step.entry]
        record[calls.TYPE : calls.OUTPUTS + 1] = id(np.ndarray), len(artifact.inputs), len(artifact.outputs)
        known = dict(enumerate(shapes)) | known
        for slot in range(count):
            is_output = slot >= len(artifact.inputs)
            flags = calls.CONTIGUOUS | calls.ALIGNED | (calls.WRITEABLE if is_output else 0)
            plan.shapes.append(np.array(known[slot], np.int64))
            at = calls.HEAD + calls.ARRAY * slot
            row = id(self._dtypes[slot]), len(known[slot]), flags, address_of(plan.shapes[-1])
            record[at : at + calls.ARRAY] = row
            if is_output:
                dtype = self._dtypes[slot]
                plan.results.append((known[slot], dtype, bytes_of(known[slot], dtype) >= LENT_FROM))
        return plan

    def sizes(self, step: NativeStep, dims: np.ndarray, shapes: tuple[Shape, ...]) -> Sizes:
        """Evaluate a step's layout; raise if a check or a guard fails."""
        ranks = [self._artifact.slots[slot].rank for slot in step.writes]
        out = np.zeros(1 + len(step.checks) + 2 * len(step.guards) + sum(ranks), np.int64)
        self._layouts[step.layout](address_of(dims), address_of(out))
        values: Iterator[int] = iter(out.tolist())
        arena = next(values)
        for (input, axis), expected in zip(step.checks, values, strict=False):
            port, found = self._artifact.inputs[input], shapes[input][axis]
            if found != expected:
                raise WrongShape(port.name, axis=axis, given=found, expected=f"{port.shape[axis]} = {expected}")
        for guard, left, right in zip(step.guards, values, values, strict=False):
            if left != right:
                raise self._violated(guard, dims, left, right)
        writes = []
        for slot, rank in zip(step.writes, ranks, strict=True):
            shape = tuple([next(values) for _ in range(rank)])
            if min(shape, default=0) < 0:
                name = self._name(slot)
                raise InputError(None, f"with these inputs, {name} would have the shape {shape}")
            writes.append(shape)
        return Sizes(arena, tuple(writes))

    def _violated(self, guard: Guard, dims: np.ndarray, left: int, right: int) -> ConstraintViolated:
        words = set(re.findall(r"\w+", f"{guard.left} {guard.right}"))
        symbols = zip(self._artifact.symbols, dims.tolist(), strict=False)
        values = {name: value for name, value in symbols if name in words or name in guard.left + guard.right}
        values |= {side: value for side, value in ((guard.left, left), (guard.right, right)) if not side.isdigit()}
        return ConstraintViolated(f"{guard.left} = {guard.right}", values=values, reason=guard.where)

    def _name(self, slot: int) -> str:
        position = slot - len(self._artifact.inputs)
        outputs = self._artifact.outputs
        return f"output {outputs[position].name!r}" if position < len(outputs) else "an intermediate value"
