"""Dims in machine code against `evaluate`, which is compared with plain Python in `test_dims`."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llvmlite import binding

from stitch.codegen import entry, machine
from stitch.dims import Dim, ceil_div, evaluate, symbol
from tests.test_dims import NAMES, Env, dims, environments

n, m = symbol("n"), symbol("m")
numbers = itertools.count()


def compute(wanted: list[Dim], environments: list[Env]) -> list[list[int]]:
    """By a layout, which puts the size of the arena first."""
    name = f"layout{next(numbers)}"
    text = entry.layout(name, wanted, {s: k for k, s in enumerate(NAMES)}, 0, 0)
    builder = binding.JITLibraryBuilder().add_object_img(machine.compile(text, machine.host()))
    builder.export_symbol(name)
    library = builder.link(binding.create_lljit_compiler(), name)
    layout = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(library[name])
    found = []
    for env in environments:
        given_, out = np.array([*(env[s] for s in NAMES), 1], np.int64), np.zeros(len(wanted) + 1, np.int64)
        layout(given_.ctypes.data, out.ctypes.data)
        found.append(out[1:].tolist())
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(dims, min_size=5, max_size=15), st.lists(environments, min_size=1, max_size=4))
def test_any_dim(wanted: list[Dim], environments: list[Env]) -> None:
    assert compute(wanted, environments) == [[evaluate(d, env) for d in wanted] for env in environments]


def test_quotients_and_remainders_of_all_signs() -> None:
    dividends: list[Dim] = [n, -n, n - 5, 5 - n, -n - 1, n * m + 3, -n * m, n - m, 7, -7, 3 * n]
    divisors: list[Dim] = [1, 2, 3, 64, -2, -3, m, m + 1, 2 * m + 3, -m, m - 2, -m - 1]
    wanted = [f for a in dividends for d in divisors for f in (a // d, a % d, ceil_div(a, d))]
    environments = [dict.fromkeys(NAMES, 0) | {"n": x, "m": y} for x in range(8) for y in range(6)]
    for env, found in zip(environments, compute(wanted, environments), strict=True):
        assert found == [evaluate(d, env) for d in wanted]


@pytest.mark.parametrize("dim", [ceil_div(4 * n, 64), -((-320000) // (65 * n + 44)), n // 12, n % 12, (n + 1) // 2])
def test_dims_of_tensors_take_one_division(dim: Dim) -> None:
    text = entry.layout("layout", [dim], {"n": 0}, 0, 0)
    assert "sdiv" not in text
    assert "select" not in text
    assert text.count("div ") + text.count("rem ") <= 1
