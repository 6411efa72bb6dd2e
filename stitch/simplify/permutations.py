"""Orders of axes: their inverses, what they do to attributes and to reshapes, and what a transpose costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from stitch import dims
from stitch.graph import Shape, Value

_GUESS = 64  # what a symbol is taken for where only a cost depends on it

Perm: TypeAlias = tuple[int, ...]
Block: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def inverse(perm: Sequence[int]) -> Perm:
    out = [0] * len(perm)
    for i, p in enumerate(perm):
        out[p] = i
    return tuple(out)


def stays(perm: Sequence[int], shape: Shape) -> bool:
    """Whether a transpose moves only axes of extent 1."""
    order = [p for p in perm if shape[p] != 1]
    return order == sorted(order)


def permuted(attrs: Mapping[str, Any], perm: Sequence[int]) -> dict[str, Any]:
    return {k: tuple(v[p] for p in perm) if isinstance(v, tuple) else v for k, v in attrs.items()}


class _Guess(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return _GUESS


def weight(v: Value) -> float:
    """Bytes, symbols being guessed."""
    return float(dims.evaluate(v.bytes, _Guess()))


def blocks_of(a: Shape, b: Shape) -> list[Block] | None:
    """Axes of `a` and of `b` that a reshape merges and splits among themselves; those of extent 1 that come or go
    belong to the block before, or to the first."""
    segments = dims.factor_segments(a, b)
    if segments is None:
        return None
    out: list[Block] = []
    pending: Block = ((), ())
    for mine, theirs in segments:
        if mine and theirs:
            out.append((pending[0] + mine, pending[1] + theirs))
            pending = ((), ())
        elif out:
            out[-1] = (out[-1][0] + mine, out[-1][1] + theirs)
        else:
            pending = (pending[0] + mine, pending[1] + theirs)
    return out or None


def reordered(blocks: Sequence[Block], perm: Perm, shape: Shape) -> list[Block] | None:
    """The blocks in the order of the axes before a transpose by `perm` (of a value of this shape), if each is whole
    there and in order. Axes of extent 1 do not count."""
    keyed: list[tuple[int, Block]] = []
    last_seen: dict[int, int] = {}
    for k, (mine, _) in enumerate(blocks):
        for i in mine:
            if shape[perm[i]] != 1:
                last_seen[perm[i]] = k
    runs: list[int] = []
    for axis in sorted(last_seen):
        if not runs or runs[-1] != last_seen[axis]:
            runs.append(last_seen[axis])
    if len(runs) != len(set(runs)):
        return None
    for k, block in enumerate(blocks):
        axes = [perm[i] for i in block[0] if shape[perm[i]] != 1]
        if axes != sorted(axes):
            return None
        keyed.append((runs.index(k) if k in runs else -1, block))
    return [block for _, block in sorted(keyed, key=lambda e: e[0])]
