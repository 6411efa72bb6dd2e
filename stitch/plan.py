"""What compilation ends in: an `Artifact`, which the runtime executes and which can be kept in a file.

An artifact holds machine code, the constants, and a list of steps over one table of pointers, the *slots*: first
the inputs, then the outputs, then the constants, then frames, the values that cross between native code and the
host (numpy). Whatever else native code needs lies in its arena, which nobody else looks into.

**Native code.** A `NativeStep` names two functions of `code`:

    i64  entry(ptr team, ptr dims, ptr slots, ptr arena)
    void layout(ptr dims, ptr out)

`dims` holds an i64 for each symbol, and after them the size of the thread team (1 or more). `slots` holds a pointer
for each slot: arrays are C-contiguous, and aligned to their element, no more; the first constant slot to 64 bytes.
`arena` is aligned to 64 bytes, more if it is large; its contents are undefined. `team` may be null. `entry` returns
0, or k > 0 for `errors[k - 1]`; what the outputs hold is undefined then.

`layout` may read the symbols bound so far, and writes i64s in this order:

    arena          bytes that `entry` needs; with scratch memory per worker, for all of them
    expected...    one for each of `checks`: what that axis of that input must be
    left, right... two for each of `guards`
    dims...        for each slot of `writes` in turn, all its dims

Layouts of the steps before the first host step that binds a symbol run, and their checks and guards are examined,
before any step does. They depend on the shapes of the inputs only and are remembered for them. If such a host step
comes first, put a NativeStep before it that has no entry (""), only a layout.

Code may call, besides libc and libm:

    void stitch_parallel(ptr team, ptr fn, ptr args, i64 tasks, i64 grain)   fn: void(ptr args, i64 begin, i64 end, i64 worker)
    i64  stitch_team_size(ptr team)

**Host steps** are functions on numpy arrays, found by name, with JSON-like attributes. They may bind symbols to the
dims of their results.

**File.** magic, header lengths and checksums; a JSON header; code; constants, aligned so that they can be mapped instead
of read: to a page, or, if they fill one, to a huge page, in which Linux keeps such files. Reading 100 MB of weights
takes 1.2 to 1.4 times as long from small ones. `load` checks everything but the bytes of the constants, of which it
checks the length.
"""  # noqa: E501

from __future__ import annotations

import base64
import contextlib
import json
import math
import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stitch import dtypes

Kind = Literal["input", "output", "constant", "frame"]


@dataclass(frozen=True)
class Port:
    """An input or output of the model. A dim is an int, a symbol, or the text of an expression over symbols."""

    name: str
    dtype: str  # as in `stitch.dtypes`, or "object" for strings, which only host steps can touch
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Slot:
    """A place in the table of pointers. `offset` and `shape` are for constants only: where in the blob, and what.

    The first constant slot must be the blob as a whole, from offset 0. Others are for host steps' sake.
    """

    dtype: str
    rank: int
    kind: Kind
    offset: int = 0
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Guard:
    """left = right, in the user's symbols; both values come from a layout. `where` says who needs it."""

    left: str
    right: str
    where: str = ""


@dataclass(frozen=True)
class NativeStep:
    entry: str
    layout: str
    writes: tuple[int, ...] = ()  # slots, of outputs and frames
    guards: tuple[Guard, ...] = ()
    checks: tuple[tuple[int, int], ...] = ()  # (input, axis) whose dim is an expression


@dataclass(frozen=True)
class HostStep:
    function: str
    attrs: Mapping[str, Any]  # None, bool, int, float, str, bytes, arrays, dtypes; lists, tuples, dicts of them
    inputs: tuple[int, ...]  # slots; -1 for an optional input that is absent
    outputs: tuple[int, ...]  # slots; -1 for a result that nobody wants
    binds: tuple[tuple[int, int, int], ...] = ()  # (position in outputs, axis, symbol)
    origin: tuple[str, str] = ("", "")  # (node, operator) in the model


Step = NativeStep | HostStep


@dataclass(frozen=True, eq=False)
class Artifact:
    target: str
    symbols: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    slots: tuple[Slot, ...]
    bindings: tuple[tuple[int, int, int], ...]  # (symbol, input, axis): where a symbol is found, in this order
    steps: tuple[Step, ...]
    code: bytes = b""  # a relocatable object
    constants: Any = b""  # a buffer; aligned to 64, or it is copied
    errors: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError if the parts contradict each other."""
        ports = [("input", port) for port in self.inputs] + [("output", port) for port in self.outputs]
        kinds = [slot.kind for slot in self.slots]
        order = ["input"] * len(self.inputs) + ["output"] * len(self.outputs)
        rest = kinds[len(order) :]
        _require(kinds[: len(order)] == order, "slots begin with the inputs, then the outputs")
        _require(rest == sorted(rest) and set(rest) <= {"constant", "frame"}, "constants come before frames")
        for (kind, port), slot in zip(ports, self.slots, strict=False):
            _require((slot.dtype, slot.rank) == (port.dtype, len(port.shape)), f"the slot of {kind} {port.name}")
        constants = [slot for slot in self.slots if slot.kind == "constant"]
        size = memoryview(self.constants).nbytes
        _require(not constants or constants[0].offset == 0, "the first constant slot is the whole blob")
        for slot in constants:
            end = slot.offset + math.prod(slot.shape) * np_dtype(slot.dtype).itemsize
            _require(len(slot.shape) == slot.rank and 0 <= slot.offset <= end <= size, "a constant outside the blob")
        for symbol, input, axis in self.bindings:
            inside = 0 <= symbol < len(self.symbols) and 0 <= axis < len(self.inputs[input].shape)
            names = (self.symbols[symbol], _quoted(self.symbols[symbol])) if inside else ()
            _require(self.inputs[input].shape[axis] in names, "a binding to another dim")
        self._check_steps()

    def _check_steps(self) -> None:
        written: list[int] = []
        for step in self.steps:
            match step:
                case NativeStep():
                    written += step.writes
                    _require(all(0 <= i < len(self.inputs) for i, _ in step.checks), "a check of no input")
                case HostStep():
                    written += [slot for slot in step.outputs if slot >= 0]
                    _require(all(-1 <= slot < len(self.slots) for slot in step.inputs), "a host step reads no slot")
                    _require(all(p < len(step.outputs) for p, _, _ in step.binds), "a host step binds no result")
        expected = [i for i, slot in enumerate(self.slots) if slot.kind in ("output", "frame")]
        _require(sorted(written) == expected, "every output and frame is written by one step")


def _quoted(name: str) -> str:
    """A symbol as `stitch.dims` writes it where it is no plain name, as "batch size" is not."""
    return "`" + name.replace("`", "``") + "`"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"not an artifact: {message}")


def np_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(object) if name == "object" else dtypes.parse(name)


class BadFile(Exception):
    """Not a file that `save` has written, or not all of it."""


# magic, version, header's checksum and length, code's checksum and length, offset and length of the constants
_PREFIX = struct.Struct("<8sIIQQQQQ")
_MAGIC = b"stitch\r\n"
_VERSION = 1
_PAGE, _HUGE = 4096, 2 << 20


def save(artifact: Artifact, path: Path) -> None:
    """Write a file as a whole or not at all. Raises OSError if that fails."""
    header = json.dumps(_header(artifact), separators=(",", ":")).encode()
    constants = memoryview(artifact.constants).cast("B")
    code_at = _round_up(_PREFIX.size + len(header), 64)
    page = _HUGE if constants.nbytes >= _HUGE else _PAGE
    constants_at = _round_up(code_at + len(artifact.code), page)  # what lies before is a hole, and takes no space
    prefix = _PREFIX.pack(
        _MAGIC, _VERSION, zlib.crc32(header), len(header), zlib.crc32(artifact.code), len(artifact.code),
        constants_at, constants.nbytes,
    )  # fmt: skip
    with replacing(path) as fd:
        os.ftruncate(fd, constants_at + constants.nbytes)
        _write(fd, memoryview(prefix + header), 0)
        _write(fd, memoryview(artifact.code), code_at)
        _write(fd, constants, constants_at)


def load(path: Path) -> Artifact:
    """Read what `save` has written; the constants are mapped. Raises OSError or BadFile."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            raise BadFile("too short")
        magic, version, header_sum, header_size, code_sum, code_size, at, length = _PREFIX.unpack(prefix)
        if (magic, version) != (_MAGIC, _VERSION):
            raise BadFile("another format or version")
        code_at = _round_up(_PREFIX.size + header_size, 64)
        if code_at + code_size > at or at % _PAGE or at + length != size:
            raise BadFile("sections are not where they should be")
        header = file.read(header_size)
        file.seek(code_at)
        code = file.read(code_size)
        if (zlib.crc32(header), zlib.crc32(code)) != (header_sum, code_sum):
            raise BadFile("a checksum is wrong")
        mapped = mmap.mmap(file.fileno(), at + length, prot=mmap.PROT_READ) if length else None
    if mapped is not None and length >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    try:
        constants: Any = np.frombuffer(mapped, np.uint8, length, at) if mapped else b""
        artifact = _artifact(json.loads(header), code, constants)
        artifact.check()
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadFile(f"the header is wrong: {error}") from error
    return artifact


@contextlib.contextmanager
def replacing(path: Path) -> Any:
    """A descriptor of a new file that takes the name `path` when the block ends well."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            yield fd
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _write(fd: int, data: memoryview, offset: int) -> None:
    os.lseek(fd, offset, os.SEEK_SET)
    while data.nbytes:
        data = data[os.write(fd, data[: 1 << 30]) :]


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def _header(artifact: Artifact) -> dict[str, Any]:
    header = {f.name: getattr(artifact, f.name) for f in fields(Artifact) if f.name not in ("code", "constants")}
    for name in ("inputs", "outputs", "slots"):
        header[name] = tuple(vars(record) for record in header[name])
    header["steps"] = tuple(_step(step) for step in artifact.steps)
    return {name: _encode(value) for name, value in header.items()}


def _step(step: Step) -> dict[str, Any]:
    match step:
        case NativeStep():
            return vars(step) | {"kind": "native", "guards": tuple(vars(guard) for guard in step.guards)}
        case HostStep():
            return vars(step) | {"kind": "host"}


def _artifact(header: dict[str, Any], code: bytes, constants: Any) -> Artifact:
    values = {name: _decode(value) for name, value in header.items()}
    for name, record in (("inputs", Port), ("outputs", Port), ("slots", Slot)):
        values[name] = tuple(record(**fields) for fields in values[name])
    values["steps"] = tuple(_read_step(step) for step in values["steps"])
    return Artifact(code=code, constants=constants, **values)


def _read_step(values: dict[str, Any]) -> Step:
    if values.pop("kind") == "host":
        return HostStep(**values)
    guards = tuple(Guard(**guard) for guard in values.pop("guards"))
    return NativeStep(guards=guards, **values)


def _encode(value: Any) -> Any:
    """JSON for what may be in a header. What JSON lacks is an object with one key that begins with $."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case tuple():
            return {"$tuple": [_encode(item) for item in value]}
        case list():
            return [_encode(item) for item in value]
        case np.dtype():
            return {"$dtype": value.name}
        case np.ndarray() if value.dtype == object:
            return {"$objects": [list(value.shape), [_encode(item) for item in value.ravel().tolist()]]}
        case np.ndarray():
            raw = base64.b64encode(value.tobytes()).decode()
            return {"$array": [value.dtype.name, list(value.shape), raw]}
        case np.generic():
            return {"$scalar": _encode(np.asarray(value))}
        case Mapping():
            return {"$dict": {str(key): _encode(item) for key, item in value.items()}}
    raise TypeError(f"cannot keep a {type(value).__name__} in an artifact")


def _decode(value: Any) -> Any:
    match value:
        case list():
            return [_decode(item) for item in value]
        case {"$bytes": text}:
            return base64.b64decode(text)
        case {"$tuple": items}:
            return tuple(_decode(item) for item in items)
        case {"$dtype": name}:
            return np_dtype(name)
        case {"$objects": [shape, items]}:
            array = np.empty(len(items), object)
            array[:] = [_decode(item) for item in items]
            return array.reshape(shape)
        case {"$array": [name, shape, raw]}:
            return np.frombuffer(base64.b64decode(raw), np_dtype(name)).reshape(shape)
        case {"$scalar": item}:
            return _decode(item)[()]
        case {"$dict": items}:
            return {key: _decode(item) for key, item in items.items()}
        case dict():
            raise ValueError("an unknown tag")
    return value
