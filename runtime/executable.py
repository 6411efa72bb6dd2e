"""An artifact, loaded and ready to run on this machine's processor.

    run = Executable(artifact)
    y, = run.run([x])              new arrays
    run.run([x], [y])              or the caller's own, which must not overlap an input
    call = run.bind([x], [y])      all checks now, none in call()

What a run needs to know about its shapes (symbols, sizes of outputs and scratch memory, whether guards hold) is worked
out once for each combination of input shapes, and remembered as a `Plan`. What it writes to (the table of pointers,
scratch memory) is a `Frame`, of which there are as many as runs at a time. So the usual run is: take a frame, most
likely ready for this plan from its last run, and make one native call that checks the arrays against it and starts.

Everything else takes the slow way: inputs that must be converted, arrays that do not fit, host steps.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NoReturn

import numpy as np

from stitch import knobs
from stitch.errors import InputError, StitchError, WrongDtype, WrongRank, WrongShape
from stitch.plan import Artifact, HostStep, NativeStep, np_dtype
from stitch.runtime import calls, cpu, host
from stitch.runtime.binding import Bound, bind_steps, check_memory
from stitch.runtime.device import HOST, Run
from stitch.runtime.memory import Arena, Blocks, Pool, address_of, aligned_copy, bytes_of
from stitch.runtime.planning import Plan, Planner, Shape, Sizes
from stitch.runtime.threads import Team, available_cores

MOST_PLANS = 256  # combinations of shapes that are remembered

_Run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_size_t)


class Frame:
    """What one run at a time writes to."""

    def __init__(self, slots: np.ndarray, record: np.ndarray, support: Mapping[str, int]) -> None:
        self.slots = slots
        self.record = record
        self.address = address_of(record)
        self.arena = Arena()
        self.call = calls.caller(support, record)
        self.forget()

    def fit(self, plan: Plan) -> None:
        arena = self.arena.reserve(plan.arena)
        self.record[:] = plan.record
        self.record[calls.SLOTS] = address_of(self.slots)
        self.record[calls.ARENA] = arena
        self.plan: Plan | None = plan  # the one that `record` is for

    def forget(self) -> None:
        """No arrays fit until the frame does."""
        self.record[calls.INPUTS] = -1
        self.plan = None


class Executable:
    """`threads`: size of the thread team, the knob's or all cores by default. `functions`: those of host steps.
    `team`: one of that size that is not shared with all others of the process.

    Runs may overlap in time, in any number of threads. A caller must not change the lists or arrays meanwhile.
    """

    def __init__(
        self, artifact: Artifact, threads: int | None = None, functions: Mapping[str, host.Function] | None = None,
        team: Team | None = None,
    ) -> None:  # fmt: skip
        self.artifact = artifact
        self.threads = team_size(threads) if threads is not None else knobs.current().threads or available_cores()
        native = [step for step in artifact.steps if isinstance(step, NativeStep)]
        self._support = cpu.support()
        names = {name for step in native for name in (step.entry, step.layout) if name}
        self._library = cpu.Library(artifact.code, sorted(names), self._support) if names else None
        self._constants = aligned_copy(artifact.constants)
        self._dtypes = [np_dtype(slot.dtype) for slot in artifact.slots]
        self._functions = functions
        self._plans: dict[tuple[Shape, ...], Plan] = {}
        self._frames = Pool(self._frame)
        self._blocks = Blocks()
        self._run = _Run(self._support["stitch_run"])
        team = team or cpu.team(self.threads)
        self._planner = Planner(artifact, self._dtypes, self._library, team, self.threads)
        self._direct = self._planner.single and cpu.reads_arrays()

    def run(self, arrays: list[np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> list[np.ndarray]:
        """The outputs for these inputs, in the artifact's order."""
        if self._direct and type(arrays) is list and (outputs is None or type(outputs) is list):
            try:
                frame = self._frames.free.pop()  # that of the last run: most likely the shapes are the same again
            except IndexError:
                frame = self._frame()
            results: Any = outputs
            code = -1 if results is None else frame.call(arrays, results)
            if code < 0 and (plan := self._known(arrays)) is not None:
                if results is None:
                    results = [self._blocks.array(shape, dtype) if large else np.empty(shape, dtype)
                               for shape, dtype, large in plan.results]  # fmt: skip
                if frame.plan is not plan:
                    frame.fit(plan)
                code = frame.call(arrays, results)
                if code < 0 and (alike := self._alike(arrays)) is not None:
                    code = frame.call(alike, results)
            self._frames.free.append(frame)
            if code == 0:
                return results  # type: ignore[no-any-return]
            if code > 0:
                raise self._failure(code)
        return self._run_slowly(arrays, outputs)

    __call__ = run

    def bind(self, given: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> Bound:
        """A call that runs on the memory of these arrays. Outputs that are not given are made here; but where there are
        host steps, which may decide shapes, by each call."""
        arrays = self._convert(given)
        plan = self._plan_for(arrays)
        own = self._own(outputs)
        check_memory(self.artifact, given, arrays, own)
        places = range(len(arrays), len(arrays) + len(own))
        if self._planner.single:
            own = [self._place(k, shape, own) for k, (shape, _, _) in zip(places, plan.results, strict=True)]
        if not self._direct:
            return bind_steps(lambda: self._perform(plan, arrays, own), own)
        frame = self._frame()
        frame.fit(plan)
        results: list[Any] = list(own)
        frame.slots[: places.stop] = [address_of(array) for array in (*arrays, *results)]
        call = calls.bound_caller(self._support, frame.record, results, self._fail, frame, arrays, own)
        return Bound(call, results)

    def last_sizes(self) -> dict[str, int]:
        """The symbols that inputs bind, as they were when memory was last made to fit; empty before the first run."""
        bound = [symbol for symbol, _, _ in self.artifact.bindings]
        free = self._frames.free
        plan = (free[-1].plan if free else None) or next(reversed(self._plans.values()), None)
        return {} if plan is None else {self.artifact.symbols[s]: int(plan.dims[s]) for s in bound}

    def close(self) -> None:
        """Unload the code; no run may be going on, or follow."""
        if self._library is not None:
            self._library.close()

    def _known(self, arrays: list[np.ndarray]) -> Plan | None:
        """The plan for these shapes, if there is one."""
        try:
            plan = self._plans.get(tuple([array.shape for array in arrays]))
        except (AttributeError, TypeError):
            return None  # not arrays
        if plan is not None:
            plan.used = True
        return plan

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
        plan = self._plan_for(arrays)
        return self._perform(plan, arrays, self._own(outputs))

    def _plan_for(self, arrays: list[np.ndarray]) -> Plan:
        plan = self._known(arrays)
        if plan is None:
            key = tuple([array.shape for array in arrays])
            plan = self._planner.plan(key)
            self._remember(key, plan)
        return plan

    def _own(self, outputs: Sequence[np.ndarray | None] | None) -> list[np.ndarray | None]:
        """The caller's arrays for outputs, checked as far as one can without knowing their shapes."""
        own: list[np.ndarray | None] = list(outputs) if outputs is not None else [None] * len(self.artifact.outputs)
        if len(own) != len(self.artifact.outputs):
            raise InputError(None, f"{len(own)} outputs are given, but the model has {len(self.artifact.outputs)}")
        for position, array in enumerate(own):
            if array is not None:
                self._check_own(position, array)
        return own

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
        frame.forget()
        dims = plan.dims.copy()
        frame.record[calls.DIMS] = address_of(dims)
        values: dict[int, np.ndarray] = dict(enumerate(arrays))
        shapes = tuple([array.shape for array in arrays])
        for slot, array in enumerate(arrays):
            frame.slots[slot] = address_of(array)
        for number, step in enumerate(self.artifact.steps):
            match step:
                case NativeStep():
                    sizes = plan.sizes.get(number) or self._planner.sizes(step, dims, shapes)
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
            frame.record[calls.ENTRY] = self._address(step.entry)
            frame.record[calls.ARENA] = frame.arena.reserve(sizes.arena)
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
            return self._blocks.array(shape, self._dtypes[slot])
        if array.shape != shape:
            port = self.artifact.outputs[position]
            problem = f"the array given for output {port.name!r} has the shape {array.shape}, but it will be {shape}"
            raise InputError(port.name, problem)
        return array

    def _constant(self, slot: int) -> np.ndarray:
        record = self.artifact.slots[slot]
        size = bytes_of(record.shape, self._dtypes[slot])
        data = self._constants[record.offset : record.offset + size].view(self._dtypes[slot]).reshape(record.shape)
        data.flags.writeable = False
        return data

    def _fail(self, code: int) -> NoReturn:
        raise self._failure(code)

    def _failure(self, code: int) -> StitchError:
        if 0 < code <= len(self.artifact.errors):
            return InputError(None, self.artifact.errors[code - 1])
        return StitchError(f"the compiled code reports the unknown error {code}", "please report this")

    def _frame(self) -> Frame:
        slots = np.zeros(len(self.artifact.slots) + 1, np.int64)
        for number, slot in enumerate(self.artifact.slots):
            if slot.kind == "constant":
                slots[number] = address_of(self._constants) + slot.offset
        count = len(self.artifact.inputs) + len(self.artifact.outputs)
        return Frame(slots, calls.new_record(count), self._support)

    def _address(self, name: str) -> int:
        assert self._library is not None
        return self._library[name]


def team_size(threads: int) -> int:
    """The size of a team, which code relies on. Raises ValueError."""
    if isinstance(threads, bool) or not isinstance(threads, Integral) or not 0 < threads <= knobs.MOST_THREADS:
        raise ValueError(f"threads is {threads!r}, but must be a whole number, 1 to {knobs.MOST_THREADS}")
    return int(threads)


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


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it


_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
