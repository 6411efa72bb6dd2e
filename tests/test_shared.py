"""Operators that are shared by the CPU sets that a user names: what is cut, what `explain()` says, and the results."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import stitch
from stitch import compiler, importer, placed
from stitch import target as targets
from stitch.codegen import assemble
from stitch.cost import Rates
from stitch.decision import Decision, Objective
from stitch.devices import Device, parse_all
from stitch.pipelined import PlacedModel
from stitch.shared import Team, way
from stitch.topology import Board, Cluster, Link
from tests import test_golden

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU only")

AVX512 = targets.parse("avx512")
CORES = tuple((k,) for k in range(4))
ONE_CACHE = Board("one", str(AVX512), (Cluster("p", CORES),))
UNLIKE = Board(
    "unlike", str(AVX512), (Cluster("p", CORES[:2]), Cluster("q", CORES[2:], 410)), (Link("p", "q", 0.0, math.inf),)
)
TWO_CACHES = Board("two", str(AVX512), (Cluster("p", CORES[:2]), Cluster("q", CORES[2:])), (Link("p", "q", 5e-6, 1e9),))


def network() -> onnx.ModelProto:
    """A convolution, whose windows overlap; a matmul of few rows and many columns; a softmax over a small vector."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["e"]),
        helper.make_node("Softmax", ["e"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, "h", "v_"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2048])
    weights = [weight("v", 64, 16, 3, 3), weight("w", 64, 2048)]
    graph = helper.make_graph(nodes, "network", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


SIZES = {"n": 1, "h": 56, "v_": 56}


def decided(texts: list[str], board: Board = ONE_CACHE, objective: Objective = "latency", **sizes: int) -> Decision:
    """For a machine that is only described, so that nothing depends on the one at hand."""
    stitched = compiler.cut(importer.load(network()), AVX512)
    found = parse_all(texts, board)
    return placed.decide(stitched, AVX512, found, board, objective, {**SIZES, **sizes}, Rates.of(AVX512))


def test_what_is_cut() -> None:
    """A convolution of a large image in rows, a product of one row in columns."""
    stitched = compiler.cut(importer.load(network()), AVX512)
    lowered = assemble.lower(stitched, AVX512)
    found = {}
    for kernel in stitched.kernels:
        heavy = [p.contraction for p in kernel.phases if p.contraction is not None]
        if heavy and kernel.chain is None:
            found[heavy[0].node.origin.operator] = way(lowered[kernel.name].program.phases[0], SIZES)
    assert found == {"Conv": "rows", "MatMul": "columns"}


@pytest.mark.parametrize(
    ("name", "devices", "board"),
    [
        ("equal", ["cpu:0", "cpu:1"], ONE_CACHE),
        ("unlike", ["cpu:0-1", "cpu:2-3"], UNLIKE),
        ("stopped", ["cpu:0", "cpu:1@0.8", "cpu:2@0.4"], ONE_CACHE),
    ],
)
def test_explain(name: str, devices: list[str], board: Board, update_golden: bool) -> None:
    text = f"{decided(devices, board)}\n"
    test_golden.compare(test_golden.FOLDER / f"explain_shared_{name}.txt", text, update_golden)


def test_a_slower_core_gets_less_of_each_phase() -> None:
    equal, slow = decided(["cpu:0", "cpu:1"]), decided(["cpu:0", "cpu:2"], UNLIKE)
    for a, b in zip(equal.phases, slow.phases, strict=True):
        if a.shared and b.shared:
            assert b.pieces[1] / sum(b.pieces) < a.pieces[1] / sum(a.pieces)
        assert b.seconds >= a.seconds
    alone = dict(slow.alternatives)
    assert slow.seconds < alone["everything on cpu:0"] < alone["everything on cpu:2"]
    assert slow.seconds < alone["one team on all 2 cores, in equal shares"]


def test_a_core_that_is_stopped_most_of_the_time_is_no_help() -> None:
    decision = decided(["cpu:0", "cpu:1@0.4"])
    assert (decision.phases, [s.cpus for s in decision.stages]) == ((), [(0,)])
    text = str(decision)
    assert "one team on all 2 cores, in equal shares" in text
    assert decision.idle == ("cpu:1@0.4",)
    assert "nothing     cpu:1@0.4" in text
    assert decision.seconds == pytest.approx(dict(decision.alternatives)["everything on cpu:0"])


def test_the_fastest_leads_whatever_its_place() -> None:
    decision = decided(["cpu:2", "cpu:0"], UNLIKE)
    assert decision.devices == ("cpu:2", "cpu:0")
    assert [s.cpus for s in decision.stages if s.helpers] == [(0,)]
    assert all(p.pieces[1] for p in decision.phases)


def test_what_takes_no_time_is_not_shared() -> None:
    assert decided(["cpu:0", "cpu:1"], h=1, v_=1).phases == ()
    alone = [p for p in decided(["cpu:0", "cpu:1"]).phases if not p.shared]
    assert alone
    assert all(p.pieces == (1, 0) and p.seconds == p.alone[0] for p in alone)


def test_another_cache_makes_sharing_dearer() -> None:
    near, far = decided(["cpu:0", "cpu:1"]), decided(["cpu:0", "cpu:2"], TWO_CACHES)
    assert sum(p.shared for p in far.phases) < sum(p.shared for p in near.phases)
    assert near.seconds < far.seconds


def test_stages_that_share_nothing_are_as_they_were() -> None:
    decision = decided(["cpu:0", "cpu:1@0.001"])
    assert (decision.phases, [s.helpers for s in decision.stages]) == ((), [()])
    assert "shared out" not in str(decision)


def test_throughput_shares_nothing() -> None:
    decision = decided(["cpu:0", "cpu:1"], objective="throughput")
    assert decision.phases == ()
    assert not any(s.helpers for s in decision.stages)


@pytest.mark.parametrize(
    "devices", [["cpu:0", "cpu:1"], ["cpu:0-1", "cpu:2-3"], ["cpu:0", "cpu:1", "cpu:2@0.97"]], ids=str
)
def test_tables_deal_what_was_decided(devices: list[str]) -> None:
    stitched = compiler.cut(importer.load(network()), AVX512)
    found = parse_all(devices, ONE_CACHE)
    decision, tables = placed.place(stitched, AVX512, found, ONE_CACHE, "latency", SIZES, Rates.of(AVX512))
    (stage,) = decision.stages
    members = [1] * len(stage.cpus) + [1] * sum(map(len, stage.helpers))
    for phase in decision.phases:
        words = tables[phase.kernel][phase.number]
        if words == (1,):
            assert phase.pieces[0] == 1 == len(stage.cpus)
            continue
        size, chunks, *weights = words
        assert size == len(members) == len(weights)
        if phase.shared:
            assert chunks == sum(phase.pieces)
            per = iter(weights)
            dealt = [sum(next(per) for _ in cpus) for cpus in (stage.cpus, *stage.helpers)]
            taken = [n for d, n in zip(found, phase.pieces, strict=True) if d.cpus in (stage.cpus, *stage.helpers)]
            assert [d * sum(taken) for d in dealt] == [n * sum(dealt) for n in taken]
        else:
            assert all(bool(w) == (k < len(stage.cpus)) for k, w in enumerate(weights))


def test_a_team_without_kernels_does_nothing() -> None:
    team = Team()
    assert (team.saved("k0"), team.helpers(["k0"]), team.tables(["k0"], [1]), team.phases(["k0"])) == (0.0, [], {}, [])


def test_a_decision_with_helpers_survives_as_text() -> None:
    decision = decided(["cpu:0", "cpu:2"], UNLIKE)
    assert decision.phases
    assert Decision.of_json(decision.to_json()) == decision


# ------------------------------------------------------------------ on this machine


def unlike(capacities: tuple[int, int]) -> Board:
    """This machine, as if its first two CPUs were of these capacities and had one cache."""
    clusters = tuple(Cluster(f"c{k}", ((CPUS[k],),), c) for k, c in enumerate(capacities))
    return Board("here", str(AVX512), clusters, (Link("c0", "c1", 0.0, math.inf),))


@two_cpus
@settings(max_examples=12)
@given(st.integers(300, 1024), st.booleans(), st.sampled_from([1, 2, 5]), st.integers(8, 40))
def test_the_same_bits_as_on_one_core(capacity: int, second: bool, n: int, h: int) -> None:
    """Placed for one size, run at others, led by whichever set is the faster."""
    board = unlike((1024, capacity) if second else (capacity, 1024))
    with mock.patch("stitch.detection.detect", return_value=board):
        model = stitch.optimize(network(), devices=[f"cpu:{c}" for c in CPUS[:2]], sizes=SIZES, cache=False)
    assert isinstance(model, PlacedModel)
    assert any(s.helpers for s in model.explain().stages)
    plain = stitch.optimize(network(), threads=1, cache=False)
    for size in ((1, 16, 56, 56), (n, 16, h, h + 1)):
        x = np.random.default_rng(h).standard_normal(size).astype(np.float32)
        (got,), (wanted,) = model.run(None, {"x": x}), plain.run(None, {"x": x})
        assert got.tobytes() == wanted.tobytes()
    model.close()


@two_cpus
def test_a_shared_model_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [f"cpu:{c}" for c in CPUS[:2]]
    x = np.random.default_rng(0).standard_normal((1, 16, 56, 56)).astype(np.float32)
    with stitch.knobs.using(cache_dir=tmp_path, cache_bytes=1 << 30):
        first = stitch.optimize(network(), devices=devices, sizes=SIZES)
        monkeypatch.setattr("stitch.compiler.compile_parts", None)
        again = stitch.optimize(network(), devices=devices, sizes=SIZES)
    assert isinstance(again, PlacedModel)
    assert again.explain() == first.explain()
    assert again.explain().phases
    np.testing.assert_array_equal(again.run(None, {"x": x})[0], first.run(None, {"x": x})[0])


@two_cpus
def test_helpers_stay_on_their_cpus_and_leave_with_the_model() -> None:
    def threads() -> set[int]:
        return {int(t) for t in os.listdir("/proc/self/task")}

    before = threads()
    model = stitch.optimize(network(), devices=[f"cpu:{c}" for c in CPUS[:2]], sizes=SIZES, cache=False)
    assert isinstance(model, PlacedModel)
    x = np.zeros((1, 16, 56, 56), np.float32)
    here = os.sched_getaffinity(0)
    wanted = [set(c) for s in model.explain().stages for c in s.helpers]
    for _ in range(500):  # a helper goes to its CPUs when it wakes first, which beside other work may be late
        model.run(None, {"x": x})
        fresh = threads() - before
        if [os.sched_getaffinity(t) for t in fresh] == wanted:
            break
    assert [os.sched_getaffinity(t) for t in fresh] == wanted
    assert os.sched_getaffinity(0) == here, "the caller is back where it was"
    results = [y for (y,) in model.stream({"x": x} for _ in range(5))]
    assert all(r.tobytes() == results[0].tobytes() for r in results)
    model.close()
    assert not fresh & threads()


def unavailable(cpu: int) -> Any:
    return {"devices": [f"cpu:{CPUS[0]}", f"cpu:{cpu}"], "sizes": SIZES, "cache": False}


def test_helpers_that_cannot_be_had() -> None:
    with pytest.raises(stitch.errors.UnavailableCpus):
        stitch.optimize(network(), **unavailable(4711))


def test_a_device_is_what_it_was() -> None:
    """Sharing is for several devices: one set of two cores is a team of two, as before."""
    decision = decided(["cpu:0-1"])
    assert decision.phases == ()
    assert decision.stages[0].helpers == ()
    assert isinstance(parse_all(["cpu:0-1"], ONE_CACHE)[0], Device)
