"""The shared real models for tests: see benchmarks/oracle.py, which finds them. Tests skip where there are none."""

from collections.abc import Sequence

import pytest

from benchmarks import oracle
from benchmarks.oracle import Case, Expected

__all__ = ["Case", "Expected", "case", "parametrize"]


def parametrize(*names: str) -> pytest.MarkDecorator:
    """`@parametrize("mnist_cntk")` runs a test with `case` for each set of inputs of these models, or of all."""
    found = list(oracle.cases(names))
    skip = pytest.mark.skip(reason="no models: set ONNX_MODELS to their folder")
    none = [pytest.param(None, marks=skip, id="none")]
    return pytest.mark.parametrize("case", [pytest.param(c, id=_id(c)) for c in found] or none)


def case(name: str, feed: int = 0) -> Case:
    """One case; skips the test without the models."""
    found: Sequence[Case] = [c for c in oracle.cases([name]) if c.feed_index == feed]
    if not found:
        pytest.skip("no models: set ONNX_MODELS to their folder")
    return found[0]


def _id(c: Case) -> str:
    return f"{c.name}.{c.feed_index}"
