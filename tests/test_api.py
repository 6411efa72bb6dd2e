"""`stitch.optimize` and what it returns, from the outside: what a user sees when things go right, and when not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import stitch
from stitch import errors, knobs
from stitch.runtime.executable import Executable

ROOT = Path(__file__).resolve().parent.parent
F32, I64 = TensorProto.FLOAT, TensorProto.INT64


def model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, np.ndarray] | None = None
) -> Any:
    held = [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def info(name: str, shape: list[Any], dtype: int = F32) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def masked() -> Any:
    """y = softmax(x + mask), z = the rows' sums; the batch is a symbol, the mask has it too."""
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["a"], "add"),
        helper.make_node("Softmax", ["a"], ["y"], "softmax"),
        helper.make_node("ReduceSum", ["a", "axis"], ["z"], "sum", keepdims=0),
    ]
    inputs = [info("x", ["batch", 6]), info("mask", ["batch", 6])]
    return model(nodes, inputs, [info("y", ["batch", 6]), info("z", ["batch"])], {"axis": np.array([1])})


def arrays(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((n, 6)).astype(np.float32) for name in ("x", "mask")}


def expected(feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    a = feeds["x"].astype(np.float64) + feeds["mask"]
    e = np.exp(a - a.max(-1, keepdims=True, initial=-np.inf))
    return e / e.sum(-1, keepdims=True), a.sum(-1)


def assert_right(results: list[np.ndarray], feeds: dict[str, np.ndarray]) -> None:
    for got, want in zip(results, expected(feeds), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.fixture(scope="module")
def session() -> stitch.CompiledModel:
    return stitch.optimize(masked(), cache=False)


# ------------------------------------------------------------------ giving a model, and running it


@pytest.mark.parametrize("form", ["path", "text", "bytes", "proto"])
@pytest.mark.parametrize("cache", [True, False])
def test_a_model_in_any_form(tmp_path: Path, form: str, cache: bool) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(masked(), path)
    given: Any = {"path": path, "text": str(path), "bytes": path.read_bytes(), "proto": masked()}[form]
    with knobs.using(cache_dir=tmp_path / "cache"):
        for _ in range(2):
            assert_right(stitch.optimize(given, cache=cache).run(None, arrays(3)), arrays(3))
    assert any((tmp_path / "cache").rglob("*.artifact")) == cache


def test_names_of_outputs(session: stitch.CompiledModel) -> None:
    y, z = session.run(None, arrays(4))
    np.testing.assert_array_equal(session.run(["z"], arrays(4))[0], z)
    again = session.run(["z", "y", "z"], arrays(4))
    assert [a.tobytes() for a in again] == [a.tobytes() for a in (z, y, z)]
    assert session.run([], arrays(4)) == []
    with pytest.raises(errors.StitchError, match=r"no output 'w'.*'y', 'z'"):
        session.run(["w"], arrays(4))


def test_calls(session: stitch.CompiledModel) -> None:
    feeds = arrays(3)
    for results in (session(feeds["x"], feeds["mask"]), session(feeds["x"], mask=feeds["mask"]), session(**feeds)):
        assert isinstance(results, list)
        assert_right(results, feeds)
    with pytest.raises(errors.UnknownInput):
        session(feeds["x"], feeds["mask"], feeds["x"])
    with pytest.raises(TypeError, match="twice"):
        session(feeds["x"], x=feeds["x"])
    with pytest.raises(errors.MissingInput, match="'mask'"):
        session(feeds["x"])
    one = stitch.optimize(
        model([helper.make_node("Neg", ["x"], ["y"])], [info("x", ["n"])], [info("y", ["n"])]), cache=False
    )
    alone = one(np.ones(3, np.float32))
    assert isinstance(alone, np.ndarray)


def test_outputs_of_the_caller(session: stitch.CompiledModel) -> None:
    y, z = np.full((5, 6), 7, np.float32), np.full(5, 7, np.float32)
    for given in ([y, z], [None, z], [y, None]):
        results = session.run(None, arrays(5), given)
        assert all(r is g for r, g in zip(results, given, strict=True) if g is not None)
        assert_right(results, arrays(5))
    bad: list[Any] = [
        np.empty((4, 6), np.float32),
        np.empty((5, 6)),
        np.empty((6, 5), np.float32).T,
        "y",
        np.empty((5, 6), np.float32),
    ]
    bad[-1].flags.writeable = False
    for wrong in bad:
        with pytest.raises(errors.InputError, match="'y'"):
            session.run(None, arrays(5), [wrong, None])
    with pytest.raises(errors.InputError):
        session.run(None, arrays(5), [None])
    assert_right(session.run(None, arrays(5)), arrays(5))


def test_metadata(session: stitch.CompiledModel) -> None:
    assert [(t.name, t.dtype, t.shape) for t in session.inputs] == [
        ("x", np.dtype(np.float32), ("batch", 6)), ("mask", np.dtype(np.float32), ("batch", 6)),
    ]  # fmt: skip
    assert [(t.name, t.shape) for t in session.outputs] == [("y", ("batch", 6)), ("z", ("batch",))]


def test_explanation(session: stitch.CompiledModel) -> None:
    told = session.explain().to_dict()
    assert {"kernels", "clusters", "native_nodes", "host_nodes", "bytes"} <= told.keys()
    assert len(told["kernels"]) == len(told["clusters"]) >= 1
    assert not told["host_nodes"]
    assert "softmax" in str(session.explain()).lower() or told["native_nodes"]


@pytest.mark.parametrize("kind", ["fortran", "strided", "reversed", "read-only", "unaligned", "big-endian", "list"])
def test_inputs_of_all_kinds(session: stitch.CompiledModel, kind: str) -> None:
    feeds = arrays(7)
    x = feeds["x"]
    given: Any = x.copy()
    match kind:
        case "fortran":
            given = np.asfortranarray(x)
        case "strided":
            given = np.repeat(x, 2, axis=1)[:, ::2]
        case "reversed":
            given = np.ascontiguousarray(x[::-1])[::-1]
        case "read-only":
            given.flags.writeable = False
        case "unaligned":
            raw = np.zeros(x.nbytes + 1, np.uint8)
            given = raw[1:].view(np.float32).reshape(x.shape)
            given[...] = x
        case "big-endian":
            given = x.astype(">f4")
        case "list":
            given = x
    before = given.tobytes()
    assert_right(session.run(None, feeds | {"x": given}), feeds)
    assert given.tobytes() == before, "an input was written to"


def test_zero_rows(session: stitch.CompiledModel) -> None:
    y, z = session.run(None, arrays(0))
    assert (y.shape, z.shape) == ((0, 6), (0,))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(session: stitch.CompiledModel, threads: int) -> None:
    team = stitch.optimize(masked(), cache=False, threads=threads)
    for got, want in zip(team.run(None, arrays(900)), session.run(None, arrays(900)), strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("threads", [0, -1, 5000, 1.0, True, "2"])
def test_a_team_of_a_size_that_makes_no_sense(threads: Any) -> None:
    """-1 went as far as the compiled code, which took it for the size of its scratch memory."""
    with pytest.raises(ValueError, match=f"threads is {threads!r}, but must be a whole number, 1 to 4096"):
        stitch.optimize(masked(), cache=False, threads=threads)
    with pytest.raises(ValueError, match="must be a whole number"):
        Executable(stitch.optimize(masked(), cache=False).artifact, threads)


# ------------------------------------------------------------------ what goes wrong


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    feeds: dict[str, Any] = dict(arrays(3))
    change(feeds)
    return feeds


MISTAKES: list[tuple[Callable[[dict[str, Any]], Any], type[errors.InputError], str]] = [
    (lambda f: f.pop("mask"), errors.MissingInput, "'mask' is missing.*'x', 'mask'"),
    (lambda f: f.update(masks=1), errors.UnknownInput, "no input 'masks'; did you mean 'mask'"),
    (lambda f: f.update(x=f["x"].astype(np.float64)), errors.WrongDtype, "'x' has dtype float64.*float32"),
    (lambda f: f.update(x=f["x"][0]), errors.WrongRank, r"'x' has rank 1, shape \(6,\).*rank 2, shape \(batch, 6\)"),
    (lambda f: f.update(x=f["x"][:, :5]), errors.WrongShape, "axis 1 of input 'x' is 5.*6"),
    (lambda f: f.update(mask=f["mask"][:2]), errors.SymbolConflict, "batch = 2.*'x' makes it 3"),
    (lambda f: f.update(x="text"), errors.InputError, "'x'"),
    (lambda f: f.update(x=None), errors.InputError, "'x'"),
]


@pytest.mark.parametrize("k", range(len(MISTAKES)))
def test_mistakes_are_told_and_do_no_harm(session: stitch.CompiledModel, k: int) -> None:
    change, kind, message = MISTAKES[k]
    for _ in range(2):  # before and after the shapes are known
        with pytest.raises(kind, match=message) as caught:
            session.run(None, broken(change))
        assert isinstance(caught.value, ValueError)
        assert_right(session.run(None, arrays(3)), arrays(3))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a\x12\x00", bytes(range(256))])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    for given in (path, content):
        with pytest.raises(errors.InvalidModel):
            stitch.optimize(given)


@pytest.mark.parametrize("cache", [True, False])
def test_files_that_are_not_there(tmp_path: Path, cache: bool) -> None:
    with pytest.raises(errors.InvalidModel, match="does not exist"):
        stitch.optimize(tmp_path / "none.onnx", cache=cache)
    with pytest.raises(errors.InvalidModel, match="directory"):
        stitch.optimize(tmp_path, cache=cache)


@pytest.mark.parametrize("cache", [True, False])
def test_files_without_end(tmp_path: Path, cache: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(errors.InvalidModel, match="is not a file"):
            stitch.optimize(path, cache=cache)


def test_sizes_may_be_numbers_of_numpy() -> None:
    stitch.optimize(masked(), cache=False, objective="memory", memory=1e9, sizes={"batch": np.int64(4)})
    with pytest.raises(errors.StitchError, match=r"the size of 'batch' is 4\.0"):
        stitch.optimize(masked(), cache=False, objective="memory", memory=1e9, sizes={"batch": 4.0})


def test_a_knob_that_is_no_target() -> None:
    with knobs.using(target="zilog"), pytest.raises(errors.InvalidKnob, match=r"STITCH_TARGET is 'zilog'.* no target"):
        stitch.optimize(masked(), cache=False)


def test_a_truncated_file(tmp_path: Path) -> None:
    data = masked().SerializeToString()
    for size in (10, len(data) // 2, len(data) - 3):
        with pytest.raises(errors.StitchError):
            stitch.optimize(data[:size], cache=False)


def test_an_unsupported_operator_is_named() -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], "strange", domain="com.example")
    graph = helper.make_graph([node], "g", [info("x", ["n"])], [info("y", ["n"])])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 3)]
    with pytest.raises(errors.UnsupportedOperator) as caught:
        stitch.optimize(helper.make_model(graph, opset_imports=opsets, ir_version=10), cache=False)
    assert (caught.value.operator, caught.value.domain, caught.value.opset) == ("Frobnicate", "com.example", 3)
    assert caught.value.advice
    for word in ("Frobnicate", "strange", "com.example", "3", caught.value.advice):
        assert word in str(caught.value)


def test_guards() -> None:
    """Axes of n and m elements are added: only equal ones will do."""
    added = model(
        [helper.make_node("Add", ["x", "y"], ["z"], "plus")], [info("x", ["n"]), info("y", ["m"])], [info("z", ["k"])]
    )
    compiled = stitch.optimize(added, cache=False)
    assert [t.shape for t in compiled.inputs] == [("n",), ("m",)], "in the model's own symbols"
    three = np.ones(3, np.float32)
    np.testing.assert_array_equal(compiled(three, three), three + three)
    for _ in range(2):
        with pytest.raises(errors.ConstraintViolated, match=r"n = m \(needed by Add 'plus'\), but n = 3, m = 4"):
            compiled(three, np.ones(4, np.float32))
        np.testing.assert_array_equal(compiled(three, three), three + three)


def test_a_condition_on_sizes_is_told() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], "fold")]
    made = model(nodes, [info("x", ["n", 3])], [info("y", ["k", 2])], {"shape": np.array([-1, 2])})
    fold = stitch.optimize(made, cache=False)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    for _ in range(2):
        np.testing.assert_array_equal(fold(x), x.reshape(-1, 2))
        with pytest.raises(errors.ConstraintViolated, match="fold") as caught:
            fold(x[:3])
        assert caught.value.values["n"] == 3


def test_shapes_may_be_given() -> None:
    fixed = stitch.optimize(masked(), cache=False, shapes={"x": [4, 6]})
    assert [t.shape for t in fixed.inputs] == [(4, 6), (4, 6)]
    assert fixed.outputs[0].shape == (4, 6)
    assert_right(fixed.run(None, arrays(4)), arrays(4))
    with pytest.raises(errors.WrongShape):
        fixed.run(None, arrays(3))
    named = stitch.optimize(masked(), cache=False, shapes={"x": ["rows", None]})
    assert named.inputs[0].shape[0] == "rows"
    with pytest.raises(errors.UnknownInput):
        stitch.optimize(masked(), cache=False, shapes={"w": [1]})
    with pytest.raises(errors.InvalidModel, match="rank"):
        stitch.optimize(masked(), cache=False, shapes={"x": [1]})


def test_indices_out_of_range_are_brought_into_it() -> None:
    """ONNX calls them an error. Here the nearest element is taken, and negative ones count from the end: wrong
    numbers, but never memory that is not the table's."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], "look", axis=0)]
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    look = stitch.optimize(
        model(nodes, [info("ids", ["n"], I64)], [info("y", ["n", 3])], {"table": table}), cache=False
    )
    ids = np.array([0, 3, -1, -4, 4, 10**15, -5, -(10**15), np.iinfo(np.int64).max, np.iinfo(np.int64).min])
    got = look(ids)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got[:4], table[[0, 3, 3, 0]])
    assert all(row.tolist() in table.tolist() for row in got)


# ------------------------------------------------------------------ threads and processes


def test_runs_overlap(session: stitch.CompiledModel) -> None:
    """Four threads with different shapes, on one model with a team of its own."""
    shared = stitch.optimize(masked(), cache=False, threads=2)
    wanted = {n: session.run(None, arrays(n, n)) for n in (1, 17, 300, 2000)}
    wrong: list[object] = []

    def work(n: int) -> None:
        feeds = arrays(n, n)
        for _ in range(60):
            try:
                got = shared.run(None, feeds)
            except Exception as problem:
                wrong.append(problem)
                return
            if any(a.tobytes() != b.tobytes() for a, b in zip(got, wanted[n], strict=True)):
                wrong.append(n)

    team = [threading.Thread(target=work, args=(n,)) for n in wanted]
    for t in team:
        t.start()
    for t in team:
        t.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_runs_the_model() -> None:
    compiled = stitch.optimize(masked(), cache=False, threads=2)
    want = compiled.run(None, arrays(2000))  # the team exists now
    child = os.fork()
    if child == 0:
        code = 1
        try:
            got = compiled.run(None, arrays(2000))
            code = 0 if all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True)) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_right(compiled.run(None, arrays(2000)), arrays(2000))


def python(program: str, *arguments: object, **environ: str) -> str:
    """What a fresh interpreter prints; it must not say anything else."""
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_importing_is_silent_and_lazy() -> None:
    heavy = "{'onnx', 'sympy', 'llvmlite', 'stitch.compiler', 'stitch.codegen', 'google.protobuf', 'onnxruntime'}"
    assert python(f"import stitch, sys; print(sorted({heavy} & set(sys.modules)))") == "[]"


RUN = """
import sys, numpy, stitch
x = numpy.ones((2, 6), numpy.float32)
y, z = stitch.optimize(sys.argv[1]).run(None, {"x": x, "mask": x})
print(float(z.sum()), *(name in sys.modules for name in ("stitch.compiler", "onnx", "sympy")))
"""


def test_a_second_process_does_not_compile(tmp_path: Path) -> None:
    onnx.save(masked(), tmp_path / "m.onnx")
    cache = str(tmp_path / "cache")
    assert python(RUN, tmp_path / "m.onnx", STITCH_CACHE_DIR=cache).startswith("24.0 True True")
    assert python(RUN, tmp_path / "m.onnx", STITCH_CACHE_DIR=cache) == "24.0 False False False"


# ------------------------------------------------------------------ the cache


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each compilation that took place."""
    from stitch import compiler

    seen: list[object] = []
    plain = compiler.compile

    def compile(*args: Any) -> Any:
        seen.append(args)
        return plain(*args)

    monkeypatch.setattr(compiler, "compile", compile)
    return seen


def test_the_cache_hits(tmp_path: Path, compiled: list[object]) -> None:
    with knobs.using(cache_dir=tmp_path):
        for _ in range(3):
            assert_right(stitch.optimize(masked()).run(None, arrays(3)), arrays(3))
        assert len(compiled) == 1
        stitch.optimize(masked(), cache=False)
        assert len(compiled) == 2
        stitch.optimize(masked(), threads=2)  # not a matter of compilation
        assert len(compiled) == 2
    for change in ({"schemes": "independent"}, {"l2_bytes": 4096}):
        with knobs.using(cache_dir=tmp_path, **change):
            before = len(compiled)
            assert_right(stitch.optimize(masked()).run(None, arrays(3)), arrays(3))
            assert len(compiled) == before + 1, f"{change} is not part of the key"
    with knobs.using(cache_dir=tmp_path):
        before = len(compiled)
        stitch.optimize(masked(), shapes={"x": [4, 6]})
        stitch.optimize(masked(), target="sse2")
        assert len(compiled) == before + 2


def test_another_model_is_another_entry(tmp_path: Path, compiled: list[object]) -> None:
    path = tmp_path / "m.onnx"
    with knobs.using(cache_dir=tmp_path / "cache"):
        for k, op in enumerate(("Neg", "Abs", "Neg")):
            made = model([helper.make_node(op, ["x"], ["y"])], [info("x", ["n"])], [info("y", ["n"])])
            onnx.save(made, path)
            got = stitch.optimize(path)(np.array([-2], np.float32))
            assert got == 2
            assert len(compiled) == min(k + 1, 2)


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100, None])
def test_a_broken_cache_is_no_obstacle(tmp_path: Path, compiled: list[object], damage: bytes | None) -> None:
    with knobs.using(cache_dir=tmp_path):
        stitch.optimize(masked())
        found = [f for f in tmp_path.rglob("*") if f.is_file()]
        assert found
        for f in found:
            f.write_bytes(f.read_bytes()[:-100] if damage is None else damage)
        assert_right(stitch.optimize(masked()).run(None, arrays(3)), arrays(3))
        assert_right(stitch.optimize(masked()).run(None, arrays(3)), arrays(3))
        assert len(compiled) == 2, "mended by the second"


def test_a_useless_directory_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "closed" / "below", Path("/proc/none")):
        with knobs.using(cache_dir=place):
            assert_right(stitch.optimize(masked()).run(None, arrays(3)), arrays(3))


def test_external_data(tmp_path: Path, compiled: list[object]) -> None:
    """Found next to the model; when it changes, the artifact is not used any more."""
    path = tmp_path / "m.onnx"

    def save(value: float) -> None:
        weight = np.full((64, 64), value, np.float32)
        made = model(
            [helper.make_node("Mul", ["x", "w"], ["y"])],
            [info("x", ["n", 64, 64])],
            [info("y", ["n", 64, 64])],
            {"w": weight},
        )
        (tmp_path / "w.bin").unlink(missing_ok=True)
        onnx.save(made, path, save_as_external_data=True, location="w.bin", size_threshold=0)

    x = np.ones((1, 64, 64), np.float32)
    with knobs.using(cache_dir=tmp_path / "cache"):
        save(2)
        assert np.all(stitch.optimize(path)(x) == np.float32(2))
        assert np.all(stitch.optimize(path)(x) == np.float32(2))
        assert len(compiled) == 1
        save(3)
        os.utime(tmp_path / "w.bin", ns=(1, 1))  # whatever the resolution of the clock
        assert np.all(stitch.optimize(path)(x) == np.float32(3))
        assert len(compiled) == 2
        with pytest.raises(errors.InvalidModel, match="not as bytes"):
            stitch.optimize(path.read_bytes())
        (tmp_path / "w.bin").unlink()
        with pytest.raises(errors.InvalidModel, match=r"w\.bin"):
            stitch.optimize(path)
