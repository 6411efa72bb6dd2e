"""A model that stitch compiles in part: the regions of `stitch.delegation` as stages, in order, and why there are any.

model = compile(proto, compile_region, OnnxRuntime())
print(model.explain())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stitch.bundle import Given, Made, Source, shapes_follow
from stitch.errors import UnsupportedOperator
from stitch.model import RunnableModel
from stitch.plan import Artifact, Port
from stitch.runtime.delegate import Delegate, runner
from stitch.runtime.device import Run
from stitch.runtime.pipeline import Pipeline
from stitch.runtime.stage import Stage

if TYPE_CHECKING:
    from stitch.delegation import Cutter, Delegation, Region
    from stitch.inputs import Shapes

Compile = Callable[[Any], tuple[Artifact, Run]]
"""A region's ModelProto, compiled and loaded."""


@dataclass(frozen=True)
class Division:
    """Which nodes went where: (device, nodes) of each region in order, and (node, code, text) for delegated ones.
    `notes`: what was tried."""

    regions: tuple[tuple[str, tuple[str, ...]], ...]
    reasons: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        reasons = [dict(zip(("node", "code", "text"), row, strict=True)) for row in self.reasons]
        regions = [{"device": d, "nodes": list(n)} for d, n in self.regions]
        return {"regions": regions, "reasons": reasons, "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = []
        from stitch.delegation import REASONS

        why = {node: f"{text}: {REASONS[code]} ({code})" for node, code, text in self.reasons}
        for k, (device, nodes) in enumerate(self.regions):
            some = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
            lines.append(f"region {k} on {device}: {some or 'outputs alone'}")
            if device != "stitch":
                lines += [f"    {text}" for text in dict.fromkeys(why[n] for n in nodes if n in why)]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Found:
    """`nodes`: those for the delegate because it is faster, with what was measured; `notes`: the same for people."""

    nodes: Mapping[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps({"nodes": dict(self.nodes), "notes": self.notes})

    @staticmethod
    def of_json(text: str | bytes) -> Found:
        """Raises ValueError, KeyError or TypeError for what is none."""
        data = json.loads(text)
        return Found(dict(data["nodes"]), tuple(data["notes"]))

    def applied(self, cutter: Cutter) -> Cutter:
        """The nodes marked, as far as they are not marked already."""
        from stitch.delegation import FASTER, Reason

        return cutter.marked({node: Reason(FASTER, text) for node, text in self.nodes.items()})


class DelegatedModel(RunnableModel):
    """Runs may overlap in time."""

    def __init__(self, inputs: Sequence[Port], outputs: Sequence[Port], pipeline: Pipeline, division: Division) -> None:
        super().__init__(inputs, outputs)
        self.pipeline, self.division = pipeline, division

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs (None: all) for arrays by input name. Raises InputError."""
        results = self.pipeline.run(self._in_order(feeds))
        return results if output_names is None else [results[self._position(name)] for name in output_names]

    def explain(self) -> Division:
        """Which nodes went where, and why."""
        return self.division

    def _pipeline(self) -> Pipeline:
        """One stage: regions have no CPUs of their own, and there may be many."""

        def run(arrays: list[np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> list[np.ndarray]:
            return self.pipeline.run(arrays)

        sources = tuple(Given(k) for k in range(self._count))
        return Pipeline(
            [Stage("the model", run, sources, None, False)], [Made(0, k) for k in range(len(self._outputs))]
        )


def compile(
    model: Any, compile_region: Compile, delegate: Delegate, shapes: Shapes | None = None,
    more: Callable[[Cutter, DelegatedModel, Callable[[Cutter], DelegatedModel]], Found] | None = None,
) -> DelegatedModel:  # fmt: skip
    """A model of which stitch refuses some operators. `more` finds others for the delegate, as `stitch.trial.tried`
    does. Raises what `compile_region` and `delegate.load` raise, but for the UnsupportedOperator that moves a node to
    the delegate."""
    from stitch.delegation import Cutter, open_model

    cutter = Cutter(open_model(model, shapes))
    done: dict[bytes, tuple[Artifact, Run]] = {}

    def build(marked: Cutter) -> DelegatedModel:
        return _settled(marked, compile_region, delegate, done)

    base = build(cutter)
    if more is None:
        return base
    found = more(cutter, base, build)
    made = build(found.applied(cutter)) if found.nodes else base
    made.division = replace(made.division, notes=found.notes)
    return made


def _settled(
    cutter: Cutter, compile_region: Compile, delegate: Delegate, done: dict[bytes, tuple[Artifact, Run]]
) -> DelegatedModel:
    """The model in regions that can all be compiled; marks what has to be delegated for that."""
    from stitch.delegation import supported

    while True:
        found = cutter.cut()
        refusal = _compiled(found, compile_region, done, supported)
        if refusal is None:
            return _assembled(found, done, delegate)
        if not cutter.refuse(refusal):
            raise refusal


def _key(region: Region) -> bytes:
    key: bytes = region.model.SerializeToString(deterministic=True)
    return key


def _compiled(
    found: Delegation, compile_region: Compile, done: dict[bytes, tuple[Artifact, Run]],
    supported: Callable[[Any], UnsupportedOperator | None],
) -> UnsupportedOperator | None:  # fmt: skip
    """Compiles what is not `done` yet; the first refusal, if there is one. All are looked at before one is compiled."""
    fresh = {key: r for r in found.regions if r.kind == "stitch" and (key := _key(r)) not in done}
    for region in fresh.values():
        if (refusal := supported(region.model)) is not None:
            return refusal
    for key, region in fresh.items():
        try:
            done[key] = compile_region(region.model)
        except UnsupportedOperator as refusal:
            return refusal
    return None


def _assembled(found: Delegation, done: Mapping[bytes, tuple[Artifact, Run]], delegate: Delegate) -> DelegatedModel:
    ports = {p.name: p for p in found.inputs if p.name not in found.loose}
    where: dict[str, Source] = {p.name: Given(k) for k, p in enumerate(found.inputs)}
    stages = []
    for k, region in enumerate(found.regions):
        if region.kind == "stitch":
            artifact, run = done[_key(region)]
            names, follows = [p.name for p in artifact.inputs], shapes_follow(artifact)
        else:
            names, follows = list(region.inputs), False
            session = delegate.load(_key(region), region.outputs)
            run = runner(session, [ports.get(name, name) for name in names], f"region {k} on {delegate.name}")
        stages.append(Stage(f"region {k}", run, tuple(where[name] for name in names), None, follows))
        where |= {name: Made(k, i) for i, name in enumerate(region.outputs)}
    given = [p.name for p in found.outputs if isinstance(where[p.name], Given)]
    if given:
        stages.append(_echo(len(stages), [where[name] for name in given]))
        where |= {name: Made(len(stages) - 1, i) for i, name in enumerate(given)}
    results = [made for p in found.outputs if isinstance(made := where[p.name], Made)]
    division = Division(
        tuple((("stitch" if r.kind == "stitch" else delegate.name), r.nodes) for r in found.regions),
        tuple((node, reason.code, reason.text) for node, reason in found.reasons.items()),
    )
    return DelegatedModel(found.inputs, found.outputs, Pipeline(stages, results), division)


def _echo(number: int, sources: Sequence[Source]) -> Stage:
    """A stage that gives copies of what it takes, where an input of the model is an output too."""

    def run(arrays: list[np.ndarray], outputs: Sequence[np.ndarray | None] | None = None) -> list[np.ndarray]:
        return [array.copy() for array in arrays]

    return Stage(f"region {number}", run, tuple(sources), None, False)
