"""Whole models through the compiler: the shared ones with stored outputs, and light ones from the onnx wheel."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stitch
from benchmarks import oracle
from benchmarks.models import as_numpy
from stitch.errors import UnsupportedOperator
from stitch.evaluate import evaluate
from stitch.importer import load
from tests.real_models import Case

SLOW_BYTES = 60 << 20
"""Models in larger files are left to `make models`."""


def quick() -> list[Any]:
    found = [c for c in oracle.cases() if c.path.stat().st_size <= SLOW_BYTES]
    skip = pytest.mark.skip(reason="no models: set ONNX_MODELS to their folder")
    return [pytest.param(c, id=f"{c.name}.{c.feed_index}") for c in found] or [pytest.param(None, marks=skip)]


@functools.lru_cache(maxsize=1)
def compiled(path: Path) -> Any:
    return stitch.optimize(path, cache=False)


@pytest.mark.parametrize("case", quick())
def test_model(case: Case) -> None:
    try:
        model = compiled(case.path)
    except UnsupportedOperator as refusal:
        pytest.skip(str(refusal))
    feed = case.feed()
    results = model.run(None, feed)
    errors = case.errors(dict(zip([t.name for t in model.outputs], results, strict=True)))
    if not max(errors.values()) <= 1:  # a stored reference may be at fault: then numpy has to side with stitch
        assert as_numpy(case, case.expected(), model.run([e.name for e in case.expected()], feed)), errors
    again = model.run(None, feed)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(results, again, strict=True)), "another run, other bits"


def light(name: str) -> Path:
    onnx = pytest.importorskip("onnx")
    path = Path(onnx.__file__).parent / "backend/test/data/light" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"this onnx has no {name}")
    return path


@pytest.mark.parametrize("name", ["light_shufflenet"])
def test_light_models_against_numpy(name: str) -> None:
    path = light(name)
    graph = load(path)
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.standard_normal([int(d) for d in v.shape]).astype(v.dtype) for v in graph.inputs}  # type: ignore[arg-type]
    wanted = evaluate(graph, feeds)
    for got, want in zip(stitch.optimize(path, cache=False).run(None, feeds), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * float(np.abs(want).max(initial=1e-9)))


@pytest.mark.parametrize("name", ["light_squeezenet"])
def test_light_models_against_another_runtime(name: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    path = light(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    model = stitch.optimize(path, cache=False)
    feeds = {t.name: rng.standard_normal([int(d) for d in t.shape]).astype(t.dtype) for t in model.inputs}
    for got, want in zip(model.run(None, feeds), session.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * float(np.abs(want).max(initial=1e-9)))
