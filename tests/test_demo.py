"""The demonstration, on small models: it runs, notices wrong answers, and draws in any terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import stitch
from benchmarks import architectures, chart, demo
from stitch import evaluate, importer

ROWS = {"batch=1": {"stitch": 2.0, "other": 4.0}, "batch=2": {"stitch": 3.0, "other": 1.5}}


@pytest.fixture
def block(tmp_path: Path) -> str:
    path = tmp_path / "block.onnx"
    onnx.save(architectures.encoder("block", layers=1, width=32, heads=2, vocabulary=50, positions=64), path)
    return str(path)


@pytest.mark.parametrize("name", ["encoder", "mobilenet"])
def test_architectures_are_valid_and_not_flat(name: str) -> None:
    if name == "encoder":
        model = architectures.encoder("tiny", layers=2, width=32, heads=2, vocabulary=50, positions=32)
        mask = np.tril(np.ones((2, 7), np.int64), 4)
        feeds: demo.Feeds = {"input_ids": np.arange(14).reshape(2, 7), "attention_mask": mask}
    else:
        model = architectures.mobilenet(size=32, stem=8, blocks=((1, 8, 1, 1), (2, 8, 2, 2)), head=16, classes=10)
        feeds = {"image": np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)}
    onnx.checker.check_model(model, full_check=True)
    wanted = evaluate.evaluate(importer.load(model), feeds)[0]
    got = stitch.optimize(model, cache=False).run(None, feeds)[0]
    assert demo.difference(got, wanted) < 1e-5
    assert 0.1 < wanted.std() < 10
    assert not np.allclose(wanted[0], wanted[1])


def test_full_size() -> None:
    assert architectures.parameters(architectures.mobilenet()) == 3_487_818


def test_the_whole_demonstration(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([block, "--size", "seq=5", "--seconds", "0.01", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for part in ("at batch=1, seq=5", "LayerNormalization", "kernels", "stitch agrees with without stitching"):
        assert part in shown
    assert "milliseconds per inference" in shown
    assert (tmp_path / "out" / "block.png").exists() or "no picture: matplotlib" in shown


def test_without_onnxruntime_numpy_is_the_reference(
    block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "onnxruntime", lambda *_: None)
    assert demo.main([block, "--seconds", "0.01"]) == 0
    assert "stitch agrees with numpy" in capsys.readouterr().out


def test_a_wrong_answer_is_noticed(
    block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = demo.Engine("liar", lambda feeds: [np.zeros((1, 64, 32), np.float32)])
    monkeypatch.setattr(demo, "onnxruntime", lambda *_: wrong)
    assert demo.main([block, "--seconds", "0.01"]) == 1
    assert "stitch DIFFERS FROM liar" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.onnx"], "there is no file 'nowhere.onnx'"),
        (["BLOCK", "--size", "sequence=3"], "no symbol 'sequence'; its symbols are batch, seq"),
        (["LSTM"], "operator Nonsense"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], complaint: str, block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Nonsense", ["x"], ["y"], name="n")], "g", [x], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    ])  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "bad.onnx")
    names = {"BLOCK": block, "LSTM": str(tmp_path / "bad.onnx")}
    assert demo.main([names.get(a, a) for a in arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("demo: ")
    assert complaint in shown
    assert shown.count("\n") == 1


def test_sizes_are_guessed_from_names_and_places() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "image_height"])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", "sequence_length", "m"])
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("a", "b")]
    nodes = [helper.make_node("Exp", ["x"], ["a"]), helper.make_node("Exp", ["z"], ["b"])]
    graph = helper.make_graph(nodes, "g", [x, z], outputs)
    compiled = stitch.optimize(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), cache=False)
    assert demo.guesses(compiled) == {"n": 1, "h": 224, "image_height": 224, "sequence_length": 64, "m": demo.OTHERWISE}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [0.0, 1.0], np.inf),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([1.0], [1.0, 2.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_difference(a: list[float], b: list[float], expected: float) -> None:
    assert demo.difference(np.array(a), np.array(b)) == expected


def test_the_chart_in_the_terminal() -> None:
    shown = chart.text("title", ROWS)
    assert shown.splitlines()[3] == "  stitch  " + "█" * 22 + " 2.00 ms"
    assert shown.splitlines()[4] == "  other   " + "█" * 44 + " 4.00 ms  (2.00 times as long)"
    assert chart.text("title", ROWS, plain=True).isascii()
    assert chart.text("title", {"s": {"stitch": 0.0}})


def test_which_terminals_are_plain() -> None:
    assert chart.is_plain("utf-8", {"TERM": "dumb"})
    assert chart.is_plain("ascii", {"TERM": "xterm"})
    assert chart.is_plain(None, {})
    assert not chart.is_plain("UTF-8", {"TERM": "xterm"})


def test_numbers_have_three_digits() -> None:
    assert [chart.number(x) for x in (0.01234, 1.234, 12.34, 123.4, 1234.0, 0.0)] == [
        "0.0123", "1.23", "12.3", "123", "1234", "0",
    ]  # fmt: skip


def test_expressions_in_input_shapes() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["past", 4])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["past+seq", 4])
    w = helper.make_tensor_value_info("w", TensorProto.FLOAT, ["seq", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Concat", ["x", "w"], ["c"], axis=0), helper.make_node("Add", ["c", "z"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x, z, w], [y]), opset_imports=[helper.make_opsetid("", 17)]
    )
    compiled = stitch.optimize(model, cache=False)
    assert sorted(demo.guesses(compiled)) == ["past", "seq"]
    feeds = demo.random_feeds(compiled, {"past": 3, "seq": 2})
    assert feeds["z"].shape == (5, 4)
    assert compiled.run(None, feeds)[0].shape == (5, 4)
