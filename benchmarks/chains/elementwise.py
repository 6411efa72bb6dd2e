"""Chains of elementwise operators as text: an expression for numexpr, the body of one loop for numba.

In both, a number is a float32, or all would be computed in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.chains.program import Line, MissingOperator, Program, define

# {0} and {1} are the arguments, {zero} and {one} numbers.
TEXTS = {
    "Abs": "abs({0})",
    "Add": "({0} + {1})",
    "Cos": "cos({0})",
    "Div": "({0} / {1})",
    "Exp": "exp({0})",
    "Log": "log({0})",
    "Mul": "({0} * {1})",
    "Neg": "(-{0})",
    "Reciprocal": "({one} / {0})",
    "Sigmoid": "({one} / ({one} + exp(-{0})))",
    "Sin": "sin({0})",
    "Sinh": "sinh({0})",
    "Softplus": "log1p(exp({0}))",
    "Sqrt": "sqrt({0})",
    "Sub": "({0} - {1})",
    "Swish": "({0} / ({one} + exp(-{0})))",
    "Tanh": "tanh({0})",
}
NUMEXPR = TEXTS | {"Atan": "arctan({0})", "Relu": "where({0} > {zero}, {0}, {zero})"}
NUMBA = TEXTS | {"Atan": "atan({0})", "Relu": "max({0}, {zero})"}


def expressions(program: Program) -> list[str]:
    """One for each output, each from the inputs: numexpr finds what is common within one, but not between them."""
    values: dict[str, str] = {}
    for line in program.lines:
        values[line.results[0]] = _text(NUMEXPR, line, lambda a: values.get(a, a))
    return [values[name] for name in program.outputs]


def loop(program: Program) -> Callable[..., Any]:
    """A function of flat inputs and outputs, to be compiled by numba."""
    numba = import_module("numba")

    def scalar(argument: str) -> str:
        return f"float32({argument})" if _is_number(argument) else argument

    outputs = [f"out_{name}" for name in program.outputs]
    body = [f"{name} = {name}_at[i]" for name in program.inputs]
    body += [f"{line.results[0]} = {_text(NUMBA, line, scalar)}" for line in program.lines]
    body += [f"{array}[i] = {name}" for array, name in zip(outputs, program.outputs, strict=True)]
    arrays = [*(f"{name}_at" for name in program.inputs), *outputs]
    head = f"def chain({', '.join(arrays)}):\n    for i in prange({arrays[0]}.size):\n"
    names = {"prange": numba.prange, "float32": numba.float32}
    names |= {f: getattr(math, f) for f in ("atan", "cos", "exp", "log", "log1p", "sin", "sinh", "sqrt", "tanh")}
    return define(head + "".join(f"        {row}\n" for row in body), names)


def _text(texts: dict[str, str], line: Line, show: Callable[[str], str]) -> str:
    if line.op not in texts:
        raise MissingOperator(f"no {line.op}")
    return texts[line.op].format(*map(show, line.arguments), zero=show("0.0"), one=show("1.0"))


def _is_number(argument: str) -> bool:
    return argument[0] in "0123456789.-"
