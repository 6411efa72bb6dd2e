"""Sums of floats in blocks: short chains of additions, whose sums are added in turn.

One chain of n additions may be wrong by n/2 units in the last place of its sum, and is, where all terms have one sign
and what each of them loses to rounding does too: of a million equal terms a hundredth was lost. Blocks make that the
length of a block and the number of blocks:

    |error| <= (min(n, 1024) + n / 512) u Σ|terms|   up to 2^20 terms, and (4 √n + 1) u Σ|terms| beyond,  u = 2^-24

to first order, for each accumulator. Where blocks begin follows from the number of terms alone, so the same shape gives
the same bits. What has at most 1024 terms for each accumulator, as most sums, is one block, and costs nothing more;
with blocks of 512 a matrix product over 768 took half a percent longer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from stitch import dtypes
from stitch.codegen.loops import Fold

BLOCK_BITS = 10
"""A block of a sum has 2 to the power of this many terms, or more where there would be more blocks than that."""


def block_of(count: int) -> int:
    """How many terms of a sum of floats are added one after the other, before their sum is added to that of those
    before: 1024 up to 2^20 terms, then between one and two times the square root."""
    return 1 << max(BLOCK_BITS, (count.bit_length() + 1) // 2)


def is_blocked(fold: Fold) -> bool:
    """Whether a fold is a sum that rounds."""
    return fold.op == "add" and dtypes.is_float(fold.local.dtype)


def runs(extents: Sequence[int]) -> Iterator[tuple[tuple[int, ...], range, bool]]:
    """The sum over nested axes as a contraction takes it: for each run along the innermost axis the place on the
    others, the run, and whether a block ends with it. A run ends with its axis, or has as many terms as a block."""
    *outer, last = extents
    limit = block_of(math.prod(extents))
    room = limit
    for place in itertools.product(*map(range, outer)):
        for first in range(0, last, limit):
            run = range(first, min(first + limit, last))
            room -= len(run)
            full = room < min(last, limit)  # another one might not fit
            yield place, run, full
            room = limit if full else room
