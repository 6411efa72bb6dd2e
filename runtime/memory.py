"""Memory: for results, and scratch memory that outlives a run, so that one in the steady state allocates nothing."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from stitch.errors import ResourceError

ALIGNMENT = 64
HUGE = 2 << 20  # from this size on, memory is aligned to and advised to be huge pages
ALIGN_FROM = 512 << 10  # results of so many bytes begin at a cache line: 5 to 12 % for 1 us; numpy gives 16 bytes

T = TypeVar("T")


def aligned_copy(data: object) -> np.ndarray:
    """The bytes of a buffer at an aligned address: where they are, if that is one."""
    bytes_ = np.frombuffer(memoryview(data).cast("B"), np.uint8)  # type: ignore[arg-type]
    if bytes_.size == 0 or address_of(bytes_) % ALIGNMENT == 0:
        return bytes_
    arena = Arena()
    arena.reserve(bytes_.nbytes)
    copy = arena.bytes[: bytes_.size]
    copy[:] = bytes_
    return copy


def address_of(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = dtype.itemsize
    for dim in shape:
        size *= dim
    return size


def new_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array for a result. A large one begins at a cache line."""
    size = bytes_of(shape, dtype)
    try:
        if size < ALIGN_FROM or dtype.kind == "O":
            return np.empty(shape, dtype)
        block = np.empty(size + ALIGNMENT, np.uint8)
        start = -address_of(block) % ALIGNMENT
        return np.ndarray(shape, dtype, block, start)
    except (MemoryError, ValueError) as error:
        raise ResourceError("memory", f"no memory for an array of the shape {shape} and type {dtype}") from error


class Arena:
    """A block of memory that only grows. Its contents do not survive growing."""

    def __init__(self) -> None:
        self.capacity = 0
        self.address = 0
        self.bytes = np.empty(0, np.uint8)

    def reserve(self, size: int) -> int:
        """The address of at least `size` bytes; 0 for none."""
        if size > self.capacity:
            self._grow(max(size, min(2 * self.capacity, size + HUGE)))
        return self.address

    def _grow(self, size: int) -> None:
        alignment = HUGE if size >= HUGE else ALIGNMENT
        self.bytes = np.empty(0, np.uint8)  # give the old block back first
        self.capacity = self.address = 0
        try:
            # Anonymous memory, untouched: pages are only made when they are written.
            # Private, for else a child after fork would write to the same.
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            block = mmap.mmap(-1, size + alignment, private) if size >= HUGE else bytearray(size + alignment)
        except (MemoryError, OSError, ValueError, OverflowError) as error:
            raise ResourceError("memory", f"no memory for {size} bytes of intermediate values") from error
        if isinstance(block, mmap.mmap) and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                block.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(block, np.uint8)
        start = -address_of(whole) % alignment
        self.bytes = whole[start : start + size]
        self.address = address_of(self.bytes)
        self.capacity = size


class Pool(Generic[T]):
    """Things that one run uses at a time. As many are made as there are runs at once, and they are kept.

    list.append and list.pop are atomic: there is no lock that a fork could leave locked.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.free: list[T] = []

    def take(self) -> T:
        try:
            return self.free.pop()
        except IndexError:
            return self._make()

    def give(self, thing: T) -> None:
        self.free.append(thing)
