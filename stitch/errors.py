"""Every error that stitch raises on purpose.

    StitchError
    ├── UnsupportedOperator      the model uses an operator, or a variant of one, that is not implemented
    ├── InvalidModel             the model contradicts ONNX's specification, or itself
    ├── InputError (ValueError)  the arrays given to `run` do not fit the model
    │   ├── MissingInput  UnknownInput  WrongDtype  WrongRank  WrongShape
    │   ├── SymbolConflict       two axes that share a symbol have different lengths
    │   └── ConstraintViolated   the shapes break a condition that the compiled code relies on
    ├── KnobError (ValueError)   UnknownKnob, InvalidKnob
    ├── DeviceError (ValueError) a device that is asked for, or a board that is described, makes no sense
    │   ├── UnknownDevice  EmptyDevice  OverlappingDevices  UnavailableCpus
    │   └── InvalidBoard         a board file with a field that is missing, unknown or wrong
    ├── PlacementError           NoDevice, MemoryLimit: no placement does what is asked
    ├── StreamError              an input of a stream could not be processed, which ends the stream
    └── ResourceError            memory, threads, a device or a file could not be had

A message is one or two plain sentences: what is wrong in the user's own names, then, after a semicolon, what
to do about it. `StitchError.__init__` puts the two together; the classes below only supply the parts. What
they say is also there as attributes, so that a program need not parse it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class StitchError(Exception):
    """Any error raised on purpose: `problem` says what is wrong, `advice`, unless empty, what to do."""

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.problem = problem
        self.advice = advice

    def __reduce__(self) -> tuple[object, ...]:
        # The subclasses' constructors do not take the message, which is what Exception would hand them.
        return _restore, (type(self), self.args, self.__dict__)


class UnsupportedOperator(StitchError):
    """An operator that is not implemented, at all or for this opset, dtype or attribute."""

    def __init__(
        self,
        operator: str,
        *,
        node: str = "",
        domain: str = "",
        opset: int,
        dtype: str | None = None,
        advice: str = "run that part with another runtime, or rewrite it with supported operators",
    ) -> None:
        self.operator = operator
        self.node = node
        self.domain = domain or "ai.onnx"
        self.opset = opset
        self.dtype = dtype
        kind = f" for {dtype}" if dtype else ""
        what = f"operator {operator} ({self.domain}, opset {opset})"
        super().__init__(f"{what} of {_node(node)} is not supported{kind}", advice)


class InvalidModel(StitchError):
    """A model that contradicts ONNX's specification, or itself."""

    def __init__(
        self,
        problem: str,
        *,
        node: str | None = None,
        advice: str = "check the model with onnx.checker.check_model(model, full_check=True)",
    ) -> None:
        self.node = node
        super().__init__(problem if node is None else f"{_node(node)}: {problem}", advice)


class InputError(StitchError, ValueError):
    """What was given to `run` does not fit the model. `input` names the input, where one is to blame."""

    def __init__(self, input: str | None, problem: str, advice: str = "") -> None:
        self.input = input
        super().__init__(problem, advice)


class MissingInput(InputError):
    def __init__(self, input: str, *, inputs: Iterable[str]) -> None:
        super().__init__(input, f"input {input!r} is missing", f"the model's inputs are {_list(inputs)}")


class UnknownInput(InputError):
    def __init__(self, input: str, *, inputs: Iterable[str]) -> None:
        advice = _suggest(input, list(inputs), "the model's inputs")
        super().__init__(input, f"the model has no input {input!r}", advice)


class WrongDtype(InputError):
    def __init__(self, input: str, *, given: str, expected: str) -> None:
        self.given = given
        self.expected = expected
        super().__init__(
            input,
            f"input {input!r} has dtype {given}, but the model says {expected}",
            f"convert it with .astype({expected!r})",
        )


class WrongRank(InputError):
    def __init__(self, input: str, *, given: Sequence[int], expected: Sequence[object]) -> None:
        self.given = tuple(given)
        self.expected = tuple(map(str, expected))
        super().__init__(
            input,
            f"input {input!r} has rank {len(given)}, shape {_shape(given)}, "
            f"but the model says rank {len(expected)}, shape {_shape(expected)}",
        )


class WrongShape(InputError):
    def __init__(self, input: str, *, axis: int, given: int, expected: object) -> None:
        self.axis = axis
        self.given = given
        self.expected = str(expected)
        super().__init__(input, f"axis {axis} of input {input!r} is {given}, but the model says {expected}")


class SymbolConflict(InputError):
    def __init__(
        self, input: str, *, axis: int, symbol: str, given: int, other_input: str, other_axis: int, other: int
    ) -> None:
        self.axis = axis
        self.symbol = symbol
        self.given = given
        self.other_input = other_input
        self.other_axis = other_axis
        self.other = other
        super().__init__(
            input,
            f"axis {axis} of input {input!r} makes {symbol} = {given}, "
            f"but axis {other_axis} of input {other_input!r} makes it {other}",
            f"both axes are called {symbol} in the model and must have the same length",
        )


class ConstraintViolated(InputError):
    """`constraint` is a condition over the model's symbols, `values` what they are in this call."""

    def __init__(self, constraint: str, *, values: dict[str, int], reason: str = "") -> None:
        self.constraint = constraint
        self.values = dict(values)
        self.reason = reason
        needed = f" (needed by {reason})" if reason else ""
        found = ", ".join(f"{name} = {value}" for name, value in values.items())
        but = f", but {found}" if found else ""
        super().__init__(None, f"the inputs' shapes must satisfy {constraint}{needed}{but}")


class KnobError(StitchError, ValueError):
    """Something is wrong with the tuning switch `knob`."""

    def __init__(self, knob: str, problem: str, advice: str = "") -> None:
        self.knob = knob
        super().__init__(problem, advice)


class UnknownKnob(KnobError):
    def __init__(self, knob: str, *, knobs: Iterable[str]) -> None:
        super().__init__(knob, f"there is no knob {knob}", _suggest(knob, list(knobs), "the knobs"))


class InvalidKnob(KnobError):
    def __init__(self, knob: str, *, given: object, expected: str) -> None:
        self.given = given
        self.expected = expected
        super().__init__(knob, f"knob {knob} is {given!r}, but must be {expected}")


class DeviceError(StitchError, ValueError):
    """Something is wrong with the device that is written `device`."""

    def __init__(self, device: str, problem: str, advice: str = "") -> None:
        self.device = device
        super().__init__(problem, advice)


class UnknownDevice(DeviceError):
    def __init__(self, device: str, *, available: Iterable[str], reason: str = "") -> None:
        self.available = tuple(available)
        because = f": {reason}" if reason else ""
        super().__init__(device, f"there is no device {device!r}{because}", f"there are {_list(self.available)}")


class EmptyDevice(DeviceError):
    """`available` is a list of CPUs as 0-3."""

    def __init__(self, device: str, *, available: str) -> None:
        self.available = available
        problem = f"the device {device!r} has no CPU" if device else "a list of devices names none"
        super().__init__(device, problem, f"name some of the CPUs {available}, as in 'cpu:{available}'")


class OverlappingDevices(DeviceError):
    def __init__(self, device: str, other: str, *, cpus: str, available: str) -> None:
        self.other, self.cpus, self.available = other, cpus, available
        problem = f"the devices {device!r} and {other!r} share the CPUs {cpus}"
        super().__init__(device, problem, f"give each of the CPUs {available} to one device only")


class UnavailableCpus(DeviceError):
    """CPUs that this process may not use (`excluded`), or that do not exist."""

    def __init__(self, device: str, *, cpus: str, available: str, excluded: bool) -> None:
        self.cpus, self.available = cpus, available
        why = "are outside of this process's affinity mask" if excluded else "do not exist"
        advice = "; widen it with taskset, or in the container's settings" if excluded else ""
        super().__init__(device, f"the CPUs {cpus} of the device {device!r} {why}", f"there are {available}{advice}")


class InvalidBoard(DeviceError):
    """`where` is a field of the file or description `device`, as clusters[0].cores."""

    def __init__(self, device: str, where: str, problem: str, advice: str = "") -> None:
        self.where = where
        at = f"{where}: " if where else ""
        super().__init__(device, f"the board {device!r} is wrong: {at}{problem}", advice)


class PlacementError(StitchError):
    """No placement does what is asked."""


class NoDevice(PlacementError):
    """`item` can run on none of the devices, or not where the rest of the placement would need it."""

    def __init__(self, item: str, *, devices: Iterable[str]) -> None:
        self.item = item
        self.devices = tuple(devices)
        super().__init__(
            f"{item!r} can run on none of the devices {_list(self.devices)}",
            "add a device that can, such as 'onnxruntime'",
        )


class MemoryLimit(PlacementError):
    """The limits of memory are too small. `smallest`: bytes by device with which some placement fits, all limits
    raised by the same factor; `exact`: no smaller factor would do."""

    def __init__(self, *, limits: dict[str, float], smallest: dict[str, int], exact: bool) -> None:
        self.limits, self.smallest, self.exact = dict(limits), dict(smallest), exact
        given = ", ".join(f"{limit:.0f} for {name!r}" for name, limit in limits.items() if limit != float("inf"))
        needed = ", ".join(f"{size} for {name!r}" for name, size in smallest.items())
        known = "the smallest bytes that do are" if exact else "this is known to do:"
        super().__init__(f"no placement fits into the bytes {given}", f"{known} {needed}")


class ResourceError(StitchError):
    """Something the machine should give was not to be had. `resource` is a word: memory, threads, cuda."""

    def __init__(self, resource: str, problem: str, advice: str = "") -> None:
        self.resource = resource
        super().__init__(problem, advice)


class MissingRuntime(ResourceError):
    """Another runtime, to which something is to be delegated, is not installed."""


class StreamError(StitchError):
    """What went wrong with the input at `position` (from 0) is the `__cause__`; `stage` is where, or None if it was
    before the first one."""

    def __init__(self, position: int, *, stage: str | None, reason: BaseException) -> None:
        self.position = position
        self.stage = stage
        where = f" in {stage}" if stage is not None else ""
        what = str(reason) or type(reason).__name__
        super().__init__(f"input {position} of the stream failed{where}: {what}")


def _restore(cls: type[StitchError], args: tuple[object, ...], state: dict[str, object]) -> StitchError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


def _node(name: str) -> str:
    return f"node {name!r}" if name else "a node without a name"


def _shape(shape: Sequence[object]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _suggest(name: str, names: list[str], what: str) -> str:
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{what} are {_list(names)}"
