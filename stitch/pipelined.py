"""A compiled model in stages on CPUs of their own: what `stitch.optimize` gives for several devices.

    model = compile("model.onnx", target, [{0}, {1}], assign=halves)
    for y, in model.stream({"x": x} for x in images):
        ...

Which kernels a stage has is said by `assign` (`stitch.partition.split`), or was decided by `stitch.placed`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stitch.bundle import Bundle, whole
from stitch.decision import Assignment, Decision
from stitch.errors import InputError
from stitch.model import RunnableModel
from stitch.plan import Artifact, np_dtype
from stitch.runtime.binding import Bound, check_memory
from stitch.runtime.cache import Cache
from stitch.runtime.device import Null
from stitch.runtime.pipeline import Helpers, Pipeline, load, single

if TYPE_CHECKING:
    from stitch.explain import Explanation
    from stitch.stitching.schedule import Stitched
    from stitch.target import Target

Places = Sequence["Collection[int] | None"]


class PipelinedModel(RunnableModel):
    """Part k of `bundle` runs on the CPUs `places[k]`, with as many threads, and on those of its `helpers`. Raises
    ResourceError for CPUs that cannot be had."""

    def __init__(
        self, bundle: Bundle, places: Places, threads: Sequence[int] | None = None, helpers: Sequence[Helpers] = ()
    ) -> None:
        super().__init__(bundle.inputs, bundle.outputs)
        self.bundle = bundle
        self.pipeline = load(bundle, places, threads, helpers)

    def run(
        self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray],
        outputs: Sequence[np.ndarray | None] | None = None,
    ) -> list[np.ndarray]:  # fmt: skip
        """The named outputs (None: all) for arrays by input name. The stages run one after the other.

        `outputs`: arrays to write to, in the order of the model's outputs, None for those to be made; they must not
        overlap an input. Raises InputError."""
        results = self.pipeline.run(self._in_order(feeds), outputs)
        return results if output_names is None else [results[self._position(name)] for name in output_names]

    def bind(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> Bound:
        """A call without arguments, for those who run the same arrays again and again: it reads what is in the inputs
        at that time, writes the same outputs each time, and returns them. Those that are not given are made by the
        first call; where shapes depend on more than the inputs' shapes, by each.

        Raises InputError, for an input that would have to be copied here, for shapes that do not fit by the call."""
        given = self._in_order(feeds)
        own = list(outputs) if outputs is not None else [None] * len(self.bundle.outputs)
        if len(own) != len(self.bundle.outputs):
            raise InputError(None, f"{len(own)} outputs are given, but the model has {len(self.bundle.outputs)}")
        dtypes = [np_dtype(port.dtype) for port in self.bundle.inputs]
        arrays = [np.require(a, dtype, ["C", "A"]) for a, dtype in zip(given, dtypes, strict=True)]
        check_memory(self.bundle, given, arrays, own)
        return self.pipeline.bind(arrays, own)

    def explain(self) -> Any:
        """What was stitched, why, what was not, why not, and how much memory it takes."""
        from stitch.explain import Explanation

        return Explanation(self.bundle.report)

    def close(self) -> None:
        """Ends streams and threads. Nothing runs afterwards."""
        self.pipeline.close()

    def _pipeline(self) -> Pipeline:
        return self.pipeline


def compile(
    model: Any, target: Target, places: Places, *,
    assign: Callable[[Stitched], Sequence[int]], named: str = "",
    shapes: Mapping[str, Sequence[int | str | None]] | None = None, store: Cache | None = None, key: str = "",
) -> PipelinedModel:  # fmt: skip
    """A model in as many stages as there are places.

    `key`, of all that the kernels depend on, and `named`, which has to tell one `assign` from another, find the bundle
    in `store`; without a key, nothing is kept."""
    name = hashlib.sha256(repr((key, len(places), named)).encode()).hexdigest() if key and store is not None else ""
    bundle = in_parts(model, target, shapes, lambda s: Assignment(assign(s)), store, name)
    if len(bundle.parts) < len(places):
        places = places[: len(bundle.parts)]
    return PipelinedModel(bundle, places)


def in_parts(
    model: Any, target: Target, shapes: Mapping[str, Sequence[int | str | None]] | None,
    assign: Callable[[Stitched], Assignment], store: Cache | None, name: str,
) -> Bundle:  # fmt: skip
    """The model in parts, from `store` if it is there under this name; "": nothing is kept."""
    bundle = store.load_bundle(name) if name and store is not None else None
    if bundle is None or not unchanged(bundle.report):
        from stitch.compiler import compile_parts

        bundle = compile_parts(model, target, shapes, assign)
        if name and store is not None:
            store.store_bundle(name, bundle)
    return bundle


class PlacedModel(PipelinedModel):
    """A model in the stages that were decided on."""

    def __init__(self, bundle: Bundle) -> None:
        self.decision = Decision.of_json(bundle.report["placement"])
        stages = self.decision.stages
        super().__init__(bundle, [s.cpus for s in stages], helpers=[s.helpers for s in stages])

    def explain(self) -> Decision:
        """The stages, what they are predicted to take, the bottleneck, and what else there was."""
        return self.decision


class PinnedModel(PipelinedModel):
    """A whole model on the CPUs that the user names, with a team of some size."""

    def __init__(self, artifact: Artifact, cpus: Collection[int], threads: int) -> None:
        super().__init__(whole(artifact), [cpus], [threads])
        self.threads = threads


class NullModel(RunnableModel):
    """A model on the null device: outputs of the right shapes, all zero, and nothing computed."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact.inputs, artifact.outputs)
        self.artifact = artifact
        self.pipeline = single(artifact, Null().load(artifact))

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs (None: all), all zero."""
        results = self.pipeline.run(self._in_order(feeds))
        return results if output_names is None else [results[self._position(name)] for name in output_names]

    def explain(self) -> Explanation:
        """What would be run elsewhere."""
        from stitch.explain import Explanation

        return Explanation(self.artifact.report)

    def _pipeline(self) -> Pipeline:
        return self.pipeline


def unchanged(report: Mapping[str, Any]) -> bool:
    """False if a file of external data is not what it was when the report was made."""
    for path, size, time in report.get("external", ()):
        try:
            now = os.stat(path)
        except OSError:
            return False
        if (now.st_size, now.st_mtime_ns) != (size, time):
            return False
    return True
