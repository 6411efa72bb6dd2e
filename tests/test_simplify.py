"""Simplification: it keeps the meaning, it ends, and each rule does what its docstring shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from stitch.evaluate import evaluate
from stitch.simplify import simplify
from tests.graphs import Case, graphs

SLOW = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def agree(case: Case) -> None:
    after = simplify(case.graph)
    after.check()
    assert [v.shape for v in after.inputs] == [v.shape for v in case.graph.inputs]
    with np.errstate(all="ignore"):
        expected, found = evaluate(case.graph, case.feeds), evaluate(after, case.feeds)
    for x, y in zip(expected, found, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if case.exact:
            np.testing.assert_array_equal(x, y)
        else:
            scale = float(np.max(np.abs(x[np.isfinite(x)]), initial=1)) if x.dtype.kind == "f" else 1
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale)
    assert len(simplify(after).nodes) == len(after.nodes)


@SLOW
@given(graphs(exact=True))
def test_exact_graphs_keep_every_number(case: Case) -> None:
    agree(case)


@SLOW
@given(graphs(exact=False))
def test_sums_stay_close(case: Case) -> None:
    agree(case)
