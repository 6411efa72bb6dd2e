"""Streams through pipelines: order, errors, back-pressure, and that nothing is left behind. Nothing here depends on how
long things take."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import stitch
from stitch.bundle import Given, Made, Sizes
from stitch.errors import MissingInput, ResourceError, StitchError, StreamError, WrongDtype
from stitch.model import RunnableModel
from stitch.pipelined import PipelinedModel
from stitch.pipelined import compile as compile_pipelined
from stitch.plan import Port
from stitch.runtime import affinity, cpu
from stitch.runtime.pipeline import Pipeline, load
from stitch.runtime.stage import Stage
from stitch.stitching.schedule import Stitched
from tests import pipeline as compiler

Run = Callable[..., list[np.ndarray]]


def threads() -> set[Any]:
    """All threads of this process, those of teams too."""
    return set(os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else map(id, threading.enumerate()))


def more(before: set[Any], count: int) -> bool:
    """Whether there are so many new threads soon: Python has joined a thread a little before the system has."""
    deadline = time.monotonic() + 20
    while len(threads() - before) != count and time.monotonic() < deadline:
        time.sleep(0.001)
    return len(threads() - before) == count


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    gc.collect()
    before = {t for t in threading.enumerate() if t.name.startswith("stitch")}
    yield
    gc.collect()
    assert not {t for t in threading.enumerate() if t.name.startswith("stitch")} - before


def plus(n: float, calls: list[Any] | None = None) -> Run:
    """Adds a number, like a stage that writes where it is told to."""

    def run(arrays: list[np.ndarray], outputs: list[Any] | None = None) -> list[np.ndarray]:
        if calls is not None:
            calls.append(None if outputs is None else outputs[0].ctypes.data)
        out = outputs[0] if outputs is not None else np.empty_like(arrays[0])
        np.add(arrays[0], n, out=out)
        return [out] if outputs is None else outputs

    return run


def failing(run: Run, at: int, error: BaseException) -> Run:
    count = [0]

    def fails(arrays: list[np.ndarray], outputs: Any = None) -> list[np.ndarray]:
        count[0] += 1
        if count[0] == at + 1:
            raise error
        return run(arrays, outputs)

    return fails


def pipe(*runs: Run) -> Pipeline:
    stages = [Stage(f"stage {k}", run, (Given(0) if k == 0 else Made(k - 1, 0),)) for k, run in enumerate(runs)]
    return Pipeline(stages, [Made(len(runs) - 1, 0)])


def numbers(pipeline: Pipeline, items: Any, **options: Any) -> Any:
    return pipeline.stream(items, lambda x: [np.full(3, x, np.float32)], lambda r: float(r[0][0]), **options)


class Counted:
    """Items that are counted as they are pulled."""

    def __init__(self, most: int | None = None) -> None:
        self.pulled, self.most = 0, most

    def __iter__(self) -> Iterator[int]:
        while self.most is None or self.pulled < self.most:
            self.pulled += 1
            yield self.pulled - 1


# ------------------------------------------------------------------ order and bounds


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("reuse", [False, True])
def test_results_are_in_order(stages: int, depth: int, reuse: bool) -> None:
    pipeline = pipe(*[plus(10.0**k) for k in range(stages)])
    total = sum(10.0**k for k in range(stages))
    assert list(numbers(pipeline, range(500), depth=depth, reuse=reuse)) == [k + total for k in range(500)]
    assert list(numbers(pipeline, [], depth=depth)) == []
    assert list(numbers(pipeline, [7], depth=depth)) == [7 + total]


@pytest.mark.parametrize(("stages", "depth"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_no_more_is_pulled_than_depth_times_stages(stages: int, depth: int) -> None:
    items = Counted()
    with numbers(pipe(*[plus(0)] * stages), items, depth=depth) as stream:
        assert items.pulled == 0
        for k in range(40):
            assert next(stream) == k
            assert items.pulled <= k + depth * stages


def test_a_slow_last_stage_holds_the_first_one_back() -> None:
    gate, begun = threading.Semaphore(0), [0]

    def first(arrays: list[np.ndarray], outputs: Any = None) -> list[np.ndarray]:
        begun[0] += 1
        return plus(0)(arrays, outputs)

    def last(arrays: list[np.ndarray], outputs: Any = None) -> list[np.ndarray]:
        gate.acquire()
        return plus(0)(arrays, outputs)

    with numbers(pipe(first, last), Counted(), depth=2) as stream:
        for k in range(20):
            gate.release()
            assert next(stream) == k
            assert begun[0] <= k + 1 + 3  # two slots, and the one that is being given away
        for _ in range(10):
            gate.release()


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth is 0"):
        numbers(pipe(plus(0)), [1], depth=0)


def test_values_skip_stages_and_outputs_come_from_any() -> None:
    """Stage 2 reads what stage 0 made and the model's input; stage 0's result is an output too."""

    def both(arrays: list[np.ndarray], outputs: Any = None) -> list[np.ndarray]:
        assert arrays[2].shape == (3, 0)
        result = arrays[0] + arrays[1]
        if outputs is not None:
            outputs[0][...] = result
            return outputs  # type: ignore[no-any-return]
        return [result]

    stages = [
        Stage("a", plus(1), (Given(0),)),
        Stage("b", plus(100), (Given(0),)),
        Stage("c", both, (Made(0, 0), Given(0), Sizes(((0, 0),)))),
    ]
    pipeline = Pipeline(stages, [Made(2, 0), Made(0, 0), Made(1, 0)])
    for reuse in (False, True):
        got = list(pipeline.stream(range(50), lambda x: [np.full(3, x, np.float32)], lambda r: [float(a[0]) for a in r],
                                   depth=2, reuse=reuse))  # fmt: skip
        assert got == [[2 * k + 1, k + 1, k + 100] for k in range(50)]
    assert [float(a[0]) for a in pipeline.run([np.zeros(3, np.float32)])] == [1, 1, 100]


# ------------------------------------------------------------------ memory


def test_boundaries_reuse_their_arrays_and_results_are_fresh() -> None:
    calls: list[Any] = []
    last: list[Any] = []
    pipeline = pipe(plus(1, calls), plus(1, last))
    kept = list(pipeline.stream(range(200), lambda x: [np.full(3, x, np.float32)], lambda r: r[0], depth=2))
    assert calls.count(None) == 2  # one for each slot
    assert len(set(calls)) == 1 + 2
    assert last == [None] * 200
    assert [float(a[0]) for a in kept] == [k + 2 for k in range(200)]  # nobody has written to them
    last.clear()
    shown = [r.ctypes.data for r in pipeline.stream(range(200), lambda x: [np.full(3, x, np.float32)],
                                                    lambda r: r[0], depth=2, reuse=True)]  # fmt: skip
    assert len(set(shown)) <= 2
    assert last.count(None) <= 2


def test_other_shapes_are_other_arrays() -> None:
    pipeline = pipe(plus(1), plus(1))
    sizes = [3, 3, 3, 5, 5, 2, 0, 0, 0, 3, 3, 3, 3]
    got = list(pipeline.stream(sizes, lambda n: [np.full(n, n, np.float32)], lambda r: r[0], depth=2))
    assert [(a.size, a.tolist()) for a in got] == [(n, [n + 2.0] * n) for n in sizes]


def test_ten_thousand_items_in_steady_memory() -> None:
    pipeline = pipe(plus(1), plus(1))
    sizes = []
    for k, y in enumerate(numbers(pipeline, range(10_000))):
        assert y == k + 2
        if k % 1000 == 999:
            gc.collect()
            sizes.append(len(gc.get_objects()))
    assert max(sizes[1:]) - min(sizes[1:]) < 200, sizes


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("at", [0, 1, 17])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError("a pity"), SystemExit(3), KeyboardInterrupt()])
def test_an_error_says_which_input(at: int, stage: int, error: BaseException) -> None:
    runs = [plus(0), plus(0), plus(0)]
    runs[stage] = failing(runs[stage], at, error)
    items, got = Counted(), []
    stream = numbers(pipe(*runs), items, depth=2)
    with pytest.raises(StreamError, match=f"input {at} of the stream failed in stage {stage}: ") as found:
        got.extend(stream)
    assert got == list(range(at))
    assert found.value.__cause__ is error
    assert (found.value.position, found.value.stage) == (at, f"stage {stage}")
    assert items.pulled <= at + 6
    with pytest.raises(StopIteration):
        next(stream)


def test_an_error_of_the_items() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise OSError("no more frames")

    got: list[float] = []
    with pytest.raises(StreamError, match="input 5 of the stream failed: no more frames") as found:
        got.extend(numbers(pipe(plus(0), plus(0)), items()))
    assert found.value.stage is None
    assert isinstance(found.value.__cause__, OSError)
    stream = numbers(pipe(plus(0), plus(0)), items())
    assert [next(stream) for _ in range(5)] == list(range(5))
    with pytest.raises(StreamError):
        next(stream)


def test_a_thread_that_dies_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Stage, *_: Any) -> None:
        raise AssertionError("in the thread itself")

    pipeline = pipe(plus(0), plus(0))
    monkeypatch.setattr("stitch.runtime.stream._Lanes.release", broken)
    stream = numbers(pipeline, range(10))
    with pytest.raises(StreamError, match=r"failed in stage 0: in the thread itself"):
        next(stream)
    assert list(stream) == []


def test_a_thread_that_cannot_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError("not allowed")

    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    pipeline = Pipeline([Stage("s", plus(0), (Given(0),), affinity.allowed())], [Made(0, 0)])
    monkeypatch.setattr(os, "sched_setaffinity", refused)
    with pytest.raises(StreamError, match="no thread can be bound") as found:
        next(numbers(pipeline, range(3)))
    assert isinstance(found.value.__cause__, ResourceError)


# ------------------------------------------------------------------ the end


def test_abandoned_streams_end_their_threads() -> None:
    before = threads()
    pipeline = pipe(plus(0), plus(0), plus(0))

    def closed(stream: Any) -> None:
        stream.close()
        stream.close()
        assert list(stream) == []

    def dropped(stream: Any) -> None:
        pass

    def cyclic(stream: Any) -> None:
        ring: list[Any] = [stream]
        ring.append(ring)

    def wrapped(stream: Any) -> None:
        def generator() -> Generator[float, None, None]:
            yield from stream

        inner = generator()
        next(inner)
        inner.close()

    for pulled in (0, 1, 30):
        for end in (closed, dropped, cyclic, wrapped):
            stream = numbers(pipeline, Counted(), depth=3)
            for _ in range(pulled):
                next(stream)
            assert more(before, 3)
            end(stream)
            del stream
            gc.collect()
            assert more(before, 0)


def test_threads_end_with_the_items_and_with_the_pipeline() -> None:
    before = threads()
    pipeline = pipe(plus(0), plus(0))
    assert len(list(numbers(pipeline, range(9)))) == 9
    assert more(before, 0)
    stream = numbers(pipeline, Counted())
    next(stream)
    pipeline.close()
    assert more(before, 0)
    assert list(stream) == []
    for use in (lambda: pipeline.run([np.zeros(3, np.float32)]), lambda: numbers(pipeline, [])):
        with pytest.raises(StitchError, match="closed"):
            use()


def test_a_waiting_stage_can_be_stopped() -> None:
    """The last stage's slots are all full, and nobody asks for them."""
    with numbers(pipe(plus(0), plus(0)), Counted(), depth=4, reuse=True) as stream:
        next(stream)
        time.sleep(0.02)
    assert not stream._threads[0].is_alive()


def run_program(text: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    head = "import os, sys, gc\nfrom tests.test_stream import *\n"
    return subprocess.run(
        [sys.executable, "-c", head + text], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_stream_at_exit() -> None:
    found = run_program("s = numbers(pipe(plus(0), plus(1)), Counted()); print(next(s), next(s))")
    assert (found.returncode, found.stdout, found.stderr) == (0, "1.0 2.0\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork() -> None:
    found = run_program("""
pipeline = pipe(plus(0), plus(1))
s = numbers(pipeline, Counted())
next(s)
child = os.fork()
if not child:
    try:
        next(s)
    except StitchError as error:
        print(error, flush=True)
    s.close()
    print(list(numbers(pipeline, range(3))), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(next(s))
""")
    lines = ["a stream does not survive a fork; start a stream in the child process", "[1.0, 2.0, 3.0]", "2.0"]
    assert (found.returncode, found.stdout.splitlines(), found.stderr) == (0, lines, "")


# ------------------------------------------------------------------ models


def network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = [
        helper.make_tensor(f"w{k}", TensorProto.FLOAT, (32, 32), (rng.standard_normal(1024) / 6).astype(np.float32))
        for k in range(4)
    ]
    nodes = []
    for k in range(4):
        nodes.append(helper.make_node("MatMul", [f"x{k}" if k else "x", f"w{k}"], [f"m{k}"], name=f"mul{k}"))
        nodes.append(helper.make_node("Softmax", [f"m{k}"], [f"x{k + 1}" if k < 3 else "y"], name=f"soft{k}"))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 32]) for n in ("x", "y"))
    graph = helper.make_graph(nodes, "network", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def images(count: int, rows: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((rows + k % 3, 32)).astype(np.float32)} for k in range(count)]


def pipelined(places: Any) -> PipelinedModel:
    def even(stitched: Stitched) -> list[int]:
        count = len(stitched.kernels)
        return [min(len(places), count) * k // count for k in range(count)]

    return compile_pipelined(network(), compiler.host(), places, assign=even)


def cpus() -> list[int]:
    return sorted(affinity.allowed())


@pytest.mark.parametrize("count", [1, 2, 3, 99])
def test_a_model_in_stages(count: int) -> None:
    whole = stitch.optimize(network(), cache=False, threads=1)
    here = cpus()
    before = threads()
    model = pipelined([{here[k % len(here)]} for k in range(count)])
    assert len(model.pipeline.stages) == min(count, len(model.bundle.parts))
    assert [t.shape for t in model.inputs] == [t.shape for t in whole.inputs]
    items = images(40)
    wanted = [whole.run(None, item)[0].tobytes() for item in items]
    assert [y.tobytes() for (y,) in model.stream(items)] == wanted
    assert [y.tobytes() for (y,) in model.stream([item["x"] for item in items], reuse=True)] == wanted
    assert [model.run(["y"], item)[0].tobytes() for item in items] == wanted
    assert model(items[0]["x"]).tobytes() == wanted[0]  # type: ignore[union-attr]
    assert affinity.allowed() == frozenset(here)
    model.close()
    assert more(before, 0)


def test_a_whole_model_streams_too() -> None:
    model = stitch.optimize(network(), cache=False, threads=1)
    items = images(25)
    assert [y.tobytes() for (y,) in model.stream(items)] == [model.run(None, item)[0].tobytes() for item in items]
    for wrong, cause in (({}, MissingInput), ({"x": np.zeros((2, 32))}, WrongDtype)):
        with pytest.raises(StreamError, match="input 2 of") as found:
            list(model.stream([*items[:2], wrong, *items]))
        assert isinstance(found.value.__cause__, cause)


def test_stages_have_teams_of_their_own() -> None:
    before = threads()
    bundle = pipelined([None, None]).bundle
    pipeline = load(bundle, [cpus(), None], threads=[3, 1])
    assert pipeline.stages[0].cpus == frozenset(cpus())
    x = np.ones((4096, 32), np.float32)
    wanted = [y.tobytes() for y in pipeline.run([x])]
    assert [r[0].tobytes() for r in pipeline.stream([x] * 5, lambda x: [x], list)] == wanted * 5
    assert more(before, 2)
    again = load(bundle, [None, None], threads=[3, 3])
    again.run([x])
    assert more(before, 6)
    pipeline.close()
    again.close()
    assert more(before, 0)
    reused = cpu.own_team(3)
    assert reused is not None
    assert reused.workers == 0
    cpu.give_back(reused)
    assert cpu.own_team(1) is None


def test_workers_run_on_their_stages_cpus() -> None:
    here = cpus()
    if len(here) < 2 or not os.path.isdir("/proc/self/task"):
        pytest.skip("one CPU")
    before = {*os.listdir("/proc/self/task")}
    with load(pipelined([None, None]).bundle, [{here[1]}, {here[0]}], threads=[2, 2]) as pipeline:
        pipeline.run([np.ones((4096, 32), np.float32)])
        workers = {*os.listdir("/proc/self/task")} - before
        assert sorted(min(os.sched_getaffinity(int(t))) for t in workers) == here[:2]
        assert all(len(os.sched_getaffinity(int(t))) == 1 for t in workers)
    assert affinity.allowed() == frozenset(here)


def test_wrong_places() -> None:
    bundle = pipelined([None, None]).bundle
    with pytest.raises(ResourceError, match=r"CPU 4711 is not available to this process; it may use 0"):
        load(bundle, [{0}, {4711}])
    with pytest.raises(ResourceError, match="CPUs 4711, 4712 are not"):
        PipelinedModel(bundle, [{4711, 4712}, None])
    with pytest.raises(ResourceError, match="empty"):
        load(bundle, [set(), None])
    with pytest.raises(ValueError, match="2 parts need as many places"):
        load(bundle, [None])


def test_models_share_what_calls_need() -> None:
    class Echo(RunnableModel):
        def run(self, output_names: Any, feeds: Any) -> list[np.ndarray]:
            return self._in_order(feeds)

        def explain(self) -> None: ...

        def _pipeline(self) -> Pipeline:
            return pipe(plus(1))

    model = Echo([Port("x", "float32", ("n",))], [Port("y", "float32", ("n",))])
    x = np.ones(3, np.float32)
    assert model(x) is x
    assert [y.tolist() for (y,) in model.stream([x, (x,), {"x": x}])] == [[2.0] * 3] * 3


def test_several_threads_may_ask_one_stream() -> None:
    """Each result goes to one of them, and none waits for a result that will not come."""
    found: list[int] = []

    def ask() -> None:
        found.extend(int(y[0]) for (y,) in stream)

    pipeline = Pipeline([Stage("all", lambda arrays, _: [arrays[0] + 1], (Given(0),))], [Made(0, 0)])
    stream = pipeline.stream(range(500), lambda k: [np.array([k])], list)
    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert not any(t.is_alive() for t in threads)
    assert sorted(found) == list(range(1, 501))


def test_closing_wakes_who_waits_for_a_result() -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(arrays: list[Any], _: object) -> list[Any]:
        begun.set()
        go.wait(20)
        return [arrays[0].copy()]

    pipeline = Pipeline([Stage("slow", slow, (Given(0),))], [Made(0, 0)])
    stream = pipeline.stream([0], lambda k: [np.array([k])], list)
    found: list[object] = []
    asking = threading.Thread(target=lambda: found.extend(stream), daemon=True)
    asking.start()
    assert begun.wait(20)
    closing = threading.Thread(target=stream.close, daemon=True)
    closing.start()
    go.set()
    for t in (closing, asking):
        t.join(20)
        assert not t.is_alive()
