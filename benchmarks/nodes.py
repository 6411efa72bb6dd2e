"""ONNX's own backend suite, case by case, through the whole compiler.

    python -m benchmarks.nodes [--filter TEXT] [--jobs N] [--symbolic] [--update] [--show unsupported]

A case is

    pass         if every output has the right dtype, shape and values, by ONNX's own comparison
    constant     if stitch refused it because an operator needs an input at compile time (axes, a shape, pads), and
                 it passes once its short inputs are constants in the model
    unsupported  if stitch raised UnsupportedOperator
    wrong        in every other case: another error, a crash, a timeout

Each worker is a process, so that a crash is the fault of one case. The exit status is 1 if any case is wrong.

`benchmarks/nodes.txt` holds the expected state of each case, one a line, so that coverage is a diff: `--update`
rewrites it unless something is wrong, and without it the differences are printed. `--symbolic` runs the cases compiled
for inputs whose extents above 1 are symbols, equal extents the same one; that run is not stored.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

LIST = Path(__file__).with_name("nodes.txt")
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
TIMEOUT = 120.0
STATES = ("pass", "constant", "unsupported", "wrong")


@dataclass(frozen=True)
class Result:
    """`state` is one of STATES; `reason` says why not, in one line."""

    state: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}  {self.reason}".rstrip()


# ------------------------------------------------------------------ cases


def cases(text: str = "") -> list[Any]:
    """The cases whose names contain `text`, as onnx.backend.test.case.test_case.TestCase, sorted by name."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        found = [c for kind in KINDS for c in load_model_tests(kind=kind)]
    return sorted((c for c in found if text in key(c)), key=key)


def key(case: Any) -> str:
    """The case's name; cases outside the node suite have their suite's name before it."""
    return case.name if case.kind == "node" else f"{case.kind}/{case.name}"


def _load(case: Any) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    """The model, and sets of inputs and outputs as arrays (lists of them for sequences, None for missing optionals)."""
    if case.model is not None:
        return case.model, [([_array(x) for x in i], [_array(x) for x in o]) for i, o in case.data_sets]
    folder = Path(case.model_dir)
    model = onnx.load(folder / "model.onnx")
    sets = []
    for data in sorted(folder.glob("test_data_set_*")):
        inputs = [_read(data / f"input_{k}.pb", v) for k, v in enumerate(model.graph.input)]
        outputs = [_read(data / f"output_{k}.pb", v) for k, v in enumerate(model.graph.output)]
        sets.append(([x for x in inputs if x is not None], outputs))
    return model, sets


def _read(path: Path, info: onnx.ValueInfoProto) -> Any:
    if not path.exists():
        return None
    data = path.read_bytes()
    if info.type.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if info.type.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _array(item: Any) -> Any:
    return numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else item


# ------------------------------------------------------------------ one case


def run(case: Any, symbolic: bool = False) -> Result:
    """The state of one case, in this process."""
    from stitch.errors import UnsupportedOperator

    model, sets = _load(case)
    refusal: UnsupportedOperator | None = None
    try:
        for which in range(len(_bakings(sets[0][0]))):
            try:
                for inputs, expected in sets:
                    baked = _bakings(inputs)[which]
                    problem = _wrong(*_bake(model, inputs, baked), expected, case, symbolic)
                    if problem:
                        return Result("wrong", f"{problem} with constants" if which else problem)
                return Result("constant", _reason(refusal)) if refusal else Result("pass")
            except UnsupportedOperator as found:
                refusal = refusal or found
                if "constant" not in found.advice:
                    break
    except Exception as problem:
        where = traceback.extract_tb(problem.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return Result("wrong", _line(f"{type(problem).__name__}: {problem} ({place})"))
    assert refusal is not None
    return Result("unsupported", _reason(refusal))


def _reason(refusal: Any) -> str:
    dtype = f" for {refusal.dtype}" if refusal.dtype else ""
    domain = "" if refusal.domain == "ai.onnx" else f"{refusal.domain}."
    return _line(f"{domain}{refusal.operator}{dtype}: {refusal.advice}")


def _bakings(inputs: Sequence[Any]) -> list[tuple[int, ...]]:
    """Which inputs to make constants, at each attempt: none, integer vectors, all vectors, all."""
    short = [i for i, x in enumerate(inputs) if isinstance(x, np.ndarray) and x.ndim <= 1]
    whole = [i for i in short if inputs[i].dtype.kind in "iu"]
    everything = [i for i, x in enumerate(inputs) if isinstance(x, np.ndarray)]
    return [(), tuple(whole), tuple(short), tuple(everything)]


def _bake(model: onnx.ModelProto, inputs: Sequence[Any], baked: Sequence[int]) -> tuple[onnx.ModelProto, list[Any]]:
    """The model with the inputs at `baked` as initializers, and the inputs that remain."""
    if not baked:
        return model, list(inputs)
    out = onnx.ModelProto()
    out.CopyFrom(model)
    given = {t.name for t in model.graph.initializer}
    names = [v.name for v in model.graph.input if v.name not in given]
    for i in baked:
        out.graph.initializer.append(numpy_helper.from_array(np.asarray(inputs[i]), names[i]))
    return out, [x for i, x in enumerate(inputs) if i not in baked]


def _wrong(model: onnx.ModelProto, inputs: Sequence[Any], expected: Sequence[Any], case: Any, symbolic: bool) -> str:
    """What is wrong with the outputs for these inputs, or nothing."""
    from onnx.backend.test.runner import Runner

    from stitch import backend

    shapes = _symbols(model, inputs) if symbolic else None
    outputs = backend.prepare(model, "CPU", shapes=shapes, threads=1).run(inputs)
    # As ONNX does for bfloat16: two units in the last place. The references were rounded at every step.
    half = any(isinstance(x, np.ndarray) and x.dtype == np.float16 for x in expected)
    try:
        with np.errstate(all="ignore"):
            Runner.assert_similar_outputs(expected, outputs, rtol=max(case.rtol, 2.0**-9 * half), atol=case.atol)
    except AssertionError as problem:
        return " ".join(str(problem).split())[:160]
    return ""


def _symbols(model: onnx.ModelProto, inputs: Sequence[Any]) -> dict[str, list[int | str | None]]:
    """Shapes by input name: equal extents above 1 are one symbol."""
    from stitch import dtypes

    given = {t.name for t in model.graph.initializer}
    names = [v.name for v in model.graph.input if v.name not in given and v.type.HasField("tensor_type")]
    shapes: dict[str, list[int | str | None]] = {}
    for name, array in zip(names, inputs, strict=False):
        if isinstance(array, np.ndarray) and array.dtype in dtypes.ALL:
            shapes[name] = [f"s{n}" if n > 1 else n for n in array.shape]
    return shapes


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


# ------------------------------------------------------------------ many cases


def run_all(chosen: Sequence[Any], jobs: int, symbolic: bool, timeout: float = TIMEOUT) -> Iterator[tuple[str, Result]]:
    """(key, result) of every case as it is done. A worker that dies or hangs is replaced."""
    context = multiprocessing.get_context("fork")
    waiting = list(range(len(chosen)))[::-1]
    idle: list[tuple[Any, Connection]] = []
    busy: dict[Connection, tuple[Any, int, float]] = {}
    while waiting or busy:
        while waiting and len(busy) < jobs:
            if not idle:
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there, chosen, symbolic), daemon=True)
                process.start()
                there.close()
                idle.append((process, here))
            process, pipe = idle.pop()
            index = waiting.pop()
            pipe.send(index)
            busy[pipe] = (process, index, time.monotonic() + timeout)
        ready = wait(list(busy), timeout=1.0)
        for pipe in list(busy):
            process, index, deadline = busy[pipe]
            if pipe in ready:
                try:
                    result = pipe.recv()
                except EOFError:
                    process.join()
                    result = Result("wrong", f"crash: the process ended with status {process.exitcode}")
                else:
                    idle.append((process, pipe))
            elif time.monotonic() > deadline:
                process.kill()
                process.join()
                result = Result("wrong", f"timeout: more than {timeout:.0f} s")
            else:
                continue
            del busy[pipe]
            yield key(chosen[index]), result
    for process, pipe in idle:
        pipe.send(None)
        process.join(5)


def _work(pipe: Connection, chosen: Sequence[Any], symbolic: bool) -> None:
    warnings.simplefilter("ignore")
    while (index := pipe.recv()) is not None:
        pipe.send(run(chosen[index], symbolic))


# ------------------------------------------------------------------ the list


def read_list(path: Path = LIST) -> dict[str, Result]:
    """Case -> its stored state."""
    out = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, state, *reason = line.split(maxsplit=2)
            out[name] = Result(state, reason[0] if reason else "")
    return out


def list_version(path: Path = LIST) -> str:
    """The version of onnx that the list was made with."""
    head = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return head.partition("of onnx ")[2].partition(":")[0]


def write_list(results: Mapping[str, Result], path: Path = LIST) -> None:
    head = f"# ONNX's backend suite of onnx {onnx.__version__}: python -m benchmarks.nodes --update\n"
    head += f"# {summary(results.values())}\n"
    lines = [f"{name}  {results[name]}\n" for name in sorted(results)]
    path.write_text(head + "".join(lines), encoding="utf-8")


def summary(results: Collection[Result]) -> str:
    count = Counter(r.state for r in results)
    return f"{len(results)} cases: " + ", ".join(f"{count[s]} {s}" for s in STATES)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes", description="ONNX's backend suite")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--symbolic", action="store_true", help="compile for symbolic extents")
    parser.add_argument("--update", action="store_true", help="write benchmarks/nodes.txt")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one case")
    parser.add_argument("--show", choices=STATES, default="wrong", help="print the cases in this state")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    results: dict[str, Result] = {}
    for name, result in run_all(cases(options.filter), options.jobs, options.symbolic, options.timeout):
        results[name] = result
        if result.state == options.show:
            print(f"{name}  {result}", flush=True)
    for kind in KINDS:
        part = [r for n, r in results.items() if (n.split("/")[0] if "/" in n else "node") == kind]
        if part:
            print(f"{kind:18} {summary(part)}")
    print(f"{'all':18} {summary(results.values())} ({time.perf_counter() - start:.0f} s)")
    wrong = any(r.state == "wrong" for r in results.values())
    if options.update and not options.symbolic and not wrong:
        write_list((read_list() if options.filter and LIST.exists() else {}) | results)
    elif LIST.exists() and not options.symbolic:
        stored = read_list()
        for name, result in sorted(results.items()):
            if (was := stored.get(name, Result("new"))).state != result.state:
                print(f"changed: {name}  {was.state} -> {result}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
