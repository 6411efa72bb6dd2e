"""A model in stages, each on CPUs of its own: one item through all of them, or a stream of items.

    pipeline = load(bundle, [{0}, {1}])
    y, = pipeline.run([x])                     one after the other, on the calling thread
    for y, in pipeline.stream([x] for x in xs) at the same time, each on a thread of its own

The stages of a pipeline have thread teams of their own, whose workers run on the stage's CPUs.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from stitch.bundle import Bundle, Made, shapes_follow, whole
from stitch.errors import InputError, StitchError
from stitch.plan import Artifact
from stitch.runtime import affinity, cpu
from stitch.runtime.affinity import Cpus
from stitch.runtime.binding import Bound, bind_steps
from stitch.runtime.device import Run
from stitch.runtime.executable import Executable
from stitch.runtime.stage import Arrays, Stage
from stitch.runtime.stream import Stream
from stitch.runtime.threads import Team

T = TypeVar("T")
R = TypeVar("R")

Helpers = Sequence[Collection[int]]
"""Sets of CPUs that a stage shares some of its work out to."""


class Pipeline:
    """`stages` in order; `results`: which of them gives each output of the model. Runs and streams may overlap in time.

    `teams` are its own, and end with it. Raises ResourceError for CPUs that cannot be had.
    """

    def __init__(self, stages: Sequence[Stage], results: Sequence[Made], teams: Sequence[Team] = ()) -> None:
        for stage in stages:
            if stage.cpus is not None:
                affinity.checked(stage.cpus)
        self.stages = tuple(stages)
        self.results = tuple(results)
        self._bound = any(stage.cpus is not None for stage in stages)
        self._streams: weakref.WeakSet[Stream[Any, Any]] = weakref.WeakSet()
        self._end = weakref.finalize(self, _give_back, tuple(teams), os.getpid())
        self._end.atexit = False  # teams end at exit by themselves

    def run(self, given: Sequence[Any], outputs: Sequence[np.ndarray | None] | None = None) -> Arrays:
        """The outputs for one item's inputs, in the model's order: all stages in turn, on the calling thread, which
        is on each stage's CPUs meanwhile. `outputs`: arrays to write to, None for those to be made.

        Raises InputError for arrays that do not fit."""
        self._check_open()
        arrays = as_arrays(given)
        own = self._own(outputs)
        made: list[Arrays] = []
        with affinity.restored(self._bound):
            for k, stage in enumerate(self.stages):
                affinity.pin(stage.cpus)
                made.append(stage.run(stage.inputs(arrays, made), _asked(own[k], stage) if k in own else None))
        results = [made[m.part][m.output] for m in self.results]
        for k, array in enumerate(outputs or ()):
            if array is not None and array is not results[k]:  # one value under two names
                array[...] = results[k]
                results[k] = array
        return results

    def _own(self, outputs: Sequence[np.ndarray | None] | None) -> dict[int, dict[int, np.ndarray]]:
        """By stage and number of its output: the caller's array. A value with two names is written to the first."""
        found: dict[int, dict[int, np.ndarray]] = {}
        if outputs is not None and len(outputs) != len(self.results):
            raise InputError(None, f"{len(outputs)} outputs are given, but the model has {len(self.results)}")
        for made, array in zip(self.results, outputs or (), strict=False):
            if array is not None:
                found.setdefault(made.part, {}).setdefault(made.output, array)
        return found

    def bind(self, given: Sequence[np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> Bound:
        """A call that runs on the memory of these arrays, and writes to the same outputs each time; those that are not
        given are made by the first, or, where shapes do not follow from the inputs', by each."""
        own: list[Any] = list(outputs) if outputs is not None else [None] * len(self.results)
        keep = all(stage.follows for stage in self.stages)

        def call() -> Arrays:
            results = self.run(given, own)
            if keep:
                own[:] = results
            return results

        return bind_steps(call, own)

    def stream(
        self, items: Iterable[T], prepare: Callable[[T], Arrays], finish: Callable[[Arrays], R],
        depth: int = 2, reuse: bool = False,
    ) -> Stream[T, R]:  # fmt: skip
        """The results for items, in order; see `Stream`."""
        self._check_open()
        stream = Stream(self.stages, self.results, items, prepare, finish, depth, reuse, keep=self)
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Ends its streams, and its teams' threads; no run may be going on. Nothing runs afterwards."""
        for stream in list(self._streams):
            stream.close()
        self._end()

    def _check_open(self) -> None:
        if not self._end.alive:
            raise StitchError("the pipeline is closed", "load it again")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _asked(own: Mapping[int, np.ndarray], stage: Stage) -> list[np.ndarray | None]:
    return [own.get(k) for k in range(max(stage.outputs, max(own) + 1))]


def load(
    bundle: Bundle, places: Sequence[Collection[int] | None], threads: Sequence[int] | None = None,
    helpers: Sequence[Helpers] = (),
) -> Pipeline:  # fmt: skip
    """A pipeline on this machine's processor: part k runs on the CPUs `places[k]` (None: anywhere), with `threads[k]`
    threads; by default, as many as CPUs. A part with `helpers` has a team of a thread for each CPU of its own, then of
    each helper's, which stay there; its code says what they do.

    Raises ResourceError for CPUs that cannot be had."""
    if len(places) != len(bundle.parts):
        raise ValueError(f"{len(bundle.parts)} parts need as many places, not {len(places)}")
    sets = [None if place is None else affinity.checked(place) for place in places]
    stages, teams = [], []
    for k, (artifact, sources, cpus) in enumerate(zip(bundle.parts, bundle.sources, sets, strict=True)):
        size = threads[k] if threads is not None else len(cpus) if cpus is not None else None
        members: list[Cpus] = []
        if k < len(helpers) and helpers[k] and cpus is not None:
            members = [some for some in (cpus, *map(affinity.checked, helpers[k])) for _ in some]
            size = len(members)
        team = cpu.own_team(size, members) if size is not None else None
        teams += [team] if team is not None else []
        run = Executable(artifact, size, team=team).run
        stages.append(Stage(f"stage {k}", run, sources, cpus, shapes_follow(artifact), len(artifact.outputs)))
    return Pipeline(stages, bundle.results, teams)


def single(artifact: Artifact, run: Run) -> Pipeline:
    """A whole model, loaded already, as one stage that runs anywhere."""
    bundle = whole(artifact)
    stage = Stage("the model", run, bundle.sources[0], None, shapes_follow(artifact), len(artifact.outputs))
    return Pipeline([stage], bundle.results)


def as_arrays(given: Sequence[Any]) -> Arrays:
    return [x if type(x) is np.ndarray else np.asarray(x) for x in given]


def _give_back(teams: Sequence[Team], process: int) -> None:
    if os.getpid() == process:  # a child after fork has none of the threads
        for team in teams:
            cpu.give_back(team)
