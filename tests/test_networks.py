"""The whole-network benchmarks: what is compared, the limit, the tables, and the processes they need."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import loading
from benchmarks.chains.limit import Limit, Machine
from benchmarks.loading import Kind, Subject
from benchmarks.networks import report
from benchmarks.networks.agreement import difference, disputed
from benchmarks.networks.cases import variants
from benchmarks.networks.limit import work
from benchmarks.networks.report import Row, Timing
from benchmarks.networks.worker import Worker
from benchmarks.pipe import Failed, told

ONE = np.linspace(-1, 1, 100, dtype=np.float32)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A row of a table, a matrix product, a depthwise convolution, for any batch."""
    rng = np.random.default_rng(0)
    shapes = {"table": (50, 8), "weight": (8, 12), "kernel": (4, 1, 3)}
    weights = [numpy_helper.from_array(rng.standard_normal(s, np.float32), n) for n, s in shapes.items()]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("MatMul", ["rows", "weight"], ["product"]),
            helper.make_node("Conv", ["product", "kernel"], ["y"], group=4),
        ],
        "small",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 10])],
        weights,
    )
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.mark.parametrize("batch", [1, 3])
def test_what_a_network_needs(network: Path, batch: int) -> None:
    needs, feed = work(network), {"ids": np.zeros((batch, 4), np.int64)}
    assert needs is not None
    product, convolution = 2 * batch * 4 * 8 * 12, 2 * batch * 4 * 10 * 3
    moved = 8 * batch * 4 + 4 * (batch * 4 * 8 + 8 * 12 + 4 * 3 + batch * 4 * 10)
    assert needs.at(feed) == pytest.approx((product + convolution, moved), abs=32)  # a scalar or two are read as well
    found = needs.limit(feed, Machine(2, 16, 4e9, 8e9, [(1, 1e6), (1 << 28, 1e6)]))
    assert found.compute == pytest.approx((product + convolution) / (2 * 16 * 4e9 * 2))
    assert found.memory == pytest.approx(moved / 1e6, abs=32e-6)


def test_a_model_that_cannot_be_imported_has_no_limit(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert work(tmp_path / "bad.onnx") is None


def test_variants() -> None:
    assert variants({"batch": 1}) == [{"batch": 1}, {"batch": 4}]
    assert variants({"batch": 1, "seq": 128}) == [
        {"batch": 1, "seq": 128}, {"batch": 4, "seq": 128}, {"batch": 1, "seq": 64}
    ]  # fmt: skip
    assert variants({"batch": 1, "seq": 1, "past": 128})[2] == {"batch": 1, "seq": 1, "past": 64}


def test_differences() -> None:
    missing = np.where(ONE > 0.5, np.float32(np.nan), ONE)
    assert difference([ONE], [ONE * np.float32(1.0001)], 0) < 1
    assert difference([ONE], [ONE * np.float32(1.01)], 0) > 1
    assert difference([missing], [missing], 0) == 0
    for other in (missing, np.full_like(ONE, np.nan), ONE.astype(np.float64), ONE[:50]):
        assert difference([ONE], [other], 0) == difference([other], [ONE], 0) == np.inf
    assert difference([ONE], [], 0) == np.inf
    assert difference([np.arange(3)], [np.arange(3)], 0) == 0


def test_who_agrees_with_nobody_is_left_out() -> None:
    good, bad, worse = [ONE], [ONE + np.float32(0.1)], [ONE - np.float32(0.2)]
    assert disputed({"stitch": good, "a": good, "b": good}, 0) == {}
    assert list(disputed({"stitch": good, "a": bad, "b": good}, 0)) == ["a"]
    assert list(disputed({"stitch": bad, "a": good, "b": good}, 0)) == ["stitch"]
    assert list(disputed({"stitch": good, "a": bad, "b": worse}, 0)) == ["stitch", "a", "b"]
    assert "those of the other: " in disputed({"stitch": good, "a": bad}, 0)["a"]
    assert disputed({"stitch": good}, 0) == {}


def test_report() -> None:
    def row(name: str, ours: list[float], a: list[float], b: Timing, collection: str = "exports") -> Row:
        timings = {"stitch": Timing(ours, min(ours)), "a": Timing(a, min(a)), "b": b}
        return Row(collection, name, "batch=1", 1, Limit(0.001, 0.0005), timings)

    wrong = Timing(problem="outputs differ")
    rows = [
        row("fast", [1, 2, 4], [4, 8, 16], wrong),
        row("slow", [2, 2, 2], [3, 3, 3], Timing([1, 1, 1], 1)),
        row("real", [1, 1, 1], [2, 2, 2], wrong, "shared"),
        Row("shared", "refused", "", 1, None, {"stitch": Timing(problem="no operator"), "a": Timing([1], 1)}),
    ]
    assert [r.peer for r in rows] == ["a", "b", "a", "a"]
    assert [r.ratio() for r in rows] == [4, 0.5, 2, None]
    assert [r.ratio("b") for r in rows] == [None, 0.5, None, None]
    assert [r.share for r in rows] == [0.5, 0.5, 1, None]
    text = report.table(rows, ["stitch", "a", "b"])
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "| slow | batch=1 | 1 | 2.000 | 3.000 | 1.000 | 0.50 | 0.50 to 0.50 | 1.000 | 0.50 mem |" in text
    assert "* refused, stitch (1 thread): no operator" in text
    assert "* fast, b (batch=1 1 thread): outputs differ" in text
    assert not any(r.wrong for r in rows)
    off = Timing(problem="outputs differ", wrong=True)
    assert Row("light", "off", "", 1, None, {"stitch": off, "a": Timing([1], 1), "b": Timing([1], 1)}).wrong
    assert not Row("light", "off", "", 1, None, {"stitch": off, "a": off, "b": off}).wrong
    told = report.summary(rows)
    assert "1 thread: geometric mean of best peer / stitch 1.59 over 3 rows, exports 1.41 (2), shared 2.00 (1)" in told
    assert "over as many rows: a 2.29 (3), b 0.50 (1)." in told
    assert "Below 1.0 with 1 thread, 1 of 3: slow batch=1 (0.50)." in told
    assert "0.50 (geometric mean of 2), from 0.50 (fast batch=1) to 0.50" in told


def test_a_worker(network: Path, tmp_path: Path) -> None:
    worker = Worker("stitch", 1, sys.executable, tmp_path / "cache")
    try:
        with pytest.raises(Failed, match="nothing is loaded"):
            worker.ask("time", 0.01, 1)
        worker.ask("load", network)
        (y,) = worker.ask("outputs", {"ids": np.arange(8).reshape(2, 4), "unknown": ONE})
        assert y.shape == (2, 4, 10)
        assert len(worker.ask("time", 0.001, 3)) >= 3
    finally:
        worker.close()


def test_loading(network: Path, tmp_path: Path) -> None:
    feed = tmp_path / "feed"
    feed.write_bytes(pickle.dumps({"ids": np.zeros((1, 4), np.int64)}))
    found, refused = loading.measure(Subject("small", network, feed), ["stitch"], 1, sys.executable)
    assert refused == {}
    assert list(found) == [Kind("stitch"), Kind("stitch", True)]
    for starts in found.values():
        assert 0 < starts[0]["call"] < starts[0]["wall"] < 60
        assert starts[0]["peak"] > 1e7
        assert starts[0]["first"] > 0
    table = loading.lines("small", found)
    assert {line.count("|") for line in table} == {loading.HEADER.splitlines()[0].count("|")}
    text = loading.summary([{**found, Kind("other"): [{**found[Kind("stitch", True)][0]}]}])
    assert text == "other, no cache / stitch, second process over 1 models: time until loaded 1.00, peak memory 1.00."


def test_who_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    found, refused = loading.measure(Subject("bad", tmp_path / "bad.onnx", tmp_path), ["stitch"], 1, sys.executable)
    assert found == {}
    assert refused["stitch"].startswith("InvalidModel: ")


def test_problems_are_told_in_a_line() -> None:
    assert told(ValueError("Exception from core.cpp:1:\n\nthe rank is open\nmore")) == "ValueError: the rank is open"
    assert told(ValueError("nothing:")) == "ValueError: nothing:"
    assert told(ValueError()) == "ValueError: "
