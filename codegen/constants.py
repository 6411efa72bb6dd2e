"""Constants laid out for the code that reads them: packed once at compile time, kept in the artifact instead of the
original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stitch.graph import Value

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Relaid:
    """The elements of a constant in the order of some axes, the last one contiguous: `axes` are (extent, stride in
    elements of the constant), from `offset` on."""

    value: Value
    offset: int
    axes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return int(np.prod([n for n, _ in self.axes], dtype=np.int64))

    def pack(self, array: Array, out: Array) -> None:
        """Writes the packed elements; `out` is flat."""
        view = _view(array, self.offset, self.axes)
        out.reshape(view.shape)[...] = view


@dataclass(frozen=True)
class Panels:
    """A constant operand packed for the micro-kernel: [lead..., panels, k..., lanes], columns padded with zeros.

    `lead`, `summed`: (extent, stride in elements of the constant); `columns`: the same for the packed axis."""

    value: Value
    offset: int
    lead: tuple[tuple[int, int], ...]
    summed: tuple[tuple[int, int], ...]
    columns: tuple[int, int]
    lanes: int

    @property
    def size(self) -> int:
        extents = [n for n, _ in (*self.lead, *self.summed)]
        return int(np.prod(extents, dtype=np.int64)) * -(-self.columns[0] // self.lanes) * self.lanes

    def pack(self, array: Array, out: Array) -> None:
        """Writes the packed elements; `out` is flat."""
        view = _view(array, self.offset, (*self.lead, *self.summed, self.columns))
        lead, n = len(self.lead), self.columns[0]
        panels = -(-n // self.lanes)
        to = out.reshape((*view.shape[:lead], panels, *view.shape[lead:-1], self.lanes))
        for p in range(panels):
            piece = view[..., p * self.lanes : min((p + 1) * self.lanes, n)]
            there = to[(slice(None),) * lead + (p,)]
            there[..., : piece.shape[-1]] = piece
            there[..., piece.shape[-1] :] = 0


Constant = Relaid | Panels


def inside(size: int, offset: int, axes: Sequence[tuple[int, int]]) -> bool:
    """Whether every position of such a view is one of `size` elements."""
    if any(n == 0 for n, _ in axes):
        return True
    first = offset + sum(min(s, 0) * (n - 1) for n, s in axes)
    last = offset + sum(max(s, 0) * (n - 1) for n, s in axes)
    return first >= 0 and last < size


def _view(array: Array, offset: int, axes: tuple[tuple[int, int], ...]) -> Array:
    assert inside(array.size, offset, axes), "a view of what is not in the constant"
    flat = np.ascontiguousarray(array).reshape(-1)[offset:]
    shape, steps = [n for n, _ in axes], [s * array.itemsize for _, s in axes]
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)
