"""Where a model's weights lie: in its file, or in files beside it, mapped into memory and not read.

A protobuf library copies every byte that it parses. `lift` takes the weights out of a serialized model first, by
walking the wire format far enough to find them, so that a large model costs address space and no memory. What is
mapped must not change while it is in use: replace a model file by renaming another onto it, never by writing into it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

import numpy as np

from stitch.errors import InvalidModel
from stitch.ops.primitives import Array

Buffer: TypeAlias = bytes | memoryview

_LEAST = 4096  # bytes: smaller tensors are left where they are
_COPIED = 64 << 10  # bytes: smaller ones are copied to where their dtype wants them
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # field numbers in ModelProto, GraphProto, TensorProto


class _Mapped(mmap.mmap):
    """A file that nobody writes to through this mapping: its pages may be given back, and come again."""


def map_file(path: Path, what: str) -> memoryview:
    """The bytes of a file, mapped. Raises InvalidModel, speaking of `what`, if it cannot be read."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a device, or a pipe: some have no end
            raise InvalidModel(f"{what} {str(path)!r} is not a file", advice="give its bytes, or copy it to a file")
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")
            return memoryview(_Mapped(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise InvalidModel(f"{what} {str(path)!r} does not exist", advice="check the path") from None
    except IsADirectoryError:
        raise InvalidModel(f"{what} {str(path)!r} is a directory", advice="give the path of a file") from None
    except (OSError, ValueError) as problem:
        raise InvalidModel(f"{what} {str(path)!r} cannot be read: {problem}", advice="check the file") from None


def view(buffer: Buffer, dtype: np.dtype, shape: Sequence[int], what: str) -> Array:
    """An array over `buffer`. Raises InvalidModel on a misfit.

    Only a small one is copied if its address does not suit the dtype. A file in the format of protobuf puts three of
    four float32 tensors at such addresses, and numpy reads them there almost as fast."""
    needed = math.prod(shape) * dtype.itemsize
    if len(buffer) != needed:
        raise InvalidModel(f"{what} has {len(buffer)} bytes of data, but {dtype.name}{list(shape)} takes {needed}")
    array: Array = np.frombuffer(buffer, np.uint8)
    if needed < _COPIED and array.ctypes.data % dtype.itemsize:
        array = array.copy()
    return array.view(dtype).reshape(tuple(shape))


def release(array: Array) -> None:
    """Gives back the memory of an array that lies in a mapped file and has been read: who reads it again pays for
    that. Nothing happens to other arrays."""
    while isinstance(array.base, np.ndarray):
        array = array.base  # the last one holds the bytes that `view` was given
    buffer: Any = array.base
    while isinstance(buffer, memoryview):
        buffer = buffer.obj
    if isinstance(buffer, _Mapped) and hasattr(mmap, "MADV_DONTNEED"):
        offset = array.ctypes.data - np.frombuffer(buffer, np.uint8).ctypes.data
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):  # no more than a hint
            buffer.madvise(mmap.MADV_DONTNEED, start, offset + array.nbytes - start)


class Folder:
    """The files with external data beside a model; `path` is None for a model that came without a place."""

    def __init__(self, path: Path | None) -> None:
        self._root = path.resolve() if path is not None else None
        self._files: dict[str, memoryview] = {}

    @property
    def opened(self) -> tuple[Path, ...]:
        """The files that were needed so far."""
        assert self._root is not None or not self._files
        return tuple((self._root or Path()) / location for location in self._files)

    def read(self, entries: dict[str, str], size: int, what: str) -> Buffer:
        """The `size` bytes that a tensor's external_data entries speak of. Raises InvalidModel."""
        file = self._file(entries.get("location", ""), what)
        offset, length = _natural(entries, "offset", 0, what), _natural(entries, "length", size, what)
        if length != size:
            raise InvalidModel(f"{what} needs {size} bytes, but its external data has length {length}")
        if offset + length > len(file):
            place = f"bytes {offset} to {offset + length} of {entries['location']!r}"
            raise InvalidModel(f"{what} lies in {place}, which has {len(file)} bytes", advice="get the whole file")
        return file[offset : offset + length]

    def _file(self, location: str, what: str) -> memoryview:
        if location in self._files:
            return self._files[location]
        if self._root is None:
            raise InvalidModel(f"{what} lies in an external file", advice="give the model as a path, not as bytes")
        outside = f"{what} lies in {location!r}, which is not inside the model's folder"
        advice = "keep external data in files next to the model"
        for flavour in (PurePosixPath, PureWindowsPath):
            path = flavour(location)
            if not location or "\0" in location or path.anchor or ".." in path.parts:
                raise InvalidModel(outside, advice=advice)
        resolved = (self._root / location).resolve()
        if not resolved.is_relative_to(self._root):  # through a symbolic link
            raise InvalidModel(outside, advice=advice)
        if resolved.exists() and not resolved.is_file():
            raise InvalidModel(f"{what} lies in {location!r}, which is not a file", advice=advice)
        self._files[location] = map_file(resolved, f"{what} lies in an external file:")
        return self._files[location]


def _natural(entries: dict[str, str], key: str, default: int, what: str) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise InvalidModel(f"{what} has external data with the {key} {text!r}")
    return int(text)


# ------------------------------------------------------------------ the wire format


class _Malformed(Exception):
    pass


def lift(model: memoryview) -> tuple[Buffer, dict[int, memoryview]]:
    """A serialized ModelProto without the raw_data of its large initializers, and these by initializer index.

    Bytes that are no protobuf are returned as they are: it is for the parser to refuse them.
    """
    lifted: dict[int, memoryview] = {}
    try:
        parts: list[Buffer] = []
        count = 0
        for number, start, body, end in _fields(model, 0, len(model)):
            if number == _GRAPH and body is not None:
                graph, count = _lift_graph(model, body, end, lifted, count)
                parts += _message(_GRAPH, graph)
            else:
                parts.append(model[start:end])
        return b"".join(parts) if lifted else model, lifted
    except (_Malformed, IndexError):
        return model, {}


def _lift_graph(
    model: memoryview, start: int, end: int, lifted: dict[int, memoryview], count: int
) -> tuple[bytes, int]:
    parts: list[Buffer] = []
    done = start  # everything before it has been copied
    for number, at, body, stop in _fields(model, start, end):
        if number != _INITIALIZER or body is None:
            continue
        kept: list[Buffer] = []
        for field, a, b, c in _fields(model, body, stop) if stop - body >= _LEAST else ():
            if field == _RAW_DATA and b is not None and c - b >= _LEAST:
                lifted[count] = model[b:c]
            else:
                kept.append(model[a:c])
        if count in lifted:
            parts += [model[done:at], *_message(_INITIALIZER, b"".join(kept))]
            done = stop
        count += 1
    parts.append(model[done:end])
    return b"".join(parts), count


def _fields(buffer: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int | None, int]]:
    """(number, start, start of the body if it is length-delimited, end) of each field."""
    while at < end:
        start = at
        tag, at = _varint(buffer, at)
        body = None
        match tag & 7:
            case 0:
                _, at = _varint(buffer, at)
            case 1:
                at += 8
            case 2:
                size, body = _varint(buffer, at)
                at = body + size
            case 5:
                at += 4
            case _:
                raise _Malformed
        if at > end:
            raise _Malformed
        yield tag >> 3, start, body, at


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise _Malformed


def _message(number: int, body: bytes) -> list[Any]:
    head = bytearray([number << 3 | 2])
    size = len(body)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return [bytes(head), body]
