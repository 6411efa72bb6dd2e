"""One compilation serves all shapes: nothing is compiled at new sizes; and the benchmark of what that costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest

import stitch
from benchmarks import architectures, shapes
from stitch.codegen import machine
from stitch.runtime import cpu

ROOT = Path(__file__).resolve().parent.parent


def encoder() -> onnx.ModelProto:
    return architectures.encoder("block", layers=2, width=64, heads=4, vocabulary=100, positions=64)


def mobilenet() -> onnx.ModelProto:
    return architectures.mobilenet(size=32, stem=8, blocks=((1, 8, 1, 1), (2, 8, 2, 2)), head=16, classes=10)


def feeds(model: stitch.CompiledModel, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    out = {}
    for t in model.inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in t.shape]
        whole = np.issubdtype(t.dtype, np.integer)
        out[t.name] = rng.integers(0, 2, shape).astype(t.dtype) if whole else rng.standard_normal(shape).astype(t.dtype)
    return out


@pytest.mark.parametrize("made", [encoder, mobilenet])
def test_no_size_is_compiled_for(made: object) -> None:
    """Neither the compiler runs, nor is code loaded, after `optimize`; and each size gives what its own compilation
    gives."""
    source = made()  # type: ignore[operator]
    model = stitch.optimize(source, cache=False, threads=2)
    code = model.artifact.code
    found = []
    with (
        mock.patch.object(machine, "compile", side_effect=AssertionError("compiled again")),
        mock.patch.object(cpu, "Library", side_effect=AssertionError("loaded again")),
    ):
        for batch, seq in ((1, 1), (1, 17), (3, 40), (2, 64), (5, 2)):
            given = feeds(model, {"batch": batch, "seq": seq})
            found.append((given, model.run(None, given)))
    assert model.artifact.code is code
    for given, got in found[1:3]:
        fixed = stitch.optimize(source, cache=False, threads=2, shapes={k: a.shape for k, a in given.items()})
        assert all(isinstance(d, int) for t in fixed.inputs for d in t.shape)
        for a, b in zip(got, fixed.run(None, given), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_running_needs_no_compiler(tmp_path: Path) -> None:
    """A model from the cache meets new sizes in a process that never imports the code generator."""
    path = tmp_path / "model.onnx"
    onnx.save(encoder(), path)
    program = f"""
import sys
import numpy as np
from stitch import knobs
with knobs.using(cache_dir={str(tmp_path / "cache")!r}, cache_bytes=1 << 30):
    import stitch
    model = stitch.optimize({str(path)!r})
for batch, seq in ((1, 3), (4, 33), (2, 64)):
    model.run(None, {{t.name: np.zeros((batch, seq), t.dtype) for t in model.inputs}})
print([m for m in ("onnx", "stitch.codegen", "stitch.compiler") if m in sys.modules])
"""
    command = [sys.executable, "-c", program]
    ran = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False) for _ in range(2)]
    assert [r.stderr for r in ran] == ["", ""]
    assert ran[1].stdout.splitlines() == ["[]"]


# ------------------------------------------------------------------ the benchmark


def test_choices() -> None:
    assert shapes.choices({"batch": 1, "seq": 128}) == [
        {"batch": 1, "seq": 128}, {"batch": 3, "seq": 128}, {"batch": 1, "seq": 103},
    ]  # fmt: skip
    assert shapes.choices({"batch": 1}) == [{"batch": 1}, {"batch": 3}]
    assert shapes.choices({"batch": 1, "seq": 1, "past": 128})[-1] == {"batch": 1, "seq": 1, "past": 103}


def test_summary_names_what_is_above() -> None:
    rows = [
        shapes.Row("a", "batch=1", 1, 1.0, 1.0, (0.9, 1.0, 1.1)),
        shapes.Row("b", "batch=3", 1, 1.2, 1.0, (1.1, 1.21, 1.3)),
        shapes.Row("b", "batch=3", 2, 1.0, 1.0, (1.0, 1.05, 1.3)),
    ]
    text = shapes.summary(rows)
    assert "1 thread: geometric mean 1.100 over 2 rows; above 1.05: 1: b batch=3 (1.21)" in text
    assert "2 threads: geometric mean 1.050 over 1 rows; above 1.05: 0" in text
    assert shapes.line(rows[1]) == "| b | batch=3 | 1 | 1.200 | 1.000 | 1.210 | 1.100 to 1.300 |"
