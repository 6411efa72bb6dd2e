"""The chain benchmarks: every graph is valid, compiled and right, and what is reported adds up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import stitch
from benchmarks.chains import checking, limit, numpy_like, report, symbols
from benchmarks.chains.case import SIZES, Case
from benchmarks.chains.cases import CASES
from benchmarks.chains.program import MissingOperator, translate
from benchmarks.chains.report import Row, Timing

MACHINE = limit.Machine(1, 16, 4e9, 8e9, [(1 << 16, 1e11), (1 << 28, 2e10)])
named = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@named
def test_compiles_and_is_right(case: Case) -> None:
    dims = case.sizes["small"]
    model, feed = case.model(dims), case.feed(dims)
    onnx.checker.check_model(model, full_check=True)
    got = stitch.optimize(model, cache=False, threads=1).run(None, feed)
    assert checking.error(got, numpy_like.oracle(translate(model), feed), case.outputs(dims)) <= 1


@named
def test_sizes_and_limits(case: Case) -> None:
    assert tuple(case.sizes) == SIZES
    small, l3, dram = (case.bytes(dims) for dims in case.sizes.values())
    assert 90e3 < small < 400e3
    assert 3.9e6 < l3 < 13e6
    assert dram > 96e6
    found = limit.limit(case, case.sizes["dram"], MACHINE)
    assert found.memory > 0
    assert found.compute >= 0


def test_open_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SHAPES", 3), ("TURNS", 1), ("SLICE_S", 0.001)):
        monkeypatch.setattr(symbols, name, value)
    found = [symbols.measure(case, ("small",)) for case in CASES if case.symbolic]
    assert [f.compilations for f in found] == [1]
    assert found[0].error <= 1
    assert "1 compilation for 3 shapes" in str(found[0])


def test_bandwidth_is_between_its_neighbours() -> None:
    assert MACHINE.bandwidth(1) == 1e11
    assert MACHINE.bandwidth(1 << 30) == 2e10
    assert MACHINE.bandwidth(1 << 22) == pytest.approx(6e10)


def test_wrong_answers_are_noticed() -> None:
    right = np.linspace(-1, 1, 100)
    like = [right.astype(np.float32)]
    assert checking.error(like, [right], like) < 1
    assert checking.error([like[0] + np.float32(1e-3)], [right], like) > 1
    assert checking.error([right], [right], like) == np.inf
    assert checking.error([np.full(100, np.nan, np.float32)], [right], like) == np.inf


def test_program_reads_like_a_function() -> None:
    case = next(c for c in CASES if c.name == "rmsnorm_swiglu")
    program = translate(case.model(case.sizes["small"]))
    assert program.source().splitlines() == [
        "def chain(x, gate):",
        "    normal = RMSNormalization(x, gain, axis=-1, epsilon=9.999999974752427e-07)",
        "    swish = Swish(gate)",
        "    y = Mul(normal, swish)",
        "    return [y]",
    ]
    with pytest.raises(MissingOperator, match="no Mul, RMSNormalization, Swish"):
        program.bind({}, np.asarray)


def test_report(tmp_path: Path) -> None:
    def row(size: str, threads: int, ours: Timing, peer: float) -> Row:
        timings = {"stitch": ours, "other": Timing(us=peer), "broken": Timing(problem="wrong")}
        return Row("chain", size, threads, 1000, 5.0, "memory", timings)

    rows = [row("dram", 1, Timing(us=10), 20), row("dram", 2, Timing(us=8), 8), row("l3", 2, Timing(problem="no"), 8)]
    assert rows[0].peer == "other"
    assert (rows[0].ratio, rows[0].near) == (2, 0.5)
    assert rows[2].ratio is None
    table = report.table(rows)
    assert len(table.splitlines()) == 2 + len(rows)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    text = report.summary(rows)
    assert "2.00 over 1 rows" in text
    assert "below 0.85 of the limit: chain dram (0.50)" in text
    assert "Not done by stitch: chain l3 (no)" in text
    assert "faster than with one by: dram 1.25" in text
    path = tmp_path / "rows.json"
    report.save(path, rows, {})
    assert report.load(path) == rows
