"""An artifact, loaded and ready to run on this machine's processor.

    run = Executable(artifact)
    y, = run.run([x])              new arrays
    run.run([x], [y])              or the caller's own, which must not overlap an input

What a run needs to know about its shapes (symbols, sizes of outputs and scratch memory, whether guards hold) is worked
out once for each combination of input shapes, and remembered as a `Plan`. What it writes to (the table of pointers,
scratch memory) is a `Frame`, of which there are as many as runs at a time. So the usual run is: find the plan, take a
frame, and make one native call that checks the arrays against the plan and starts.

Everything else takes the slow way: inputs that must be converted, arrays that do not fit, host steps.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stitch import knobs
from stitch.errors import (
    ConstraintViolated,
    InputError,
    ResourceError,
    StitchError,
    SymbolConflict,
    WrongDtype,
    WrongRank,
    WrongShape,
)
from stitch.plan import Artifact, Guard, HostStep, NativeStep, np_dtype
from stitch.runtime import cpu, host
from stitch.runtime.device import HOST, Run
from stitch.runtime.memory import Arena, Pool, address_of, aligned_copy
from stitch.runtime.threads import available_cores

MOST_PLANS = 256  # combinations of shapes that are remembered
ALIGN_FROM = 512 << 10  # results of so many bytes begin at a cache line: 5 to 12 % for 1 us; numpy gives 16 bytes
_TEAM_FIELD, _DIMS_FIELD, _SLOTS_FIELD, _ARENA_FIELD = 1, 2, 3, 4  # in a record, see cpu.py

Shape = tuple[int, ...]
_Call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
_Run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_size_t)
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
    results: list[tuple[Shape, np.dtype, bool]]  # shape, dtype, whether to align; of all outputs, if they are known
    record: np.ndarray  # what `cpu` wants to know, if one native call is all there is
    arena: int
    shapes: list[np.ndarray] = field(default_factory=list)  # that `record` points to
    used: bool = True  # since eviction looked last


class Frame:
    """What one run at a time writes to."""

    def __init__(self, slots: np.ndarray, record_size: int) -> None:
        self.slots = slots
        self.record = np.zeros(record_size, np.int64)
        self.address = address_of(self.record)
        self.arena = Arena()
        self.plan: Plan | None = None  # the one that `record` is for

    def fit(self, plan: Plan) -> None:
        arena = self.arena.reserve(plan.arena)
        self.record[:] = plan.record
        self.record[_SLOTS_FIELD] = address_of(self.slots)
        self.record[_ARENA_FIELD] = arena
        self.plan = plan


class Executable:
    """`threads`: size of the thread team, the knob's or all cores by default. `functions`: those of host steps.

    Runs may overlap in time, in any number of threads. A caller must not change the lists or arrays meanwhile.
    """

    def __init__(
        self, artifact: Artifact, threads: int | None = None, functions: Mapping[str, host.Function] | None = None
    ) -> None:
        self.artifact = artifact
        self.threads = threads or knobs.current().threads or available_cores()
        native = [step for step in artifact.steps if isinstance(step, NativeStep)]
        self._support = cpu.support()
        names = {name for step in native for name in (step.entry, step.layout) if name}
        self._library = cpu.Library(artifact.code, sorted(names), self._support) if names else None
        self._team = cpu.team(self.threads)
        self._constants = aligned_copy(artifact.constants)
        self._dtypes = [np_dtype(slot.dtype) for slot in artifact.slots]
        self._functions = functions
        self._plans: dict[tuple[Shape, ...], Plan] = {}
        self._frames = Pool(self._frame)
        self._call = _Call(self._support["stitch_call"])
        self._run = _Run(self._support["stitch_run"])
        entries = [step for step in native if step.entry]
        self._single = len(entries) == 1 and len(native) == len(artifact.steps) and entries[0] is native[-1]
        self._direct = self._single and cpu.reads_arrays()
        self._layouts = {step.layout: _Layout(self._address(step.layout)) for step in native}

    def run(self, arrays: list[np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> list[np.ndarray]:
        """The outputs for these inputs, in the artifact's order."""
        if self._direct and type(arrays) is list:
            try:
                plan = self._plans.get(tuple([array.shape for array in arrays]))
            except (AttributeError, TypeError):
                plan = None  # not arrays
            if plan is not None:
                results: Any = outputs
                if outputs is None:
                    results = [_empty(shape, dtype) if align else np.empty(shape, dtype)
                               for shape, dtype, align in plan.results]  # fmt: skip
                if type(results) is list:
                    plan.used = True
                    frame = self._frames.take()
                    if frame.plan is not plan:
                        frame.fit(plan)
                    code = self._call(frame.address, id(arrays), id(results))
                    if code < 0 and (alike := self._alike(arrays)) is not None:
                        code = self._call(frame.address, id(alike), id(results))
                    self._frames.free.append(frame)
                    if code == 0:
                        return results
                    if code > 0:
                        raise self._failure(code)
        return self._run_slowly(arrays, outputs)

    __call__ = run

    def close(self) -> None:
        """Unload the code; no run may be going on, or follow."""
        if self._library is not None:
            self._library.close()

    def _alike(self, arrays: list[np.ndarray]) -> list[np.ndarray] | None:
        """The inputs, if only their dtypes are other objects than ours, though equal, as they are after unpickling."""
        if any(type(array) is not np.ndarray for array in arrays):
            return None
        changed = [k for k, array in enumerate(arrays) if array.dtype is not self._dtypes[k]]
        if not changed or any(arrays[k].dtype != self._dtypes[k] for k in changed):
            return None
        return [array.view(dtype) for array, dtype in zip(arrays, self._dtypes, strict=False)]

    # The slow way.

    def _run_slowly(self, given: Sequence[Any], outputs: Sequence[np.ndarray | None] | None) -> list[np.ndarray]:
        arrays = self._convert(given)
        key = tuple([array.shape for array in arrays])
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(key)
            self._remember(key, plan)
        plan.used = True
        own: list[np.ndarray | None] = list(outputs) if outputs is not None else [None] * len(self.artifact.outputs)
        if len(own) != len(self.artifact.outputs):
            raise InputError(None, f"{len(own)} outputs are given, but the model has {len(self.artifact.outputs)}")
        for position, array in enumerate(own):
            if array is not None:
                self._check_own(position, array)
        return self._perform(plan, arrays, own)

    def _convert(self, given: Sequence[Any]) -> list[np.ndarray]:
        """The inputs as arrays in C order, checked as far as one can without knowing the others."""
        ports = self.artifact.inputs
        if len(given) != len(ports):
            raise InputError(None, f"{len(given)} inputs are given, but the model has {len(ports)}")
        arrays = []
        for port, dtype, item in zip(ports, self._dtypes, given, strict=False):
            array = np.asarray(item)
            text = dtype.kind == "O" and array.dtype.kind in "OUS"
            if not text and array.dtype.newbyteorder("=") != dtype:
                raise WrongDtype(port.name, given=str(array.dtype), expected=port.dtype)
            if array.ndim != len(port.shape):
                raise WrongRank(port.name, given=array.shape, expected=port.shape)
            for axis, (size, dim) in enumerate(zip(array.shape, port.shape, strict=True)):
                if isinstance(dim, int) and size != dim:
                    raise WrongShape(port.name, axis=axis, given=size, expected=dim)
            array = array.astype(dtype, order="C", copy=False)
            arrays.append(array if array.flags.aligned else array.copy())
        return arrays

    def _plan(self, shapes: tuple[Shape, ...]) -> Plan:
        """Bind the symbols and see that all conditions hold."""
        artifact = self.artifact
        dims = np.zeros(len(artifact.symbols) + 1, np.int64)
        dims[-1] = self.threads
        places: dict[str, tuple[int, int]] = {}
        for symbol, input, axis in artifact.bindings:
            name = artifact.symbols[symbol]
            if name not in places:
                places[name] = input, axis
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
            sizes[number] = self._sizes(step, dims, shapes)
            known |= dict(zip(step.writes, sizes[number].writes, strict=True))
        return self._describe(dims, sizes, shapes, known)

    def _describe(
        self, dims: np.ndarray, sizes: dict[int, Sizes], shapes: tuple[Shape, ...], known: dict[int, Shape]
    ) -> Plan:
        artifact = self.artifact
        count = len(artifact.inputs) + len(artifact.outputs)
        record = np.zeros(cpu.RECORD_HEAD + cpu.RECORD_ARRAY * count, np.int64)
        record[_TEAM_FIELD] = self._team.address if self._team else 0
        record[_DIMS_FIELD] = address_of(dims)
        plan = Plan(dims, sizes, [], record, max((size.arena for size in sizes.values()), default=0))
        if not self._single:
            return plan
        step = artifact.steps[-1]
        assert isinstance(step, NativeStep)
        record[0] = self._address(step.entry)
        record[5:8] = id(np.ndarray), len(artifact.inputs), len(artifact.outputs)
        known = dict(enumerate(shapes)) | known
        for slot in range(count):
            is_output = slot >= len(artifact.inputs)
            flags = cpu.CONTIGUOUS | cpu.ALIGNED | (cpu.WRITEABLE if is_output else 0)
            plan.shapes.append(np.array(known[slot], np.int64))
            at = cpu.RECORD_HEAD + cpu.RECORD_ARRAY * slot
            row = id(self._dtypes[slot]), len(known[slot]), flags, address_of(plan.shapes[-1])
            record[at : at + cpu.RECORD_ARRAY] = row
            if is_output:
                dtype = self._dtypes[slot]
                plan.results.append((known[slot], dtype, _bytes(known[slot], dtype) >= ALIGN_FROM))
        return plan

    def _sizes(self, step: NativeStep, dims: np.ndarray, shapes: tuple[Shape, ...]) -> Sizes:
        """Evaluate a step's layout; raise if a check or a guard fails."""
        ranks = [self.artifact.slots[slot].rank for slot in step.writes]
        out = np.zeros(1 + len(step.checks) + 2 * len(step.guards) + sum(ranks), np.int64)
        self._layouts[step.layout](address_of(dims), address_of(out))
        values: Iterator[int] = iter(out.tolist())
        arena = next(values)
        for (input, axis), expected in zip(step.checks, values, strict=False):
            port, found = self.artifact.inputs[input], shapes[input][axis]
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
        symbols = zip(self.artifact.symbols, dims.tolist(), strict=False)
        values = {name: value for name, value in symbols if name in words or name in guard.left + guard.right}
        values |= {side: value for side, value in ((guard.left, left), (guard.right, right)) if not side.isdigit()}
        return ConstraintViolated(f"{guard.left} = {guard.right}", values=values, reason=guard.where)

    def _remember(self, key: tuple[Shape, ...], plan: Plan) -> None:
        with _lock:
            if len(self._plans) >= MOST_PLANS:
                self._forget()
            self._plans[key] = plan

    def _forget(self) -> None:
        """Make room: the oldest plan goes that was not used since eviction looked last."""
        for key in list(self._plans):
            plan = self._plans.pop(key)
            if not plan.used:
                return
            plan.used = False
            self._plans[key] = plan  # at the end
        self._plans.pop(next(iter(self._plans)))

    def _check_own(self, position: int, array: np.ndarray) -> None:
        """All but the shape, which may not be known yet."""
        port = self.artifact.outputs[position]
        what = f"the array given for output {port.name!r}"
        if not isinstance(array, np.ndarray):
            raise InputError(port.name, f"{what} is a {type(array).__name__}", "give a numpy array, or None")
        if array.dtype != self._dtypes[len(self.artifact.inputs) + position]:
            raise InputError(port.name, f"{what} has dtype {array.dtype}, but the model says {port.dtype}")
        flags = array.flags
        if not (flags.c_contiguous and flags.aligned and flags.writeable):
            raise InputError(port.name, f"{what} is not contiguous, aligned and writeable", "give one that is, or None")

    def _perform(self, plan: Plan, arrays: list[np.ndarray], own: list[np.ndarray | None]) -> list[np.ndarray]:
        """Go through the steps one by one."""
        frame = self._frames.take()
        try:
            return self._perform_in(frame, plan, arrays, own)
        finally:
            self._frames.give(frame)

    def _perform_in(
        self, frame: Frame, plan: Plan, arrays: list[np.ndarray], own: list[np.ndarray | None]
    ) -> list[np.ndarray]:
        frame.fit(plan)
        frame.plan = None
        dims = plan.dims.copy()
        frame.record[_DIMS_FIELD] = address_of(dims)
        values: dict[int, np.ndarray] = dict(enumerate(arrays))
        shapes = tuple([array.shape for array in arrays])
        for slot, array in enumerate(arrays):
            frame.slots[slot] = address_of(array)
        for number, step in enumerate(self.artifact.steps):
            match step:
                case NativeStep():
                    sizes = plan.sizes.get(number) or self._sizes(step, dims, shapes)
                    self._perform_native(step, sizes, values, own, frame)
                case HostStep():
                    self._perform_host(step, dims, values, own, frame)
        return [values[len(arrays) + position] for position in range(len(own))]

    def _perform_native(
        self, step: NativeStep, sizes: Sizes, values: dict[int, np.ndarray], own: list[np.ndarray | None], frame: Frame
    ) -> None:
        for slot, shape in zip(step.writes, sizes.writes, strict=True):
            values[slot] = self._place(slot, shape, own)
            frame.slots[slot] = address_of(values[slot])
        if step.entry:
            frame.record[0] = self._address(step.entry)
            frame.record[_ARENA_FIELD] = frame.arena.reserve(sizes.arena)
            code = self._run(frame.address)
            if code:
                raise self._failure(code)

    def _perform_host(
        self,
        step: HostStep,
        dims: np.ndarray,
        values: dict[int, np.ndarray],
        own: list[np.ndarray | None],
        frame: Frame,
    ) -> None:
        if self._functions is None:
            self._functions = host.functions()
        arguments = [
            None if slot < 0 else values[slot] if slot in values else self._constant(slot) for slot in step.inputs
        ]
        results = host.call(step, self._functions, arguments)
        for slot, result in zip(step.outputs, results, strict=False):
            if slot < 0:
                continue
            if result.dtype != self._dtypes[slot] or result.ndim != self.artifact.slots[slot].rank:
                expected = f"{self._dtypes[slot]} of rank {self.artifact.slots[slot].rank}"
                raise StitchError(f"{step.function} gave {result.dtype} of rank {result.ndim} instead of {expected}")
            if self.artifact.slots[slot].kind == "output":
                array = self._place(slot, result.shape, own)
                array[...] = result
                result = array
            values[slot] = result
            frame.slots[slot] = address_of(result)
        for position, axis, symbol in step.binds:
            dims[symbol] = results[position].shape[axis]

    def _place(self, slot: int, shape: Shape, own: list[np.ndarray | None]) -> np.ndarray:
        """An array for an output or frame: the caller's own, if there is one."""
        position = slot - len(self.artifact.inputs)
        array = own[position] if position < len(own) else None
        if array is None:
            return _empty(shape, self._dtypes[slot])
        if array.shape != shape:
            port = self.artifact.outputs[position]
            problem = f"the array given for output {port.name!r} has the shape {array.shape}, but it will be {shape}"
            raise InputError(port.name, problem)
        return array

    def _constant(self, slot: int) -> np.ndarray:
        record = self.artifact.slots[slot]
        size = _bytes(record.shape, self._dtypes[slot])
        data = self._constants[record.offset : record.offset + size].view(self._dtypes[slot]).reshape(record.shape)
        data.flags.writeable = False
        return data

    def _failure(self, code: int) -> StitchError:
        if 0 < code <= len(self.artifact.errors):
            return InputError(None, self.artifact.errors[code - 1])
        return StitchError(f"the compiled code reports the unknown error {code}", "please report this")

    def _name(self, slot: int) -> str:
        position = slot - len(self.artifact.inputs)
        outputs = self.artifact.outputs
        return f"output {outputs[position].name!r}" if position < len(outputs) else "an intermediate value"

    def _frame(self) -> Frame:
        slots = np.zeros(len(self.artifact.slots) + 1, np.int64)
        for number, slot in enumerate(self.artifact.slots):
            if slot.kind == "constant":
                slots[number] = address_of(self._constants) + slot.offset
        count = len(self.artifact.inputs) + len(self.artifact.outputs)
        return Frame(slots, cpu.RECORD_HEAD + cpu.RECORD_ARRAY * count)

    def _address(self, name: str) -> int:
        assert self._library is not None
        return self._library[name]


class Processor:
    """The device that this runs on."""

    name = "cpu"
    spaces = (HOST,)

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def load(self, artifact: Artifact) -> Run:
        return Executable(artifact, self.threads).run

    def transfer(self, array: np.ndarray, source: str, destination: str) -> np.ndarray:
        return array


def _bytes(shape: Shape, dtype: np.dtype) -> int:
    size = dtype.itemsize
    for dim in shape:
        size *= dim
    return size


def _empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """A new array. A large one begins at a cache line."""
    size = _bytes(shape, dtype)
    try:
        if size < ALIGN_FROM or dtype.kind == "O":
            return np.empty(shape, dtype)
        block = np.empty(size + 64, np.uint8)
        start = -address_of(block) % 64
        return np.ndarray(shape, dtype, block, start)
    except (MemoryError, ValueError) as error:
        raise ResourceError("memory", f"no memory for an array of the shape {shape} and type {dtype}") from error


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it


_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
