"""`explain()`: where every node of a model goes, which reasons there are, and a golden text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import stitch
from benchmarks import architectures
from stitch import explain, knobs
from stitch.errors import StitchError
from stitch.explain import REASONS, SCHEMES, Explanation

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"


def block() -> onnx.ModelProto:
    return architectures.encoder("block", layers=1, width=64, heads=4, vocabulary=100, positions=32)


def explained(model: onnx.ModelProto, **changes: Any) -> Explanation:
    with knobs.using(l2_bytes=1 << 20, **changes):
        found: Explanation = stitch.optimize(model, cache=False).explain()
        return found


@pytest.fixture(scope="module")
def of_block() -> Explanation:
    return explained(block())


@pytest.fixture(scope="module")
def of_convolutions() -> Explanation:
    return explained(architectures.mobilenet(size=32, stem=8, blocks=((1, 8, 1, 1), (2, 8, 2, 2)), head=16, classes=10))


def everything() -> dict[str, onnx.ModelProto]:
    """Models with nodes of every kind: native, host, folded, unused; a function; a scatter."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    index = helper.make_tensor("i", TensorProto.INT64, [1, 1], [0])
    one = helper.make_tensor("o", TensorProto.FLOAT, [1, 8], [1.0] * 8)
    local = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"], name="sum")],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip

    def model(*nodes: onnx.NodeProto, functions: tuple[onnx.FunctionProto, ...] = ()) -> onnx.ModelProto:
        graph = helper.make_graph(nodes, "small", [x], [y], [index, one])
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)

    node = helper.make_node
    return {
        "host": model(node("NonZero", ["x"], ["z"]), node("Cast", ["z"], ["y"], to=TensorProto.FLOAT)),
        "unused": model(node("Exp", ["x"], ["e"]), node("Identity", ["x"], ["t"]), node("Neg", ["t"], ["y"])),
        "function": model(node("Twice", ["x"], ["t"], domain="own"), node("Neg", ["t"], ["y"]), functions=(local,)),
        "scatter": model(node("ScatterND", ["x", "i", "o"], ["t"]), node("Exp", ["t"], ["y"])),
        "nothing": model(node("Identity", ["x"], ["y"])),
        "shapes": model(
            node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["c"]), node("Add", ["c", "x"], ["y"])
        ),
    }


@pytest.mark.parametrize("name", [*everything(), "block", "convolutions"])
def test_every_node_of_the_model_is_somewhere_once(name: str, request: pytest.FixtureRequest) -> None:
    if name in everything():
        model = everything()[name]
        report = explained(model).to_dict()
    else:
        report = request.getfixturevalue(f"of_{name}").to_dict()
        model = block() if name == "block" else architectures.mobilenet(32, 8, ((1, 8, 1, 1), (2, 8, 2, 2)), 16, 10)
    native = [label.split(" ", 1)[1].strip("'") for label in report["native_nodes"]]
    elsewhere = [n["node"] for n in (*report["host_nodes"], *report["folded_nodes"])]
    found = [*native, *elsewhere]
    assert len(found) == len(set(found))
    labels = [n.name or f"{n.op_type}_{i}" for i, n in enumerate(model.graph.node)]
    assert {n for n in labels if n not in found} <= {"Twice_0"}  # whose body is there instead
    assert set(native) == {n.split(" ", 1)[1].strip("'") for c in report["clusters"] for n in c["nodes"]}


def test_where_nodes_go() -> None:
    reports = {name: explained(model).to_dict() for name, model in everything().items()}
    assert reports["host"]["host_nodes"] == [{"node": "NonZero_0", "operator": "NonZero", "reason": "data-dependent"}]
    assert reports["host"]["native_nodes"] == ["Cast 'Cast_1'"]
    assert [n["reason"] for n in reports["unused"]["folded_nodes"]] == ["vanished", "vanished"]
    assert reports["function"]["native_nodes"] == ["Add 'Twice_0/sum'", "Neg 'Neg_1'"]
    assert ["opaque"] in [c["reasons"] for c in reports["scatter"]["clusters"]]
    assert {b["reason"] for b in reports["scatter"]["boundaries"]} == {"beside-opaque"}
    assert {(n["node"], n["reason"]) for n in reports["shapes"]["folded_nodes"]} >= {("Shape_0", "constant")}


def test_reasons_are_a_closed_set(of_block: Explanation, of_convolutions: Explanation) -> None:
    reports = [of_block, of_convolutions, *(explained(m) for m in everything().values())]
    for schemes in ("independent", "independent,local", "independent,local,regional"):
        reports.append(explained(block(), schemes=schemes))
    for report in (r.to_dict() for r in reports):
        used = {x for c in report["clusters"] for x in c["reasons"]}
        used |= {n["reason"] for n in (*report["boundaries"], *report["host_nodes"], *report["folded_nodes"])}
        assert used <= set(REASONS)
        assert {e["scheme"] for c in report["clusters"] for e in c["edges"]} <= set(SCHEMES)


def test_schemes_that_are_switched_off_carry_nothing(of_block: Explanation) -> None:
    def used(found: Explanation) -> set[str]:
        return {e["scheme"] for c in found.to_dict()["clusters"] for e in c["edges"]}

    assert {"local", "regional"} <= used(of_block)
    alone = explained(block(), schemes="independent")
    assert used(alone) <= {"independent"}
    assert "switched-off" in {b["reason"] for b in alone.to_dict()["boundaries"]}
    assert len(alone.to_dict()["kernels"]) > 2 * len(of_block.to_dict()["kernels"])
    assert "regional" not in used(explained(block(), schemes="independent,local,global"))


def test_a_softmax_keeps_its_row(of_block: Explanation) -> None:
    softmax = next(c for c in of_block.to_dict()["clusters"] if any(n.startswith("Softmax") for n in c["nodes"]))
    passes = {(e["from"].split()[0], e["to"].split()[0]): (e["scheme"], e["place"]) for e in softmax["edges"]}
    assert passes["reduce_max", "sub"] == ("regional", "register")
    assert passes["sub", "exp"] == ("local", "register")


def test_bytes_become_numbers(of_block: Explanation) -> None:
    free, fixed = of_block.to_dict()["bytes"], of_block.at(batch=2, seq=5).to_dict()["bytes"]
    assert all(isinstance(v, str) for v in free.values())
    assert all(isinstance(v, int) for v in fixed.values())
    assert fixed["intermediate"] < fixed["walked"] < fixed["one_by_one"]
    total = sum(k["bytes"] for k in of_block.at(batch=2, seq=5).to_dict()["kernels"])
    assert total == fixed["walked"]
    partly = of_block.at(batch=2).to_dict()["bytes"]["walked"]
    assert "seq" in partly
    assert "batch" not in partly
    assert of_block.at(batch=2).at(seq=5).to_dict() == of_block.at(batch=2, seq=5).to_dict()
    assert "%" in str(of_block.at(batch=2, seq=5))


def test_memory_is_what_a_run_takes() -> None:
    model = stitch.optimize(block(), cache=False, threads=2)
    feeds = {p.name: np.zeros((2, 5), p.dtype) for p in model.inputs}
    model.run(None, feeds)
    found = model.explain().at(batch=2, seq=5).to_dict()["memory"]
    reserved = model._executable._planner.plan(tuple(x.shape for x in feeds.values())).arena
    assert found["peak"]["arena"] + 2 * found["peak"]["scratch"] == reserved
    assert sum(found["weights"].values()) == model.artifact.constants.nbytes
    assert "at batch=2, seq=5, as in the last run" in str(model.explain())


def test_the_peak_of_memory(of_block: Explanation) -> None:
    free, fixed = of_block.to_dict()["memory"], of_block.at(batch=2, seq=5).to_dict()["memory"]
    assert free["peak"] is None
    assert isinstance(free["steps"][0]["arena"], str)
    peak = fixed["peak"]
    assert peak["least"] == sum(v["bytes"] for v in peak["held"])
    assert peak["least"] <= peak["arena"] <= 1.1 * peak["least"] < peak["without_reuse"]
    assert [v["bytes"] for v in peak["held"]] == sorted((v["bytes"] for v in peak["held"]), reverse=True)
    (values,) = (s["values"] for s in fixed["steps"])
    assert peak["without_reuse"] == sum(v["bytes"] for v in values)
    assert peak["in_place"] == sum(1 for v in values if v["replaces"])
    born = {v["value"]: v for v in values}
    for v in values:
        if v["replaces"]:
            assert born[v["replaces"]]["last"] == v["first"]
            assert born[v["replaces"]]["bytes"] == v["bytes"]


def test_unknown_names_are_errors(of_block: Explanation) -> None:
    with pytest.raises(StitchError, match="no symbol 'sequence'; its symbols are 'batch', 'seq'"):
        of_block.at(sequence=3)
    with pytest.raises(StitchError, match="give 0 or more"):
        of_block.at(seq=-1)
    with pytest.raises(StitchError, match="no kernel 'x'"):
        of_block.kernel("x")


def test_every_kernel_can_be_shown(of_block: Explanation, of_convolutions: Explanation) -> None:
    for found in (of_block, of_convolutions, *(explained(m) for m in everything().values())):
        for k in found.to_dict()["kernels"]:
            assert found.kernel(k["name"]).startswith(f"kernel {k['name']}: ")
        assert str(found)


def test_the_dict_is_a_copy_and_json(of_block: Explanation) -> None:
    of_block.to_dict()["kernels"].clear()
    assert json.loads(json.dumps(of_block.to_dict()))["kernels"]


def test_an_artifact_without_a_report_is_explained() -> None:
    assert str(Explanation({})).startswith("0 ONNX nodes: 0 in 0 kernels")


def test_explaining_a_cached_model_needs_no_compiler(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(everything()["unused"], path)
    program = f"""
import sys
from stitch import knobs
with knobs.using(cache_dir={str(tmp_path / "cache")!r}):
    import stitch
    print(stitch.optimize({str(path)!r}).explain())
print([m for m in ("onnx", "sympy", "stitch.graph", "stitch.report") if m in sys.modules])
"""
    command = [sys.executable, "-c", program]
    found = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False) for _ in range(2)]
    assert [f.stderr for f in found] == ["", ""]
    assert found[0].stdout.splitlines()[:-1] == found[1].stdout.splitlines()[:-1]
    assert found[1].stdout.splitlines()[-1] == "[]"


def test_golden_text(of_block: Explanation, update_golden: bool) -> None:
    """The whole text for a transformer layer: read a change to it as a change to what is stitched."""
    text = f"{of_block}\n\n{of_block.at(batch=1, seq=16)}\n\n{of_block.kernel(_most(of_block))}\n"
    path = GOLDEN / "explain_block.txt"
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def _most(found: explain.Explanation) -> str:
    name: str = max(found.to_dict()["clusters"], key=lambda c: len(c["edges"]))["kernel"]
    return name
