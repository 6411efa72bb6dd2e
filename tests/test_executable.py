"""Artifacts with code written by hand: how they run, what they refuse, and how they are kept in files."""

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stitch import plan
from stitch.errors import (
    ConstraintViolated,
    InputError,
    ResourceError,
    StitchError,
    SymbolConflict,
    WrongDtype,
    WrongRank,
    WrongShape,
)
from stitch.plan import Artifact, BadFile, Guard, HostStep, NativeStep, Port, Slot
from stitch.runtime import cpu, executable, host
from stitch.runtime.cache import Cache
from stitch.runtime.executable import Executable

F32 = np.dtype(np.float32)

# out[i] = in[i] + in[i] for one row in each task; scratch memory keeps the row in between.
DOUBLE = """
declare void @stitch_parallel(ptr, ptr, ptr, i64, i64)
declare i64 @stitch_team_size(ptr)

define internal void @rows(ptr %args, i64 %begin, i64 %end, i64 %worker) {
entry:
  %x = load ptr, ptr %args
  %y_at = getelementptr ptr, ptr %args, i64 1
  %y = load ptr, ptr %y_at
  %n_at = getelementptr i64, ptr %args, i64 2
  %n = load i64, ptr %n_at
  %arena_at = getelementptr ptr, ptr %args, i64 3
  %arena = load ptr, ptr %arena_at
  %offset = mul i64 %worker, %n
  %scratch = getelementptr float, ptr %arena, i64 %offset
  br label %row
row:
  %r = phi i64 [%begin, %entry], [%r_next, %end_row]
  %rows = icmp slt i64 %r, %end
  br i1 %rows, label %fill, label %out
fill:
  %i = phi i64 [0, %row], [%i_next, %fill_one]
  %fill_on = icmp slt i64 %i, %n
  br i1 %fill_on, label %fill_one, label %copy
fill_one:
  %start = mul i64 %r, %n
  %at = add i64 %start, %i
  %p = getelementptr float, ptr %x, i64 %at
  %s = getelementptr float, ptr %scratch, i64 %i
  %v = load float, ptr %p
  %w = fadd float %v, %v
  store float %w, ptr %s
  %i_next = add i64 %i, 1
  br label %fill
copy:
  %j = phi i64 [0, %fill], [%j_next, %copy_one]
  %copy_on = icmp slt i64 %j, %n
  br i1 %copy_on, label %copy_one, label %end_row
copy_one:
  %start2 = mul i64 %r, %n
  %at2 = add i64 %start2, %j
  %s2 = getelementptr float, ptr %scratch, i64 %j
  %q = getelementptr float, ptr %y, i64 %at2
  %u = load float, ptr %s2
  store float %u, ptr %q
  %j_next = add i64 %j, 1
  br label %copy
end_row:
  %r_next = add i64 %r, 1
  br label %row
out:
  ret void
}

define i64 @entry(ptr %team, ptr %dims, ptr %slots, ptr %arena) {
  %b = load i64, ptr %dims
  %n_at = getelementptr i64, ptr %dims, i64 1
  %n = load i64, ptr %n_at
  %x = load ptr, ptr %slots
  %y_at = getelementptr ptr, ptr %slots, i64 2
  %y = load ptr, ptr %y_at
  %args = alloca [4 x i64]
  store ptr %x, ptr %args
  %a1 = getelementptr i64, ptr %args, i64 1
  store ptr %y, ptr %a1
  %a2 = getelementptr i64, ptr %args, i64 2
  store i64 %n, ptr %a2
  %a3 = getelementptr i64, ptr %args, i64 3
  store ptr %arena, ptr %a3
  call void @stitch_parallel(ptr %team, ptr @rows, ptr %args, i64 %b, i64 1)
  %some = icmp sgt i64 %b, 3
  %all = icmp sgt i64 %n, 3
  %bad = and i1 %some, %all
  %code = zext i1 %bad to i64
  ret i64 %code
}

; arena = 4 n team; what axis 0 of mask must be: b + 1; guard n = 3 (n - 3) + 3 - 2 (n - 3); y: b, n
define void @layout(ptr %dims, ptr %out) {
  %b = load i64, ptr %dims
  %n_at = getelementptr i64, ptr %dims, i64 1
  %n = load i64, ptr %n_at
  %team_at = getelementptr i64, ptr %dims, i64 2
  %team = load i64, ptr %team_at
  %row = mul i64 %n, 4
  %arena = mul i64 %row, %team
  store i64 %arena, ptr %out
  %o1 = getelementptr i64, ptr %out, i64 1
  %expected = add i64 %b, 1
  store i64 %expected, ptr %o1
  %o2 = getelementptr i64, ptr %out, i64 2
  store i64 %n, ptr %o2
  %five = icmp eq i64 %n, 5
  %right = select i1 %five, i64 6, i64 %n
  %o3 = getelementptr i64, ptr %out, i64 3
  store i64 %right, ptr %o3
  %o4 = getelementptr i64, ptr %out, i64 4
  store i64 %b, ptr %o4
  %o5 = getelementptr i64, ptr %out, i64 5
  store i64 %n, ptr %o5
  ret void
}
"""

# f = x + x (n); a host step keeps some of f (m); y = kept + constants[0]
MIDDLE = """
define internal void @add(ptr %x, ptr %c, i64 %stride, ptr %y, i64 %n) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %body]
  %more = icmp slt i64 %i, %n
  br i1 %more, label %body, label %out
body:
  %p = getelementptr float, ptr %x, i64 %i
  %k = mul i64 %i, %stride
  %r = getelementptr float, ptr %c, i64 %k
  %q = getelementptr float, ptr %y, i64 %i
  %v = load float, ptr %p
  %w = load float, ptr %r
  %z = fadd float %v, %w
  store float %z, ptr %q
  %next = add i64 %i, 1
  br label %loop
out:
  ret void
}

define internal ptr @slot(ptr %slots, i64 %i) {
  %at = getelementptr ptr, ptr %slots, i64 %i
  %p = load ptr, ptr %at
  ret ptr %p
}

define i64 @first(ptr %team, ptr %dims, ptr %slots, ptr %arena) {
  %n = load i64, ptr %dims
  %x = call ptr @slot(ptr %slots, i64 0)
  %f = call ptr @slot(ptr %slots, i64 5)
  call void @add(ptr %x, ptr %x, i64 1, ptr %f, i64 %n)
  ret i64 0
}

define void @first_layout(ptr %dims, ptr %out) {
  %n = load i64, ptr %dims
  store i64 0, ptr %out
  %o1 = getelementptr i64, ptr %out, i64 1
  store i64 %n, ptr %o1
  ret void
}

define i64 @second(ptr %team, ptr %dims, ptr %slots, ptr %arena) {
  %m_at = getelementptr i64, ptr %dims, i64 1
  %m = load i64, ptr %m_at
  %kept = call ptr @slot(ptr %slots, i64 6)
  %y = call ptr @slot(ptr %slots, i64 1)
  %c = call ptr @slot(ptr %slots, i64 3)
  call void @add(ptr %kept, ptr %c, i64 0, ptr %y, i64 %m)
  ret i64 0
}

; guard m = m, false if m = 1
define void @second_layout(ptr %dims, ptr %out) {
  %m_at = getelementptr i64, ptr %dims, i64 1
  %m = load i64, ptr %m_at
  store i64 100, ptr %out
  %o1 = getelementptr i64, ptr %out, i64 1
  store i64 %m, ptr %o1
  %one = icmp eq i64 %m, 1
  %right = select i1 %one, i64 2, i64 %m
  %o2 = getelementptr i64, ptr %out, i64 2
  store i64 %right, ptr %o2
  %o3 = getelementptr i64, ptr %out, i64 3
  store i64 %m, ptr %o3
  ret void
}
"""


def double() -> Artifact:
    return Artifact(
        target="",
        symbols=("batch", "n"),
        inputs=(Port("x", "float32", ("batch", "n")), Port("mask", "float32", ("batch + 1", "n", 2))),
        outputs=(Port("y", "float32", ("batch", "n")),),
        slots=(Slot("float32", 2, "input"), Slot("float32", 3, "input"), Slot("float32", 2, "output")),
        bindings=((0, 0, 0), (1, 0, 1)),
        steps=(NativeStep("entry", "layout", (2,), (Guard("n", "n + n // 5 % 2", "Reshape 'r'"),), ((1, 0),)),),
        code=cpu.compile_ir(DOUBLE),
        errors=("index 9 of Gather 'g' is out of range",),
        report={"clusters": [{"name": "a", "reasons": ["x"]}], "cost": 1.5},
    )


def keep(attrs: Any, values: np.ndarray, threshold: np.ndarray, absent: None) -> tuple[np.ndarray, ...]:
    assert absent is None
    assert not threshold.flags.writeable
    if attrs["fail"]:
        raise IndexError("of all things")
    kept = values[values > threshold]
    return np.flip(kept), np.array(["unused"], object)  # not contiguous


def middle(fail: bool = False) -> Artifact:
    constants = np.arange(32, dtype=np.float32) + 10
    attrs = {"fail": fail, "weights": np.ones((2, 2), np.float16), "to": F32, "axes": (1, 2), "eps": 1e-5}
    return Artifact(
        target="",
        symbols=("n", "m"),
        inputs=(Port("x", "float32", ("n",)),),
        outputs=(Port("y", "float32", ("m",)), Port("kept", "float32", ("m",))),
        slots=(
            Slot("float32", 1, "input"),
            Slot("float32", 1, "output"),
            Slot("float32", 1, "output"),
            Slot("uint8", 1, "constant", 0, (128,)),
            Slot("float32", 0, "constant", 4, ()),
            Slot("float32", 1, "frame"),
            Slot("float32", 1, "frame"),
        ),
        bindings=((0, 0, 0),),
        steps=(
            NativeStep("first", "first_layout", (5,)),
            HostStep("keep", attrs, (5, 4, -1), (6, -1), ((0, 0, 1),), ("k", "Compress")),
            HostStep("same", {}, (6,), (2,)),
            NativeStep("second", "second_layout", (1,), (Guard("m", "m + 0"),)),
        ),
        code=cpu.compile_ir(MIDDLE),
        constants=constants,
    )


FUNCTIONS: dict[str, host.Function] = {"keep": keep, "same": lambda attrs, x: (x,)}


@pytest.fixture(scope="module", params=["direct", "portable"])
def run(request: pytest.FixtureRequest) -> Executable:
    """`double`, with and without knowledge of how arrays lie in memory."""
    loaded = Executable(double(), threads=3)
    assert loaded._direct
    loaded._direct = request.param == "direct"
    return loaded


def inputs(batch: int, n: int) -> list[np.ndarray]:
    x = np.arange(batch * n, dtype=np.float32).reshape(batch, n)
    return [x, np.zeros((batch + 1, n, 2), np.float32)]


@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 7), (2, 1000), (300, 3), (0, 4), (2, 0), (3, 6000)])
def test_symbolic_sizes(run: Executable, batch: int, n: int) -> None:
    given = inputs(batch, n)
    for _ in range(3):
        (y,) = run.run(given)
        assert y.dtype == F32
        assert np.array_equal(y, 2 * given[0])
    own = np.full((batch, n), -1, np.float32)
    assert run.run(given, [own])[0] is own
    assert np.array_equal(own, 2 * given[0])
    (y,) = run.run(given, [None])
    assert np.array_equal(y, 2 * given[0])
    (y,) = run.run(tuple(given), (own,))  # type: ignore[arg-type]
    assert y is own


def test_large_results_begin_at_a_cache_line(run: Executable) -> None:
    run.run(inputs(2, 70_000))
    (y,) = run.run(inputs(2, 70_000))
    assert y.ctypes.data % 64 == 0


class Special(np.ndarray):
    pass


@pytest.mark.parametrize("kind", ["transposed", "strided", "swapped", "misaligned", "readonly", "subclass", "pickled"])
def test_inputs_of_all_kinds(run: Executable, kind: str) -> None:
    x, mask = inputs(3, 7)
    given: np.ndarray = x
    match kind:
        case "transposed":
            given = x.T.copy().T
        case "strided":
            given = np.repeat(x, 2, axis=1)[:, ::2]
        case "swapped":
            given = x.astype(x.dtype.newbyteorder())
        case "misaligned":
            given = np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
            assert not given.flags.aligned
        case "readonly":
            given.flags.writeable = False
        case "subclass":
            given = x.view(Special)
        case "pickled":
            given = pickle.loads(pickle.dumps(x))
    before = given.copy()
    for _ in range(2):
        (y,) = run.run([given, mask])
        assert type(y) is np.ndarray
        assert np.array_equal(y, 2 * x)
    assert np.array_equal(given, before)


def test_refused_inputs(run: Executable) -> None:
    x, mask = inputs(2, 7)
    run.run([x, mask])
    with pytest.raises(WrongDtype, match="'x' has dtype float64, but the model says float32"):
        run.run([x.astype(np.float64), mask])
    with pytest.raises(WrongDtype):
        run.run([x.tolist(), mask])
    with pytest.raises(WrongRank, match=r"'x' has rank 1, shape \(7,\), but the model says rank 2"):
        run.run([x[0], mask])
    with pytest.raises(WrongShape, match="axis 2 of input 'mask' is 1, but the model says 2"):
        run.run([x, mask[:, :, :1]])
    with pytest.raises(WrongShape, match=r"axis 0 of input 'mask' is 2, but the model says batch \+ 1 = 3"):
        run.run([x, mask[:2]])
    with pytest.raises(SymbolConflict, match="axis 1 of input 'mask' makes n = 6, but axis 1 of input 'x' makes it 7"):
        run.run([x, mask[:, :6]])
    with pytest.raises(ConstraintViolated, match=r"n = n \+ n // 5 % 2 \(needed by Reshape 'r'\), but n = 5, .* = 6"):
        run.run(inputs(2, 5))
    with pytest.raises(InputError, match="1 inputs are given, but the model has 2"):
        run.run([x])


def test_refused_outputs(run: Executable) -> None:
    given = inputs(2, 7)
    y = np.zeros((2, 7), np.float32)
    fixed = y.copy()
    fixed.flags.writeable = False
    cases: list[tuple[Any, str]] = [
        ([y[:1]], r"has the shape \(1, 7\), but it will be \(2, 7\)"),
        ([y.astype(np.int32)], "has dtype int32, but the model says float32"),
        ([y.astype(y.dtype.newbyteorder())], "has dtype >f4"),
        ([fixed], "not contiguous, aligned and writeable"),
        ([np.zeros((7, 2), np.float32).T], "not contiguous, aligned and writeable"),
        ([y.tolist()], "is a list"),
        ([y, y], "2 outputs are given, but the model has 1"),
        ([], "0 outputs are given"),
    ]
    for own, message in cases:
        with pytest.raises(InputError, match=message):
            run.run(given, own)
    assert not y.any()


def test_errors_of_the_code(run: Executable) -> None:
    for _ in range(3):
        with pytest.raises(InputError, match="index 9 of Gather 'g' is out of range"):
            run.run(inputs(4, 4))
    assert np.array_equal(run.run(inputs(2, 4))[0], 2 * inputs(2, 4)[0])


def test_dtype_without_a_numpy_name() -> None:
    half = np.dtype(ml_dtypes.bfloat16)
    artifact = replace(
        double(),
        inputs=(Port("x", "bfloat16", ("batch", "n")), Port("mask", "bool", ("batch + 1", "n", 2))),
        slots=(Slot("bfloat16", 2, "input"), Slot("bool", 3, "input"), Slot("float32", 2, "output")),
    )
    loaded = Executable(artifact, threads=1)
    x, mask = inputs(2, 3)
    wide = np.zeros((2, 6), half)[:, :3].copy()
    for _ in range(2):
        assert loaded.run([np.resize(wide, (2, 3)), mask.astype(bool)])[0].shape == (2, 3)
    with pytest.raises(WrongDtype, match="float32, but the model says bfloat16"):
        loaded.run([x, mask.astype(bool)])


def test_steady_state_allocates_nothing(run: Executable) -> None:
    given, own = inputs(50, 3), [np.empty((50, 3), np.float32)]
    run.run(given, own)
    (frame,) = run._frames.free
    before = frame, frame.arena.address, frame.arena.capacity, len(run._plans)
    for _ in range(20):
        run.run(given, own)
    (frame,) = run._frames.free
    assert (frame, frame.arena.address, frame.arena.capacity, len(run._plans)) == before


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executable, "MOST_PLANS", 4)
    loaded = Executable(double(), threads=1)
    for n in (1, 2, 3, 6, 7, 8, 9, 10, 11, 12):
        for size in (1, n):
            assert np.array_equal(loaded.run(inputs(2, size))[0], 2 * inputs(2, size)[0])
        assert len(loaded._plans) <= 4
    assert ((2, 1), (3, 1, 2)) in loaded._plans  # the one that is used all the time


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_runs(threads: int) -> None:
    loaded = Executable(double(), threads=threads)
    start = threading.Barrier(4)

    def work(seed: int) -> bool:
        random = np.random.default_rng(seed)
        start.wait()
        right = True
        for _ in range(300):
            given = inputs(int(random.integers(0, 4)), int(random.choice([1, 2, 3, 7, 40, 500])))
            right &= np.array_equal(loaded.run(given)[0], 2 * given[0])
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert len(loaded._frames.free) <= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork(run: Executable) -> None:
    given = inputs(300, 3)
    assert np.array_equal(run.run(given)[0], 2 * given[0])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            right = [np.array_equal(run.run(inputs(b, 3))[0], 2 * inputs(b, 3)[0]) for b in (300, 3, 301)]
            status = 0 if all(right) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(run.run(given)[0], 2 * given[0])


# Host steps.


@pytest.mark.parametrize("stored", [False, True])
def test_host_step_in_the_middle(tmp_path: Path, stored: bool) -> None:
    artifact = middle()
    if stored:
        plan.save(artifact, tmp_path / "a")
        artifact = plan.load(tmp_path / "a")
    loaded = Executable(artifact, threads=2, functions=FUNCTIONS)
    for n in (20, 9, 5, 20):
        x = np.arange(n, dtype=np.float32)
        expected = np.flip((2 * x)[2 * x > 11])
        y, kept = loaded.run([x])
        assert np.array_equal(y, expected + 10)
        assert np.array_equal(kept, expected)
        own = np.empty_like(y), np.empty_like(kept)
        assert all(a is b for a, b in zip(loaded.run([x], list(own)), own, strict=True))
        assert np.array_equal(own[0], expected + 10)
        assert np.array_equal(own[1], expected)


def test_host_step_that_goes_wrong() -> None:
    x = np.arange(20, dtype=np.float32)
    with pytest.raises(StitchError, match="operator Compress of node 'k' failed: of all things") as caught:
        Executable(middle(fail=True), functions=FUNCTIONS).run([x])
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(StitchError, match="operator Compress of node 'k' needs keep"):
        Executable(middle(), functions={}).run([x])
    with pytest.raises(StitchError, match="keep gave float64 of rank 1 instead of float32 of rank 1"):
        Executable(middle(), functions={"keep": lambda *_: (x.astype(np.float64), x)}).run([x])
    with pytest.raises(StitchError, match="gave 1 results instead of 2"):
        Executable(middle(), functions={"keep": lambda *_: (x,)}).run([x])


def test_conditions_on_symbols_that_a_host_step_binds() -> None:
    loaded = Executable(middle(), functions=FUNCTIONS)
    with pytest.raises(ConstraintViolated, match="m = m \\+ 0, but m = 1"):
        loaded.run([np.arange(7, dtype=np.float32)])
    with pytest.raises(InputError, match=r"output 'y' has the shape \(3,\), but it will be \(4,\)"):
        loaded.run([np.arange(10, dtype=np.float32)], [np.zeros(3, np.float32), None])
    assert len(loaded._frames.free) == 1


def test_only_host_steps_and_strings() -> None:
    artifact = Artifact(
        target="",
        symbols=("n",),
        inputs=(Port("x", "object", ("n",)),),
        outputs=(Port("y", "object", ("n",)),),
        slots=(Slot("object", 1, "input"), Slot("object", 1, "output")),
        bindings=((0, 0, 0),),
        steps=(HostStep("upper", {}, (0,), (1,)),),
    )
    loaded = Executable(artifact, functions={"upper": lambda _, x: (np.array([s.upper() for s in x], object),)})
    assert loaded.run([np.array(["a", "bc"])])[0].tolist() == ["A", "BC"]
    assert loaded.run([np.array([], object)])[0].shape == (0,)


# Files.


def same(a: Artifact, b: Artifact) -> None:
    for name in ("target", "symbols", "inputs", "outputs", "slots", "bindings", "code", "errors", "report"):
        assert getattr(a, name) == getattr(b, name), name
    assert bytes(memoryview(a.constants).cast("B")) == bytes(memoryview(b.constants).cast("B"))
    for s, t in zip(a.steps, b.steps, strict=True):
        match s, t:
            case HostStep(), HostStep():
                assert replace(s, attrs={}) == replace(t, attrs={})
                assert repr(s.attrs) == repr(t.attrs)
            case _:
                assert s == t


@pytest.mark.parametrize(("size", "page"), [(1, 4096), ((2 << 20) - 1, 4096), (2 << 20, 2 << 20), (5 << 20, 2 << 20)])
def test_constants_in_files_begin_at_pages_of_their_size(tmp_path: Path, size: int, page: int) -> None:
    """Linux keeps a file in huge pages where it is that large, but maps them only if they lie evenly in it."""
    data = np.arange(size, dtype=np.uint8)
    artifact = Artifact("", (), (), (), (Slot("uint8", 1, "constant", 0, (size,)),), (), (), b"", data)
    plan.save(artifact, tmp_path / "a")
    assert (tmp_path / "a").read_bytes()[-size:] == data.tobytes()
    assert ((tmp_path / "a").stat().st_size - size) % page == 0
    assert np.array_equal(np.frombuffer(plan.load(tmp_path / "a").constants, np.uint8), data)


def test_files(tmp_path: Path) -> None:
    for number, artifact in enumerate((double(), middle())):
        artifact.check()
        path = tmp_path / "new" / str(number)
        plan.save(artifact, path)
        plan.save(artifact, path)  # over the old one
        loaded = plan.load(path)
        same(artifact, loaded)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        path.unlink()
        same(artifact, loaded)  # still mapped
    assert list((tmp_path / "new").iterdir()) == []
    constants = np.frombuffer(loaded.constants, np.uint8)
    assert constants.ctypes.data % 4096 == 0
    assert not constants.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 2.5, float("inf"), "text", b"\0\xff", (1, (2, [3])), {"a": {"$array": 1}}, F32,
        np.dtype(ml_dtypes.bfloat16), np.arange(6).reshape(2, 3), np.zeros((0, 2), np.float16), np.float32(1.5),
        np.array(["a", b"b", 3], object), np.array(7), np.ones(2, ml_dtypes.bfloat16), np.dtype(object),
    ],
)  # fmt: skip
def test_attributes_in_files(tmp_path: Path, value: Any) -> None:
    artifact = Artifact("", (), (), (), (), (), (HostStep("f", {"v": value}, (), ()),))
    plan.save(artifact, tmp_path / "a")
    (step,) = plan.load(tmp_path / "a").steps
    assert isinstance(step, HostStep)
    found = step.attrs["v"]
    assert type(found) is type(value)
    assert repr(found) == repr(value)


def test_attributes_that_cannot_be_kept(tmp_path: Path) -> None:
    artifact = Artifact("", (), (), (), (), (), (HostStep("f", {"v": object()}, (), ()),))
    with pytest.raises(TypeError, match="cannot keep a object"):
        plan.save(artifact, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    plan.save(middle(), path)
    good = path.read_bytes()
    lengths = [0, 3, 40, 60, 200, len(good) // 2, len(good) - 1]
    damaged = [good[:length] for length in lengths] + [b"x" * len(good), good[:8] + b"\2" + good[9:]]
    code_at = good.index(b"\x7fELF") if b"\x7fELF" in good else 60
    places = (0, 8, 12, 17, 30, 41, 49, 60, 400, code_at + 100)
    damaged += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in places]
    damaged += [good + b"more"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(BadFile):
            plan.load(path)
    with pytest.raises(OSError, match="No such file"):
        plan.load(tmp_path / "missing")


def test_contradictions_are_found() -> None:
    good = double()
    wrong = [
        replace(good, slots=good.slots[::-1]),
        replace(good, slots=(*good.slots, Slot("float32", 1, "frame"))),
        replace(good, slots=(*good.slots, Slot("uint8", 1, "constant", 0, (1,)))),
        replace(good, bindings=((0, 0, 1),)),
        replace(good, steps=()),
    ]
    for artifact in wrong:
        with pytest.raises(ValueError, match="not an artifact"):
            artifact.check()
    with pytest.raises(ResourceError):
        Executable(replace(good, code=b"not code"))


# The cache.


def test_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 20)
    assert cache.load("key") is None
    assert cache.store("key", middle())
    found = cache.load("key")
    assert found is not None
    same(found, middle())
    assert cache.load("other") is None
    assert cache.store("../a key that is no name", double())
    assert cache.load("../a key that is no name") is not None
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert cache.store_bytes("key", b"data")
    assert cache.load_bytes("key") == b"data"


def test_cache_forgets_damaged_files(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 20)
    cache.store("key", middle())
    cache.store_bytes("key", b"data")
    for file in list((tmp_path / "cache").iterdir()):
        file.write_bytes(file.read_bytes()[:-1])
    assert cache.load("key") is None
    assert cache.load_bytes("key") is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_evicts_the_least_recently_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3500)
    for age, key in enumerate(["c", "b", "a"]):
        cache.store_bytes(key, bytes(1000))
        os.utime(tmp_path / f"{key}.bytes", (1000 - age, 1000 - age))
    assert cache.load_bytes("a")  # was the oldest
    stale, fresh = tmp_path / ".x.tmp", tmp_path / ".y.tmp"
    stale.touch()
    fresh.touch()
    os.utime(stale, (time.time() - 1e5,) * 2)
    assert cache.store_bytes("d", bytes(1000))
    assert {path.name for path in tmp_path.iterdir()} == {"a.bytes", "c.bytes", "d.bytes", ".y.tmp"}
    assert not cache.store_bytes("e", bytes(4000))
    assert not Cache(tmp_path, 0).store_bytes("f", b"")


def test_useless_directories(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o777)
    for directory in (file, file / "below", public, Path("/proc/none"), None):
        cache = Cache(directory, 1 << 20)
        assert not cache.store("key", double())
        assert not cache.store_bytes("key", b"data")
        assert cache.load("key") is None
        assert cache.load_bytes("key") is None


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    cache = Cache(tmp_path / "cache", 1 << 20)
    monkeypatch.setattr(os, "write", full)
    assert not cache.store("key", double())
    monkeypatch.undo()
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_of_several_threads(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 6000)
    artifact = middle()

    def work(number: int) -> None:
        for turn in range(15):
            cache.store(str((number + turn) % 3), artifact)
            found = cache.load(str(turn % 3))
            if found is not None:
                same(found, artifact)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
