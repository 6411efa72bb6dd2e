"""`optimize` and the model that it returns.

The compiler (`stitch.compiler`, and with it onnx and sympy) is imported only when a model is not in the cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any, get_args, overload

import numpy as np

from stitch import __version__, cost, detection, knobs
from stitch import target as targets
from stitch.decision import Assignment, Objective
from stitch.delegated import DelegatedModel, Found
from stitch.delegated import compile as compile_delegated
from stitch.devices import listed, parse_all
from stitch.errors import DeviceError, InvalidKnob, PlacementError, UnsupportedOperator
from stitch.limits import within
from stitch.model import RunnableModel, Tensor
from stitch.pipelined import NullModel, PinnedModel, PipelinedModel, PlacedModel, Places, in_parts, unchanged
from stitch.pipelined import compile as compile_pipelined
from stitch.plan import Artifact
from stitch.runtime import affinity, cpu
from stitch.runtime.binding import Bound
from stitch.runtime.cache import Cache
from stitch.runtime.delegate import Delegate, OnnxRuntime
from stitch.runtime.device import Run
from stitch.runtime.executable import Executable, team_size
from stitch.runtime.pipeline import Pipeline, single

if TYPE_CHECKING:
    from stitch.delegation import Cutter
    from stitch.explain import Explanation
    from stitch.source import Model
    from stitch.stitching.schedule import Stitched

__all__ = ["CompiledModel", "Shapes", "Tensor", "delegated", "optimize", "pipelined"]

Shapes = Mapping[str, Sequence["int | str | None"]]


@overload
def optimize(
    model: Model, *, target: str | None = None, threads: int | None = None, cache: bool = True,
    shapes: Shapes | None = None, devices: None = None, objective: Objective = "latency",
    sizes: Mapping[str, int] | None = None, memory: float | None = None,
) -> CompiledModel: ...  # fmt: skip


@overload
def optimize(
    model: Model, *, target: str | None = None, threads: int | None = None, cache: bool = True,
    shapes: Shapes | None = None, devices: Sequence[str], objective: Objective = "latency",
    sizes: Mapping[str, int] | None = None, memory: float | None = None, trial: Mapping[str, np.ndarray] | None = None,
) -> RunnableModel: ...  # fmt: skip


def optimize(
    model: Model,
    *,
    target: str | None = None,
    threads: int | None = None,
    cache: bool = True,
    shapes: Shapes | None = None,
    devices: Sequence[str] | None = None,
    objective: Objective = "latency",
    sizes: Mapping[str, int] | None = None,
    memory: float | None = None,
    trial: Mapping[str, np.ndarray] | None = None,
) -> RunnableModel:
    """Compiles an ONNX model for this machine.

    model      path, bytes, or ModelProto; external data is found next to a path
    target     a `stitch.target` description; None: this machine
    threads    size of the thread team; None: what affinity and the cgroup's quota allow
    cache      keep and reuse compiled code on disk
    shapes     by input name, replaces dims: an int fixes one, a string names it, None leaves it open
    devices    where it may run, as `stitch.devices` has them: "cpu:0", "cpu:2-3", "big", "onnxruntime"; None: anywhere;
               each has a team of as many threads as CPUs, so `threads` does not go with it
    objective  on `devices`: "latency" of one input; "throughput" of a stream, in stages; with or without them:
               "memory", the largest team of threads with which all of it takes at most `memory` bytes
    sizes      extents of symbols, for decisions on `devices` and `memory`; others are 1
    trial      inputs by name, with "onnxruntime" among the devices: see `delegated`

    Raises UnsupportedOperator, InvalidModel, DeviceError, PlacementError and ResourceError of `stitch.errors`.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"the objective {objective!r} is none of {', '.join(get_args(Objective))}")
    if (objective == "memory") != (memory is not None):
        raise ValueError("the objective 'memory' goes with a limit, as in memory=500_000_000")
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | float) or not memory > 0):
        raise ValueError(f"memory is {memory!r}, but must be a number of bytes above zero")
    if devices is not None:
        if threads is not None:
            raise ValueError("either devices or threads: a device has a team of as many threads as CPUs")
        return _on(listed(devices), model, target, cache, shapes, objective, sizes, memory, trial)
    if trial is not None:
        raise ValueError("a trial goes with a device to try, as in devices=['cpu', 'onnxruntime']")
    threads = None if threads is None else team_size(threads)
    machine, store, key = _prepared(model, target, cache, shapes)
    artifact = store.load(key) if key else None
    if artifact is None or not unchanged(artifact.report):
        from stitch.compiler import compile

        artifact = compile(model, machine, shapes)
        if key:
            store.store(key, artifact)
    if memory is not None:
        threads = within(artifact, memory, sizes or {}, threads or targets.count_cores())
    return CompiledModel(artifact, threads)


def _on(
    texts: Sequence[str], model: Model, target: str | None, cache: bool, shapes: Shapes | None, objective: Objective,
    sizes: Mapping[str, int] | None, memory: float | None, trial: Mapping[str, np.ndarray] | None,
) -> RunnableModel:  # fmt: skip
    """A model on devices that the user names."""
    board = detection.detect()
    found = parse_all(texts, board)
    cores = [d for d in found if d.kind == "cpu"]
    count = sum(d.cores for d in cores) or None
    if len(found) > 1 and any(d.kind == "null" for d in found):
        advice = "leave it out, or name it alone, to see what shapes come out"
        raise DeviceError("null", "the null device computes nothing, so nothing can be placed beside it", advice)
    delegates = any(d.kind == "onnxruntime" for d in found)
    if trial is not None and (not delegates or objective == "throughput"):
        raise ValueError("a trial is of 'onnxruntime' among the devices, and of one input at a time")
    if delegates:
        try:
            if trial is None:
                rest = [str(d) for d in cores] or ["cpu"]
                return optimize(
                    model, target=target, cache=cache, shapes=shapes, devices=rest, objective=objective, sizes=sizes,
                    memory=memory,
                )  # fmt: skip
        except UnsupportedOperator:
            pass
        if memory is not None:
            advice = "leave out the limit, or run the part that stitch supports alone"
            raise PlacementError("how much memory onnxruntime takes is not known", advice)
        return delegated(model, target=target, threads=count, cache=cache, shapes=shapes, trial=trial)
    if not cores:
        plain = optimize(model, target=target, cache=cache, shapes=shapes)
        return NullModel(plain.artifact)
    if memory is not None:
        team = optimize(
            model, target=target, threads=count, cache=cache, shapes=shapes, objective="memory", sizes=sizes,
            memory=memory,
        )  # fmt: skip
        return PinnedModel(team.artifact, [cpu for d in cores for cpu in d.cpus], team._executable.threads)
    machine, store, key = _prepared(model, target, cache, shapes)
    rates = cost.known(machine, knobs.current().cache_dir)
    given = (key, [str(d) for d in cores], objective, sorted((sizes or {}).items()), repr(rates), repr(board))
    name = hashlib.sha256(repr(given).encode()).hexdigest() if key else ""

    def assign(stitched: Stitched) -> Assignment:
        from stitch import placed

        wanted = placed.sizes_of(stitched, sizes or {})
        decision, tables = placed.place(stitched, machine, cores, board, objective, wanted, rates)
        return Assignment(decision.assignment, {"placement": decision.to_json()}, tables)

    return PlacedModel(in_parts(model, machine, shapes, assign, store, name))


def pipelined(
    model: Model, places: Places, *, assign: Callable[[Stitched], Sequence[int]], named: str = "",
    target: str | None = None, cache: bool = True, shapes: Shapes | None = None,
) -> PipelinedModel:  # fmt: skip
    """A model in stages that the caller chooses, one for each set of CPUs in `places`: `assign` says which part each
    kernel goes to, and `named` tells one such choice from another in the cache; "": it is not kept.

    Raises what `optimize` does, and ResourceError for CPUs that cannot be had."""
    for place in places:
        if place is not None:
            affinity.checked(place)
    machine, store, key = _prepared(model, target, cache, shapes)
    key = key if named else ""
    return compile_pipelined(model, machine, places, assign=assign, named=named, shapes=shapes, store=store, key=key)


def delegated(
    model: Model, delegate: Delegate | None = None, *, target: str | None = None, threads: int | None = None,
    cache: bool = True, shapes: Shapes | None = None, trial: Mapping[str, np.ndarray] | None = None,
) -> DelegatedModel:  # fmt: skip
    """A model that has operators which stitch refuses: what it can compile is compiled, the rest runs on `delegate`,
    onnxruntime by default; `explain()` says what went where, and why.

    trial   inputs, by name; the delegate then also gets what it is measured to be faster at on these, handing over
            included (`stitch.trial`). What was found is kept in the cache, for inputs of these shapes

    Raises InvalidModel, and ResourceError if the delegate is not installed (MissingRuntime) or does not take its part;
    InputError for a trial with other inputs than the model's."""
    other = delegate or OnnxRuntime(threads)

    def region(part: Any) -> tuple[Artifact, Run]:
        compiled = optimize(part, target=target, threads=threads, cache=cache)
        return compiled.artifact, compiled._executable.run

    def more(cutter: Cutter, base: DelegatedModel, build: Callable[[Cutter], DelegatedModel]) -> Found:
        from stitch.trial import tried

        assert trial is not None
        _, store, key = _prepared(model, target, cache, shapes)
        inputs = sorted((name, str(np.asarray(a).dtype), np.shape(a)) for name, a in trial.items())
        what = (key, other.name, getattr(other, "version", ""), threads, knobs.current().threads, inputs)
        name = hashlib.sha256(repr(("trial", what)).encode()).hexdigest() if key else ""
        with suppress(ValueError, KeyError, TypeError):
            if name and (kept := store.load_bytes(name)) is not None:
                return Found.of_json(kept)
        found = tried(cutter, base, build, trial, other.name)
        if name:
            store.store_bytes(name, found.to_json().encode())
        return found

    return compile_delegated(model, region, other, shapes, more if trial is not None else None)


def _prepared(
    model: Model, target: str | None, cache: bool, shapes: Shapes | None
) -> tuple[targets.Target, Cache, str]:
    """The machine, the cache, and what the model is kept under there; "" where nothing is."""
    settings = knobs.current()
    try:
        machine = _target(target or settings.target)
    except ValueError as problem:
        if target:
            raise
        raise InvalidKnob("STITCH_TARGET", given=settings.target, expected=f"a target: {problem}") from None
    if settings.vector_bits is not None:
        machine = replace(machine, vector_bits=min(settings.vector_bits, machine.vector_bits))
    store = Cache(settings.cache_dir if cache else None, settings.cache_bytes)
    try:
        return machine, store, _key(model, machine, shapes, store) if store.directory is not None else ""
    except OSError:
        return machine, store, ""  # no such file, say: the importer tells


class CompiledModel(RunnableModel):
    """A compiled model. Runs may overlap in time, from any number of threads."""

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        self._executable = Executable(artifact, threads)
        self.artifact = artifact

    def run(
        self,
        output_names: Sequence[str] | None,
        feeds: Mapping[str, np.ndarray],
        outputs: Sequence[np.ndarray | None] | None = None,
    ) -> list[np.ndarray]:
        """The named outputs (None: all) for arrays by input name, as onnxruntime's `run`.

        `outputs`: arrays to write into, in the order of the model's outputs, None for those to be made; they must not
        overlap an input. Raises InputError."""
        results = self._executable.run(self._in_order(feeds), outputs)
        return results if output_names is None else [results[self._position(name)] for name in output_names]

    def bind(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> Bound:
        """A call without arguments, for those who run the same arrays again and again: it reads what is in the inputs
        at that time, writes `outputs` (made here, if they are not given) and returns them.

        All checks are made here, once. Raises InputError, also for an input that would have to be copied."""
        return self._executable.bind(self._in_order(feeds), outputs)

    def explain(self) -> Explanation:
        """What was stitched, why, what was not, why not, and how much memory it takes."""
        from stitch.explain import Explanation

        return Explanation(self.artifact.report, last=self._executable.last_sizes())

    def _pipeline(self) -> Pipeline:
        return single(self.artifact, self._executable.run)


# ------------------------------------------------------------------ what a cached artifact depends on


@lru_cache(maxsize=16)
def _target(text: str | None) -> targets.Target:
    if text is not None and text != "host":
        return targets.parse(text)
    here = cpu.host()
    return targets.from_host(here.triple, here.cpu, here.features)


def _key(model: Any, target: targets.Target, shapes: Shapes | None, store: Cache) -> str:
    """A digest of everything that compilation depends on, but for external data (see `pipelined.unchanged`)."""
    h = hashlib.sha256()
    if isinstance(model, str | os.PathLike):
        h.update(_file_digest(model, store))
        h.update(str(Path(model).absolute().parent).encode())
    elif isinstance(model, bytes | bytearray | memoryview):
        h.update(model)
    else:
        h.update(model.SerializeToString(deterministic=True))
    k = knobs.current()
    settings = (k.schemes, k.merging, k.adaptive_mapping, k.winograd, k.l2_bytes)  # vector_bits is in the target
    h.update(repr((__version__, _sources(), str(target), settings, sorted((shapes or {}).items()))).encode())
    return h.hexdigest()


_SETTLED_NS = 2_000_000_000  # the coarsest clock of the usual file systems


def _file_digest(path: str | os.PathLike[str], store: Cache) -> bytes:
    """The digest of a file's contents. The store remembers it, as `git` does, under what the file system says of the
    file, its change time above all, which nobody can set: so a large model is not read again to find its artifact.

    A file that was changed just now is not remembered: a second change might not alter its times."""
    if not os.path.isfile(path):  # a pipe, or a device without end: the importer tells
        raise OSError("not a file")
    with open(path, "rb") as file:
        before, now = os.fstat(file.fileno()), time_ns()
        key = hashlib.sha256(repr(("contents", os.path.realpath(path), _identity(before))).encode()).hexdigest()
        known = store.load_bytes(key)
        if known is not None:
            return known
        digest = hashlib.file_digest(file, "sha256").digest()
        settled = now - max(before.st_ctime_ns, before.st_mtime_ns) > _SETTLED_NS
        if settled and _identity(os.fstat(file.fileno())) == _identity(before):
            store.store_bytes(key, digest)
    return digest


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@lru_cache(maxsize=1)
def _sources() -> str:
    """The compiler's own files, by size and time: an edited compiler does not find its old results."""
    root = Path(__file__).parent
    rows = []
    for folder in (root, *(f for f in root.iterdir() if f.is_dir())):
        with os.scandir(folder) as entries:
            for e in entries:
                if e.name.endswith(".py"):
                    s = e.stat()
                    rows.append((folder.name, e.name, s.st_size, s.st_mtime_ns))
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()
