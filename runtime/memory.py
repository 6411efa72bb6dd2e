"""Memory: of results, and scratch memory. Both are kept, so that a run in the steady state asks the system for none."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from stitch.errors import ResourceError

ALIGNMENT = 64
HUGE = 2 << 20  # from this size on, memory is aligned to and advised to be huge pages
LENT_FROM = 128 << 10  # results of so many bytes are of blocks: smaller ones come from pages that malloc keeps
KEPT = 64 << 20  # bytes of blocks that nobody uses, of each model

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


def _mapped(size: int) -> mmap.mmap:
    """Anonymous memory, untouched: pages are only made when they are written. It is private, for else a child after
    fork would write to the same."""
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


class Blocks:
    """Memory of large results. What callers let go of is kept, up to KEPT bytes, and lent again.

    Memory that is new to the process costs a fault for each page: 1 to 2 us per 4 KB, where computing takes a tenth.
    A block goes back when no array refers to it, whoever made that one (`_Lent`). Lists are changed by single
    operations, which are atomic, as a block may go back at any time, and in any thread.
    """

    def __init__(self) -> None:
        self.free: list[_Block] = []

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array for a result, with any contents. A large one begins at a cache line."""
        size = bytes_of(shape, dtype)
        try:
            if size < LENT_FROM or dtype.kind == "O":
                return np.empty(shape, dtype)
            lent = self._lent(capacity(size))
            return np.ndarray(shape, dtype, lent, ALIGNMENT)
        except (MemoryError, OSError, ValueError, OverflowError) as error:
            raise ResourceError("memory", f"no memory for an array of the shape {shape} and type {dtype}") from error

    def _lent(self, size: int) -> _Lent:
        for block in [b for b in self.free if b.size == size]:
            try:
                self.free.remove(block)
            except ValueError:
                continue  # another thread has it
            return _Lent.of(block, self)
        return _Lent.of(_Block(size), self)

    def give(self, block: _Block) -> None:
        """Take a block back. Those that have been here for longest go first where there are too many."""
        self.free.append(block)
        while sum(b.size for b in list(self.free)) > KEPT:
            try:
                self.free.pop(0)
            except IndexError:
                break


class _Block:
    """Memory, from the beginning of a page. Compared by identity, so that `list.remove` runs no other code."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = _mapped(size)


class _Lent(np.ndarray):
    """All of a block that is lent. Arrays that are made of it refer to it, not to the block: numpy passes over an array
    only if there is another one behind it."""

    _debt: tuple[_Block, Blocks]

    @staticmethod
    def of(block: _Block, owner: Blocks) -> _Lent:
        lent = np.ndarray.__new__(_Lent, block.size, np.uint8, block.memory)
        lent._debt = block, owner
        return lent

    def __del__(self) -> None:
        debt = self.__dict__.pop("_debt", None)  # views of it have none
        if debt is not None:
            block, owner = debt
            owner.give(block)


def capacity(size: int) -> int:
    """Bytes of a block for so many: of a few sizes, at most an eighth too large, so that results that grow from run to
    run find those of the runs before."""
    step = 1 << max(size.bit_length() - 4, 12)
    return -(-size // step) * step + ALIGNMENT


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
            block = _mapped(size + alignment) if size >= HUGE else bytearray(size + alignment)
        except (MemoryError, OSError, ValueError, OverflowError) as error:
            raise ResourceError("memory", f"no memory for {size} bytes of intermediate values") from error
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
