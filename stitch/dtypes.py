"""Element types: numpy dtypes, plus bfloat16, and what the code generator does with each.

A type of storage and a type of computation are different things: float16 and bfloat16 live in memory only and are
computed as float32 (`compute`), so that their rounding happens on store.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

DType = np.dtype

BOOL = np.dtype(np.bool_)
INT8, INT16, INT32, INT64 = (np.dtype(t) for t in (np.int8, np.int16, np.int32, np.int64))
UINT8, UINT16, UINT32, UINT64 = (np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64))
FLOAT16, FLOAT32, FLOAT64 = (np.dtype(t) for t in (np.float16, np.float32, np.float64))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

FLOATS = (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)
SIGNED = (INT8, INT16, INT32, INT64)
UNSIGNED = (UINT8, UINT16, UINT32, UINT64)
INTEGERS = SIGNED + UNSIGNED
ALL = (BOOL, *INTEGERS, *FLOATS)

_BY_NAME = {d.name: d for d in ALL}


def parse(name: str) -> np.dtype:
    """The dtype called `name` ("float32", "bfloat16", ...). Raises KeyError if stitch has no such type."""
    return _BY_NAME[name]


def is_float(dtype: np.dtype) -> bool:
    return dtype in FLOATS


def is_integer(dtype: np.dtype) -> bool:
    return dtype in INTEGERS


def is_signed(dtype: np.dtype) -> bool:
    return dtype in SIGNED or is_float(dtype)


def compute(dtype: np.dtype) -> np.dtype:
    """The type in which values stored as `dtype` are computed: half precisions widen to float32."""
    return FLOAT32 if dtype in (FLOAT16, BFLOAT16) else dtype


def lowest(dtype: np.dtype) -> float | int | bool:
    """The identity of max: -inf for floats, the smallest value otherwise."""
    if is_float(dtype):
        return float("-inf")
    return False if dtype == BOOL else int(np.iinfo(dtype).min)


def highest(dtype: np.dtype) -> float | int | bool:
    """The identity of min."""
    if is_float(dtype):
        return float("inf")
    return True if dtype == BOOL else int(np.iinfo(dtype).max)
