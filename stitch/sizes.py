"""Extents that a user gives for a model's symbols, before anything is decided with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral

from stitch.errors import StitchError


def checked(given: Mapping[str, int], symbols: Collection[str]) -> dict[str, int]:
    """The same, if all are symbols of the model and whole numbers from 0 on. Raises StitchError."""
    for name, size in given.items():
        if name not in symbols:
            raise StitchError(
                f"the model has no symbol {name!r}", f"its symbols are {', '.join(sorted(symbols)) or 'none'}"
            )
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 0:
            raise StitchError(f"the size of {name!r} is {size!r}, which is not a whole number from 0 on")
    return {name: int(size) for name, size in given.items()}
