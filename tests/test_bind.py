"""Calls that are bound to arrays: what they read and write, what is refused, and how long they keep things alive."""

import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stitch
from stitch.errors import (
    ConstraintViolated,
    InputError,
    MissingInput,
    StitchError,
    SymbolConflict,
    UnknownInput,
    WrongDtype,
    WrongRank,
    WrongShape,
)
from stitch.runtime.executable import Executable
from stitch.runtime.memory import HUGE, Arena
from tests.test_api import arrays, assert_right, masked
from tests.test_executable import FUNCTIONS, double, inputs, middle

F32 = np.dtype(np.float32)


@pytest.fixture(scope="module", params=["direct", "portable"])
def run(request: pytest.FixtureRequest) -> Executable:
    """y = 2 x, with and without knowledge of how arrays lie in memory."""
    loaded = Executable(double(), threads=3)
    assert loaded._direct
    loaded._direct = request.param == "direct"
    return loaded


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 7), (300, 3), (0, 4), (2, 0), (3, 6000)])
@pytest.mark.parametrize("own", [True, False])
def test_memory_is_read_and_written_as_it_is_then(run: Executable, batch: int, n: int, own: bool) -> None:
    x, mask = inputs(batch, n)
    y = np.full((batch, n), -1, F32) if own else None
    call = run.bind([x, mask], [y] if own else None)
    assert not own or np.all(call.outputs[0] == -1), "nothing has run yet"
    first = call()
    (result,) = first
    assert result.shape == x.shape
    assert y is None or result is y
    for k in range(3):
        x += k
        result[...] = -1
        assert call() is first is call.outputs
        assert first[0] is result
        assert np.array_equal(result, 2 * x)


def test_each_binding_has_its_own_memory(run: Executable) -> None:
    """Also beside plain runs, with the same shapes and others."""
    given = [inputs(3, 7), inputs(3, 7), inputs(3, 500)]
    for k, (x, _) in enumerate(given):
        x += 100 * k
    bound = [run.bind(pair) for pair in given]
    for _ in range(3):
        for pair, call in zip(given, bound, strict=True):
            assert np.array_equal(run.run(inputs(2, 3))[0], 2 * inputs(2, 3)[0])
            assert np.array_equal(call()[0], 2 * pair[0])


def test_a_large_result_begins_at_a_cache_line(run: Executable) -> None:
    assert run.bind(inputs(2, 70_000)).outputs[0].ctypes.data % 64 == 0


def test_the_list_is_the_callers_to_change(run: Executable) -> None:
    x, mask = inputs(3, 7)
    call = run.bind([x, mask])
    (y,) = call()
    call.outputs.clear()
    x += 1
    call()
    assert np.array_equal(y, 2 * x)


# What is refused.


@pytest.mark.parametrize("kind", ["transposed", "strided", "swapped", "misaligned", "list", "buffer"])
def test_inputs_that_would_have_to_be_copied(run: Executable, kind: str) -> None:
    x, mask = inputs(3, 7)
    given: Any = {
        "transposed": x.T.copy().T,
        "strided": np.repeat(x, 2, axis=1)[:, ::2],
        "swapped": x.astype(x.dtype.newbyteorder()),
        "misaligned": np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(F32).reshape(x.shape),
        "list": list(x),
        "buffer": memoryview(x),  # type: ignore[arg-type]
    }[kind]
    assert np.array_equal(run.run([given, mask])[0], 2 * x)
    with pytest.raises(InputError, match=r"'x' cannot be bound, only copied.*contiguous"):
        run.bind([given, mask])


def test_inputs_that_need_no_copy(run: Executable) -> None:
    class Special(np.ndarray):
        pass

    x, mask = inputs(3, 7)
    fixed = x.copy()
    fixed.flags.writeable = False
    for given in (fixed, x.view(Special), pickle.loads(pickle.dumps(x)), x[1:]):
        zeros = np.zeros(given.shape, F32)
        for own in (None, zeros, pickle.loads(pickle.dumps(zeros))):
            (y,) = run.bind([given, mask[: len(given) + 1]], [own])()
            assert np.array_equal(y, 2 * np.asarray(given))
            assert own is None or y is own


def test_refused_inputs(run: Executable) -> None:
    x, mask = inputs(2, 7)
    refused: list[tuple[list[Any], type[InputError], str]] = [
        ([x.astype(np.float64), mask], WrongDtype, "'x' has dtype float64, but the model says float32"),
        ([x[0], mask], WrongRank, "'x' has rank 1"),
        ([x, mask[:, :, :1]], WrongShape, "axis 2 of input 'mask' is 1, but the model says 2"),
        ([x, mask[:2]], WrongShape, "axis 0 of input 'mask' is 2"),
        ([x, mask[:, :6]], SymbolConflict, "axis 1 of input 'mask' makes n = 6"),
        (inputs(2, 5), ConstraintViolated, "n = 5"),
        ([x], InputError, "1 inputs are given, but the model has 2"),
    ]
    for given, kind, message in refused:
        for way in (run.run, run.bind):
            with pytest.raises(kind, match=message):
                way(given)


def test_refused_outputs(run: Executable) -> None:
    given = inputs(2, 7)
    y = np.zeros((2, 7), F32)
    fixed = y.copy()
    fixed.flags.writeable = False
    refused: list[tuple[Any, str]] = [
        ([y[:1]], r"has the shape \(1, 7\), but it will be \(2, 7\)"),
        ([y.astype(np.int32)], "has dtype int32"),
        ([fixed], "not contiguous, aligned and writeable"),
        ([np.zeros((7, 2), F32).T], "not contiguous, aligned and writeable"),
        ([y.tolist()], "is a list"),
        ([y, y], "2 outputs are given, but the model has 1"),
        ([], "0 outputs are given"),
        ([given[0]], "output 'y' overlaps input 'x'"),
        ([given[1].reshape(-1)[3:17].reshape(2, 7)], "output 'y' overlaps input 'mask'"),
    ]
    for own, message in refused:
        with pytest.raises(InputError, match=message):
            run.bind(given, own)


def test_errors_of_the_code(run: Executable) -> None:
    call, good = run.bind(inputs(4, 4)), run.bind(inputs(2, 4))
    for _ in range(3):
        with pytest.raises(InputError, match="index 9 of Gather 'g' is out of range"):
            call()
        assert np.array_equal(good()[0], 2 * inputs(2, 4)[0])


# How long things live.


def test_a_binding_keeps_what_it_needs() -> None:
    """Even the bare function that it calls does."""
    x, mask = np.ones((3, 7), F32), inputs(3, 7)[1]
    call = Executable(double(), threads=2).bind([x, mask], [np.zeros((3, 7), F32)])
    want = 2 * x
    with pytest.raises(ValueError, match="referenced"):
        x.resize((1, 1))
    bare: Callable[[], list[np.ndarray]] = call.__call__
    del call, x, mask
    gc.collect()
    for _ in range(3):
        rubbish = [np.full((3, 7), np.nan, F32) for _ in range(100)]
        assert np.array_equal(bare()[0], want)
        del rubbish


@pytest.mark.usefixtures("no_gc")
def test_nothing_is_kept_by_cycles(run: Executable) -> None:
    x, mask = inputs(3, 7)
    call = run.bind([x, mask])
    call()
    dead = weakref.ref(call), weakref.ref(x), weakref.ref(call.outputs[0])
    del call, x, mask
    assert [ref() for ref in dead] == [None] * 3


def test_steady_state_allocates_nothing() -> None:
    call = Executable(double(), threads=2).bind(inputs(50, 3))
    call()
    tracemalloc.start()
    try:
        call()
        before = tracemalloc.get_traced_memory()[0]
        references = sys.getrefcount(call.outputs)
        tracemalloc.reset_peak()
        for _ in range(1000):
            call()
        now, peak = tracemalloc.get_traced_memory()
        more = sys.getrefcount(call.outputs) - references
    finally:
        tracemalloc.stop()
    assert max(now, peak) - before < 1000
    assert more == 0


# Threads and processes.


def test_different_bindings_at_once() -> None:
    loaded = Executable(double(), threads=2)
    start = threading.Barrier(4)

    def work(seed: int) -> bool:
        x, mask = inputs(seed % 3 + 1, 500)
        call = loaded.bind([x, mask])
        start.wait()
        right = True
        for k in range(500):
            x += k
            right &= np.array_equal(call()[0], 2 * x)
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_one_binding_from_several_threads(run: Executable) -> None:
    """One runs at a time: none writes to the scratch memory of another, or misses its turn."""
    x, mask = inputs(3, 20_000)
    call = run.bind([x, mask])
    start = threading.Barrier(4)

    def work(_: int) -> None:
        start.wait()
        for _ in range(100):
            call()

    for _ in range(3):
        x += 1
        call.outputs[0][...] = -1
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert np.array_equal(call.outputs[0], 2 * x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_during_a_call(run: Executable) -> None:
    """In the child the call is free, though nobody there will ever end the one that was going on."""
    import signal

    x, mask = inputs(3, 300_000)
    call = run.bind([x, mask])
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            call()

    neighbour = threading.Thread(target=work)
    neighbour.start()
    try:
        for _ in range(5):
            time.sleep(0.002)
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    signal.alarm(30)
                    call.outputs[0][...] = -1
                    status = 0 if np.array_equal(call()[0], 2 * x) else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        neighbour.join()
    assert np.array_equal(call()[0], 2 * x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("size", [100, HUGE])
def test_scratch_memory_is_not_shared_with_a_child(size: int) -> None:
    arena = Arena()
    arena.reserve(size)
    arena.bytes[:] = 1
    child = os.fork()
    if child == 0:
        arena.bytes[:] = 2
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.all(arena.bytes == 1)


EXIT = """
import threading, time
from tests.test_bind import Executable, double, inputs
call = Executable(double(), threads=2).bind(inputs(3, 30_000))
def work():
    while True:
        call()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
print("done")
"""


def test_exit_during_calls() -> None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", EXIT], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# Host steps.


def test_host_steps() -> None:
    loaded = Executable(middle(), threads=2, functions=FUNCTIONS)
    x = np.arange(20, dtype=F32)
    call = loaded.bind([x])
    for shift in (0, 0, 3):  # which changes how many are kept
        x += shift
        expected = np.flip((2 * x)[2 * x > 11])
        y, kept = call()
        assert call() is call.outputs
        assert np.array_equal(y, expected + 10)
        assert np.array_equal(kept, expected)


def test_host_steps_with_outputs_of_the_caller() -> None:
    x = np.arange(20, dtype=F32)
    expected = np.flip((2 * x)[2 * x > 11])
    y = np.zeros_like(expected)
    call = Executable(middle(), functions=FUNCTIONS).bind([x], [y, None])
    for _ in range(2):
        y[...] = -1
        assert call()[0] is y
        assert np.array_equal(y, expected + 10)
        assert np.array_equal(call.outputs[1], expected)
    x += 3
    with pytest.raises(InputError, match=r"output 'y' has the shape \(14,\), but it will be \(17,\)"):
        call()


def test_a_host_step_that_goes_wrong() -> None:
    call = Executable(middle(fail=True), functions=FUNCTIONS).bind([np.arange(20, dtype=F32)])
    for _ in range(2):
        with pytest.raises(StitchError, match="operator Compress of node 'k' failed: of all things"):
            call()


# Runs find their frames as the last run left them.


def test_runs_of_alternating_kinds() -> None:
    loaded = Executable(double(), threads=1)
    own = {n: [np.zeros((2, n), F32)] for n in (3, 7)}
    for _ in range(3):
        for n in (3, 7, 7, 3):
            x, mask = inputs(2, n)
            for given in ([x, mask], [np.asfortranarray(x), mask]):  # the second goes the slow way
                own[n][0][...] = -1
                assert loaded.run(given, [*own[n]])[0] is own[n][0]
                assert np.array_equal(own[n][0], 2 * x)
                assert np.array_equal(loaded.run(given)[0], 2 * x)
            with pytest.raises(InputError, match="but it will be"):
                loaded.run([x, mask], [*own[10 - n]])


def test_a_first_run_without_arrays() -> None:
    loaded = Executable(double(), threads=1)
    with pytest.raises(InputError, match="0 inputs are given"):
        loaded.run([], [])


# Through the API.


@pytest.fixture(scope="module")
def model() -> stitch.CompiledModel:
    return stitch.optimize(masked(), cache=False)


@pytest.mark.parametrize("rows", [0, 1, 5, 900])
def test_a_model(model: stitch.CompiledModel, rows: int) -> None:
    feeds = arrays(rows)
    z = np.zeros(rows, F32)
    call = model.bind(dict(reversed(feeds.items())), [None, z])
    for seed in (1, 2):
        for name, array in arrays(rows, seed).items():
            feeds[name][...] = array
        assert_right(call(), feeds)
        assert call()[1] is z


def test_mistakes(model: stitch.CompiledModel) -> None:
    feeds = arrays(3)
    with pytest.raises(MissingInput, match="'mask' is missing"):
        model.bind({"x": feeds["x"]})
    with pytest.raises(UnknownInput, match="'masks'"):
        model.bind(feeds | {"masks": feeds["x"]})
    with pytest.raises(SymbolConflict, match="batch"):
        model.bind(feeds | {"x": arrays(2)["x"]})
    y = np.zeros((3, 6), F32)
    with pytest.raises(InputError, match="output 'z' overlaps output 'y'"):
        model.bind(feeds, [y, y.reshape(-1)[:3]])
    with pytest.raises(TypeError):
        model.bind(feeds)(*feeds)
